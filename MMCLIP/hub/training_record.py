"""training_record.json: what others may know of a run, the counts of its rows, its recipe and its machine.

It names no folder, no row and no patient, so a model card can be made of it; `run_config.json` beside it has the rest.
"""

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers

from .. import __version__
from .paths import public_name


FILE_NAME = "training_record.json"
RUN_FILES = (FILE_NAME, "train_results.json", "metrics.json")  # what tells the folder of a run
# of the arguments of a run those that decide what is learned, in the order of the card
RECIPE = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "grad_cache_rows",
    "group_by_text_length", "optim", "learning_rate", "text_learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "bf16", "fp16", "seed", "metric_for_best_model",
    "recognizer", "mlm_masking", "mlm_ratio", "mlm_kinds", "mlm_cue_ratio", "prompt_labels", "validation_labels",
    "max_length", "max_rotation", "max_translation", "max_scaling", "max_contrast", "noise_std", "shuffle_pairs",
    "num_phantoms", "num_unpaired_phantoms", "phantom_size", "phantom_seed",
)  # fmt: skip
_TOWERS = {
    "vision": "vision_model_name_or_path",
    "text": "text_model_name_or_path",
    "checkpoint": "model_name_or_path",
}


def count_rows(rows: datasets.Dataset) -> list[dict]:
    """`{"source", "rows", "images", "reports", "patients"}` of each source; patients None where rows name none."""
    counts = defaultdict(lambda: {"rows": 0, "images": 0, "reports": 0})
    patients = defaultdict(set)
    for table in rows.select_columns(["source", "patient_id", "image", "report"]).with_format("arrow").iter(1000):
        columns = (table[name].to_pylist() for name in ("source", "patient_id"))
        has = (table[name].is_valid().to_pylist() for name in ("image", "report"))
        for source, patient, image, report in zip(*columns, *has, strict=True):
            counted = counts[source]
            counted["rows"] += 1
            counted["images"] += image
            counted["reports"] += report
            if patient:
                patients[source].add(patient)
    return [{"source": name, **counts[name], "patients": len(patients[name]) or None} for name in sorted(counts)]


def training_record(
    arguments: tuple,
    train_rows: datasets.Dataset | None = None,
    validation_rows: datasets.Dataset | None = None,
    num_parameters: int | None = None,
) -> dict:
    """The content of training_record.json; `arguments` are the dataclasses of a run, the training arguments last."""
    values = {name: getattr(part, name) for part in arguments for name in RECIPE if hasattr(part, name)}
    unset = (None, [], "")
    recipe = {n: values[n] for n in RECIPE if n in values and values[n] is not False and values[n] not in unset}
    if recipe.get("max_steps", 0) <= 0:
        recipe.pop("max_steps", None)
    if ":" in recipe.get("recognizer", ""):  # KIND:NAME, and the name may be a folder
        kind, _, name = recipe["recognizer"].partition(":")
        recipe["recognizer"] = f"{kind}:{public_name(name)}"
    towers = {
        part: public_name(getattr(given, key))
        for given in arguments
        for part, key in _TOWERS.items()
        if getattr(given, key, None) is not None
    }
    training = arguments[-1]
    device = training.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rows = {"train": train_rows, "validation": validation_rows}
    return {
        "data": {part: count_rows(some) for part, some in rows.items() if some is not None},
        "base_models": towers,
        "recipe": {name: getattr(value, "value", value) for name, value in recipe.items()},
        "num_parameters": num_parameters,
        "keeps_best": bool(training.load_best_model_at_end),
        "processes": training.world_size,
        "machine": machine,
        "versions": {"mmclip": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def write_record(output_dir: str | os.PathLike, record: dict) -> Path:
    """Write training_record.json into `output_dir`."""
    path = Path(output_dir) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    return path


@dataclass
class Run:
    """What is known of the run behind a checkpoint: its record, its seconds and steps, its validation.

    `validation` is `{"metric", "value", "step", "chose"}` of that checkpoint, None without one; `chose` is True where
    the checkpoint was kept for this number.
    """

    record: dict = field(default_factory=dict)
    seconds: float | None = None
    steps: int | None = None
    validation: dict | None = None


def validation_of(state: dict, keeps_best: bool) -> dict | None:
    """The validation AUROC of the checkpoint that a run leaves: the one that it goes back to at its end, or the last.

    `keeps_best` is `load_best_model_at_end`; `metric_for_best_model` may be another than the AUROC.
    """
    key = "eval_macro_auroc"
    entries = [entry for entry in state.get("log_history", ()) if entry.get(key) is not None]
    if not entries:
        return None
    chosen, best = entries[-1], state.get("best_model_checkpoint")  # None where no best one was saved
    if keeps_best and best:
        step = int(Path(best).name.rpartition("-")[2])
        chosen = next((entry for entry in entries if entry["step"] == step), chosen)
    chose = keeps_best and chosen[key] == state.get("best_metric")
    return {"metric": "macro_auroc", "value": chosen[key], "step": chosen["step"], "chose": chose}


def find_run(model_dir: str | os.PathLike) -> Path:
    """The folder of the run that made a checkpoint: its own, or the one above, where the record or the results lie."""
    folder = Path(model_dir).resolve()
    places = [place / name for name in RUN_FILES for place in (folder, folder.parent)]
    return next((path.parent for path in places if path.is_file()), folder)


def read_run(folder: str | os.PathLike, model_dir: str | os.PathLike | None = None) -> Run:
    """The run whose files lie in `folder`; what is not there stays empty. Raises `ValueError` for a broken file.

    A `model_dir` that is one of the Trainer's own checkpoints has a state of its own, as it was then.
    """
    places = {name: Path(folder) / name for name in (FILE_NAME, "train_results.json", "trainer_state.json")}
    own_state = Path(model_dir or folder) / "trainer_state.json"
    is_checkpoint = own_state != places["trainer_state.json"] and own_state.is_file()
    if is_checkpoint:
        places["trainer_state.json"] = own_state
    files = {}
    for name, path in places.items():
        try:
            files[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}). Let the run write it again, or delete it.") from error
    state = files["trainer_state.json"]
    return Run(
        record=files[FILE_NAME],
        seconds=None if is_checkpoint else files["train_results.json"].get("train_runtime"),
        steps=state.get("global_step"),
        validation=validation_of(state, files[FILE_NAME].get("keeps_best", False) and not is_checkpoint),
    )

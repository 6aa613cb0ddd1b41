"""The runs of a fine-tuning, one for each fraction and seed: fitted or found finished, summed up and reported."""

import copy
import csv
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from ..evaluation import report
from ..evaluation.checkpoints import load_whole
from ..evaluation.controls import group_controls
from ..evaluation.embeddings import EmbeddingCache, image_features, model_fingerprint
from ..evaluation.linear_probe import (
    LinearProbe,
    fit_linear_probe,
    fraction_entry,
    nested_subset,
    run_metrics,
    seeds_summary,
    subset_size,
    validation_thresholds,
)
from ..evaluation.protocols import overlap_cautions
from ..modeling_mmclip import MMCLIPModel
from .classification import (
    ROLES,
    ClassificationDataset,
    LabelledRows,
    build_trainer,
    check_finite,
    load_classifier,
)
from .classification_arguments import (
    ClassificationArguments,
    ClassificationDataArguments,
    ClassificationTrainingArguments,
)


logger = logging.getLogger(__name__)
Arguments = tuple[ClassificationArguments, ClassificationDataArguments, ClassificationTrainingArguments]
# what changes where a run is written, how it is watched or how fast it is, but not what comes out
_OF_NO_EFFECT = (
    "output_dir", "run_name", "seed", "report_to", "disable_tqdm", "log_", "logging_", "hub_", "push_to_hub", "project",
    "trackio_", "dataloader_num_workers", "dataloader_p", "save_total_limit", "do_", "local_rank", "fractions", "seeds",
    "num_bootstrap", "cache_dir", "model_name_or_path", "per_device_eval_batch_size",
)  # fmt: skip


def run_folder(output_dir: str | os.PathLike, fraction: float, seed: int) -> Path:
    return Path(output_dir) / f"fraction_{fraction:g}_seed_{seed}"


def run_all(processor, labelled: LabelledRows, arguments: Arguments) -> dict:
    """Fit what is not there yet, and sum up all: what metrics.json holds under `classification`, and both hashes.

    Each run leaves a folder with `checkpoint/`, `predictions.csv` and, written last, `metrics.json`; under LoRA also
    `adapter/`. One that has ended is kept. Raises `ValueError` where it was made by other arguments, before anything
    is fitted.
    """
    what, data, training = arguments
    model = load_whole(MMCLIPModel, what.model_name_or_path)
    overlaps = overlap_cautions(labelled.rows["test"].unique("source"), model.config.training_sources)
    hashes = {"model_hash": model_fingerprint(model, processor), "data_hash": data_hash(labelled)}
    made_by = run_arguments(arguments) | hashes
    folders = {(f, s): run_folder(training.output_dir, f, s) for f in what.fractions for s in what.seeds}
    records = {key: read_run(folder, made_by, labelled) for key, folder in folders.items()}
    features = None
    if what.method == "probe" and None in records.values():
        device, cache = training.device, EmbeddingCache(what.cache_dir)
        features = {
            role: image_features(
                model.to(device).eval(),
                processor,
                rows,
                cache=cache,
                batch_size=training.per_device_eval_batch_size,
                num_workers=training.dataloader_num_workers,
                progress=f"{role} images",
            ).pooled.numpy()
            for role, rows in labelled.rows.items()
        }
    del model
    for (fraction, seed), folder in folders.items():
        if records[fraction, seed] is not None:
            logger.info(f"{folder} has ended before and is kept")
            continue
        chosen = nested_subset(labelled.patients["train"], fraction, seed)
        logger.info(f"{folder}: {len(chosen)} training rows")
        if features is not None:
            margins, about = _fit_probe(folder, processor, labelled, chosen, features, what)
        else:
            margins, about = _fit_by_trainer(folder, processor, labelled, chosen, seed, arguments)
        records[fraction, seed] = _write_run(folder, labelled, chosen, margins, about, made_by, training)
    return {"classification": summarise(labelled, records, what), "overlaps": overlaps, **hashes}


def data_hash(labelled: LabelledRows) -> str:
    """20 hex digits of the rows, their patients, labels and targets; pictures are not read."""
    digest = hashlib.blake2b(json.dumps(labelled.labels).encode(), digest_size=10)
    for role, rows in labelled.rows.items():
        digest.update(json.dumps([role, list(rows["row_id"]), labelled.patients[role]]).encode())
        digest.update(labelled.targets[role].tobytes())
    return digest.hexdigest()


def run_arguments(arguments: Arguments) -> dict:
    """What decides the result of a run, as JSON would hold it; of the Trainer's arguments nothing for a probe."""
    what, data, training = arguments
    values = dataclasses.asdict(what) | dataclasses.asdict(data)
    if what.method != "probe":
        values |= training.to_dict()
    values = {name: value for name, value in values.items() if not name.startswith(_OF_NO_EFFECT)}
    return json.loads(json.dumps(values, default=str))


# ---------------------------------------------------------------------------------------------------------------- fits


def _fit_probe(
    folder: Path,
    processor,
    labelled: LabelledRows,
    chosen: np.ndarray,
    features: Mapping[str, np.ndarray],
    arguments: ClassificationArguments,
) -> tuple[dict[str, np.ndarray], dict]:
    validation, options = (), {}
    if arguments.l2 is not None:
        options["l2"] = arguments.l2
    elif "validation" in features:
        validation = (features["validation"], labelled.targets["validation"])
    probe = fit_linear_probe(
        features["train"][chosen], labelled.targets["train"][chosen], labelled.labels, *validation, **options
    )
    save_probe(folder / "checkpoint", probe, processor, labelled, arguments)
    return {role: probe.margins(features[role]) for role in features if role != "train"}, {"l2": probe.l2}


def save_probe(
    folder: Path, probe: LinearProbe, processor, labelled: LabelledRows, arguments: ClassificationArguments
) -> None:
    """The frozen tower with the weights of the probe as its classifier: its logits are the probe's margins."""
    model = load_classifier(arguments.model_name_or_path, labelled.labels, arguments.task)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(probe.weight.T.copy()))
        model.classifier.bias.copy_(torch.from_numpy(probe.bias))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _fit_by_trainer(
    folder: Path, processor, labelled: LabelledRows, chosen: np.ndarray, seed: int, arguments: Arguments
) -> tuple[dict[str, np.ndarray], dict]:
    what, data, training = arguments
    training = copy.copy(training)
    training.output_dir, training.seed = str(folder), seed
    _remove_checkpoints(folder, training)  # of a run that was stopped
    transformers.set_seed(seed)
    model = load_classifier(what.model_name_or_path, labelled.labels, what.task)
    trainer = build_trainer(model, processor, labelled, chosen, what, data, training)
    num_trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trained = trainer.train()
    margins = {}
    for role in labelled.rows.keys() - {"train"}:
        dataset = ClassificationDataset(labelled.rows[role], labelled.targets[role], processor, augmented=False)
        margins[role] = check_finite(trainer.predict(dataset, metric_key_prefix=role).predictions)
    if what.method == "lora":
        model = trainer.accelerator.unwrap_model(trainer.model)
        if training.process_index == 0:
            model.save_pretrained(folder / "adapter")
            model.merge_and_unload().save_pretrained(folder / "checkpoint")
            processor.save_pretrained(folder / "checkpoint")
    else:
        trainer.save_model(str(folder / "checkpoint"))
    trainer.save_state()
    if training.process_index == 0:
        # a pickle, which nobody should load from a folder meant for others; run_config.json says the same
        (folder / "checkpoint" / "training_args.bin").unlink(missing_ok=True)
    _remove_checkpoints(folder, training)
    state = trainer.state
    about = {
        "num_trainable_parameters": num_trainable,
        "best_validation": state.best_metric,
        "best_step": state.best_global_step,
        "num_steps": state.global_step,
        "seconds": trained.metrics["train_runtime"],
    }
    return margins, about


def _remove_checkpoints(folder: Path, training: ClassificationTrainingArguments) -> None:
    """Those of the Trainer, which hold the optimiser too."""
    if training.process_index == 0:
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)


# --------------------------------------------------------------------------------------------------------------- files


def _write_run(
    folder: Path,
    labelled: LabelledRows,
    chosen: np.ndarray,
    margins: Mapping[str, np.ndarray],
    about: Mapping,
    made_by: Mapping,
    training: ClassificationTrainingArguments,
) -> dict:
    """The record of a run, `margins` (n, F) of the test rows in it; predictions.csv and metrics.json on the way."""
    labels, targets = labelled.labels, labelled.targets
    thresholds = None
    if "validation" in margins:
        thresholds = validation_thresholds(margins["validation"], targets["validation"], labels)
    seen = targets["train"][chosen]
    if labelled.is_multi_class:
        constant = [label for number, label in enumerate(labels) if not (seen == number).any()]
    else:
        constant = [label for label, column in zip(labels, seen.T, strict=True) if not {0, 1} <= set(column.tolist())]
    record = {
        **subset_size(labelled.patients["train"], chosen),
        "constant_labels": constant,
        **about,
        "thresholds": thresholds,
        "metrics": run_metrics(targets["test"], margins["test"], labels, thresholds),
    }
    if training.process_index == 0:
        _write_predictions(folder / "predictions.csv", labelled, margins["test"])
        part = report.write_metrics(folder / "part", {**record, "made_by": made_by})
        os.replace(part, folder / "metrics.json")  # last and whole: the run has ended
        part.parent.rmdir()
    return {**record, "margins": margins["test"]}


def _write_predictions(path: Path, labelled: LabelledRows, margins: np.ndarray) -> None:
    """`row_id`, the truth (`target:LABEL` of 1, 0 or empty for unknown; or `class`), and the logits, `logit:LABEL`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = labelled.labels
    truth, cells = report.truth_cells(labelled.targets["test"], labels)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row_id", *truth, *(f"logit:{label}" for label in labels)])
        for row_id, true, row in zip(labelled.rows["test"]["row_id"], cells, margins, strict=True):
            writer.writerow([row_id, *true, *(repr(float(value)) for value in row)])


def read_run(folder: Path, made_by: Mapping, labelled: LabelledRows) -> dict | None:
    """The record of a run that has ended, None for one that has not; raises `ValueError` if made by other arguments."""
    if not (folder / "metrics.json").is_file():
        return None
    record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    before = record.pop("made_by")
    differ = sorted(key for key in before.keys() | made_by.keys() if before.get(key) != made_by.get(key))
    if differ:
        changes = "; ".join(f"{key} was {before.get(key)!r} and is {made_by.get(key)!r}" for key in differ[:5])
        raise ValueError(
            f"{folder} holds a run of other arguments: {changes}. Choose another `output_dir`, or delete that folder."
        )
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = [[row[f"logit:{label}"] for label in labelled.labels] for row in csv.DictReader(file)]
    return {**record, "margins": np.array(rows, dtype=np.float64)}


# -------------------------------------------------------------------------------------------------------------- report


def summarise(
    labelled: LabelledRows, records: Mapping[tuple[float, int], dict], arguments: ClassificationArguments
) -> dict:
    """Each fraction's mean over its seeds, see [`seeds_summary`], and every run's own metrics under `seeds`."""
    fractions = {}
    for fraction in arguments.fractions:
        runs = {seed: records[fraction, seed] for seed in arguments.seeds}
        summary = seeds_summary(
            labelled.targets["test"],
            [record["margins"] for record in runs.values()],
            labelled.labels,
            labelled.patients["test"],
            [record["thresholds"] for record in runs.values()],
            arguments.num_bootstrap,
        )
        by_seed = {
            str(seed): {key: value for key, value in record.items() if key != "margins"}
            for seed, record in runs.items()
        }
        entry = fraction_entry(fraction, labelled.labels, by_seed, summary)
        fractions[f"{100 * fraction:g} %"] = {**entry, "seeds": by_seed}
    sizes = {role: subset_size(p, np.arange(len(p))) for role, p in labelled.patients.items()}
    return {
        "method": arguments.method,
        "task": arguments.task,
        "labels": labelled.labels,
        "left_out_labels": labelled.left_out,
        "data": {role: sizes[role] for role in ROLES if role in sizes},
        "num_bootstrap": arguments.num_bootstrap,
        "controls": group_controls(
            labelled.rows, labelled.targets, labelled.labels, labelled.patients, arguments.num_bootstrap
        ),
        "fractions": fractions,
    }


def summary_table(classification: Mapping) -> str:
    """A Markdown table: a line for each fraction, each metric with interval and deviation over seeds."""
    fractions = classification["fractions"]
    keys = [key for key in report.TITLES if any(values.get(key) is not None for values in fractions.values())]
    rows = []
    for name, values in fractions.items():
        cells = []
        for key in keys:
            cell = report.number_cell(values.get(key), values.get(f"{key}_ci"))
            deviation = values.get(f"{key}_sd")
            cells.append(cell if deviation is None else f"{cell}, sd {deviation:.3f}")
        rows.append([name, f"{values['num_patients']:g}", f"{values['num_images']:g}", *cells])
    return report.markdown_table(["training patients", "number", "images", *(report.TITLES[key] for key in keys)], rows)


def write_report(output_dir: str | os.PathLike, results: Mapping) -> Path:
    """report.md from the same `results` as metrics.json."""
    classification = results["classification"]
    fractions = classification["fractions"]
    sizes = ", ".join(
        f"{size['num_images']} {role} images of {size['num_patients']} patients"
        for role, size in classification["data"].items()
    )
    lines = ["# MMCLIP classification", "", *(f"- {key}: `{results[key]}`" for key in ("model", "data", "command"))]
    lines += [f"- method: {classification['method']}, {classification['task']}; {sizes}"]
    lines += [*report.caution_lines(results["overlaps"]), ""]
    lines += [summary_table(classification), ""]
    num_seeds = len(next(iter(fractions.values()))["seeds"])
    lines.append(
        f"Mean of {num_seeds} seed{'s' if num_seeds > 1 else ''}, in brackets the 95 % interval over test patients "
        f"({classification['num_bootstrap']} draws), sd: over seeds. With one seed a smaller fraction of the training "
        "patients lies in a larger one."
    )
    if classification["method"] == "probe" and num_seeds > 1:
        lines.append("A probe of all patients is the same for every seed.")
    if classification["task"] == "multi-label":
        lines.append(
            "Thresholds of F1, accuracy and MCC are those of best F1 on the validation rows."
            if "validation" in classification["data"]
            else "There are no validation rows to choose thresholds on, so F1, accuracy and MCC are left out."
        )
    if classification["left_out_labels"]:
        named = ", ".join(classification["left_out_labels"])
        lines.append(f"Not learned, as training rows state them one way only: {named}.")
    for name, values in fractions.items():
        if values["constant_labels"]:
            named = ", ".join(values["constant_labels"])
            lines.append(f"At {name}, some seed drew no image with, or none without: {named}.")
        if values.get("skipped"):
            skipped = f"\nNot scored, as test images have one value only: {', '.join(values['skipped'])}."
    if any(values.get("skipped") for values in fractions.values()):
        lines.append(skipped)
    if classification["task"] == "multi-label":
        rows = [
            [label, *(report.number_cell(v["per_class"][label]["auroc"], v["per_class"][label]["auroc_ci"])
                      for v in fractions.values())]
            for label in next(iter(fractions.values()))["per_class"]
        ]  # fmt: skip
        lines += ["", "AUROC of each label:", "", report.markdown_table(["label", *fractions], rows)]
    shuffled = {f"at {name}": v["shuffled_labels"] for name, v in fractions.items() if "shuffled_labels" in v}
    lines += report.controls_lines(classification["controls"], shuffled)
    path = Path(output_dir) / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def describe_data(data: ClassificationDataArguments) -> str:
    """Where the rows of each role came from."""
    parts: Sequence[tuple] = (
        ("train", data.train_manifest, data.train_split, data.num_phantoms),
        ("validation", data.validation_manifest, data.validation_split, data.num_validation_phantoms),
        ("test", data.test_manifest, data.test_split, data.num_test_phantoms),
    )
    said = []
    for role, manifests, split, number in parts:
        places = [f"{path} (split {split})" for path in manifests] + ([f"{number} phantoms"] if number else [])
        if places:
            said.append(f"{role}: {' and '.join(places)}")
    return "; ".join(said)

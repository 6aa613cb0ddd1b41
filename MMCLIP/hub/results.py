"""metrics.json of the evaluation scripts -> what a model card says: tables for readers, numbers for `model-index`.

Results count for one model only: they are refused where the hash of the weights that they were measured on is another.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult

from ..evaluation import report
from .paths import without_folders


ZERO_SHOT = ("zero-shot-image-classification", "Zero-shot classification")
RETRIEVAL = ("image-text-retrieval", "Image-text retrieval")
GROUNDING = ("image-segmentation", "Grounding of findings by heat maps")
PROBE = ("image-classification", "Linear probe on the frozen vision tower")
VALIDATION = "validation"
# of zero-shot and linear probe, one row of a table each: key in metrics.json -> metric of the Hub
CLASSIFICATION = {
    "macro_auroc": "roc_auc",
    "macro_average_precision": "average_precision",
    "accuracy": "accuracy",
    "macro_accuracy": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "macro_f1": "f1",
    "macro_mcc": "matthews_correlation",
    "mcc": "matthews_correlation",
}
PER_CLASS = {"auroc": ("roc_auc", "AUROC")}


@dataclass
class Evaluation:
    """One data set on which the model was measured.

    `measured` goes to `model-index`; `lines` are Markdown for the card. `dataset` is an id of letters, digits, dots and
    hyphens, `title` its name.
    """

    title: str
    dataset: str
    split: str
    command: str
    measured: list[EvalResult] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.dataset = dataset_id(self.dataset)

    def add(self, task: tuple[str, str], metric: str, name: str, value, interval=None, draws: int | None = None):
        """A number, to four digits; `interval` holds 95 % of `draws` of patients. A value of None was not measured."""
        if value is None:
            return
        options = {}
        if interval is not None:
            low, high = (round(float(bound), 4) for bound in interval)
            name = f"{name} (95 % interval {low:.3f} to {high:.3f})"
            options["metric_args"] = {
                "interval": [low, high], "level": 0.95, "method": "bootstrap over patients", "draws": draws
            }  # fmt: skip
        self.measured.append(
            EvalResult(
                task_type=task[0],
                task_name=task[1],
                dataset_type=self.dataset,
                dataset_name=self.title,
                dataset_split=self.split,
                metric_type=metric,
                metric_name=name,
                metric_value=round(float(value), 4),
                **options,
            )
        )


def dataset_id(source: str) -> str:
    """`source` as an id for `model-index`; rows of no source are "unknown"."""
    return re.sub(r"[^\w.-]+", "-", source or "unknown")


def read_results(path: str | os.PathLike, model_dir: str | os.PathLike, fingerprint: str) -> list[Evaluation]:
    """The evaluations in a metrics.json of run_zero_shot.py, run_retrieval.py or run_evaluation.py.

    They must be of the model in `model_dir`, whose `model_fingerprint` without code is `fingerprint`. Raises
    `ValueError` for anything else, also for a file of an older version, which has no hash of the weights.
    """
    path = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: no results can be read ({error}). Give the metrics.json of an evaluation, or its folder."
        ) from error
    known = ("zero_shot", "retrieval", "trials")
    if not isinstance(results, dict) or not any(key in results for key in known):
        raise ValueError(
            f"{path} holds none of {', '.join(known)}; expected the metrics.json of run_zero_shot.py, "
            "run_retrieval.py or run_evaluation.py."
        )
    try:
        return _read(results, path, model_dir, fingerprint)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not as this version of the evaluation scripts writes it ({error!r}). Evaluate this model again."
        ) from error


def _read(results: Mapping, path: Path, model_dir, fingerprint: str) -> list[Evaluation]:
    if "trials" in results:
        return _of_comparison(results, path, model_dir, fingerprint)
    _check_model(results.get("weights_hash"), results.get("model"), path, model_dir, fingerprint)
    data = results.get("dataset", {})
    sources = data.get("sources") or ["unknown"]
    evaluation = Evaluation(
        title=without_folders(results.get("data", "unknown")),
        dataset="+".join(source or "unknown" for source in sources),
        split=data.get("split") or "all rows",
        command=without_folders(results.get("command", "")),
    )
    evaluation.lines += report.caution_lines(results.get("overlaps", ()))
    _add_all(evaluation, results)
    return [evaluation]


def validation_result(validation: Mapping, dataset: str) -> Evaluation:
    """What a run knows by itself: its score on validation rows, which may have chosen the checkpoint."""
    found = Evaluation("rows that the run validated on", dataset, VALIDATION, "")
    name, told = (
        "macro AUROC on validation rows",
        f"Macro AUROC {validation['value']:.3f} at step {validation['step']}.",
    )
    if validation["chose"]:
        name += ", which chose the checkpoint"
        told += " This number chose the checkpoint, so expect less on new images."
    found.add(ZERO_SHOT, "roc_auc", name, validation["value"])
    found.lines.append(told)
    return found


def _check_model(weights: str | None, place: str | None, path: Path, model_dir, fingerprint: str) -> None:
    if weights != fingerprint:
        measured_on = f"weights {weights}" if weights else f"{place}, without a hash of its weights"
        raise ValueError(
            f"{path} was measured on {measured_on}, but {model_dir} holds the weights {fingerprint}. Evaluate this "
            "model again, or leave the file out."
        )


def _of_comparison(results: Mapping, path: Path, model_dir, fingerprint: str) -> list[Evaluation]:
    """The trials of run_evaluation.py, of the one model in it that is this one."""
    names = [name for name, about in results["models"].items() if about.get("weights_hash") == fingerprint]
    if not names:
        raise ValueError(
            f"{path} compares {', '.join(results['models'])}, none of which has the weights {fingerprint} of "
            f"{model_dir}. Evaluate this model again, or leave the file out."
        )
    found = []
    for key, trial in results["trials"].items():
        data = trial["data"]
        evaluation = Evaluation(
            title=f"{data['protocol']}: {data['num_scored']['test']:,} images of {data['num_patients']:,} patients",
            dataset=data["protocol"],
            split="test",
            command=without_folders(results.get("command", "")),
        )
        measured = trial["models"][names[0]]
        evaluation.lines += [data["source"], "", *(f"- caution: {sentence}" for sentence in data["cautions"])]
        evaluation.lines += report.caution_lines(measured["overlaps"])
        _add_all(evaluation, measured)
        evaluation.lines += report.controls_lines(trial["controls"], {})
        if not evaluation.measured:
            raise ValueError(f"{path}: the trial {key} has no number of the model {names[0]}.")
        found.append(evaluation)
    return found


def _add_all(evaluation: Evaluation, results: Mapping) -> None:
    for key, add in (
        ("zero_shot", _add_zero_shot),
        ("linear_probe", _add_probe),
        ("retrieval", _add_retrieval),
        ("grounding", _add_grounding),
    ):
        if key in results:
            add(evaluation, results[key])


def _add_zero_shot(evaluation: Evaluation, values: Mapping) -> None:
    for title, cells in _classification_numbers(evaluation, ZERO_SHOT, values):
        evaluation.lines += ["", f"**{title}**: {cells}"]
    for label, scores in values["per_class"].items():
        for key, (metric, name) in PER_CLASS.items():
            evaluation.add(
                ZERO_SHOT, metric, f"{name}, {label}", scores.get(key), scores.get(f"{key}_ci"), values["num_bootstrap"]
            )
    if "macro_auroc" in values:
        evaluation.lines += ["", report.zero_shot_table(values)]
    if values.get("interval_reason"):
        evaluation.lines += ["", f"There are no intervals: {values['interval_reason']}."]


def _classification_numbers(evaluation: Evaluation, task, values: Mapping, suffix: str = "") -> Iterator:
    """Each mean number of zero-shot or a probe is added; (title, sentence) of those that were measured."""
    cells = []
    for key, metric in CLASSIFICATION.items():
        if values.get(key) is not None:
            name = report.TITLES.get(key, key) + suffix
            interval = values.get(f"{key}_ci")
            evaluation.add(task, metric, name, values[key], interval, values.get("num_bootstrap"))
            cells.append(f"{report.TITLES.get(key, key)} {report.number_cell(values[key], interval)}")
    if cells:
        yield task[1] + suffix, ", ".join(cells)


def _add_probe(evaluation: Evaluation, values: Mapping) -> None:
    for fraction, summary in values["fractions"].items():
        summary = {"num_bootstrap": values.get("num_bootstrap"), **summary}
        suffix = f", {fraction} of the training patients"
        for title, cells in _classification_numbers(evaluation, PROBE, summary, suffix):
            evaluation.lines += ["", f"**{title}**: {cells}"]


def _add_retrieval(evaluation: Evaluation, values: Mapping) -> None:
    for direction, ways in ((key, values[key]) for key in ("image_to_text", "text_to_image")):
        scores = ways["identical_texts_count"]
        for depth in (1, 5, 10):
            key = f"recall_at_{depth}"
            name = f"{direction.replace('_', ' ')} recall at {depth} of {values['num_images']}"
            evaluation.add(RETRIEVAL, key, name, scores[key], scores[f"{key}_ci"], values["num_bootstrap"])
    evaluation.lines += ["", f"**{RETRIEVAL[1]}**", "", report.retrieval_table({"": values})]


def _add_grounding(evaluation: Evaluation, values: Mapping) -> None:
    for key, metric, name in (
        ("heatmap_auroc", "roc_auc", "heat-map AUROC"),
        ("average_precision", "average_precision", "heat-map average precision"),
        ("pointing_game", "accuracy", "pointing game"),
    ):
        if values.get(key) is not None:
            evaluation.add(GROUNDING, metric, name, values[key], values[f"{key}_ci"], values["num_bootstrap"])
    evaluation.lines += ["", f"**{GROUNDING[1]}**", "", report.grounding_table({"all": values}), ""]
    evaluation.lines.append(report.GROUNDING_CONTROLS)

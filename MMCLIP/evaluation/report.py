"""The files of a zero-shot evaluation: metrics.json, report.md and predictions.csv."""

import csv
import itertools
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers

from .metrics import UNKNOWN
from .retrieval import DEPTHS, DIRECTIONS, MEASURES, WAYS
from .zero_shot import ZeroShotPredictions


def describe_command() -> dict:
    """The command line and the versions of what ran."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets, np)}
    versions["python"] = platform.python_version()
    return {"command": shlex.join(["python", *sys.argv]), "versions": versions}


def describe_run(model: str, data: str, **more) -> dict:
    """What a reader needs to repeat the numbers: command line, model folder, data, versions and what `more` there is.

    For a model card these are `weights_hash`, the `model_fingerprint` without code, and `dataset`, [`describe_rows`].
    """
    return {**describe_command(), "model": model, "data": data, **more}


def describe_rows(rows) -> dict:
    """`{"sources", "split"}` of manifest rows; the split of rows of several is `test+train`, None without any."""
    return {
        "sources": sorted(rows.unique("source")),
        "split": "+".join(filter(None, sorted(rows.unique("split")))) or None,
    }


def read_train_results(
    model_dir: str | Path, train_results: str | Path | None = None
) -> tuple[dict | None, list[dict]]:
    """`{"seconds", "samples_per_second", ...}` of the training run and its log history, for metrics.json and the plot.

    Reads the Trainer's train_results.json (`train_results`, or the one in `model_dir` or in the folder above it) and
    trainer_state.json beside it. Without either file the results are None and the history is empty; a `train_results`
    that was named must exist.
    """
    model_dir = Path(model_dir).resolve()
    folders = [model_dir, model_dir.parent]
    if train_results is not None:
        if not Path(train_results).is_file():
            raise ValueError(
                f"There is no train_results file {train_results}. Leave it out to search beside the model."
            )
        folders = [Path(train_results).parent]
    results, history = None, []
    candidates = [Path(train_results)] if train_results else [folder / "train_results.json" for folder in folders]
    file = next((path for path in candidates if path.is_file()), None)
    if file is not None:
        values = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in ("train_runtime", "train_samples_per_second") if key not in values]
        if missing:
            raise ValueError(
                f"{file} lacks {', '.join(missing)}; expected what Trainer.save_metrics writes for 'train'."
            )
        results = {key.removeprefix("train_").replace("runtime", "seconds"): value for key, value in values.items()}
        folders = [file.parent, *folders]
    states = [folder / "trainer_state.json" for folder in folders]
    state = next((path for path in states if path.is_file()), None)
    if state is not None:
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return results, history


def write_metrics(output_dir: str | Path, results: Mapping) -> Path:
    """Write `results` to metrics.json. A NaN is an error: a number that could not be measured must be None."""
    path = Path(output_dir) / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def write_predictions(output_dir: str | Path, predictions: ZeroShotPredictions) -> Path:
    """Write P(present) of each label, `score:NAME`, `margin:NAME` and `target:NAME` to predictions.csv.

    Metrics rank by margins, logits with full precision: many scores round to 0 or 1. A target is 1, 0 or empty,
    unknown.
    """
    path = Path(output_dir) / "predictions.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [f"{kind}:{label}" for label in predictions.labels for kind in ("score", "margin", "target")]
        writer.writerow(["row_id", *columns])
        parts = (predictions.row_ids, predictions.scores, predictions.margins, predictions.targets)
        for row_id, *values in zip(*parts, strict=True):
            cells = [
                (repr(float(score)), repr(float(margin)), "" if target == UNKNOWN else int(target))
                for score, margin, target in zip(*values, strict=True)
            ]
            writer.writerow([row_id, *itertools.chain(*cells)])
    return path


TITLES = {  # of metrics, in the order of tables
    "macro_auroc": "macro AUROC", "macro_average_precision": "macro average precision",
    "macro_sensitivity_at_specificity": "sensitivity at 90 % specificity", "macro_f1": "macro F1",
    "macro_accuracy": "macro accuracy", "macro_mcc": "macro MCC", "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy", "mcc": "MCC", "macro_ece": "macro ECE",
}  # fmt: skip


def truth_cells(targets: np.ndarray, labels: Sequence[str]) -> tuple[list[str], list[list]]:
    """The columns of a CSV that tell the truth, and their cells for each row.

    `target:LABEL` of 1, 0 or empty for unknown where `targets` are (n, F), the name of the `class` where (n,).
    """
    if targets.ndim == 1:
        return ["class"], [[labels[number]] for number in targets]
    cells = [["" if value == UNKNOWN else int(value) for value in row] for row in targets]
    return [f"target:{label}" for label in labels], cells


def caution_lines(cautions: Sequence[str], of: str = "the model") -> list[str]:
    """A line of a Markdown list for each of [`overlap_cautions`]."""
    return [f"- caution, {of}: {sentence}" for sentence in cautions]


def number_cell(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (header, rule, *rows))


def zero_shot_table(zero_shot: Mapping) -> str:
    """A Markdown table: AUROC and average precision with 95 % intervals for each finding and their mean."""
    keys = ("auroc", "average_precision")
    rows = [
        [name, *(number_cell(v[key], v[f"{key}_ci"]) for key in keys), v["num_positive"], v["num_negative"]]
        for name, v in zero_shot["per_class"].items()
    ]
    macro = [number_cell(zero_shot[f"macro_{key}"], zero_shot[f"macro_{key}_ci"]) for key in keys]
    rows.append([f"**mean of {len(rows)}**", *macro, "", ""])
    return markdown_table(["finding", "AUROC (95 %)", "average precision (95 %)", "present", "absent"], rows)


GROUNDING_CONTROLS = (
    "Controls: other finding, the map of a finding that the image lacks; patch length, the length of the projected "
    "patches, without any text; prior, where the finding lies on average in all other patients, without the image."
)


def grounding_table(models: Mapping[str, Mapping]) -> str:
    """A Markdown table of heat maps, of each model: all lesions, its controls, each finding; then chance."""
    columns, rows = ("heatmap_auroc", "average_precision", "pointing_game"), []

    def add(title: str, values: Mapping) -> None:
        cells = (number_cell(values[key], values.get(f"{key}_ci")) for key in columns)
        rows.append([title, *cells, values.get("num_pairs", "")])

    for model, values in models.items():
        add(f"**{model}**", values)
        for control, inner in values["controls"].items():
            add(f"{model}, control: {control.replace('_', ' ')}", inner)
        for finding, inner in values["per_finding"].items():
            add(f"{model}, {finding}", inner)
        chance = [number_cell(values[f"{key}_chance"]) for key in columns]
    return markdown_table(
        ["map", "AUROC", "average precision", "pointing game", "lesions"], [*rows, ["chance", *chance, ""]]
    )


def retrieval_table(models: Mapping[str, Mapping]) -> str:
    """A Markdown table: each number of each model (a name may be "") with its interval, and under them chance."""
    rows = []
    for direction, way in itertools.product(DIRECTIONS, WAYS):
        for model, retrieval in models.items():
            values = retrieval[direction][way]
            title = f"{direction} {way}".replace("_", " ")
            cells = (number_cell(values[name], values[f"{name}_ci"]) for name in MEASURES)
            rows.append([f"{model}, {title}" if model else title, *cells])
        rows.append(["chance", *(number_cell(values[f"{name}_chance"]) for name in MEASURES)])
    told = " (95 %)" if values[f"{MEASURES[0]}_ci"] else ""
    header = ["search, and what is a hit", *(f"Recall@{depth}{told}" for depth in DEPTHS), f"median rank{told}"]
    return markdown_table(header, rows)


def controls_lines(controls: Mapping[str, Mapping], shuffled: Mapping[str, Mapping]) -> list[str]:
    """A Markdown table of the `group_controls` and, by what was scored, of the `shuffled_control`; [] without any."""
    rows = [
        [f"{name}, labels shuffled", number_cell(values["macro_auroc"], values["macro_auroc_range"])]
        for name, values in shuffled.items()
    ]
    key = "accuracy" if "majority_class" in controls else "macro_auroc"
    for name, values in controls.items():
        cell = values["reason"] if "reason" in values else number_cell(values[key], values[f"{key}_ci"])
        learned = "" if values["fitted_on"] == "train" else f", learned from {values['fitted_on']}"
        rows.append([f"{name.replace('_', ' ')}{learned}", cell])
    if not rows:
        return []
    about = "Controls, which see no image or no true label"
    if permutations := max((values["num_permutations"] for values in shuffled.values()), default=0):
        about += f" (in brackets, where labels are shuffled, the range of 95 % of {permutations} permutations)"
    return ["", f"{about}:", "", markdown_table(["control", TITLES[key]], rows)]


def calibration_line(calibration: Mapping) -> str:
    """What `Calibration.summary` says, as a sentence or two."""
    line = "Calibrated on {data}: {num_findings} findings.".format_map(calibration)
    if calibration["macro_ece"] is not None:
        line += (
            " Mean expected calibration error on the evaluated images {macro_ece:.3f}, without calibration "
            "{macro_ece_as_it_is:.3f}."
        ).format_map(calibration)
    if calibration["left_out"]:
        named = "; ".join(f"{label} ({reason})" for label, reason in calibration["left_out"].items())
        line += f" Not calibrated: {named}."
    return line


def write_markdown(output_dir: str | Path, results: Mapping, figures: Sequence[Path] = ()) -> Path:
    """Write report.md from the same `results` as metrics.json; `figures` are linked relative to `output_dir`."""
    path = Path(output_dir) / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    zero_shot = results["zero_shot"]
    lines = ["# MMCLIP evaluation", ""]
    for key in ("model", "data", "command"):
        if key in results:
            lines.append(f"- {key}: `{results[key]}`")
    lines += caution_lines(results.get("overlaps", ()))
    lines += ["", "## Zero-shot classification", "", zero_shot_table(zero_shot), ""]
    lines.append(
        "{num_images} images of {num_patients} patients; left out {num_without_label} rows without a label and "
        "{num_without_image} without an image. Intervals: {num_bootstrap} draws of patients. In "
        "{num_unlisted_is_absent} images a label that is not named counts as absent.".format_map(zero_shot)
    )
    if "prompts" in zero_shot:
        lines.append("\nPrompts: `{name}` ({source}), pooled by `{pooling}`.".format_map(zero_shot["prompts"]))
    if zero_shot["interval_reason"]:
        lines.append(f"\nThere are no intervals: {zero_shot['interval_reason']}.")
    elif zero_shot["macro_auroc_ci"] is None and zero_shot["per_class"]:
        lines.append(
            "\nThe mean has no interval: every label has present and absent images in only {num_bootstrap_macro} of "
            "{num_bootstrap} draws. Evaluate the commoner labels alone to get one.".format_map(zero_shot)
        )
    if zero_shot["skipped"]:
        named = ", ".join(f"{entry['name']} ({entry['reason']})" for entry in zero_shot["skipped"])
        lines.append(f"\nSkipped, {zero_shot['num_skipped']} labels: {named}.")
    if "calibration" in results:
        lines.append("\n" + calibration_line(results["calibration"]))
    if "by_source" in zero_shot:
        lines += ["", "AUROC within each source; across sources a model may tell the source, not the disease:", ""]
        sources = zero_shot["by_source"]
        rows = [
            [name, *(number_cell(sources[s]["per_class"].get(name, {}).get("auroc")) for s in sources)]
            for name in zero_shot["per_class"]
        ]
        rows.append(["**mean**", *(number_cell(values["macro_auroc"]) for values in sources.values())])
        lines.append(markdown_table(["finding", *(f"{s} ({sources[s]['num_images']})" for s in sources)], rows))
    if "grounding" in results:
        grounding = results["grounding"]
        lines += ["", "## Grounding", "", grounding_table({"all": grounding}), ""]
        lines.append(f"Text-to-patch attention against the true masks and boxes. {GROUNDING_CONTROLS}")
    if "train" in results:
        speed = "{seconds:.0f} s, {samples_per_second:.1f} samples a second.".format_map(results["train"])
        lines += ["", "## Training", "", speed]
    for figure in figures:
        title = figure.stem.replace("_", " ")
        lines += ["", f"![{title}]({figure.relative_to(path.parent).as_posix()})"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

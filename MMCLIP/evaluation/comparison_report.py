"""The files of a comparison: metrics.json, report.md, tables of scores for each image, and figures."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from . import figures
from .comparison import Outcome, Trial
from .report import (
    GROUNDING_CONTROLS,
    TITLES,
    caution_lines,
    controls_lines,
    grounding_table,
    markdown_table,
    number_cell,
    retrieval_table,
    truth_cells,
)
from .zero_shot import ClassPredictions


def write_scores(folder: Path, trial: Trial, outcomes: Mapping[str, Outcome]) -> list[Path]:
    """Tables with a line for each image, `zero_shot.csv` and others, of all models; no report is written.

    Columns are `row_id`, the truth (`target:LABEL` of 1, 0 or empty for unknown; `class`), and for each model the
    score of each label, `MODEL:LABEL`: the margin of the prompts, the logit of a probe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, paths = trial.scored["test"], []

    def write(name: str, header: Sequence[str], lines: Iterable[Sequence]) -> None:
        paths.append(folder / name)
        with paths[-1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(lines)

    def write_labels(name: str, scores: Mapping[str, np.ndarray]) -> None:
        truth, cells = truth_cells(trial.targets["test"], trial.labels)
        header = ["row_id", *truth, *(f"{model}:{label}" for model in scores for label in trial.labels)]
        lines = [
            [row_id, *true, *(repr(float(s)) for part in scores.values() for s in part[number])]
            for number, (row_id, true) in enumerate(zip(rows["row_id"], cells, strict=True))
        ]
        write(name, header, lines)

    predictions = {model: outcome.zero_shot for model, outcome in outcomes.items() if outcome.zero_shot is not None}
    if predictions:
        write_labels(
            "zero_shot.csv",
            {m: p.logits if isinstance(p, ClassPredictions) else p.margins for m, p in predictions.items()},
        )
    keys = {key for outcome in outcomes.values() for key in outcome.linear_probe}
    for fraction, seed in sorted(keys):
        probes = {m: o.linear_probe[fraction, seed] for m, o in outcomes.items() if (fraction, seed) in o.linear_probe}
        write_labels(f"linear_probe_{100 * fraction:g}_percent_seed_{seed}.csv", probes)
    for name, tables in (
        ("retrieval.csv", {m: o.ranks.table() for m, o in outcomes.items() if o.ranks is not None}),
        ("grounding.csv", {m: o.grounding.table() for m, o in outcomes.items() if o.grounding is not None}),
    ):
        lines = [{"model": model, **line} for model, table in tables.items() for line in table]
        if lines:
            write(name, list(lines[0]), (line.values() for line in lines))
    return paths


def draw(folder: Path, trial: Trial, outcomes: Mapping[str, Outcome]) -> list[Path]:
    """ROC, precision-recall, calibration, bars with intervals and confusion of all models, as far as they exist."""
    predictions = {model: outcome.zero_shot for model, outcome in outcomes.items() if outcome.zero_shot is not None}
    results = {model: outcomes[model].results["zero_shot"] for model in predictions}
    drawn = []
    if not predictions:
        return drawn
    if trial.is_multi_class:
        matrices = {model: np.array(values["confusion"]) for model, values in results.items()}
        drawn.append(figures.plot_confusion(matrices, trial.labels, folder / "confusion.png"))
        recalls = {
            m: {name: (values["recall"], values.get("recall_ci")) for name, values in r["per_class"].items()}
            for m, r in results.items()
        }
        return [*drawn, figures.plot_bars(recalls, folder / "bars.png", "recall")]
    if any(values["per_class"] for values in results.values()):
        drawn.append(figures.plot_roc(predictions, folder / "roc.png"))
        drawn.append(figures.plot_precision_recall(predictions, folder / "precision_recall.png"))
        areas = {
            m: {name: (values["auroc"], values["auroc_ci"]) for name, values in r["per_class"].items()}
            for m, r in results.items()
        }
        title = "AUROC (95 % interval)" if any(ci for part in areas.values() for _, ci in part.values()) else "AUROC"
        drawn.append(figures.plot_bars(areas, folder / "bars.png", title))
    if all(negative for _, negative in trial.prompts.texts(trial.labels)):
        temperatures = {m: r["temperature"] for m, r in results.items() if "temperature" in r}
        drawn.append(figures.plot_calibration(predictions, temperatures, folder / "calibration.png"))
    counts = {
        m: {name: values["confusion"] for name, values in r["per_class"].items() if "confusion" in values}
        for m, r in results.items()
    }
    if all(counts.values()):
        drawn.append(figures.plot_label_confusion(counts, folder / "confusion.png"))
    return drawn


# ------------------------------------------------------------------------------------------------------------ report.md


def write_report(path: Path, results: Mapping, drawn: Mapping[str, Sequence[Path]]) -> Path:
    """report.md from the same `results` as metrics.json; the figures `drawn` of each trial are linked."""
    lines = ["# Evaluation of MMCLIP checkpoints", ""]
    lines += [f"- command: `{results['command']}`"]
    lines += [f"- {name}: `{entry['path']}`, hash `{entry['hash']}`" for name, entry in results["models"].items()]
    lines += ["- versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items())]
    intervals = "Values are given with 95 % bootstrap intervals over patients. "
    lines += ["", f"{intervals if results['options']['num_bootstrap'] else ''}Research only, no diagnosis."]
    for name, trial in results["trials"].items():
        lines += ["", f"## {name}", "", *_about(trial)]
        for section in (
            _headline,
            _zero_shot,
            _controls,
            _linear_probe,
            _retrieval,
            _grounding,
            _negation,
            _differences,
        ):
            lines += section(trial)
        for figure in drawn.get(name, ()):
            title = figure.stem.replace("_", " ")
            lines += ["", f"![{title}]({figure.relative_to(path.parent).as_posix()})"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _about(trial: Mapping) -> list[str]:
    data = trial["data"]
    counts = ", ".join(f"{count} {role}" for role, count in data["num_scored"].items())
    lines = [
        f"{data['source']}",
        "",
        f"- data: `{data['place'] or data['protocol']}`, hash `{data['data_hash']}`; labelled images: {counts}; "
        f"{data['num_patients']} test patients",
        f"- prompts: `{data['prompts']['name']}` ({data['prompts']['source']}), pooled by "
        f"`{data['prompts']['pooling']}`; word for word in metrics.json",
    ]
    left_out = {role: data["num_rows"][role] - count for role, count in data["num_scored"].items()}
    if named := ", ".join(f"{count} {role}" for role, count in left_out.items() if count):
        lines.append(f"- rows left out of the scores, without an image or a label: {named}")
    if named := ", ".join(f"{count} {role}" for role, count in data["num_unlisted_is_absent"].items() if count):
        lines.append(f"- images in which a label that is not listed counts as absent: {named}")
    if data["skipped"]:
        named = ", ".join(f"{label} ({reason})" for label, reason in data["skipped"].items())
        lines.append(f"- labels skipped, {len(data['skipped'])}: {named}")
    if data["published_prompts"]:
        lines.append(f"- prompts published for it, to choose with --prompts: {', '.join(data['published_prompts'])}")
    if data["unused_labels"]:
        lines.append(f"- labels of the data that the protocol does not score: {', '.join(data['unused_labels'])}")
    if data["unused_prompts"]:
        lines.append(f"- prompts for labels that the protocol does not score: {', '.join(data['unused_prompts'])}")
    lines += [f"- caution: {caution}" for caution in data["cautions"]]
    for name, r in trial["models"].items():
        lines += caution_lines(r["overlaps"], name)
    left_out = {f"{n}: {reason}" for r in trial["models"].values() for n, reason in r["left_out"].items()}
    lines += [f"- not measured, {entry}" for entry in sorted(left_out)]
    return lines


def _cell(values: Mapping, key: str) -> str:
    return number_cell(values.get(key), values.get(f"{key}_ci"))


def _part(trial: Mapping, name: str) -> dict[str, Mapping]:
    """model -> its results of one evaluation, of the models that have them."""
    return {model: results[name] for model, results in trial["models"].items() if name in results}


HEADLINES = (
    "macro_auroc", "macro_average_precision", "macro_f1", "macro_accuracy", "macro_mcc", "accuracy", "macro_ece"
)  # fmt: skip


def _headline(trial: Mapping) -> list[str]:
    part = _part(trial, "zero_shot")
    keys = [key for key in HEADLINES if any(values.get(key) is not None for values in part.values())]
    if not keys:
        return []
    quoted = trial["data"]["headline"]  # the number that work on this protocol quotes comes first
    keys = sorted(keys, key=lambda key: key != quoted)
    titles = [f"**{TITLES[key]}**" if key == quoted else TITLES[key] for key in keys]
    rows = [[model, *(_cell(values, key) for key in keys)] for model, values in part.items()]
    lines = ["", "### Zero-shot", "", markdown_table(["model", *titles], rows)]
    values = next(iter(part.values()))
    notes = [f"{values['num_images']} images."]
    asked, used = values["num_bootstrap"], values.get("num_bootstrap_macro")
    if values["interval_reason"]:
        if asked:
            notes.append(f"There are no intervals: {values['interval_reason']}.")
    elif used is not None and used < asked:
        rests = "rests on" if values["macro_auroc_ci"] else "is left out, as it would rest on"
        notes.append(
            f"The interval of the macro AUROC {rests} {used} of {asked} draws, in which every label has present and "
            "absent images."
        )
    if any("threshold" in inner for inner in values["per_class"].values()):
        notes.append("Thresholds come from the validation rows, and so does a temperature.")
        if values["no_threshold"]:
            named = ", ".join(values["no_threshold"])
            notes.append(f"Labels without a threshold, as validation rows lack one of their values: {named}.")
    elif values["per_class"] and trial["data"]["task"] == "multi-label":
        reason = "no label scored here has both values among the validation rows"
        if not trial["data"]["num_scored"].get("validation"):
            reason = "there are no validation rows"
        notes.append(f"F1 and accuracy are at the oracle threshold alone, as {reason}.")
    return [*lines, "", " ".join(notes)]


def _zero_shot(trial: Mapping) -> list[str]:
    part = _part(trial, "zero_shot")
    lines = []
    for model, values in part.items():
        per_class = values.get("per_class", {})
        if not per_class:
            continue
        if "auroc_ci" in next(iter(per_class.values())) and "average_precision" in next(iter(per_class.values())):
            columns = ["auroc", "average_precision", "sensitivity_at_specificity", "f1", "accuracy", "mcc", "ece"]
            titles = ["AUROC", "average precision", "sensitivity at 90 % specificity", "F1", "accuracy", "MCC", "ECE"]
        else:
            columns, titles = ["recall", "precision", "f1", "auroc"], ["recall", "precision", "F1", "AUROC"]
        shown = [
            (k, t)
            for k, t in zip(columns, titles, strict=True)
            if any(v.get(k) is not None for v in per_class.values())
        ]
        oracle = any(v.get("oracle_threshold") for v in per_class.values())
        header = ["finding", *(title for _, title in shown), *(["F1, oracle threshold"] if oracle else []), "present"]
        rows = []
        for name, v in per_class.items():
            best = [number_cell(v["oracle_threshold"]["f1"])] if oracle else []
            rows.append([name, *(_cell(v, key) for key, _ in shown), *best, v.get("num_positive", v.get("num_images"))])
        lines += ["", f"**{model}**", "", markdown_table(header, rows)]
        if values.get("temperature") is not None:
            lines += ["", f"Temperature {values['temperature']:.3g}; ECE without it {values['ece_as_it_is']:.3f}."]
        for source, inner in values.get("by_source", {}).items():
            key = "accuracy" if "accuracy" in inner else "macro_auroc"
            within = f"Within {source} ({inner['num_images']} images): {TITLES[key]} {number_cell(inner[key])}."
            lines += ["", within]
    return lines


def _controls(trial: Mapping) -> list[str]:
    shuffled = {m: v["shuffled_labels"] for m, v in _part(trial, "zero_shot").items() if "shuffled_labels" in v}
    for model, values in _part(trial, "linear_probe").items():
        for fraction, inner in values["fractions"].items():
            if "shuffled_labels" in inner:
                shuffled[f"{model}, probe at {fraction}"] = inner["shuffled_labels"]
    return controls_lines(trial["controls"], shuffled)


def _linear_probe(trial: Mapping) -> list[str]:
    rows, constant = [], {}
    for model, values in _part(trial, "linear_probe").items():
        for fraction, inner in values["fractions"].items():
            if inner["constant_labels"]:
                constant[fraction] = ", ".join(inner["constant_labels"])
            key = "macro_auroc" if "macro_auroc" in inner else "accuracy"
            rows.append(
                [model, fraction, inner["num_patients"], _cell(inner, key), number_cell(inner.get(f"{key}_sd"))]
            )
    if not rows:
        return []
    header = ["model", "training patients", "number", "macro AUROC" if key == "macro_auroc" else key, "sd over seeds"]
    lines = ["", "### Linear probe", "", markdown_table(header, rows)]
    for fraction, named in constant.items():
        told = f"At {fraction}, some seed drew no image with, or none without, so that nothing was learned: {named}."
        lines += ["", told]
    return lines


def _retrieval(trial: Mapping) -> list[str]:
    part = _part(trial, "retrieval")
    if not part:
        return []
    return ["", "### Retrieval", "", retrieval_table(part), "", "Of the median rank less is better."]


def _grounding(trial: Mapping) -> list[str]:
    part = _part(trial, "grounding")
    return ["", "### Grounding", "", grounding_table(part), "", GROUNDING_CONTROLS] if part else []


def _negation(trial: Mapping) -> list[str]:
    lines = []
    for name, title, (first, second) in (
        ("negation", "Negation: 'There is X.' against 'There is no X.'", ("positive", "negative")),
        ("side", "Side: left against right", ("left", "right")),
    ):
        keys = ["auroc", "balanced_accuracy", f"accuracy_{first}", f"accuracy_{second}"]
        titles = ["AUROC", "balanced accuracy", f"accuracy, {first}", f"accuracy, {second}"]
        if name == "negation":
            keys, titles = [*keys, "control_auroc"], [*titles, "AUROC of 'There is X.' alone"]
        rows = []
        for model, values in _part(trial, name).items():
            rows.append([f"**{model}**, mean", *(_cell(values, f"macro_{key}") for key in keys)])
            rows += [
                [f"{model}, {finding}", *(_cell(inner, key) for key in keys)]
                for finding, inner in values["per_finding"].items()
            ]
        if rows:
            lines += ["", f"### {title}", "", markdown_table(["", *titles], rows)]
    return lines


def _differences(trial: Mapping) -> list[str]:
    rows = []
    for pair, parts in trial["differences"].items():
        for part, values in parts.items():
            for key, value in values.items():
                if isinstance(value, Mapping) and "difference" in value:
                    interval = value.get("ci", value.get("difference_ci"))
                    p_value = value.get("p_value")
                    shown = "n/a" if p_value is None else f"{p_value:.3f}"
                    rows.append(
                        [
                            pair,
                            part.replace("_", " "),
                            key.replace("_", " "),
                            number_cell(value["difference"], interval),
                            shown,
                        ]
                    )
    if not rows:
        return []
    lines = ["", "### Differences, on the same patients", ""]
    num_tests = sum(row[-1] != "n/a" for row in rows)
    if num_tests:
        lines.append(markdown_table(["models", "evaluation", "measure", "difference (95 %)", "p"], rows))
        lines += ["", f"These are {num_tests} comparisons, and neither p nor intervals are corrected for so many."]
    else:
        lines.append(markdown_table(["models", "evaluation", "measure", "difference"], [row[:-1] for row in rows]))
    if "retrieval" in {row[1] for row in rows}:
        lines += ["", "Of the median rank less is better: there a difference below 0 is in favour of the first model."]
    return lines

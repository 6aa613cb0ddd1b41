"""The figures of evaluations and runs, as PNG files. They are drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np

from ..image_processing_mmclip import load_grayscale
from .calibration import reliability_curve
from .grounding import example_pairs, grounding_heatmaps, heatmap_scores
from .metrics import UNKNOWN, auroc, average_precision
from .zero_shot import ZeroShotPredictions


COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def save_figure(figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def subplots(rows: int, columns: int, width: float, height: float, sharey: bool = False):
    """A figure and its (rows, columns) axes, each `width` x `height` inches."""
    from matplotlib.figure import Figure  # takes a second; drawn without pyplot, so no backend and no display

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _curve_figure(
    models: Mapping[str, ZeroShotPredictions], path, num_columns: int, curve, area, axes_names, drawstyle: str
) -> Path:
    """A panel for each label that has both kinds of image, with one curve and its area for each model."""
    first = next(iter(models.values()))
    panels = []
    for column, label in enumerate(first.labels):
        known = first.targets[:, column] != UNKNOWN
        if len(np.unique(first.targets[known, column])) == 2:
            panels.append((label, column, known))
    if not panels:
        raise ValueError("No label has both present and absent images, so there is no curve to draw.")
    num_columns = min(num_columns, len(panels))
    figure, axes = subplots(-(-len(panels) // num_columns), num_columns, 2.6, 2.7)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (label, column, known) in zip(axes.flat, panels, strict=False):
        targets = first.targets[known, column]
        chance = [0, 1] if axes_names[1] == "true positive rate" else [targets.mean()] * 2
        axis.plot([0, 1], chance, color="0.7", linewidth=0.8, linestyle="--")
        areas = []
        for number, predictions in enumerate(models.values()):
            margins = predictions.margins[known, column]
            axis.plot(*curve(targets, margins), color=_colour(number), linewidth=1.4, drawstyle=drawstyle)
            areas.append(f"{area(targets, margins):.3f}")
        axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set_title(f"{label}\n{'  '.join(areas)}", fontsize=9)
    figure.supxlabel(axes_names[0], fontsize=9)
    figure.supylabel(axes_names[1], fontsize=9)
    _name_models(figure, models)
    return save_figure(figure, path)


def _name_models(figure, models: Mapping) -> None:
    if len(models) > 1:
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color=_colour(number), label=name) for number, name in enumerate(models)]
        figure.legend(handles=lines, loc="outside upper center", ncols=min(len(lines), 4), fontsize=9, frameon=False)


def plot_roc(models: Mapping[str, ZeroShotPredictions], path: str | Path, num_columns: int = 4) -> Path:
    """ROC curves of models on the same images, with their AUROC. Raises `ValueError` if no label has a curve."""
    from sklearn.metrics import roc_curve

    def curve(targets, margins):
        return roc_curve(targets, margins)[:2]

    names = ("false positive rate", "true positive rate")
    # straight between the points, as the AUROC counts ties one half
    return _curve_figure(models, path, num_columns, curve, auroc, names, "default")


def plot_precision_recall(models: Mapping[str, ZeroShotPredictions], path: str | Path, num_columns: int = 4) -> Path:
    """Precision over recall of models on the same images, with average precision; dashed: the share present."""
    from sklearn.metrics import precision_recall_curve

    def curve(targets, margins):
        precision, recall, _ = precision_recall_curve(targets, margins)
        return recall, precision

    return _curve_figure(models, path, num_columns, curve, average_precision, ("recall", "precision"), "steps-post")


def plot_calibration(
    models: Mapping[str, ZeroShotPredictions], temperatures: Mapping[str, float], path: str | Path
) -> Path:
    """How often a label is present where its probability is p, all labels pooled: as it is, and at the temperature.

    `temperatures` are those fitted on validation; a model without one is drawn as it is alone.
    """
    figure, axes = subplots(1, len(models), 3.0, 3.2)
    for number, (axis, (name, predictions)) in enumerate(zip(axes.flat, models.items(), strict=True)):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
        known = predictions.targets != UNKNOWN
        for temperature, style in ((1.0, ":"), (temperatures.get(name), "-")):
            if temperature is not None:
                scores = predictions._replace(temperature=temperature).scores[known]
                curve = reliability_curve(predictions.targets[known], scores)
                label = "as it is" if style == ":" else f"temperature {temperature:.3g}"
                axis.plot(*curve, style, color=_colour(number), marker="o", markersize=3, linewidth=1.4, label=label)
        axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set_title(name, fontsize=9)
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    figure.supxlabel("P(present)", fontsize=9)
    figure.supylabel("share present", fontsize=9)
    return save_figure(figure, path)


def plot_bars(
    models: Mapping[str, Mapping[str, tuple[float, Sequence[float] | None]]], path: str | Path, axis_name: str
) -> Path:
    """One bar with its interval for each model and class: `models` maps names to {class: (value, (low, high))}."""
    classes = list(dict.fromkeys(name for values in models.values() for name in values))
    if not classes:
        raise ValueError("There is no class with a value, so there is no bar to draw.")
    height = 0.8 / len(models)
    figure, axes = subplots(1, 1, 6.4, 1.0 + (0.3 + 0.12 * len(models)) * len(classes))
    axis = axes[0, 0]
    for number, (model, values) in enumerate(models.items()):
        for row, name in enumerate(classes):
            if name not in values:
                continue
            value, interval = values[name]
            low, high = interval or (value, value)
            axis.barh(
                row + height * (number - (len(models) - 1) / 2),
                value,
                height * 0.9,
                xerr=[[max(value - low, 0)], [max(high - value, 0)]] if interval else None,
                color=_colour(number),
                error_kw={"elinewidth": 1, "ecolor": "0.2"},
                label=model if row == 0 or name == next(iter(values)) else None,
            )
    axis.set_yticks(range(len(classes)), classes, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel(axis_name, fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    _name_models(figure, models)
    return save_figure(figure, path)


def plot_confusion(models: Mapping[str, np.ndarray], names: Sequence[str], path: str | Path) -> Path:
    """Confusion matrices (K, K) of models, rows the true class, columns the predicted one, in images."""
    figure, axes = subplots(1, len(models), 1.6 + 0.55 * len(names), 1.6 + 0.5 * len(names))
    for axis, (model, matrix) in zip(axes.flat, models.items(), strict=True):
        matrix = np.asarray(matrix)
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, int(count), ha="center", va="center", fontsize=8, color=shade)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(model, fontsize=9)
        axis.set(xlabel="predicted", ylabel="true")
    return save_figure(figure, path)


def plot_label_confusion(models: Mapping[str, Mapping[str, Mapping[str, int]]], path: str | Path) -> Path:
    """What the thresholds make of each label: shares of images found, missed, falsely alarmed and rightly left out.

    `models` maps names to {label: {"true_positive", "false_negative", "false_positive", "true_negative"}} in images.
    """
    kinds = {
        "true_positive": "tab:blue",
        "false_negative": "tab:red",
        "false_positive": "tab:orange",
        "true_negative": "0.85",
    }
    labels = list(next(iter(models.values())))
    figure, axes = subplots(1, len(models), 4.4, 1.2 + 0.28 * len(labels))
    for axis, (model, counts) in zip(axes.flat, models.items(), strict=True):
        left = np.zeros(len(labels))
        totals = np.array([sum(counts[label].values()) for label in labels])
        for kind, colour in kinds.items():
            shares = np.array([counts[label][kind] for label in labels]) / np.maximum(totals, 1)
            axis.barh(range(len(labels)), shares, left=left, color=colour, label=kind.replace("_", " "))
            left += shares
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), xlabel="share of images")
        axis.set_title(model, fontsize=9)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return save_figure(figure, path)


def plot_heatmaps(model, processor, rows: datasets.Dataset, path: str | Path, num: int = 6) -> Path:
    """`num` images with the heat map of a finding over them and the outline of its true mask.

    The pairs are the first of the rows, of different findings where possible, whether they turned out well or not.
    """
    pairs = example_pairs(rows, num)
    if not pairs:
        raise ValueError(f"None of {len(rows)} rows has an image with a lesion mask, so there is nothing to draw.")
    heatmaps = grounding_heatmaps(model, processor, rows, pairs)
    figure, axes = subplots(2, len(pairs), 2.2, 2.5)
    for column, (pair, heatmap) in enumerate(zip(pairs, heatmaps, strict=True)):
        image = np.asarray(load_grayscale(rows[pair.row]["image"], where=rows[pair.row]["row_id"]))
        for axis in axes[:, column]:
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set_axis_off()
        axes[0, column].set_title(pair.finding, fontsize=9)
        span = np.ptp(heatmap) or 1.0  # a constant map is drawn as one colour
        axes[1, column].imshow((heatmap - heatmap.min()) / span, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
        if pair.mask.any() and not pair.mask.all():
            outline = np.pad(pair.mask, 1)  # closed also where the lesion meets the edge of the image
            grid = [np.arange(-1, size + 1) for size in pair.mask.shape[::-1]]
            axes[1, column].contour(*grid, outline, levels=[0.5], colors="cyan", linewidths=1.0)
            axes[1, column].set_title(f"AUROC {heatmap_scores(heatmap, pair.mask)[0]:.2f}", fontsize=9)
    figure.suptitle("text-to-patch attention; outline: true mask", fontsize=9)
    return save_figure(figure, path)


def plot_loss_curves(log_history: Sequence[Mapping], path: str | Path) -> Path:
    """Each loss of a Trainer's `log_history` over the steps, and below it the AUROC of the validations, if any."""
    losses, validation = {}, []
    for entry in log_history:
        for key, value in entry.items():
            if key == "loss" or key.startswith("loss_"):
                name = "total" if key == "loss" else key.removeprefix("loss_")
                losses.setdefault(name, []).append((entry["step"], value))
            elif key == "eval_macro_auroc" and value is not None:
                validation.append((entry["step"], value))
    if not losses:
        raise ValueError("The log history holds no loss. Train with a `logging_steps` shorter than the run.")
    figure, axes = subplots(2 if validation else 1, 1, 6.4, 3.0)
    for name, points in losses.items():
        axes[0, 0].plot(*zip(*points, strict=True), label=name, linewidth=1.4)
    axes[0, 0].set(ylabel="loss")
    axes[0, 0].legend(fontsize=8)
    if validation:
        axes[1, 0].plot(*zip(*validation, strict=True), marker="o", color="black", linewidth=1.4)
        axes[1, 0].set(ylabel="zero-shot AUROC (validation)")
    axes[-1, 0].set(xlabel="step")
    last_step = max(step for points in losses.values() for step, _ in points)
    for axis in axes.flat:
        axis.set_xlim(0, last_step * 1.02)
        axis.grid(alpha=0.3)
    return save_figure(figure, path)

"""Negation and side: does a model read "no" and "left", or only the name of the finding?

Each image with a known answer is held against two texts that differ in one word. Negation: "There is a nodule."
against "There is no nodule.", in images with and without one. Side: "There is a left nodule." against "There is a right
nodule.", in images where masks or boxes tell the side. The margin is the logit of the first text minus that of the
second.

- `accuracy`: the share of images whose margin has the right sign, and `accuracy_<value>` within the images of one
  value: a model that always prefers one text is right in all images of one value. `balanced_accuracy` is the mean of
  these two, 0.5 by chance. A margin of 0 counts one half, so a model that reads neither word scores 0.5.
- `auroc`: does the margin order the images? 0.5 by chance. It forgives a constant preference for one of the texts.
- `control_auroc`, of negation alone: the AUROC of the first text's similarity without the second. A model that names
  findings but does not read "no" has a high one, with an accuracy near that of chance.
"""

from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np
from torch import Tensor

from ..data.dataset import known_sides
from ..text.prompts import attribute_nouns, has_side, negative_prompts, positive_prompts, statement
from ..text.vocabulary import NO_FINDING
from .bootstrap import count_patients, patient_numbers
from .embeddings import EmbeddingCache, text_features
from .grounding import image_size
from .metrics import UNKNOWN, classification_metrics, percentile_interval, resample_patients
from .zero_shot import patient_names


class SideScores(NamedTuple):
    """What was compared: `row_ids` (n,), `labels` (F,), `targets` (n, F) of 1 left, 0 right, -100 unknown or both.

    `margins` (n, F) are logits of the left minus the right text; `patient_ids` (n,) are those of two sources apart, ""
    where unknown.
    """

    row_ids: list[str]
    patient_ids: list[str]
    labels: list[str]
    targets: np.ndarray
    margins: np.ndarray

    def table(self) -> list[dict]:
        """A line for each finding whose side is known in an image, for a CSV."""
        return [
            {
                "row_id": self.row_ids[row],
                "finding": self.labels[column],
                "side": "left" if self.targets[row, column] == 1 else "right",
                "margin": float(self.margins[row, column]),
            }
            for row, column in np.argwhere(self.targets != UNKNOWN)
        ]


def evaluate_negation(
    model,
    processor,
    image_embeds: Tensor,
    targets: np.ndarray,
    labels: Sequence[str],
    patient_ids: Sequence[str] | None = None,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
    cache: EmbeddingCache | None = None,
) -> tuple[dict, np.ndarray]:
    """Measures of the module for each finding, their mean (`macro_...`), and the margins (n, F) behind them.

    `image_embeds` (n, D) are L2-normalised, `targets` (n, F) hold 1 present, 0 absent, -100 unknown. "no finding" is
    left out, so that columns are those of `labels` in the result. Beside each number stands its 95 % bootstrap interval
    over patients, None where the images behind it are of a single one; the texts are under `prompts` of each finding. A
    finding without images of both values is skipped and listed. Raises `ValueError` where every one is, for shapes that
    disagree, and for embeddings that are not finite.
    """
    targets, every = np.asarray(targets), list(labels)
    if targets.ndim != 2 or targets.shape != (len(image_embeds), len(every)):
        raise ValueError(
            f"`targets` must be ({len(image_embeds)}, {len(every)}), a row for each image and a column for each of "
            f"`labels`, but is {targets.shape}."
        )
    kept = [column for column, label in enumerate(every) if label != NO_FINDING]
    labels, targets = [every[column] for column in kept], targets[:, kept]
    if not labels:
        raise ValueError(f"`labels` must name a finding, but is {every}: nothing can be denied.")
    prompts = {label: (positive_prompts(label)[0], negative_prompts(label)[0]) for label in labels}
    margins, first = _margins(model, processor, image_embeds, prompts, cache)
    values = ("positive", "negative")
    result = _pair_metrics(targets, margins, labels, patient_ids, values, prompts, num_bootstrap, seed)
    control = classification_metrics(targets, first, labels, patient_ids, num_bootstrap, seed)
    several = result["no_interval_because"] is None
    for name, inner in [("macro_", control), *control["per_class"].items()]:
        into, prefix = (result, "macro_") if name == "macro_" else (result["per_finding"][name], "")
        into[f"{prefix}control_auroc"] = inner[f"{prefix}auroc"]
        into[f"{prefix}control_auroc_ci"] = inner[f"{prefix}auroc_ci"] if several else None
    return result | {"left_out": [label for label in every if label == NO_FINDING]}, margins


def evaluate_side(
    model,
    processor,
    rows: datasets.Dataset,
    image_embeds: Tensor,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
    cache: EmbeddingCache | None = None,
) -> tuple[dict, SideScores]:
    """Measures of the module for each finding that has a side, as [`evaluate_negation`] gives them, and the scores.

    `image_embeds` (n, D) are those of `rows`, whose masks name a side or whose boxes, on frontal films, lie in one half
    ([`known_sides`]). Findings on both sides and of unknown side are left out and counted. The patient's left is meant,
    which is on the right of the image. Raises `ValueError` when no finding occurs on the left and on the right.
    """
    if len(rows) != len(image_embeds):
        raise ValueError(
            f"`image_embeds` must have a row for each of {len(rows)} rows, but is {tuple(image_embeds.shape)}."
        )
    sides, counts = _row_sides(rows)
    labels = sorted({finding for found in sides for finding in found})
    if not labels:
        raise ValueError(
            f"None of {len(rows)} rows tells on which side a finding is, so left cannot be held against right. Give "
            "rows with masks that name a side, or with boxes of frontal films."
        )
    targets = np.full((len(rows), len(labels)), UNKNOWN, dtype=np.int64)
    for target, found in zip(targets, sides, strict=True):
        for finding, side in found.items():
            target[labels.index(finding)] = int(side == "left")
    prompts = {
        label: tuple(statement(attribute_nouns(label, side, None)[0]) for side in ("left", "right")) for label in labels
    }
    margins, _ = _margins(model, processor, image_embeds, prompts, cache)
    patients = patient_names(rows)
    result = _pair_metrics(targets, margins, labels, patients, ("left", "right"), prompts, num_bootstrap, seed)
    return result | counts, SideScores(list(rows["row_id"]), patients, labels, targets, margins)


def _row_sides(rows: datasets.Dataset) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Finding -> "left" or "right" for each row, and how many findings are left out, by reason."""
    names = ("row_id", "image", "view", "masks", "boxes")
    sides, counts = [], {"num_bilateral": 0, "num_unknown_side": 0}
    for row in rows.select_columns([name for name in names if name in rows.column_names]):
        boxes = (row.get("boxes") or ()) if row["view"] not in ("LATERAL", "OTHER") else ()
        boxes = [box for box in boxes if has_side(box["finding"])]
        masks = [mask for mask in row.get("masks") or () if has_side(mask["finding"])]
        found = known_sides(masks, boxes, image_size(row)[1] if boxes else 0)
        sides.append({finding: side for finding, side in found.items() if side != "bilateral"})
        counts["num_bilateral"] += len(found) - len(sides[-1])
        counts["num_unknown_side"] += len({lesion["finding"] for lesion in (*masks, *boxes)} - found.keys())
    return sides, counts


def _margins(
    model, processor, image_embeds: Tensor, prompts: dict[str, tuple[str, str]], cache: EmbeddingCache | None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the first minus the second text of each finding, and of the first alone: (n, F) float64 each."""
    images = image_embeds.detach().cpu().double()
    if images.ndim != 2 or not images.isfinite().all():
        raise ValueError(
            f"`image_embeds` must be (images, dimensions) and finite, but is {tuple(images.shape)} with "
            f"{int((~images.isfinite()).sum())} values that are NaN or infinite. Look for diverged weights."
        )
    lengths = images.norm(dim=1)
    if len(images) and (lengths - 1).abs().max() > 0.01:  # bfloat16 is this exact
        raise ValueError(
            f"`image_embeds` must have rows of length 1, but their lengths reach from {lengths.min():.4g} to "
            f"{lengths.max():.4g}. Take the `embeds` of image_features, not `pooled`."
        )
    texts = [text for pair in prompts.values() for text in pair]
    embeds = text_features(model, processor, texts, cache=cache).double().unflatten(0, (len(prompts), 2))
    if images.shape[1] != embeds.shape[2]:
        raise ValueError(
            f"`image_embeds` has {images.shape[1]} dimensions, but the texts of the model have {embeds.shape[2]}. Were "
            "they made by another model?"
        )
    scale = model.similarity_scale().detach().double().cpu()
    first, second = embeds.unbind(dim=1)
    # the texts are subtracted first, so that two that are alike give exactly 0
    return (scale * images @ (first - second).T).numpy(), (scale * images @ first.T).numpy()


def _pair_metrics(
    targets: np.ndarray,
    margins: np.ndarray,
    labels: Sequence[str],
    patient_ids: Sequence[str] | None,
    values: tuple[str, str],
    prompts: dict[str, tuple[str, str]],
    num_bootstrap: int,
    seed: int,
) -> dict:
    """The measures of the module; `values` are the names of target 1 and target 0."""
    curves = classification_metrics(targets, margins, labels, patient_ids, num_bootstrap, seed)
    skipped = [
        {"name": entry["name"], "reason": entry["reason"].replace("positive", values[0]).replace("negative", values[1])}
        for entry in curves["skipped"]
    ]
    names = list(curves["per_class"])
    if not names:
        found = "; ".join(f"{entry['name']}: {entry['reason']}" for entry in skipped)
        raise ValueError(f"Every finding needs a {values[0]} and a {values[1]} image, but none has both ({found}).")
    columns = [list(labels).index(name) for name in names]
    num_patients = count_patients([""] * len(targets) if patient_ids is None else patient_ids)
    several = num_patients > 1
    right = _right(targets[:, columns], margins[:, columns])
    known = np.stack([targets[:, columns] == value for value in (1, 0)])  # (2, n, F)
    measures = ("accuracy", *(f"accuracy_{value}" for value in values), "balanced_accuracy")
    means = _accuracies(np.ones((1, len(targets))), right, known)[0]  # (4, F)
    draws = [np.empty((0, len(measures), len(names)))]
    if several:
        blocks = resample_patients(patient_ids, len(targets), num_bootstrap, seed)
        draws += [_accuracies(weights, right, known) for weights in blocks]
    draws = np.concatenate(draws)  # (R, 4, F)
    # images of one patient are drawn together, so their draws are all alike and no interval
    patients, either = patient_numbers(patient_ids, len(targets)), known.any(axis=0)
    alike = np.array([[len(np.unique(patients[c])) < 2 for c in images.T] for images in (either, *known, either)])
    of_finding, of_mean = np.where(alike, np.nan, draws), np.where(alike.all(axis=1), np.nan, draws.mean(axis=2))

    def described(prefix: str, means: np.ndarray, draws: np.ndarray, curves: dict) -> dict:
        result = {}
        for number, measure in enumerate(measures):
            result[f"{prefix}{measure}"] = float(means[number])
            result[f"{prefix}{measure}_ci"] = percentile_interval(draws[:, number], num_bootstrap)
        result[f"{prefix}auroc"] = curves[f"{prefix}auroc"]
        result[f"{prefix}auroc_ci"] = curves[f"{prefix}auroc_ci"] if several else None
        return result

    per_finding = {}
    for number, name in enumerate(names):
        per_finding[name] = described("", means[:, number], of_finding[..., number], curves["per_class"][name])
        for value, mask in zip(values, known, strict=True):
            per_finding[name][f"num_{value}"] = int(mask[:, number].sum())
        per_finding[name]["prompts"] = list(prompts[name])
    return {
        **described("macro_", means.mean(axis=1), of_mean, curves),
        "chance": 0.5,
        "per_finding": per_finding,
        "labels": list(labels),
        "skipped": skipped,
        "num_skipped": len(skipped),
        "num_images": int((targets != UNKNOWN).any(axis=1).sum()),
        "num_patients": num_patients,
        "no_interval_because": None if several else "all images are of one patient",
        "num_bootstrap": num_bootstrap,
    }


def _right(targets: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """1 where the sign of the margin is that of the target, 0 where not, one half for a margin of 0."""
    return 0.5 + 0.5 * np.sign(margins) * np.where(targets == 1, 1, -1)


def _accuracies(weights: np.ndarray, right: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(R, 4, F): over all images, over those of target 1, those of target 0, and the mean of the last two.

    `weights` (R, n) say how often each image counts, `right` (n, F) is in [0, 1], `known` (2, n, F) tells the target.
    NaN where a finding has no image of one of the targets.
    """
    hits = np.stack([weights @ (right * mask) for mask in known], axis=1)  # (R, 2, F)
    totals = np.stack([weights @ mask.astype(np.float64) for mask in known], axis=1)
    with np.errstate(invalid="ignore"):
        each = hits / totals
        return np.stack(
            [hits.sum(axis=1) / totals.sum(axis=1), each[:, 0], each[:, 1], each.mean(axis=1)],
            axis=1,
        )

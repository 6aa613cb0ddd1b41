"""Zero-shot classification: one positive and one negative prompt ensemble for each finding, no training.

Follows CheXzero and CXR-CLIP: P(present) is the softmax over the pair (positive, negative) at the model's temperature.
Which texts, and how several of a side become one score, is told by a `PromptSet` of `MMCLIP/text/prompt_sets.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from ..data.manifest import has_image
from ..text.prompt_sets import PromptSet, prompt_set
from ..text.vocabulary import canonical_label, with_broader_labels
from .bootstrap import count_patients
from .calibration import expected_calibration_error, fit_temperature
from .embeddings import EmbeddingCache, image_features, text_features
from .metrics import UNKNOWN, choose_thresholds, classification_metrics, multiclass_metrics


class ZeroShotPredictions(NamedTuple):
    """What was scored: `row_ids` (n,), names of `labels` (F,), `targets` (n, F) of 1 present, 0 absent, -100 unknown.

    `margins` (n, F) are logits of positive minus negative prompt: they rank images that all round to P(present) = 1.
    `temperature` was fitted on validation rows, 1 where there were none, and divides the margins of `scores`.
    """

    row_ids: list[str]
    labels: list[str]
    targets: np.ndarray
    margins: np.ndarray
    temperature: float = 1.0

    @property
    def scores(self) -> np.ndarray:
        """P(present), (n, F) in [0, 1]; no probability but an order of images where prompts have no negative side."""
        return torch.from_numpy(self.margins / self.temperature).sigmoid().numpy()


class ClassPredictions(NamedTuple):
    """Images of exactly one class each: `row_ids` (n,), names of `labels` (K,), `classes` (n,) as columns of `logits`.

    `logits` (n, K) are scaled similarities to the positive texts of each class; their softmax is P(class).
    """

    row_ids: list[str]
    labels: list[str]
    classes: np.ndarray
    logits: np.ndarray


def side_logits(
    model,
    processor,
    image_embeds: Tensor,
    labels: Sequence[str],
    prompts: str | PromptSet = "mmclip",
    cache: EmbeddingCache | None = None,
) -> Tensor:
    """Scaled similarity of `image_embeds` (n, D) to the positive and the negative side of labels, (n, F, 2) float64.

    `prompts` is a set, or what `prompt_set` takes. The texts of a side count as its `pooling` says; a side without
    texts counts 0. Every text goes through the tower once.
    """
    prompts = prompt_set(prompts) if isinstance(prompts, str) else prompts
    sides = [side for pair in prompts.texts(labels) for side in pair]
    texts = text_features(model, processor, [text for side in sides for text in side], cache=cache)
    logits = pooled_logits(model, image_embeds, texts.split([len(side) for side in sides]), prompts.pooling)
    return logits.unflatten(1, (len(labels), 2))


def pooled_logits(model, image_embeds: Tensor, sides: Sequence[Tensor], pooling: str) -> Tensor:
    """Scaled similarity of `image_embeds` (n, D) to S sides, embeddings (texts, D) each: (n, S) float64."""
    images, sides = image_embeds.double(), [side.double() for side in sides]
    if pooling == "max_score":
        none = images.new_zeros(len(images))
        similarity = torch.stack([(images @ p.T).amax(dim=1) if len(p) else none for p in sides], dim=1)
    else:
        # the mean of similarities is the similarity to the mean
        means = torch.stack([side.mean(dim=0) if len(side) else side.new_zeros(side.shape[1]) for side in sides])
        if pooling == "mean_embedding":
            means = nn.functional.normalize(means, dim=-1)
        similarity = images @ means.T
    return model.similarity_scale().detach().double().cpu() * similarity


def prompt_margins(
    model,
    processor,
    image_embeds: Tensor,
    labels: Sequence[str],
    prompts: str | PromptSet = "mmclip",
    cache: EmbeddingCache | None = None,
) -> Tensor:
    """Logits of the positive minus the negative side of each label, (n, F) float64: see [`side_logits`]."""
    logits = side_logits(model, processor, image_embeds, labels, prompts, cache)
    return logits[..., 0] - logits[..., 1]  # softmax over a pair is the sigmoid of the difference


def zero_shot_scores(
    model,
    processor,
    images: Sequence | datasets.Dataset,
    labels: Sequence[str],
    batch_size: int = 64,
    prompts: str | PromptSet = "mmclip",
    num_workers: int = 0,
    progress: str = "",
) -> np.ndarray:
    """P(present) of each label in each image: (n, F) float64 in [0, 1].

    `images` are rows of a manifest or a list of anything the processor reads. The pair (positive, negative) goes
    through a softmax at the model's temperature. `prompts` is a set of prompts, its name, or a YAML file of one's own.
    The model stays in the mode it was in.
    """
    if isinstance(labels, str):
        raise ValueError(f"`labels` must be a list of labels, but is the text {labels!r}. Write [{labels!r}].")
    features = image_features(
        model, processor, images, batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    return prompt_margins(model, processor, features.embeds, labels, prompts).sigmoid().numpy()


def label_matrix(
    rows: datasets.Dataset,
    labels: Sequence[str],
    unlisted_is_absent: bool | None = None,
    fully_labelled: Sequence[str] = (),
) -> tuple[np.ndarray, int]:
    """Targets (n, F), 1 present, 0 absent, -100 unknown, and the number of rows where unlisted labels count as absent.

    What a row lists holds; a present label makes broader ones present (covid-19 is a pneumonia). A label that a row
    does not name is unknown, but absent in a row of a `fully_labelled` source that lists a present or absent label, if
    that source uses the label at all, and in any row that has a label under `unlisted_is_absent`. Left out, the latter
    holds for rows of other sources that list no absent label, as in sets that publish positive labels only.
    """
    column_of = {label: column for column, label in enumerate(labels)}
    rows = rows.select_columns(["row_id", "source", "present", "absent", "uncertain"])
    used = {source: set() for source in fully_labelled}
    for row in rows:
        if row["source"] in used:
            used[row["source"]].update(row["present"])
    targets = np.full((len(rows), len(labels)), UNKNOWN, dtype=np.int64)
    num_by_rule = 0
    for target, row in zip(targets, rows, strict=True):
        contradiction = sorted(set(row["present"]) & set(row["absent"]))
        if contradiction:
            raise ValueError(f"Row {row['row_id']!r} lists {contradiction} as both present and absent. Correct it.")
        by_rule = unlisted_is_absent
        if by_rule is None:
            by_rule = not row["absent"] and row["source"] not in used
        by_rule = by_rule and bool(row["present"] or row["absent"] or row["uncertain"])
        if by_rule:
            target[:] = 0
        # as `completed_absent`, which reading has applied to other splits too
        completed = used.get(row["source"], set()) if row["present"] or row["absent"] else set()
        num_by_rule += by_rule or bool(completed)
        statements = (
            (0, completed),
            (1, with_broader_labels(row["present"])),
            (UNKNOWN, row["uncertain"]),
            (1, row["present"]),
            (0, row["absent"]),
        )  # from the weakest to the strongest
        for value, named in statements:
            for label in named:
                if label in column_of:
                    target[column_of[label]] = value
    return targets, num_by_rule


def _by_source(sources: Sequence[str], targets: np.ndarray, margins: np.ndarray, labels: Sequence[str]) -> dict:
    """The AUROCs within each source: a model that only tells hospitals apart falls to 0.5 here."""
    result = {}
    for source in sorted(set(sources)):
        rows = np.array([name == source for name in sources])
        metrics = classification_metrics(targets[rows], margins[rows], labels, num_bootstrap=0)
        result[source] = {key: metrics[key] for key in ("macro_auroc", "num_images", "num_skipped")}
        result[source]["per_class"] = {
            name: {key: values[key] for key in ("auroc", "num_positive", "num_negative")}
            for name, values in metrics["per_class"].items()
        }
    return result


def scored_rows(
    rows: datasets.Dataset, labels: Sequence[str] | None
) -> tuple[datasets.Dataset, list[str], dict[str, int]]:
    """The rows with an image and a label, the labels by their canonical names, and how many rows lack either."""
    labelled = [bool(p or a or u) for p, a, u in zip(rows["present"], rows["absent"], rows["uncertain"], strict=True)]
    pictured = has_image(rows).tolist()
    kept = rows.select([i for i, both in enumerate(zip(labelled, pictured, strict=True)) if all(both)])
    if len(kept) == 0:
        raise ValueError(
            f"None of {len(rows)} rows has both an image and a label ({sum(pictured)} have an image, {sum(labelled)} a "
            "label), so there is nothing to evaluate. Check the split and the label columns of the manifest."
        )
    if labels is None:
        labels = sorted({label for key in ("present", "absent") for row in kept[key] for label in row})
    else:
        labels = list(dict.fromkeys(canonical_label(label, where="labels") for label in labels))
    lacking = {"num_without_label": len(rows) - sum(labelled), "num_without_image": len(rows) - sum(pictured)}
    return kept, labels, lacking


def check_scorable(
    rows: datasets.Dataset,
    labels: Sequence[str] | None = None,
    fully_labelled: Sequence[str] = (),
    unlisted_is_absent: bool | None = None,
) -> None:
    """Raises `ValueError` when [`evaluate_zero_shot`] would skip every label, for want of one of the two values."""
    kept, labels, _ = scored_rows(rows, labels)
    targets, _ = label_matrix(kept, labels, unlisted_is_absent, fully_labelled)
    check_targets(targets, labels)


def unscorable(targets: np.ndarray, labels: Sequence[str]) -> dict[str, str]:
    """Label -> reason, for those that lack a 1 or a 0 in their column of `targets` (n, F)."""
    found = {}
    for label, column in zip(labels, targets.T, strict=True):
        if lacking := [name for name, value in (("positive", 1), ("negative", 0)) if value not in column]:
            found[label] = f"no {' and '.join(lacking)} image"
    return found


def check_targets(targets: np.ndarray, labels: Sequence[str]) -> None:
    """Raises `ValueError`, with the reason of each label, when all are [`unscorable`]."""
    reasons = unscorable(targets, labels)
    if len(reasons) == len(labels):
        named = ", ".join(f"{label} ({reason})" for label, reason in reasons.items())
        raise ValueError(
            f"No label can be scored on the {len(targets)} rows, as each needs an image with and one without: "
            f"{named or 'the rows state none'}. Add rows, choose other labels, or say where a label that is not "
            "listed is absent (`fully_labelled`)."
        )


def patient_names(rows: datasets.Dataset) -> list[str]:
    """The patient of each row, "" where unknown; equal names in two sources are two patients."""
    return [
        f"{source}\0{name}" if name else "" for source, name in zip(rows["source"], rows["patient_id"], strict=True)
    ]


def evaluate_zero_shot(
    model,
    processor,
    rows: datasets.Dataset,
    labels: Sequence[str] | None = None,
    *,
    validation_rows: datasets.Dataset | None = None,
    unlisted_is_absent: bool | None = None,
    fully_labelled: Sequence[str] = (),
    prompts: str | PromptSet = "mmclip",
    batch_size: int = 64,
    num_bootstrap: int = 1000,
    seed: int = 0,
    num_workers: int = 0,
    progress: str = "",
    cache: EmbeddingCache | None = None,
) -> tuple[dict, ZeroShotPredictions]:
    """Zero-shot metrics of a manifest, `{"zero_shot": {...}}`, and the scores behind them.

    `labels` defaults to every label that the rows name as present or absent; any known spelling is accepted. What a
    label means that a row does not name is decided by `unlisted_is_absent` and `fully_labelled`, see [`label_matrix`].
    `prompts` is a set of prompts, its name, or a YAML file of one's own; it must have a text for every label, and a
    file none for a label that the rows lack, unless `labels` are given. Rows without an image, and rows without a
    label, are left out and counted. Intervals draw patients with replacement, equal names in two sources being two
    patients. With a `cache` each image is embedded once. Where rows come from several sources the AUROCs within each
    source are added under `by_source`, as a source can give a label away.

    Thresholds, and the temperature of probabilities, are chosen on `validation_rows` alone; without these there is
    neither F1 nor accuracy nor calibration. A set of prompts without negative texts gives no probabilities.
    """
    prompts = prompt_set(prompts) if isinstance(prompts, str) else prompts

    def scored(rows: datasets.Dataset, labels: Sequence[str] | None):
        kept, found, lacking = scored_rows(rows, labels)
        if labels is None:
            prompts.check_used(found)
        labels = found
        targets, num_by_rule = label_matrix(kept, labels, unlisted_is_absent, fully_labelled)
        prompts.texts(labels)  # a label without a text is an error before the long part
        features = image_features(
            model, processor, kept, cache=cache, batch_size=batch_size, num_workers=num_workers, progress=progress
        )
        margins = prompt_margins(model, processor, features.embeds, labels, prompts, cache).numpy()
        return kept, labels, targets, margins, {**lacking, "num_unlisted_is_absent": num_by_rule}

    kept, labels, targets, margins, counts = scored(rows, labels)
    options, temperature = {}, None
    if validation_rows is not None:
        chosen = scored(validation_rows, labels)
        options["thresholds"] = choose_thresholds(chosen[2], chosen[3], labels)
        if all(negative for _, negative in prompts.texts(labels)) and (chosen[2] != UNKNOWN).any():
            temperature = fit_temperature(chosen[2], chosen[3])
            options["probabilities"] = torch.from_numpy(margins / temperature).sigmoid().numpy()

    patients = patient_names(kept)
    result = classification_metrics(targets, margins, labels, patients, num_bootstrap, seed, **options)
    result.update(counts)
    result["num_patients"] = count_patients(patients)
    result["fully_labelled"] = list(fully_labelled)
    result["prompts"] = {"name": prompts.name, "source": prompts.source, "pooling": prompts.pooling}
    if temperature is not None:
        result["temperature"] = temperature
        error = expected_calibration_error(targets, torch.from_numpy(margins).sigmoid().numpy())
        result["ece_as_it_is"] = None if np.isnan(error) else error
    if len(set(kept["source"])) > 1:
        result["by_source"] = _by_source(kept["source"], targets, margins, labels)
    predictions = ZeroShotPredictions(list(kept["row_id"]), labels, targets, margins, temperature or 1.0)
    return {"zero_shot": result}, predictions


def evaluate_zero_shot_classes(
    model,
    processor,
    rows: datasets.Dataset,
    classes: np.ndarray,
    labels: Sequence[str],
    *,
    prompts: str | PromptSet = "mmclip",
    batch_size: int = 64,
    num_bootstrap: int = 1000,
    seed: int = 0,
    num_workers: int = 0,
    progress: str = "",
    cache: EmbeddingCache | None = None,
) -> tuple[dict, ClassPredictions]:
    """Zero-shot metrics where each image has exactly one of K classes, `{"zero_shot": {...}}`, and the logits.

    `rows` all have an image, `classes` (n,) are their numbers in `labels`. The class whose positive texts an image
    resembles most wins; negative texts play no part. Where rows come from several sources the accuracy within each
    source is added under `by_source`, as a source can give a class away.
    """
    prompts = prompt_set(prompts) if isinstance(prompts, str) else prompts
    prompts.texts(labels)
    features = image_features(
        model, processor, rows, cache=cache, batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    logits = side_logits(model, processor, features.embeds, labels, prompts, cache)[..., 0].numpy()
    patients = patient_names(rows)
    result = multiclass_metrics(classes, logits, labels, patients, num_bootstrap, seed)
    result["num_patients"] = count_patients(patients)
    result["prompts"] = {"name": prompts.name, "source": prompts.source, "pooling": prompts.pooling}
    sources, is_right = np.array(rows["source"]), logits.argmax(axis=1) == classes
    if len(set(rows["source"])) > 1:
        result["by_source"] = {
            str(source): {
                "accuracy": float(is_right[sources == source].mean()), "num_images": int((sources == source).sum())
            }
            for source in np.unique(sources)
        }  # fmt: skip
    return {"zero_shot": result}, ClassPredictions(list(rows["row_id"]), list(labels), classes, logits)

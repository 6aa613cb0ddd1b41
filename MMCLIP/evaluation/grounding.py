"""Grounding: does the text-to-patch attention of a finding's prompt lie on the lesion? Measured against true masks."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..modeling_mmclip import evaluating
from ..text.prompts import negative_prompts, positive_prompts
from .embeddings import pixel_value_batches
from .metrics import auroc, percentile_interval, resample_patients


class GroundingPair(NamedTuple):
    """One finding in one image: `row` in the rows, `mask` (height, width) bool, True on the lesion of either side."""

    row: int
    finding: str
    mask: np.ndarray


def read_mask(png: bytes) -> np.ndarray:
    """A one-channel PNG as (height, width) bool, True where it is not black."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("L")) > 0


def _rows_with_masks(rows: datasets.Dataset) -> list[int]:
    columns = rows.select_columns(["image", "masks"])
    return [index for index, row in enumerate(columns) if row["masks"] and row["image"] is not None]


def row_pairs(rows: datasets.Dataset, index: int) -> list[GroundingPair]:
    """The findings of row `index` with their masks, left and right joined. Masks of one image must agree in size."""
    row = rows.select_columns(["row_id", "masks"])[index]
    joined = {}
    for mask in row["masks"]:
        pixels = read_mask(mask["png"])
        if joined and pixels.shape != next(iter(joined.values())).shape:
            raise ValueError(
                f"Row {row['row_id']!r}: the mask of {mask['finding']!r} is {pixels.shape}, but the first mask of "
                f"the row is {next(iter(joined.values())).shape}. All masks must have the size of the image."
            )
        joined[mask["finding"]] = joined.get(mask["finding"], False) | pixels
    return [GroundingPair(index, finding, mask) for finding, mask in joined.items()]


def grounding_heatmaps(
    model, processor, rows: datasets.Dataset, pairs: Sequence[GroundingPair], batch_size: int = 64, num_workers: int = 0
) -> list[np.ndarray]:
    """Where the patches answer "There is <finding>." more than its denial, at the size of each mask, float64."""
    if not pairs:
        return []
    images = rows.select_columns(["row_id", "image"]).select([pair.row for pair in pairs])
    heatmaps = []
    with evaluating(model):
        for pixel_values in pixel_value_batches(processor, images, batch_size, num_workers):
            batch = pairs[len(heatmaps) : len(heatmaps) + len(pixel_values)]
            # "There is <finding>." against "There is no <finding>."
            tokens, contrast = (
                processor(text=[prompts(pair.finding)[0] for pair in batch], return_tensors="pt").to(model.device)
                for prompts in (positive_prompts, negative_prompts)
            )
            attention = model.get_text_to_patch_attention(
                pixel_values=pixel_values.to(device=model.device, dtype=model.dtype),
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                contrast_input_ids=contrast["input_ids"],
                contrast_attention_mask=contrast["attention_mask"],
            )
            for pair, one in zip(batch, attention.float().cpu(), strict=True):
                heatmaps.append(np.asarray(processor.resize_heatmap(one, pair.mask.shape), dtype=np.float64))
    return heatmaps


def heatmap_scores(heatmap: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Pixel AUROC of `heatmap` (height, width) for `mask` (height, width) bool, and the pointing game.

    The pointing game is 1 when the highest pixel lies on the lesion, 0 when not; among equally high pixels it is the
    share that does, so a constant map scores chance.
    """
    if heatmap.shape != mask.shape:
        raise ValueError(f"A heat map must have the size of its mask, {mask.shape}, but has {heatmap.shape}.")
    if not np.isfinite(heatmap).all():
        raise ValueError("The heat map holds NaN or infinity. Look for diverged weights in the model.")
    return auroc(mask.ravel(), heatmap.ravel()), float(mask[heatmap == heatmap.max()].mean())


def heatmap_auroc(
    model,
    processor,
    rows: datasets.Dataset,
    batch_size: int = 64,
    num_bootstrap: int = 1000,
    seed: int = 0,
    num_workers: int = 0,
    progress: str = "",
) -> dict:
    """How well the heat maps find the lesions, as a mean over (image, finding) pairs that have a mask.

    `heatmap_auroc` is the mean pixel AUROC (0.5 is chance), with a 95 % bootstrap interval over images; `pointing_game`
    is the share of maps whose peak lies on the lesion; its chance level is the mean share of pixels that are lesion. A
    mask that covers no pixel or all of them has no AUROC; such pairs are skipped and counted.
    """
    masked = _rows_with_masks(rows)
    scores, images, findings, areas, num_skipped = [], [], [], [], 0
    for start in tqdm(range(0, len(masked), batch_size), desc=progress, unit="batch", disable=not progress):
        pairs = [pair for index in masked[start : start + batch_size] for pair in row_pairs(rows, index)]
        usable = [pair for pair in pairs if pair.mask.any() and not pair.mask.all()]
        num_skipped += len(pairs) - len(usable)
        heatmaps = grounding_heatmaps(model, processor, rows, usable, batch_size, num_workers)
        scores += [heatmap_scores(heatmap, pair.mask) for heatmap, pair in zip(heatmaps, usable, strict=True)]
        images += [str(pair.row) for pair in usable]
        findings += [pair.finding for pair in usable]
        areas += [pair.mask.mean() for pair in usable]
    if not scores:
        raise ValueError(f"None of {len(rows)} rows has an image and a lesion mask, so no heat map can be measured.")

    values = np.array(scores)  # (pairs, 2)
    draws = [np.empty(0)]
    for weights in resample_patients(images, len(values), num_bootstrap, seed):
        draws.append(weights @ values[:, 0] / weights.sum(axis=1))
    per_finding = {}
    for finding in sorted(set(findings)):
        chosen = np.array([name == finding for name in findings])
        per_finding[finding] = {
            "heatmap_auroc": float(values[chosen, 0].mean()),
            "pointing_game": float(values[chosen, 1].mean()),
            "num_pairs": int(chosen.sum()),
        }
    return {
        "heatmap_auroc": float(values[:, 0].mean()),
        "heatmap_auroc_ci": percentile_interval(np.concatenate(draws), num_bootstrap),
        "pointing_game": float(values[:, 1].mean()),
        "pointing_game_chance": float(np.mean(areas)),
        "per_finding": per_finding,
        "num_pairs": len(values),
        "num_skipped": num_skipped,
    }


def example_pairs(rows: datasets.Dataset, num: int = 6) -> list[GroundingPair]:
    """The first pairs of the rows, each with another finding while there are others: not chosen for success."""
    chosen, repeats, seen = [], [], set()
    for index in _rows_with_masks(rows):
        for pair in row_pairs(rows, index):
            (repeats if pair.finding in seen else chosen).append(pair)
            seen.add(pair.finding)
        if len(chosen) >= num:
            break
    return (chosen + repeats)[:num]

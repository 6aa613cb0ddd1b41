"""Grounding: does the heat map of a finding's prompt lie on the lesion? Measured against true masks and boxes.

A pair is one finding in one image, with all its lesions as one truth. Three measures of a map for a truth:

- `heatmap_auroc`: AUROC of the pixels, those of the truth being positive.
- `average_precision`: of the same pixels. It asks more of small lesions, which the AUROC hardly punishes for misses.
- `pointing_game`: does the highest pixel lie on the truth?

Overlaps (IoU, Dice) need a threshold, which nothing here could choose without looking at the truth, and the contrast to
noise of a map changes with any rescaling of its values: both are left out.
Beside each stand what a constant map scores ("chance") and three controls that do not read the sentence, or read
another: `other_finding` is the map of a finding that the image lacks, `patch_length` the length of the projected
patches, without any text, `prior` the mean truth of the finding in all other patients, without the image.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ..image_processing_mmclip import load_shrunk
from ..modeling_mmclip import evaluating
from ..text.prompts import negative_prompts, positive_prompts
from ..text.vocabulary import broader_labels
from .bootstrap import first_and_second
from .embeddings import pixel_value_batches, text_features
from .metrics import percentile_interval, resample_patients


MEASURES = ("heatmap_auroc", "average_precision", "pointing_game")
CONTROLS = ("other_finding", "patch_length", "prior")
# for `other_finding` where the rows have lesions of one finding alone
OTHER_FINDINGS = ("cardiomegaly", "pleural effusion", "nodule", "pneumothorax")
PRIOR_SIDE = 32  # cells along the side of a prior map; finer than the patches of any tower here


class GroundingPair(NamedTuple):
    """One finding in one image: `row` in the rows, `mask` (height, width) bool, True on any of its lesions.

    `truth` says what the mask was made of: "mask", or "box" where the image has no mask of the finding.
    """

    row: int
    finding: str
    mask: np.ndarray
    truth: str = "mask"


class HeatmapScores(NamedTuple):
    """The three measures of the module for one map."""

    heatmap_auroc: float
    average_precision: float
    pointing_game: float


class GroundingScores(NamedTuple):
    """What each of n pairs scored; the lists and arrays have one entry for each.

    `patient_ids` are those of different sources apart, and the image's own where none is known. `shares` is the share
    of pixels that are truth. `values` maps "map" and each of `CONTROLS` to (n, 3) in the order of `MEASURES`.
    `other_findings` names the finding of that control. `num_skipped` counts the pairs left out by reason.
    """

    row_ids: list[str]
    patient_ids: list[str]
    findings: list[str]
    truths: list[str]
    shares: np.ndarray
    other_findings: list[str]
    values: dict[str, np.ndarray]
    num_skipped: dict[str, int]

    def table(self) -> list[dict]:
        """A line for each pair, for a CSV; measures of the map have their name, of a control its name before that."""
        lines = []
        for number, (row_id, finding) in enumerate(zip(self.row_ids, self.findings, strict=True)):
            line = {"row_id": row_id, "finding": finding, "truth": self.truths[number]}
            line |= {"truth_share": float(self.shares[number]), "other_finding": self.other_findings[number]}
            for name, values in self.values.items():
                prefix = "" if name == "map" else f"{name}_"
                line |= {f"{prefix}{measure}": float(values[number, m]) for m, measure in enumerate(MEASURES)}
            lines.append(line)
        return lines


# ------------------------------------------------------------------------------------------------------------- truths


def read_mask(png: bytes) -> np.ndarray:
    """A one-channel PNG as (height, width) bool, True where it is not black."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("L")) > 0


def box_mask(box: dict, size: tuple[int, int]) -> np.ndarray:
    """The pixels of an image of `size` (height, width) whose centre lies in `box`, as (height, width) bool.

    A box that meets no centre is the pixel at its middle; what lies outside the image is cut off. Raises `ValueError`
    for a box without area, and for one that does not meet the image.
    """
    x, y, width, height = (box[name] for name in ("x", "y", "width", "height"))
    if not (all(map(math.isfinite, (x, y, width, height))) and width > 0 and height > 0):
        raise ValueError(f"expected a box with some area, got x {x}, y {y}, width {width}, height {height}.")
    rows, columns = _covered(y, height, size[0]), _covered(x, width, size[1])
    if rows is None or columns is None:
        raise ValueError(
            f"the box at x {x:g}, y {y:g} of {width:g} x {height:g} lies outside the image, which is {size[1]} x "
            f"{size[0]}. Boxes are in pixels of `image`: was it resized without them?"
        )
    mask = np.zeros(size, dtype=bool)
    mask[rows, columns] = True
    return mask


def _covered(start: float, length: float, side: int) -> slice | None:
    first, last = max(start, 0), min(start + length, side)
    if first >= last:
        return None
    begin, end = math.ceil(first - 0.5), math.ceil(last - 0.5)  # pixel k has its centre at k + 0.5
    if begin == end:
        begin = min(math.floor((first + last) / 2), side - 1)
    return slice(begin, max(end, begin + 1))


def rows_with_lesions(rows: datasets.Dataset) -> list[int]:
    """The rows with a mask or a box, found without making Python objects of them."""
    names = [name for name in ("masks", "boxes") if name in rows.column_names]
    found = [np.zeros(0, dtype=bool)]
    for table in rows.select_columns(names).with_format("arrow").iter(batch_size=1000) if names else ():
        found.append(np.any([pc.list_value_length(table[name]).fill_null(0).to_numpy() > 0 for name in names], axis=0))
    return np.flatnonzero(np.concatenate(found)).tolist()


def image_size(row: dict) -> tuple[int, int]:
    """(height, width) of the image upright and with square pixels, as it is seen by the processor."""
    return load_shrunk(row["image"], 1, f"Row {row['row_id']!r}")[1][::-1]


def _row_pairs(row: dict, index: int, size: tuple[int, int]) -> list[GroundingPair]:
    at, joined = f"Row {row['row_id']!r}", {}
    for mask in row.get("masks") or ():
        finding = mask["finding"]
        try:
            pixels = read_mask(mask["png"])
        except OSError as error:
            raise ValueError(f"{at}: the mask of {finding!r} cannot be read as a PNG: {error}") from error
        if pixels.shape != size:
            raise ValueError(
                f"{at}: the mask of {finding!r} is {pixels.shape}, but the image is {size} (height, width). All masks "
                "must have the size of the image."
            )
        joined[finding] = joined.get(finding, False) | pixels
    pairs = [GroundingPair(index, finding, mask, "mask") for finding, mask in joined.items()]
    boxed = {}
    for box in row.get("boxes") or ():
        if box["finding"] in joined:
            continue
        try:
            pixels = box_mask(box, size)
        except ValueError as error:
            raise ValueError(f"{at}, {box['finding']!r}: {error}") from error
        boxed[box["finding"]] = boxed.get(box["finding"], False) | pixels
    return pairs + [GroundingPair(index, finding, mask, "box") for finding, mask in boxed.items()]


def row_pairs(rows: datasets.Dataset, index: int) -> list[GroundingPair]:
    """The findings of row `index`, which has an image, that have a mask or a box; all lesions of each joined.

    Where a finding has both, the masks count. Masks must have the size of the image. Boxes are cut at its border; one
    wholly outside is an error.
    """
    row = rows[index]
    return _row_pairs(row, index, image_size(row))


def example_pairs(rows: datasets.Dataset, num: int = 6) -> list[GroundingPair]:
    """The first pairs of the rows, each with another finding while there are others: not chosen for success."""
    chosen, repeats, seen = [], [], set()
    for index in rows_with_lesions(rows):
        if rows[index]["image"] is None:
            continue
        for pair in row_pairs(rows, index):
            (repeats if pair.finding in seen else chosen).append(pair)
            seen.add(pair.finding)
        if len(chosen) >= num:
            break
    return (chosen + repeats)[:num]


# --------------------------------------------------------------------------------------------------------------- maps


def finding_directions(model, processor, findings: Iterable[str]) -> dict[str, Tensor]:
    """Finding -> (D,): the embedding of "There is <finding>." minus that of its denial, which its heat map shows."""
    findings = list(dict.fromkeys(findings))
    texts = [prompts(finding)[0] for finding in findings for prompts in (positive_prompts, negative_prompts)]
    embeds = text_features(model, processor, texts)  # (2F, D)
    return dict(zip(findings, embeds[0::2] - embeds[1::2], strict=True))


def _patch_token_batches(
    model, processor, rows: datasets.Dataset, batch_size: int, num_workers: int, progress: str = ""
) -> Iterator[Tensor]:
    for pixel_values in pixel_value_batches(processor, rows, batch_size, num_workers, progress):
        yield model.encode_image(pixel_values.to(device=model.device, dtype=model.dtype))[1]


def _attention(model, patch_tokens: Tensor, positions: Sequence[int], directions: Sequence[Tensor]) -> np.ndarray:
    """(B, N, H), P images of them and P directions -> (P, N) float32, each row summing to 1."""
    directions = torch.stack(list(directions)).to(patch_tokens)
    return model.attention_to_patches(patch_tokens[list(positions)], directions).float().cpu().numpy()


def grounding_heatmaps(
    model, processor, rows: datasets.Dataset, pairs: Sequence[GroundingPair], batch_size: int = 64, num_workers: int = 0
) -> list[np.ndarray]:
    """Where the patches answer "There is <finding>." more than its denial, at the size of each mask, float32.

    Each image is encoded once, however many findings it has.
    """
    directions = finding_directions(model, processor, [pair.finding for pair in pairs])
    by_row: dict[int, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_row.setdefault(pair.row, []).append(number)
    groups, heatmaps = iter(by_row.values()), [None] * len(pairs)
    if not pairs:
        return heatmaps
    with evaluating(model):
        for patch_tokens in _patch_token_batches(model, processor, rows.select(list(by_row)), batch_size, num_workers):
            taken = [(place, number) for place in range(len(patch_tokens)) for number in next(groups)]
            chosen = [directions[pairs[number].finding] for _, number in taken]
            attention = _attention(model, patch_tokens, [place for place, _ in taken], chosen)
            for (_, number), one in zip(taken, attention, strict=True):
                heatmaps[number] = processor.resize_heatmap(one, pairs[number].mask.shape)
    return heatmaps


def sentence_heatmaps(
    model, processor, image: Any, texts: Sequence[str], against: str | Sequence[str] | None = None
) -> np.ndarray:
    """The heat map of each sentence on one image, (T, height, width) float32 at the size of the original.

    `image` is anything that the processor reads, a DICOM file too. `against` is a sentence for each text, or one for
    all, usually the denial: the map then shows where the patches answer the text more than that. Without it a map
    shows mostly what all sentences share.
    """
    texts, against = list(texts), [against] if isinstance(against, str) else against
    if not texts or not all(text.strip() for text in [*texts, *(against or ())]):
        raise ValueError("Expected one or more sentences for a heat map, but there is none or one is empty.")
    if against is not None and len(against) not in (1, len(texts)):
        raise ValueError(f"`against` must be one sentence, or one for each of {len(texts)} texts, got {len(against)}.")
    pixel_values = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    tokens = processor(text=texts, return_tensors="pt").to(model.device)
    contrast = {} if against is None else processor(text=list(against), return_tensors="pt").to(model.device)
    with evaluating(model):
        attention = model.get_text_to_patch_attention(
            pixel_values=pixel_values.to(device=model.device, dtype=model.dtype),
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            contrast_input_ids=contrast.get("input_ids"),
            contrast_attention_mask=contrast.get("attention_mask"),
        )
    size = load_shrunk(image, 1)[1][::-1]
    return np.stack([processor.resize_heatmap(one, size) for one in attention.float()])


def heatmap_scores(heatmap: np.ndarray, mask: np.ndarray) -> HeatmapScores:
    """The three measures of `heatmap` (height, width) for `mask` (height, width) bool, which has both values.

    Equal pixels are one step of the curves, as in scikit-learn; among equally high pixels the pointing game is the
    share on the lesion, so that a constant map scores chance: 0.5, and twice the lesion's share of the image.
    """
    if heatmap.shape != mask.shape:
        raise ValueError(f"A heat map must have the size of its mask, {mask.shape}, but has {heatmap.shape}.")
    if not np.isfinite(heatmap).all():
        raise ValueError("The heat map holds NaN or infinity. Look for diverged weights in the model.")
    if mask.all() or not mask.any():
        raise ValueError("A mask of no pixel, or of all, ranks nothing: leave it out.")
    # two plain sorts: a tenth of the time of one argsort of the whole film, and as exact
    inside, outside = np.sort(heatmap[mask]), np.sort(heatmap[~mask])
    values, counts = np.unique(inside, return_counts=True)
    lower = np.searchsorted(outside, values, side="left")
    not_higher = np.searchsorted(outside, values, side="right")
    num_true = len(inside) - np.cumsum(counts) + counts  # at each value as threshold
    num_false = len(outside) - lower
    area = int(counts @ (lower + not_higher)) / (2 * len(inside) * len(outside))
    precision = float(counts @ (num_true / (num_true + num_false))) / len(inside)
    is_peak = heatmap == max(inside[-1], outside[-1])
    return HeatmapScores(area, precision, float(mask[is_peak].mean()))


# --------------------------------------------------------------------------------------------------------- evaluation


class _Truth(NamedTuple):
    """What is kept of a pair until its image is encoded; `cells` is its mask on the grid of the prior, 0 to 255."""

    row: int
    row_id: str
    patient_id: str
    finding: str
    kind: str
    size: tuple[int, int]
    share: float
    stated: frozenset[str]
    cells: np.ndarray


class _Truths(torch.utils.data.Dataset):
    """Rows with lesions -> their truths, or the reasons why there is none."""

    def __init__(self, rows: datasets.Dataset, indices: Sequence[int]):
        names = ("row_id", "image", "source", "patient_id", "present", "masks", "boxes")
        self.rows = rows.select_columns([name for name in names if name in rows.column_names])
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> list[_Truth | str]:
        index = self.indices[number]
        row = self.rows[index]
        if row["image"] is None:
            lesions = [*(row.get("masks") or ()), *(row.get("boxes") or ())]
            return ["no image"] * len({lesion["finding"] for lesion in lesions})
        # equal names in two sources are two patients; without a name an image is a patient of its own
        patient = f"{row['source']}\0{row['patient_id']}" if row["patient_id"] else f"\0{row['row_id']}"
        size = image_size(row)
        pairs = _row_pairs(row, index, size)
        stated = frozenset([*(row["present"] or ()), *(pair.finding for pair in pairs)])
        found: list[_Truth | str] = []
        for _, finding, mask, kind in pairs:
            if not mask.any() or mask.all():
                found.append(f"{kind} covers the whole image" if mask.any() else f"empty {kind}")
                continue
            cells = Image.fromarray(mask).convert("L").resize((PRIOR_SIDE, PRIOR_SIDE), Image.Resampling.BOX)
            share = float(mask.mean())
            found.append(
                _Truth(index, row["row_id"], patient, finding, kind, size, share, stated, np.asarray(cells, np.int64))
            )
        return found


def _find_truths(rows: datasets.Dataset, num_workers: int) -> tuple[list[_Truth], dict[str, int]]:
    """Every pair that can be measured, in the order of the rows, and how many cannot be, by reason."""
    reader = DataLoader(
        _Truths(rows, rows_with_lesions(rows)), batch_size=None, num_workers=num_workers, collate_fn=list
    )
    found = [entry for entries in reader for entry in entries]
    truths = [entry for entry in found if isinstance(entry, _Truth)]
    num_skipped = dict(Counter(entry for entry in found if isinstance(entry, str)))
    if not truths:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in num_skipped.items())
        raise ValueError(
            f"None of {len(rows)} rows has an image and a lesion mask or box, so no heat map can be measured"
            f"{f' ({reasons})' if reasons else ''}."
        )
    return truths, num_skipped


def _other_findings(truths: Sequence[_Truth], seed: int) -> list[str]:
    """For each truth another finding, neither its kind nor a kind of it, and one that the image lacks if there is any.

    It is drawn from the findings of all truths, and from `OTHER_FINDINGS` where these leave no choice.
    """
    rng = np.random.default_rng(seed)
    findings = sorted({truth.finding for truth in truths})
    broader = {finding: set(broader_labels(finding)) for finding in {*findings, *OTHER_FINDINGS}}
    drawn = []
    for truth in truths:
        own = truth.finding
        pools = [
            [name for name in pool if name not in broader[own] and own not in broader[name] and name not in stated]
            for stated in (truth.stated, ())
            for pool in (findings, OTHER_FINDINGS)
        ]
        pool = next(filter(None, pools))
        drawn.append(pool[int(rng.random() * len(pool))])
    return drawn


class _Prior:
    """Where a finding lies in other patients: the mean of their truths, each stretched to one square grid.

    Where no other patient has the finding, all findings count; where there is no other patient, the map is flat.
    """

    def __init__(self, truths: Sequence[_Truth]):
        self._sums: dict[tuple[str, str], np.ndarray | int] = Counter()
        for truth in truths:
            for patient in ("", truth.patient_id):  # "" is everybody; whole numbers, so that taking one off is exact
                for finding in ("", truth.finding):
                    self._sums[patient, finding] = self._sums[patient, finding] + truth.cells

    def heatmap(self, truth: _Truth) -> np.ndarray:
        for finding in (truth.finding, ""):
            cells = self._sums["", finding] - self._sums[truth.patient_id, finding]
            if cells.any():
                break
        grid = Image.fromarray(cells.astype(np.float32))
        return np.asarray(grid.resize(truth.size[::-1], Image.Resampling.BILINEAR))


def evaluate_grounding(
    model,
    processor,
    rows: datasets.Dataset,
    *,
    batch_size: int = 64,
    num_bootstrap: int = 1000,
    seed: int = 0,
    num_workers: int = 0,
    progress: str = "",
) -> tuple[dict, GroundingScores]:
    """How well heat maps find the lesions of `rows`: `grounding_metrics`, and the scores of each pair.

    Every finding of an image that has a mask or a box is a pair; one whose truth covers no pixel or all of them, or
    that has no image, is skipped and counted. Images are encoded once, and each sentence once. Raises `ValueError` for
    rows without any lesion, masks and boxes that do not fit their image, and maps that are not finite, naming the row.
    """
    truths, num_skipped = _find_truths(rows, num_workers)
    others = _other_findings(truths, seed)
    directions = finding_directions(model, processor, [*(truth.finding for truth in truths), *others])
    prior = _Prior(truths)
    by_row: dict[int, list[int]] = {}
    for number, truth in enumerate(truths):
        by_row.setdefault(truth.row, []).append(number)
    lesions = rows.select_columns(["row_id", *(name for name in ("masks", "boxes") if name in rows.column_names)])

    values = {name: np.empty((len(truths), len(MEASURES))) for name in ("map", *CONTROLS)}
    remaining = iter(by_row.items())
    with evaluating(model):
        images = rows.select(list(by_row))
        for patch_tokens in _patch_token_batches(model, processor, images, batch_size, num_workers, progress):
            taken = [next(remaining) for _ in range(len(patch_tokens))]
            numbers = [number for _, group in taken for number in group]
            places = [place for place, (_, group) in enumerate(taken) for _ in group]
            attention = _attention(model, patch_tokens, places, [directions[truths[n].finding] for n in numbers])
            other = _attention(model, patch_tokens, places, [directions[others[n]] for n in numbers])
            lengths = model.visual_projection(patch_tokens).float().norm(dim=-1).cpu().numpy()
            masks = (pair.mask for row, group in taken for pair in _usable_pairs(lesions, row, group, truths))
            for place, number, mask, *maps in zip(places, numbers, masks, attention, other, strict=True):
                truth = truths[number]
                heatmaps = [processor.resize_heatmap(one, truth.size) for one in (*maps, lengths[place])]
                for name, heatmap in zip(values, [*heatmaps, prior.heatmap(truth)], strict=True):
                    try:
                        values[name][number] = heatmap_scores(heatmap, mask)
                    except ValueError as error:
                        raise ValueError(f"Row {truth.row_id!r}, {truth.finding!r}: {error}") from error
    scores = GroundingScores(
        [truth.row_id for truth in truths],
        [truth.patient_id for truth in truths],
        [truth.finding for truth in truths],
        [truth.kind for truth in truths],
        np.array([truth.share for truth in truths]),
        others,
        values,
        num_skipped,
    )
    return grounding_metrics(scores, num_bootstrap, seed), scores


def _usable_pairs(
    lesions: datasets.Dataset, row: int, numbers: Sequence[int], truths: Sequence[_Truth]
) -> list[GroundingPair]:
    pairs = {pair.finding: pair for pair in _row_pairs(lesions[row], row, truths[numbers[0]].size)}
    return [pairs[truths[number].finding] for number in numbers]


# ----------------------------------------------------------------------------------------------------------- summary


def grounding_metrics(scores: GroundingScores, num_bootstrap: int = 1000, seed: int = 0) -> dict:
    """The measures as a mean over pairs, over findings (`macro`) and for each finding, as values that JSON can hold.

    Beside each `<measure>` stand `<measure>_ci`, its 95 % bootstrap interval over patients, `<measure>_chance`, what a
    constant map scores, and under `controls` the same of each control with `<measure>_difference`, the map's lead over
    it, and its interval from the same draws. An interval is None with a single patient or `num_bootstrap=0`; that of
    `macro` uses the draws that hold every finding.
    """
    values = np.concatenate(list(scores.values.values()), axis=1)  # (n, maps * measures), the map itself first
    names, groups = _groups(scores)
    means = np.stack([values[group].mean(axis=0) for group in groups])  # (1 + findings, maps * measures)
    shares = np.array([scores.shares[group].mean() for group in groups])
    draws = _draws(values, groups, scores.patient_ids, num_bootstrap, seed)
    num_patients = [len({scores.patient_ids[number] for number in group}) for group in groups]
    macro = _described(means[1:].mean(axis=0), draws[1:].mean(axis=0), shares[1:].mean(), num_bootstrap)
    described = [
        _described(means[number], draws[number], shares[number], num_bootstrap)
        | {"num_pairs": len(group), "num_patients": num_patients[number]}
        for number, group in enumerate(groups)
    ]
    return described[0] | {
        "macro": macro | {"num_findings": len(names)},
        "per_finding": dict(zip(names, described[1:], strict=True)),
        "num_images": len(set(scores.row_ids)),
        "num_by_truth": dict(Counter(scores.truths)),
        "num_skipped": sum(scores.num_skipped.values()),
        "skipped": scores.num_skipped,
        "num_bootstrap": num_bootstrap,
    }


def _groups(scores: GroundingScores) -> tuple[list[str], list[np.ndarray]]:
    """The findings in order, and the pairs of all of them followed by those of each."""
    findings, names = np.array(scores.findings), sorted(set(scores.findings))
    return names, [np.arange(len(findings)), *(np.flatnonzero(findings == name) for name in names)]


def _draws(
    values: np.ndarray, groups: Sequence[np.ndarray], patient_ids: Sequence[str], num_bootstrap: int, seed: int
) -> np.ndarray:
    """Bootstrap means of `values` (n, K) over each group: (groups, R, K), NaN where none of it was drawn."""
    blocks = [np.empty((len(groups), 0, values.shape[1]))]
    for weights in resample_patients(patient_ids, len(values), num_bootstrap, seed):
        totals = [weights[:, group].sum(axis=1, keepdims=True) for group in groups]
        with np.errstate(invalid="ignore"):
            blocks.append(np.stack([weights[:, g] @ values[g] / t for g, t in zip(groups, totals, strict=True)]))
    draws = np.concatenate(blocks, axis=1)
    patients = np.array(patient_ids)
    # one patient says nothing of how others would differ
    draws[[len(set(patients[group])) < 2 for group in groups]] = np.nan
    return draws


def _described(means: np.ndarray, draws: np.ndarray, share: float, num_bootstrap: int) -> dict:
    """`means` (maps * measures,) and `draws` (R, maps * measures) under the names of `grounding_metrics`."""
    chance = {"heatmap_auroc": 0.5, "average_precision": float(share), "pointing_game": float(share)}
    result, controls = {}, {}
    for column, measure in enumerate(MEASURES):
        result[measure] = float(means[column])
        result[f"{measure}_ci"] = percentile_interval(draws[:, column], num_bootstrap)
        result[f"{measure}_chance"] = chance[measure]
    for number, name in enumerate(CONTROLS, start=1):
        controls[name] = {}
        for column, measure in enumerate(MEASURES):
            other = number * len(MEASURES) + column
            lead = draws[:, column] - draws[:, other]
            controls[name] |= {
                measure: float(means[other]),
                f"{measure}_ci": percentile_interval(draws[:, other], num_bootstrap),
                f"{measure}_difference": float(means[column] - means[other]),
                f"{measure}_difference_ci": percentile_interval(lead, num_bootstrap),
            }
    return result | {"controls": controls}


def compare_grounding(
    first: GroundingScores, second: GroundingScores, num_bootstrap: int = 1000, seed: int = 0
) -> dict:
    """Two models on the same pairs: each measure of both, `first` minus `second`, its 95 % interval and p-value.

    Patients are drawn for both alike. The p-value is that of `bootstrap.py`. Given over pairs and, under `macro`, over
    findings. Raises `ValueError` where the pairs or their truths differ.
    """
    for name in ("row_ids", "patient_ids", "findings", "truths"):
        if getattr(first, name) != getattr(second, name):
            raise ValueError(
                f"Only scores of the same pairs can be compared, but their `{name}` differ ({len(first.row_ids)} and "
                f"{len(second.row_ids)} pairs). Evaluate both models on the same rows."
            )
    groups = _groups(first)[1]
    values = np.concatenate([first.values["map"], second.values["map"]], axis=1)  # (n, 2 * measures)
    means = np.stack([values[group].mean(axis=0) for group in groups])
    draws = _draws(values, groups, first.patient_ids, num_bootstrap, seed)
    result = _compared(means[0], draws[0], num_bootstrap)
    return result | {"macro": _compared(means[1:].mean(axis=0), draws[1:].mean(axis=0), num_bootstrap)}


def _compared(means: np.ndarray, draws: np.ndarray, num_bootstrap: int) -> dict:
    num = len(MEASURES)
    return {
        measure: first_and_second(means[c], means[c + num], draws[:, c] - draws[:, c + num], num_bootstrap)
        for c, measure in enumerate(MEASURES)
    }


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
    """The metrics of `evaluate_grounding` alone."""
    return evaluate_grounding(
        model,
        processor,
        rows,
        batch_size=batch_size,
        num_bootstrap=num_bootstrap,
        seed=seed,
        num_workers=num_workers,
        progress=progress,
    )[0]

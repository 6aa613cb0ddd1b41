"""Could this picture be a chest radiograph at all? A score to warn by, not a verdict.

Handwritten rules on a thumbnail, no model and no training data: colour, shape, flat areas, noise, and whether two dark
lung fields lie beside a bright middle. A radiograph of a hand or a lateral film may pass or be doubted; a photograph,
a page or a screenshot is nearly always doubted. Measured in RESULTS.md, "Published and used".
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..image_processing_mmclip import IMAGE_FORMATS, load_shrunk


DOUBT = 0.5  # a score below is worth a warning
THUMBNAIL = 256  # pixels of the longer side
PATTERN_SIDE = 32
COLOUR_SAMPLES = 128  # pixels of the original along each side that are asked for their colour
# what DICOM calls radiographs; a header that says nothing is not held against a film
MODALITIES = ("CR", "DX", "DR", "RG", "RF", "XA", "XR", "OT", "SC")
CHEST_WORDS = ("CHEST", "THORA", "LUNG", "RIB", "HEART")


@dataclass(frozen=True)
class XrayLikeness:
    """`score` in [0, 1], 1 where nothing speaks against a frontal chest radiograph, and `reasons`, the worst first."""

    score: float
    reasons: list[str]

    @property
    def is_doubtful(self) -> bool:
        return self.score < DOUBT


def xray_likeness(image: Any, gray: Image.Image | None = None) -> XrayLikeness:
    """How far `image` looks like a frontal chest radiograph: whatever `load_grayscale` reads, and raises as it does.

    `gray` is what `load_grayscale` or `load_unrounded` makes of it, where that is at hand: a grey file is then not
    decoded again.

    Each rule gives a factor in (0, 1], and the score is their product; a rule whose factor is below 0.8 adds a reason.
    Of a DICOM header modality and body part are read, nothing else. About 10 ms for a picture of 2,500 px in memory; a
    path adds the time of decoding it.
    """
    if isinstance(image, dict):  # of `datasets.Image(decode=False)`
        image = image["bytes"] if image.get("bytes") is not None else image.get("path", image)
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if isinstance(image, torch.Tensor):
        image = (image.float() if image.is_floating_point() else image).detach().cpu()
    if isinstance(image, (str, os.PathLike, bytes)):
        image = _opened(image)
    thumbnail, (width, height) = load_shrunk(image if gray is None else gray, longer_side=THUMBNAIL)
    levels = np.asarray(thumbnail).astype(np.float32)
    found = sorted([*_judged_header(image), *_judged(levels, width, height, _coloured_share(image))])
    score = float(np.prod([factor for factor, _ in found]))
    return XrayLikeness(score, [reason for factor, reason in found if factor < 0.8])


def _opened(source: str | os.PathLike | bytes) -> Any:
    """A PIL image of `source`, so that it is decoded once for grey and colour; what PIL cannot open stays as it is."""
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS)
        picture.draft(None, (4 * THUMBNAIL, 4 * THUMBNAIL))  # JPEG alone: at 1/2 to 1/8
        return picture
    except (OSError, ValueError, Image.DecompressionBombError):
        return source  # DICOM, or an error that `load_shrunk` explains


def _judged(gray: np.ndarray, width: int, height: int, coloured: float) -> Iterator[tuple[float, str]]:
    """Factor and reason of each rule. The borders of the ramps leave 98 % of the films that we looked at alone."""
    aspect = max(width, height) / min(width, height)
    yield _ramp(aspect, 1.45, 2.2, 0.2), f"one side is {aspect:.1f} times the other; films are nearly square"
    yield _ramp(min(width, height), 64, 16, 0.2), f"only {width} x {height} pixels"
    yield _ramp(coloured, 0.01, 0.15, 0.1), f"colours in {coloured:.0%} of the picture; radiographs are grey"
    spread = float(gray.std())
    if spread < 2:
        yield 0.02, "one even shade, there is nothing on it"
        return
    yield _ramp(spread, 12, 4, 0.2), "hardly any contrast"
    counts = np.bincount(gray.astype(np.uint8).ravel(), minlength=256) / gray.size
    black, flat = counts[:3].sum(), counts[3:].max()
    yield _ramp(flat, 0.25, 0.6, 0.1), f"{flat:.0%} of it has exactly one shade, as in pages and screenshots"
    yield _ramp(black, 0.6, 0.9, 0.2), f"{black:.0%} of it is black"
    smooth = min(_correlation(gray[:, 1:], gray[:, :-1]), _correlation(gray[1:], gray[:-1]))
    yield _ramp(smooth, 0.9, 0.7, 0.1), "neighbouring pixels have little in common, as in noise or fine texture"
    pattern = _chest_pattern(gray)
    shape = "no dark lung fields beside a brighter middle"
    if pattern < -0.3:
        shape += "; it may be inverted (black and white exchanged)"
    yield _ramp(pattern, 0.2, -0.1, 0.1), shape


def _judged_header(image: Any) -> Iterator[tuple[float, str]]:
    """The same for what a DICOM header says of its picture."""
    modality, body_part = _dicom_words(image)
    if modality and modality not in MODALITIES:
        yield 0.2, f"its DICOM header says the modality {modality}"
    if body_part and not any(word in body_part for word in CHEST_WORDS):
        yield 0.3, f"its DICOM header says the body part {body_part}"


def _dicom_words(image: Any) -> tuple[str, str]:
    """Modality and body part in capitals, "" where there is no header or no such element."""
    names = ["Modality", "BodyPartExamined"]
    if isinstance(image, (str, os.PathLike, bytes)):
        import pydicom  # `load_shrunk` has read a file with it that PIL does not know

        source = io.BytesIO(image) if isinstance(image, bytes) else image
        image = pydicom.dcmread(source, stop_before_pixels=True, force=True, specific_tags=names)
    elif isinstance(image, (Image.Image, np.ndarray, dict)) or not hasattr(image, "file_meta"):
        return "", ""
    return tuple("".join(filter(str.isprintable, str(image.get(name) or ""))).strip().upper()[:16] for name in names)


def _ramp(value: float, good: float, bad: float, lowest: float) -> float:
    """1 up to `good`, `lowest` from `bad` on, a straight line between; `good` may lie on either side of `bad`."""
    return 1 - (1 - lowest) * float(np.clip((value - good) / (bad - good), 0, 1))


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first**2).mean() * (second**2).mean()))
    return float((first * second).mean()) / scale if scale > 0 else 0.0


@cache
def _chest() -> np.ndarray:
    """A frontal chest in the roughest form: dark lung fields, bright spine and heart, bright belly; (32, 32)."""
    y, x = np.mgrid[0:PATTERN_SIDE, 0:PATTERN_SIDE] / (PATTERN_SIDE - 1) * 2 - 1

    def lung(middle: float) -> np.ndarray:
        return np.exp(-((((x - middle) / 0.28) ** 2 + ((y + 0.1) / 0.55) ** 2) ** 2))

    return 0.6 * np.exp(-((x / 0.16) ** 2)) - lung(-0.42) - lung(0.42) + 0.5 * ((y > 0.65) & (abs(x) < 0.8))


def _chest_pattern(gray: np.ndarray) -> float:
    """Correlation with `_chest`, of the whole picture or without its black border, whichever is higher."""
    shown = gray > 8
    rows, columns = np.flatnonzero(shown.mean(axis=1) > 0.05), np.flatnonzero(shown.mean(axis=0) > 0.05)
    parts = [gray]
    if len(rows) > PATTERN_SIDE and len(columns) > PATTERN_SIDE:
        parts.append(gray[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    size = (PATTERN_SIDE, PATTERN_SIDE)
    return max(
        _correlation(np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BOX)), _chest()) for part in parts
    )


def _coloured_share(image: Any) -> float:
    """Share of sampled pixels that differ from a tinted grey by 24 levels or more; 0 for what has one channel."""
    sample = _sampled(image)
    if sample is None:
        return 0.0
    luma = sample.mean(axis=-1, keepdims=True)
    bright = luma[..., 0] > 16
    if not bright.any():
        return 0.0
    tint = np.median(sample[bright] / luma[bright], axis=0)  # a blue film, or a yellowed one, is not a colour picture
    return float((np.abs(sample - tint * luma).max(axis=-1) > 24).mean())


def _sampled(image: Any) -> np.ndarray | None:
    """Pixels of `image` on a coarse grid, (rows, columns, 3) in [0, 255]; None for what has no colours."""
    if isinstance(image, Image.Image):
        if image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I"):
            return None
        grid = [min(side, COLOUR_SAMPLES) for side in image.size]
        return np.asarray(image.resize(grid, Image.Resampling.NEAREST).convert("RGB")).astype(np.float32)
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) != 3 or not {3, 4} & {shape[0], shape[2]}:
        return None
    array = np.asarray(image)
    array = np.moveaxis(array, 0, -1) if shape[2] not in (3, 4) else array
    array = array[:: max(1, array.shape[0] // COLOUR_SAMPLES), :: max(1, array.shape[1] // COLOUR_SAMPLES), :3]
    array = array.astype(np.float32)
    highest = float(array.max())
    if highest <= 1 or highest > 255:
        array = array * (255 / max(highest, 1e-6))
    return array

"""Heat maps in colour over their films, with the true lesions outlined: PNG files at the size of the original image."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from ..image_processing_mmclip import load_grayscale
from .grounding import GroundingPair, example_pairs, grounding_heatmaps, image_size, row_pairs, rows_with_lesions


OUTLINE = (0, 255, 255)  # cyan, which the colours of heat do not have


def overlay(
    image: Any,
    heatmap: np.ndarray,
    truth: np.ndarray | None = None,
    *,
    opacity: float = 0.6,
    colours: str = "inferno",
    colour_bar: bool = False,
) -> Image.Image:
    """`image` in grey under `heatmap` (height, width) in colour, at its own size: an RGB picture.

    The highest pixel covers the film by `opacity` in [0, 1], the lowest not at all, so that the film stays readable
    where the map says nothing; a constant map leaves it as it is. `truth` (height, width) bool is outlined on its inner
    border. `colours` is a colour map of Matplotlib. A `colour_bar` with the lowest and the highest value stands right
    of the film. Raises `ValueError` for maps of another size than the image and values that are not finite.
    """
    from matplotlib import colormaps  # takes a second

    grey = np.asarray(load_grayscale(image))
    for name, given in (("heat map", heatmap), ("truth", truth)):
        if given is not None and given.shape != grey.shape:
            raise ValueError(
                f"The {name} must have the size of the image, {grey.shape} (height, width), but has {given.shape}. "
                "`processor.resize_heatmap(attention, (height, width))` lays patches over the image."
            )
    if not 0 <= opacity <= 1:
        raise ValueError(f"`opacity` must lie in [0, 1], got {opacity}.")
    if colours not in colormaps:
        raise ValueError(f"`colours` is {colours!r}, expected a colour map of Matplotlib such as 'inferno' or 'turbo'.")
    if not np.isfinite(heatmap).all():
        raise ValueError("The heat map holds NaN or infinity. Look for diverged weights in the model.")
    low, high = float(heatmap.min()), float(heatmap.max())
    strength = (heatmap - low) / (high - low) if high > low else np.zeros(heatmap.shape)
    cover = (opacity * strength)[..., None]
    pixels = (1 - cover) * grey[..., None] + cover * 255 * colormaps[colours](strength)[..., :3]
    pixels = np.rint(pixels).astype(np.uint8)
    if truth is not None:
        pixels[truth & ~_eroded(truth)] = OUTLINE
    picture = Image.fromarray(pixels)
    return _with_colour_bar(picture, colormaps[colours], low, high) if colour_bar else picture


def _eroded(truth: np.ndarray) -> np.ndarray:
    """`truth` without its border, which is the thicker the larger the film: 1 pixel at 128, 4 at 1024."""
    return ndimage.binary_erosion(truth, iterations=max(1, round(max(truth.shape) / 256)))


def _with_colour_bar(picture: Image.Image, colour_map, low: float, high: float) -> Image.Image:
    font = ImageFont.load_default(max(10, picture.height // 40))
    labels = [f"{value:.2g}" for value in (high, low)]
    line = sum(font.getmetrics())
    width = round(max(2 * line, *(font.getlength(label) for label in labels))) + line
    wide = Image.new("RGB", (picture.width + width, picture.height), "black")
    wide.paste(picture, (0, 0))
    height = max(1, picture.height - 3 * line)
    shades = np.rint(255 * colour_map(np.linspace(1, 0, height))[:, None, :3]).astype(np.uint8)
    bar = Image.fromarray(np.repeat(shades, line, axis=1))
    wide.paste(bar, (picture.width + line // 2, 3 * line // 2))
    draw = ImageDraw.Draw(wide)
    for label, top in zip(labels, (line // 4, picture.height - 5 * line // 4), strict=True):
        draw.text((picture.width + line // 2, top), label, fill="white", font=font)
    return wide


def file_name(text: str, length: int = 60) -> str:
    """`text` as part of a file name: letters, digits and dots, others as "_"."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.")[:length].rstrip("_.") or "_"


def _pair_groups(
    rows: datasets.Dataset, findings: Sequence[str] | None, limit: int | None, batch_size: int
) -> Iterator[list[GroundingPair]]:
    """The pairs to draw, `batch_size` images at a time; one without truth has a mask of no pixel."""
    if findings is None and limit is not None:
        yield example_pairs(rows, limit)
        return
    indices = rows_with_lesions(rows) if findings is None else range(len(rows))
    group, num_images = [], 0
    for index in indices:
        if rows[index]["image"] is None or (limit is not None and num_images == limit):
            continue
        num_images += 1
        pairs = row_pairs(rows, index)
        if findings is not None:
            known = {pair.finding: pair for pair in pairs}
            empty = np.zeros(image_size(rows[index]), dtype=bool)
            pairs = [known.get(finding) or GroundingPair(index, finding, empty) for finding in findings]
        group += pairs
        if num_images % batch_size == 0:
            yield group
            group = []
    if group:
        yield group


def save_overlays(
    model,
    processor,
    rows: datasets.Dataset,
    folder: str | os.PathLike,
    *,
    findings: Sequence[str] | None = None,
    limit: int | None = None,
    opacity: float = 0.6,
    colour_bar: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
) -> list[Path]:
    """Write `overlay`s of `rows` into `folder`, `<row>_<row_id>_<finding>.png` each, and return their paths.

    By default one for each finding of an image that has a mask or a box; with `limit` the first so many, of different
    findings while there are others. With `findings` (canonical) one for each of them and each image, at most `limit`
    images; what has no truth has no outline. Raises `ValueError` where there is nothing to draw.
    """
    folder, paths = Path(folder), []
    for pairs in _pair_groups(rows, findings, limit, batch_size):
        heatmaps = grounding_heatmaps(model, processor, rows, pairs, batch_size, num_workers)
        folder.mkdir(parents=True, exist_ok=True)
        for pair, heatmap in zip(pairs, heatmaps, strict=True):
            row = rows[pair.row]
            picture = overlay(row["image"], heatmap, pair.mask, opacity=opacity, colour_bar=colour_bar)
            paths.append(folder / f"{pair.row:05d}_{file_name(row['row_id'])}_{file_name(pair.finding)}.png")
            picture.save(paths[-1])
    if not paths:
        what = "an image" if findings is not None else "an image and a lesion mask or box"
        raise ValueError(f"None of {len(rows)} rows has {what}, so there is nothing to draw.")
    return paths

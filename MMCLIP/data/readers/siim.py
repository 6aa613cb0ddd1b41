"""SIIM-ACR Pneumothorax Segmentation 2019: `source_rows("siim", "/data/siim-acr-pneumothorax")`.

The folder holds `train-rle.csv` (stage 1) or `stage_2_train.csv`, and the DICOM files anywhere below it, named by
`ImageId`; or it is the PNG edition of Kaggle: `stage_1_train_images.csv`, `stage_1_test_images.csv`, `png_images`,
`png_masks`. That one's test images are "test"; otherwise there is no official split with labels (`split` is "":
preparation assigns one). No patient number was published, so each film counts as a patient. The published row-wise
splits leak and are not offered. All films are ChestX-ray14 films.
"""

import io
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..manifest import make_row
from .tables import Report, Unique, find_file, find_optional, raise_problem, read_table


IMAGE_SIDE = 1024


def siim_rows(folder: str | os.PathLike, *, report_problem: Report = raise_problem) -> Iterator[dict]:
    """Unpaired rows, one a film: pneumothorax present with its mask, or absent."""
    folder = Path(folder)
    table = find_optional(folder, "train-rle.csv", "stage_2_train.csv")
    if table is None:
        yield from _png_rows(folder, report_problem)
        return
    lines: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for where, record in read_table(table, ["ImageId", "EncodedPixels"], report_problem=report_problem):
        lines[record["ImageId"]].append((where, record["EncodedPixels"]))
    files = {path.stem: path for path in folder.rglob("*.dcm")}
    for name, codes in lines.items():
        where = codes[0][0]
        is_negative = [code == "-1" for _, code in codes]
        if any(is_negative) and len(codes) > 1:
            report_problem(where, f"{name!r} has a line that says `no pneumothorax` among {len(codes)}")
            continue
        masks = []
        if not any(is_negative):
            try:
                mask = decode_rle([code for _, code in codes], (IMAGE_SIDE, IMAGE_SIDE))
            except ValueError as error:
                report_problem(where, f"{name!r}: {error}")
                continue
            masks = [_mask(Image.fromarray(mask))]
        yield _row(name, files.get(name, folder / "dicom-images-train" / f"{name}.dcm"), masks)


def _row(name: str, file: Path, masks: list[dict], split: str = "") -> dict:
    return make_row(
        f"siim/{name}",
        file,
        source="siim",
        present=["pneumothorax"] if masks else [],
        absent=[] if masks else ["pneumothorax"],
        patient_id=name,
        split=split,
        masks=masks,
    )


def _mask(picture: Image.Image) -> dict:
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return {"finding": "pneumothorax", "side": "", "png": file.getvalue()}


def _png_rows(folder: Path, report_problem: Report) -> Iterator[dict]:
    unique = Unique()
    for part, split in (("train", ""), ("test", "test")):
        table = find_file(folder, f"stage_1_{part}_images.csv")
        for where, record in read_table(table, ["new_filename", "has_pneumo"], report_problem=report_problem):
            name = record["new_filename"]
            if unique.seen(name):
                report_problem(where, f"image {name!r} occurs twice")
                continue
            if record["has_pneumo"] not in ("0", "1"):
                report_problem(where, f"`has_pneumo` is {record['has_pneumo']!r}, expected 0 or 1")
                continue
            masks = []
            if record["has_pneumo"] == "1":
                try:
                    with Image.open(folder / "png_masks" / name) as picture:
                        masks = [_mask(picture.convert("L").point(lambda grey: 255 if grey else 0).convert("1"))]
                except OSError as error:
                    report_problem(where, f"the mask png_masks/{name} cannot be read: {error}")
                    continue
            yield _row(Path(name).stem, folder / "png_images" / name, masks, split)


def decode_rle(codes: Sequence[str], shape: tuple[int, int]) -> np.ndarray:
    """(height, width) bool, the union of run-length codes of this set: pairs of gap and length, down the columns.

    A gap counts from the end of the run before it. Raises ValueError for a code that is not pairs of whole numbers or
    that leaves the image.
    """
    height, width = shape
    mask = np.zeros(width * height, dtype=bool)
    for code in codes:
        try:
            numbers = np.array([int(number) for number in code.split()], dtype=np.int64)
        except (ValueError, OverflowError):
            raise ValueError(f"expected whole numbers in the run-length code, got {code[:40]!r}") from None
        if not len(numbers) or len(numbers) % 2 or (numbers < 0).any():
            raise ValueError(f"expected pairs of gap and length in the run-length code, got {len(numbers)} numbers")
        ends = numbers.cumsum()[1::2]
        if ends[-1] > mask.size:
            raise ValueError(f"the run-length code ends at pixel {ends[-1]}, the image has {mask.size}")
        for start, end in zip(ends - numbers[1::2], ends, strict=True):
            mask[start:end] = True
    return mask.reshape(width, height).T

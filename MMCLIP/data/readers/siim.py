"""SIIM-ACR Pneumothorax Segmentation 2019: `source_rows("siim", "/data/siim-acr-pneumothorax")`.

The folder holds `train-rle.csv` (stage 1) or `stage_2_train.csv`, and the DICOM files anywhere below it, named by
`ImageId`. There is no official split with labels (`split` is "": preparation assigns one) and no patient number: the
published row-wise splits leak and are not offered. All films are in ChestX-ray14 too.
"""

import io
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..manifest import make_row
from .tables import Report, find_file, raise_problem, read_table


IMAGE_SIDE = 1024


def siim_rows(folder: str | os.PathLike, *, report_problem: Report = raise_problem) -> Iterator[dict]:
    """Unpaired rows, one a film: pneumothorax present with its mask, or absent."""
    folder = Path(folder)
    table = find_file(folder, "train-rle.csv", "stage_2_train.csv")
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
        if not is_negative[0]:
            try:
                mask = decode_rle([code for _, code in codes], (IMAGE_SIDE, IMAGE_SIDE))
            except ValueError as error:
                report_problem(where, f"{name!r}: {error}")
                continue
            file = io.BytesIO()
            Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG", compress_level=1)
            masks.append({"finding": "pneumothorax", "side": "", "png": file.getvalue()})
        yield make_row(
            f"siim/{name}",
            files.get(name, folder / "dicom-images-train" / f"{name}.dcm"),
            source="siim",
            present=["pneumothorax"] if masks else [],
            absent=[] if masks else ["pneumothorax"],
            patient_id=name,
            masks=masks,
        )


def decode_rle(codes: Sequence[str], shape: tuple[int, int]) -> np.ndarray:
    """(height, width) bool, the union of run-length codes of this set: pairs of gap and length, down the columns.

    A gap counts from the end of the run before it. Raises ValueError for a code that is not pairs of whole numbers or
    that leaves the image.
    """
    height, width = shape
    mask = np.zeros(width * height, dtype=bool)
    for code in codes:
        try:
            numbers = np.array(code.split(), dtype=np.int64)
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

"""Made-up frontal chest radiographs with findings, lesion masks, labels and reports: runs need no download.

    python -m MMCLIP.data.phantom --num 24 --size 256 --output sheet.png

A phantom is drawn in millimetres of a patient who faces the viewer: x grows to the image's right, which is the
patient's left, y grows downwards. What weakens the beam is added up over the film, and a film curve turns the sum into
grey. Edges are smoothed over one pixel, so the same patient can be drawn at any size. Findings are drawn from what they
do to the film (fluid takes the place of air, a pneumothorax takes vessels away). Anatomy, lesions and exposure have a
random stream each, so that nothing but the finding tells of the finding.
"""

import argparse
import hashlib
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .manifest import FEATURES
from .phantom_chest import Chest, load_font
from .phantom_findings import FINDINGS, Finding, draw_findings, fill_in
from .phantom_report import write_report


@dataclass
class Phantom:
    """A radiograph `image` ((S, S) uint8) with all that is known of it.

    `masks` maps (finding, side) to (S, S) bool, True where the finding changes the film (cardiomegaly: the heart,
    emphysema: the lungs); `present` and `absent` together are FINDINGS; `report` names every present finding and some
    absent ones.
    """

    image: np.ndarray
    findings: tuple[Finding, ...]
    masks: dict[tuple[str, str], np.ndarray]
    report: str
    present: list[str]
    absent: list[str]


def make_phantom(seed: int, index: int, size: int = 128, findings: Sequence[Finding | str] | None = None) -> Phantom:
    """Draw phantom number `index` of stream `seed`, `size` pixels a side; the same arguments give the same bytes.

    `findings` forces what is drawn (names, or `Finding`s whose open fields are drawn at random); () is a normal chest.
    Another `size` shows the same patient. Raises ValueError for a negative seed or index, a size below 16, a finding
    that cannot be drawn.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be 0 or more, got seed={seed}, index={index}.")
    if size < 16:
        raise ValueError(f"A phantom of {size} px shows nothing; take a size of at least 16.")
    choice, anatomy, lesions, exposure, words = (np.random.default_rng([seed, index, stream]) for stream in range(5))
    drawn = draw_findings(choice)
    complete = fill_in(drawn if findings is None else findings, choice)
    chest = Chest(size, complete, anatomy, lesions, exposure)
    chest.add_findings()
    image = chest.expose()
    present = sorted(item.name for item in complete)
    absent = [name for name in FINDINGS if name not in present]
    return Phantom(image, complete, chest.masks, write_report(complete, words), present, absent)


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def phantom_row(index: int, *, size: int = 128, seed: int = 0, split: str = "train", has_report: bool = True) -> dict:
    """Row number `index` of `phantom_dataset` with these arguments, drawn now."""
    stream = zlib.crc32(split.encode()) << 32  # splits draw from far-apart indices of one seed
    phantom = make_phantom(seed, stream + index, size)
    name = phantom_name(index, seed=seed, split=split)
    return {
        "row_id": name,
        "image": {"path": None, "bytes": _png(phantom.image)},
        "report": phantom.report if has_report else None,
        "present": phantom.present,
        "absent": phantom.absent,
        "uncertain": [],
        "patient_id": name,
        "study_id": "",
        "view": "PA",
        "split": split,
        "source": "phantom",
        "masks": [
            {"finding": finding, "side": side, "png": _png(mask)} for (finding, side), mask in phantom.masks.items()
        ],
        "boxes": [],
    }


def phantom_name(index: int, *, seed: int, split: str) -> str:
    """`row_id` and `patient_id` of that row."""
    return f"phantom-{seed}-{split}-{index:06d}"


def _rows(chunks: list[tuple[int, int]], size: int, seed: int, split: str, num_paired: int, code: str):
    for start, stop in chunks:
        for index in range(start, stop):
            yield phantom_row(index, size=size, seed=seed, split=split, has_report=index < num_paired)


def phantom_dataset(
    num_images: int,
    *,
    size: int = 128,
    seed: int = 0,
    split: str = "train",
    num_unpaired: int = 0,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Manifest rows of `num_images` phantoms, each a patient of its own; the last `num_unpaired` have no report.

    All rows have complete labels. Splits of one seed are disjoint; the first rows do not depend on how many follow.
    `datasets` caches the result under these arguments and the content of `phantom*.py`. `num_proc` processes draw.
    Raises ValueError when `num_images` is below 1 or `num_unpaired` not in [0, num_images].
    """
    if num_images < 1 or not 0 <= num_unpaired <= num_images:
        raise ValueError(
            f"num_images must be at least 1 and num_unpaired in [0, num_images], "
            f"got num_images={num_images}, num_unpaired={num_unpaired}."
        )
    chunks = [(start, min(start + 100, num_images)) for start in range(0, num_images, 100)]
    return datasets.Dataset.from_generator(
        _rows,
        features=FEATURES,
        gen_kwargs={
            "chunks": chunks,
            "size": size,
            "seed": seed,
            "split": split,
            "num_paired": num_images - num_unpaired,
            "code": _code_hash(),
        },
        num_proc=min(num_proc, len(chunks)) if num_proc else None,
    )


def _code_hash() -> str:
    files = sorted(Path(__file__).parent.glob("phantom*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def contact_sheet(phantoms: Sequence[Phantom], path: str | Path, columns: int = 6, outline_masks: bool = False) -> None:
    """Save the phantoms side by side as a picture, each with its findings below; masks as outlines when asked for."""
    if not phantoms:
        raise ValueError("contact_sheet needs at least one phantom.")
    size = max(phantom.image.shape[0] for phantom in phantoms)
    font_size = max(9, size // 18)
    line = font_size + 2
    height = size + 4 * line + 4
    sheet = Image.new("RGB", (columns * (size + 4), -(-len(phantoms) // columns) * height), "white")
    for number, phantom in enumerate(phantoms):
        x, y = number % columns * (size + 4), number // columns * height
        picture = np.repeat(phantom.image[..., None], 3, axis=2)
        if outline_masks:
            for mask in phantom.masks.values():
                picture[mask & ~ndimage.binary_erosion(mask)] = (255, 80, 0)
        sheet.paste(Image.fromarray(picture), (x, y))
        for place, item in enumerate(phantom.findings or (Finding("normal", ""),)):
            words = " ".join(word for word in (item.severity, item.side, item.zone, item.name) if word)
            caption = Image.new("RGB", (size, line), "white")  # cuts off what is wider than the film
            ImageDraw.Draw(caption).text((2, 0), words, fill="black", font=load_font(font_size))
            sheet.paste(caption, (x, y + size + 2 + place * line))
    sheet.save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m MMCLIP.data.phantom", description="Draw a contact sheet of phantoms.")
    parser.add_argument("--num", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--findings", help="comma-separated findings that each phantom shall have; default: at random")
    parser.add_argument("--masks", action="store_true", help="outline the lesion masks")
    parser.add_argument("--output", default="sheet.png")
    args = parser.parse_args(arguments)
    forced = None if args.findings is None else [name.strip() for name in args.findings.split(",") if name.strip()]
    phantoms = [make_phantom(args.seed, index, args.size, forced) for index in range(args.num)]
    contact_sheet(phantoms, args.output, args.columns, args.masks)
    print(f"{args.output}: {args.num} phantoms, {args.size} px")


if __name__ == "__main__":
    main()

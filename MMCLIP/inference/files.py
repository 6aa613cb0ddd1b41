"""Files and folders of X-rays -> what the image tower makes of them, a batch at a time; a bad file stops nobody."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..data.plausibility import xray_likeness
from ..image_processing_mmclip import load_grayscale, load_unrounded
from .reading import Film, encode_pixels


# what is looked for in folders; other names count where the content begins as a DICOM file does
SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".pgm")
Problem = Callable[[str, str], None]  # is told (path, reason)


def find_images(sources: Iterable[str | os.PathLike], report_problem: Problem) -> list[str]:
    """The image files of `sources` in order: files as they are, folders searched to the bottom and sorted; each once.

    In folders, hidden files and DICOMDIR are passed over, as is what is neither an image by its name nor DICOM by its
    content; links to other folders are followed, each folder once. What does not exist, cannot be opened, or is a
    folder without an image goes to `report_problem`.
    """
    found: dict[str, None] = {}
    for source in map(Path, sources):
        if source.is_dir():
            refused: list[str] = []
            inside = _images_below(source, lambda error, refused=refused: refused.append(str(error.filename)))
            if not inside:
                report_problem(str(source), f"no image below this folder ({', '.join(SUFFIXES)}, or DICOM)")
            for folder in refused:
                report_problem(folder, "this folder cannot be opened")
            found |= dict.fromkeys(inside)
        elif source.exists():
            found[str(source)] = None
        else:
            report_problem(str(source), "there is no such file or folder")
    return list(found)


def _images_below(folder: Path, on_error: Callable[[OSError], None]) -> list[str]:
    paths, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=on_error, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen]
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or name == "DICOMDIR":
                continue
            if path.suffix.lower() in SUFFIXES or _begins_as_dicom(path):
                paths.append(str(path))
    return paths


def _begins_as_dicom(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def shown_path(path: str) -> str:
    r"""`path` as tables can hold it: a byte of its name that is no UTF-8, as old exports have, becomes `\xff`."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def read_films(
    model,
    processor,
    paths: Sequence[str],
    report_problem: Problem,
    *,
    batch_size: int = 16,
    num_threads: int = 4,
    with_pictures: bool = False,
) -> Iterator[Film]:
    """A `Film` for each of `paths` that can be read, in their order; the others go to `report_problem`.

    Files are read ahead on `num_threads` threads while the model encodes `batch_size` of them at once. `picture` is
    the grey image at its own size `with_pictures`, else None. The model stays in the mode it was in.
    """

    def read(path: str):
        gray = load_unrounded(path)  # once, as decoding takes longest
        # levels in [0, 1] would be taken for shares of white
        source = path if gray.mode == "F" and gray.getextrema()[1] <= 1 else gray
        pixel_values = processor.image_processor([source], return_tensors="pt")["pixel_values"]
        return pixel_values, xray_likeness(path, gray), load_grayscale(gray) if with_pictures else None

    with ThreadPoolExecutor(max(num_threads, 1)) as pool:
        waiting: list[tuple[str, Future]] = []
        starts = range(0, len(paths), batch_size)
        parts = [paths[start : start + batch_size] for start in starts]
        for part in [*parts, []]:
            batch = waiting
            waiting = [(path, pool.submit(read, path)) for path in part]
            yield from _encode(model, batch, report_problem)


def _encode(model, batch: list[tuple[str, Future]], report_problem: Problem) -> Iterator[Film]:
    read = []
    for path, future in batch:
        try:
            read.append((path, *future.result()))
        except (ValueError, ImportError, OSError) as error:
            report_problem(path, str(error).removeprefix(f"{path}: "))
    if not read:
        return
    paths, pixel_values, likenesses, pictures = zip(*read, strict=True)
    embeds, patch_tokens = encode_pixels(model, torch.cat(pixel_values))
    for number, path in enumerate(paths):
        if not embeds[number].isfinite().all():
            report_problem(path, "the model gives NaN or infinity for it; look for diverged weights")
            continue
        picture, one = pictures[number], slice(number, number + 1)
        size = picture.size if picture is not None else (0, 0)
        yield Film(shown_path(path), size, picture, embeds[one], patch_tokens[one], likenesses[number])

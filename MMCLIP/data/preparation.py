"""From many sources to one sharded Parquet data set: images decoded and shrunk once, entities found once.

The work is cut into chunks of a source's rows, in an order that is fixed by the index written first. A chunk becomes
one shard for each split it has rows of, then a small JSON file that says it is done; each file is written under another
name and renamed. So a run that is killed goes on where it was, and nothing is lost or doubled.
"""

import csv
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from ..image_processing_mmclip import load_shrunk
from ..text.entities import LexiconRecognizer
from .manifest import FEATURES, rows_to_dataset
from .prepared import INFO_FILE, PREPARED_FEATURES, SPLITS
from .readers import LEFT_OUT, SOURCES, read_csv_manifest, source_rows
from .readers.overlaps import known_overlaps
from .readers.tables import hashed_share
from .summary import write_contact_sheets, write_summary


logger = logging.getLogger(__name__)
WORK = "work"  # the index, and what is known of each chunk
TABLES = ("metadata", "manifest")
FRONTAL = ("PA", "AP", "")  # a view that is not known may be frontal
MIN_BAD = 3  # a few bad files in a small source are no reason to fail


@dataclass(frozen=True)
class PreparationOptions:
    """What the prepared rows depend on; a run into a folder that was begun with others is refused.

    shorter_side: pixels of the stored images, which are never enlarged; image_format: "jpeg" (with `quality`) or "png";
    views: "frontal" leaves out rows whose view is known to be another, "all" keeps them; val_share, test_share: of the
    patients of a source that has no split; seed: of that draw; rows_per_shard: rows of one chunk.
    """

    shorter_side: int = 256
    image_format: str = "jpeg"
    quality: int = 95
    views: str = "frontal"
    val_share: float = 0.05
    test_share: float = 0.0
    seed: int = 0
    rows_per_shard: int = 500

    def __post_init__(self):
        for name, allowed in (("image_format", ("jpeg", "png")), ("views", ("frontal", "all"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
        if self.shorter_side < 1 or self.rows_per_shard < 1 or not 1 <= self.quality <= 100:
            raise ValueError("shorter_side and rows_per_shard must be positive, quality between 1 and 100.")
        if min(self.val_share, self.test_share) < 0 or self.val_share + self.test_share >= 1:
            raise ValueError("val_share and test_share must not be negative, and leave something to train on.")


def prepare(
    sources: dict[str, str],
    output_dir: str | os.PathLike,
    options: PreparationOptions | None = None,
    *,
    source_options: dict[str, dict[str, str]] | None = None,
    num_proc: int | None = None,
    max_bad_share: float = 0.01,
    duplicates: str = "error",
) -> Path:
    """Prepare `sources` (name -> folder, table, or number of phantoms) into `output_dir`; returns its summary.

    Writes `SPLIT/NAME-NUMBER.parquet`, `quarantine.csv`, `summary.md`, `sheet-NAME.png` and, at the very end,
    `preparation.json`. Raises ValueError, after all that but the last is written, when of a source more than
    `max_bad_share` (and more than a few files) could not be used, when a patient is in two splits, or when the same
    picture is: `duplicates="drop"` then keeps the copy in test before val before train and quarantines the others.
    """
    options = options or PreparationOptions()
    if duplicates not in ("error", "drop"):
        raise ValueError(f"duplicates is {duplicates!r}, expected 'error' or 'drop'.")
    if not sources:
        raise ValueError("Nothing to prepare: give at least one source.")
    output_dir = Path(output_dir)
    work = output_dir / WORK
    work.mkdir(parents=True, exist_ok=True)
    (output_dir / INFO_FILE).unlink(missing_ok=True)  # until the end, the folder is not to be trained on
    _same_options(work / "options.json", sources, source_options or {}, options)

    for name, place in sources.items():
        _write_index(work, name, place, (source_options or {}).get(name, {}), options)
    start = time.time()
    num_images = _run_chunks(output_dir, sources, options, num_proc or os.cpu_count() or 1)
    seconds = time.time() - start
    splits = {name: _splits_of(output_dir, name) for name in sources}
    for sentence in known_overlaps(
        [name for name, found in splits.items() if "train" in found],
        [name for name, found in splits.items() if found & {"val", "test"}],
    ):
        logger.warning(sentence)

    problems = _separate_splits(output_dir, sources, duplicates)
    quarantined = _write_quarantine(output_dir, sources)
    write_summary(output_dir, sources, options, quarantined, _left_out(work, sources), num_images, seconds)
    write_contact_sheets(output_dir, sources)
    for name, (bad, total) in quarantined.items():
        if bad > max(MIN_BAD, max_bad_share * total):
            problems.append(f"of {name}, {bad} of {total} rows could not be used (at most {max_bad_share:.1%} may)")
    if problems:
        raise ValueError(
            f"{output_dir} is not fit for training: {'; '.join(problems)}. Look into quarantine.csv, mend the source "
            "or raise max_bad_share, and run again; what is done is kept."
        )
    info = {
        "options": dataclasses.asdict(options),
        "sources": list(sources),
        "entities": LexiconRecognizer().fingerprint,
    }
    _write_atomically(output_dir / INFO_FILE, json.dumps(info, indent=2).encode())
    return output_dir / "summary.md"


# -------------------------------------------------------------------------------------------------------------- index


def _same_options(path: Path, sources, source_options, options: PreparationOptions) -> None:
    asked = {"sources": sources, "source_options": source_options, **dataclasses.asdict(options)}
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in asked if asked[key] != begun.get(key))
        if different:
            changes = "; ".join(f"{key} was {begun.get(key)!r}, is {asked[key]!r}" for key in different)
            raise ValueError(
                f"{path.parent.parent} was begun with other options: {changes}. Take them back, or another folder."
            )
    else:
        _write_atomically(path, json.dumps(asked, indent=2).encode())


def _write_index(work: Path, name: str, place: str, given: dict[str, str], options: PreparationOptions) -> None:
    """The rows of one source, in the order of its reader, with a split each; what cannot be used goes beside it."""
    folder = work / name
    if (folder / "index.parquet").is_file():
        return
    folder.mkdir(exist_ok=True)
    bad: list[tuple[str, str]] = []
    left_out = Counter()

    def kept() -> Iterator[dict]:
        ids: set[str] = set()
        for row in _source(name, place, given, options, lambda where, reason: bad.append((where, reason))):
            if row["row_id"] in ids:
                bad.append((row["row_id"], "this row_id occurs twice"))
                continue
            ids.add(row["row_id"])
            if options.views == "frontal" and row["view"].split(" ")[0] not in FRONTAL:
                left_out[f"view {row['view']}"] += 1
                continue
            row["source"] = row["source"] or name
            row["split"] = _split(row, options)
            yield row

    rows = rows_to_dataset(kept())
    if not len(rows):
        reason = f"the first problem is {bad[0][0]}: {bad[0][1]}" if bad else "the source is empty"
        raise ValueError(f"{name}={place}: no row is left to prepare; {reason}.")
    _write_atomically(folder / "problems.json", json.dumps({"bad": bad, "left_out": left_out}).encode())
    sink = folder / f"index.{os.getpid()}.tmp"
    with pq.ParquetWriter(sink, FEATURES.arrow_schema) as writer:
        for batch in rows.with_format("arrow").iter(batch_size=options.rows_per_shard):
            writer.write_table(batch, row_group_size=options.rows_per_shard)  # a row group is a chunk
    os.replace(sink, folder / "index.parquet")


def _source(name: str, place: str, given: dict[str, str], options: PreparationOptions, report) -> Iterator[dict]:
    if name in SOURCES:
        yield from source_rows(name, place, report_problem=report, **given)
    elif name == "phantom":
        yield from _phantoms(place, given)
    else:
        table = _table_of(name, place)
        arguments = _typed(read_csv_manifest, given, name, skip=("path", "split", "report_problem"))
        yield from read_csv_manifest(table, report_problem=report, **arguments)


def _phantoms(number: str, given: dict[str, str]) -> Iterator[dict]:
    from .phantom import phantom_dataset

    if not str(number).isdigit():
        raise ValueError(f"phantom={number}: expected the number of made-up radiographs.")
    arguments = _typed(phantom_dataset, given, "phantom", skip=("num_images", "split", "num_proc"))
    for row in phantom_dataset(int(number), **arguments):
        yield {**row, "split": ""}  # they are all of one stream, so they are shared out here


def _table_of(name: str, place: str) -> Path:
    path = Path(place)
    if path.is_file():
        return path
    for stem, ending in itertools.product(TABLES, (".csv", ".tsv", ".jsonl", ".parquet")):
        if (path / f"{stem}{ending}").is_file():
            return path / f"{stem}{ending}"
    raise ValueError(
        f"{name}={place}: {name!r} is no public data set known here ({', '.join(SOURCES)}), and there is neither a "
        f"table of that name nor a folder with {' or '.join(f'{stem}.csv' for stem in TABLES)}."
    )


def _typed(function, given: dict[str, str], name: str, skip: tuple[str, ...]) -> dict:
    """Options as text to the types of the function's defaults; a list is written with commas."""
    known = {key: item.default for key, item in inspect.signature(function).parameters.items() if key not in skip}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{name} knows no option {', '.join(unknown)}; its options are {', '.join(known)}.")
    return {key: convert(value, known[key], f"{name}.{key}") for key, value in given.items()}


def convert(text: str, default, where: str):
    """A text to the type of `default`. Raises ValueError naming `where`."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} is {text!r}, expected true or false.")
        return text.lower() == "true"
    if isinstance(default, (list, tuple)):
        return tuple(part for part in text.split(",") if part)
    try:
        return text if default is None else type(default)(text)
    except ValueError as error:
        raise ValueError(f"{where} is {text!r}, expected {type(default).__name__}.") from error


def _split(row: dict, options: PreparationOptions) -> str:
    if row["split"]:
        if row["split"] not in SPLITS:
            raise ValueError(
                f"row {row['row_id']!r} has the split {row['split']!r}, expected {', '.join(SPLITS)} or ''."
            )
        return row["split"]
    share = hashed_share(str(options.seed), row["source"], row["patient_id"] or row["row_id"])
    if share < options.test_share:
        return "test"
    return "val" if share < options.test_share + options.val_share else "train"


# ------------------------------------------------------------------------------------------------------------- chunks


def _run_chunks(output_dir: Path, sources, options: PreparationOptions, num_proc: int) -> int:
    """Prepare every chunk that is not done, on `num_proc` processes; returns how many rows that were."""
    tasks, done, total = [], 0, 0
    for name in sources:
        index = pq.ParquetFile(output_dir / WORK / name / "index.parquet")
        for number in range(index.num_row_groups):
            num_rows = index.metadata.row_group(number).num_rows
            total += num_rows
            if _marker(output_dir, name, number).is_file():
                done += num_rows
            else:
                tasks.append((output_dir, name, number, options))
    with tqdm(total=total, initial=done, unit="img", desc="preparing", smoothing=0.05) as bar:
        if num_proc == 1 or len(tasks) <= 1:
            for task in tasks:
                bar.update(_prepare_chunk(*task))
        elif tasks:
            _run_in_processes(tasks, min(num_proc, len(tasks)), bar)
    return total - done


def _run_in_processes(tasks: list[tuple], num_proc: int, bar) -> None:
    context = get_context("spawn")  # a fork would copy the threads of torch
    waiting = iter(tasks)
    with ProcessPoolExecutor(num_proc, context, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        running = {pool.submit(_prepare_chunk, *task): task for task in itertools.islice(waiting, 2 * num_proc)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    bar.update(future.result())
                except BrokenProcessPool as error:
                    names = ", ".join(f"{name} {number}" for _, name, number, _ in [task, *running.values()])
                    raise RuntimeError(
                        f"A worker process died (out of memory, or a decoder that crashed) in one of the chunks {names}."
                        " Run again: what is done is kept. If it dies again, run with --num_proc 1: the file it stops "
                        "at is the one to take out."
                    ) from error
                if (task := next(waiting, None)) is not None:
                    running[pool.submit(_prepare_chunk, *task)] = task


def _start_worker(parent: int) -> None:
    """End with the parent: one that was killed cannot stop its workers."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _marker(output_dir: Path, name: str, number: int) -> Path:
    return output_dir / WORK / name / f"chunk-{number:05d}.json"


def shard_name(name: str, number: int) -> str:
    return f"{name}-{number:05d}.parquet"


def _prepare_chunk(output_dir: Path, name: str, number: int, options: PreparationOptions) -> int:
    """One chunk of an index to its shards and its marker; returns its number of rows."""
    table = pq.ParquetFile(output_dir / WORK / name / "index.parquet").read_row_group(number)
    recognizer = LexiconRecognizer()
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    bad = []
    for row in table.to_pylist():
        try:
            rows[row["split"]].append(_prepare_row(row, recognizer, options))
        except ValueError as error:
            bad.append((row["row_id"], str(error)))
    for split, prepared in rows.items():
        if prepared:
            write_shard(
                output_dir / split / shard_name(name, number),
                pa.Table.from_pylist(prepared, schema=PREPARED_FEATURES.arrow_schema),
            )
    _write_atomically(_marker(output_dir, name, number), json.dumps({"rows": table.num_rows, "bad": bad}).encode())
    return table.num_rows


def _prepare_row(row: dict, recognizer: LexiconRecognizer, options: PreparationOptions) -> dict:
    row["entities"] = [entity._asdict() for entity in recognizer(row["report"])] if row["report"] else []
    if row["image"] is None:
        return {**row, "original_width": None, "original_height": None, "pixel_hash": ""}
    stored = row["image"]["bytes"] if row["image"]["bytes"] is not None else row["image"]["path"]
    picture, (width, height) = load_shrunk(stored, options.shorter_side)
    factors = picture.width / width, picture.height / height
    return {
        **row,
        "image": {"path": None, "bytes": _encode(picture, options)},
        "original_width": width,
        "original_height": height,
        "pixel_hash": hashlib.blake2b(picture.tobytes() + str(picture.size).encode(), digest_size=16).hexdigest(),
        "masks": [{**mask, "png": _shrink_mask(mask["png"], picture.size)} for mask in row["masks"]],
        "boxes": [_scale_box(box, *factors) for box in row["boxes"]],
    }


def _encode(picture: Image.Image, options: PreparationOptions) -> bytes:
    file = io.BytesIO()
    if options.image_format == "jpeg":
        picture.save(file, "JPEG", quality=options.quality)
    else:
        picture.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _shrink_mask(png: bytes, size: tuple[int, int]) -> bytes:
    mask = Image.open(io.BytesIO(png))
    if mask.size == size:
        return png
    file = io.BytesIO()
    mask.convert("L").resize(size, Image.Resampling.NEAREST).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _scale_box(box: dict, horizontal: float, vertical: float) -> dict:
    return {
        "finding": box["finding"],
        "x": box["x"] * horizontal,
        "y": box["y"] * vertical,
        "width": box["width"] * horizontal,
        "height": box["height"] * vertical,
    }


def write_shard(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    # pictures are compressed already; small row groups let a stream begin before a shard is read
    pq.write_table(table, temporary, row_group_size=100, compression="zstd", compression_level=1)
    os.replace(temporary, path)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------- checks


def _splits_of(output_dir: Path, name: str) -> set[str]:
    return {split for split in SPLITS if any((output_dir / split).glob(f"{name}-[0-9]*.parquet"))}


def _separate_splits(output_dir: Path, sources, duplicates: str) -> list[str]:
    """No patient of one source, and no picture, in two splits; returns what is wrong."""
    patients: dict[tuple[str, str], str] = {}
    pictures: dict[str, tuple[str, str]] = {}  # pixel hash -> split and row that keep it
    shared_patients, copies = 0, {}
    for split in reversed(SPLITS):  # test keeps its pictures before val, val before train
        for name in sources:
            for path in sorted((output_dir / split).glob(f"{name}-[0-9]*.parquet")):
                columns = pq.read_table(path, columns=["row_id", "source", "patient_id", "pixel_hash"])
                for row in columns.to_pylist():
                    if row["patient_id"]:
                        shared_patients += patients.setdefault((row["source"], row["patient_id"]), split) != split
                    if row["pixel_hash"]:
                        kept_in, kept = pictures.setdefault(row["pixel_hash"], (split, row["row_id"]))
                        if kept_in != split:
                            copies.setdefault(path, {})[row["row_id"]] = (
                                f"{LEFT_OUT}the same picture as {kept} of split {kept_in}"
                            )
    problems = []
    if shared_patients:
        problems.append(f"{shared_patients} rows are of patients who are in two splits")
    num_copies = sum(map(len, copies.values()))
    if num_copies and duplicates == "error":
        path, found = next(iter(copies.items()))
        row, reason = next(iter(found.items()))
        problems.append(
            f"{num_copies} pictures are in two splits, for example {row!r} in {path.parent.name}, {reason} "
            '(duplicates="drop" takes them out)'
        )
    elif num_copies:
        for path, found in copies.items():
            _drop_rows(output_dir, path, found)
    return problems


def _drop_rows(output_dir: Path, path: Path, reasons: dict[str, str]) -> None:
    """Take rows out of a shard; first they are noted at their chunk, so that a killed run knows of them."""
    name, number = path.stem.rsplit("-", 1)
    marker = _marker(output_dir, name, int(number))
    noted = json.loads(marker.read_text(encoding="utf-8"))
    noted["bad"] += [item for item in reasons.items() if list(item) not in noted["bad"]]
    _write_atomically(marker, json.dumps(noted).encode())
    table = pq.read_table(path)
    keep = pa.array([row_id not in reasons for row_id in table["row_id"].to_pylist()])
    table = table.filter(keep)
    if table.num_rows:
        write_shard(path, table)
    else:
        path.unlink()


def _notes(output_dir: Path, name: str) -> Iterator[dict]:
    for marker in sorted((output_dir / WORK / name).glob("chunk-*.json")):
        yield json.loads(marker.read_text(encoding="utf-8"))


def _write_quarantine(output_dir: Path, sources) -> dict[str, tuple[int, int]]:
    """`quarantine.csv` of all that could not be used; returns source -> (how many, of how many).

    Rows that a reader left out on purpose are listed, and not counted.
    """
    counts = {}
    temporary = output_dir / "quarantine.tmp"
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "where", "reason"])
        for name in sources:
            problems = json.loads((output_dir / WORK / name / "problems.json").read_text(encoding="utf-8"))
            notes = list(_notes(output_dir, name))
            bad = problems["bad"] + [item for note in notes for item in note["bad"]]
            writer.writerows([name, where, reason] for where, reason in bad)
            total = len(problems["bad"]) + sum(note["rows"] for note in notes)
            counts[name] = (sum(not reason.startswith(LEFT_OUT) for _, reason in bad), total)
    os.replace(temporary, output_dir / "quarantine.csv")
    return counts


def _left_out(work: Path, sources) -> dict[str, dict[str, int]]:
    return {
        name: json.loads((work / name / "problems.json").read_text(encoding="utf-8"))["left_out"] for name in sources
    }

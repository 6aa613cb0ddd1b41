"""From many sources to one sharded Parquet data set: images decoded and shrunk once, entities found once.

The work is cut into chunks of a source's rows, in an order that is fixed by the index written first. A chunk becomes
one shard for each split it has rows of, then a small JSON file that says it is done; each file is written under another
name and renamed. So a run that is killed goes on where it was, and nothing is lost or doubled.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from ..image_processing_mmclip import load_shrunk
from ..text.entities import Recognizer, load_recognizer, parse_labels
from .indexing import (
    INDEX_FILE,
    PHANTOM,
    PROBLEMS_FILE,
    PreparationOptions,
    check_indexes,
    drawer,
    is_left_out,
    write_index,
)
from .prepared import INFO_FILE, PREPARED_FEATURES, SPLITS, shards
from .readers import LEFT_OUT
from .readers.overlaps import known_overlaps
from .summary import SourceCounts, write_contact_sheets, write_summary


logger = logging.getLogger(__name__)
WORK = ".work"  # the index, and what is known of each chunk; `datasets` looks into no folder with a dot
QUARANTINE_FILE = "quarantine.csv"


def prepare(
    sources: dict[str, str],
    output_dir: str | os.PathLike,
    options: PreparationOptions | None = None,
    *,
    source_options: dict[str, dict[str, str]] | None = None,
    num_proc: int | None = None,
    max_bad_share: float = 0.01,
    duplicates: str = "error",
    retry_bad: bool = False,
) -> Path:
    """Prepare `sources` (name -> folder, table, or number of phantoms) into `output_dir`; returns its summary.

    Writes `SPLIT/NAME-NUMBER.parquet`, `quarantine.csv`, `summary.md`, `sheet-NAME.png` and, at the very end,
    `preparation.json`; `num_proc` processes work at it, one a core when None. They are spawned, so that a script must
    call this under `if __name__ == "__main__"`. A run into a folder that was begun goes on; `retry_bad` then also does
    those chunks again in which a row could not be used.

    Raises ValueError when a patient is in two splits, when of a source more than `max_bad_share` cannot be used (after
    the index, for what its table says, and at the end), and when the same picture is in two splits:
    `duplicates="drop"` keeps the copy in test before val before train instead, and quarantines the others.
    """
    options, source_options = options or PreparationOptions(), source_options or {}
    if duplicates not in ("error", "drop"):
        raise ValueError(f"duplicates is {duplicates!r}, expected 'error' or 'drop'.")
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share is {max_bad_share}, expected a share in [0, 1].")
    if not sources:
        raise ValueError("Nothing to prepare: give at least one source.")
    for name in sources:
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
            raise ValueError(f"The name {name!r} of a source is part of file names; use letters, digits, - _ and dots.")
    # a run that goes on may be started in another folder
    sources = {name: place if name == PHANTOM else os.path.abspath(place) for name, place in sources.items()}
    output_dir = Path(output_dir)
    work = output_dir / WORK
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work / "lock"):
        recognizer = _recognizer(options)
        _same_options(work / "options.json", sources, source_options, options, recognizer.fingerprint)
        (output_dir / INFO_FILE).unlink(missing_ok=True)  # until the end, the folder is not to be trained on
        for left_behind in output_dir.rglob("*.tmp"):
            left_behind.unlink()
        warnings = _index(output_dir, sources, source_options, options, max_bad_share)

        start = time.time()
        num_rows = _run_chunks(output_dir, sources, source_options, options, num_proc or os.cpu_count() or 1, retry_bad)
        seconds = time.time() - start
        problems = _separate_pictures(output_dir, sources, duplicates)
        counts = _write_quarantine(output_dir, sources)
        write_summary(output_dir, options, counts, warnings, num_rows, seconds)
        write_contact_sheets(output_dir, sources)
        problems += _too_many_bad({name: (found.bad, found.good) for name, found in counts.items()}, max_bad_share)
        if problems:
            raise ValueError(
                f"{output_dir} is not fit for training: {'; '.join(problems)}. {QUARANTINE_FILE} has the reasons. What "
                "is done is kept: raise max_bad_share, or mend the files and run again with retry_bad. For a table "
                "that you mend, take a new folder."
            )
        info = {
            "options": dataclasses.asdict(options),
            "sources": list(sources),
            "entities": recognizer.fingerprint,
        }
        _write_atomically(output_dir / INFO_FILE, json.dumps(info, indent=2).encode())
    return output_dir / "summary.md"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No second run in this folder; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path.parent.parent}: another run is preparing this folder; wait for its end.") from None
        except OSError:
            pass  # a file system without locks
        yield


# -------------------------------------------------------------------------------------------------------------- index


def _same_options(path: Path, sources, source_options, options: PreparationOptions, fingerprint: str) -> None:
    asked = {
        "sources": sources,
        "source_options": source_options,
        **dataclasses.asdict(options),
        "entities": fingerprint,
    }
    if path.is_file() and any(path.parent.glob(f"*/{INDEX_FILE}")):  # else nothing was begun but a mistake
        begun = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in asked if asked[key] != begun.get(key))
        if different:
            changes = "; ".join(f"{key} was {begun.get(key)!r}, is {asked[key]!r}" for key in different)
            raise ValueError(
                f"{path.parent.parent} was begun with other options: {changes}. Take them back, or another folder."
            )
    else:
        _write_atomically(path, json.dumps(asked, indent=2).encode())


def _index(output_dir: Path, sources, source_options, options: PreparationOptions, max_bad_share: float) -> list[str]:
    """Write the indexes that are not there and check all of them; returns warnings."""
    folders = {name: output_dir / WORK / name for name in sources}
    for name, place in sources.items():
        if not (folders[name] / INDEX_FILE).is_file():
            write_index(folders[name], name, place, source_options.get(name), options)
    try:
        sources_of = check_indexes(folders)
        in_tables = {
            name: (_num_bad(_in_table(folder)["bad"]), _num_indexed(folder)) for name, folder in folders.items()
        }
        if problems := _too_many_bad(in_tables, max_bad_share):
            _write_quarantine(output_dir, sources)
            raise ValueError(
                f"{'; '.join(problems)}. {output_dir / QUARANTINE_FILE} has the reasons. Mend the table, or raise "
                "max_bad_share."
            )
    except ValueError:
        for folder in folders.values():  # so that a mended table is read again, unless work was built on this one
            if not any(folder.glob("chunk-*.json")):
                (folder / INDEX_FILE).unlink()
        raise
    warnings = known_overlaps(sources_of["train"], sorted(sources_of["val"] | sources_of["test"]))
    for sentence in warnings:
        logger.warning(sentence)
    return warnings


# ------------------------------------------------------------------------------------------------------------- chunks


def _run_chunks(output_dir: Path, sources, source_options, options: PreparationOptions, num_proc: int, retry: bool):
    """Prepare every chunk that is not done, on `num_proc` processes; returns how many rows that were."""
    tasks, done, total = [], 0, 0
    for name, place in sources.items():
        draw = drawer(name, place, source_options.get(name, {}))
        index = pq.ParquetFile(output_dir / WORK / name / INDEX_FILE).metadata
        for number in range(index.num_row_groups):
            num_rows = index.row_group(number).num_rows
            total += num_rows
            if _is_done(_marker(output_dir, name, number), retry):
                done += num_rows
            else:
                tasks.append((output_dir, name, number, options, draw))
    with tqdm(total=total, initial=done, unit="img", desc="preparing", smoothing=0.05) as bar:
        if num_proc == 1 or len(tasks) <= 1:
            for task in tasks:
                bar.update(_prepare_chunk(*task))
        else:
            _run_in_processes(tasks, min(num_proc, len(tasks)), bar)
    return total - done


def _is_done(marker: Path, retry: bool) -> bool:
    return marker.is_file() and not (retry and _num_bad(_noted(marker)["bad"]))


def _run_in_processes(tasks: list[tuple], num_proc: int, bar) -> None:
    context = get_context("spawn")  # a fork would copy the threads of torch
    stop = context.Event()
    waiting = iter(tasks)
    with ProcessPoolExecutor(num_proc, context, initializer=_start_worker, initargs=(os.getpid(), stop)) as pool:
        running = {pool.submit(_prepare_chunk, *task): task for task in itertools.islice(waiting, 2 * num_proc)}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    bar.update(future.result())
                    if (following := next(waiting, None)) is not None:
                        running[pool.submit(_prepare_chunk, *following)] = following
        except BrokenProcessPool as error:
            notes = [_at_work(output_dir, name, number) for output_dir, name, number, *_ in [task, *running.values()]]
            rows = ", ".join(note.read_text(encoding="utf-8") for note in notes if note.is_file())
            raise RuntimeError(
                f"A worker process died (out of memory, or a decoder that crashed) at one of the rows {rows}. Run "
                "again: what is done is kept. If it dies again, take out the row that is named both times."
            ) from error
        except BaseException:  # an error in one chunk, or Ctrl-C: the others need not come to their end
            pool.shutdown(wait=False, cancel_futures=True)
            stop.set()
            raise


def _start_worker(parent: int, stop) -> None:
    """End when `stop` is set, and with the parent: one that was killed cannot stop its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer

    def watch():
        while not stop.wait(0.5) and os.getppid() == parent:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _marker(output_dir: Path, name: str, number: int) -> Path:
    return output_dir / WORK / name / f"chunk-{number:05d}.json"


def _at_work(output_dir: Path, name: str, number: int) -> Path:
    """Holds the `row_id` that a chunk is at: who was it when a process dies?"""
    return output_dir / WORK / name / f"chunk-{number:05d}.row.tmp"


def _noted(marker: Path) -> dict:
    return json.loads(marker.read_text(encoding="utf-8"))


def _prepare_chunk(
    output_dir: Path, name: str, number: int, options: PreparationOptions, draw: Callable[[dict], dict] | None
) -> int:
    """One chunk of an index to its shards and its marker; returns its number of rows."""
    table = pq.ParquetFile(output_dir / WORK / name / INDEX_FILE).read_row_group(number)
    recognizer = _recognizer(options)
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    bad = []
    note = _at_work(output_dir, name, number)
    chunk = table.to_pylist()
    if draw is None:  # phantoms have no report yet
        for row, entities in zip(chunk, recognizer.find([row["report"] or "" for row in chunk]), strict=True):
            row["entities"] = [entity._asdict() for entity in entities]
    with note.open("w", encoding="utf-8") as current:
        for row in chunk:
            current.seek(0)
            current.truncate()
            current.write(row["row_id"])
            current.flush()
            try:
                prepared = prepare_row(row if draw is None else draw(row), recognizer, options)
                rows[row["split"]].append(prepared)
            except ValueError as error:
                file = (row["image"] or {}).get("path") or ""
                bad.append((file, row["row_id"], str(error).removeprefix(f"{file}: ")))
    note.unlink()
    for split, prepared in rows.items():
        path = output_dir / split / f"{name}-{number:05d}.parquet"
        if prepared:
            _write_shard(path, pa.Table.from_pylist(prepared, schema=PREPARED_FEATURES.arrow_schema))
        else:
            path.unlink(missing_ok=True)  # of an earlier try
    _write_atomically(_marker(output_dir, name, number), json.dumps({"rows": table.num_rows, "bad": bad}).encode())
    return table.num_rows


@functools.cache  # one for all chunks of a process
def _recognizer(options: PreparationOptions) -> Recognizer:
    return load_recognizer(options.recognizer, parse_labels(options.recognizer_labels))


def prepare_row(row: dict, recognizer: Recognizer, options: PreparationOptions) -> dict:
    """A manifest row -> one of `PREPARED_FEATURES`: image, masks and boxes shrunk, entities found.

    Raises ValueError for an image or mask that cannot be read.
    """
    if "entities" not in row:
        row["entities"] = [entity._asdict() for entity in recognizer(row["report"])] if row["report"] else []
    if row["image"] is None:
        return {**row, "original_width": None, "original_height": None, "pixel_hash": ""}
    stored = row["image"]["bytes"] if row["image"]["bytes"] is not None else row["image"]["path"]
    side = {"longer_side": options.longer_side} if options.longer_side else {"shorter_side": options.shorter_side}
    picture, (width, height) = load_shrunk(stored, **side)
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
    """A mask is where at least half of a pixel was mask; one so small that nothing would be left is where any was."""
    try:
        mask = Image.open(io.BytesIO(png)).convert("L").point(lambda value: 255 * (value > 0))
    except OSError as error:
        raise ValueError(f"a mask cannot be read: {error}") from error
    if mask.size == size:
        return png
    share = mask.resize(size, Image.Resampling.BOX)
    least = 127 if share.getextrema()[1] > 127 else 0
    file = io.BytesIO()
    share.point(lambda value: 255 * (value > least)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _scale_box(box: dict, horizontal: float, vertical: float) -> dict:
    return {
        "finding": box["finding"],
        "x": box["x"] * horizontal,
        "y": box["y"] * vertical,
        "width": box["width"] * horizontal,
        "height": box["height"] * vertical,
    }


def _write_shard(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = pa.BufferOutputStream()
    # pictures are compressed already; small row groups let a stream begin before a shard is read
    pq.write_table(table, sink, row_group_size=100, compression="zstd", compression_level=1)
    _write_atomically(path, sink.getvalue())


def _write_atomically(path: Path, content) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # so that a power cut leaves no empty file under the right name
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------- checks


def _separate_pictures(output_dir: Path, sources, duplicates: str) -> list[str]:
    """No picture in two splits; returns what is wrong."""
    pictures: dict[str, tuple[str, str]] = {}  # pixel hash -> split and row that keep it
    copies: dict[Path, dict[str, str]] = {}
    for split in reversed(SPLITS):  # test keeps its pictures before val, val before train
        for path in (path for name in sources for path in shards(output_dir, split, name)):
            for row in pq.read_table(path, columns=["row_id", "pixel_hash"]).to_pylist():
                if row["pixel_hash"]:
                    kept_in, kept = pictures.setdefault(row["pixel_hash"], (split, row["row_id"]))
                    if kept_in != split:
                        reason = f"{LEFT_OUT}the same picture as {kept} of split {kept_in}"
                        copies.setdefault(path, {})[row["row_id"]] = reason
    if duplicates == "drop":
        for path, found in copies.items():
            _drop_rows(output_dir, path, found)
    elif copies:
        path, found = next(iter(copies.items()))
        row_id, reason = next(iter(found.items()))
        return [
            f"{sum(map(len, copies.values()))} pictures are in two splits, for example {row_id!r} in "
            f"{path.parent.name}: {reason.removeprefix(LEFT_OUT)} (--duplicates drop takes them out)"
        ]
    return []


def _drop_rows(output_dir: Path, path: Path, reasons: dict[str, str]) -> None:
    """Take rows out of a shard; first they are noted at their chunk, so that a killed run knows of them."""
    name, _, number = path.stem.rpartition("-")
    marker = _marker(output_dir, name, int(number))
    noted = _noted(marker)
    noted["bad"] = [problem for problem in noted["bad"] if problem[1] not in reasons]
    noted["bad"] += [("", row_id, reason) for row_id, reason in reasons.items()]
    _write_atomically(marker, json.dumps(noted).encode())
    table = pq.read_table(path)
    table = table.filter(pa.array([row_id not in reasons for row_id in table["row_id"].to_pylist()]))
    if table.num_rows:
        _write_shard(path, table)
    else:
        path.unlink()


def _write_quarantine(output_dir: Path, sources) -> dict[str, SourceCounts]:
    """`quarantine.csv` of all that could not be used or was left out, but not the views; returns the counts."""
    counts = {}
    temporary = output_dir / f"{QUARANTINE_FILE}.tmp"
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "file", "row_id", "reason"])
        for name in sources:
            folder = output_dir / WORK / name
            in_table = _in_table(folder)
            in_chunks = [problem for path in sorted(folder.glob("chunk-*.json")) for problem in _noted(path)["bad"]]
            problems = in_table["bad"] + in_chunks
            writer.writerows([name, *problem] for problem in problems)
            left_out = dict(in_table["left_out"])
            bad = _num_bad(problems)
            if len(problems) > bad:
                left_out[f"for the reasons in {QUARANTINE_FILE}"] = len(problems) - bad
            counts[name] = SourceCounts(_num_indexed(folder) - len(in_chunks), bad, left_out)
    os.replace(temporary, output_dir / QUARANTINE_FILE)
    return counts


def _in_table(folder: Path) -> dict:
    return json.loads((folder / PROBLEMS_FILE).read_text(encoding="utf-8"))


def _num_indexed(folder: Path) -> int:
    return pq.ParquetFile(folder / INDEX_FILE).metadata.num_rows


def _num_bad(problems: list) -> int:
    return sum(not is_left_out(reason) for *_, reason in problems)


def _too_many_bad(counts: dict[str, tuple[int, int]], max_bad_share: float) -> list[str]:
    return [
        f"of {name}, {bad} of {bad + good} rows cannot be used (at most {max_bad_share:.1%} may)"
        for name, (bad, good) in counts.items()
        if bad > max_bad_share * (bad + good)
    ]

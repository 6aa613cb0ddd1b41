"""The index of a source: every row that will be prepared, in a fixed order and with a split, before a pixel is read."""

import hashlib
import inspect
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..text.entities import parse_labels
from .manifest import FEATURES, check_row, make_row
from .prepared import SPLITS
from .readers import LEFT_OUT, SOURCES, read_csv_manifest, source_reader, source_rows
from .readers.tables import VIEWS, hashed_share


INDEX_FILE, PROBLEMS_FILE = "index.parquet", "problems.json"
PHANTOM = "phantom"
TABLES = ("metadata", "manifest")
SPLIT_NAMES = {"training": "train", "valid": "val", "validate": "val", "validation": "val", "dev": "val"}


@dataclass(frozen=True)
class PreparationOptions:
    """What the prepared rows depend on; a run into a folder that was begun with others is refused.

    shorter_side: pixels of the stored images, which are never enlarged; longer_side: of that side instead, 0 for not:
    at the input size of the model, training has nothing to resize; image_format: "jpeg" (with `quality`) or "png";
    views: "frontal" leaves out rows whose view is known to be another, "all" keeps them; val_share, test_share: of the
    patients of a source that has no split; seed: of that draw; rows_per_shard: rows of one chunk; recognizer: what
    finds the entities of reports, see `load_recognizer`; recognizer_labels: what its labels mean, as JSON.
    """

    shorter_side: int = 256
    longer_side: int = 0
    image_format: str = "jpeg"
    quality: int = 95
    views: str = "frontal"
    val_share: float = 0.05
    test_share: float = 0.0
    seed: int = 0
    rows_per_shard: int = 500
    recognizer: str = "lexicon"
    recognizer_labels: str = ""

    def __post_init__(self):
        for name, allowed in (("image_format", ("jpeg", "png")), ("views", ("frontal", "all"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
        if self.shorter_side < 1 or self.rows_per_shard < 1 or not 1 <= self.quality <= 100:
            raise ValueError("shorter_side and rows_per_shard must be positive, quality between 1 and 100.")
        if self.longer_side < 0 or self.longer_side and self.shorter_side != type(self).shorter_side:
            raise ValueError("longer_side must not be negative, and takes the place of shorter_side: give one of them.")
        if min(self.val_share, self.test_share) < 0 or self.val_share + self.test_share >= 1:
            raise ValueError("val_share and test_share must not be negative, and leave something to train on.")
        parse_labels(self.recognizer_labels)


def write_index(
    folder: str | os.PathLike,
    name: str,
    place: str,
    given: dict[str, str] | None = None,
    options: PreparationOptions | None = None,
) -> None:
    """Write `index.parquet` and `problems.json` of the source `name` at `place` into `folder`.

    The index has the columns of `FEATURES` and one row group for each chunk of `rows_per_shard` rows; images are
    paths, and it is not looked whether they exist. Of phantoms it has names alone, `drawer` draws the rest. A row that
    would not pass `check_rows`, and what the reader reports, goes to the problems as (file or line, row_id, reason);
    rows left out by their view are counted there. `given` are options of the reader, as text.

    Raises ValueError when no row is left.
    """
    folder, options = Path(folder), options or PreparationOptions()
    folder.mkdir(parents=True, exist_ok=True)
    bad: list[tuple[str, str, str]] = []
    left_out = Counter()
    if name == PHANTOM:
        rows = _phantom_names(place, given or {})
    else:
        rows = _source(name, place, given or {}, lambda where, reason: bad.append((where, "", reason)))
        rows = _usable(rows, name, options, bad, left_out)
    rows = iter(tqdm(rows, desc=f"indexing {name}", unit=" rows", mininterval=1.0, leave=False))
    sink = folder / f"{INDEX_FILE}.tmp"
    num_rows = 0
    with pq.ParquetWriter(sink, FEATURES.arrow_schema) as writer:
        while chunk := list(itertools.islice(rows, options.rows_per_shard)):
            num_rows += len(chunk)
            for row in chunk:
                row["split"] = _split(row, options)
            table = pa.Table.from_pylist(chunk, schema=FEATURES.arrow_schema)
            writer.write_table(table, row_group_size=options.rows_per_shard)
    if not num_rows:
        reasons = [f"{where}: {reason}" for where, _, reason in bad[:1]]
        reasons += [f"{count} rows left out: {reason}" for reason, count in left_out.items()]
        raise ValueError(f"{name}={place}: no row is left to prepare; {'; '.join(reasons) or 'the source is empty'}.")
    problems = folder / f"{PROBLEMS_FILE}.tmp"
    problems.write_text(json.dumps({"bad": bad, "left_out": left_out}), encoding="utf-8")
    os.replace(problems, folder / PROBLEMS_FILE)
    os.replace(sink, folder / INDEX_FILE)  # the last: where an index is, it is whole


def _usable(
    rows: Iterable[dict], name: str, options: PreparationOptions, bad: list[tuple], left_out: Counter
) -> Iterator[dict]:
    ids: set[str] = set()
    labels: set[str] = set()
    for row in rows:
        try:
            check_row(row, f"row {row['row_id']!r}", row["image"] is not None, ids, labels)
        except ValueError as error:
            bad.append(((row["image"] or {}).get("path") or "", row["row_id"], str(error)))
            continue
        if options.views == "frontal" and not is_frontal(row["view"]):
            left_out[f"view {row['view']}"] += 1
            continue
        row["source"] = row["source"] or name
        yield row


def is_frontal(view: str) -> bool:
    """Is a view PA or AP ("AP Supine" too), or called frontal, or not known?"""
    words = view.upper().split()
    return not words or VIEWS.get(words[0], words[0]) in ("PA", "AP", "FRONTAL", "")


def _source(name: str, place: str, given: dict[str, str], report_problem: Callable) -> Iterator[dict]:
    if name in SOURCES:
        arguments = _typed(source_reader(name), given, name, skip=("folder", "report_problem"))
        yield from source_rows(name, place, report_problem=report_problem, **arguments)
    else:
        skip = ("path", "split", "report_problem", "check_images")
        arguments = _typed(read_csv_manifest, given, name, skip)
        rows = read_csv_manifest(_table_of(name, place), report_problem=report_problem, check_images=False, **arguments)
        for table in rows.with_format("arrow").iter(batch_size=10_000):
            yield from table.to_pylist()


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


def _split(row: dict, options: PreparationOptions) -> str:
    if row["split"]:
        split = SPLIT_NAMES.get(row["split"].lower(), row["split"])
        if split not in SPLITS:
            raise ValueError(
                f"row {row['row_id']!r} has the split {split!r}, expected {', '.join(SPLITS)} or nothing. "
                "Rename it in the table."
            )
        return split
    share = hashed_share(str(options.seed), row["source"], row["patient_id"] or row["row_id"])
    if share < options.test_share:
        return "test"
    return "val" if share < options.test_share + options.val_share else "train"


# ----------------------------------------------------------------------------------------------------------- phantoms


def _phantom_options(place: str, given: dict[str, str]) -> dict:
    from .phantom import phantom_dataset

    if not place.isdigit() or int(place) < 1:
        raise ValueError(f"phantom={place}: expected the number of made-up radiographs.")
    options = {"num_images": int(place), "size": 128, "seed": 0, "num_unpaired": 0}
    options |= _typed(phantom_dataset, given, PHANTOM, skip=("num_images", "split", "num_proc"))
    if not 0 <= options["num_unpaired"] <= options["num_images"]:
        raise ValueError(f"phantom.num_unpaired is {options['num_unpaired']}, expected 0 to {place}.")
    return options


def _phantom_names(place: str, given: dict[str, str]) -> Iterator[dict]:
    from .phantom import phantom_name

    options = _phantom_options(place, given)
    for index in range(options["num_images"]):
        name = phantom_name(index, seed=options["seed"], split="train")
        yield make_row(name, None, source=PHANTOM, patient_id=name, view="PA")


def drawer(name: str, place: str, given: dict[str, str]) -> Callable[[dict], dict] | None:
    """What makes a whole row of one in the index, for a source that is drawn; None for one that is read."""
    return partial(_draw, _phantom_options(place, given)) if name == PHANTOM else None


def _draw(options: dict, row: dict) -> dict:
    from .phantom import phantom_row

    index = int(row["row_id"].rpartition("-")[2])
    has_report = index < options["num_images"] - options["num_unpaired"]
    drawn = phantom_row(index, size=options["size"], seed=options["seed"], has_report=has_report)
    return {**drawn, "split": row["split"]}


# ------------------------------------------------------------------------------------------------------------ options


def _typed(function: Callable, given: dict[str, str], name: str, skip: tuple[str, ...]) -> dict:
    """Options as text to the types of the function's defaults; a list is written with commas."""
    known = {key: item.default for key, item in inspect.signature(function).parameters.items() if key not in skip}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{name} knows no option {', '.join(unknown)}; its options are {', '.join(known) or 'none'}.")
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


# ------------------------------------------------------------------------------------------------------------- checks


def check_indexes(folders: dict[str, Path]) -> dict[str, set[str]]:
    """Split -> the `source`s of its rows, over the indexes in `folders` (name -> folder).

    Raises ValueError for a row in two sources, and for a patient of one `source` in two splits.
    """
    sources: dict[str, set[str]] = {split: set() for split in SPLITS}
    found_in: dict[bytes, str] = {}
    patients: dict[tuple[str, str], tuple[str, str]] = {}
    columns = ["row_id", "source", "patient_id", "split"]
    for name, folder in folders.items():
        file = pq.ParquetFile(folder / INDEX_FILE)
        for batch in file.iter_batches(10_000, columns=columns):
            for row in batch.to_pylist():
                row_id, source, patient, split = (row[key] for key in columns)
                key = hashlib.blake2b(row_id.encode("utf-8"), digest_size=16).digest()
                if (other := found_in.setdefault(key, name)) != name:
                    raise ValueError(f"row {row_id!r} is in the sources {other} and {name}. Leave one of them out.")
                sources[split].add(source)
                if patient:
                    first, first_row = patients.setdefault((source, patient), (split, row_id))
                    if first != split:
                        raise ValueError(
                            f"{name}: patient {patient!r} of {source!r} is in two splits, in {first} with row "
                            f"{first_row!r} and in {split} with row {row_id!r}. Split by patient, not by image."
                        )
    return sources


def is_left_out(reason: str) -> bool:
    """Is a reason in the quarantine no fault of the row?"""
    return reason.startswith(LEFT_OUT)

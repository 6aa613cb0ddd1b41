"""A table of one's own (CSV, TSV, JSON lines, Parquet) -> manifest rows."""

import csv
import functools
import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets

from ...text.reports import clean_report
from ...text.vocabulary import canonical_label
from ..manifest import make_row, rows_to_dataset
from .tables import LEFT_OUT, Report, completed_absent, raise_problem, text_lines


logger = logging.getLogger(__name__)

# A table's own names for our columns; at most one name of each line may be in use.
COLUMN_NAMES = {
    "image": ("file", "image", "path"),
    "report": ("text", "report"),
    "present": ("labels",),
    "absent": ("absent_labels",),
    "uncertain": ("uncertain_labels",),
    "patient_id": ("patient_id",),
    "study_id": ("study_id",),
    "view": ("view",),
    "split": ("split",),
    "source": ("source",),
    "row_id": ("row_id",),
}


def read_csv_manifest(
    path: str | os.PathLike,
    split: str | None = None,
    drop_unlabelled: bool = False,
    fully_labelled: Sequence[str] = (),
    report_problem: Report = raise_problem,
    check_images: bool = True,
) -> datasets.Dataset:
    """Read a table of images, reports and labels into manifest rows, in the order of the table.

    Columns by name, others are ignored: `file` (or `image`, `path`; relative to the folder of the table), `text` (or
    `report`), `labels`, `absent_labels`, `uncertain_labels` (each `;`-separated), `patient_id`, `study_id`, `view`,
    `split`, `source`, `row_id`. Needed are an image or a text column, and a text or a `labels` column. An empty text
    makes an unpaired row, an empty file a text-only row; an empty `labels` means unknown, not normal.

    Args:
        path: A .csv (RFC 4180), .tsv, .jsonl or .parquet file, text in UTF-8; a line that is not is read as
            Windows-1252. In .jsonl and .parquet, label columns may be lists.
        split: Keep only the rows of this split.
        drop_unlabelled: Leave out rows with neither text nor labels, with one warning that counts them. Without it
            they are a problem.
        fully_labelled: Sources whose labelling is complete. In a row of theirs that has labels, every label that the
            source uses anywhere in the table and the row does not state becomes absent. In other sources "no finding"
            makes nothing absent.
        report_problem: Is told (where, reason) of each row that cannot be used, which is then left out: a row with
            neither text nor labels or with neither image nor text, an unknown label, a label stated two ways, a
            missing image file, a patient who is in another split on an earlier line. By default it raises.
        check_images: Look whether the image files exist. Over a network this is the slow part of a large table.

    Raises ValueError naming file and line for those, and in any case for a missing or doubled column, a table that
    cannot be read, an unknown `split`, and a table of which no row is left.
    """
    path = Path(path)
    is_strict = report_problem is raise_problem
    folder = path.resolve().parent.name
    lines = array("q")  # of the rows that are kept
    patients: dict[tuple[str, str], tuple[str, int]] = {}
    used: dict[str, set[str]] = {source: set() for source in fully_labelled}
    splits, sources, ids = Counter(), Counter(), Counter()
    unlabelled, missing = [], []  # (line, image path)

    def kept() -> Iterator[dict]:
        names = None
        for line, record in _read_table(path):
            where = f"{path}, line {line}"
            try:
                if isinstance(record, _BadRow):
                    raise record
                if names is None:
                    names = _column_names(path, record.keys())
                row = _row(path, folder, line, record, names)
                _check_patient(row, line, patients)
            except _BadRow as error:
                report_problem(where, str(error))
                continue
            splits[row["split"]] += 1
            sources[row["source"]] += 1
            if row["source"] in used:
                used[row["source"]].update(row["present"], row["absent"], row["uncertain"])
            image = row["image"]["path"] if row["image"] is not None else None
            if split is not None and row["split"] != split:
                continue
            if not (row["report"] or row["present"] or row["absent"]):
                unlabelled.append((line, image))
                if not is_strict and not drop_unlabelled:
                    report_problem(where, f"{LEFT_OUT}the row has neither a text nor labels")
            elif check_images and image is not None and not os.path.isfile(image):
                missing.append((line, image))
                if not is_strict:
                    report_problem(where, f"the image file {image!r} does not exist")
            else:
                lines.append(line)
                ids[row["row_id"]] += 1
                yield row
        if names is None:
            raise ValueError(f"{path}: the manifest has no rows.")

    rows = rows_to_dataset(kept())
    num_rows = len(rows) + len(unlabelled) + len(missing)
    if split is not None and split not in splits:
        raise ValueError(f"{path}: no row has split {split!r}; the splits there are {dict(splits)}.")
    if unlabelled and is_strict and not drop_unlabelled:
        raise ValueError(
            f"{path}: {len(unlabelled)} of {num_rows} rows have neither text nor labels, the first on line "
            f"{unlabelled[0][0]}. Complete them, or pass drop_unlabelled=True to leave them out."
        )
    if unlabelled and drop_unlabelled:
        logger.warning("%s: left out %d of %d rows with neither text nor labels.", path, len(unlabelled), num_rows)
    if missing and is_strict:
        raise ValueError(
            f"{path}: {len(missing)} of {num_rows} image files do not exist, the first on line {missing[0][0]}: "
            f"{missing[0][1]!r}. Paths are relative to the folder of the manifest."
        )
    if not len(rows):
        raise ValueError(f"{path}: no row is left to use. Check `split` and the labels.")
    for source in used:
        if source not in sources:
            logger.warning("%s: fully_labelled names the source %r, of which there is no row.", path, source)
    return _completed(rows, lines, ids, used)


class _BadRow(ValueError):
    """Why one row cannot be used."""


def _read_table(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number (of a record's last line; in parquet, its number from 1) and record, one after the other."""
    if not path.is_file():
        raise ValueError(f"{path}: the manifest file does not exist.")
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        yield from _read_separated(path, "\t" if kind == ".tsv" else ",")
    elif kind == ".jsonl":
        yield from _read_json_lines(path)
    elif kind == ".parquet":
        import pyarrow.parquet

        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=10_000):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    else:
        raise ValueError(f"{path}: cannot read a manifest of type {kind!r}; expected .csv, .tsv, .jsonl or .parquet.")


def _read_separated(path: Path, separator: str) -> Iterator[tuple[int, dict | _BadRow]]:
    reader = csv.DictReader(text_lines(path), delimiter=separator, strict=True)
    try:
        if reader.fieldnames and len(set(reader.fieldnames)) < len(reader.fieldnames):
            twice = [name for name, count in Counter(reader.fieldnames).items() if count > 1]
            raise ValueError(f"{path}: the header names {twice} more than once; keep one column of each name.")
        for record in reader:
            if None in record or None in record.values():
                record = _BadRow(
                    f"the row has another number of fields than the header's {len(reader.fieldnames)}. Quote fields "
                    "that contain the separator."
                )
            yield reader.line_num, record
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: not a readable table: {error}") from error


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    columns: dict[str, None] = {}  # of the whole file: a record may leave out what it has nothing for
    for is_second_pass in (False, True):
        for number, line in enumerate(text_lines(path), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}.")
            if is_second_pass:
                yield number, {name: record.get(name) for name in columns}
            else:
                columns.update(dict.fromkeys(record))


def _column_names(path: Path, columns: Sequence[str]) -> dict[str, str]:
    """Our column -> the table's name for it, for those that the table has."""
    names = {}
    for ours, theirs in COLUMN_NAMES.items():
        found = [name for name in theirs if name in columns]
        if len(found) > 1:
            raise ValueError(f"{path}: the columns {found} mean the same; keep one of them.")
        if found:
            names[ours] = found[0]
    for needed in (("image", "report"), ("report", "present")):
        if not any(ours in names for ours in needed):
            accepted = [name for ours in needed for name in COLUMN_NAMES[ours]]
            raise ValueError(f"{path}: expected one of the columns {accepted}, found {list(columns)}.")
    return names


def _row(path: Path, folder: str, line: int, record: dict, names: dict[str, str]) -> dict:
    def value(ours: str) -> str:
        found = record[names[ours]] if ours in names else None
        return "" if found is None else str(found).strip()

    stated: dict[str, str] = {}
    labels: dict[str, list[str]] = {}
    for column in ("present", "absent", "uncertain"):
        field = record.get(names.get(column))
        labels[column] = list(_labels(tuple(field.split(";") if isinstance(field, str) else field or ())))
        for label in labels[column]:
            if stated.setdefault(label, column) != column:
                raise _BadRow(f"{label!r} is both {stated[label]} and {column}; keep one of them.")
    image, report = value("image"), clean_report(value("report"))
    if not image and not report:
        raise _BadRow("the row has neither an image nor a text. Drop it.")
    return make_row(
        value("row_id") or (f"{folder}/{image}" if image else f"{folder}/{path.name}:{line}"),
        os.path.join(path.parent, image) if image else None,
        report=report or None,
        **labels,
        **{name: value(name) for name in ("patient_id", "study_id", "view", "split", "source")},
    )


@functools.lru_cache(maxsize=100_000)
def _labels(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(canonical_label(name) for name in names if name.strip()))
    except ValueError as error:
        raise _BadRow(str(error)) from error


def _check_patient(row: dict, line: int, patients: dict[tuple[str, str], tuple[str, int]]) -> None:
    if row["patient_id"]:
        split, first_line = patients.setdefault((row["source"], row["patient_id"]), (row["split"], line))
        if split != row["split"]:
            raise _BadRow(
                f"patient {row['patient_id']!r} is in split {row['split']!r} here and in {split!r} on line "
                f"{first_line}. Split by patient, not by image."
            )


def _completed(rows: datasets.Dataset, lines: array, ids: Counter, used: dict[str, set[str]]) -> datasets.Dataset:
    """What depends on the whole table: absent labels of fully labelled sources, and ids for rows that share a file."""
    if not used and len(ids) == len(rows):
        return rows

    def completed() -> Iterator[dict]:
        start = 0
        for table in rows.with_format("arrow").iter(batch_size=10_000):
            for line, row in zip(lines[start : start + table.num_rows], table.to_pylist(), strict=True):
                if ids[row["row_id"]] > 1 and row["image"] is not None:
                    row["row_id"] += f"#{line}"
                row["absent"] = completed_absent(row, used)
                yield row
            start += table.num_rows

    return rows_to_dataset(completed())

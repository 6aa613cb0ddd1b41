"""A table of one's own (CSV, TSV, JSON lines, Parquet) -> manifest rows."""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets

from ...text.reports import clean_report
from ...text.vocabulary import canonical_label, with_broader_labels
from ..manifest import make_row, rows_to_dataset
from .tables import Report, raise_problem


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
) -> datasets.Dataset:
    """Read a table of images, reports and labels into manifest rows, in the order of the table.

    Columns by name, others are ignored: `file` (or `image`, `path`; relative to the folder of the table), `text` (or
    `report`), `labels`, `absent_labels`, `uncertain_labels` (each `;`-separated), `patient_id`, `study_id`, `view`,
    `split`, `source`, `row_id`. Needed are an image or a text column, and a text or a `labels` column. An empty text
    makes an unpaired row, an empty file a text-only row; an empty `labels` means unknown, not normal.

    Args:
        path: A .csv (RFC 4180), .tsv, .jsonl or .parquet file, text in UTF-8. In .jsonl and .parquet, label
            columns may be lists.
        split: Keep only the rows of this split.
        drop_unlabelled: Leave out rows with neither text nor labels, with one warning that counts them. Without it
            they are a problem.
        fully_labelled: Sources whose labelling is complete. In a row of theirs that has labels, every label that the
            source uses anywhere in the table and the row does not state becomes absent. In other sources "no finding"
            makes nothing absent.
        report_problem: Is told (where, reason) of each row that cannot be used, which is then left out: a row with
            neither text nor labels or with neither image nor text, an unknown label, a label stated two ways, a
            missing image file, a patient who is in another split on an earlier line. By default it raises.

    Raises ValueError naming file and line for those, and in any case for a missing or doubled column, a table that
    cannot be read, an unknown `split`, and a table of which no row is left.
    """
    path = Path(path)
    is_strict = report_problem is raise_problem
    lines, rows = [], []
    names = None
    for line, record in _read_table(path):
        if names is None:
            names = _column_names(path, record.keys())
        try:
            row = _row(path, line, record, names)
        except _BadRow as error:
            report_problem(f"{path}, line {line}", str(error))
            continue
        lines.append(line)
        rows.append(row)
    if names is None:
        raise ValueError(f"{path}: the manifest has no rows.")
    lines, rows = _without(lines, rows, _patients_in_two_splits(path, lines, rows, report_problem))
    _complete_labels(path, rows, fully_labelled)
    if split is not None:
        splits = Counter(row["split"] for row in rows)
        if split not in splits:
            raise ValueError(f"{path}: no row has split {split!r}; the splits there are {dict(splits)}.")
        lines, rows = _without(lines, rows, {i for i, row in enumerate(rows) if row["split"] != split})
    unlabelled = {i for i, row in enumerate(rows) if not (row["report"] or row["present"] or row["absent"])}
    if unlabelled and is_strict and not drop_unlabelled:
        raise ValueError(
            f"{path}: {len(unlabelled)} of {len(rows)} rows have neither text nor labels, the first on line "
            f"{lines[min(unlabelled)]}. Complete them, or pass drop_unlabelled=True to leave them out."
        )
    if drop_unlabelled and unlabelled:
        logger.warning("%s: left out %d of %d rows with neither text nor labels.", path, len(unlabelled), len(rows))
    elif unlabelled:
        for index in sorted(unlabelled):
            report_problem(f"{path}, line {lines[index]}", "the row has neither a text nor labels")
    lines, rows = _without(lines, rows, unlabelled)
    lines, rows = _without(lines, rows, _missing_images(path, lines, rows, report_problem))
    if not rows:
        raise ValueError(f"{path}: no row is left to use. Check `split` and the labels.")
    _tell_apart(lines, rows)
    return rows_to_dataset(rows)


class _BadRow(ValueError):
    """Why one row cannot be used."""


def _without(lines: list[int], rows: list[dict], left_out: set[int]) -> tuple[list[int], list[dict]]:
    if not left_out:
        return lines, rows
    kept = [index for index in range(len(rows)) if index not in left_out]
    return [lines[index] for index in kept], [rows[index] for index in kept]


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


def _read_separated(path: Path, separator: str) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        try:
            if reader.fieldnames and len(set(reader.fieldnames)) < len(reader.fieldnames):
                twice = [name for name, count in Counter(reader.fieldnames).items() if count > 1]
                raise ValueError(f"{path}: the header names {twice} more than once; keep one column of each name.")
            for record in reader:
                if None in record or None in record.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: the row has another number of fields than the header's "
                        f"{len(reader.fieldnames)}. Quote fields that contain the separator."
                    )
                yield reader.line_num, record
        except (csv.Error, UnicodeDecodeError) as error:
            kind = path.suffix.lower()[1:]
            raise ValueError(f"{path}, after line {reader.line_num}: not a UTF-8 {kind}: {error}") from error


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    columns: dict[str, None] = {}  # of the whole file: a record may leave out what it has nothing for
    for is_second_pass in (False, True):
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
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


def _row(path: Path, line: int, record: dict, names: dict[str, str]) -> dict:
    def value(ours: str) -> str:
        found = record[names[ours]] if ours in names else None
        return "" if found is None else str(found).strip()

    stated: dict[str, str] = {}
    labels: dict[str, list[str]] = {}
    for column in ("present", "absent", "uncertain"):
        labels[column] = _labels(record.get(names.get(column)))
        for label in labels[column]:
            if stated.setdefault(label, column) != column:
                raise _BadRow(f"{label!r} is both {stated[label]} and {column}; keep one of them.")
    image, report = value("image"), clean_report(value("report"))
    if not image and not report:
        raise _BadRow("the row has neither an image nor a text. Drop it.")
    folder = path.resolve().parent.name
    return make_row(
        value("row_id") or (f"{folder}/{image}" if image else f"{folder}/{path.name}:{line}"),
        (path.parent / image).as_posix() if image else None,
        report=report or None,
        **labels,
        **{name: value(name) for name in ("patient_id", "study_id", "view", "split", "source")},
    )


def _labels(field: str | Sequence[str] | None) -> list[str]:
    names: Iterable[str] = field.split(";") if isinstance(field, str) else field or ()
    try:
        return list(dict.fromkeys(canonical_label(name) for name in names if name.strip()))
    except ValueError as error:
        raise _BadRow(str(error)) from error


def _patients_in_two_splits(path: Path, lines: list[int], rows: list[dict], report_problem: Report) -> set[int]:
    first: dict[tuple[str, str], tuple[str, int]] = {}
    found = set()
    for index, (line, row) in enumerate(zip(lines, rows, strict=True)):
        if row["patient_id"]:
            split, first_line = first.setdefault((row["source"], row["patient_id"]), (row["split"], line))
            if split != row["split"]:
                found.add(index)
                report_problem(
                    f"{path}, line {line}",
                    f"patient {row['patient_id']!r} is in split {row['split']!r} here and in {split!r} on line "
                    f"{first_line}. Split by patient, not by image.",
                )
    return found


def _complete_labels(path: Path, rows: list[dict], fully_labelled: Sequence[str]) -> None:
    for source in fully_labelled:
        own = [row for row in rows if row["source"] == source]
        if not own:
            logger.warning("%s: fully_labelled names the source %r, of which there is no row.", path, source)
        used = sorted({label for row in own for label in (*row["present"], *row["absent"], *row["uncertain"])})
        for row in own:
            if row["present"] or row["absent"]:
                stated = {*with_broader_labels(row["present"]), *row["absent"], *row["uncertain"]}
                row["absent"] += [label for label in used if label not in stated]


def _missing_images(path: Path, lines: list[int], rows: list[dict], report_problem: Report) -> set[int]:
    missing = [
        index for index, row in enumerate(rows) if row["image"] is not None and not os.path.isfile(row["image"]["path"])
    ]
    if missing and report_problem is raise_problem:
        raise ValueError(
            f"{path}: {len(missing)} of {len(rows)} image files do not exist, the first on line {lines[missing[0]]}: "
            f"{rows[missing[0]]['image']['path']!r}. Paths are relative to the folder of the manifest."
        )
    for index in missing:
        report_problem(
            f"{path}, line {lines[index]}", f"the image file {rows[index]['image']['path']!r} does not exist"
        )
    return set(missing)


def _tell_apart(lines: list[int], rows: list[dict]) -> None:
    """Rows that show the same file get different ids."""
    times = Counter(row["row_id"] for row in rows)
    for line, row in zip(lines, rows, strict=True):
        if times[row["row_id"]] > 1 and row["image"] is not None:
            row["row_id"] += f"#{line}"

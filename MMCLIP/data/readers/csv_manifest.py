"""A table of one's own (CSV, TSV, JSON lines, Parquet) -> manifest rows."""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets

from ...text.reports import clean_report
from ...text.vocabulary import canonical_label, with_broader_labels
from ..manifest import FEATURES


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
) -> datasets.Dataset:
    """Read a table of images, reports and labels into manifest rows, in the order of the table.

    Columns by name, others are ignored: `file` (or `image`, `path`; relative to the folder of the table), `text` (or
    `report`), `labels`, `absent_labels`, `uncertain_labels` (each `;`-separated), `patient_id`, `study_id`, `view`,
    `split`, `source`, `row_id`. Needed are an image or a text column, and a text or a `labels` column. An empty text makes an
    unpaired row, an empty file a text-only row; an empty `labels` means unknown, not normal.

    Args:
        path: A .csv (RFC 4180), .tsv, .jsonl or .parquet file, text in UTF-8. In .jsonl and .parquet, label
            columns may be lists.
        split: Keep only the rows of this split.
        drop_unlabelled: Leave out rows with neither text nor labels, with one warning that counts them. Without it
            they are an error.
        fully_labelled: Sources whose labelling is complete. In a row of theirs that has labels, every label that the
            source uses anywhere in the table and the row does not state becomes absent. In other sources "no finding"
            makes nothing absent.

    Raises ValueError naming file and line for a missing or doubled column, a row with neither text nor labels or with
    neither image nor text, an unknown label, a label stated two ways, a missing image file, a patient in two splits, an
    unknown `split`, and a table without rows.
    """
    path = Path(path)
    lines, records = _read_table(path)
    names = _column_names(path, records[0].keys() if records else ())
    rows = [_row(path, line, record, names) for line, record in zip(lines, records, strict=True)]
    _check_patients(path, lines, rows)
    _complete_labels(path, rows, fully_labelled)
    if split is not None:
        splits = Counter(row["split"] for row in rows)
        if split not in splits:
            raise ValueError(f"{path}: no row has split {split!r}; the splits there are {dict(splits)}.")
        kept = [index for index, row in enumerate(rows) if row["split"] == split]
        lines, rows = [lines[index] for index in kept], [rows[index] for index in kept]
    unlabelled = [
        line for line, row in zip(lines, rows, strict=True) if not (row["report"] or row["present"] or row["absent"])
    ]
    if unlabelled and not drop_unlabelled:
        raise ValueError(
            f"{path}: {len(unlabelled)} of {len(rows)} rows have neither text nor labels, the first on line "
            f"{unlabelled[0]}. Complete them, or pass drop_unlabelled=True to leave them out."
        )
    if unlabelled:
        logger.warning("%s: left out %d of %d rows with neither text nor labels.", path, len(unlabelled), len(rows))
        dropped = set(unlabelled)
        kept = [index for index, line in enumerate(lines) if line not in dropped]
        lines, rows = [lines[index] for index in kept], [rows[index] for index in kept]
    if not rows:
        raise ValueError(f"{path}: no row is left to use. Check `split` and the labels.")
    _check_images(path, lines, rows)
    return datasets.Dataset.from_list(rows, features=FEATURES)


def _read_table(path: Path) -> tuple[list[int], list[dict]]:
    """Line numbers (of a record's last line; in parquet, its number from 1) and records of a table."""
    if not path.is_file():
        raise ValueError(f"{path}: the manifest file does not exist.")
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        lines, records = [], []
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True)
            try:
                for record in reader:
                    if None in record or None in record.values():
                        raise ValueError(
                            f"{path}, line {reader.line_num}: the row has another number of fields than the header's "
                            f"{len(reader.fieldnames)}. Quote fields that contain the separator."
                        )
                    lines.append(reader.line_num)
                    records.append(record)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, after line {reader.line_num}: not a UTF-8 {kind[1:]}: {error}") from error
            if reader.fieldnames and len(set(reader.fieldnames)) < len(reader.fieldnames):
                twice = [name for name, count in Counter(reader.fieldnames).items() if count > 1]
                raise ValueError(f"{path}: the header names {twice} more than once; keep one column of each name.")
    elif kind == ".jsonl":
        lines, records = [], []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}.")
                lines.append(number)
                records.append(record)
        columns = {name: None for record in records for name in record}
        records = [{name: record.get(name) for name in columns} for record in records]
    elif kind == ".parquet":
        import pyarrow.parquet

        records = pyarrow.parquet.read_table(path).to_pylist()
        lines = list(range(1, len(records) + 1))
    else:
        raise ValueError(f"{path}: cannot read a manifest of type {kind!r}; expected .csv, .tsv, .jsonl or .parquet.")
    if not records:
        raise ValueError(f"{path}: the manifest has no rows.")
    return lines, records


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
    where = f"{path}, line {line}"

    def value(ours: str) -> str:
        found = record[names[ours]] if ours in names else None
        return "" if found is None else str(found).strip()

    stated: dict[str, str] = {}
    labels: dict[str, list[str]] = {}
    for column in ("present", "absent", "uncertain"):
        labels[column] = _labels(record.get(names.get(column)), where)
        for label in labels[column]:
            if stated.setdefault(label, column) != column:
                raise ValueError(f"{where}: {label!r} is both {stated[label]} and {column}; keep one of them.")
    image, report = value("image"), clean_report(value("report"))
    if not image and not report:
        raise ValueError(f"{where}: the row has neither an image nor a text. Drop it.")
    file = (path.parent / image).as_posix() if image else None
    folder = path.resolve().parent.name
    return {
        "row_id": value("row_id") or (f"{folder}/{image}" if image else f"{folder}/{path.name}:{line}"),
        "image": None if file is None else {"path": file, "bytes": None},
        "report": report or None,
        **labels,
        "patient_id": value("patient_id"),
        "study_id": value("study_id"),
        "view": value("view"),
        "split": value("split"),
        "source": value("source"),
        "masks": [],
        "boxes": [],
    }


def _labels(field: str | Sequence[str] | None, where: str) -> list[str]:
    names: Iterator[str] = iter(field.split(";") if isinstance(field, str) else field or ())
    return list(dict.fromkeys(canonical_label(name, where) for name in names if name.strip()))


def _check_patients(path: Path, lines: list[int], rows: list[dict]) -> None:
    first: dict[tuple[str, str], tuple[str, int]] = {}
    for line, row in zip(lines, rows, strict=True):
        if row["patient_id"]:
            split, first_line = first.setdefault((row["source"], row["patient_id"]), (row["split"], line))
            if split != row["split"]:
                raise ValueError(
                    f"{path}, line {line}: patient {row['patient_id']!r} is in split {row['split']!r} here and in "
                    f"{split!r} on line {first_line}. Split by patient, not by image."
                )


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


def _check_images(path: Path, lines: list[int], rows: list[dict]) -> None:
    """Every image file exists; rows that show the same file get different ids."""
    missing = [
        (line, row["image"]["path"])
        for line, row in zip(lines, rows, strict=True)
        if row["image"] is not None and not os.path.isfile(row["image"]["path"])
    ]
    if missing:
        line, file = missing[0]
        raise ValueError(
            f"{path}: {len(missing)} of {len(rows)} image files do not exist, the first on line {line}: {file!r}. "
            "Paths are relative to the folder of the manifest."
        )
    times = Counter(row["row_id"] for row in rows)
    for line, row in zip(lines, rows, strict=True):
        if times[row["row_id"]] > 1 and row["image"] is not None:
            row["row_id"] += f"#{line}"

"""Rows to a CSV, JSON, JSON lines or Parquet file: never half a file under the final name."""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


FORMATS = (".csv", ".json", ".jsonl", ".parquet")
_ROWS_AT_ONCE = 1024  # of a row group of Parquet


def check_output(path: Path, overwrite: bool, formats: tuple[str, ...] = FORMATS) -> None:
    """Raises `ValueError` for a file of another kind, one that exists unless `overwrite`, and an impossible folder."""
    if path.suffix.lower() not in formats:
        raise ValueError(f"output: {path} must end with one of {', '.join(formats)}.")
    if path.is_dir():
        raise ValueError(f"output: {path} is a folder; give the name of a file.")
    if path.exists() and not overwrite:
        raise ValueError(f"output: {path} exists. Choose another name, or overwrite it with --overwrite.")
    make_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Makes `folder`; raises `ValueError` where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: the folder {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output: nothing can be written into the folder {folder}; look at its permissions.")


class TableWriter:
    """Writes rows to `path` as they come, in the format of its suffix; a context manager.

    A row maps column names to strings, numbers, None or vectors (float32 arrays), with the same names in each row.
    Vectors are lists in JSON and Parquet, and one column for each number in CSV (`embedding_0`, ...). What `about`
    says of all rows stands in a JSON file under `about`, in a Parquet file under `mmclip` of its metadata, and beside
    CSV and JSON lines in `<path>.about.json`. After an error, and without rows, there is no file.
    """

    def __init__(self, path: Path):
        self.path, self.part = path, path.with_name(f".{path.name}.{os.getpid()}.part")
        self.format = path.suffix.lower()
        self.num_rows = 0
        self.about: Mapping[str, Any] = {}
        self._rows: list[dict] = []
        self._file = self._writer = None

    def write(self, row: Mapping[str, Any]) -> None:
        self.num_rows += 1
        if self.format == ".csv":
            flat = flat_row(row)
            if self._writer is None:
                self._file = self.part.open("w", newline="", encoding="utf-8")
                self._writer = csv.DictWriter(self._file, list(flat))
                self._writer.writeheader()
            self._writer.writerow(flat)
        elif self.format == ".jsonl":
            self._file = self._file or self.part.open("w", encoding="utf-8")
            self._file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")
        else:
            self._rows.append(dict(row) if self.format == ".parquet" else _plain(row))
            if self.format == ".parquet" and len(self._rows) == _ROWS_AT_ONCE:
                self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            schema = pa.schema([(name, _arrow_type(value)) for name, value in self._rows[0].items()])
            self._writer = pq.ParquetWriter(self.part, schema)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._writer.schema))
        self._rows = []

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None and self.num_rows > 0:
                self._finish()
        finally:
            for opened in (self._writer if self.format == ".parquet" else None, self._file):
                if opened is not None:
                    opened.close()
            self.part.unlink(missing_ok=True)

    def _finish(self) -> None:
        text = json.dumps(self.about, ensure_ascii=False, indent=2)
        if self.format == ".json":
            content = json.dumps({"about": self.about, "rows": self._rows}, ensure_ascii=False, indent=2)
            self.part.write_text(content + "\n", encoding="utf-8")
        elif self.format == ".parquet":
            if self._rows:
                self._write_group()
            self._writer.add_key_value_metadata({"mmclip": text})
            self._writer.close()
        else:
            self._file.close()
            self.path.with_name(f"{self.path.name}.about.json").write_text(text + "\n", encoding="utf-8")
        os.replace(self.part, self.path)


def flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with one column for each number of a vector."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, np.ndarray):
            flat |= {f"{name}_{place}": float(number) for place, number in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def _arrow_type(value: Any):
    import pyarrow as pa

    if isinstance(value, np.ndarray):
        return pa.list_(pa.float32(), len(value))
    if isinstance(value, int):
        return pa.int64()
    return pa.string() if isinstance(value, str) else pa.float64()  # None stands where a number is not known

"""What `examples/prepare_data.py` writes, and how it is read back."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import datasets

from ..text.entities import LexiconRecognizer
from .manifest import FEATURES
from .readers import read_csv_manifest


ENTITIES = datasets.List(
    {
        "start": datasets.Value("int32"),
        "end": datasets.Value("int32"),
        "concept": datasets.Value("string"),
        "kind": datasets.Value("string"),
        "assertion": datasets.Value("string"),
    }
)
# a manifest row, and what preparation found out; whoever loads the shards with `datasets` sees pictures
PREPARED_FEATURES = datasets.Features(
    {
        **FEATURES,
        "image": datasets.Image(),
        "original_width": datasets.Value("int32"),
        "original_height": datasets.Value("int32"),
        "pixel_hash": datasets.Value("string"),
        "entities": ENTITIES,
    }
)
SPLITS = ("train", "val", "test")
INFO_FILE = "preparation.json"


def shards(folder: Path, split: str, source: str = "") -> list[Path]:
    """The shards of a split, in order; of one source, or of all."""
    is_shard = re.compile(rf"{re.escape(source) if source else '.+'}-\d{{5,}}\.parquet").fullmatch
    return sorted(path for path in (folder / split).glob("*.parquet") if is_shard(path.name))


def read_prepared(folder: str | os.PathLike, split: str | None = None) -> datasets.Dataset:
    """The rows of a prepared data set (of one split, or of all), mapped into memory: they cost none.

    Columns are those of `FEATURES`, and `entities` unless the recogniser has changed since. Raises ValueError for a
    folder whose preparation did not end, and for a split that is not there.
    """
    folder = Path(folder)
    if not (folder / INFO_FILE).is_file():
        raise ValueError(f"{folder}: there is no {INFO_FILE}; run examples/prepare_data.py to its end first.")
    info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    if split is not None and split not in SPLITS:
        raise ValueError(f"{folder}: a prepared data set has the splits {', '.join(SPLITS)}, not {split!r}.")
    names = SPLITS if split is None else (split,)
    shards = [str(path) for name in names for path in sorted((folder / name).glob("*.parquet"))]
    if not shards:
        raise ValueError(f"{folder}: there are no rows of split {split!r}.")
    rows = datasets.load_dataset("parquet", data_files=shards, split="train", features=PREPARED_FEATURES)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    columns = list(FEATURES)
    if info["entities"] == LexiconRecognizer().fingerprint:
        columns.append("entities")
    return rows.select_columns(columns)


def read_manifest(
    path: str | os.PathLike,
    split: str | None = None,
    drop_unlabelled: bool = False,
    fully_labelled: Sequence[str] = (),
) -> datasets.Dataset:
    """The rows of a table (`read_csv_manifest`, which explains the arguments) or of a prepared folder."""
    if Path(path).is_dir():
        return read_prepared(path, split)
    return read_csv_manifest(path, split, drop_unlabelled=drop_unlabelled, fully_labelled=fully_labelled)


def concatenate_rows(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """One dataset; a column beyond `FEATURES` stays if all parts have it."""
    common = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    return datasets.concatenate_datasets([part.select_columns(common) for part in parts])

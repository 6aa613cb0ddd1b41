"""What `examples/prepare_data.py` writes, and how it is read back."""

import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet as pq

from .manifest import ENTITIES, FEATURES
from .readers import read_csv_manifest
from .readers.tables import completed_absent


logger = logging.getLogger(__name__)

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


def read_prepared(
    folder: str | os.PathLike, split: str | None = None, fully_labelled: Sequence[str] = ()
) -> datasets.Dataset:
    """The rows of a prepared data set (of one split, or of all), mapped into memory: they cost none.

    `datasets` copies the shards into its cache once, uncompressed, about as large as they are. Columns are those of
    `FEATURES`, `pixel_hash`, `entities`, and `entities_by`, the fingerprint of the recogniser that found them. In rows
    of `fully_labelled` sources that have labels, each label that the source uses in any split and the row does not
    state becomes absent.
    Raises ValueError for a folder whose preparation did not end, for a shard that cannot be read, and for a split of
    which there is no row.
    """
    folder = Path(folder)
    if not (folder / INFO_FILE).is_file():
        raise ValueError(f"{folder}: there is no {INFO_FILE}; run examples/prepare_data.py to its end first.")
    info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    paths = {name: [str(path) for path in shards(folder, name)] for name in SPLITS}
    wanted = [path for name in SPLITS if split in (None, name) for path in paths[name]]
    if not wanted:
        there = ", ".join(name for name, found in paths.items() if found)
        raise ValueError(f"{folder}: no row has the split {split!r}; the splits there are {there}.")
    try:
        rows = datasets.load_dataset("parquet", data_files=wanted, split="train", features=PREPARED_FEATURES)
    except datasets.exceptions.DatasetGenerationError:
        _check_shards(wanted)
        raise
    rows = rows.cast_column("image", datasets.Image(decode=False))
    rows = rows.select_columns([*FEATURES, "pixel_hash", "entities"])
    rows = rows.add_column("entities_by", [info["entities"]] * len(rows))
    return _complete_labels(rows, itertools.chain(*paths.values()), fully_labelled) if fully_labelled else rows


def _check_shards(paths: Iterable[str]) -> None:
    for path in paths:
        try:
            for _ in pq.ParquetFile(path).iter_batches():
                pass
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"{path}: the shard cannot be read ({error}). Copy it anew, or prepare the data again."
            ) from error


def _complete_labels(rows: datasets.Dataset, paths: Iterable[str], fully_labelled: Sequence[str]) -> datasets.Dataset:
    columns = ["source", "present", "absent", "uncertain"]
    used: dict[str, set[str]] = {source: set() for source in fully_labelled}
    for path in paths:
        for row in pq.ParquetFile(path).read(columns=columns).to_pylist():
            if row["source"] in used:
                used[row["source"]].update(row["present"], row["absent"], row["uncertain"])
    for source in (source for source, labels in used.items() if not labels):
        logger.warning("fully_labelled names the source %r, of which there is no labelled row.", source)
    features = datasets.Features({"absent": FEATURES["absent"]})
    completed = rows.select_columns(columns).map(
        lambda row: {"absent": completed_absent(row, used)},
        remove_columns=columns,
        features=features,
        desc="Completing labels",
    )
    return datasets.concatenate_datasets([rows.remove_columns("absent"), completed], axis=1)


def read_manifest(
    path: str | os.PathLike,
    split: str | None = None,
    drop_unlabelled: bool = False,
    fully_labelled: Sequence[str] = (),
) -> datasets.Dataset:
    """The rows of a table (`read_csv_manifest`, which explains the arguments) or of a prepared folder.

    A prepared folder has no rows without text and labels, so there is nothing to drop.
    """
    if Path(path).is_dir():
        return read_prepared(path, split, fully_labelled)
    return read_csv_manifest(path, split, drop_unlabelled=drop_unlabelled, fully_labelled=fully_labelled)


def concatenate_rows(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """One dataset; a column beyond `FEATURES` stays if all parts have it."""
    common = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    return datasets.concatenate_datasets([part.select_columns(common) for part in parts])

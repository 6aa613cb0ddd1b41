"""The one row that every dataset becomes, and the checks that hold for all of them.

A manifest is a `datasets.Dataset` with the columns of `FEATURES`:

| column | value |
| --- | --- |
| `row_id` | unique name of the row |
| `image` | `{"path": str or None, "bytes": bytes or None}`, not decoded; None for a text-only row |
| `report` | text, or None for an unpaired row; never empty |
| `present`, `absent`, `uncertain` | canonical labels (`MMCLIP.text.vocabulary`); one in none of them is unknown |
| `patient_id`, `study_id`, `view`, `split`, `source` | strings, "" where unknown |
| `masks` | lesion masks as `{"finding", "side", "png"}`, `png` holding a one-channel PNG; [] where none |
| `boxes` | lesions as `{"finding", "x", "y", "width", "height"}`, pixels of `image`, (x, y) upper left; [] where none |

`view` is "PA", "AP", "LATERAL" or "OTHER" in the readers of public sets; a table of one's own may say what it likes.
`split` is "train", "val", "test" or "".
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence

import datasets
import numpy as np
import pyarrow as pa

from ..text.vocabulary import canonical_label


FEATURES = datasets.Features(
    {
        "row_id": datasets.Value("string"),
        "image": datasets.Image(decode=False),
        "report": datasets.Value("string"),
        "present": datasets.List(datasets.Value("string")),
        "absent": datasets.List(datasets.Value("string")),
        "uncertain": datasets.List(datasets.Value("string")),
        "patient_id": datasets.Value("string"),
        "study_id": datasets.Value("string"),
        "view": datasets.Value("string"),
        "split": datasets.Value("string"),
        "source": datasets.Value("string"),
        "masks": datasets.List(
            {
                "finding": datasets.Value("string"),
                "side": datasets.Value("string"),
                "png": datasets.Value("binary"),
            }
        ),
        "boxes": datasets.List(
            {
                "finding": datasets.Value("string"),
                "x": datasets.Value("float32"),
                "y": datasets.Value("float32"),
                "width": datasets.Value("float32"),
                "height": datasets.Value("float32"),
            }
        ),
    }
)
# what a recogniser finds in `report`: a further column of prepared data sets, and of samples
ENTITIES = datasets.List(
    {
        "start": datasets.Value("int32"),
        "end": datasets.Value("int32"),
        "concept": datasets.Value("string"),
        "kind": datasets.Value("string"),
        "assertion": datasets.Value("string"),
        "cue_start": datasets.Value("int32"),
        "cue_end": datasets.Value("int32"),
    }
)
# a dataset made elsewhere may lack these
OPTIONAL = ("study_id", "masks", "boxes")


def make_row(
    row_id: str,
    image: str | os.PathLike | bytes | None,
    *,
    source: str,
    report: str | None = None,
    present: Sequence[str] = (),
    absent: Sequence[str] = (),
    uncertain: Sequence[str] = (),
    patient_id: str = "",
    study_id: str = "",
    view: str = "",
    split: str = "",
    masks: Sequence[dict] = (),
    boxes: Sequence[dict] = (),
) -> dict:
    """One manifest row; `image` is a path or encoded bytes, labels are canonical. Nothing is checked here."""
    if isinstance(image, bytes):
        image = {"path": None, "bytes": image}
    elif image is not None:
        image = {"path": os.fspath(image), "bytes": None}
    return {
        "row_id": row_id,
        "image": image,
        "report": report,
        "present": list(present),
        "absent": list(absent),
        "uncertain": list(uncertain),
        "patient_id": patient_id,
        "study_id": study_id,
        "view": view,
        "split": split,
        "source": source,
        "masks": list(masks),
        "boxes": list(boxes),
    }


def rows_to_dataset(rows: Iterable[dict], chunk_size: int = 10_000) -> datasets.Dataset:
    """Rows of `make_row` as a dataset with `FEATURES`; only one chunk of them is held as Python objects.

    Its fingerprint, by which `datasets` names what it caches, depends on the content alone.
    """
    rows, tables = iter(rows), [FEATURES.arrow_schema.empty_table()]
    digest = hashlib.blake2b(digest_size=8)
    while chunk := list(itertools.islice(rows, chunk_size)):
        table = pa.Table.from_pylist(chunk, schema=FEATURES.arrow_schema)
        for column in table.columns:
            for buffer in column.combine_chunks().buffers():
                digest.update(b"-" if buffer is None else buffer)
        tables.append(table)
    # left to itself, `datasets` would pickle the whole table for this
    return datasets.Dataset(pa.concat_tables(tables), fingerprint=digest.hexdigest())


def has_image(rows: datasets.Dataset) -> np.ndarray:
    """Which rows have an image, (n,) bool; neither pictures nor their bytes are read into Python."""
    found = [np.zeros(0, dtype=bool)]
    for table in rows.select_columns("image").with_format("arrow").iter(batch_size=1000):
        found += [chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in table["image"].chunks]
    return np.concatenate(found)


def check_rows(*rows: datasets.Dataset, where: str = "") -> None:
    """Check datasets of manifest rows, each alone and all together, before anything is trained or measured on them.

    Raises ValueError, beginning with `where` and naming the row, for: a missing column; an empty `row_id` or one that
    occurs twice; an empty report; a row with neither report nor labels, or with neither image nor report; an image file
    that does not exist; a label that is not canonical, or stated two ways; a patient of one source in two splits.
    Patients and splits are compared across all datasets given; "" is nobody. Pixels are not read.
    """
    prefix = f"{where}: " if where else ""
    seen_ids: set[str] = set()
    seen_labels: set[str] = set()
    split_of: dict[tuple[str, str], tuple[str, str]] = {}
    for dataset in rows:
        missing = [name for name in FEATURES if name not in dataset.column_names and name not in OPTIONAL]
        if missing:
            raise ValueError(
                f"{prefix}a manifest lacks the columns {missing}, it has {dataset.column_names}. "
                "Read it with MMCLIP.data.readers, or build it with `features=FEATURES`."
            )
        # Arrow batches: neither image bytes nor masks become Python objects
        columns = dataset.select_columns([name for name in FEATURES if name not in OPTIONAL]).with_format("arrow")
        for table in columns.iter(batch_size=1000):
            images = table["image"].chunks  # to combine them would copy the pictures
            pictured = [valid for chunk in images for valid in chunk.is_valid().to_pylist()]
            has_bytes = [valid for chunk in images for valid in chunk.field("bytes").is_valid().to_pylist()]
            paths = [path for chunk in images for path in chunk.field("path").to_pylist()]
            for index, row in enumerate(table.drop_columns(["image"]).to_pylist()):
                at = f"{prefix}row {row['row_id']!r}"
                check_row(row, at, pictured[index], seen_ids, seen_labels)
                if pictured[index] and not has_bytes[index] and not (paths[index] and os.path.isfile(paths[index])):
                    raise ValueError(
                        f"{at}: the image file {paths[index]!r} does not exist. Restore it or drop the row."
                    )
                if row["patient_id"]:
                    patient = (row["source"] or "", row["patient_id"])
                    split, row_id = split_of.setdefault(patient, (row["split"], row["row_id"]))
                    if split != row["split"]:
                        raise ValueError(
                            f"{at}: patient {row['patient_id']!r} is in split {row['split']!r} here and in {split!r} "
                            f"at row {row_id!r}. Split by patient, not by image."
                        )


def check_row(row: dict, at: str, has_image: bool, seen_ids: set[str], seen_labels: set[str]) -> None:
    """What `check_rows` checks in a row alone. `at` begins its messages; the sets are filled and must go along."""
    if not row["row_id"]:
        raise ValueError(f"{at}: `row_id` is empty; every row needs a unique one.")
    if row["row_id"] in seen_ids:
        raise ValueError(f"{at}: `row_id` occurs twice; every row needs a unique one.")
    seen_ids.add(row["row_id"])
    if row["report"] is not None and not row["report"].strip():
        raise ValueError(f"{at}: `report` is empty. Use None for an unpaired row, so that its labels are trained on.")
    stated: dict[str, str] = {}
    for column in ("present", "absent", "uncertain"):
        for label in row[column] or ():
            if label not in seen_labels:
                if canonical_label(label, where=f"{at}, `{column}`") != label:
                    raise ValueError(
                        f"{at}: `{column}` has {label!r}, whose canonical name is {canonical_label(label)!r}. "
                        "Pass labels through `canonical_label`."
                    )
                seen_labels.add(label)
            if stated.setdefault(label, column) != column:
                raise ValueError(f"{at}: {label!r} is in `{stated[label]}` and in `{column}`; keep one of them.")
    if row["report"] is None and not (row["present"] or row["absent"]):
        raise ValueError(f"{at} has neither a report nor labels, so there is nothing to learn from it. Drop it.")
    if row["report"] is None and not has_image:
        raise ValueError(f"{at} has neither an image nor a report. Drop it.")

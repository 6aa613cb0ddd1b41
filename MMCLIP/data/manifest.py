"""The one row that every dataset becomes, and the checks that hold for all of them.

A manifest is a `datasets.Dataset` with the columns of `FEATURES`:

| column | value |
| --- | --- |
| `row_id` | unique name of the row |
| `image` | `{"path": str or None, "bytes": bytes or None}`, not decoded; None for a text-only row |
| `report` | text, or None for an unpaired row; never empty |
| `present`, `absent`, `uncertain` | canonical labels (`MMCLIP.text.vocabulary`); one in none of them is unknown |
| `patient_id`, `view`, `split`, `source` | strings, "" where unknown |
| `masks` | lesion masks as `{"finding", "side", "png"}`, `png` holding a one-channel PNG; [] where none |
"""

import os

import datasets

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
    }
)


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
        missing = [name for name in FEATURES if name not in dataset.column_names and name != "masks"]
        if missing:
            raise ValueError(
                f"{prefix}a manifest lacks the columns {missing}, it has {dataset.column_names}. "
                "Read it with MMCLIP.data.readers, or build it with `features=FEATURES`."
            )
        # Arrow batches: neither image bytes nor masks become Python objects
        columns = dataset.select_columns([name for name in FEATURES if name != "masks"]).with_format("arrow")
        for table in columns.iter(batch_size=1000):
            images = table["image"].combine_chunks()
            has_image = images.is_valid().to_pylist()
            has_bytes = images.field("bytes").is_valid().to_pylist()
            paths = images.field("path").to_pylist()
            for index, row in enumerate(table.drop_columns(["image"]).to_pylist()):
                at = f"{prefix}row {row['row_id']!r}"
                _check_row(row, at, has_image[index], seen_ids, seen_labels)
                if has_image[index] and not has_bytes[index] and not (paths[index] and os.path.isfile(paths[index])):
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


def _check_row(row: dict, at: str, has_image: bool, seen_ids: set[str], seen_labels: set[str]) -> None:
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

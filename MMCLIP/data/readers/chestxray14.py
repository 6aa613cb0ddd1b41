"""NIH ChestX-ray14: `source_rows("chestxray14", "/data/ChestX-ray14")`.

The folder holds `Data_Entry_2017_v2020.csv` (or the older `Data_Entry_2017.csv`), `test_list.txt`, if there
`train_val_list.txt` and `BBox_List_2017.csv`, and the images in `images_001/images` to `images_012/images` or `images`.
The official split is kept; `val_share` of the patients of its train_val part become "val", by a hash of their number.
The labels are text-mined but complete: of the 14, what is not listed is absent.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ...text.vocabulary import canonical_label
from ..manifest import make_row
from .tables import (
    VIEWS,
    Report,
    Unique,
    complete_labels,
    find_file,
    find_optional,
    hashed_share,
    labels_of,
    raise_problem,
    read_table,
)


# the order of the published lists
LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip


def chestxray14_rows(
    folder: str | os.PathLike, *, report_problem: Report = raise_problem, val_share: float = 0.05
) -> Iterator[dict]:
    """Unpaired rows with complete labels, the official test list as "test", and the boxes of 984 lesions."""
    folder = Path(folder)
    table = find_file(folder, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    test = set(find_file(folder, "test_list.txt").read_text(encoding="utf-8").split())
    train_list = find_optional(folder, "train_val_list.txt")
    train = set(train_list.read_text(encoding="utf-8").split()) if train_list else None
    boxes = _boxes(folder, report_problem)
    files = {path.name: path for path in folder.glob("images_*/images/*.png")}
    all_labels = [canonical_label(name) for name in LABELS]
    unique = Unique()
    for where, record in read_table(
        table, ["Image Index", "Finding Labels", "Patient ID", "View Position"], report_problem=report_problem
    ):
        name, patient = record["Image Index"], record["Patient ID"]
        if unique.seen(name):
            report_problem(where, f"image {name!r} occurs twice")
            continue
        found = [label for label in record["Finding Labels"].split("|") if label]
        labels = labels_of(where, report_problem, present=found)
        if labels is None:
            continue
        if name in test:
            split = "test"
        elif train is not None and name not in train:
            report_problem(where, f"image {name!r} is in neither test_list.txt nor train_val_list.txt")
            continue
        else:
            split = "val" if hashed_share("chestxray14", patient) < val_share else "train"
        yield make_row(
            f"chestxray14/{name}",
            files.get(name, folder / "images" / name),
            source="chestxray14",
            **complete_labels(labels, all_labels),
            patient_id=patient,
            view=VIEWS.get(record["View Position"], ""),
            split=split,
            boxes=boxes.get(name, ()),
        )


def _boxes(folder: Path, report_problem: Report) -> dict[str, list[dict]]:
    """Image -> its boxes, in pixels of the 1024 x 1024 PNG; the header "Bbox [x,y,w,h]" splits at its commas."""
    table = find_optional(folder, "BBox_List_2017.csv")
    if table is None:
        return {}  # the set is used without it, too
    boxes = defaultdict(list)
    columns = {"x": ["Bbox [x"], "height": ["h]"], "y": [], "width": ["w"]}
    for where, record in read_table(
        table, ["Image Index", "Finding Label", *columns], aliases=columns, report_problem=report_problem
    ):
        try:
            box = {name: float(record[name]) for name in ("x", "y", "width", "height")}
            finding = canonical_label(record["Finding Label"])
        except ValueError as error:
            report_problem(where, str(error))
            continue
        boxes[record["Image Index"]].append({"finding": finding, **box})
    return boxes

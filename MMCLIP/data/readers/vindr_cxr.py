"""VinDr-CXR: `source_rows("vindr-cxr", "/data/vindr-cxr/1.0.0")`.

Either the PhysioNet layout (`annotations/*.csv`, `train/<image_id>.dicom`, `test/<image_id>.dicom`; its official split
is kept) or that of Kaggle's VinBigData (`train.csv`, `train/<image_id>.dicom`; its test set has no labels, so all of it
is "train"). Where the images are .png or .jpg files they may be of another size than the boxes are in, so there are no
boxes then. No patient numbers were published: each image counts as a patient.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from ...text.vocabulary import NO_FINDING, canonical_label, has_no_concept
from ..manifest import make_row
from .tables import Report, complete_labels, find_file, labels_of, raise_problem, read_table


NUM_READERS = 3
LOCAL = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture",
)  # fmt: skip
GLOBAL = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "No finding")
KAGGLE = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis",
)  # fmt: skip


def vindr_cxr_rows(
    folder: str | os.PathLike, *, report_problem: Report = raise_problem, labels: str = "majority"
) -> Iterator[dict]:
    """Unpaired rows with complete labels and boxes in pixels of the original image.

    Three readers saw each training image: present is what two of them (`labels="majority"`) or one (`"any"`) saw, and
    with "majority" what one saw is uncertain. The test set holds their consensus. All boxes that were drawn are kept.
    """
    if labels not in ("majority", "any"):
        raise ValueError(f"labels is {labels!r}, expected 'majority' or 'any'.")
    folder = Path(folder)
    if not (folder / "annotations").is_dir():
        table = find_file(folder, "train.csv")
        votes, boxes = _kaggle_votes(table, report_problem)
        yield from _rows(folder, "train", table, votes, boxes, KAGGLE, NUM_READERS, labels, report_problem)
        return
    for split, num_readers in (("train", NUM_READERS), ("test", 1)):
        table = find_file(folder, f"annotations/image_labels_{split}.csv")
        votes = _votes(table, report_problem)
        boxes = _boxes(find_file(folder, f"annotations/annotations_{split}.csv"), report_problem)
        yield from _rows(folder, split, table, votes, boxes, LOCAL + GLOBAL, num_readers, labels, report_problem)


def _rows(folder, split, table, votes, boxes, classes, num_readers, policy, report_problem) -> Iterator[dict]:
    complete = [label for name in classes if (label := canonical_label(name)) != NO_FINDING]
    ending = next((e for e in (".dicom", ".dcm", ".png", ".jpg") if any((folder / split).glob(f"*{e}"))), ".dicom")
    needed = num_readers // 2 + 1 if policy == "majority" else 1
    if ending not in (".dicom", ".dcm"):
        boxes = {}
    for name, (readers, counts) in votes.items():
        where = f"{table}: {name}"
        if len(readers) != num_readers:
            report_problem(where, f"{len(readers)} readers, expected {num_readers}")
            continue
        present = [label for label in complete if counts[label] >= needed]
        uncertain = [label for label in complete if 0 < counts[label] < needed]
        if not present and counts[NO_FINDING] >= needed:
            present = [NO_FINDING]
        found = labels_of(where, report_problem, present=present, uncertain=uncertain)
        if found is None:
            continue
        yield make_row(
            f"vindr-cxr/{name}",
            folder / split / f"{name}{ending}",
            source="vindr-cxr",
            **complete_labels(found, complete),
            patient_id=name,
            split=split,
            boxes=boxes.get(name, ()),
        )


def _votes(table: Path, report_problem: Report) -> dict[str, tuple[list[str], Counter]]:
    """Image -> its readers, and how many of them saw what; blank cells are 0."""
    votes: dict[str, tuple[list[str], Counter]] = defaultdict(lambda: ([], Counter()))
    names = [*LOCAL, *GLOBAL]
    for where, record in read_table(table, ["image_id", *names], optional=["rad_id"], report_problem=report_problem):
        if any(record[name] not in ("", "0", "1", "0.0", "1.0") for name in names):
            report_problem(where, "a label is neither 0 nor 1 nor blank")
            continue
        readers, counts = votes[record["image_id"]]
        reader = record.get("rad_id", "consensus")
        if reader in readers:
            report_problem(where, f"reader {reader!r} is there twice for this image")
            continue
        readers.append(reader)
        counts.update({canonical_label(name) for name in names if record[name] in ("1", "1.0")})
    return votes


def _boxes(table: Path, report_problem: Report) -> dict[str, list[dict]]:
    columns = ["image_id", "class_name", "x_min", "y_min", "x_max", "y_max"]
    boxes = defaultdict(list)
    for where, record in read_table(table, columns, report_problem=report_problem):
        if record["x_min"] and not has_no_concept(record["class_name"]):
            _add_box(boxes, where, record, report_problem)
    return boxes


def _add_box(boxes: dict[str, list[dict]], where: str, record: dict[str, str], report_problem: Report) -> None:
    try:
        left, top, right, bottom = (float(record[name]) for name in ("x_min", "y_min", "x_max", "y_max"))
        finding = canonical_label(record["class_name"])
    except ValueError as error:
        report_problem(where, str(error))
        return
    box = {"finding": finding, "x": left, "y": top, "width": right - left, "height": bottom - top}
    boxes[record["image_id"]].append(box)


def _kaggle_votes(table: Path, report_problem: Report) -> tuple[dict[str, tuple[list[str], Counter]], dict]:
    """The same from the one Kaggle table, which has a line for each box and "No finding" lines without one."""
    seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    boxes = defaultdict(list)
    columns = ["image_id", "class_name", "rad_id", "x_min", "y_min", "x_max", "y_max"]
    for where, record in read_table(table, columns, report_problem=report_problem):
        found = seen[record["image_id"]][record["rad_id"]]
        if has_no_concept(record["class_name"]):
            continue
        if record["class_name"] not in (*KAGGLE, "No finding"):
            report_problem(where, f"unknown `class_name` {record['class_name']!r}")
            continue
        found.add(canonical_label(record["class_name"]))
        if record["x_min"]:
            _add_box(boxes, where, record, report_problem)
    votes = {
        name: (list(readers), Counter(label for found in readers.values() for label in found))
        for name, readers in seen.items()
    }
    return votes, boxes

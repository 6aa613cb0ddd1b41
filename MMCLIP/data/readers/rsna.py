"""RSNA Pneumonia Detection Challenge 2018: `source_rows("rsna", "/data/rsna-pneumonia")`.

The folder holds `stage_2_train_labels.csv`, `stage_2_detailed_class_info.csv` (optional), `stage_2_train_images`. The
labels of the stage 2 test images were not published there, so those are no rows. There is no official split: `split` is
"" and preparation assigns one by patient. All films are in ChestX-ray14 too.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ...text.vocabulary import NO_FINDING
from ..manifest import make_row
from .tables import Report, find_file, raise_problem, read_table


DETAILED_CLASSES = ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")


def rsna_rows(folder: str | os.PathLike, *, report_problem: Report = raise_problem) -> Iterator[dict]:
    """Unpaired rows, one a film (the table has one line a box): pneumonia present with its boxes, or absent.

    The detailed class "Normal" becomes "no finding". Boxes are in pixels of the 1024 x 1024 image.
    """
    folder = Path(folder)
    details = _details(folder, report_problem)
    films: dict[str, dict] = {}
    table = find_file(folder, "stage_2_train_labels.csv")
    for where, record in read_table(
        table, ["patientId", "x", "y", "width", "height", "Target"], report_problem=report_problem
    ):
        name, target = record["patientId"], record["Target"]
        if target not in ("0", "1") or films.get(name, {}).get("target", target) != target:
            report_problem(where, f"`Target` of {name!r} is {target!r}, expected 0 or 1 and the same on each line")
            continue
        film = films.setdefault(name, {"target": target, "boxes": []})
        if target == "1":
            try:
                box = {key: float(record[key]) for key in ("x", "y", "width", "height")}
            except ValueError:
                report_problem(where, f"`Target` is 1, but the box is not four numbers: {record}")
                continue
            film["boxes"].append({"finding": "pneumonia", **box})
    for name, film in films.items():
        is_present = film["target"] == "1"
        detail = details.get(name, "")
        if detail and (detail == "Lung Opacity") != is_present:
            report_problem(f"{table}: {name}", f"`Target` is {film['target']}, but the detailed class is {detail!r}")
            continue
        normal = [NO_FINDING] if detail == "Normal" else []
        yield make_row(
            f"rsna/{name}",
            folder / "stage_2_train_images" / f"{name}.dcm",
            source="rsna",
            present=["pneumonia"] if is_present else normal,
            absent=[] if is_present else ["pneumonia"],
            patient_id=name,
            boxes=film["boxes"],
        )


def _details(folder: Path, report_problem: Report) -> dict[str, str]:
    try:
        table = find_file(folder, "stage_2_detailed_class_info.csv")
    except ValueError:
        return {}
    details = {}
    for where, record in read_table(table, ["patientId", "class"], report_problem=report_problem):
        if record["class"] not in DETAILED_CLASSES:
            report_problem(where, f"`class` is {record['class']!r}, expected one of {DETAILED_CLASSES}")
        else:
            details[record["patientId"]] = record["class"]
    return details

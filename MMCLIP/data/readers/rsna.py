"""RSNA Pneumonia Detection Challenge 2018: `source_rows("rsna", "/data/rsna-pneumonia")`.

The folder holds `stage_2_train_labels.csv`, `stage_2_train_images` and, if there, `stage_2_detailed_class_info.csv` and
`pneumonia-challenge-dataset-mappings_2018.json`. The labels of the stage 2 test images were not published there, so
those are no rows. There is no official split: `split` is "" and preparation assigns one by patient. All films are
ChestX-ray14 films; which, and so of which patient, only the mapping tells: without it each film counts as a patient.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ...text.vocabulary import NO_FINDING
from ..manifest import make_row
from .tables import Report, find_file, find_optional, raise_problem, read_table


CLASSES = {  # detailed class -> (present, absent)
    "Lung Opacity": (["pneumonia"], [NO_FINDING]),
    "No Lung Opacity / Not Normal": ([], ["pneumonia", NO_FINDING]),
    "Normal": ([NO_FINDING], ["pneumonia"]),
}


def rsna_rows(folder: str | os.PathLike, *, report_problem: Report = raise_problem) -> Iterator[dict]:
    """Unpaired rows, one a film (the table has one line a box): pneumonia present with its boxes, or absent.

    The detailed class "Normal" becomes "no finding", which is absent in the other two classes. Boxes are in pixels of
    the 1024 x 1024 image.
    """
    folder = Path(folder)
    details = _details(folder, report_problem)
    patients = _patients(folder)
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
        present, absent = CLASSES[detail or "Lung Opacity"] if detail or is_present else ([], ["pneumonia"])
        yield make_row(
            f"rsna/{name}",
            folder / "stage_2_train_images" / f"{name}.dcm",
            source="rsna",
            present=present,
            absent=absent,
            patient_id=patients.get(name, name),
            boxes=film["boxes"],
        )


def _details(folder: Path, report_problem: Report) -> dict[str, str]:
    table = find_optional(folder, "stage_2_detailed_class_info.csv")
    if table is None:
        return {}
    details = {}
    for where, record in read_table(table, ["patientId", "class"], report_problem=report_problem):
        if record["class"] not in CLASSES:
            report_problem(where, f"`class` is {record['class']!r}, expected one of {', '.join(CLASSES)}")
        else:
            details[record["patientId"]] = record["class"]
    return details


def _patients(folder: Path) -> dict[str, str]:
    """Film -> patient number of ChestX-ray14, whose file names begin with it."""
    path = folder / "pneumonia-challenge-dataset-mappings_2018.json"
    if not path.is_file():
        return {}
    try:
        films = json.loads(path.read_text(encoding="utf-8"))
        return {film["subset_img_id"]: str(int(film["img_id"].split("_")[0])) for film in films}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a list of objects with `subset_img_id` and `img_id` (00000001_000.png): {error!r}"
        ) from error

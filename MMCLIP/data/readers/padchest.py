"""PadChest (BIMCV): `source_rows("padchest", "/data/PadChest")`.

The folder holds `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv` and the images as `<ImageDir>/<ImageID>` (16-bit
PNG). Its reports are stemmed Spanish and are not used: the set is unpaired. There is no official split; the films that
a physician labelled (`MethodLabel`) are the usual test set, so they are "test" and the others, labelled by a network,
"" (preparation assigns train and val by patient; patients who have a film in the test part are left out of the rest).
"""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

from ...text.vocabulary import NO_FINDING
from ..manifest import make_row
from .tables import LEFT_OUT, VIEWS, Report, Unique, find_file, labels_of, raise_problem, read_table


# say nothing about what the film shows (or that it shows nothing new), or are normal variants
IGNORED = frozenset(
    "unchanged|exclude|suboptimal study|nipple shadow|end on vessel|pseudonodule|azygos lobe|cervical rib|obesity|"
    "major fissure thickening|minor fissure thickening|fissure thickening|azygoesophageal recess shift|"
    "lipomatosis|mediastinic lipomatosis|surgery|surgery neck|surgery breast|bronchovascular markings|"
    "electrical device|abnormal foreign body|external foreign body|bone cement|metal|prosthesis|endoprosthesis".split(
        "|"
    )
)
_TABLES = ("PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", "PADCHEST_chest_x_ray_images_labels_160K.csv")


def padchest_rows(
    folder: str | os.PathLike, *, report_problem: Report = raise_problem, method: str = "all"
) -> Iterator[dict]:
    """Unpaired rows; `method` "physician" or "all".

    Only what is listed is known: a finding that is not listed is unknown, and "normal" is "no finding". Rows without
    labels, and rows with none but those of `IGNORED`, go to `report_problem`.
    """
    if method not in ("physician", "all"):
        raise ValueError(f"method is {method!r}, expected 'physician' or 'all'.")
    folder = Path(folder)
    table = find_file(folder, *_TABLES)
    columns = ["ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "MethodLabel", "Labels"]
    physician_patients = {
        record["PatientID"]
        for _, record in read_table(table, ["PatientID", "MethodLabel"], report_problem=lambda where, reason: None)
        if record["MethodLabel"] == "Physician"
    }
    unique = Unique()
    for where, record in read_table(table, columns, report_problem=report_problem):
        is_physician = record["MethodLabel"] == "Physician"
        if method == "physician" and not is_physician:
            continue
        name = record["ImageID"]
        if unique.seen(name):
            report_problem(where, f"image {name!r} occurs twice")
            continue
        if record["PatientID"] in physician_patients and not is_physician:
            report_problem(
                where, LEFT_OUT + "another film of this patient is in the test part (labelled by a physician)"
            )
            continue
        if record["Labels"] in ("", "nan"):
            report_problem(where, LEFT_OUT + "no labels")
            continue
        found = parse_labels(record["Labels"])
        if found is None:
            report_problem(where, f"`Labels` is {record['Labels']!r}, expected a list such as ['normal']")
            continue
        usable = [label for label in found if label and label not in IGNORED]
        if not usable:
            report_problem(
                where, f"{LEFT_OUT}no label that says what the film shows: {', '.join(found) or 'none at all'}"
            )
            continue
        findings = [label for label in usable if label != "normal"]
        labels = labels_of(where, report_problem, present=findings or [NO_FINDING])
        if labels is None:
            continue
        yield make_row(
            f"padchest/{name}",
            folder / record["ImageDir"] / name,
            source="padchest",
            **labels,
            patient_id=record["PatientID"],
            study_id=record["StudyID"],
            view=VIEWS.get(record["Projection"].upper(), "OTHER" if record["Projection"] else ""),
            split="test" if is_physician else "",
        )


def parse_labels(text: str) -> list[str] | None:
    """`"['normal', ' pneumonia']"` -> stripped names; None for anything but a list of strings."""
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return [name.strip() for name in names]

"""PadChest (BIMCV): `source_rows("padchest", "/data/PadChest")`.

The folder holds `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv` (or .csv.gz) and the images as
`<ImageDir>/<ImageID>` (16-bit PNG). Its reports are stemmed Spanish and are not used: the set is unpaired. There is no
official split; the films that a physician labelled (`MethodLabel`) are the usual test set, so they are "test" and the
others, labelled by a network, "" (preparation assigns train and val by patient).
"""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

from ...text.vocabulary import NO_FINDING, has_no_concept
from ..manifest import make_row
from .tables import LEFT_OUT, VIEWS, Report, Unique, find_file, labels_of, raise_problem, read_table


# name -> (present, uncertain), where a name says less, or something else, than the label it reminds of
MEANINGS = {
    "alveolar pattern": (["lung opacity"], ["consolidation"]),
    "costophrenic angle blunting": (["costophrenic angle blunting"], ["pleural effusion"]),
    "lung vascular paucity": (["pulmonary oligemia"], ["hyperinflation"]),
    "respiratory distress": ([], ["ards"]),
    "tuberculosis sequelae": (["tuberculosis sequelae"], ["tuberculosis"]),
    "volume loss": (["volume loss"], ["atelectasis"]),
}
_TABLES = ("PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", "PADCHEST_chest_x_ray_images_labels_160K.csv")


def padchest_rows(
    folder: str | os.PathLike, *, report_problem: Report = raise_problem, method: str = "all", test: str = "physician"
) -> Iterator[dict]:
    """Unpaired rows; `method` is "all" or "physician", the latter for those films alone.

    With `test` "physician" those films are the test part, and the other films of their patients are left out. With
    "none" there is no test part: every film is for preparation to share out by patient.

    Only what is listed is known: a finding that is not listed is unknown, and "normal" is "no finding". Rows without
    labels, with "exclude", and with none but those without a concept go to `report_problem`.
    """
    if method not in ("physician", "all"):
        raise ValueError(f"method is {method!r}, expected 'physician' or 'all'.")
    if test not in ("physician", "none"):
        raise ValueError(f"test is {test!r}, expected 'physician' or 'none'.")
    folder = Path(folder)
    table = find_file(folder, *_TABLES)
    columns = ["ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "MethodLabel", "Labels"]
    test_patients = set()
    if test == "physician":
        records = read_table(table, ["PatientID", "MethodLabel"], report_problem=lambda where, reason: None)
        test_patients = {record["PatientID"] for _, record in records if record["MethodLabel"] == "Physician"}
    unique = Unique()
    for where, record in read_table(table, columns, report_problem=report_problem):
        is_physician = record["MethodLabel"] == "Physician"
        if method == "physician" and not is_physician:
            continue
        name = record["ImageID"]
        if unique.seen(name):
            report_problem(where, f"image {name!r} occurs twice")
            continue
        if record["PatientID"] in test_patients and not is_physician:
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
        usable = [label for label in found if not has_no_concept(label)]
        if not usable or "exclude" in found:
            names = ", ".join(filter(None, found)) or "none at all"
            report_problem(where, f"{LEFT_OUT}no label that says what the film shows: {names}")
            continue
        present = [name for label in usable if label != "normal" for name in MEANINGS.get(label, ([label],))[0]]
        uncertain = [name for label in usable if label in MEANINGS for name in MEANINGS[label][1]]
        if not present and "normal" in usable:
            present = [NO_FINDING]
        if not present:
            report_problem(where, f"{LEFT_OUT}no label that is certain: {', '.join(usable)}")
            continue
        labels = labels_of(where, report_problem, present=present, uncertain=uncertain)
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
            split="test" if is_physician and test == "physician" else "",
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

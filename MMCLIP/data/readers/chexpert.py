"""CheXpert v1.0 and v1.0-small: `source_rows("chexpert", "/data/CheXpert-v1.0-small")`.

The folder holds `train.csv`, `valid.csv` (its CheXlocalize names `val.csv` and `val_labels.csv` too) and the labels of
the test set as `test_labels.csv` or `groundtruth.csv`, or some of them; `Path` in them begins with the name of the
folder as it was published, which is taken off. It may also hold the four folders "CheXpert-v1.0 batch 1 (validate &
csv)" to "batch 4 (train 3)" as they are downloaded, which have no `train` around their patients. The official parts are
kept: train.csv is "train", valid.csv "val", the test set "test".
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ...text.vocabulary import canonical_label
from ..manifest import make_row
from .tables import (
    LEFT_OUT,
    Report,
    Unique,
    chexpert_labels,
    complete_labels,
    find_file,
    find_optional,
    hashed_share,
    raise_problem,
    read_table,
)


LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
FILE = re.compile(r"\w+/(patient\d+)/(study\d+)/([^/]+)\.\w+")
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
FILMS_A_CLASS = 200  # of a CheXpert 5x200 selection
PARTS = {
    "train": ("train.csv",),
    "val": ("valid.csv", "val.csv", "val_labels.csv"),
    "test": ("test_labels.csv", "groundtruth.csv", "test.csv"),
}


def chexpert_rows(
    folder: str | os.PathLike, *, report_problem: Report = raise_problem, selection: str = ""
) -> Iterator[dict]:
    """Unpaired rows, one an image; the uncertain stay uncertain.

    A row whose labels are all blank or uncertain goes to `report_problem`: there is nothing to learn from it.

    `selection` takes a test set out of train.csv, in place of the official one: "5x200" (see `select_5x200`) or the
    path of a CSV with a column `Path` that names the films, such as the list of another author. These films are "test",
    and of the five classes those that they do not state are absent; the other films of their patients are left out.
    """
    folder = Path(folder)
    patient_folders = _patient_folders(folder)
    renamed = {"valid": "val"} if not (folder / "valid").is_dir() and (folder / "val").is_dir() else {}
    tables = {split: _table(folder, names) for split, names in PARTS.items()}
    if selection or not any(tables.values()):
        tables["train"] = tables["train"] or find_file(folder, *PARTS["train"])
    selected: set[str] = set()
    if selection:
        selected = select_5x200(tables["train"]) if selection == "5x200" else _listed(Path(selection))
        tables["test"] = None
    selected_patients = {file.split("/")[1] for file in selected}
    five = [canonical_label(name) for name in FIVE]
    unique = Unique()
    for split, table in tables.items():
        if table is None:
            continue
        for where, record in _records(table, report_problem):
            file = _strip(record["Path"])
            match = FILE.fullmatch(file)
            if match is None:
                report_problem(where, f"`Path` {record['Path']!r} is not .../patientN/studyN/viewN_name.jpg")
                continue
            if unique.seen(file):
                report_problem(where, f"image {file!r} occurs twice")
                continue
            patient, study, name = match.groups()
            is_selected = file in selected
            if patient in selected_patients and not is_selected:
                report_problem(where, f"{LEFT_OUT}another film of {patient} is in the selected test set")
                continue
            labels = chexpert_labels(where, record, LABELS, report_problem)
            if labels is None:
                continue
            if is_selected:
                labels = complete_labels(labels, five)
            if not labels["present"] and not labels["absent"]:
                report_problem(where, LEFT_OUT + ("no label is certain" if labels["uncertain"] else "no label"))
                continue
            yield make_row(
                f"chexpert/{file}",
                _image(folder, patient_folders, renamed, file),
                source="chexpert",
                **labels,
                patient_id=patient,
                study_id=f"{patient}/{study}",
                view=_view(record, name),
                split="test" if is_selected else split,
            )
    if missing := sorted(selected - unique.ids):
        raise ValueError(
            f"{selection}: {len(missing)} of {len(selected)} films are not in train.csv, as {missing[0]!r}."
        )


def select_5x200(table: Path) -> set[str]:
    """The 1,000 films of a CheXpert 5x200 test set (Huang et al. 2021, GLoRIA), 200 for each of `FIVE`, of train.csv.

    Candidates are the frontal films on which one of the five is 1 and every other label but "No Finding" 0 or blank
    (uncertain is neither). The authors drew theirs without a seed; these are those of the lowest hash of their name,
    the same on every machine, and not the authors' films.
    """
    chosen: set[str] = set()
    for name, files in candidates_5x200(table).items():
        if len(files) < FILMS_A_CLASS:
            raise ValueError(
                f"{table}: CheXpert 5x200 needs {FILMS_A_CLASS} films of each class, but there are {len(files)} of "
                f"{name!r}. Is the table complete?"
            )
        chosen.update(sorted(files, key=lambda file: hashed_share("chexpert 5x200", file))[:FILMS_A_CLASS])
    return chosen


def candidates_5x200(table: Path) -> dict[str, list[str]]:
    """Class -> films that a CheXpert 5x200 selection may draw."""
    candidates: dict[str, list[str]] = {name: [] for name in FIVE}
    others = [name for name in LABELS if name != "No Finding"]
    for _, record in _records(table, lambda where, reason: None):
        if record.get("Frontal/Lateral") == "Frontal":
            stated = [name for name in others if record[name] not in ("", "0.0", "0")]
            if len(stated) == 1 and stated[0] in candidates and float(record[stated[0]]) == 1:
                candidates[stated[0]].append(_strip(record["Path"]))
    return candidates


def _listed(table: Path) -> set[str]:
    files = set()
    for where, record in read_table(table, ["Path"]):
        files.add(_strip(record["Path"]))
        if FILE.fullmatch(_strip(record["Path"])) is None:
            raise ValueError(f"{where}: `Path` {record['Path']!r} is not .../patientN/studyN/viewN_name.jpg")
    return files


def _records(table: Path, report_problem: Report) -> Iterator[tuple[str, dict[str, str]]]:
    optional = ["Frontal/Lateral", "AP/PA"]
    return read_table(table, ["Path", *LABELS], optional=optional, report_problem=report_problem)


def _strip(path: str) -> str:
    """`CheXpert-v1.0-small/train/patient00001/...` -> `train/patient00001/...`"""
    return re.sub(r"^CheXpert[^/]*/", "", path)


def _batch_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("CheXpert-v1.0 batch *") if path.is_dir())


def _table(folder: Path, names: tuple[str, ...]) -> Path | None:
    found = (find_optional(place, *names) for place in (folder, *_batch_folders(folder)))
    return next(filter(None, found), None)


def _patient_folders(folder: Path) -> dict[str, str]:
    """Patient -> its folder, where the patients lie in batches; one look at each batch, not one at each image."""
    folders = {}
    for batch in _batch_folders(folder):
        for place in (batch, batch / "valid"):
            if place.is_dir():
                folders.update((name, f"{place}/{name}") for name in os.listdir(place) if name.startswith("patient"))
    return folders


def _image(folder: Path, patient_folders: dict[str, str], renamed: dict[str, str], file: str) -> str:
    part, patient, rest = file.split("/", 2)
    if patient in patient_folders:
        return f"{patient_folders[patient]}/{rest}"
    return f"{folder}/{renamed.get(part, part)}/{patient}/{rest}"


def _view(record: dict[str, str], name: str) -> str:
    """From the columns where there are some, else (test set) from the name of the file, which knows no AP and PA."""
    kind = record.get("Frontal/Lateral") or ("Lateral" if "lateral" in name.lower() else "Frontal")
    # 17 frontal films say LL or RL there; frontal is what a person saw
    return "LATERAL" if kind == "Lateral" else {"AP": "AP", "PA": "PA"}.get(record.get("AP/PA", ""), "")

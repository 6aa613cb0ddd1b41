"""CheXpert v1.0 and v1.0-small: `source_rows("chexpert", "/data/CheXpert-v1.0-small")`.

The folder holds `train.csv`, `valid.csv` (its CheXlocalize name `val.csv` too) and, if there, the labels of the test
set as `test_labels.csv` or `groundtruth.csv`; `Path` in them begins with the name of the folder as it was published,
which is taken off. The batches of the original download have no `train` folder around their patients; those are found
as well. The official parts are kept: train.csv is "train", valid.csv "val", the test set "test".
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..manifest import make_row
from .tables import LEFT_OUT, VIEWS, Report, Unique, chexpert_labels, find_file, raise_problem, read_table


LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
_BATCHES = ("CheXpert-v1.0 batch 2 (train 1)", "CheXpert-v1.0 batch 3 (train 2)", "CheXpert-v1.0 batch 4 (train 3)")


def chexpert_rows(folder: str | os.PathLike, *, report_problem: Report = raise_problem) -> Iterator[dict]:
    """Unpaired rows, one an image; the uncertain stay uncertain, and a row of blanks goes to `report_problem`."""
    folder = Path(folder)
    unique = Unique()
    for split, names in (
        ("train", ["train.csv"]),
        ("val", ["valid.csv", "val.csv", "val_labels.csv"]),
        ("test", ["test_labels.csv", "groundtruth.csv", "test.csv"]),
    ):
        try:
            table = find_file(folder, *names)
        except ValueError:
            if split == "train":
                raise
            continue
        for where, record in _records(table, report_problem):
            file = _strip(record["Path"])
            match = re.search(r"patient(\d+)/(study\d+)/(.+)\.\w+$", file)
            if match is None:
                report_problem(where, f"`Path` {record['Path']!r} is not .../patientN/studyN/viewN_name.jpg")
                continue
            if unique.seen(file):
                report_problem(where, f"image {file!r} occurs twice")
                continue
            labels = chexpert_labels(where, record, LABELS, report_problem)
            if labels is None:
                continue
            if not any(labels.values()):
                report_problem(where, LEFT_OUT + "all 14 labels are blank")
                continue
            patient = f"patient{match[1]}"
            yield make_row(
                f"chexpert/{file}",
                _image(folder, file),
                source="chexpert",
                **labels,
                patient_id=patient,
                study_id=f"{patient}/{match[2]}",
                view=_view(record, match[3]),
                split=split,
            )


def chexpert_5x200(folder: str | os.PathLike, seed: int = 0) -> list[str]:
    """The `row_id`s of a CheXpert 5x200 selection (Huang et al. 2021, GLoRIA), 200 films for each of `FIVE`.

    From the frontal films of train.csv, those on which one of the five is 1 and each other label but "No Finding" is 0
    or blank; 200 of each class are drawn with `seed`. The authors' own draw was not seeded, so the films differ from
    theirs. Keep the patients out of training: `split` of these rows is "train".
    """
    candidates: dict[str, list[str]] = {name: [] for name in FIVE}
    for _, record in _records(find_file(folder, "train.csv"), raise_problem):
        if record.get("Frontal/Lateral") != "Frontal":
            continue
        positive = [name for name in FIVE if record[name] == "1.0"]
        others = [record[name] for name in LABELS if name not in ("No Finding", *positive)]
        if len(positive) == 1 and all(value in ("", "0.0") for value in others):
            candidates[positive[0]].append(f"chexpert/{_strip(record['Path'])}")
    generator = np.random.default_rng(seed)
    few = {name: len(rows) for name, rows in candidates.items() if len(rows) < 200}
    if few:
        raise ValueError(f"{folder}: CheXpert 5x200 needs 200 films of each class, found {few}. Is train.csv complete?")
    return [name for rows in candidates.values() for name in generator.choice(rows, 200, replace=False).tolist()]


def _records(table: Path, report_problem: Report) -> Iterator[tuple[str, dict[str, str]]]:
    optional = ["Frontal/Lateral", "AP/PA"]
    return read_table(table, ["Path", *LABELS], optional=optional, report_problem=report_problem)


def _strip(path: str) -> str:
    """`CheXpert-v1.0-small/train/patient00001/...` -> `train/patient00001/...`"""
    return re.sub(r"^CheXpert[^/]*/", "", path)


def _image(folder: Path, file: str) -> str:
    # no look at the disk for the common layout: 223,414 of them take their time
    if (folder / file.split("/")[0]).is_dir():
        return f"{folder}/{file}"
    inner = file.split("/", 1)[1]
    for batch in _BATCHES:
        if (folder / batch / inner).is_file():
            return f"{folder}/{batch}/{inner}"
    return f"{folder}/{file}"


def _view(record: dict[str, str], name: str) -> str:
    """From the columns where there are some, else (test set) from the name of the file, which knows no AP and PA."""
    kind = record.get("Frontal/Lateral") or ("Lateral" if "lateral" in name.lower() else "")
    return "LATERAL" if kind == "Lateral" else VIEWS.get(record.get("AP/PA", ""), "")

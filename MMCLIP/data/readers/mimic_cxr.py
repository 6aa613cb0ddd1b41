"""MIMIC-CXR-JPG 2.0 and 2.1: `source_rows("mimic-cxr", "/data/MIMIC-CXR-JPG", labels="chexpert")`.

The folder holds `mimic-cxr-2.0.0-metadata.csv.gz`, `-split.csv.gz`, `-chexpert.csv.gz` (or `-negbio`), the images under
`files/p10/p10000032/s50414267/`, and the reports, which come with MIMIC-CXR, not with -JPG: `mimic_cxr_sectioned.csv`,
`mimic-cxr-reports.zip`, or what that holds, unpacked (`files/p10/p10000032/s50414267.txt`). `reports` names another
folder for them. The official split is kept. The images are histogram-equalised, those of other sets are not.
"""

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ...text.reports import TEXTS, report_sections, report_text
from ..manifest import make_row
from .tables import (
    LEFT_OUT,
    VIEWS,
    Report,
    Unique,
    chexpert_labels,
    decode_text,
    find_file,
    find_optional,
    raise_problem,
    read_table,
)


LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip
SPLITS = {"train": "train", "validate": "val", "test": "test"}
NO_TEXT = "none"  # reports are not looked for, every row is unpaired
_NO_LABELS: dict[str, list[str]] = {"present": [], "absent": [], "uncertain": []}


def mimic_cxr_rows(
    folder: str | os.PathLike,
    *,
    report_problem: Report = raise_problem,
    labels: str = "chexpert",
    text: str = "findings+impression",
    reports: str = "",
) -> Iterator[dict]:
    """Paired rows, one an image, with the report of its study and the study's labels.

    `labels`: "chexpert" or "negbio", the labeller; for the studies of `mimic-cxr-2.1.0-test-set-labeled.csv`, where it
    is there, the radiologist's labels instead. `text`: one of `TEXTS` in `MMCLIP/text/reports.py`, or "none": no report
    is looked for. An image whose study has no such text is unpaired if it has labels, else it is left out.
    """
    if labels not in ("chexpert", "negbio"):
        raise ValueError(f"labels is {labels!r}, expected 'chexpert' or 'negbio'.")
    if text not in (*TEXTS, NO_TEXT):
        raise ValueError(f"text is {text!r}, expected one of {', '.join((*TEXTS, NO_TEXT))}.")
    folder = Path(folder)
    report_folder = Path(reports) if reports else folder
    splits = {r["dicom_id"]: r["split"] for _, r in _table(folder, "split", ["dicom_id", "split"], report_problem)}
    study_labels = _study_labels(folder, labels, report_problem)
    text_of = _texts(report_folder, text, report_problem)
    last_study, last_text = "", ""
    unique = Unique()
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
    for where, record in _table(folder, "metadata", columns, report_problem):
        name, patient, study = record["dicom_id"], record["subject_id"], record["study_id"]
        if unique.seen(name):
            report_problem(where, f"image {name!r} occurs twice")
            continue
        if splits.get(name) not in SPLITS:
            report_problem(where, f"image {name!r} has the split {splits.get(name)!r}, expected one of {list(SPLITS)}")
            continue
        place = f"files/p{patient[:2]}/p{patient}/s{study}"
        if study != last_study:
            last_study = study
            last_text = text_of(place)
        found = study_labels.get(study, _NO_LABELS)
        if not last_text and not (found["present"] or found["absent"]):
            report_problem(where, f"{LEFT_OUT}study s{study} has neither a text ({text}) nor labels")
            continue
        view = record["ViewPosition"].upper()
        yield make_row(
            f"mimic-cxr/{name}",
            f"{folder}/{place}/{name}.jpg",
            source="mimic-cxr",
            report=last_text or None,
            **found,
            patient_id=patient,
            study_id=study,
            view=VIEWS.get(view, "OTHER" if view else ""),
            split=SPLITS[splits[name]],
        )


def _table(folder: Path, kind: str, columns: list[str], report_problem: Report, **kwargs):
    path = find_file(folder, f"mimic-cxr-2.0.0-{kind}.csv", f"mimic-cxr-2.1.0-{kind}.csv")
    return read_table(path, columns, report_problem=report_problem, **kwargs)


def _study_labels(folder: Path, labeller: str, report_problem: Report) -> dict[str, dict]:
    found = {}
    for where, record in _table(folder, labeller, ["study_id", *LABELS], report_problem):
        labels = chexpert_labels(where, record, LABELS, report_problem)
        if labels is not None:
            found[record["study_id"]] = labels
    radiologist = find_optional(folder, "mimic-cxr-2.1.0-test-set-labeled.csv")
    if radiologist is not None:
        # calls "Lung Opacity" by another name, and has no subject_id
        aliases = {"Lung Opacity": ["Airspace Opacity"]}
        columns = ["study_id", *LABELS]
        for where, record in read_table(radiologist, columns, aliases=aliases, report_problem=report_problem):
            labels = chexpert_labels(where, record, LABELS, report_problem)
            if labels is not None:
                found[record["study_id"]] = labels
    return found


def _texts(folder: Path, text: str, report_problem: Report) -> Callable[[str], str]:
    """`files/p10/p10000032/s50414267` -> text of that study, "" where it has none, from whichever form is there."""
    if text == NO_TEXT:
        return lambda place: ""
    table = find_optional(folder, "mimic_cxr_sectioned.csv", "mimic-cxr-sections/mimic_cxr_sectioned.csv")
    if table is not None:
        columns = ["study", "impression", "findings", "last_paragraph"]
        records = read_table(table, columns, optional=["comparison"], report_problem=report_problem)
        texts = {record["study"].removeprefix("s"): report_text(record, text) for _, record in records}
        return lambda place: texts.get(place.rpartition("/s")[2], "")
    if (folder / "mimic-cxr-reports.zip").is_file():
        archive = zipfile.ZipFile(folder / "mimic-cxr-reports.zip")
        names = frozenset(archive.namelist())
        return lambda place: _sections(archive.read(f"{place}.txt"), text) if f"{place}.txt" in names else ""
    if next((folder / "files").glob("p*/p*/s*.txt"), None) is None:
        raise ValueError(
            f"{folder}: there are no reports, neither mimic_cxr_sectioned.csv nor mimic-cxr-reports.zip nor "
            "files/p10/p10000032/s50414267.txt. They come with MIMIC-CXR, not with MIMIC-CXR-JPG: put them there, name "
            'their folder with `reports`, or go without them with `text` "none".'
        )

    def read_file(place: str) -> str:
        path = folder / f"{place}.txt"
        return _sections(path.read_bytes(), text) if path.is_file() else ""

    return read_file


def _sections(data: bytes, text: str) -> str:
    return report_text(report_sections(decode_text(data)), text)

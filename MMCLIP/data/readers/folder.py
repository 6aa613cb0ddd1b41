"""A folder of one's own, DICOM or other images: `source_rows("folder", "/data/hospital")`.

Every image below it becomes a row; the report is the text file of the same name beside it (`film.dcm`, `film.txt` or
`film.dcm.txt`). Of DICOM files (by name or, for a name like `IM0001` or `1.2.840.1`, by content) patient, study and
view come from the header.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ...text.reports import clean_report, report_sections, report_text
from ..manifest import make_row
from .tables import VIEWS, Report, decode_text, raise_problem


SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def folder_rows(folder: str | os.PathLike, *, report_problem: Report = raise_problem) -> Iterator[dict]:
    """Paired rows in the order of their paths, `split` "" (preparation assigns one by patient).

    Of a report with sections, findings and impression are used, else all of it. An image without a report goes to
    `report_problem`: there is nothing to learn from it; list labels in a CSV manifest instead.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder.")
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        is_known = path.suffix.lower() in SUFFIXES
        is_dicom = path.suffix.lower() in (".dcm", ".dicom") or (not is_known and _has_dicom_mark(path))
        if not is_known and not is_dicom or path.name == "DICOMDIR":
            continue
        name = path.relative_to(folder).as_posix()
        report_path = path.with_name(f"{path.stem if is_known else path.name}.txt")
        if not report_path.is_file():
            report_path = path.with_name(f"{path.name}.txt")
        if not report_path.is_file():
            report_problem(str(path), f"there is no report {report_path.name} beside it")
            continue
        raw = decode_text(report_path.read_bytes())
        sections = report_sections(raw)
        sections.pop("last_paragraph", None)  # a report of one's own may be plain text from its first line
        report = report_text(sections) or clean_report(raw)
        if not report:
            report_problem(str(report_path), "the report is empty")
            continue
        header = {"patient_id": "", "study_id": "", "view": ""}
        if is_dicom:
            try:
                header = _dicom_header(path)
            except ValueError as error:
                report_problem(str(path), str(error))
                continue
        yield make_row(f"folder/{name}", path, source=folder.name, report=report, **header)


def _has_dicom_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _dicom_header(path: Path) -> dict[str, str]:
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except (pydicom.errors.InvalidDicomError, OSError, EOFError) as error:
        raise ValueError(f"not a readable DICOM file: {error}") from error
    view = str(header.get("ViewPosition") or "").upper()
    return {
        "patient_id": str(header.get("PatientID") or ""),
        "study_id": str(header.get("StudyInstanceUID") or ""),
        "view": VIEWS.get(view, "OTHER" if view else ""),
    }

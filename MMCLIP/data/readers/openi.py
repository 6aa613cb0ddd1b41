"""Open-i, the chest X-rays of Indiana University: `source_rows("openi", "/data/openi")`.

Either the original: `NLMCXR_reports.tgz` or its unpacked `ecgen-radiology/*.xml`, with `CXR1_1_IM-0001-3001.png` and so
on in the folder, `images` or `NLMCXR_png`, or the DICOM files `1_IM-0001-3001.dcm` below `NLMCXR_dcm`. Or the Kaggle
version: `indiana_reports.csv`, `indiana_projections.csv` and `images/images_normalized`. There is no official split;
`split` is "" and preparation assigns one by `uId`. The original does not say which film is a lateral one (about half of
them are): put `indiana_projections.csv` beside it, or `view` is "" throughout.
"""

import logging
import os
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from ...text.reports import TEXTS, report_text
from ..manifest import make_row
from .tables import LEFT_OUT, Report, Unique, find_file, find_optional, labels_of, raise_problem, read_table


logger = logging.getLogger(__name__)
VIEWS = {"Frontal": "", "Lateral": "LATERAL"}  # frontal is PA or AP, which the table does not say
# the 18 classes that are scored on this set, by the words of the automatic index; others are left to the report
AUTOMATIC = {
    "atelectases": "atelectasis",
    "atelectasis": "atelectasis",
    "cardiomegaly": "cardiomegaly",
    "consolidation": "consolidation",
    "edema": "edema",
    "effusion": "pleural effusion",
    "emphysema": "emphysema",
    "fibroses": "fibrosis",
    "fibrosis": "fibrosis",
    "fracture": "fracture",
    "granuloma": "granuloma",
    "hernia": "hiatal hernia",
    "infiltrate": "infiltration",
    "infiltration": "infiltration",
    "lesion": "lung lesion",
    "mass": "mass",
    "nodule": "nodule",
    "opacity": "lung opacity",
    "pleural thickening": "pleural thickening",
    "pneumonia": "pneumonia",
    "pneumothorax": "pneumothorax",
}
# these hold such a word and mean something else
OTHERS = ("pericardial effusion", "subcutaneous emphysema", "cystic fibrosis", "mediastinal mass", "thyroid mass")


def openi_rows(
    folder: str | os.PathLike, *, report_problem: Report = raise_problem, text: str = "findings+impression"
) -> Iterator[dict]:
    """One row an image, its report paired with each view; `text` is one of `TEXTS` in `MMCLIP/text/reports.py`.

    A report without the sections that were asked for, and one without an image, goes to `report_problem`. Present are
    the classes of `AUTOMATIC` that the automatic index names (of the Kaggle version, `Problems`), and "no finding"
    where the index says "normal" alone; nothing is stated absent, as the report says that itself.
    """
    if text not in TEXTS:
        raise ValueError(f"text is {text!r}, expected one of {', '.join(TEXTS)}.")
    folder = Path(folder)
    is_kaggle = (folder / "indiana_reports.csv").is_file()
    studies = _kaggle_studies(folder, report_problem) if is_kaggle else xml_studies(folder, report_problem)
    unique = Unique()
    for where, uid, sections, terms, images in studies:
        if unique.seen(uid):
            report_problem(where, f"report {uid!r} occurs twice")
            continue
        report = report_text(sections, text)
        if not report:
            report_problem(where, f"{LEFT_OUT}the report has no {text}")
            continue
        if not images:
            report_problem(where, LEFT_OUT + "the report has no image")
            continue
        found = {
            AUTOMATIC[word]
            for term in terms
            for word in AUTOMATIC
            if word in term and not any(other in term for other in OTHERS)
        }
        if not found and terms == ["normal"]:
            found = {"no finding"}
        labels = labels_of(where, report_problem, present=sorted(found))
        for file, view in images:
            yield make_row(
                f"openi/{Path(file).name}",
                file,
                source="openi",
                report=report,
                **labels,
                patient_id=uid,
                study_id=uid,
                view=view,
            )


def xml_studies(folder: Path, report_problem: Report) -> Iterator[tuple]:
    """(where, uId, sections, index terms, [(file, view) of each image]) of every report of the original."""
    places = [*folder.glob("*.png"), *folder.glob("images/*.png"), *folder.glob("NLMCXR_png/*.png")]
    places += [*folder.glob("NLMCXR_dcm/*.dcm"), *folder.glob("NLMCXR_dcm/*/*.dcm")]
    files = {_film(path.name): path for path in places}
    projections = find_optional(folder, "indiana_projections.csv")
    views = {}
    if projections is None:
        logger.warning("%s: without indiana_projections.csv nobody knows which films are lateral.", folder)
    else:
        views = {_film(name): view for _, name, view in _projections(projections, report_problem)}
    for where, data in _xml_files(folder):
        try:
            root = ElementTree.fromstring(data)
            uid = root.find("uId").get("id")
        except (ElementTree.ParseError, AttributeError) as error:
            report_problem(where, f"not a report of Open-i: {error}")
            continue
        sections: dict[str, str] = {}
        for e in root.iter("AbstractText"):
            name = e.get("Label", "").strip().lower()
            parts = (sections.get(name), "".join(e.itertext()).strip())  # with what <sup> and such hold
            sections[name] = "\n\n".join(filter(None, parts))
        terms = [(e.text or "").strip().lower() for e in root.iter("automatic")]
        if not terms:
            terms = [term for e in root.iter("major") if (term := (e.text or "").strip().lower()) == "normal"]
        names = dict.fromkeys(e.get("id", "") for e in root.iter("parentImage"))
        images = [(files.get(_film(name), folder / f"{name}.png"), views.get(_film(name), "")) for name in names]
        yield where, uid, sections, terms, images


def _film(name: str) -> str:
    """`CXR1_1_IM-0001-3001`, `CXR1_1_IM-0001-3001.png`, `1_IM-0001-3001.dcm` and `1_IM-0001-3001.dcm.png` are one."""
    return re.sub(r"^CXR\d+_|(\.dcm)?(\.png)?$", "", name)


def _xml_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    if (folder / "ecgen-radiology").is_dir():
        for path in sorted((folder / "ecgen-radiology").glob("*.xml"), key=lambda path: (len(path.name), path.name)):
            yield str(path), path.read_bytes()
        return
    archive_path = find_file(folder, "NLMCXR_reports.tgz")
    with tarfile.open(archive_path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".xml"):
                yield f"{archive_path}: {member.name}", archive.extractfile(member).read()


def _projections(table: Path, report_problem: Report) -> Iterator[tuple[str, str, str]]:
    for where, record in read_table(table, ["uid", "filename", "projection"], report_problem=report_problem):
        if record["projection"] in VIEWS:
            yield record["uid"], record["filename"], VIEWS[record["projection"]]
        else:
            report_problem(where, f"`projection` is {record['projection']!r}, expected Frontal or Lateral")


def _kaggle_studies(folder: Path, report_problem: Report) -> Iterator[tuple]:
    images: dict[str, list] = {}
    for uid, name, view in _projections(find_file(folder, "indiana_projections.csv"), report_problem):
        images.setdefault(uid, []).append((folder / "images" / "images_normalized" / name, view))
    columns = ["uid", "MeSH", "Problems", "findings", "impression"]
    for where, record in read_table(folder / "indiana_reports.csv", columns, report_problem=report_problem):
        terms = [term.strip().lower() for term in record["Problems"].split(";") if term.strip()]
        yield where, record["uid"], record, terms, images.get(record["uid"], [])

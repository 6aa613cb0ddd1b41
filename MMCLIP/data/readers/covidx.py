"""COVIDx CXR, versions 8 to 9 (text lists) and CXR-4: `source_rows("covidx", "/data/covidx-cxr-4")`.

The folder holds `train.txt`, `val.txt` and `test.txt` (or, with `version="9B"`, `train_COVIDx9B.txt` and
`test_COVIDx9B.txt`), without a header line, and the images in `train`, `val`, `test`. The official split is kept.
Classes come from different hospitals and file types, a strong shortcut: report scores by `study_id`, which holds the
source of each image.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ...text.vocabulary import NO_FINDING
from ..manifest import make_row
from .tables import Report, Unique, decode_text, raise_problem


# class -> (present, absent); "negative" is no COVID-19, whatever else it may be
CLASSES = {
    "positive": (["covid-19"], []),
    "negative": ([], ["covid-19"]),
    "covid-19": (["covid-19"], []),
    "pneumonia": (["pneumonia"], ["covid-19"]),
    "normal": ([NO_FINDING], ["covid-19", "pneumonia"]),
}
MISSPELT_SOURCES = {"rnsa": "rsna"}


def covidx_rows(
    folder: str | os.PathLike, *, report_problem: Report = raise_problem, version: str = ""
) -> Iterator[dict]:
    """Unpaired rows; lists have three fields (patient, file, class) or four (and the source of the image)."""
    folder = Path(folder)
    name = "{}.txt" if not version else f"{{}}_COVIDx{version}.txt"
    lists = [(split, folder / name.format(split)) for split in ("train", "val", "test")]
    found = [(split, path) for split, path in lists if path.is_file()]
    if not found:
        others = sorted(path.name for path in folder.glob("*.txt"))
        raise ValueError(
            f"{folder}: there is no {lists[0][1].name}; found {', '.join(others) or 'no .txt file'}. "
            "Give `version` (9A, 9B, ...) for lists named train_COVIDx9B.txt."
        )
    unique = Unique()
    for split, path in found:
        for number, line in enumerate(decode_text(path.read_bytes()).splitlines(), start=1):
            where = f"{path}, line {number}"
            fields = line.split()
            if not fields:
                continue
            if len(fields) not in (3, 4) or fields[2].lower() not in CLASSES:
                report_problem(
                    where, f"expected `patient file class [source]` with a class of {', '.join(CLASSES)}, got {line!r}"
                )
                continue
            patient, file, kind = fields[:3]
            if unique.seen(f"{split}/{file}"):
                report_problem(where, f"image {file!r} occurs twice")
                continue
            present, absent = CLASSES[kind.lower()]
            origin = fields[3].lower() if len(fields) == 4 else ""
            yield make_row(
                f"covidx/{split}/{file}",
                folder / split / file,
                source="covidx",
                present=present,
                absent=absent,
                patient_id=patient,
                study_id=MISSPELT_SOURCES.get(origin, origin),
                split=split,
            )

"""COVIDx CXR, versions 8 to 9 (text lists) and CXR-4: `source_rows("covidx", "/data/covidx-cxr-4")`.

The folder holds `train.txt`, `val.txt` and `test.txt` (or, with `version="9B"`, `train_COVIDx9B.txt` and
`test_COVIDx9B.txt`, there or in `labels`), without a header line, and the images in `train`, `val`, `test`. The
official split is kept. Classes come from different collections and file types, a strong shortcut: the `source` of a row
is "covidx-" and the collection ("covidx-rsna"), so that scores within each source tell it apart from the disease.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ...text.vocabulary import NO_FINDING
from ..manifest import make_row
from .tables import Report, Unique, decode_text, find_optional, raise_problem


# class -> (present, absent); "negative" is no COVID-19, whatever else it may be
CLASSES = {
    "positive": (["covid-19"], []),
    "negative": ([], ["covid-19"]),
    "covid-19": (["covid-19"], []),
    "pneumonia": (["pneumonia"], ["covid-19"]),
    "normal": ([NO_FINDING], ["covid-19", "pneumonia"]),
}
PARTS = ("train", "val", "test")
MISSPELT = {"rnsa": "rsna"}


def covidx_rows(
    folder: str | os.PathLike, *, report_problem: Report = raise_problem, version: str = ""
) -> Iterator[dict]:
    """Unpaired rows; lists have three fields (patient, file, class) or four (and the collection of the image)."""
    folder = Path(folder)
    name = "{}.txt" if not version else f"{{}}_COVIDx{version}.txt"
    lists = [(split, find_optional(folder, name.format(split), f"labels/{name.format(split)}")) for split in PARTS]
    found = [(split, path) for split, path in lists if path is not None]
    if not found:
        others = sorted(path.name for path in (*folder.glob("*.txt"), *folder.glob("labels/*.txt")))
        raise ValueError(
            f"{folder}: there is no {name.format('train')}; found {', '.join(others) or 'no .txt file'}. "
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
            collection = fields[3].lower() if len(fields) == 4 else ""
            collection = MISSPELT.get(collection, collection)
            yield make_row(
                f"covidx/{split}/{file}",
                folder / split / file,
                source=f"covidx-{collection}" if collection else "covidx",
                present=present,
                absent=absent,
                patient_id=patient,
                split=split,
            )

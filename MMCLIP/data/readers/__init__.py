"""One function per kind of data set on disk: its official folder -> manifest rows.

A reader is a generator `NAME_rows(folder, *, report_problem=raise_problem, **options)` of rows as
`MMCLIP.data.manifest.make_row` makes them. It reads tables, never pixels, and does not look whether an image file
exists: what reads the pixels says so.
"""

import importlib
import inspect
import os
from collections.abc import Iterator

from .csv_manifest import COLUMN_NAMES, read_csv_manifest
from .tables import LEFT_OUT, raise_problem


# source name -> module and function here
SOURCES = {
    "chestxray14": "chestxray14:chestxray14_rows",
    "chexpert": "chexpert:chexpert_rows",
    "covidx": "covidx:covidx_rows",
    "folder": "folder:folder_rows",
    "mimic-cxr": "mimic_cxr:mimic_cxr_rows",
    "openi": "openi:openi_rows",
    "padchest": "padchest:padchest_rows",
    "rsna": "rsna:rsna_rows",
    "siim": "siim:siim_rows",
    "vindr-cxr": "vindr_cxr:vindr_cxr_rows",
}


def source_reader(name: str):
    """The reader of the data set `name`, one of `SOURCES`; imported when it is asked for."""
    if name not in SOURCES:
        raise ValueError(f"There is no data set {name!r}; known are {', '.join(SOURCES)}.")
    module, function = SOURCES[name].split(":")
    return getattr(importlib.import_module(f".{module}", __name__), function)


def source_rows(name: str, folder: str | os.PathLike, *, report_problem=raise_problem, **options) -> Iterator[dict]:
    """The rows of the data set `name` (one of `SOURCES`) whose official folder is `folder`.

    What is wrong with a single row goes to `report_problem(where, reason)`, which raises ValueError unless another is
    given; the row is then left out. A reason that begins with `LEFT_OUT` is no error: the row is sound, but there is
    nothing to learn from it, or its patient is in the test part. A missing table, a missing column and an unknown
    option raise ValueError.
    """
    reader = source_reader(name)
    known = list(inspect.signature(reader).parameters)[2:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{name} knows no option {', '.join(unknown)}; its options are {', '.join(known) or 'none'}.")
    return reader(folder, report_problem=report_problem, **options)


__all__ = ["COLUMN_NAMES", "LEFT_OUT", "SOURCES", "raise_problem", "read_csv_manifest", "source_reader", "source_rows"]

"""What the readers of public sets share: tables by column name, text of unknown encoding, labels, problems."""

import csv
import functools
import gzip
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ...text.vocabulary import NO_FINDING, canonical_label, with_broader_labels


Report = Callable[[str, str], None]  # (where, reason): what is wrong with one row, which is then left out
VIEWS = {  # spellings of the public sets -> view
    "PA": "PA",
    "AP": "AP",
    "AP_HORIZONTAL": "AP",
    "POSTEROANTERIOR": "PA",
    "ANTEROPOSTERIOR": "AP",
    "L": "LATERAL",
    "LL": "LATERAL",
    "RL": "LATERAL",
    "LATERAL": "LATERAL",
    "LARGE LATERAL": "LATERAL",
    "XTABLE LATERAL": "LATERAL",
    "UNK": "",
}


LEFT_OUT = "left out: "


def raise_problem(where: str, reason: str) -> None:
    """Raises ValueError, but not for a `reason` that begins with `LEFT_OUT`: such rows are sound, and of no use."""
    if not reason.startswith(LEFT_OUT):
        raise ValueError(f"{where}: {reason}")


def find_optional(folder: str | os.PathLike, *names: str) -> Path | None:
    """The first of `names` (paths below `folder`, each also tried with .gz and .zip) that exists; None without one."""
    folder = Path(folder)
    for name in names:
        for ending in ("", ".gz", ".zip"):
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    return None


def find_file(folder: str | os.PathLike, *names: str) -> Path:
    """As `find_optional`, but raises ValueError that lists what was looked for when there is none."""
    if (found := find_optional(folder, *names)) is not None:
        return found
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder.")
    raise ValueError(
        f"{folder}: found none of {', '.join(names)} there (nor with .gz or .zip); is it the right folder?"
    )


def decode_text(data: bytes) -> str:
    """UTF-8, or else Windows-1252, or else (every byte is a sign there) Latin-1."""
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, of a .gz or of the one file in a .zip; a line that is not UTF-8 by `decode_text`."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            binary = gzip.open(raw)
        elif path.suffix == ".zip":
            archive = zipfile.ZipFile(raw)
            inner = [name for name in archive.namelist() if not name.startswith("__MACOSX") and not name.endswith("/")]
            if len(inner) != 1:
                raise ValueError(f"{path}: expected one file in the archive, found {len(inner)}. Unpack it.")
            binary = archive.open(inner[0])
        else:
            binary = raw
        for line in io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline=""):
            try:
                line.isascii() or line.encode()
            except UnicodeEncodeError:
                line = decode_text(line.encode("utf-8", errors="surrogateescape"))
            yield line


def read_table(
    path: str | os.PathLike,
    required: Sequence[str],
    *,
    optional: Sequence[str] = (),
    aliases: dict[str, Sequence[str]] | None = None,
    report_problem: Report = raise_problem,
) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, record) of every line of a CSV file, read by column name; `where` names file and line for messages.

    A record has the `required` columns and those of `optional` that the file has, with outer blanks taken off names
    and values. `aliases` are other names of a column. A line with another number of fields than the header goes to
    `report_problem`; columns without a name at the end of the header may be left out in a line. Raises ValueError for
    a missing or doubled column, naming those that are there, and for a file that is no CSV table, or is cut off.
    """
    path = Path(path)
    reader = csv.reader(text_lines(path), strict=True)
    try:
        header = [name.strip() for name in next(reader, ())]
        width = len(header)
        while header and not header[-1]:
            header.pop()
        columns = _find_columns(path, header, required, optional, aliases or {})
        for fields in reader:
            if not fields:
                continue
            where = f"{path}, line {reader.line_num}"
            if not len(header) <= len(fields) <= width or any(fields[len(header) :]):
                report_problem(where, f"{len(fields)} fields, but the header has {len(header)}")
                continue
            yield where, {name: fields[index].strip() for name, index in columns.items()}
    except (csv.Error, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {reader.line_num}: not a readable table: {error}") from error


def _find_columns(path: Path, header: list[str], required, optional, aliases) -> dict[str, int]:
    if not header:
        raise ValueError(f"{path}: the table is empty; expected the columns {', '.join(required)}.")
    columns = {}
    for name in (*required, *optional):
        found = [i for i, title in enumerate(header) if title in (name, *aliases.get(name, ()))]
        if len(found) > 1:
            raise ValueError(f"{path}: the column {name!r} occurs {len(found)} times in the header {header}.")
        if found:
            columns[name] = found[0]
        elif name in required:
            raise ValueError(f"{path}: there is no column {name!r}; the header has {', '.join(header)}.")
    return columns


@functools.lru_cache(maxsize=100_000)  # the same labels come together again and again
def _label_columns(
    present: tuple[str, ...], absent: tuple[str, ...], uncertain: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    present = tuple(dict.fromkeys(map(canonical_label, present)))
    uncertain = tuple(dict.fromkeys(label for label in map(canonical_label, uncertain) if label not in present))
    if NO_FINDING in present and len(present) > 1:
        raise ValueError(f"{NO_FINDING!r} is present together with {sorted(set(present) - {NO_FINDING})}")
    stated = {*with_broader_labels(present), *with_broader_labels(uncertain)}
    absent = tuple(dict.fromkeys(label for label in map(canonical_label, absent) if label not in stated))
    return present, absent, uncertain


def labels_of(
    where: str,
    report_problem: Report,
    present: Iterable[str] = (),
    absent: Iterable[str] = (),
    uncertain: Iterable[str] = (),
) -> dict[str, list[str]] | None:
    """The label columns of a row, of labels in any spelling; what is in none of the three is unknown.

    A canonical label that is stated in several ways (two columns of a set can mean one concept here) is present before
    uncertain before absent. A broader concept of something present is never absent. None, after `report_problem`, when
    a label is unknown or when "no finding" is present together with a finding.
    """
    try:
        columns = _label_columns(tuple(present), tuple(absent), tuple(uncertain))
    except ValueError as error:
        report_problem(where, str(error))
        return None
    return dict(zip(("present", "absent", "uncertain"), map(list, columns), strict=True))


def chexpert_labels(
    where: str, record: dict[str, str], names: Sequence[str], report_problem: Report
) -> dict[str, list[str]] | None:
    """Labels of columns that hold 1.0 (present), 0.0 (absent), -1.0 (uncertain) or nothing (not mentioned).

    "No Finding" beside a finding that is present is left out: the labellers of CheXpert and MIMIC-CXR give it to films
    with support devices.
    """
    try:
        stated = _chexpert_statements(tuple(names), tuple([record.get(name, "") for name in names]))
    except ValueError as error:
        report_problem(where, str(error))
        return None
    return labels_of(where, report_problem, *stated)


@functools.lru_cache(maxsize=100_000)
def _chexpert_statements(names: tuple[str, ...], values: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    stated: dict[float, list[str]] = {1.0: [], 0.0: [], -1.0: []}
    for name, value in zip(names, values, strict=True):
        if value:
            try:
                stated[float(value)].append(name)
            except (KeyError, ValueError):
                raise ValueError(f"column {name!r} holds {value!r}, expected 1.0, 0.0, -1.0 or nothing") from None
    if len(stated[1.0]) > 1:
        stated[1.0] = [name for name in stated[1.0] if canonical_label(name) != NO_FINDING]
    return tuple(stated[1.0]), tuple(stated[0.0]), tuple(stated[-1.0])


def completed_absent(row: dict, used: dict[str, set[str]]) -> list[str]:
    """`absent` of a manifest row, and every label that its source uses (`used`) and the row does not state.

    A row without labels, and one of a source that is not in `used`, keeps what it has.
    """
    if not (row["present"] or row["absent"]):
        return row["absent"]
    stated = {*with_broader_labels(row["present"]), *row["absent"], *row["uncertain"]}
    return row["absent"] + sorted(used.get(row["source"], set()) - stated)


def complete_labels(labels: dict[str, list[str]], complete: Iterable[str]) -> dict[str, list[str]]:
    """Make absent every label of `complete` that the row does not state: for sets whose label list is complete."""
    stated = {*with_broader_labels(labels["present"]), *with_broader_labels(labels["uncertain"]), *labels["absent"]}
    labels["absent"] = labels["absent"] + [label for label in complete if label not in stated]
    return labels


def hashed_share(*parts: str) -> float:
    """A number in [0, 1) that depends on `parts` alone: who falls below a share is in that split, on any machine."""
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Unique:
    """Tells ids apart: `seen(id)` is False once for each; `ids` are those seen."""

    def __init__(self):
        self.ids: set[str] = set()

    def seen(self, name: str) -> bool:
        if name in self.ids:
            return True
        self.ids.add(name)
        return False


__all__ = [
    "LEFT_OUT",
    "Report",
    "Unique",
    "VIEWS",
    "chexpert_labels",
    "complete_labels",
    "completed_absent",
    "decode_text",
    "find_file",
    "find_optional",
    "hashed_share",
    "labels_of",
    "raise_problem",
    "read_table",
    "text_lines",
]

"""What the readers of public sets share: tables by column name, text of unknown encoding, labels, problems."""

import csv
import gzip
import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ...text.vocabulary import canonical_label


def raise_problem(where: str, reason: str) -> None:
    raise ValueError(f"{where}: {reason}")


def find_file(folder: str | os.PathLike, *names: str) -> Path:
    """The first of `names` (paths below `folder`, each also tried with .gz and .zip) that exists.

    Raises ValueError that lists what was looked for.
    """
    folder = Path(folder)
    for name in names:
        for ending in ("", ".gz", ".zip"):
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder.")
    raise ValueError(f"{folder}: found none of {', '.join(names)} there (nor with .gz or .zip); is it the right folder?")


def read_text(path: str | os.PathLike) -> str:
    """A text file in UTF-8 or else, byte by byte, in Latin-1 (Windows-1252 where that has a sign); .gz and .zip too."""
    path = Path(path)
    if path.suffix == ".gz":
        data = gzip.decompress(path.read_bytes())
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            inner = [name for name in archive.namelist() if not name.startswith("__MACOSX") and not name.endswith("/")]
            if len(inner) != 1:
                raise ValueError(f"{path}: expected one file in the archive, found {len(inner)}. Unpack it.")
            data = archive.read(inner[0])
    else:
        data = path.read_bytes()
    return decode_text(data)


def decode_text(data: bytes) -> str:
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def read_table(
    path: str | os.PathLike,
    required: Sequence[str],
    *,
    optional: Sequence[str] = (),
    aliases: dict[str, Sequence[str]] | None = None,
    report_problem=raise_problem,
) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, record) of every line of a CSV file, read by column name; `where` names file and line for messages.

    A record has the `required` columns and those of `optional` that the file has, with outer blanks taken off names
    and values. `aliases` are other names of a column. A line with another number of fields than the header goes to
    `report_problem`. Raises ValueError for a missing or doubled column, naming those that are there.
    """
    path = Path(path)
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header = [name.strip() for name in next(reader)]
    except StopIteration:
        raise ValueError(f"{path}: the table is empty; expected the columns {', '.join(required)}.") from None
    columns = {}
    for name in (*required, *optional):
        found = [i for i, title in enumerate(header) if title in (name, *(aliases or {}).get(name, ()))]
        if len(found) > 1:
            raise ValueError(f"{path}: the column {name!r} occurs {len(found)} times in the header {header}.")
        if found:
            columns[name] = found[0]
        elif name in required:
            raise ValueError(f"{path}: there is no column {name!r}; the header has {', '.join(header)}.")
    for fields in reader:
        if not fields:
            continue
        where = f"{path}, line {reader.line_num}"
        if len(fields) != len(header):
            report_problem(where, f"{len(fields)} fields, but the header has {len(header)}")
            continue
        yield where, {name: fields[index].strip() for name, index in columns.items()}


def labels_of(names: Iterable[str], where: str, report_problem) -> list[str] | None:
    """Canonical labels without repeats; None, after `report_problem`, when one is not in the vocabulary."""
    try:
        return list(dict.fromkeys(canonical_label(name) for name in names))
    except ValueError as error:
        report_problem(where, str(error))
        return None

"""What the tests of the readers of public sets share: tables and pictures on disk, and rows read back."""

import csv
import io

from PIL import Image

from MMCLIP.data.readers import source_rows


def write_table(path, *lines, encoding="utf-8"):
    """A CSV file of lists; a line that is text goes in as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    for line in lines:
        if isinstance(line, str):
            text.write(line + "\n")
        else:
            csv.writer(text, lineterminator="\n").writerow(line)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def draw(*paths):
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 + 30 * number).save(path, format="PNG")


def read(name, folder, **options):
    """Rows by id, and the problems that were reported instead of raised."""
    problems = []
    report = lambda where, reason: problems.append((where, reason))  # noqa: E731
    rows = list(source_rows(name, folder, report_problem=report, **options))
    assert len({row["row_id"] for row in rows}) == len(rows)
    return {row["row_id"].partition("/")[2]: row for row in rows}, problems


def labels(row):
    return {column: row[column] for column in ("present", "absent", "uncertain") if row[column]}

"""What is in a prepared data set: `summary.md`, and a contact sheet of each source."""

import io
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from .prepared import SPLITS, shards


SHEET_COLUMNS, SHEET_ROWS, CELL, CAPTION = 6, 4, 160, 24


@dataclass(frozen=True)
class SourceCounts:
    """Rows of a source: prepared; that could not be used; left out on purpose, by reason."""

    good: int
    bad: int
    left_out: dict[str, int]


def write_summary(
    output_dir: Path,
    options,
    counts: dict[str, SourceCounts],
    warnings: Iterable[str],
    num_rows: int,
    seconds: float,
) -> None:
    """Counts of rows, patients, labels, views and text lengths, by source; `num_rows` were prepared in `seconds`."""
    columns = ["row_id", "patient_id", "source", "view", "report", "present", "absent", "uncertain"]
    columns += ["masks.list.element.finding", "boxes.list.element.finding"]  # not the pictures of the masks
    lines = ["# Prepared data set", ""]
    lines += [f"Options: {', '.join(f'{key} {value}' for key, value in vars(options).items())}.", ""]
    if num_rows:
        lines += [f"The last run prepared {num_rows} rows in {seconds:.0f} s, {num_rows / seconds:.1f} a second.", ""]
    for warning in warnings:
        lines += [f"**Warning**: {warning}", ""]
    table = [("source", *SPLITS, "patients", "with report", "with masks", "with boxes", "MB", "unusable", "left out")]
    labels: dict[str, Counter] = {}
    views, lengths = {}, {}
    for name, counted in counts.items():
        numbers, patients, size = Counter(), set(), 0
        views[name], lengths[name] = Counter(), []
        for split in SPLITS:
            for path in shards(output_dir, split, name):
                size += os.path.getsize(path)
                for row in pq.ParquetFile(path).read(columns=columns).to_pylist():
                    numbers[split] += 1
                    numbers["report"] += row["report"] is not None
                    numbers["masks"] += bool(row["masks"])
                    numbers["boxes"] += bool(row["boxes"])
                    patients.add((row["source"], row["patient_id"] or row["row_id"]))
                    views[name][row["view"] or "not known"] += 1
                    if row["report"]:
                        lengths[name].append(len(row["report"].split()))
                    for column in ("present", "absent", "uncertain"):
                        for label in row[column]:
                            labels.setdefault(label, Counter())[column] += 1
        table.append(
            (
                name,
                *(numbers[split] for split in SPLITS),
                len(patients),
                *(numbers[key] for key in ("report", "masks", "boxes")),
                f"{size / 1e6:.1f}",
                counted.bad,
                ", ".join(f"{count} {reason}" for reason, count in counted.left_out.items()) or "0",
            )
        )
    lines += _table(table)
    lines += ["", "A row without a patient counts as a patient of its own. `quarantine.csv` has the reasons.", ""]
    by_number = sorted(labels, key=lambda label: (-labels[label]["present"], label))
    lines += ["## Labels", "", "As the sources state them; those that a report states are found in training.", ""]
    rows = [(label, *(labels[label][key] for key in ("present", "absent", "uncertain"))) for label in by_number]
    lines += _table([("label", "present", "absent", "uncertain"), *rows])
    lines += ["", "## Views", ""]
    lines += _table([("source", "view", "rows"), *((n, v, c) for n in views for v, c in views[n].most_common())])
    lines += ["", "## Words in a report", ""]
    shares = (0, 25, 50, 75, 95, 100)
    quantiles = [(n, *(f"{q:.0f}" for q in np.percentile(found, shares))) for n, found in lengths.items() if found]
    lines += _table([("source", *(f"{share} %" for share in shares)), *quantiles])
    (output_dir / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(rows: list[tuple]) -> list[str]:
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [head, f"|{' --- |' * len(rows[0])}", *body]


def write_contact_sheets(output_dir: Path, sources: Iterable[str]) -> None:
    """`sheet-NAME.png`: up to 24 pictures from all over the source, with their labels; no report."""
    for name in sources:
        chosen = _choose(output_dir, name, SHEET_COLUMNS * SHEET_ROWS)
        if not chosen:
            continue  # texts alone
        num_rows = -(-len(chosen) // SHEET_COLUMNS)
        sheet = Image.new("L", (SHEET_COLUMNS * CELL, num_rows * (CELL + CAPTION)))
        draw = ImageDraw.Draw(sheet)
        for number, row in enumerate(chosen):
            left, top = number % SHEET_COLUMNS * CELL, number // SHEET_COLUMNS * (CELL + CAPTION)
            picture = Image.open(io.BytesIO(row["image"]["bytes"]))
            picture.thumbnail((CELL - 4, CELL - 4))
            sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
            caption = f"{row['split']}: {', '.join(row['present']) or 'no label'}"
            draw.text((left + 3, top + CELL + 4), caption[:26], fill=255)
        sheet.save(output_dir / f"sheet-{name}.png")


def _choose(output_dir: Path, name: str, wanted: int) -> list[dict]:
    """`wanted` rows with a picture, evenly spaced over the shards of a source."""
    paths = [path for split in SPLITS for path in shards(output_dir, split, name)]
    numbers = [pq.ParquetFile(path).metadata.num_rows for path in paths]
    places = [(path, index) for path, number in zip(paths, numbers, strict=True) for index in range(number)]
    chosen = []
    for place in np.unique(np.linspace(0, len(places) - 1, min(wanted, len(places))).round().astype(int)):
        path, index = places[place]
        table = pq.ParquetFile(path)
        group = 0
        while index >= table.metadata.row_group(group).num_rows:
            index -= table.metadata.row_group(group).num_rows
            group += 1
        row = table.read_row_group(group, columns=["image", "present", "split"]).slice(index, 1).to_pylist()[0]
        if row["image"] is not None:
            chosen.append(row)
    return chosen

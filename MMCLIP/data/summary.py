"""What is in a prepared data set: `summary.md`, and a contact sheet of each source."""

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from .prepared import SPLITS


SHEET_COLUMNS, SHEET_ROWS, CELL, CAPTION = 6, 4, 160, 24


def shards_of(output_dir: Path, split: str, name: str) -> list[Path]:
    return sorted((output_dir / split).glob(f"{name}-[0-9]*.parquet"))


def write_summary(
    output_dir: Path,
    sources,
    options,
    quarantined: dict[str, tuple[int, int]],
    left_out: dict[str, dict[str, int]],
    num_images: int,
    seconds: float,
) -> None:
    """Counts of rows, patients, labels, views and text lengths, by source; `num_images` were prepared in `seconds`."""
    columns = ["patient_id", "view", "report", "present", "absent", "uncertain", "masks", "boxes", "row_id"]
    lines = ["# Prepared data set", ""]
    lines += [f"Options: {', '.join(f'{key} {value}' for key, value in vars(options).items())}.", ""]
    if num_images:
        lines += [f"This run prepared {num_images} rows in {seconds:.0f} s, {num_images / seconds:.1f} a second.", ""]
    table = [("source", *SPLITS, "patients", "with report", "with masks", "with boxes", "MB", "unusable", "left out")]
    labels: dict[str, Counter] = {}
    views, lengths = {}, {}
    for name in sources:
        numbers, patients, size = Counter(), set(), 0
        views[name], lengths[name] = Counter(), []
        for split in SPLITS:
            for path in shards_of(output_dir, split, name):
                size += os.path.getsize(path)
                for row in pq.read_table(path, columns=columns).to_pylist():
                    numbers[split] += 1
                    numbers["report"] += row["report"] is not None
                    numbers["masks"] += bool(row["masks"])
                    numbers["boxes"] += bool(row["boxes"])
                    patients.add(row["patient_id"] or row["row_id"])
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
                quarantined[name][0],
                ", ".join(f"{count} {reason}" for reason, count in left_out[name].items()) or "0",
            )
        )
    lines += _table(table)
    lines += ["", "`quarantine.csv` names each row that could not be used, with the reason.", "", "## Labels", ""]
    by_number = sorted(labels, key=lambda label: (-labels[label]["present"], label))
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


def write_contact_sheets(output_dir: Path, sources) -> None:
    """`sheet-NAME.png`: up to 24 pictures from all over the source, with their labels; no report."""
    for name in sources:
        shards = [path for split in SPLITS for path in shards_of(output_dir, split, name)]
        chosen = []
        wanted = SHEET_COLUMNS * SHEET_ROWS
        for path in shards[:: max(1, len(shards) // wanted)]:
            rows = pq.read_table(path, columns=["image", "present", "split"])
            share = max(1, -(-wanted // len(shards)))
            for index in np.linspace(0, rows.num_rows - 1, min(share, rows.num_rows)).astype(int):
                row = rows.slice(index, 1).to_pylist()[0]
                if row["image"] is not None:
                    chosen.append(row)
        if not chosen:
            continue  # texts alone
        chosen = chosen[:wanted]
        num_rows = -(-len(chosen) // SHEET_COLUMNS)
        sheet = Image.new("L", (SHEET_COLUMNS * CELL, num_rows * (CELL + CAPTION)))
        draw = ImageDraw.Draw(sheet)
        for number, row in enumerate(chosen):
            left, top = number % SHEET_COLUMNS * CELL, number // SHEET_COLUMNS * (CELL + CAPTION)
            picture = Image.open(io.BytesIO(row["image"]["bytes"]))
            picture.thumbnail((CELL - 4, CELL - 4))
            sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
            caption = f"{row['split']}: {', '.join(row['present']) or 'none stated'}"
            draw.text((left + 3, top + CELL + 4), caption[:26], fill=255)
        sheet.save(output_dir / f"sheet-{name}.png")

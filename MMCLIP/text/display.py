"""Reports with their entities marked, as a picture or a page: colour says the kind, filling and line the assertion."""

import html
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .entities import ASSERTIONS, Entity


# Any two lie 20 or more apart in CIELAB, for colour-blind readers too (Machado et al. 2009), and black letters on each
# have a contrast of 7 or more.
COLORS = {
    "finding": "#E9823A",
    "disease": "#D188A6",
    "device": "#89ABFF",
    "anatomy": "#EBEBEB",
    "descriptor": "#EED519",
    "normal": "#30D890",
}
# of a picture: points, characters in a line, points
FONT, FONT_SIZE, COLUMNS, MAX_HEIGHT = "DejaVu Sans Mono", 10.0, 92, 10_000


class ReadReport(NamedTuple):
    """A report and what a recogniser found in it."""

    title: str
    text: str
    entities: list[Entity]


class Piece(NamedTuple):
    """Characters `start` to `end` that lie wholly in or out of one entity, and in or out of one cue."""

    start: int
    end: int
    entity: Entity | None
    cue: str | None  # the assertion that the cue makes


def pieces_of(text: str, entities: Iterable[Entity]) -> list[Piece]:
    """The text cut wherever an entity or a cue begins or ends; the pieces joined are the text."""
    marks: list[tuple[Entity | None, str | None]] = [(None, None)] * len(text)
    for entity in entities:
        for i in range(entity.start, entity.end):
            marks[i] = entity, marks[i][1]
        if entity.cue_start is not None:
            for i in range(entity.cue_start, entity.cue_end):
                marks[i] = marks[i][0], entity.assertion
    pieces, start = [], 0
    for (entity, cue), characters in itertools.groupby(marks):
        end = start + len(list(characters))
        pieces.append(Piece(start, end, entity, cue))
        start = end
    return pieces


def legend() -> ReadReport:
    """A text whose own words are the examples: each kind, each assertion, each sort of cue."""
    text, entities = "", []
    for label, words in (("Kind", COLORS), ("Said to be", ASSERTIONS)):
        text += f"{label}:  "
        for word in words:
            kind, assertion = (word, "present") if word in COLORS else ("finding", word)
            entities.append(Entity(len(text), len(text) + len(word), word, kind, assertion))
            text += f"{word}   "
        text = text.rstrip() + "\n"
    text += "Because of:  "
    for index, words in ((-2, "cue of absence"), (-1, "cue of doubt")):
        entities[index] = entities[index]._replace(cue_start=len(text), cue_end=len(text) + len(words))
        text += f"{words}   "
    return ReadReport("", text.rstrip(), entities)


# ------------------------------------------------------------------------------------------------------------- picture


def wrap(text: str, entities: Iterable[Entity], width: int) -> list[tuple[int, int]]:
    """(start, end) of lines of at most `width` characters: breaks at blanks and at the breaks of the text.

    An entity stays on one line, and so does a word, unless it is longer than a line.
    """
    glued = list(text)
    for entity in entities:
        if entity.end - entity.start <= width:
            glued[entity.start : entity.end] = "x" * (entity.end - entity.start)
    line = re.compile(rf"\S[^\n]{{0,{width - 1}}}(?!\S)|\S{{{width}}}")
    return [match.span() for match in line.finditer("".join(glued))]


def draw_picture(reports: Sequence[ReadReport], path: Path) -> None:
    """Write a .png or .svg with a legend and one report below the other.

    Raises ValueError when it would be higher than `MAX_HEIGHT`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, so no backend and no display
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    blocks = [(report, wrap(report.text, report.entities, COLUMNS)) for report in (legend(), *reports)]
    num_lines = sum(len(lines) for _, lines in blocks)
    font = FontProperties(family=FONT, size=FONT_SIZE)
    advance = TextToPath().get_text_width_height_descent("x" * COLUMNS, font, ismath=False)[0] / COLUMNS
    line_height, title_height, margin = 2.0 * FONT_SIZE, 2.6 * FONT_SIZE, 1.5 * FONT_SIZE  # all in points
    width = COLUMNS * advance + 2 * margin
    height = num_lines * line_height + len(reports) * title_height + 2 * margin
    if height > MAX_HEIGHT:
        raise ValueError(
            f"{path}: a picture of {len(reports)} reports with {num_lines} lines would be {height:.0f} points high, "
            f"expected at most {MAX_HEIGHT}. Show fewer, or make a page (.html)."
        )
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-margin, width - margin), ylim=(height - margin, -margin))
    axes.set_axis_off()
    top = 0.0
    for report, lines in blocks:
        if report.title:
            top += title_height
            axes.text(0, top - 0.6 * FONT_SIZE, report.title, size=1.1 * FONT_SIZE, weight="bold", parse_math=False)
        pieces = pieces_of(report.text, report.entities)
        for first, last in lines:
            _draw_line(axes, report, pieces, first, last, top + line_height / 2, advance)
            top += line_height
    if path.suffix.lower() == ".svg":
        with rc_context({"svg.hashsalt": "MMCLIP"}):  # the same reports give the same file
            figure.savefig(path, metadata={"Date": None})
        return
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=144, format="png")
    Image.open(pixels).convert("RGB").quantize(128).save(path, optimize=True)  # a fourth of the bytes


def _draw_line(
    axes, report: ReadReport, pieces: list[Piece], first: int, last: int, middle: float, advance: float
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    for entity in report.entities:
        start, end = max(entity.start, first), min(entity.end, last)
        if start >= end:
            continue
        color = np.array(to_rgb(COLORS[entity.kind]))
        is_present = entity.assertion == "present"
        left, right, half = (start - first) * advance, (end - first) * advance, 0.65 * FONT_SIZE
        box = FancyBboxPatch(
            (left, middle - half),
            right - left,
            2 * half,
            boxstyle=f"round,pad=0.8,rounding_size={0.25 * FONT_SIZE}",
            facecolor=color if is_present else 0.25 * color + 0.75,
            edgecolor=0.85 * color if is_present else 0.6 * color,
            linestyle="--" if entity.assertion == "uncertain" else "-",
            linewidth=1.2,
        )
        axes.add_patch(box)
        if entity.assertion == "absent":
            axes.plot([left, right], [middle, middle], color=0.8 * color, linewidth=1.4, zorder=3)
        elif entity.assertion == "uncertain":
            axes.text(right + 1, middle - half - 1, "?", size=0.75 * FONT_SIZE, weight="bold", va="center")
    for piece in pieces:
        start, end = max(piece.start, first), min(piece.end, last)
        if start >= end:
            continue
        words = "".join(c if c.isprintable() else " " for c in report.text[start:end])
        left, right = (start - first) * advance, (end - first) * advance
        weight = "bold" if piece.cue else "normal"
        baseline = middle + 0.35 * FONT_SIZE
        axes.text(left, baseline, words, size=FONT_SIZE, family=FONT, weight=weight, parse_math=False, zorder=4)
        if piece.cue:
            style = "-" if piece.cue == "absent" else (0, (2, 1.5))
            axes.plot([left, right], [baseline + 3] * 2, color="black", linewidth=1.2, linestyle=style, zorder=4)


# ---------------------------------------------------------------------------------------------------------------- page


def html_page(reports: Sequence[ReadReport]) -> str:
    """A page of its own, without scripts or links: the legend and the reports, marked as in the picture."""
    kinds = "\n".join(f".{kind} {{ --kind: {color}; }}" for kind, color in COLORS.items())
    body = [f"<p>{_marked(legend())}</p>"]
    for report in reports:
        body.append(f"<h2>{html.escape(report.title)}</h2>\n<p>{_marked(report)}</p>")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Entities of reports</title>
<style>
body {{ font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #000; background: #fff; }}
h2 {{ font-size: 1.1em; margin: 1.5em 0 0; }}
p {{ white-space: pre-wrap; margin: 0; }}
mark {{ color: inherit; border: 2px solid var(--kind); border-radius: 4px; padding: 0 2px; }}
mark {{ background: color-mix(in srgb, var(--kind) 25%, white); }}
mark.present {{ background: var(--kind); }}
mark.absent, mark.uncertain {{ border-color: color-mix(in srgb, var(--kind) 60%, black); }}
mark.absent {{ text-decoration: line-through; }}
mark.uncertain {{ border-style: dashed; }}
mark.uncertain::after {{ content: "?"; font-weight: bold; }}
b {{ text-decoration: underline 2px; text-underline-offset: 4px; }}
b.uncertain {{ text-decoration-style: dashed; }}
{kinds}
</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""


def _marked(report: ReadReport) -> str:
    parts = []
    for entity, pieces in itertools.groupby(pieces_of(report.text, report.entities), key=lambda piece: piece.entity):
        words = ""
        for piece in pieces:
            inner = html.escape(report.text[piece.start : piece.end])
            words += f'<b class="{piece.cue}">{inner}</b>' if piece.cue else inner
        if entity:
            title = html.escape(f"{entity.concept}: {entity.kind}, {entity.assertion}")
            words = f'<mark class="{entity.kind} {entity.assertion}" title="{title}">{words}</mark>'
        parts.append(words)
    return "".join(parts)

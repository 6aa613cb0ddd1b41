"""What the demo shows, as HTML; its looks are in style.css. All that a user or a file brings in is escaped here."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from ..evaluation.probabilities import Calibration
from ..inference.reading import Film, Score


STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
HEAT_SIDE = 256  # pixels of the longer side of a heat map, which the browser enlarges smoothly
WARNING = (
    "<b>Research software. Not a medical device, not for diagnosis.</b> Do not decide on anybody's care by what it "
    "shows. Images stay in memory while this page is open, for half an hour at most, and no upload is kept on disk."
)


def notice(text: str, kind: str) -> str:
    """A box with `text`, which is HTML; `kind` is "warning" or "error", which screen readers are told at once."""
    return f'<div class="mm-notice mm-{kind}" role="{"alert" if kind == "error" else "note"}">{text}</div>'


def error_notice(error: Exception | str) -> str:
    return notice(f"<b>This does not work.</b> {escape(str(error))}", "error")


def empty() -> str:
    return '<p class="mm-hint">Scores, heat maps and reports appear here when there is an image.</p>'


def _data_url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def film_page(film: Film) -> str:
    """The film itself, its name and size."""
    width, height = film.size
    return (
        f'<figure class="mm-film"><img src="{_data_url(film.picture)}" alt="The image as the model reads it">'
        f"<figcaption>{escape(film.name)}, {width} x {height} pixels</figcaption></figure>"
    )


def doubt_notice(film: Film) -> str:
    """What makes it doubtful that this is a chest radiograph; "" where nothing does."""
    if not film.likeness.is_doubtful:
        return ""
    reasons = "; ".join(film.likeness.reasons) or "it is unlike those that the rules were made with"
    return notice(
        f"<b>This may be no frontal chest radiograph</b> (likeness {film.likeness.score:.2f} of 1): {escape(reasons)}. "
        "What the model says of it then means nothing.",
        "warning mm-doubt",
    )


# ------------------------------------------------------------------------------------------------------------- scores


def scores_page(scores: Sequence[Score], calibration: Calibration | None) -> str:
    """A bar for each finding, with numbers, and the prompts to unfold."""
    if not scores:
        return '<p class="mm-hint">Choose or type a finding.</p>'
    rows = "".join(_score_row(score) for score in scores)
    return f'<h3>Findings</h3>{_meaning(scores, calibration)}<ul class="mm-scores">{rows}</ul>'


def _meaning(scores: Sequence[Score], calibration: Calibration | None) -> str:
    lines = []
    if calibration is not None and any(score.probability is not None for score in scores):
        summary = calibration.summary()
        line = f"Probabilities are fitted on {escape(calibration.data)} and hold where findings are as common as there."
        if summary["macro_ece"] is not None:
            line += f" On other images their calibration error was {100 * summary['macro_ece']:.1f} points in the mean."
        lines.append(line)
    if any(score.probability is None for score in scores):
        lines.append(
            "A score that is not calibrated is no probability: it compares films for one finding, and not findings "
            "with each other."
        )
    return f'<p class="mm-hint">{" ".join(lines)}</p>'


def _score_row(score: Score) -> str:
    finding, value = score.finding, score.score if score.probability is None else score.probability
    name = escape(finding.name) + ("" if finding.is_known else ' <span class="mm-tag">not in the vocabulary</span>')
    if score.probability is None:
        kind, numbers = "mm-raw", f'<b>{value:.2f}</b> <span class="mm-tag">score, not calibrated</span>'
        told = f"{finding.name}: score {value:.2f} of 1, not calibrated"
    else:
        present, absent = percent(value), percent(1 - value)
        kind, numbers = "mm-calibrated", f"<b>present {present}</b> <span>absent {absent}</span>"
        told = f"{finding.name}: present {present}, absent {absent}"
    return (
        f'<li class="{kind}" data-finding="{escape(finding.name)}" data-value="{value:.6f}">'
        f'<div class="mm-line"><span class="mm-name">{name}</span><span class="mm-numbers">{numbers}</span></div>'
        f'<div class="mm-bar" role="img" aria-label="{escape(told)}"><i style="width:{100 * value:.1f}%"></i></div>'
        f"{_prompts(score)}</li>"
    )


def percent(value: float) -> str:
    """Whole per cent, and never a certainty: "< 1 %", "> 99 %"."""
    return "&lt; 1 %" if value < 0.005 else "&gt; 99 %" if value >= 0.995 else f"{100 * value:.0f} %"


def _short(score: Score) -> str:
    return f"score {score.score:.2f}" if score.probability is None else f"present {percent(score.probability)}"


def _prompts(score: Score) -> str:
    positive, negative = score.finding.positive, score.finding.negative
    about = f"“{escape(positive[0])}” against " + (f"“{escape(negative[0])}”" if negative else "nothing")
    more = max(len(positive), len(negative)) - 1
    fitted = ""
    if score.calibration is not None:
        fitted = (
            f"<p>Calibrated on {score.calibration.num_present} images with and {score.calibration.num_absent} without."
        )
        if score.calibration.ece is not None:
            fitted += (
                f" Tested on {score.calibration.num_tested} others, {100 * score.calibration.share_present:.0f} % of "
                f"them with it: calibration error {score.calibration.ece:.3f}, without the fit "
                f"{score.calibration.ece_as_it_is:.3f}."
            )
        fitted += "</p>"
    columns = "".join(
        f"<div><b>{side}</b><ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul></div>"
        for side, texts in (("Present", positive), ("Absent", negative))
        if texts
    )
    others = f" and {more} more pair{'s' if more > 1 else ''}" if more else ""
    return f'<details><summary>{about}{others}</summary><div class="mm-sides">{columns}</div>{fitted}</details>'


# ---------------------------------------------------------------------------------------------------------- heat maps


def heat_picture(heatmap: np.ndarray) -> Image.Image:
    """(height, width) -> RGBA at `HEAT_SIDE`: the colour of each value and an opacity that grows with it.

    The lowest value is clear, so that the film stays readable where the map says nothing; a constant map is clear all
    over.
    """
    low, high = float(heatmap.min()), float(heatmap.max())
    strength = (heatmap - low) / (high - low) if high > low else np.zeros_like(heatmap)
    factor = HEAT_SIDE / max(strength.shape)
    size = [max(1, round(side * factor)) for side in strength.shape[::-1]]
    strength = np.asarray(Image.fromarray(strength.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    pixels = colormaps["inferno"](strength)
    pixels[..., 3] = strength
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))


def maps_page(film: Film, scores: Sequence[Score], heatmaps: np.ndarray) -> str:
    """The film under the heat map of each finding. Their opacity is the CSS variable --mm-opacity."""
    if not scores:
        return ""
    width, height = film.picture.size
    figures = []
    for score, heatmap in zip(scores, heatmaps, strict=True):
        row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
        told = f"Heat map of {score.finding.name}, highest {column / width:.0%} from the left, {row / height:.0%} down"
        figures.append(
            f'<figure tabindex="0"><div class="mm-under"><img class="mm-heat" src="{_data_url(heat_picture(heatmap))}" '
            f'alt="{escape(told)}"></div><figcaption>{escape(score.finding.name)} <small>{_short(score)}</small>'
            "</figcaption></figure>"
        )
    return (
        '<p class="mm-hint">Where the image answers the finding more than its denial. A map says where, not whether: '
        "each is stretched over its own range, for a finding that is absent too. Select one to enlarge it.</p>"
        f'<div class="mm-maps" style="--mm-film:url({_data_url(film.picture)});--mm-aspect:{width}/{height}">'
        f'{"".join(figures)}</div><p class="mm-scale"><span>least</span><i></i><span>most</span></p>'
    )


def reports_page(reports: Sequence[tuple[str, float]]) -> str:
    """The nearest reports with their cosine similarities."""
    if not reports:
        return ""
    rows = "".join(
        f"<li><span>{escape(text)}</span><small>similarity {similarity:.2f}</small></li>"
        for text, similarity in reports
    )
    return (
        "<h3>Nearest reports</h3>"
        '<p class="mm-hint">Of the set that this demo was started with. They were written about other images.</p>'
        f'<ol class="mm-reports">{rows}</ol>'
    )

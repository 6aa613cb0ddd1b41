"""A raw report: its sections, and the text of them to train on.

Cleaning (`clean_report`) is in `cleaning.py`, sentences (`split_sentences`, `is_all_capitals`) in `sentences.py`; both
can be had from here.
"""

import difflib
import re
from collections.abc import Mapping
from typing import NamedTuple

from .cleaning import clean_report, plain_text
from .sentences import SECTION_NAMES, is_all_capitals, split_sentences


# name of a text -> sections that are joined in this order; a later line where nothing of the earlier ones is there
TEXTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "findings+impression": (("findings", "impression"), ("last_paragraph",)),
    "impression": (("impression",),),
    "impression or findings": (("impression",), ("findings",), ("last_paragraph",)),
    "findings": (("findings",),),
    # of the two, as CXR-CLIP does for retrieval on Open-i
    "longer": (("findings", "impression"),),
    # the order of the code published with MIMIC-CXR; a comparison is often no more than "None."
    "mimic-cxr": (("impression",), ("findings",), ("last_paragraph",), ("comparison",)),
}


def report_text(sections: Mapping[str, str | None], text: str = "findings+impression") -> str:
    """The text to train on, clean, out of the sections of a report; `text` is one of `TEXTS`. "" where there is none.

    Sections may be missing, empty or None. Each ends with a period, so that two that are joined stay two sentences.
    """
    if text not in TEXTS:
        raise ValueError(f"text is {text!r}, expected one of {', '.join(TEXTS)}.")
    for names in TEXTS[text]:
        parts = [part for name in names if (part := clean_report(sections.get(name) or ""))]
        if parts:
            if text == "longer":
                parts = [max(parts, key=len)]
            return " ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts)
    return ""


_LINE_HEADER = re.compile(r"^[ \t]*([A-Za-z][A-Za-z0-9_ ()/,&'-]{1,78}?)[ \t]*(?:(:)(?!\d)[ \t]*|$)", re.MULTILINE)
_NAMES = "|".join(sorted((name.replace(" ", "[ ]+") for name in SECTION_NAMES), key=len, reverse=True))
_HEADER_IN_LINE = re.compile(rf"(?<![^\s.!?;>])({_NAMES})[ \t]*:(?!\d)[ \t]*", re.IGNORECASE)
_BANNER = re.compile(
    r"^[ \t]*(?:(?:FINAL|PRELIMINARY|RADIOLOGY|ADDENDED) (?:RADIOLOGY )?REPORT)[ \t]*:?[ \t]*$", re.MULTILINE
)
_RULE = re.compile(r"^[ \t]*[_=*~#-]{5,}[ \t]*$", re.MULTILINE)
_NAME_OF_THE_FILM = re.compile(r"\b(?:chest|radiographs?|views?|frontal|portable)\b", re.IGNORECASE)
# "LUNGS:" is a part of the findings
_PART_OF_THE_BODY = re.compile(
    r"\b(?:lungs?|pleura[el]?|heart|cardiac|cardiomediastin\w+|mediastin\w+|hil[aiu]m?|airways?|trachea|bon(?:es?|y)|"
    r"osseous|skelet\w+|spine|ribs?|soft tissues?|diaphragms?|abdomen|vascul\w+|aorta|lines|tubes|devices|catheters?|"
    r"support|hardware|other)\b",
    re.IGNORECASE,
)
_MAIN_SECTIONS = ("impression", "findings", "history", "comparison", "addendum")
_OFTEN_MISSPELT = ("impression", "findings", "indication", "comparison", "examination", "conclusion")
_ENDINGS = (
    "end of",
    "dictated",
    "signed",
    "transcribed",
    "electronically",
    "notification",
    "recommendation",
    "accession",
)
_NON_BLANK = re.compile(r"\S")
_NO_SECTIONS = ("banner", "other")
_OF_THE_IMAGE = ("findings", "impression", "combined", "film")


def report_sections(text: str) -> dict[str, str]:
    """The sections of a raw report, by headers such as "FINDINGS:" and "IMPRESSION:".

    Keys are "findings", "impression", "indication", "comparison", "technique", "examination", "wet_read", "addendum"
    where there, and "last_paragraph": where there is neither findings nor impression, what follows the first blank line
    of the last section, or all of a text without headers. Of a section that occurs twice the last one that says
    something counts, which is how addenda are written.

    A header is a line's beginning in capitals up to a colon ("NOTIFICATION:" ends the impression); for the names in
    `SECTION_NAMES` also in small letters, misspelt, alone on a line, or in capitals or after a period within a line.
    "FINDINGS/IMPRESSION:" is the impression, and the findings where another impression follows. What follows the name
    of the film ("PORTABLE CHEST RADIOGRAPH:") is the findings where no section is called so. "LUNGS:" and the like
    within findings or impression are text, and so are unknown headers of a report that is all in capitals.
    """
    text = _RULE.sub("", plain_text(text))
    headers = _headers(text)
    ends = [*(header.start for header in headers[1:]), len(text)]
    bodies = [text[header.end : end] for header, end in zip(headers, ends, strict=False)]
    last_of: dict[str, str] = {}
    for header, body in zip(headers, bodies, strict=True):
        if body.strip():
            last_of[header.section] = body.strip()
    sections = {name: body for name, body in last_of.items() if name not in (*_NO_SECTIONS, "combined", "film")}
    if "combined" in last_of:
        sections.setdefault("findings" if "impression" in sections else "impression", last_of["combined"])
    if "film" in last_of:
        sections.setdefault("findings", last_of["film"])
    if "findings" not in sections and "impression" not in sections:
        has_no_header = not headers or headers[-1].section == "banner"
        first, *others = re.split(r"\n[ \t]*\n", text[headers[-1].end :].strip() if headers else text.strip())
        paragraph = "\n\n".join(others).strip() or (first if has_no_header else "")
        if paragraph:
            sections["last_paragraph"] = paragraph
            if headers and headers[-1].section in sections:
                sections[headers[-1].section] = first.strip()
    return sections


class _Header(NamedTuple):
    section: str  # or "combined", "film", one of `_NO_SECTIONS`
    start: int
    end: int  # where its text begins


def _headers(text: str) -> list[_Header]:
    in_capitals = is_all_capitals(text)
    matches = [match for pattern in (_BANNER, _LINE_HEADER, _HEADER_IN_LINE) for match in pattern.finditer(text)]
    matches.sort(key=lambda match: (match.start(), match.re is not _BANNER, match.re is _HEADER_IN_LINE))
    headers = [_Header("banner", 0, 0)]
    for match in matches:
        if match.start() < headers[-1].end:
            continue
        if match.re is _BANNER:
            section = "banner"
        elif match.re is _HEADER_IN_LINE:
            section = _section_within_a_line(text, match)
        else:
            running = headers[-1]
            is_of_image = running.section in _OF_THE_IMAGE
            is_begun = is_of_image and bool(_NON_BLANK.search(text, running.end, match.start()))
            section = _section(match[1], bool(match[2]), in_capitals, is_of_image, is_begun)
        if section is not None:
            headers.append(_Header(section, match.start(), match.end()))
    return headers[1:]


def _section(header: str, has_colon: bool, in_capitals: bool, is_of_image: bool, is_begun: bool) -> str | None:
    """The section that a line's beginning heads, None where it is text.

    `is_of_image`: it stands in findings or impression; `is_begun`: and these have text before it.
    """
    name = re.sub(r" ?/ ?", "/", " ".join(header.lower().split()))
    if name in SECTION_NAMES:
        return SECTION_NAMES[name] if has_colon or header[0].isupper() else None
    if not has_colon or not header.isupper() or len(name) < 3:
        return None
    if name.startswith(_ENDINGS):
        return "other"
    if close := difflib.get_close_matches(name, _OFTEN_MISSPELT, 1, cutoff=0.85):
        return SECTION_NAMES[close[0]]
    for main in _MAIN_SECTIONS:
        if main in name:
            return SECTION_NAMES[main]
    is_film = bool(_NAME_OF_THE_FILM.search(name))
    if (is_begun and is_film) or (is_of_image and not is_film and _PART_OF_THE_BODY.search(name)):
        return None
    if is_film:
        return "film"
    return None if in_capitals else "other"


def _section_within_a_line(text: str, match: re.Match) -> str | None:
    header, start = match[1], match.start()
    before = text[max(0, start - 8) : start].rstrip(" \t")
    starts_sentence = not before or before[-1] in ".!?:;>\n" or text[max(0, start - 2) : start] == "  "
    if not (header.isupper() or (header[0].isupper() and starts_sentence)):
        return None
    return SECTION_NAMES[re.sub(r" +", " ", header.lower())]


__all__ = ["TEXTS", "clean_report", "is_all_capitals", "report_sections", "report_text", "split_sentences"]

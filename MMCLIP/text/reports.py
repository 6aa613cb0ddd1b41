"""Raw report text made ready: white space, marks of de-identification, sentence borders."""

import re


# What the public sets write in place of removed words: Open-i XXXX, MIMIC-CXR ___ and [** ... **].
_REMOVED = re.compile(r"\[\*\*.*?\*\*\]|_{2,}|\bX{3,}\b", re.DOTALL)
_BLANK_LINE = re.compile(r"(?<=[\w)])[ \t]*\r?\n\s*\r?\n\s*(?=\S)")
_EMPTY_SENTENCE = re.compile(r"([.!?])\s*(?:\0\s*)+[.!?]")  # each \0 a mark
_ABBREVIATIONS = frozenset(
    "dr mr mrs ms prof st vs cf fig figs no approx ca e.g i.e eg ie resp incl max min vol s.p a.m p.m al".split()
)
_SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"')\]]|$)|\n\s*\n|;(?=\s)")


def clean_report(text: str) -> str:
    """Report text with the marks of de-identification taken out and every run of white space made one blank.

    A sentence of nothing but such marks goes with its period.
    A blank line stays a sentence border: it becomes ". " where the text before it ends without punctuation.
    Returns "" for a text that holds nothing else; whether that is an error is for the caller to say.
    """
    # most reports have none of this, and looking for a character is many times as fast as the expression
    if "_" in text or "XXX" in text or "[**" in text:
        text = _EMPTY_SENTENCE.sub(r"\1", _REMOVED.sub("\0", text)).replace("\0", " ")
    if "\n" in text:
        text = _BLANK_LINE.sub(". ", text)
    text = " ".join(text.split())
    for sign in ".,;:":
        text = text.replace(f" {sign}", sign)
    return text


def split_sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of every sentence, blanks around it left out; the period belongs to its sentence.

    A period ends no sentence inside a number ("2.5 cm"), after a known abbreviation ("Dr.", "e.g.", "vs."), after a
    single letter ("E. coli") or when the next word begins in lower case and the period stands after an abbreviation
    of at most two letters. A semicolon and a blank line end one.
    """
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        if match.group() == "." and _is_abbreviation(text, start, match):
            continue
        _append_stripped(sentences, text, start, match.end())
        start = match.end()
    _append_stripped(sentences, text, start, len(text))
    return sentences


def _is_abbreviation(text: str, start: int, period: re.Match) -> bool:
    words = text[start : period.start()].split()
    if not words:
        return False
    word = words[-1].strip("(\"'[").lower()
    following = text[period.end() :].lstrip()[:1]
    if len(words) == 1 and word.isdigit() and following:  # "1. No pneumothorax." numbers a list
        return True
    if word == "no":  # "no. 3", but not "Effusion? No. Heart normal."
        return following.isdigit()
    if word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha()):
        return bool(following)
    return len(word) <= 2 and word.isalpha() and following.islower()


def _append_stripped(sentences: list[tuple[int, int]], text: str, start: int, end: int) -> None:
    piece = text[start:end]
    stripped = piece.strip()
    if stripped:
        begin = start + len(piece) - len(piece.lstrip())
        sentences.append((begin, begin + len(stripped)))


_HEADER = re.compile(
    r"^[ \t]*([A-Z][A-Z ()/,-]{2,}?|"
    r"(?i:findings|impression|conclusion|indication|clinical history|comparison|technique))[ \t]*:[ \t]*",
    re.MULTILINE,
)
_NAME_OF_THE_FILM = re.compile(r"\b(?:chest|radiographs?|views?|frontal|portable)\b", re.IGNORECASE)
_SECTION_NAMES = {  # header in a report -> section
    "findings": "findings",
    "finding": "findings",
    "findings and impression": "findings",
    "findings/impression": "findings",
    "impression": "impression",
    "impressions": "impression",
    "conclusion": "impression",
    "opinion": "impression",
    "indication": "indication",
    "history": "indication",
    "clinical history": "indication",
    "clinical information": "indication",
    "reason for exam": "indication",
    "reason for examination": "indication",
    "comparison": "comparison",
    "comparisons": "comparison",
    "technique": "technique",
    "procedure": "technique",
    "examination": "examination",
    "exam": "examination",
}


def report_sections(text: str) -> dict[str, str]:
    """The sections of a raw report, by headers in capitals at the start of a line ("FINDINGS:", "IMPRESSION:").

    Keys are "findings", "impression", "indication", "comparison", "technique", "examination" where there, and
    "last_paragraph", the text after the last blank line of a report that has neither findings nor impression. Of a
    section that occurs twice the last one that says something counts, which is how addenda are written. What follows
    the name of the film ("PORTABLE CHEST RADIOGRAPH:") is the findings where no section is called so. The commonest
    headers count in small letters, too ("Findings:").
    """
    sections: dict[str, str] = {}
    of_the_film = ""
    headers = list(_HEADER.finditer(text))
    ends = [*(header.start() for header in headers[1:]), len(text)]
    for header, end in zip(headers, ends, strict=False):  # without a header there is still an end
        name = _SECTION_NAMES.get(re.sub(r"\s+", " ", header[1]).strip().lower())
        body = text[header.end() : end].strip()
        if name and body:
            sections[name] = body
        elif body and _NAME_OF_THE_FILM.search(header[1]):
            of_the_film = body
    if of_the_film:
        sections.setdefault("findings", of_the_film)
    if "findings" not in sections and "impression" not in sections:
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
        if paragraphs and not _HEADER.match(paragraphs[-1]):
            sections["last_paragraph"] = paragraphs[-1]
    return sections

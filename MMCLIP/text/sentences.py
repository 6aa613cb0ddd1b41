"""Where the sentences of a report begin and end, and whether it is written in capitals."""

import re


SECTION_NAMES = {  # header in a report, in small letters and with single blanks -> section
    "findings": "findings",
    "finding": "findings",
    "findings and impression": "combined",
    "findings & impression": "combined",
    "findings/impression": "combined",
    "impression and findings": "combined",
    "impression/findings": "combined",
    "impression": "impression",
    "impressions": "impression",
    "conclusion": "impression",
    "conclusions": "impression",
    "opinion": "impression",
    "summary": "impression",
    "indication": "indication",
    "indications": "indication",
    "clinical indication": "indication",
    "clinical indications": "indication",
    "history": "indication",
    "clinical history": "indication",
    "patient history": "indication",
    "clinical information": "indication",
    "clinical data": "indication",
    "reason for exam": "indication",
    "reason for examination": "indication",
    "reason for study": "indication",
    "comparison": "comparison",
    "comparisons": "comparison",
    "comparison exam": "comparison",
    "comparison film": "comparison",
    "comparison study": "comparison",
    "reference exam": "comparison",
    "technique": "technique",
    "procedure": "technique",
    "examination": "examination",
    "type of examination": "examination",
    "exam": "examination",
    "study": "examination",
    "wet read": "wet_read",
    "wetread": "wet_read",
    "addendum": "addendum",
    "addenda": "addendum",
}

# before a name or a second alternative: what follows is never a new sentence
_LEADING = frozenset("dr drs prof ph vs cf e.g i.e eg ie".split())
_LEADING_IN_THIS_CASE = frozenset("Mr Mrs Ms St mr mrs".split())  # MR is a scan and ST a segment
_SHORTENED = frozenset("fig figs no nos approx ca resp incl max min vol al ext diam".split())
_BEFORE_A_NAME = re.compile(r"(?:\b[A-Za-z]\.|\b(?:Drs?|DRS?|dr|Prof|by|with|to|from|doctor|nurse|BY|WITH)\.?)\s+$")
_DOTTED = re.compile(r"[a-z](?:\.[a-z])+")
_CLOSING = "\"')]}\u201d\u2019\u00bb"
_CANDIDATE = re.compile("[.!?\u2026]+|[;:\n\r\u2022]|\\)(?=\\s)")
_NON_BLANK = re.compile(r"\S")
_LIST_NUMBER = re.compile(r"\(?\d{1,2}[.)](?!\d)")
_LIST_ITEM = re.compile(r"[-*\u2022\u2013]\s+(?=\S)|\(?\d{1,2}[.)]\s*(?=[^\W\d_])")
_NEW_SENTENCE = re.compile(r"[A-Z](?:[A-Za-z]|\s)|\d{1,2}[.)](?:\s|[A-Z][a-z])")
_HEADER_IN_LINE = re.compile(
    rf"(?<!\S)(?:{'|'.join(sorted(SECTION_NAMES, key=len, reverse=True)).upper().replace(' ', '[ ]+')})[ ]*$"
)
_CONNECTING = frozenset("no of the with and or in a an at to for by without on from is are was were".split())
SHORT_LINE = 50  # text that was wrapped has longer lines, so that this one was ended on purpose

_SMALL_WORD = re.compile("[a-z\u00df-\u00f6\u00f8-\u00ff]{3}")
_LARGE_WORD = re.compile(r"[A-Z]{5}|\b(?:THE|OF|NO|IS|ARE|AND|WITH|IN|AT|FOR|OR)\b")


def is_all_capitals(text: str) -> bool:
    """Whether a report or sentence is written in capitals, so that capitals do not tell an abbreviation from a word.

    True where at most a tenth of the letters is small ("5 cm") and capitals spell an ordinary word: one of five
    letters or more, or one like OF and THE. So False for "COPD, CHF." and for a text without letters.
    """
    if _SMALL_WORD.search(text) or not _LARGE_WORD.search(text):
        return False
    small = sum(map(str.islower, text))
    return 10 * small <= small + sum(map(str.isupper, text))


def split_sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of every sentence of `text`: in order, not overlapping, and between them nothing but blanks.

    The period belongs to its sentence, and so does a closing bracket or quotation mark after it. A period ends none
    inside a number ("2.5 cm"), after an abbreviation ("Dr.", "vs.", "approx. 3"), after an initial ("E. coli", "by J.
    Smith") and after the number of a list item, which begins a sentence ("1. No effusion 2. Edema"). It ends one
    without a blank after it, too ("normal.No effusion"). An ellipsis before a small letter does not; a semicolon does.
    A line break ends a sentence before an empty line, a list item or a header, and after a line of less than
    `SHORT_LINE` characters where the next one begins with a capital. A header in capitals begins one anywhere.
    """
    found = _NON_BLANK.search(text)
    if found is None:
        return []
    sentences: list[tuple[int, int]] = []
    begin = found.start()
    number = 0  # of the list item that was last
    line = 0  # where it begins, blanks left out
    for match in _CANDIDATE.finditer(text):
        at, end = match.span()
        sign = text[at]
        is_break = sign in "\n\r"
        if at < (line if is_break else begin):
            continue
        following = _NON_BLANK.search(text, end)
        if following is None:
            break
        after = following.start()
        cut = 0
        if is_break:
            if at >= begin and _breaks_sentence(text, at, after, at - line):
                cut = after
            line = after
        elif sign in ".!?\u2026)":
            item = None
            if (sign == "." and end == at + 1) or sign == ")":
                item, number = _list_item(text, begin, at, after, number)
            if item is not None:
                cut = item
            elif sign != ")":
                cut = _end_of_sentence(text, begin, match, after)
        elif sign == ";":
            cut = end if after > end else 0
        elif sign == ":":
            header = _HEADER_IN_LINE.search(text[max(begin, at - 40) : at])
            cut = header.start() + max(begin, at - 40) if header else 0
        else:  # the bullet of a list item
            cut = at
        if cut > begin:
            sentences.append((begin, _last_non_blank(text, cut)))
            begin = _NON_BLANK.search(text, cut).start()
    sentences.append((begin, _last_non_blank(text, len(text))))
    return sentences


def _last_non_blank(text: str, end: int) -> int:
    while text[end - 1].isspace():
        end -= 1
    return end


def _number_before(text: str, begin: int, at: int) -> tuple[int, int] | None:
    """(number, its position) where one of at most two digits, perhaps with a bracket, stands alone before `at`."""
    start = at
    while start > begin and text[start - 1] in "0123456789":
        start -= 1
        if at - start > 2:
            return None
    if start == at:
        return None
    number = int(text[start:at])
    if start > begin and text[start - 1] == "(":
        start -= 1
    return (number, start) if start == begin or text[start - 1].isspace() else None


def _list_item(text: str, begin: int, at: int, after: int, last: int) -> tuple[int | None, int]:
    """(border before the list item, the number that was last): 0 where none is needed, None where there is no item."""
    counted = _number_before(text, begin, at)
    if counted is None:
        return None, last
    number, start = counted
    if start == begin or text[_last_non_blank(text, start) - 1] == ":":
        return (0, number) if not _LIST_NUMBER.match(text, after) else (None, number)
    if text[after].isalpha() and number == last + 1:
        return (start, number) if last else (None, number)
    return None, last


def _end_of_sentence(text: str, begin: int, match: re.Match, after: int) -> int:
    """Behind the signs of `match` (periods, question marks, ...) if they end a sentence, else 0."""
    at, end = match.span()
    if end < len(text) and not text[end].isspace():
        closed = end
        while closed < len(text) and text[closed] in _CLOSING:
            closed += 1
        if closed == end or (closed < len(text) and not text[closed].isspace()):
            return end if _is_glued(text, begin, match) else 0
        end = closed
        following = _NON_BLANK.search(text, end)
        if following is None:
            return 0
        after = following.start()
    if match.group() == ".":
        return 0 if _is_abbreviation(text, begin, at, after) else end
    is_ellipsis = len(match.group()) > 2 or "\u2026" in match.group()
    return 0 if is_ellipsis and text[after].islower() else end


def _word_before(text: str, begin: int, at: int) -> str:
    piece = text[max(begin, at - 16) : at]
    return piece.rsplit(None, 1)[-1].lstrip("(\"'[") if piece and not piece[-1].isspace() else ""


def _is_abbreviation(text: str, begin: int, at: int, after: int) -> bool:
    word, following = _word_before(text, begin, at), text[after]
    small = word.lower()
    if small in _LEADING or word in _LEADING_IN_THIS_CASE:
        return True
    if following.isdigit():
        if _LIST_NUMBER.match(text, after):
            return False
        return small in _SHORTENED or word.isdigit() or bool(_DOTTED.fullmatch(small))  # "approx. 3", "2. 5 cm"
    if len(word) == 1 and word.isalpha():
        start = at - 1
        before = text[max(begin, start - 12) : start]
        return following.islower() or start == begin or bool(_BEFORE_A_NAME.search(before))
    if not following.islower() or small == "no":
        return False
    return small in _SHORTENED or (len(word) <= 2 and word.isalpha()) or bool(_DOTTED.fullmatch(small))


def _is_glued(text: str, begin: int, match: re.Match) -> bool:
    """Whether a sentence ends although no blank follows: "normal.No effusion", but not "2.5", "e.g.an", "U.S.A"."""
    at, end = match.span()
    if not _NEW_SENTENCE.match(text, end):
        return False
    if match.group() != ".":
        return text[end].isalpha()
    word = _word_before(text, begin, at)
    if word.isdigit():
        return text[end].isalpha()
    if len(word) < 2 or word.lower() in _LEADING or word in _LEADING_IN_THIS_CASE or _DOTTED.fullmatch(word.lower()):
        return False
    return word[-1].islower() or word[-1] == ")" or (word[-2:].isalpha() and word[-2:].isupper())


def _breaks_sentence(text: str, at: int, after: int, length: int) -> bool:
    blanks = text[at:after]
    if blanks.count("\n") > 1 or blanks.count("\r") > 1:
        return True
    return ends_sentence(text[max(0, at - 16) : at].rstrip(), text[after : after + 60], length)


def ends_sentence(line: str, next_line: str, length: int) -> bool:
    """Whether the break between two lines, stripped of blanks, ends a sentence; `length` is that of the first.

    Of the first line the last word is enough, of the second one the first 60 characters.
    """
    if not line or line[-1] in ",:-/(":
        return False
    if _LIST_ITEM.match(next_line):
        return True
    name, colon, _ = next_line.partition(":")
    if colon and name.rstrip().isupper() and name.rstrip().lower() in SECTION_NAMES:
        return True
    if not next_line[:1].isupper() or length >= SHORT_LINE:
        return False
    word = line.split()[-1].lower()
    return word not in _CONNECTING and not word.endswith(".")  # a period that ends none was looked at before

"""Report text made ready: white space, marks of de-identification, mark-up and what dictation leaves behind."""

import re

from .sentences import ends_sentence


# "fi" to "ffl" as one sign, quotation marks, hyphens, bullets; what is not seen goes
_SIGNS = {
    **dict(
        zip("\ufb00\ufb01\ufb02\ufb03\ufb04\ufb05\ufb06", ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True)
    ),
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
    **dict.fromkeys("\u2014\u2015", " - "),
    **dict.fromkeys("\u2022\u25aa\u25e6\u2023\u25cf\u2219", "\n- "),
    **dict.fromkeys("\u2028\u2029\u0085", "\n"),
    **dict.fromkeys("\u00ad\u200b\u2060\ufeff", ""),
    "\u2026": "...",
}
_SIGNS = str.maketrans(_SIGNS)
_UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")

_TAG = re.compile(
    r"</?(?:(br|p|div|tr|li|ul|ol|h[1-6]|hr|table|html|head|body|pre)|b|i|u|em|strong|span|font|td|th|tbody|a|sup|sub)"
    r"(?:\s+[a-zA-Z-]+\s*=[^<>]*)?\s*/?>|<[!?][^<>]*>",
    re.IGNORECASE,
)
_ENTITIES = {
    "lt": "<", "gt": ">", "quot": '"', "apos": "'", "nbsp": " ", "ndash": "-", "mdash": " - ", "hellip": "...",
    "lsquo": "'", "rsquo": "'", "ldquo": '"', "rdquo": '"', "deg": "\u00b0", "micro": "\u00b5", "times": "\u00d7",
    "bull": "\n- ", "#34": '"', "#39": "'", "#60": "<", "#62": ">", "#160": " ", "#8217": "'",
}  # fmt: skip
_ENTITY = re.compile(rf"&(?:amp;|#0*38;)*(amp|#0*38|{'|'.join(_ENTITIES)});", re.IGNORECASE)

_KIND = (
    r"(?:DATE|TIME|NAME|PERSON|PATIENT|DOCTOR|PHYSICIAN|STAFF|HOSPITAL|LOCATION|ID|MRN|PHONE|AGE|PHI|REDACTED|REMOVED|"
    r"DEIDENTIFIED|UNK|unk|unknown|UNKNOWN|ORGANIZATION|ADDRESS|ACCESSION)(?:[ _-]?\d{1,4})?"
)
# what stands for removed words: Open-i XXXX, MIMIC-CXR ___, MIMIC-III [** ... **], and <DATE>, [NAME 1], {{ID}}
_REMOVED = re.compile(
    rf"\[\*\*[^*\[\]]*\*\*\]|<{_KIND}>|\[{_KIND}\]|\{{{{?{_KIND}\}}?\}}|_{{2,}}|[Xx]{{4,}}|\b[Xx]{{3}}\b"
)
# below, \0 is such a mark
_MARK_RULES = tuple(
    (re.compile(expression, re.IGNORECASE), new)
    for expression, new in (
        # two words that have a letter left, and can be nothing else
        (r"\b(x)-\0", r"\1-ray"),
        (r"\0-a-\0", "port-a-cath"),
        (r"\0'[a-z]{0,2}(?![a-z])", "\0"),
        (r"[(\[<{]\s*\0\s*[)\]>}]", "\0"),
        (r"\0(?:(?:\s*(?:[-/,]\s*)?|:)\0)+", "\0"),
        (r"\0[-/]+(?=\w)", "\0 "),
        (r"(?<=\w)[-/]+\0", " \0"),
        (r"([(\[])\s*\0\s*[,;:]?", r"\1"),
        (r"[,;:]?\s*\0\s*([)\]])", r"\1"),
        # a title without its name, or "vs." without its second part, would hide that the sentence ends
        (
            r"\b(?:(?:drs?|(?-i:Mrs?|Ms)|prof|vs|cf|ca|approx|e\.g|i\.e|[ap]\.m|[a-z](?=\.))\.?\s*){1,3}\0"
            r"\s*(?=[.!?;]|\Z)",
            "\0",
        ),
        # a sentence or list item of nothing but marks goes, "No XXXX." too
        (r"(?:\A|(?<=[.!?]))\s*(?:\d{1,2}[.)]\s*)?(?:no\s+)?\0[\s,]*[.!?](?!\d)", ""),
        (r"\b(no|without|and|or)(\s+)\0\s*,", r"\1\2"),
        (r"\0", " "),
    )
)

_RULE = re.compile(r"[_=*~#-]{5,}")
_BANNERS = frozenset({"FINAL REPORT", "PRELIMINARY REPORT", "RADIOLOGY REPORT", "FINAL RADIOLOGY REPORT", "REPORT"})
_BULLET = re.compile(r"(?:[-*]\s+)+(?=\S)")
_NEXT_ITEM = re.compile(r"\s-\s+(?=[A-Z])")

_SPOKEN = ("period", "full stop", "comma", "paragraph")
_SPOKEN_PERIOD = re.compile(r"\b(\w+)[ \t]+(?i:period|full stop)(?=\s+(?!OF\b)[A-Z]|(\s*\Z))")
_BEFORE_A_PERIOD_OF_TIME = frozenset("a an the this that time same long short of in over each".split())
_SPOKEN_COMMA = re.compile(r"(?<=\w)[ \t]+comma\b(?!-)", re.IGNORECASE)
_SPOKEN_PARAGRAPH = re.compile(r"[ \t]*\b(?:new|next) paragraph\b[ \t]*", re.IGNORECASE)
# up to the end of its sentence or line
_SIGNATURE = re.compile(
    r"(?:^|(?<=[.!?;\n]))[ \t]*(?:END OF (?:THE )?(?:REPORT|IMPRESSION|FINDINGS|DICTATION|ADDENDUM)\b[ \t]*[.:]*|"
    r"(?:(?:(?:report|electronically|digitally)[ \t]+)?(?:dictated|signed|transcribed)|"
    r"(?:report|electronically|digitally)[ \t]+(?:approved|verified|authenticated))"  # "verified by CT" is a finding's
    r"(?:[ \t]+(?:and|electronically|dictated|signed|reviewed|approved|but|not|read)){0,4}[ \t]*(?:\bby\b|:)"
    r"(?:\b(?:drs?|mrs?|ms|prof|[a-z])\.|[^.\n]|\.(?=\S))*\.?)",
    re.IGNORECASE,
)
_SIGNED = ("end of", "dictated", "signed", "transcribed", "approved", "verified", "authenticated")

_EMPTY_BRACKETS = re.compile(r"[(\[{]\s*[)\]}]")  # a field of a template that nobody filled in
_FIELD = re.compile(r"\[\s*<|>\s*\]|[\[\]]")
_PUNCTUATION = (
    (re.compile(r" ([,;:)]|\.(?!\d))"), r"\1"),
    (re.compile(r"\( "), "("),
    (re.compile(r",(?: ?,)+"), ","),
    (re.compile(r"[,;:] ?\.(?!\S)"), "."),
    (re.compile(r"\A(?:[ ,;:)]|\.(?!\d))+"), ""),
)
_SUSPICIOUS = re.compile(r"[ ,;:][,.;:)]|\( |\A[.,;:)]")
_PERIODS = re.compile(r"\.(?: ?\.)+(?!\d)")
_TWICE = re.compile(r"(?<![\w'/-])([a-z]{2,})(?: \1)+(?![\w'/-])", re.IGNORECASE)


def clean_report(text: str) -> str:
    """Report text with the marks of de-identification taken out and every run of white space made one blank.

    It moves characters, so it must run before entities are found. Capitals stay as they are. Cleaning what is clean
    changes nothing. Returns "" for a text that holds nothing else; whether that is an error is for the caller to say.

    - Words that were removed (`XXXX`, `___`, `[** **]`, `<DATE>`) go with what hung on them ("XXXX's", "(XXXX)"), a
      sentence of nothing else with its period. "x-XXXX" is x-ray, "XXXX-a-XXXX" port-a-cath.
    - A blank line stays a sentence border, and so does a line break before a list item or a header, or after a short
      line before a capital: it becomes ". " where the text before it ends without punctuation. Bullets go.
    - HTML tags and entities, typographic quotation marks, hyphens and ligatures become plain text.
    - Of dictation go doubled periods and words ("..", "the the"), "period" and "comma" that were spoken, empty fields
      ("[ ]") and the brackets of others, signatures ("Dictated by ..."), "END OF REPORT", and banners.
    """
    for _ in range(10):  # one more than is needed, for whatever one pass laid open
        cleaned = _clean_once(text)
        if cleaned == text:
            break
        text = cleaned
    return text


def plain_text(text: str) -> str:
    """`text` without HTML, control characters and typographic signs; its lines stay, each ending with "\\n"."""
    if "\r" in text or "\f" in text or "\v" in text:
        text = re.sub(r"\r\n?|[\f\v]", "\n", text)
    if not text.isascii():
        text = text.translate(_SIGNS)
    text = _UNPRINTABLE.sub(" ", text)
    if "&" in text:
        text = _ENTITY.sub(lambda match: _ENTITIES.get(match[1].lower(), "&"), text)
    if "<" in text:
        text = _TAG.sub(_tag, text)
    return text


def _tag(match: re.Match) -> str:
    name = (match[1] or "").lower()
    if not name:
        return ""
    return {"br": "\n", "li": "\n- " if match[0][1] != "/" else "\n", "tr": "\n"}.get(name, "\n\n")


def _clean_once(text: str) -> str:
    lines = [" ".join(line.split()) for line in plain_text(text).split("\n")]
    if len(lines) > 1:
        lines = ["" if _RULE.fullmatch(line) else line for line in lines]
    # from here on no run of blanks is longer than two, so that no expression takes long for them
    text = re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip()
    if "XXX" in text or "xxx" in text or any(sign in text for sign in "_[<{"):
        text = _REMOVED.sub("\0", text)
        if "\0" in text:
            for expression, new in _MARK_RULES:
                text = expression.sub(new, text)
    small = text.lower()
    if any(word in small for word in _SPOKEN):
        text = _write_punctuation(text)
    if any(word in small for word in _SIGNED):
        text = _SIGNATURE.sub("\n", text)
    if "\n" in text or text[:1] in ("-", "*"):
        text = _join_lines(text)
    if "(" in text or "[" in text or "]" in text or "{" in text:
        text = _FIELD.sub(" ", _EMPTY_BRACKETS.sub(" ", text))
    text = " ".join(text.split())
    if _SUSPICIOUS.search(text):
        for expression, new in _PUNCTUATION:
            text = expression.sub(new, text)
    if ".." in text or ". ." in text:
        text = _PERIODS.sub(lambda match: "..." if "..." in match[0] else ".", text)
    words = text.lower().split()
    if any(map(str.startswith, words[1:], words)):
        text = _TWICE.sub(r"\1", text)
    return text.strip()


def _write_punctuation(text: str) -> str:
    """Put in what was dictated by name. "colon" and "new line" stay: they are anatomy and catheters, too."""
    has_periods = ". " in text

    def period(match: re.Match) -> str:
        is_time = match[1].lower() in _BEFORE_A_PERIOD_OF_TIME or (match[2] is not None and has_periods)
        return match[0] if is_time else f"{match[1]}."

    text = _SPOKEN_COMMA.sub(",", _SPOKEN_PERIOD.sub(period, text))
    return _SPOKEN_PARAGRAPH.sub("\n\n", text)


def _join_lines(text: str) -> str:
    joined: list[str] = []
    is_border = False
    for line in map(str.strip, text.split("\n")):
        if not line.strip("-* ") or line.rstrip(":").upper() in _BANNERS:
            is_border = True
            continue
        bullet = _BULLET.match(line)
        if joined and (is_border or ends_sentence(joined[-1][-16:], line[:60], len(joined[-1]))):
            if joined[-1][-1].isalnum() or joined[-1][-1] in ")%\"'":
                joined[-1] += "."
        if bullet:
            line = line[bullet.end() :]
            line = _NEXT_ITEM.sub(". ", line)
        joined.append(line)
        is_border = False
    return " ".join(joined)

"""Words of a text, and the phrases of a lexicon that occur among them, by spaCy's PhraseMatcher."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Word(NamedTuple):
    """A run of letters or digits, or a sign; `text` is in lower case, `stem` without plural ending."""

    text: str
    stem: str
    start: int
    end: int


class Match(NamedTuple):
    """Words `first` to `stop` (exclusive) are a phrase that stands for `value`."""

    first: int
    stop: int
    value: Any


_WORD = re.compile(r"\d+(?:\.\d+)+|[^\W_]+(?:['’][^\W\d_]+)?|[.;:!?,/()\[\]]|\n\s*\n")
_IRREGULAR = {
    "atelectases": "atelectasis", "metastases": "metastasis", "apices": "apex",
    "bullae": "bulla", "emboli": "embolus", "hila": "hilum", "vertebrae": "vertebra", "bronchi": "bronchus",
"pleurae": "pleura", "sulci": "sulcus", "thrombi": "thrombus", "oedema": "edema",
    "diagnoses": "diagnosis", "bodies": "body", "viscera": "viscus", "x-rays": "x-ray", "arteries": "artery",
    "haemothorax": "hemothorax", "is": "is", "has": "has", "was": "was", "as": "as", "this": "this", "does": "does",
}  # fmt: skip


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A lower-case word without its plural ending: both sides of a comparison go through it."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("thoraces"):
        return word[:-3] + "x"
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def find_words(text: str) -> list[Word]:
    """The words and signs of a text in order; hyphens and blanks only part them."""
    lower = text.lower()
    if len(lower) != len(text):  # a few letters change length in lower case, which would shift offsets
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return [Word(match[0], stem(match[0]), match.start(), match.end()) for match in _WORD.finditer(lower)]


class PhraseIndex:
    """Phrases and what they stand for; `find` looks for all of them at once, whatever their number."""

    def __init__(self):
        from spacy.matcher import PhraseMatcher  # takes half a second to import
        from spacy.vocab import Vocab

        self._vocab = Vocab()
        self._matcher = PhraseMatcher(self._vocab)
        self._values: dict[int, list] = {}

    def add(self, phrase: str, value: Any) -> None:
        """Let `phrase` stand for `value`, too."""
        stems = [word.stem for word in find_words(phrase)]
        name = "\x1f".join(stems)
        key = self._vocab.strings.add(name)
        if key not in self._values:
            self._matcher.add(name, [self._doc(stems)])
        self._values.setdefault(key, []).append(value)

    def find(self, words: Sequence[Word]) -> list[Match]:
        """Every occurrence of every phrase, overlapping ones too, the longest first, then from left to right."""
        if not words:
            return []
        values = self._values
        matches = self._matcher(self._doc([word.stem for word in words]))
        matches.sort(key=lambda match: (match[1] - match[2], match[1]))
        return [Match(first, stop, value) for key, first, stop in matches for value in values[key]]

    def _doc(self, stems: list[str]):
        from spacy.tokens import Doc

        return Doc(self._vocab, words=stems)


def longest(matches: Sequence[Match], sentence_of: Sequence[int], spans: Sequence[tuple[int, int]] = ()) -> list[Match]:
    """Of the matches that overlap each other the longest, and none across the end of a sentence.

    `matches` come as `PhraseIndex.find` gives them, `sentence_of` numbers the sentence of each word. `spans` are
    words that are taken: nothing that overlaps one is kept, unless it is the very same words.
    """
    owner: list[tuple[int, int] | None] = [None] * len(sentence_of)
    for first, stop in spans:
        owner[first:stop] = [(first, stop)] * (stop - first)
    kept = []
    for match in matches:
        first, stop, _ = match
        holders = set(owner[first:stop])
        if sentence_of[first] == sentence_of[stop - 1] and (holders == {None} or holders == {(first, stop)}):
            owner[first:stop] = [(first, stop)] * (stop - first)
            kept.append(match)
    return kept

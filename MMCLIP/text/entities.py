"""Entities of a report: spans of the vocabulary's concepts, each said to be present, absent or uncertain.

`LexiconRecognizer` walks once over the words of a text through a trie of all wordings and cues, so its cost does not
grow with the vocabulary. Assertion follows the NegEx idea (Chapman et al. 2001): cues before or after an entity act up
to the border of its clause.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .vocabulary import LABEL_KINDS, NO_FINDING, Concept, broader_labels, vocabulary


ASSERTIONS = ("present", "absent", "uncertain")


class Entity(NamedTuple):
    """Characters `start` to `end` of a text name `concept`; `assertion` is "present", "absent" or "uncertain".

    `cue_start` to `cue_end` are the words that made it absent or uncertain ("no", "may represent", "has resolved"):
    several entities may share them. Both are None where nothing outside the entity did.
    """

    start: int
    end: int
    concept: str
    kind: str
    assertion: str
    cue_start: int | None = None
    cue_end: int | None = None


# A cue acts on the entities after it ("before") or before it ("after"). "pseudo" only hides a shorter cue inside it.
CUES: dict[tuple[str, str], tuple[str, ...]] = {
    ("absent", "before"): (
        "no", "without", "free of", "clear of", "negative for", "absence of", "absent", "not", "nor", "neither",
        "no evidence of", "no sign of", "no signs of", "no convincing", "no definite", "no obvious", "no focal",
        "no new", "never", "no suspicious", "no significant", "no large", "without evidence of",
        "no radiographic evidence of", "no suggestion of", "not show", "not demonstrate", "lack of", "lacks",
        "no longer", "denies", "fails to reveal", "rules out", "ruled out for", "excludes", "resolution of", "resolved",
        "interval removal of", "removal of", "cleared of", "rather than", "instead of", "no findings consistent with",
        "no findings to suggest", "no finding suggestive of", "no abnormality suggestive of",
        "no abnormality to suggest",
        "no findings of", "lungs are clear of", "lungs clear of", "lungs appear clear of", "lung fields are clear of",
        "both lungs are clear of", "lungs are otherwise clear of", "lungs remain clear of",
        "lungs are grossly clear of",
    ),
    ("absent", "after"): (
        "has resolved", "have resolved", "resolved", "has cleared", "have cleared", "has been removed",
        "have been removed", "was removed", "were removed", "is absent", "are absent", "not seen", "not identified",
        "not present", "not visible", "not visualized", "not evident", "not appreciated", "not demonstrated",
        "not detected", "not found", "no longer seen", "no longer visible", "no longer present", "no longer identified",
        "is excluded", "are excluded", "is ruled out", "are ruled out", "is unlikely", "are unlikely", "unlikely",
        "is negative", "has disappeared", "have disappeared", "has been ruled out", "no longer evident",
    ),
    ("uncertain", "before"): (
        "most likely", "possible", "possibly", "probable", "probably", "likely", "may", "might", "could",
        "may represent", "may reflect", "might represent", "could represent", "could reflect", "suspicious for",
        "suspicion of", "suspicion for", "suspected", "concerning for", "concern for", "worrisome for", "suggestive of",
        "suggesting", "suggests", "suggest", "questionable", "question of", "cannot exclude", "can not exclude",
        "cannot rule out", "can not rule out", "not exclude", "not rule out", "rule out", "evaluate for", "assess for",
        "evaluation for", "equivocal", "versus", "vs", "borderline", "differential", "differential diagnosis",
        "differential includes", "if clinically", "r o", "possibility of", "potential", "potentially", "presumed",
        "presumably", "risk of", "risk for", "query", "perhaps", "unable to exclude", "difficult to exclude",
    ),
    ("uncertain", "after"): (
        "cannot be excluded", "can not be excluded", "cannot be ruled out", "can not be ruled out", "not excluded",
        "not be excluded", "not entirely excluded", "is possible", "are possible", "is suspected", "are suspected",
        "is not excluded", "are not excluded", "not be ruled out", "is likely", "are likely", "is questionable",
        "is questioned", "may be present", "could be present", "might be present", "is considered", "versus", "vs",
        "suspected", "is probable", "difficult to exclude",
    ),
    ("pseudo", ""): (
        "no change", "no interval change", "no significant change", "no significant interval change", "not changed",
        "not significantly changed", "no increase", "no significant increase", "no decrease", "not only",
        "not well seen", "not well visualized", "not clearly seen", "no further change", "no substantial change",
        "no improvement", "no significant improvement", "no appreciable change", "not certain if", "no progression",
        "without change", "without significant change", "without interval change", "no other", "unchanged", "no prior",
        "no comparison", "no previous", "no definite change", "no relevant change", "not improved", "not resolved",
        "not yet resolved",
    ),
}  # fmt: skip
# These end what a cue acts on, wherever they stand.
CLAUSE_ENDS = (
    "but", "however", "although", "though", "except", "except for", "apart from", "aside from", "other than", "yet",
    "nevertheless", "whereas", "while", "otherwise", "which", "secondary to", "due to", "because of", "despite",
    "despite of", "with", "status post",
)  # fmt: skip
_KEEP_SCOPE = ("consistent with", "compatible with", "associated with", "compared with", "in keeping with")
_FINITE = frozenset("is are was were has have had shows reveals appears appear remains remain there".split())
_DETERMINERS = frozenset("the a an there this it".split())
# After a comma these begin a statement of its own ("No effusion, small nodule."), unless the list goes on to an "or".
_STATEMENT_STARTS = frozenset(
    "small mild moderate large severe tiny minimal stable unchanged persistent increased marked new trace".split()
)
_NEGATORS = frozenset("no not without".split())

_WORD = re.compile(r"\d+(?:\.\d+)+|[a-z0-9]+(?:'[a-z]+)?|[.;:!?,/()\[\]]|\n\s*\n")
_IRREGULAR = {
    "pneumothoraces": "pneumothorax", "atelectases": "atelectasis", "metastases": "metastasis", "apices": "apex",
    "bullae": "bulla", "emboli": "embolus", "hila": "hilum", "vertebrae": "vertebra", "bronchi": "bronchus",
    "hemithoraces": "hemithorax", "pleurae": "pleura", "sulci": "sulcus", "thrombi": "thrombus", "oedema": "edema",
    "diagnoses": "diagnosis", "bodies": "body", "viscera": "viscus", "x-rays": "x-ray", "arteries": "artery",
    "haemothorax": "hemothorax", "is": "is", "has": "has", "was": "was", "as": "as", "this": "this", "does": "does",
}  # fmt: skip


@functools.lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    """A lower-case word without its plural ending: both sides of a comparison go through it."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


class _Item(NamedTuple):
    """A step of the walk over a text: an entity, a cue, or a border."""

    index: int  # of its first word
    start: int
    end: int
    concept: Concept | None
    role: tuple[str, str]


class LexiconRecognizer:
    """Finds the vocabulary's concepts in a text: `recognizer(text)` -> list of `Entity`, in order, never overlapping.

    The longest wording wins; only whole words match; case, plural endings and hyphens do not matter, but abbreviations
    match in capitals only. Every entity takes the assertion of the cue that acts on it: "no ... A, B or C" makes all
    three absent up to the end of the sentence, to "but", or to a clause with its own verb. Statements of normality
    (kind "normal") are always present. `vocabulary` defaults to the package's own.
    """

    def __init__(self, vocabulary: Mapping[str, Concept] | None = None):
        self.concepts = dict(vocabulary if vocabulary is not None else _package_vocabulary())
        self._trie: dict = {}
        for role, phrases in CUES.items():
            for phrase in phrases:
                self._add(phrase, (None, role, False))
        for phrase in CLAUSE_ENDS:
            self._add(phrase, (None, ("end", ""), False))
        for phrase in _KEEP_SCOPE:
            self._add(phrase, (None, ("pseudo", ""), False))
        for concept in self.concepts.values():
            for phrase in concept.abbreviations:
                self._add(phrase, (concept, ("entity", ""), True))
        for concept in self.concepts.values():
            for phrase in concept.wordings:
                self._add(phrase, (concept, ("entity", ""), False))

    @property
    def fingerprint(self) -> str:
        """Changes with the vocabulary and with this module: what a cache of entities depends on."""
        state = Path(__file__).read_bytes() + repr(sorted(self.concepts.items())).encode()
        return hashlib.sha256(state).hexdigest()

    def _add(self, phrase: str, value: tuple) -> None:
        node = self._trie
        for word in _WORD.findall(phrase.lower()):
            node = node.setdefault(_stem(word), {})
        known = node.setdefault("", [])
        for other, role, capitals in known:
            if other is not None and value[0] is not None and other is not value[0] and capitals == value[2]:
                raise ValueError(
                    f"The wording {phrase!r} belongs to two concepts, {other.name!r} and {value[0].name!r}; "
                    "keep it at one of them."
                )
            if other is None and value[0] is None and role == value[1]:
                return
        if not any(other is value[0] and role == value[1] and capitals == value[2] for other, role, capitals in known):
            known.append(value)

    def __call__(self, text: str) -> list[Entity]:
        words = [(match.group(), match.start(), match.end()) for match in _WORD.finditer(text.lower())]
        if len(text.lower()) != len(text):  # a few letters change length in lower case, which would shift offsets
            folded = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
            words = [(match.group(), match.start(), match.end()) for match in _WORD.finditer(folded)]
        entities: list[Entity] = []
        sentence: list[_Item] = []
        first, position, trie = 0, 0, self._trie
        stems = [_stem(word) for word, _, _ in words]
        while position < len(words):
            word, start, end = words[position]
            node = trie.get(stems[position])
            values = None
            if node is not None:
                length, values = self._longest(text, words, stems, position, node)
            if values:
                last = words[position + length - 1][2]
                for concept, role, _ in values:
                    sentence.append(_Item(position, start, last, concept, role))
                position += length
                continue
            if word in ".;!?" or word[0] == "\n":
                entities += self._assert(sentence, words, first, position)
                sentence, first = [], position + 1
            elif word == ":":
                sentence.append(_Item(position, start, end, None, ("end", "")))
            position += 1
        entities += self._assert(sentence, words, first, len(words))
        return entities

    @staticmethod
    def _longest(text, words, stems, position, node) -> tuple[int, list | None]:
        """Words in the longest wording or cue that begins at `position`, and what it stands for."""
        best, best_values, length = 0, None, 1
        while True:
            values = node.get("")
            if values:
                fits = [
                    value
                    for value in values
                    if not value[2] or text[words[position][1] : words[position + length - 1][2]].rstrip("s").isupper()
                ]
                if fits:
                    best, best_values = length, fits
            if position + length >= len(words):
                return best, best_values
            node = node.get(stems[position + length])
            if node is None:
                return best, best_values
            length += 1

    def _assert(self, items: list[_Item], words: list, first: int, stop: int) -> list[Entity]:
        """Entities of one sentence (words `first` to `stop`), each under the cues of its clause."""
        if not any(item.concept is not None for item in items):
            return []
        cued = any(item.role[0] in ("absent", "uncertain") for item in items)
        if not cued:
            return [
                Entity(item.start, item.end, item.concept.name, item.concept.kind, "present")
                for item in items
                if item.concept is not None
            ]
        borders = self._clause_borders(items, words, first, stop)
        entities = []
        for begin, end in zip(borders, borders[1:], strict=False):
            clause = [item for item in items if begin <= item.index < end]
            entities += self._assert_clause(clause)
        return entities

    @staticmethod
    def _clause_borders(items: list[_Item], words: list, first: int, stop: int) -> list[int]:
        """Word positions at which a new clause begins, `first` and `stop` included."""
        inside = set()  # words within an entity or cue border nothing
        for item in items:
            position = item.index
            while position < stop and words[position][2] <= item.end:
                inside.add(position)
                position += 1
        borders = [first]
        for item in items:
            if item.role[0] == "end" and item.index > first:
                borders.append(item.index)
        alternatives = [i for i in range(first, stop) if words[i][0] in ("or", "nor") and i not in inside]
        last_alternative = alternatives[-1] if alternatives else -1
        separators = [i for i in range(first, stop) if words[i][0] in (",", "and") and i not in inside]
        for rank, position in enumerate(separators):
            begin = max(border for border in borders if border <= position)
            next_word = words[position + 1][0] if position + 1 < stop else ""
            if next_word == "and" and words[position][0] == ",":
                next_word = words[position + 2][0] if position + 2 < stop else ""
            limit = separators[rank + 1] if rank + 1 < len(separators) else stop
            if limit == position + 1:
                limit = separators[rank + 2] if rank + 2 < len(separators) else stop
            left = any(words[i][0] in _FINITE for i in range(begin, position))
            right = any(words[i][0] in _FINITE for i in range(position + 1, limit))
            if (
                (left and right)
                or next_word in _DETERMINERS
                or next_word in _NEGATORS
                or (words[position][0] == "," and next_word in _STATEMENT_STARTS and last_alternative < position)
            ):
                borders.append(position)
        return sorted({*borders, stop})

    @staticmethod
    def _assert_clause(clause: list[_Item]) -> list[Entity]:
        assertions: dict[int, str] = {}
        current = "present"
        for place, item in enumerate(clause):
            status, direction = item.role
            if item.concept is not None:
                assertions[place] = current
            elif direction == "before" and not (status == "uncertain" and current == "absent"):
                # "resolved" may stand on either side of what it is said of; after an entity it acts backwards only
                backwards = any(other.index == item.index and other.role[1] == "after" for other in clause)
                if not (backwards and status == "absent" and assertions):
                    current = status
        for place, item in enumerate(clause):
            status, direction = item.role
            if direction == "after":
                for earlier in range(place):
                    if earlier in assertions:
                        assertions[earlier] = status
        return [
            Entity(
                clause[place].start,
                clause[place].end,
                clause[place].concept.name,
                clause[place].concept.kind,
                "present" if clause[place].concept.kind == "normal" else assertion,
            )
            for place, assertion in assertions.items()
        ]


def _package_vocabulary() -> dict[str, Concept]:
    return vocabulary()


def report_labels(entities: Iterable[Entity]) -> tuple[list[str], list[str], list[str]]:
    """(present, absent, uncertain) canonical labels that a report's entities state, sorted, in one list each.

    Findings, diseases and devices count. A present label makes its broader ones present too ("covid-19" ->
    "pneumonia"), a statement of normality makes the labels it excludes absent. Where a report says both, present wins
    over uncertain and uncertain over absent. "no finding" is present when the report says so and names no finding or
    disease as present; with one it is absent. Devices leave it alone, as in CheXpert.
    """
    concepts = vocabulary()
    said: dict[str, set[str]] = {assertion: set() for assertion in ASSERTIONS}
    normal = False
    for entity in entities:
        if entity.kind in LABEL_KINDS:
            names = (entity.concept,) if entity.assertion == "absent" else broader_labels(entity.concept)
            said[entity.assertion].update(names)
        elif entity.kind == "normal":
            said["absent"].update(concepts[entity.concept].excludes)
            normal |= entity.concept == NO_FINDING
    if any(concepts[name].kind != "device" for name in said["present"]):
        said["absent"].add(NO_FINDING)
    elif normal:
        said["present"].add(NO_FINDING)
    said["uncertain"] -= said["present"]
    said["absent"] -= said["present"] | said["uncertain"]
    return sorted(said["present"]), sorted(said["absent"]), sorted(said["uncertain"])

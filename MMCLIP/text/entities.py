"""Entities of a report: spans of concepts, each said to be present, absent or uncertain.

One small interface, `Recognizer`: text in, `Entity`s out. `LexiconRecognizer`, the default, finds the concepts of the
vocabulary by spaCy's PhraseMatcher; `SpacyRecognizer` and `TokenClassificationRecognizer` (recognizers.py) put any
spaCy pipeline or Hugging Face model in its place. `load_recognizer` makes one by name.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .assertion import ASSERTIONS, Cue, add_cues, assert_spans
from .lexicon import Match, PhraseIndex, Word, find_words, longest
from .sentences import is_all_capitals, split_sentences
from .vocabulary import LABEL_KINDS, NO_FINDING, Concept, broader_labels, vocabulary


ALSO_WORDS = frozenset(("CAP", "COP", "DISH"))  # abbreviations that are words where all is written in capitals
_SIDE_WORDS = re.compile(r"\b(left|right|bilateral(?:ly)?|both|bibasilar|bibasal|biapical)\b", re.IGNORECASE)
LONGEST_SENTENCE = 250  # words; what is longer is no sentence, and the time of the rules grows with its square


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


class Recognizer:
    """Base of all recognisers: `recognizer(text)` -> list of `Entity`, in order, never overlapping, inside the text.

    A subclass writes `find`, and `fingerprint`, which caches of entities depend on: it changes with everything that
    may change what is found.
    """

    fingerprint: str

    def find(self, texts: Sequence[str]) -> list[list[Entity]]:
        """The entities of each text."""
        raise NotImplementedError

    def __call__(self, text: str) -> list[Entity]:
        return self.find([text])[0]


class LexiconRecognizer(Recognizer):
    """Finds the concepts of a vocabulary; no model, no download, a thousand reports in a fraction of a second.

    The longest wording wins; only whole words match; case, plural endings and hyphens do not matter, but abbreviations
    match in capitals only. "no ... A, B or C" makes all three absent up to the end of the sentence, to "but", or to a
    clause with its own verb (assertion.py). Statements of normality (kind "normal") are always present.

    `vocabulary` defaults to the package's own. Raises ValueError for a wording of two concepts.
    """

    def __init__(self, vocabulary: Mapping[str, Concept] | None = None):
        self.concepts = dict(vocabulary if vocabulary is not None else _package_vocabulary())
        self._index: PhraseIndex | None = None
        owners: dict[tuple, str] = {}
        for concept in self.concepts.values():
            for phrase, in_capitals in _wordings(concept):
                key = (*(word.stem for word in find_words(phrase)), in_capitals)
                if owners.setdefault(key, concept.name) != concept.name:
                    raise ValueError(
                        f"The wording {phrase!r} belongs to two concepts, {owners[key]!r} and {concept.name!r}; "
                        "keep it at one of them."
                    )

    @functools.cached_property
    def fingerprint(self) -> str:
        return rules_fingerprint(repr(sorted(self.concepts.items())).encode())

    def find(self, texts: Sequence[str]) -> list[list[Entity]]:
        return [self._find(text) for text in texts]

    def _find(self, text: str) -> list[Entity]:
        self.make_ready()
        words = find_words(text)
        sentence_of = sentence_numbers(text, words)
        matches = [match for match in self._index.find(words) if _is_meant(match, words, text)]
        spans: dict[tuple[int, int], Concept] = {}
        cues = []
        for match in longest(matches, sentence_of):
            if isinstance(match.value, Cue):
                cues.append(match)
            else:
                spans.setdefault((match.first, match.stop), match.value[0])
        found = [
            (words[first].start, words[stop - 1].end, concept.name, concept.kind)
            for (first, stop), concept in sorted(spans.items(), key=lambda item: item[0])
        ]
        return asserted(words, sentence_of, sorted(spans), found, cues)

    def make_ready(self) -> None:
        """Build the index of phrases now: what the first text does otherwise, in each process that has none."""
        if self._index is None:
            self._index = add_cues(PhraseIndex())
            for concept in self.concepts.values():
                for phrase, in_capitals in _wordings(concept):
                    self._index.add(phrase, (concept, in_capitals))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_index": None}  # spaCy's matchers cannot go to another process


def _package_vocabulary() -> dict[str, Concept]:
    return vocabulary()


def _wordings(concept: Concept) -> list[tuple[str, bool]]:
    """Each wording, and whether it matches in capitals only."""
    return [(phrase, True) for phrase in concept.abbreviations] + [(phrase, False) for phrase in concept.wordings]


def _is_meant(match: Match, words: Sequence[Word], text: str) -> bool:
    """False for an abbreviation not in capitals, and for a statement that goes on ("lungs are clear" of edema)."""
    if isinstance(match.value, Cue):
        return True
    concept, in_capitals = match.value
    if concept.kind == "normal" and match.stop < len(words) and words[match.stop].text in ("of", "to"):
        return False
    letters = text[words[match.first].start : words[match.stop - 1].end].rstrip("s") if in_capitals else ""
    return not in_capitals or (letters.isupper() and not (letters in ALSO_WORDS and is_all_capitals(text)))


def sentence_numbers(text: str, words: Sequence[Word]) -> list[int]:
    """The number of the sentence of each word; one of more than `LONGEST_SENTENCE` words counts as several."""
    numbers: list[int] = []
    sentence, number, begin = 0, 0, 0
    ends = [*(end for _, end in split_sentences(text)), len(text) + 1]
    for position, word in enumerate(words):
        if word.start >= ends[sentence] or position - begin >= LONGEST_SENTENCE:
            while word.start >= ends[sentence]:
                sentence += 1
            number, begin = number + 1, position
        numbers.append(number)
    return numbers


def asserted(
    words: Sequence[Word],
    sentence_of: Sequence[int],
    spans: Sequence[tuple[int, int]],
    found: Sequence[tuple[int, int, str, str]],
    cues: Sequence[Match],
) -> list[Entity]:
    """(start, end, concept, kind) of each span of words as an `Entity`, under the cues of its sentence."""
    verdicts = assert_spans(words, sentence_of, spans, [kind for *_, kind in found], cues)
    entities = []
    for (start, end, concept, kind), verdict in zip(found, verdicts, strict=True):
        if verdict.first is None or kind == "normal":
            entities.append(Entity(start, end, concept, kind, "present"))
        else:
            cue = words[verdict.first].start, words[verdict.stop - 1].end
            entities.append(Entity(start, end, concept, kind, verdict.assertion, *cue))
    return entities


def rules_fingerprint(state: bytes) -> str:
    """Of `state` and of the code that all recognisers share."""
    code = [
        Path(__file__).with_name(name).read_bytes()
        for name in ("entities.py", "assertion.py", "lexicon.py", "recognizers.py", "sentences.py", "cues.yaml")
    ]
    return hashlib.sha256(b"".join([*code, state])).hexdigest()


def load_recognizer(name: str = "lexicon", labels: Mapping[str, str | None] | None = None) -> Recognizer:
    """A recogniser by name: "lexicon", "spacy:PIPELINE" or "hf:MODEL", with names or folders of the last two.

    `labels` says what the labels of a pipeline or model mean, see `SpacyRecognizer`. Raises ValueError for an unknown
    name.
    """
    kind, _, place = name.partition(":")
    if name == "lexicon" and not labels:
        return LexiconRecognizer()
    if kind == "spacy" and place:
        from .recognizers import SpacyRecognizer

        return SpacyRecognizer(place, labels)
    if kind == "hf" and place:
        from .recognizers import TokenClassificationRecognizer

        return TokenClassificationRecognizer(place, labels)
    if name == "lexicon":
        raise ValueError("Labels are given, but the recogniser 'lexicon' has its own; leave them out.")
    raise ValueError(
        f"recognizer is {name!r}, expected 'lexicon', 'spacy:PIPELINE' (a name or folder for spacy.load) or 'hf:MODEL' "
        "(a token-classification model of transformers)."
    )


def parse_labels(text: str | Mapping | None) -> dict[str, str | None]:
    """What the labels of a recogniser mean, a map or JSON: '{"DISEASE": "disease", "CHEMICAL": null}'.

    Raises ValueError for anything but a map of text to text or null.
    """
    if not text:
        return {}
    try:
        labels = json.loads(text) if isinstance(text, str) else dict(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"recognizer_labels is {text!r}, which is no JSON: {error}.") from error
    if not isinstance(labels, dict) or not all(value is None or isinstance(value, str) for value in labels.values()):
        raise ValueError(
            f'recognizer_labels is {text!r}, expected a map such as {{"DISEASE": "disease", "AGE": null}}.'
        )
    return labels


def report_sides(text: str, entities: Iterable[Entity]) -> dict[str, str]:
    """Label -> "left" or "right", where a report says so and nothing else.

    A sentence tells the side of a finding, disease or device that is present, if it names no other one and no other
    side; and of its broader labels. One is left out where two sentences disagree. Left is the patient's.
    """
    concepts = vocabulary()
    named = [entity for entity in entities if entity.kind in LABEL_KINDS and entity.concept in concepts]
    found: dict[str, set[str]] = {}
    for start, end in split_sentences(text):
        sides = {match.lower() for match in _SIDE_WORDS.findall(text, start, end)}
        inside = [entity for entity in named if start <= entity.start < end] if sides else ()
        if len(inside) == 1 and inside[0].assertion == "present":
            for label in broader_labels(inside[0].concept):
                found.setdefault(label, set()).update(sides)
    return {label: min(sides) for label, sides in found.items() if sides in ({"left"}, {"right"})}


def report_labels(entities: Iterable[Entity]) -> tuple[list[str], list[str], list[str]]:
    """(present, absent, uncertain) canonical labels that a report's entities state, sorted, in one list each.

    Findings, diseases and devices of the vocabulary count; concepts of other models are no labels. A present label
    makes its broader ones present too ("covid-19" -> "pneumonia"), a statement of normality makes the labels it
    excludes absent. Where a report says both, present wins over uncertain and uncertain over absent. "no finding" is
    present when the report says so and names no finding or disease as present or uncertain; with one that is present it
    is absent. Devices leave it alone, as in CheXpert.
    """
    concepts = vocabulary()
    said: dict[str, set[str]] = {assertion: set() for assertion in ASSERTIONS}
    normal = False
    for entity in entities:
        if entity.concept not in concepts:
            continue
        if entity.kind in LABEL_KINDS:
            names = (entity.concept,) if entity.assertion == "absent" else broader_labels(entity.concept)
            said[entity.assertion].update(names)
        elif entity.kind == "normal":
            said["absent"].update(concepts[entity.concept].excludes)
            normal |= entity.concept == NO_FINDING
    if any(concepts[name].kind != "device" for name in said["present"]):
        said["absent"].add(NO_FINDING)
    elif normal and not any(concepts[name].kind != "device" for name in said["uncertain"]):
        said["present"].add(NO_FINDING)
    said["uncertain"] -= said["present"]
    said["absent"] -= said["present"] | said["uncertain"]
    return sorted(said["present"]), sorted(said["absent"]), sorted(said["uncertain"])

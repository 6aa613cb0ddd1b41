"""The concepts of chest radiology: names, wordings, and how the labels of public data sets map onto them."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml


VOCABULARY_FILE = Path(__file__).with_name("vocabulary.yaml")
KINDS = ("finding", "disease", "device", "anatomy", "descriptor", "normal")
LABEL_KINDS = ("finding", "disease", "device")  # kinds whose presence in a report is a label
GROUPS = (
    "severity", "size", "side", "position", "number", "distribution", "shape", "margin", "density", "time", "change",
    "normality",
)  # of descriptors  # fmt: skip
NO_FINDING = "no finding"
# what public label sets list beside findings, and why it is no concept; canonical_label refuses these
_OF_THE_READING = "says something of the reading, nothing of the chest"
_REST_CLASS = "a class for what the other labels do not name"
_MIMIC = "looks like a finding and is none"
_VARIANT = "a normal variant"
NO_CONCEPT = {
    "": "an empty label of PadChest",
    "exclude": _OF_THE_READING,
    "suboptimal study": _OF_THE_READING,
    "unchanged": "compares with an earlier film, whatever that showed",
    "pseudonodule": _MIMIC,
    "nipple shadow": _MIMIC,
    "end on vessel": _MIMIC,
    "azygos lobe": _VARIANT,
    "cervical rib": _VARIANT,
    "obesity": "of the patient, not of the chest",
    "other lesion": _REST_CLASS,
    "other disease": _REST_CLASS,
    "other diseases": _REST_CLASS,
    "no lung opacity / not normal": _REST_CLASS,
    "positive": "answers a question of COVIDx; what it means is in the reader",
    "negative": "answers a question of COVIDx; what it means is in the reader",
}
_BRACKETS = re.compile(r"\(([^()\[\]]*)\)|\[([^()\[\]]*)\]")
_MAX_WORDINGS = 1000  # of one entry: more are a slip


@dataclass(frozen=True)
class Concept:
    """One concept of `vocabulary.yaml`; the head of that file says what each field means.

    `synonyms` have no brackets any more: `load_vocabulary` writes them out.
    """

    name: str
    kind: str
    group: str | None = None
    phrases: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    abbreviations: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    is_a: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    countable: bool = False

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every case-insensitive wording, the name first, without repeats."""
        return tuple(dict.fromkeys((self.name, *self.phrases, *self.synonyms)))


def write_out(pattern: str) -> tuple[str, ...]:
    """The wordings that `pattern` stands for: `"(small|large) [left] mass"` -> four of them.

    Raises ValueError for brackets that do not match and for more than `_MAX_WORDINGS`.
    """
    patterns = [pattern]
    while match := _BRACKETS.search(patterns[0]):
        options = match[1].split("|") if match[1] is not None else [*match[2].split("|"), ""]
        first, last = match.span()
        written = patterns[0][first:last]
        patterns = [text.replace(written, option, 1) for text in patterns for option in options]
        if len(patterns) > _MAX_WORDINGS:
            raise ValueError(f"{pattern!r} stands for more than {_MAX_WORDINGS} wordings; write fewer brackets.")
    if set("()[]|") & set(patterns[0]):
        raise ValueError(f"{pattern!r} has brackets that do not match.")
    return tuple(dict.fromkeys(" ".join(text.split()) for text in patterns))


def load_vocabulary(path: str | Path = VOCABULARY_FILE) -> dict[str, Concept]:
    """Read a vocabulary file: concept name -> `Concept`, in the order of the file.

    Raises ValueError naming the concept for an unknown key, kind or group, a repeated name, brackets that do not
    match, and a reference to a concept that does not exist.
    """
    concepts = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # eight times as fast, where PyYAML was built with it
    for entry in yaml.load(Path(path).read_text(encoding="utf-8"), loader):
        name = entry.get("name", entry)
        unknown = set(entry) - set(Concept.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"{path}: concept {name!r} has unknown keys {sorted(unknown)}; "
                f"known are {sorted(Concept.__dataclass_fields__)}."
            )
        if entry["kind"] not in KINDS:
            raise ValueError(f"{path}: concept {name!r} has kind {entry['kind']!r}, expected one of {KINDS}.")
        if entry.get("group") not in (GROUPS if entry["kind"] == "descriptor" else (None,)):
            raise ValueError(
                f"{path}: concept {name!r} has group {entry.get('group')!r}, expected one of {GROUPS} for a "
                "descriptor, and none for any other kind."
            )
        if name in concepts:
            raise ValueError(f"{path}: concept {name!r} occurs twice; merge the two.")
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        try:
            synonyms = [wording for pattern in entry.get("synonyms", ()) for wording in write_out(pattern)]
        except ValueError as error:
            raise ValueError(f"{path}: concept {name!r}: {error}") from error
        concepts[name] = Concept(**{**fields, "synonyms": tuple(synonyms)})
    for concept in concepts.values():
        for other in (*concept.is_a, *concept.excludes):
            if other not in concepts:
                raise ValueError(f"{path}: concept {concept.name!r} refers to {other!r}, which is not in the file.")
    return concepts


@functools.cache
def vocabulary() -> dict[str, Concept]:
    """The concepts that come with the package, read once."""
    return load_vocabulary()


def _label_key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


@functools.cache
def _label_names() -> dict[str, str]:
    """Every accepted spelling of a label -> canonical name. Label spellings win over names, names over wordings."""
    names: dict[str, str] = {}
    concepts = [c for c in vocabulary().values() if c.kind in LABEL_KINDS or c.name == NO_FINDING]
    for spellings in (lambda c: c.labels, lambda c: (c.name,), lambda c: (*c.wordings, *c.abbreviations)):
        for concept in concepts:
            for spelling in spellings(concept):
                names.setdefault(_label_key(spelling), concept.name)
    return names


def has_no_concept(name: str) -> bool:
    """Whether a label of a public set is one of `NO_CONCEPT`, in any spelling that `canonical_label` would take."""
    return _label_key(name) in NO_CONCEPT


def canonical_label(name: str, where: str = "") -> str:
    """Canonical name of a label: `"Effusion"` -> `"pleural effusion"`, `"hernia"` -> `"hiatal hernia"`.

    Case, underscores, hyphens and outer blanks do not matter. Raises ValueError, beginning with `where`, for a name
    that is no label of the vocabulary, those of `NO_CONCEPT` among them.
    """
    try:
        return _label_names()[_label_key(name)]
    except KeyError:
        if reason := NO_CONCEPT.get(_label_key(name)):
            raise ValueError(f"{where + ': ' if where else ''}the label {name!r} names no finding: {reason}.") from None
        import difflib

        near = difflib.get_close_matches(_label_key(name), _label_names(), n=3)
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"{where + ': ' if where else ''}unknown label {name!r}.{hint} "
            f"Labels are the findings, diseases and devices of {VOCABULARY_FILE.name}; add it there or drop it."
        ) from None


def broader_labels(label: str) -> tuple[str, ...]:
    """`label` and every concept it is a kind of: `"covid-19"` -> `("covid-19", "pneumonia")`."""
    found = [label]
    for name in found:
        found.extend(other for other in vocabulary()[name].is_a if other not in found)
    return tuple(found)


def with_broader_labels(labels: Iterable[str]) -> list[str]:
    """`labels` and everything broader, in order of first appearance, without repeats."""
    return list(dict.fromkeys(broader for label in labels for broader in broader_labels(label)))

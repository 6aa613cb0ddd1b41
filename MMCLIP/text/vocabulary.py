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
NO_FINDING = "no finding"


@dataclass(frozen=True)
class Concept:
    """One concept of `vocabulary.yaml`; the head of that file says what each field means."""

    name: str
    kind: str
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


def load_vocabulary(path: str | Path = VOCABULARY_FILE) -> dict[str, Concept]:
    """Read a vocabulary file: concept name -> `Concept`, in the order of the file.

    Raises ValueError naming the concept for an unknown key or kind, a repeated name, and a reference to a concept
    that does not exist.
    """
    concepts = {}
    for entry in yaml.safe_load(Path(path).read_text(encoding="utf-8")):
        name = entry.get("name", entry)
        unknown = set(entry) - set(Concept.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"{path}: concept {name!r} has unknown keys {sorted(unknown)}; "
                f"known are {sorted(Concept.__dataclass_fields__)}."
            )
        if entry["kind"] not in KINDS:
            raise ValueError(f"{path}: concept {name!r} has kind {entry['kind']!r}, expected one of {KINDS}.")
        if name in concepts:
            raise ValueError(f"{path}: concept {name!r} occurs twice; merge the two.")
        concepts[name] = Concept(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
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
    return re.sub(r"[\s_]+", " ", name).strip().lower()


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


def canonical_label(name: str, where: str = "") -> str:
    """Canonical name of a label: `"Effusion"` -> `"pleural effusion"`, `"hernia"` -> `"hiatal hernia"`.

    Case, underscores and outer blanks do not matter. Raises ValueError, beginning with `where`, for a name that is no
    label of the vocabulary.
    """
    try:
        return _label_names()[_label_key(name)]
    except KeyError:
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

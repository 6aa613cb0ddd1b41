"""Disease-kind prompts: the words that stand for a label, for unpaired images in training and for zero-shot scores.

The wording is in prompts.yaml; `prompt_sets.py` has the sets of prompts that evaluation can choose from.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from .vocabulary import NO_FINDING, broader_labels, canonical_label, vocabulary


SIDES = ("left", "right", "bilateral")
_ATTRIBUTES = {"side", "severity"}
WORDS_FILE = Path(__file__).with_name("prompts.yaml")
_WORDS = yaml.safe_load(WORDS_FILE.read_text(encoding="utf-8"))
_VOWELS = "aeiouAEIOU"
_LIKE_YOU = ("uni", "eu", "use", "uro", "ure")  # begin with a vowel letter and a consonant sound
_NOT_PLURAL = ("ascites", "obliterans")
_PREPOSITION = re.compile(r" (?:of|in|on|at|with|to|after|from|due) ")


class Noun(NamedTuple):
    """A noun phrase without its article, the article ("a ", "an " or ""), and whether it is plural."""

    text: str
    article: str
    is_plural: bool

    @property
    def verb(self) -> str:
        return "are" if self.is_plural else "is"


def _is_plural(phrase: str) -> bool:
    """Of the head noun: "Kerley lines", "septic emboli", "sequelae of tuberculosis", but not "crowding of vessels"."""
    head = _PREPOSITION.split(phrase)[0].split()[-1]
    if head.isupper() or head in _NOT_PLURAL or head.endswith(("ss", "us", "is")):
        return False
    return head.endswith(("s", "ae")) or head == "emboli"


def make_noun(phrase: str, countable: bool) -> Noun:
    """A phrase of the vocabulary with its article, "a" or "an" where one of it can be counted."""
    is_plural = _is_plural(phrase)
    if is_plural or not countable:
        return Noun(phrase, "", is_plural)
    return Noun(phrase, "an " if phrase[0] in _VOWELS and not phrase.startswith(_LIKE_YOU) else "a ", False)


@functools.cache
def label_nouns(label: str) -> tuple[Noun, ...]:
    """The noun phrases of a canonical label that fit "There is ...", the commonest first."""
    concept = vocabulary()[label]
    return tuple(make_noun(phrase, concept.countable) for phrase in concept.phrases or (concept.name,))


def has_side(label: str) -> bool:
    """May a prompt say on which side this canonical label is?"""
    return _WORDS["attributes"].get(label, {"sides": False}).get("sides", True)


def severities(label: str) -> tuple[str, ...]:
    """The words for severity that this canonical label takes, from little to much; () for none."""
    return tuple(_WORDS["attributes"].get(label, {"severity": ()})["severity"])


@functools.cache
def attribute_nouns(label: str, side: str | None, severity: str | None) -> tuple[Noun, ...]:
    """The noun phrases of a canonical label with its side and severity: "small left pleural effusion", ...

    `side` is "left", "right", "bilateral" or None for not known, `severity` one of `severities(label)` or None. Raises
    ValueError for a value that the label does not take.
    """
    if side is not None and (side not in SIDES or not has_side(label)):
        expected = f"one of {SIDES}" if has_side(label) else "none: prompts.yaml knows no side of it"
        raise ValueError(f"The side of {label!r} is {side!r}, expected {expected}.")
    if severity is not None and severity not in severities(label):
        raise ValueError(f"The severity of {label!r} is {severity!r}, expected one of {severities(label)} or None.")
    if side is None and severity is None:
        return label_nouns(label)
    words = _WORDS["attributes"][label]
    countable = "one" in words
    degree = f"{severity} " if severity else ""
    nouns = words["one" if countable else "some"]
    if side is None:
        forms = [f"{degree}{noun}" for noun in nouns]
    elif side == "bilateral":
        nouns, countable = words["many"] if countable else nouns, False
        forms = [form for noun in nouns for form in (f"{degree}bilateral {noun}", f"{degree}{noun} on both sides")]
        return tuple(Noun(form, "", "many" in words) for form in forms)
    else:
        forms = [
            form
            for noun in nouns
            for form in (f"{degree}{side} {noun}", f"{degree}{side}-sided {noun}", f"{degree}{noun} on the {side}")
        ]
    return tuple(make_noun(form, countable) for form in forms)


def fill_template(template: str, noun: Noun, **names: str) -> str:
    """A template of prompts.yaml about one noun phrase; `names` are further gaps that it may have."""
    with_article = noun.article + noun.text
    return template.format_map(
        {
            "phrase": noun.text,
            "Phrase": _capital(noun.text),
            "a_phrase": with_article,
            "A_phrase": _capital(with_article),
            "is": noun.verb,
            **names,
        }
    )


def statement(noun: Noun) -> str:
    """One noun phrase in the first of the statements: There is a left nodule."""
    return fill_template(_WORDS["statements"]["finding"][0], noun)


def positive_prompts(label: str) -> list[str]:
    """Every prompt that says the label is there; the first is "There is (a) <label>.".

    `positive_prompts(label)[k]` and `negative_prompts(label)[k]` are a pair. Raises ValueError for an unknown label.
    """
    return _prompts(label, "positive")


def negative_prompts(label: str) -> list[str]:
    """Every prompt that says the label is not there, in the order of `positive_prompts`."""
    return _prompts(label, "negative")


def _prompts(label: str, sign: str) -> list[str]:
    label = canonical_label(label)
    if label == NO_FINDING:
        return list(_WORDS[NO_FINDING][sign])
    return [fill_template(template, noun) for noun in label_nouns(label) for template in _WORDS["pairs"][sign]]


_canonical = functools.cache(canonical_label)  # prompts are drawn for every sample


@functools.cache
def _broader(label: str) -> tuple[str, ...]:
    return broader_labels(label)[1:]


def sample_prompt(
    present: Iterable[str],
    absent: Iterable[str],
    rng: np.random.Generator,
    max_negatives: int = 3,
    negative_ratio: float = 0.5,
    attributes: Mapping[str, Mapping[str, str]] | None = None,
    attribute_ratio: float = 0.5,
) -> str:
    """A text for an image of which only labels are known, with drawn order, wording and form.

    All `present` labels are named, as one list or one sentence each, but a broader one not beside a narrower that
    implies it: "covid-19" alone for "covid-19" and "pneumonia". With probability `negative_ratio` one to
    `max_negatives` of `absent` follow as negations; without a present label they always do. What a present label
    implies is never denied. "no finding" speaks in its own sentences, beside devices but never beside a finding.

    `attributes` tells what is known of present labels, `{"pleural effusion": {"side": "left", "severity": "small"}}`;
    each label's own are stated, in a sentence of its own, with probability `attribute_ratio`, since zero-shot prompts
    have none.

    The same state of `rng` gives the same text. Raises ValueError when there is nothing to say, a label is unknown, or
    an attribute is not one that the label takes.
    """
    present = dict.fromkeys(map(_canonical, present))
    implied = {broader for label in present for broader in _broader(label)}
    findings = [label for label in present if label != NO_FINDING and label not in implied]
    absent = dict.fromkeys(map(_canonical, absent))
    denied = [label for label in absent if label != NO_FINDING and label not in implied and label not in present]
    devices_alone = all(vocabulary()[label].kind == "device" for label in findings)
    normal = NO_FINDING in present and devices_alone
    if not (findings or normal or denied):
        raise ValueError(
            "A prompt needs at least one present label, or an absent one other than 'no finding'; there is none. "
            "Drop rows without labels, or give them a report."
        )
    known = _known_attributes(attributes, present) if attributes else {}
    sentences = []
    if findings:
        _shuffle(findings, rng)
        described = {label for label in findings if label in known and rng.random() < attribute_ratio}
        nouns = [
            _draw(attribute_nouns(label, *known[label]) if label in described else label_nouns(label), rng)
            for label in findings
        ]
        # in one list, "left" could be read as said of its neighbours too
        if len(findings) > 1 and not described and rng.random() < 0.5:
            sentences.append(_fill_list(_draw(_WORDS["lists"], rng), nouns, "and"))
        else:
            for label, noun in zip(findings, nouns, strict=True):
                kind = "device" if vocabulary()[label].kind == "device" else "finding"
                sentences.append(fill_template(_draw(_WORDS["statements"][kind], rng), noun))
    if normal:
        options = _WORDS[NO_FINDING]["beside devices" if findings else "positive"]
        sentences.insert(int(rng.random() * (len(sentences) + 1)), _draw(options, rng))
    if denied and max_negatives > 0 and (not sentences or rng.random() < negative_ratio):
        count = 1 + int(rng.random() * min(max_negatives, len(denied)))
        _shuffle(denied, rng, count)
        nouns = [_draw(label_nouns(label), rng) for label in denied[:count]]
        sentence = _fill_list(_draw(_WORDS["denials"], rng), nouns, "or")
        sentences.insert(int(rng.random() * (len(sentences) + 1)), sentence)
    if not sentences:
        raise ValueError("max_negatives is 0 and no label is present, so the prompt would be empty; allow negatives.")
    return " ".join(sentences)


def _known_attributes(
    attributes: Mapping[str, Mapping[str, str]], present: Iterable[str]
) -> dict[str, tuple[str | None, str | None]]:
    """Canonical label -> (side, severity), after checks."""
    known = {}
    for name, values in attributes.items():
        label = _canonical(name)
        if label not in present:
            raise ValueError(f"`attributes` describes {name!r}, which is not among the present labels {list(present)}.")
        if not values.keys() <= _ATTRIBUTES:
            raise ValueError(f"`attributes` of {name!r} has the keys {list(values)}, expected 'side' and 'severity'.")
        known[label] = (values.get("side"), values.get("severity"))
        attribute_nouns(label, *known[label])
    return known


def _fill_list(template: str, nouns: Sequence[Noun], conjunction: str) -> str:
    bare = _join([noun.text for noun in nouns], conjunction)
    return template.format_map(
        {
            "list": _join([noun.article + noun.text for noun in nouns], conjunction),
            "bare": bare,
            "Bare": _capital(bare),
            "is": nouns[0].verb,
            "last_is": nouns[-1].verb,
        }
    )


def _draw(options: Sequence, rng: np.random.Generator):
    return options[int(rng.random() * len(options))]  # a tenth of the time of `rng.choice`


def _shuffle(items: list, rng: np.random.Generator, count: int | None = None) -> None:
    """Put `count` drawn items first (all of them when None), in place."""
    for place in range(min(count if count is not None else len(items), len(items) - 1)):
        other = place + int(rng.random() * (len(items) - place))
        items[place], items[other] = items[other], items[place]


def _join(phrases: list[str], conjunction: str) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + f" {conjunction} {phrases[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

"""Disease-kind prompts: the words that stand for a label, for unpaired images in training and for zero-shot scores."""

from collections.abc import Sequence

import numpy as np

from .vocabulary import NO_FINDING, canonical_label, vocabulary


# One negative for each positive, so that a pair differs in the statement and in nothing else.
POSITIVE_TEMPLATES = (
    "There is {a}{phrase}.",
    "{Phrase} is present.",
    "Findings are consistent with {phrase}.",
    "{Phrase} is seen.",
    "The radiograph shows {a}{phrase}.",
)
NEGATIVE_TEMPLATES = (
    "There is no {phrase}.",
    "{Phrase} is not present.",
    "No findings consistent with {phrase}.",
    "{Phrase} is not seen.",
    "The radiograph shows no {phrase}.",
)
NO_FINDING_POSITIVE = (
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "The lungs are clear and the heart size is normal.",
    "No acute cardiopulmonary process.",
    "Unremarkable chest radiograph.",
)
NO_FINDING_NEGATIVE = (
    "There is an acute cardiopulmonary abnormality.",
    "Abnormal chest radiograph.",
    "The lungs are not clear or the heart is enlarged.",
    "There is an acute cardiopulmonary process.",
    "The chest radiograph shows disease.",
)
_LIST_OPENINGS = ("There is ", "Findings: ", "The radiograph shows ", "")
_NEGATION_OPENINGS = ("No ", "There is no ", "No evidence of ")


def label_phrases(label: str) -> tuple[str, ...]:
    """Noun phrases for a label that fit "There is ...", the commonest first."""
    concept = vocabulary()[canonical_label(label)]
    return concept.phrases or (concept.name,)


def positive_prompts(label: str) -> list[str]:
    """Every prompt that says the label is there; the first is "There is (a) <label>.".

    `positive_prompts(label)[k]` and `negative_prompts(label)[k]` are a pair. Raises ValueError for an unknown label.
    """
    label = canonical_label(label)
    return list(NO_FINDING_POSITIVE) if label == NO_FINDING else _fill(label, POSITIVE_TEMPLATES)


def negative_prompts(label: str) -> list[str]:
    """Every prompt that says the label is not there, in the order of `positive_prompts`."""
    label = canonical_label(label)
    return list(NO_FINDING_NEGATIVE) if label == NO_FINDING else _fill(label, NEGATIVE_TEMPLATES)


def sample_prompt(
    present: Sequence[str],
    absent: Sequence[str],
    rng: np.random.Generator,
    max_negatives: int = 3,
    negative_ratio: float = 0.5,
) -> str:
    """A text for an image of which only labels are known, with drawn order, wording and form.

    All `present` labels are named, as one list or one sentence each. With probability `negative_ratio` one to
    `max_negatives` of `absent` follow as negations; without a present label they always do. "no finding" speaks in
    its own sentences, never beside a present finding. Raises ValueError when there is nothing to say or a label is
    unknown.
    """
    present = [canonical_label(label) for label in present]
    absent = [canonical_label(label) for label in absent if canonical_label(label) != NO_FINDING]
    findings = [label for label in present if label != NO_FINDING]
    normal = len(findings) < len(present) and not findings
    if not (findings or normal or absent):
        raise ValueError(
            "A prompt needs at least one present label, or an absent one other than 'no finding'; there is none. "
            "Drop rows without labels, or give them a report."
        )
    sentences = []
    if normal:
        sentences.append(NO_FINDING_POSITIVE[rng.integers(len(NO_FINDING_POSITIVE))])
    elif findings:
        order = [findings[i] for i in rng.permutation(len(findings))]
        if len(order) > 1 and rng.random() < 0.5:
            opening = _LIST_OPENINGS[rng.integers(len(_LIST_OPENINGS))]
            articles = opening not in ("Findings: ", "")
            sentences.append(_capital(opening + _join([_phrase(x, rng, articles) for x in order], "and") + "."))
        else:
            sentences.extend(str(rng.choice(_fill_one(label, POSITIVE_TEMPLATES, rng))) for label in order)
    if absent and max_negatives > 0 and (not sentences or rng.random() < negative_ratio):
        count = int(rng.integers(1, min(max_negatives, len(absent)) + 1))
        order = [absent[i] for i in rng.permutation(len(absent))[:count]]
        opening = _NEGATION_OPENINGS[rng.integers(len(_NEGATION_OPENINGS))]
        sentence = opening + _join([_phrase(label, rng, articles=False) for label in order], "or") + "."
        sentences.insert(int(rng.integers(len(sentences) + 1)), sentence)
    if not sentences:
        raise ValueError("max_negatives is 0 and no label is present, so the prompt would be empty; allow negatives.")
    return " ".join(sentences)


def _fill(label: str, templates: Sequence[str]) -> list[str]:
    countable = vocabulary()[label].countable
    return [_format(template, phrase, countable) for phrase in label_phrases(label) for template in templates]


def _fill_one(label: str, templates: Sequence[str], rng: np.random.Generator) -> list[str]:
    phrases = label_phrases(label)
    phrase = phrases[rng.integers(len(phrases))]
    return [_format(template, phrase, vocabulary()[label].countable) for template in templates]


def _format(template: str, phrase: str, countable: bool) -> str:
    article = _article(phrase) if countable else ""
    plural = phrase.endswith("s") and not phrase.endswith(("ss", "us", "is"))
    text = template.format(a=article, phrase=phrase, Phrase=_capital(phrase))
    if plural and "{Phrase}" in template:
        text = text.replace(" is ", " are ", 1)
    return text


def _phrase(label: str, rng: np.random.Generator, articles: bool) -> str:
    phrases = label_phrases(label)
    phrase = phrases[rng.integers(len(phrases))]
    return (_article(phrase) if articles and vocabulary()[label].countable else "") + phrase


def _article(phrase: str) -> str:
    return "an " if phrase[0] in "aeiou" else "a "


def _join(phrases: list[str], conjunction: str) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + f" {conjunction} {phrases[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

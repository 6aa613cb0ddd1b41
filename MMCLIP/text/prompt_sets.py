"""Sets of positive and negative prompts for zero-shot evaluation: ours, published ones, and files of one's own.

A set whose words are as published bears the name of its paper; where only the form is theirs and the words are ours
the name ends in "-style", and `source` says so.
"""

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from .prompts import (
    SIDES,
    attribute_nouns,
    fill_template,
    has_side,
    label_nouns,
    negative_prompts,
    positive_prompts,
    severities,
)
from .vocabulary import LABEL_KINDS, NO_FINDING, canonical_label, vocabulary


PROMPT_SETS_FILE = Path(__file__).with_name("prompt_sets.yaml")
POOLINGS = ("mean_embedding", "mean_score", "max_score")
_KEYS = ("name", "source", "pooling", "templates", "names", "labels")
OURS = {  # sets that are made from prompts.yaml
    "mmclip": "ours: every wording of prompts.yaml",
    "sentence": "ours: 'There is X.' against 'There is no X.'",
    "mmclip-attributes": "ours: the sentence with every side and severity of a label, each against its denial",
}

Pair = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class PromptSet:
    """Texts for labels: `prompts` maps canonical labels to their (positive, negative) texts.

    There are as many negative texts as positive ones, or none: then an image's score is its similarity to the positive
    texts alone, which ranks images but is no probability. `pooling` is one of `POOLINGS`, explained at the head of
    prompt_sets.yaml; `source` says where the words come from. `listed` are the labels that a file of one's own names
    one by one.
    """

    name: str
    source: str
    pooling: str
    prompts: Mapping[str, Pair]
    listed: tuple[str, ...] = ()

    def texts(self, labels: Sequence[str]) -> list[Pair]:
        """(positive, negative) texts of each label. Raises ValueError naming the labels without a text."""
        labels = [canonical_label(label, where="labels") for label in labels]
        missing = [label for label in labels if label not in self.prompts]
        if missing:
            there = ", ".join(itertools.islice(self.prompts, 15)) + (", ..." if len(self.prompts) > 15 else "")
            raise ValueError(
                f"The prompt set {self.name!r} has no text for {', '.join(missing)}. Choose other prompts, or name the "
                f"labels to score (`labels`, --labels), of those that it has: {there}."
            )
        return [self.prompts[label] for label in labels]

    def unused(self, labels: Sequence[str]) -> list[str]:
        """The labels that a file of one's own has texts for and that are not among `labels`."""
        return [label for label in self.listed if label not in labels]

    def check_used(self, labels: Sequence[str]) -> None:
        """Raises ValueError where a file of one's own has texts for labels that data, which have `labels`, lack."""
        if unused := self.unused(labels):
            raise ValueError(
                f"{self.source}: there are texts for {', '.join(unused)}, but no row states these as present or "
                f"absent; the rows state {', '.join(labels)}. Correct the names, take the texts out, or name the "
                "labels to score (`labels`, --labels)."
            )


def prompt_set_names() -> list[str]:
    """The names that `prompt_set` takes."""
    return [*OURS, *_stored_sets()]


def prompt_set(name: str) -> PromptSet:
    """The set of prompts of this name, or that of a YAML file where `name` ends in .yaml or .yml.

    Raises ValueError for an unknown name and what is wrong in the file.
    """
    if name in prompt_set_names():
        return _named_set(name)
    if name.endswith((".yaml", ".yml")):
        return load_prompt_set(name)
    raise ValueError(
        f"There are no prompts {name!r}; expected {', '.join(prompt_set_names())}, or a file that ends in .yaml."
    )


@functools.cache
def _named_set(name: str) -> PromptSet:
    if name in OURS:
        pooling = "max_score" if name == "mmclip-attributes" else "mean_embedding"
        prompts = {label: _our_pair(name, label) for label in (*_labels(), NO_FINDING)}
        return PromptSet(name, OURS[name], pooling, prompts)
    stored = _read_set({"name": name, **_stored_sets()[name]}, f"{PROMPT_SETS_FILE.name}: {name}")
    return replace(stored, listed=())


def load_prompt_set(path: str | os.PathLike) -> PromptSet:
    """Read a set of prompts from a YAML file; the head of prompt_sets.yaml explains the keys, of which each may lack.

    Raises ValueError, beginning with the file and the place in it, for: a file that is not there or no YAML; an unknown
    key, label or field; an empty list or text; negative texts that are not as many as the positive ones.
    """
    return _read_set(read_yaml(path, "prompts", f"the keys {', '.join(_KEYS)}"), str(path))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error, where SafeLoader keeps the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key != "<<" and key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands twice, again in line {key_node.start_mark.line + 1}.")
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike, what: str, expected: str) -> dict:
    """The keys of a YAML file of one's own, with `name` and `source` from the file where it gives none.

    Raises ValueError for a file that is not there, is no YAML, or has a key twice.
    """
    path = Path(path)
    try:
        entry = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise ValueError(f"There is no file {path} with {what}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: expected {expected}, but the file holds {type(entry).__name__}.")
    return {"name": path.stem, "source": str(path), **entry}


@functools.cache
def _stored_sets() -> dict[str, dict]:
    return yaml.safe_load(PROMPT_SETS_FILE.read_text(encoding="utf-8"))


@functools.cache
def _labels() -> tuple[str, ...]:
    return tuple(concept.name for concept in vocabulary().values() if concept.kind in LABEL_KINDS)


def _our_pair(name: str, label: str) -> Pair:
    positive, negative = tuple(positive_prompts(label)), tuple(negative_prompts(label))
    if name == "sentence":
        return positive[:1], negative[:1]
    if name == "mmclip" or label == NO_FINDING:
        return positive, negative
    described = itertools.product((None, *SIDES) if has_side(label) else (None,), (None, *severities(label)))
    nouns = [attribute_nouns(label, side, severity)[0] for side, severity in described]
    return (
        tuple(fill_template("There {is} {a_phrase}.", noun) for noun in nouns),
        tuple(fill_template("There {is} no {phrase}.", noun) for noun in nouns),
    )


def _read_set(entry: dict, where: str) -> PromptSet:
    _check_keys(entry, _KEYS, where)
    pooling = entry.get("pooling", POOLINGS[0])
    if pooling not in POOLINGS:
        raise ValueError(f"{where}: `pooling` is {pooling!r}, expected one of {', '.join(POOLINGS)}.")
    spellings = _texts(entry["names"], f"{where}: names") if "names" in entry else ()
    names = {canonical_label(spelling, f"{where}: names"): spelling for spelling in spellings}
    prompts: dict[str, Pair] = {}
    if "templates" in entry:
        at = f"{where}: templates"
        templates = _pair(entry["templates"], at)
        for label in dict.fromkeys((*_labels(), *names)):
            prompts[label] = tuple(_fill(side, label, names.get(label, ""), at) for side in templates)
    labels = entry.get("labels", {})
    if not isinstance(labels, dict):
        raise ValueError(f"{where}: `labels` must map labels to their texts, but is {type(labels).__name__}.")
    seen: dict[str, str] = {}
    for spelling, texts in labels.items():
        at = f"{where}: labels"
        label = canonical_label(str(spelling), at)
        if label in seen:
            raise ValueError(f"{at}: {seen[label]!r} and {spelling!r} are both {label!r}; put their texts together.")
        seen[label] = spelling
        prompts[label] = _pair(texts, f"{at}: {spelling}")
    if not prompts:
        raise ValueError(f"{where}: there are no texts; give `labels`, `templates`, or both.")
    listed = tuple(dict.fromkeys((*names, *seen)))
    return PromptSet(str(entry["name"]), str(entry.get("source", "")), pooling, prompts, listed)


def _check_keys(entry: object, allowed: Sequence[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected the keys {', '.join(allowed)}, but found {entry!r}.")
    unknown = [key for key in entry if key not in allowed]
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}, expected {', '.join(allowed)}.")


def _texts(texts: object, where: str) -> tuple[str, ...]:
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{where}: expected a list of texts, but found {texts!r}.")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{where}: expected a text that is not empty, but found {text!r}; YAML needs 'no' in quotes."
            )
    return tuple(texts)


def _pair(entry: object, where: str) -> Pair:
    """(positive, negative) texts of one label, or templates, from their keys."""
    _check_keys(entry, ("positive", "negative", "product"), where)
    if "product" in entry:
        if len(entry) > 1:
            raise ValueError(f"{where}: `product` stands for `positive` and has no negative texts; give it alone.")
        factors = entry["product"]
        if not isinstance(factors, list) or not factors or not all(isinstance(f, list) and f for f in factors):
            raise ValueError(f"{where}: `product` must be a list of lists of words, none empty, but is {factors!r}.")
        texts = [" ".join(" ".join(map(str, words)).split()) for words in itertools.product(*factors)]
        return _texts(texts, f"{where}: product"), ()
    if "positive" not in entry:
        raise ValueError(f"{where}: there are no `positive` texts.")
    positive = _texts(entry["positive"], f"{where}: positive")
    negative = _texts(entry["negative"], f"{where}: negative") if "negative" in entry else ()
    if negative and len(negative) != len(positive):
        raise ValueError(
            f"{where}: {len(positive)} positive and {len(negative)} negative texts; give a negative one for each, or "
            "none at all."
        )
    return positive, negative


def _fill(templates: Sequence[str], label: str, published: str, where: str) -> tuple[str, ...]:
    names = {"name": published or label, "Name": published or label.title()}
    nouns = label_nouns(label)
    texts = []
    for template in templates:
        try:
            texts += [fill_template(template, noun, **names) for noun in nouns]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{where}: the gaps of {template!r} cannot be filled ({error!r}); there are {{phrase}}, {{Phrase}}, "
                "{a_phrase}, {A_phrase}, {is}, {name} and {Name}."
            ) from error
    return tuple(dict.fromkeys(texts))

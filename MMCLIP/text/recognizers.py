"""Recognisers on other people's models: any spaCy or scispaCy pipeline, any token-classification model of transformers.

They say where an entity is and of which kind. Which concept it is comes from the vocabulary, whether it is present from
the rules of assertion.py, unless the model's own label or pipeline says so.
"""

import bisect
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from .assertion import ASSERTIONS, add_cues
from .entities import Entity, LexiconRecognizer, Recognizer, asserted, rules_fingerprint, sentence_numbers
from .lexicon import PhraseIndex, find_words
from .vocabulary import KINDS, LABEL_KINDS


# What the labels of known models mean; None: no entity for us. In lower case, without the B- and I- of token labels.
KNOWN_LABELS: dict[str, str | None] = {
    # the vocabulary's own kinds come first, see `_meaning`
    "problem": "finding", "test": None, "treatment": None,  # i2b2 2010
    "disease": "disease", "chemical": None, "entity": "finding",  # BC5CDR and the scispaCy pipelines
    "observation": "finding", "observation_modifier": "descriptor", "anatomy_modifier": "descriptor",
    "uncertainty": None,  # the five labels of RadLex-based radiology taggers, with anatomy
    "anat-dp": "anatomy", "obs-dp": "finding:present", "obs-u": "finding:uncertain", "obs-da": "finding:absent",
    "anatomy::definitely present": "anatomy", "observation::definitely present": "finding:present",
    "observation::uncertain": "finding:uncertain", "observation::definitely absent": "finding:absent",  # RadGraph
    "sign_symptom": "finding", "disease_disorder": "disease", "biological_structure": "anatomy",
    "detailed_description": "descriptor", "severity": "descriptor", "lab_value": None,
    "diagnostic_procedure": None, "therapeutic_procedure": None, "medication": None,  # MACCROBAT
}  # fmt: skip


class _Span(NamedTuple):
    start: int
    end: int
    label: str
    assertion: str | None = None


class _ModelRecognizer(Recognizer):
    """What both have in common: spans with labels -> entities."""

    def __init__(self, names: Sequence[str], labels: Mapping[str, str | None] | None, where: str):
        labels = dict(labels or {})
        if unknown := sorted(set(labels) - set(names)):
            raise ValueError(f"{where} has no labels {unknown}; it has {sorted(names)}.")
        self.meanings = {name: _meaning(name, labels, where) for name in names}
        if not any(self.meanings.values()):
            raise ValueError(f"{where}: none of its labels {sorted(names)} is an entity here; {_HOW_TO}")
        self._lexicon = LexiconRecognizer()
        self._cues: PhraseIndex | None = None

    def _spans(self, texts: Sequence[str]) -> Iterator[list[_Span]]:
        raise NotImplementedError

    def find(self, texts: Sequence[str]) -> list[list[Entity]]:
        return [self._entities(text, spans) for text, spans in zip(texts, self._spans(texts), strict=True)]

    def _entities(self, text: str, spans: Sequence[_Span]) -> list[Entity]:
        words = find_words(text)
        sentence_of = sentence_numbers(text, words)
        starts, ends = [word.start for word in words], [word.end for word in words]
        taken = [False] * len(words)
        chosen = []
        for span in sorted(spans, key=lambda span: (span.start - span.end, span.start)):
            meaning = self.meanings.get(span.label)
            inside = range(bisect.bisect_right(ends, span.start), bisect.bisect_left(starts, span.end))
            if meaning is None or len(inside) == 0 or any(taken[i] for i in inside):
                continue
            kept = [i for i in inside if sentence_of[i] == sentence_of[inside[0]]]
            first, stop = kept[0], kept[-1] + 1
            taken[first:stop] = [True] * (stop - first)
            kind, said = meaning
            chosen.append((first, stop, kind, span.assertion or said))
        chosen.sort()
        found = []
        for first, stop, kind, _ in chosen:
            start, end = words[first].start, words[stop - 1].end
            found.append((start, end, *self._concept(text[start:end], kind)))
        if self._cues is None:
            self._cues = add_cues(PhraseIndex())
        entities = asserted(words, sentence_of, [span[:2] for span in chosen], found, self._cues.find(words))
        return [
            entity if said is None else entity._replace(assertion=said, cue_start=None, cue_end=None)
            for entity, (*_, said) in zip(entities, chosen, strict=True)
        ]

    def _concept(self, text: str, kind: str) -> tuple[str, str]:
        """(concept, kind) of a span: the vocabulary's where it knows one of that sort, else its own words."""
        labels = kind in LABEL_KINDS
        known = [e for e in self._lexicon(text) if e.kind == kind or (labels and e.kind in LABEL_KINDS)]
        if known:
            longest = max(known, key=lambda entity: entity.end - entity.start)
            return longest.concept, longest.kind
        return " ".join(text.lower().split()), kind


_HOW_TO = (
    "say with `labels` (`recognizer_labels` in a command) what each means: one of "
    f"{', '.join(KINDS)}, if need be with the assertion ('finding:absent'), or null for no entity."
)


def _meaning(name: str, labels: Mapping[str, str | None], where: str) -> tuple[str, str | None] | None:
    """(kind, assertion or None) of a model's label, None where it is no entity."""
    if name in labels:
        value = labels[name]
    elif name.lower() in KINDS:
        value = name.lower()
    elif name.lower() in KNOWN_LABELS:
        value = KNOWN_LABELS[name.lower()]
    else:
        raise ValueError(f"{where} has the label {name!r}, whose meaning is not known; {_HOW_TO}")
    if value is None:
        return None
    kind, _, assertion = value.partition(":")
    if kind not in KINDS or (assertion and assertion not in ASSERTIONS):
        raise ValueError(f"{where}: the label {name!r} shall mean {value!r}; {_HOW_TO}")
    return kind, assertion or None


class SpacyRecognizer(_ModelRecognizer):
    """The entities of a spaCy pipeline: `SpacyRecognizer("en_core_sci_sm")`, or a folder, or a loaded pipeline.

    Where the pipeline has a component `negex` (negspacy), what it negates is absent; the rest is as the rules here say.

    Args:
        pipeline: What `spacy.load` takes, or a `Language` with a component that sets `doc.ents`.
        labels: What its labels mean, as {label: kind}; kind may carry the assertion ("finding:absent"), None leaves
            the label out. Labels named as the kinds of the vocabulary, and those of the commonest models, are known.

    Raises ValueError for a pipeline without entities and for a label whose meaning is not known.
    """

    def __init__(self, pipeline, labels: Mapping[str, str | None] | None = None):
        import spacy

        try:
            self.pipeline = spacy.load(pipeline) if isinstance(pipeline, str | os.PathLike) else pipeline
        except OSError as error:
            raise ValueError(f"There is no spaCy pipeline {str(pipeline)!r}: {error}") from error
        names = {
            label
            for name, part in self.pipeline.pipeline
            if "ents" in _assigns(self.pipeline, name)
            for label in part.labels
        }
        if not names:
            raise ValueError(
                f"The spaCy pipeline {pipeline} finds no entities: no component that sets doc.ents has labels. Its "
                f"components are {self.pipeline.pipe_names}."
            )
        super().__init__(sorted(names), labels, f"The spaCy pipeline {self.pipeline.meta.get('name', pipeline)!r}")

    @functools.cached_property
    def fingerprint(self) -> str:
        return rules_fingerprint(
            self.pipeline.to_bytes() + repr(self.meanings).encode() + self._lexicon.fingerprint.encode()
        )

    def _spans(self, texts: Sequence[str]) -> Iterator[list[_Span]]:
        has_negex = "negex" in self.pipeline.pipe_names
        for doc in self.pipeline.pipe(texts):
            yield [
                _Span(ent.start_char, ent.end_char, ent.label_, "absent" if has_negex and ent._.negex else None)
                for ent in doc.ents
            ]


def _assigns(pipeline, name: str) -> str:
    return " ".join(pipeline.get_pipe_meta(name).assigns)


class TokenClassificationRecognizer(_ModelRecognizer):
    """The entities of a token-classification model: `TokenClassificationRecognizer("folder or Hub id")`.

    Whole words are entities, however the tokenizer cuts them. A text longer than the model takes is read in windows
    that overlap.

    Args:
        model: Folder or Hub id with a fast tokenizer.
        labels: As in `SpacyRecognizer`; labels without their B- and I-.
        device: Where it runs.

    Raises ValueError for a slow tokenizer and for a label whose meaning is not known.
    """

    def __init__(self, model: str, labels: Mapping[str, str | None] | None = None, device: str = "cpu"):
        from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
            loaded = AutoModelForTokenClassification.from_pretrained(model).eval()
        except OSError as error:
            raise ValueError(f"There is no token-classification model {model!r}: {error}") from error
        if not tokenizer.is_fast:
            raise ValueError(
                f"{model}: its tokenizer is slow and gives no character offsets; save the fast one beside it."
            )
        limit = getattr(loaded.config, "max_position_embeddings", None) or tokenizer.model_max_length
        table = getattr(getattr(loaded.base_model, "embeddings", None), "position_embeddings", None)
        if getattr(table, "padding_idx", None) is not None:  # RoBERTa counts its positions from there
            limit -= table.padding_idx + 1
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        self.pipeline = pipeline(
            "token-classification",
            model=loaded,
            tokenizer=tokenizer,
            aggregation_strategy="simple",
            stride=min(64, tokenizer.model_max_length // 4),
            device=device,
        )
        names = {name.removeprefix("B-").removeprefix("I-") for name in loaded.config.id2label.values()}
        super().__init__(sorted(names - {"O"}), labels, f"The model {model}")

    @functools.cached_property
    def fingerprint(self) -> str:
        state = hashlib.sha256(repr(self.meanings).encode() + self._lexicon.fingerprint.encode())
        state.update(repr(self.pipeline.model.config.id2label).encode())
        tokenizer = json.loads(self.pipeline.tokenizer.backend_tokenizer.to_str())
        state.update(repr((tokenizer["normalizer"], tokenizer["pre_tokenizer"], tokenizer["model"])).encode())
        for name, tensor in self.pipeline.model.state_dict().items():
            state.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return rules_fingerprint(state.digest())

    def _spans(self, texts: Sequence[str]) -> Iterator[list[_Span]]:
        full = [number for number, text in enumerate(texts) if text.strip()]  # the pipeline takes no empty text
        spans: list[list[_Span]] = [[] for _ in texts]
        read = self.pipeline([texts[number] for number in full], batch_size=8) if full else []
        for number, found in zip(full, read, strict=True):
            spans[number] = [_Span(int(e["start"]), int(e["end"]), e["entity_group"]) for e in found]
        yield from spans

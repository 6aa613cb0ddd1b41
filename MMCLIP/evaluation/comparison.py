"""Checkpoints on protocols: every evaluation that applies, from one pass of each data set through each model.

`load_trial` reads the rows of a protocol and what is true of them, `evaluate_model` measures one checkpoint on them,
and `compare_models` sets two against each other on the same patients. What each measure means stands in the module
that makes it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from ..data.manifest import has_image
from ..text.prompt_sets import PromptSet, prompt_set
from ..text.vocabulary import NO_FINDING
from . import bootstrap
from .controls import shuffled_control
from .embeddings import EmbeddingCache, image_features, rows_fingerprint, text_features
from .grounding import GroundingScores, compare_grounding, evaluate_grounding, rows_with_lesions
from .linear_probe import evaluate_linear_probe
from .negation import evaluate_negation, evaluate_side
from .protocols import Protocol, check_labels, class_targets, overlap_cautions, protocol_rows
from .retrieval import compare_retrieval, evaluate_retrieval, report_names, retrieval_rows
from .zero_shot import (
    ClassPredictions,
    ZeroShotPredictions,
    check_targets,
    evaluate_zero_shot,
    evaluate_zero_shot_classes,
    label_matrix,
    patient_names,
    scored_rows,
    unscorable,
)


ROLES = ("test", "validation", "train")


@dataclass(frozen=True)
class Options:
    """How to evaluate. `evaluations` and `prompts` are those of each protocol when None."""

    evaluations: tuple[str, ...] | None = None
    prompts: str | None = None
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    seeds: tuple[int, ...] = (0,)
    num_bootstrap: int = 1000
    seed: int = 0
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = False


@dataclass(frozen=True)
class Trial:
    """One protocol on one data set.

    `rows` maps roles to all their rows, `scored` to those with an image and a label, whose `targets` are (n, F) of
    1 present, 0 absent, -100 unknown; under a multi-class protocol (n,) class numbers. `test` is always there. In
    `num_unlisted_is_absent` of the scored rows a label that the row does not name counts as absent.
    """

    protocol: Protocol
    place: str
    prompts: PromptSet
    labels: list[str]
    unused_labels: list[str]
    rows: dict[str, datasets.Dataset]
    scored: dict[str, datasets.Dataset]
    targets: dict[str, np.ndarray]
    patients: dict[str, list[str]]
    num_unlisted_is_absent: dict[str, int] = field(default_factory=dict)

    @property
    def is_multi_class(self) -> bool:
        return self.protocol.task == "multi-class"


@dataclass
class Outcome:
    """What one model made of one trial: `results` for JSON, and the scores behind them for tables and comparisons."""

    results: dict[str, Any] = field(default_factory=dict)
    zero_shot: ZeroShotPredictions | ClassPredictions | None = None
    linear_probe: dict[tuple[float, int], np.ndarray] = field(default_factory=dict)
    ranks: Any = None
    grounding: GroundingScores | None = None


def load_trial(protocol: Protocol, place: str, prompts: str | None = None) -> Trial:
    """Read what a protocol needs, with every check that can be made before a model is loaded.

    `prompts` takes the place of the protocol's own set of prompts.
    """
    rows = {role: protocol_rows(protocol, place, role) for role in ROLES}
    rows = {role: part for role, part in rows.items() if part is not None}
    chosen = prompt_set(prompts or protocol.prompts)
    scored, targets, patients, num_by_rule = {}, {}, {}, {}
    labels, unused = list(protocol.labels) or None, []
    for role, part in rows.items():
        with _named(f"{protocol.name}, {role} rows"):
            scored[role], labels, _ = scored_rows(part, labels)
        if role == "test":
            if not protocol.labels:
                chosen.check_used(labels)
            labels, unused = check_labels(protocol, scored[role], chosen, labels)
        with _named(f"{protocol.name}, {role} rows"):
            if protocol.task == "multi-class":
                targets[role] = class_targets(scored[role], labels)
            else:
                targets[role], num_by_rule[role] = label_matrix(
                    scored[role], labels, protocol.unlisted_is_absent, protocol.fully_labelled
                )
        patients[role] = patient_names(scored[role])
    return Trial(protocol, place, chosen, labels, unused, rows, scored, targets, patients, num_by_rule)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """A ValueError says where it comes from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def describe_trial(trial: Trial) -> dict:
    """What a reader needs to know of the data: counts, hash of the test rows and of what is true of them, cautions.

    The prompts stand there word for word.
    """
    pairs = zip(trial.labels, trial.prompts.texts(trial.labels), strict=True)
    truth = (json.dumps([trial.labels, trial.patients["test"]]), trial.targets["test"].tobytes())
    return {
        "protocol": trial.protocol.name,
        "source": trial.protocol.source,
        "task": trial.protocol.task,
        "place": trial.place,
        "data_hash": rows_fingerprint(trial.scored["test"], *truth),
        "labels": trial.labels,
        "unused_labels": trial.unused_labels,
        "skipped": {} if trial.is_multi_class else unscorable(trial.targets["test"], trial.labels),
        "num_rows": {role: len(part) for role, part in trial.rows.items()},
        "num_scored": {role: len(part) for role, part in trial.scored.items()},
        "num_unlisted_is_absent": trial.num_unlisted_is_absent,
        "num_patients": bootstrap.count_patients(trial.patients["test"]),
        "prompts": {
            "name": trial.prompts.name,
            "source": trial.prompts.source,
            "pooling": trial.prompts.pooling,
            "texts": {label: {"positive": list(yes), "negative": list(no)} for label, (yes, no) in pairs},
        },
        "unused_prompts": trial.prompts.unused(trial.labels),
        "published_prompts": list(trial.protocol.published_prompts),
        "headline": trial.protocol.headline,
        "cautions": list(trial.protocol.cautions),
    }


def applicable(trial: Trial, evaluations: Sequence[str] | None) -> dict[str, str]:
    """Evaluation -> "" where it can be made, else why not. One that was asked for by name must be possible.

    Raises ValueError too where labels are to be scored and none of them can be.
    """
    rows = trial.rows["test"]
    reasons = {}
    for name in evaluations or trial.protocol.evaluations:
        if name in ("zero_shot", "linear_probe") and not trial.is_multi_class:
            with _named(f"{trial.protocol.name}, {name} on the test rows"):
                check_targets(trial.targets["test"], trial.labels)
        reason = ""
        if name == "linear_probe" and "train" not in trial.scored:
            reason = f"the data have no training rows (split {trial.protocol.train_split!r})"
        elif name == "retrieval" and len(retrieval_rows(rows)) < 2:
            reason = "fewer than two rows have an image and a report"
        elif name == "grounding" and not rows_with_lesions(rows):
            reason = "no row has a mask or a box"
        elif name == "negation" and (trial.is_multi_class or set(trial.labels) <= {NO_FINDING}):
            reason = "no finding is stated as present and absent"
        if reason and evaluations:
            raise ValueError(f"{trial.protocol.name}: {name} cannot be measured, as {reason}. Leave it out.")
        reasons[name] = reason
    return reasons


def evaluate_model(model, processor, trial: Trial, options: Options, cache: EmbeddingCache | None = None) -> Outcome:
    """Every evaluation of a trial that applies. With one `cache` each image goes through the tower once."""
    cache = EmbeddingCache() if cache is None else cache
    overlaps = overlap_cautions(trial.rows["test"].unique("source"), model.config.training_sources)
    outcome = Outcome({"model_hash": cache.hold(model, processor), "left_out": {}, "overlaps": overlaps})
    passes = {"cache": cache, "batch_size": options.batch_size, "num_workers": options.num_workers}
    draws = {"num_bootstrap": options.num_bootstrap, "seed": options.seed}

    def features(rows: datasets.Dataset, what: str):
        return image_features(model, processor, rows, progress=what if options.progress else "", **passes)

    test = trial.rows["test"]
    features(test.select(np.flatnonzero(has_image(test))), "test images")  # for all that follows
    for name, reason in applicable(trial, options.evaluations).items():
        if reason:
            outcome.results["left_out"][name] = reason
        elif name == "zero_shot":
            _zero_shot(model, processor, trial, outcome, passes | draws)
        elif name == "linear_probe":
            pooled = {role: features(rows, f"{role} images").pooled for role, rows in trial.scored.items()}
            outcome.results[name], outcome.linear_probe = evaluate_linear_probe(
                pooled,
                trial.targets,
                trial.labels,
                trial.patients,
                fractions=options.fractions,
                seeds=options.seeds,
                **draws,
            )
        elif name == "retrieval":
            rows = retrieval_rows(test)
            texts = list(rows["report"])
            outcome.results[name], outcome.ranks = evaluate_retrieval(
                features(rows, "images with a report").embeds,
                text_features(model, processor, texts, cache=cache),
                texts,
                patient_names(rows),
                report_ids=report_names(rows),
                row_ids=list(rows["row_id"]),
                **draws,
            )
        elif name == "grounding":
            outcome.results[name], outcome.grounding = evaluate_grounding(
                model,
                processor,
                test,
                batch_size=options.batch_size,
                num_workers=options.num_workers,
                progress="heat maps" if options.progress else "",
                **draws,
            )
        else:
            embeds = features(trial.scored["test"], "test images").embeds
            _negation(model, processor, trial, outcome, embeds, cache, draws)
    return outcome


def _zero_shot(model, processor, trial: Trial, outcome: Outcome, options: Mapping[str, Any]) -> None:
    rows = trial.scored["test"]
    if trial.is_multi_class:
        results, outcome.zero_shot = evaluate_zero_shot_classes(
            model, processor, rows, trial.targets["test"], trial.labels, prompts=trial.prompts, **options
        )
    else:
        results, outcome.zero_shot = evaluate_zero_shot(
            model,
            processor,
            rows,
            trial.labels,
            validation_rows=trial.scored.get("validation"),
            unlisted_is_absent=trial.protocol.unlisted_is_absent,
            fully_labelled=trial.protocol.fully_labelled,
            prompts=trial.prompts,
            **options,
        )
        results["zero_shot"]["shuffled_labels"] = shuffled_control(
            trial.targets["test"], outcome.zero_shot.margins, trial.labels, trial.patients["test"], seed=options["seed"]
        )
    outcome.results["zero_shot"] = results["zero_shot"]


def _negation(model, processor, trial: Trial, outcome: Outcome, embeds, cache, draws: Mapping[str, int]) -> None:
    rows, targets = trial.scored["test"], trial.targets["test"]
    try:
        outcome.results["negation"], _ = evaluate_negation(
            model, processor, embeds, targets, trial.labels, trial.patients["test"], cache=cache, **draws
        )
    except ValueError as error:
        outcome.results["left_out"]["negation"] = str(error)
    try:
        outcome.results["side"], _ = evaluate_side(model, processor, rows, embeds, cache=cache, **draws)
    except ValueError as error:
        outcome.results["left_out"]["side"] = str(error)


def compare_models(trial: Trial, first: Outcome, second: Outcome, options: Options) -> dict:
    """`first` minus `second` for what both have, with 95 % intervals and p-values from the same draws of patients."""
    draws = {"num_bootstrap": options.num_bootstrap, "seed": options.seed}
    targets, patients = trial.targets["test"], trial.patients["test"]
    differences = {}
    if first.zero_shot is not None and second.zero_shot is not None:
        if trial.is_multi_class:
            differences["zero_shot"] = bootstrap.compare_multiclass(
                targets, first.zero_shot.logits, second.zero_shot.logits, trial.labels, patients, **draws
            )
        else:
            thresholds = [_thresholds(outcome.results["zero_shot"]) for outcome in (first, second)]
            differences["zero_shot"] = bootstrap.compare_models(
                targets,
                first.zero_shot.margins,
                second.zero_shot.margins,
                trial.labels,
                patients,
                thresholds_a=thresholds[0],
                thresholds_b=thresholds[1],
                **draws,
            )
    compare = bootstrap.compare_multiclass if trial.is_multi_class else bootstrap.compare_models
    for key in sorted(first.linear_probe.keys() & second.linear_probe.keys()):
        name = f"linear_probe at {100 * key[0]:g} %, seed {key[1]}"
        differences[name] = compare(
            targets, first.linear_probe[key], second.linear_probe[key], trial.labels, patients, **draws
        )
    if first.ranks is not None and second.ranks is not None:
        differences["retrieval"] = compare_retrieval(first.ranks, second.ranks, **draws)
    if first.grounding is not None and second.grounding is not None:
        differences["grounding"] = compare_grounding(first.grounding, second.grounding, **draws)
    return differences


def _thresholds(zero_shot: Mapping) -> dict[str, float] | None:
    found = {name: values["threshold"] for name, values in zero_shot["per_class"].items() if "threshold" in values}
    return found or None

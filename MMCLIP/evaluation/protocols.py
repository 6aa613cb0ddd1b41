"""Protocols of evaluation by name: which rows, which labels, which split, and what to beware of in the numbers.

`protocol` gives one of protocols.yaml, or that of a file of one's own; `protocol_rows` reads its rows from a prepared
folder or a table; `check_labels` and `class_targets` refuse data that it cannot score.
"""

import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
import numpy as np
import yaml

from ..data.indexing import PHANTOM, is_frontal
from ..data.manifest import has_image
from ..data.phantom import phantom_dataset
from ..data.prepared import read_manifest, shards
from ..data.readers import SOURCES, read_csv_manifest
from ..data.readers.overlaps import known_overlaps
from ..text.prompt_sets import PromptSet, prompt_set, prompt_set_names, read_yaml
from ..text.vocabulary import broader_labels, canonical_label, with_broader_labels


logger = logging.getLogger(__name__)
PROTOCOLS_FILE = Path(__file__).with_name("protocols.yaml")
TASKS = ("multi-label", "multi-class")
EVALUATIONS = ("zero_shot", "linear_probe", "retrieval", "grounding", "negation")
HEADLINES = ("macro_auroc", "macro_accuracy", "accuracy")
ALL_ROWS = "*"  # as `test_split`
SIZES = ("test", "validation", "train", "image_size")  # of phantoms


@dataclass(frozen=True)
class Protocol:
    """How one data set is evaluated; the head of protocols.yaml says what each field means.

    Labels are canonical, and `sizes` is empty but for phantoms.
    """

    name: str
    source: str
    data: str = ""
    task: str = "multi-label"
    labels: tuple[str, ...] = ()
    test_split: str = "test"
    validation_split: str = "val"
    train_split: str = "train"
    frontal_only: bool = True
    unlisted_is_absent: bool | None = None
    fully_labelled: tuple[str, ...] = ()
    images_per_class: int = 0
    prompts: str = "mmclip"
    published_prompts: tuple[str, ...] = ()
    evaluations: tuple[str, ...] = EVALUATIONS
    headline: str = "macro_auroc"
    cautions: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    def split(self, role: str) -> str:
        """The split of the rows with this role, "test", "validation" or "train"; "" where there is none."""
        return {"test": self.test_split, "validation": self.validation_split, "train": self.train_split}[role]


def protocol_names() -> list[str]:
    """The names that `protocol` takes."""
    return list(_stored_protocols())


def protocol(name: str) -> Protocol:
    """The protocol of this name, or that of a YAML file where `name` ends in .yaml or .yml.

    Raises ValueError for an unknown name and what is wrong in the file.
    """
    if name in protocol_names():
        return _named_protocol(name)
    if name.endswith((".yaml", ".yml")):
        return load_protocol(name)
    raise ValueError(
        f"There is no protocol {name!r}; expected {', '.join(protocol_names())}, or a file that ends in .yaml."
    )


def load_protocol(path: str | os.PathLike) -> Protocol:
    """Read a protocol from a YAML file; a file of prompts that it names is looked for beside it.

    Raises ValueError, beginning with the file and naming the key, for: a file that is not there or no YAML; an unknown
    key or label; a value of another kind; keys that contradict each other.
    """
    path = Path(path)
    entry = read_yaml(path, "a protocol", "the keys of a protocol")
    if isinstance(entry.get("prompts"), str) and entry["prompts"].endswith((".yaml", ".yml")):
        entry["prompts"] = str(path.parent / entry["prompts"])
    return _read_protocol(entry, str(path))


@functools.cache
def _stored_protocols() -> dict[str, dict]:
    return yaml.safe_load(PROTOCOLS_FILE.read_text(encoding="utf-8"))


@functools.cache
def _named_protocol(name: str) -> Protocol:
    return _read_protocol({"name": name, **_stored_protocols()[name]}, f"{PROTOCOLS_FILE.name}: {name}")


def _read_protocol(entry: dict, where: str) -> Protocol:
    known = {item.name: item for item in fields(Protocol)}
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}, expected {', '.join(known)}.")
    values = {key: _typed(value, known[key].type, f"{where}: `{key}`") for key, value in entry.items()}
    labels = values.get("labels", ())
    canonical = [canonical_label(label, f"{where}: `labels`") for label in labels]
    for label, spelling in zip(canonical, labels, strict=True):
        if canonical.count(label) > 1:
            raise ValueError(f"{where}: `labels` names {label!r} more than once, the first time as {spelling!r}.")
    made = Protocol(**{**values, "labels": tuple(canonical)})
    _check(made, where)
    return made


_KINDS = {  # type of a field -> what it must be in YAML, and whether it is
    str: ("a text", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    bool | None: ("true, false or null", lambda value: value is None or isinstance(value, bool)),
    int: ("a whole number of at least 0", lambda value: type(value) is int and value >= 0),
    tuple[str, ...]: (
        "a list of texts; YAML needs words such as 'no' in quotes",
        lambda value: isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value),
    ),
    Mapping[str, int]: (
        f"whole numbers above 0 under {', '.join(SIZES)}",
        lambda value: (
            isinstance(value, dict)
            and set(value) == set(SIZES)
            and all(type(number) is int and number > 0 for number in value.values())
        ),
    ),
}


def _typed(value: object, kind: object, where: str):
    """`value` from YAML as a field of this type takes it; lists become tuples."""
    what, fits = _KINDS[kind]
    if not fits(value):
        raise ValueError(f"{where} must be {what}, but is {value!r}.")
    return tuple(value) if isinstance(value, list) else value


def _check(made: Protocol, where: str) -> None:
    for key, value, allowed in (
        ("task", (made.task,), TASKS),
        ("headline", (made.headline,), HEADLINES),
        ("evaluations", made.evaluations, EVALUATIONS),
        ("published_prompts", made.published_prompts, prompt_set_names()),
    ):
        if strange := [name for name in value if name not in allowed]:
            raise ValueError(f"{where}: `{key}` has {strange[0]!r}, expected {', '.join(allowed)}.")
    if not made.evaluations:
        raise ValueError(f"{where}: `evaluations` is empty; name some of {', '.join(EVALUATIONS)}.")
    if made.task == "multi-class" and len(made.labels) < 2:
        raise ValueError(f"{where}: `labels` must name the classes of a multi-class task, two at least.")
    if made.images_per_class and made.task != "multi-class":
        raise ValueError(f"{where}: `images_per_class` is for `task: multi-class`, but the task is {made.task}.")
    if (made.data == PHANTOM) != bool(made.sizes):
        raise ValueError(f"{where}: `sizes` and `data: phantom` go together.")
    if not made.test_split:
        raise ValueError(f"{where}: `test_split` is empty; name a split, or {ALL_ROWS!r} for all rows.")
    used = [split for split in (made.test_split, made.validation_split, made.train_split) if split]
    if len(set(used)) < len(used) or (made.test_split == ALL_ROWS and len(used) > 1) or ALL_ROWS in used[1:]:
        raise ValueError(
            f"{where}: `test_split`, `validation_split` and `train_split` share rows: {', '.join(used)}. Where there "
            'is no such part, write "".'
        )
    try:
        prompt_set(made.prompts)
    except ValueError as error:
        raise ValueError(f"{where}: `prompts`: {error}") from error


# ---------------------------------------------------------------------------------------------------------------- rows


def protocol_rows(chosen: Protocol, place: str | os.PathLike, role: str) -> datasets.Dataset | None:
    """Rows of `place` with the role "test", "validation" or "train"; None where there are none but for testing.

    Nor are there where no row has both an image and a label, of which a warning tells.

    `place` is a prepared folder or a table. Of it count the rows of the protocol's split, source and views; a film of
    unknown view is taken for frontal. For phantoms, `place` is the number of test images as text, or "", and the
    numbers are those of `sizes`.

    Raises ValueError for a place that does not exist, that holds other sources only, or whose test split is missing or
    has no labelled row, and where a class has not its `images_per_class`.
    """
    if chosen.data == PHANTOM:
        return _phantoms(chosen, str(place), role)
    if not str(place) or not Path(place).exists():
        problem = f"there is no {place}" if str(place) else "no data are given"
        raise ValueError(
            f"{chosen.name}: {problem}. Write {chosen.name}=PLACE, the folder of examples/prepare_data.py or a table "
            "(.csv, .tsv, .jsonl, .parquet)."
        )
    rows = _read(chosen, Path(place), role)
    if rows is None:
        return None
    kept = [number for number, source in enumerate(rows["source"]) if _is_of(chosen, source)]
    if not kept:
        if role != "test":
            return None
        there = ", ".join(map(repr, sorted(set(rows["source"]))))
        raise ValueError(
            f"{chosen.name}: no test row of {place} has the source {chosen.data!r}; the sources there are {there}. "
            f"Give the place of {chosen.data}, or put its name into the column `source`."
        )
    rows = rows.select(kept)
    if chosen.frontal_only:
        rows = rows.select([number for number, view in enumerate(rows["view"]) if is_frontal(view)])
    labels = zip(rows["present"], rows["absent"], rows["uncertain"], strict=True)
    labelled = np.array([bool(p or a or u) for p, a, u in labels], dtype=bool)
    if role != "test" and not (labelled & has_image(rows)).any():
        logger.warning("%s: no %s row of %s has an image and a label; it goes without.", chosen.name, role, place)
        return None
    if not labelled.any():
        raise ValueError(
            f"{chosen.name}: none of {len(rows)} test rows of {place} has a label"
            f"{', after lateral films were left out' if len(rows) < len(kept) else ''}, so nothing can be scored. Add "
            "labels, or take another split."
        )
    if role == "test" and chosen.images_per_class:
        _check_class_sizes(chosen, rows, str(place))
    return rows


def _phantoms(chosen: Protocol, place: str, role: str) -> datasets.Dataset:
    number = chosen.sizes[role]
    if place:
        if not place.isascii() or not place.isdigit() or int(place) < 1:
            raise ValueError(
                f"{chosen.name}: {place!r} is no number of test images; write {chosen.name}=500, or {chosen.name} "
                f"alone for {chosen.sizes['test']}."
            )
        number = int(place) if role == "test" else number
    return phantom_dataset(number, size=chosen.sizes["image_size"], split=chosen.split(role))


def _read(chosen: Protocol, place: Path, role: str) -> datasets.Dataset | None:
    """The rows of the split, of all sources and views; None for a split that is not there, but for testing."""
    split = chosen.split(role)
    if split != ALL_ROWS and not _has_split(place, split):
        if role != "test":
            return None
        try:
            read_manifest(place, split)  # says whether the split is missing, or all of it unlabelled
        except ValueError as error:
            raise ValueError(f"{chosen.name}: {error} {_split_hint(chosen)}, or take another `test_split`.") from error
    return read_manifest(
        place, None if split == ALL_ROWS else split, drop_unlabelled=True, fully_labelled=chosen.fully_labelled
    )


def _has_split(place: Path, split: str) -> bool:
    if not split:
        return False
    if place.is_dir():
        return bool(shards(place, split))
    rows = read_csv_manifest(place, report_problem=lambda where, reason: None, check_images=False)
    return split in set(rows["split"])


def _is_of(chosen: Protocol, source: str) -> bool:
    return not chosen.data or source == chosen.data or source.startswith(f"{chosen.data}-")


def _split_hint(chosen: Protocol) -> str:
    if chosen.images_per_class and chosen.data == "chexpert":
        return "Prepare the data with --option chexpert.selection=5x200"
    return "Fill the column `split` of a table, prepare a set without an official split with --test_share"


def _check_class_sizes(chosen: Protocol, rows: datasets.Dataset, where: str) -> None:
    hint = f" {_split_hint(chosen)}." if chosen.data == "chexpert" else ""
    try:
        classes = class_targets(rows, chosen.labels)
    except ValueError as error:
        raise ValueError(f"{chosen.name}: {where} is no such selection. {error}{hint}") from error
    counts = np.bincount(classes, minlength=len(chosen.labels))
    if (counts != chosen.images_per_class).any():
        found = ", ".join(f"{count} of {label}" for label, count in zip(chosen.labels, counts, strict=True))
        raise ValueError(
            f"{chosen.name}: {where} must have {chosen.images_per_class} test images of each class, but has {found}. "
            f"Films that could not be read are in quarantine.csv.{hint}"
        )


# -------------------------------------------------------------------------------------------------------------- labels


def check_labels(
    chosen: Protocol, rows: datasets.Dataset, prompts: PromptSet, labels: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The labels to score, and those that the test `rows` state and the protocol does not score.

    A label of the protocol that the rows lack stays: metrics name it as skipped. Prompts for further labels do no harm.
    Raises ValueError where no row has any of the labels, and where `prompts` have no text for one.
    """
    labels = [canonical_label(label, where=f"{chosen.name}: labels") for label in labels]
    present = set(with_broader_labels(label for row in rows["present"] for label in row))
    stated = {label for key in ("present", "absent") for row in rows[key] for label in row}
    if not present & set(labels):
        there = ", ".join(sorted(stated)) or "none"
        raise ValueError(
            f"{chosen.name}: no test row has any of {', '.join(labels) or 'no labels'} present; labels of the rows are "
            f"{there}. Are these the data of the protocol?"
        )
    if missing := [label for label in labels if label not in prompts.prompts]:
        raise ValueError(
            f"{chosen.name}: the prompt set {prompts.name!r} has no text for {', '.join(missing)}. Choose other "
            f"prompts (those that fit here are {', '.join(_fitting_prompts(labels))}), add the texts, or "
            "leave the labels out in a protocol of your own."
        )
    return labels, sorted(stated - set(labels))


def _fitting_prompts(labels: Sequence[str]) -> list[str]:
    return [name for name in prompt_set_names() if all(label in prompt_set(name).prompts for label in labels)]


def class_targets(rows: datasets.Dataset, labels: Sequence[str]) -> np.ndarray:
    """The class of each row as its number in `labels`, (n,) int64.

    Beside a class that is a kind of another, the other does not count: covid-19 and pneumonia is covid-19. Raises
    ValueError naming the first row that has none of the classes present, or two.
    """
    number_of = {label: number for number, label in enumerate(labels)}
    classes = np.empty(len(rows), dtype=np.int64)
    for index, (row_id, present) in enumerate(zip(rows["row_id"], rows["present"], strict=True)):
        found = {label for label in present if label in number_of}
        found -= {broader for label in found for broader in broader_labels(label)[1:]}
        if len(found) != 1:
            raise ValueError(
                f"Row {row_id!r} must have exactly one of the classes {', '.join(labels)} present, but has "
                f"{', '.join(sorted(found)) or 'none'}."
            )
        classes[index] = number_of[found.pop()]
    return classes


def overlap_cautions(evaluated: Iterable[str], training_sources: Iterable[str] | None) -> list[str]:
    """A sentence for each `source` of training rows that is one of the `evaluated` sources, or known to share images.

    None, where nobody knows what a model was trained on, is a sentence too. Phantoms have streams of their own, and a
    source "" is unknown.
    """
    evaluated = sorted(set(evaluated) - {PHANTOM})
    if not evaluated:
        return []
    if training_sources is None:
        return ["its config names no `training_sources`, so nothing tells whether it was trained on these images."]
    training = sorted({source for source in training_sources if source})
    families = {_family(source) for source in evaluated}
    sentences = [
        f"Training used {source} too: scores on {_family(source)} are held out only if the training rows came from the "
        "same preparation, whose splits share no patient."
        for source in training
        if _family(source) in families
    ]
    return sentences + known_overlaps(training, evaluated)


def _family(source: str) -> str:
    """The data set that a source is, or is a part of: covidx of covidx-rsna."""
    return next((name for name in SOURCES if source == name or source.startswith(f"{name}-")), source)

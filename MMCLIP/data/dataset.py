"""Manifest rows as training samples: every row becomes an image, a text, its entities and its labels."""

from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers.utils import logging

from ..image_processing_mmclip import load_grayscale
from ..text.entities import Entity, LexiconRecognizer, Recognizer, report_labels, report_sides
from ..text.prompts import has_side, sample_prompt
from .manifest import ENTITIES


logger = logging.get_logger(__name__)

# Each use of randomness in a sample has its own stream, so that switching one off leaves the others as they were.
TEXT_STREAM, AUGMENTATION_STREAM, COLLATOR_STREAM, BATCH_STREAM = range(4)


def sample_generator(sample_seed: tuple[int, int, int], stream: int) -> np.random.Generator:
    """The generator of one stream of one sample; `sample_seed` is (seed, epoch, index)."""
    return np.random.default_rng((*sample_seed, stream))


class MMCLIPDataset(torch.utils.data.Dataset):
    """Samples of a manifest, paired, unpaired and text-only rows alike.

    `dataset[i]` is a dict with `row_id`, `image` (PIL image of mode "L", None for a text-only row), `text`, `entities`
    (list of `Entity` in `text`), `present` and `absent` (canonical labels), `sides` (present label -> "left", "right"
    or "bilateral", where the report, or without one a mask or box, tells it), `sample_seed` (seed, epoch, i).

    A row with a report has that text, and by default the labels its report states. A row without one gets a
    disease-kind prompt written from its labels, with their sides where masks or boxes tell them, and drawn anew in each
    epoch. The same (seed, epoch, i) gives the same sample in any process. The entities of reports are found once, here,
    and cached by `datasets`.

    Args:
        rows: Rows with the columns of `MMCLIP.data.manifest.FEATURES`; checked by `check_rows` where they are read. A
            column `entities` is that of a prepared data set, `entities_by` names the recogniser that filled it.
        recognizer: Finds the entities of reports; `LexiconRecognizer` when None. Prompts are written in the words of
            the vocabulary, so that one always reads them.
        seed: First part of every sample's seed, not negative.
        unpaired_texts: "prompt" (drawn in each epoch) or "label" (the bare label names, always the same).
        paired_labels: labels of a row with a report: "report" (what it states), "stored" (the row's own) or "both"
            (what it states, then the row's own for labels that it does not mention).
        max_negatives: At most so many absent labels are named in a prompt; 0 for none.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        recognizer: Recognizer | None = None,
        seed: int = 0,
        unpaired_texts: str = "prompt",
        paired_labels: str = "report",
        max_negatives: int = 3,
    ):
        if unpaired_texts not in ("prompt", "label"):
            raise ValueError(f"unpaired_texts is {unpaired_texts!r}, expected 'prompt' or 'label'.")
        if paired_labels not in ("report", "stored", "both"):
            raise ValueError(f"paired_labels is {paired_labels!r}, expected 'report', 'stored' or 'both'.")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected a number that is not negative.")
        recognizer = recognizer if recognizer is not None else LexiconRecognizer()
        self._reads_prompts = recognizer if isinstance(recognizer, LexiconRecognizer) else LexiconRecognizer()
        self.seed = int(seed)
        self.unpaired_texts = unpaired_texts
        self.paired_labels = paired_labels
        self.max_negatives = max_negatives
        lesions = [name for name in ("masks", "boxes") if name in rows.column_names]
        self._lesions = rows.select_columns(["view", *lesions])  # read for prompts alone
        rows = rows.remove_columns(lesions)
        rows = find_entities(rows, recognizer)
        reports = rows.select_columns("report").with_format("arrow").iter(batch_size=1000)
        if any(table["report"].null_count for table in reports):
            self._reads_prompts.make_ready()  # or each worker takes a second and 180 MB for its own
        # a row of these alone is read in two thirds of the time
        self.rows = rows.select_columns(["row_id", "image", "report", "present", "absent", "entities"])
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared, so that live workers see it change

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw from the streams of `epoch` from now on, in worker processes that already run too."""
        self._epoch.fill_(epoch)

    def labels(self) -> Iterator[tuple[list[str], list[str]]]:
        """(present, absent) of every sample, in order and without reading images."""
        columns = self.rows.select_columns(["report", "present", "absent", "entities"]).with_format("arrow")
        for table in columns.iter(batch_size=1000):
            for row in table.to_pylist():
                yield self._labels(row, _entities(row))

    def text_lengths(self) -> np.ndarray:
        """Characters of each report, (n,) int64; -1 for a row that gets a prompt, whose length is drawn with it."""
        columns = self.rows.select_columns("report").with_format("arrow")
        found = [pc.fill_null(pc.utf8_length(table["report"]), -1) for table in columns.iter(batch_size=1000)]
        return np.concatenate([part.to_numpy() for part in found]).astype(np.int64)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        row = self.rows[index]
        sample_seed = (self.seed, self.epoch, index)
        image = None
        if row["image"] is not None:
            where = f"row {row['row_id']!r}"
            stored = row["image"]["bytes"] if row["image"]["bytes"] is not None else row["image"]["path"]
            image = load_grayscale(stored, where=where)
        if row["report"] is not None:
            text = row["report"]
            entities = _entities(row)
            sides = report_sides(text, entities)
        else:
            sides = self._sides(index, row, image)
            text = self._prompt(row, sides, sample_generator(sample_seed, TEXT_STREAM))
            entities = self._reads_prompts(text)
        present, absent = self._labels(row, entities)
        return {
            "row_id": row["row_id"],
            "image": image,
            "text": text,
            "entities": entities,
            "present": present,
            "absent": absent,
            "sides": sides,
            "sample_seed": sample_seed,
        }

    def _labels(self, row: dict, entities: list[Entity]) -> tuple[list[str], list[str]]:
        if row["report"] is None or self.paired_labels == "stored":
            return list(row["present"]), list(row["absent"])
        present, absent, uncertain = report_labels(entities)
        if self.paired_labels == "both":
            said = {*present, *absent, *uncertain}
            present += [label for label in row["present"] if label not in said]
            absent += [label for label in row["absent"] if label not in said]
        return present, absent

    def _sides(self, index: int, row: dict, image) -> dict[str, str]:
        """What masks and boxes tell of the sides of present labels."""
        if image is None or not any(has_side(label) for label in row["present"]):
            return {}
        lesions = self._lesions[index]
        boxes = lesions.get("boxes") if lesions["view"] not in ("LATERAL", "OTHER") else ()
        sides = known_sides(lesions.get("masks") or (), boxes or (), image.width)
        return {label: side for label, side in sides.items() if label in row["present"] and has_side(label)}

    def _prompt(self, row: dict, sides: dict[str, str], generator: np.random.Generator) -> str:
        attributes = {label: {"side": side} for label, side in sides.items()}
        if self.unpaired_texts == "label" and row["present"]:
            return ", ".join(row["present"])
        try:
            return sample_prompt(
                row["present"], row["absent"], generator, max_negatives=self.max_negatives, attributes=attributes
            )
        except ValueError as error:
            raise ValueError(f"row {row['row_id']!r}: {error}") from error


def known_sides(masks: Iterable[dict], boxes: Iterable[dict], width: int) -> dict[str, str]:
    """Finding -> "left", "right" or "bilateral" of the patient, whose right is on the left of the image.

    A mask tells the side that it names. A box, in pixels of a frontal image `width` wide, tells the half it lies in,
    unless it crosses the middle or its centre is within a tenth of the width of it, as no film is centred exactly. A
    finding of which any mask or box tells no side is left out.
    """
    found: dict[str, set[str]] = {}
    for mask in masks:
        found.setdefault(mask["finding"], set()).add(mask["side"])
    for box in boxes:
        offset = box["x"] + box["width"] / 2 - width / 2
        is_clear = abs(offset) >= max(0.1 * width, box["width"] / 2)
        found.setdefault(box["finding"], set()).add(("left" if offset > 0 else "right") if is_clear else "")
    return {
        finding: sides.pop() if len(sides) == 1 else "bilateral" for finding, sides in found.items() if "" not in sides
    }


def _entities(row: dict) -> list[Entity]:
    return [Entity(*(entity[field] for field in Entity._fields)) for entity in row["entities"]]


def find_entities(rows: datasets.Dataset, recognizer: Recognizer) -> datasets.Dataset:
    """`rows` with a column `entities` of the spans in `report`, [] where there is no report.

    A column that is there stays if `entities_by`, which goes with it, names `recognizer`. Else `datasets` caches the
    result, under the rows and `recognizer.fingerprint`.
    """
    if "entities" in rows.column_names:
        if rows.unique("entities_by") == [recognizer.fingerprint]:
            return rows
        logger.warning("The prepared entities were found by another recogniser, or an older one; finding them anew.")
        rows = rows.remove_columns(["entities", "entities_by"])

    def found(reports: list[str | None]) -> dict[str, list]:
        said = iter(recognizer.find([report for report in reports if report is not None]))
        entities = [[] if report is None else [entity._asdict() for entity in next(said)] for report in reports]
        return {"entities": entities}

    column = rows.select_columns("report").map(
        found,
        input_columns="report",
        remove_columns="report",
        batched=True,
        features=datasets.Features({"entities": ENTITIES}),
        new_fingerprint=datasets.fingerprint.Hasher.hash([rows._fingerprint, recognizer.fingerprint]),
        desc="Finding entities",
    )
    return datasets.concatenate_datasets([rows, column], axis=1)  # `map` on all columns would write the images anew

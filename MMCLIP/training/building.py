"""From the arguments of a run to its rows, processor, model, dataset and collator, with every check before training."""

import logging
from collections import Counter
from dataclasses import fields

import datasets
import numpy as np
import pyarrow.compute as pc
from PIL import Image
from transformers import AutoTokenizer

from ..configuration_mmclip import max_text_length
from ..data.augmentation import RadiographAugmentation
from ..data.collator import MMCLIPCollator
from ..data.dataset import MMCLIPDataset
from ..data.manifest import check_rows, has_image
from ..data.phantom import phantom_dataset
from ..data.prepared import concatenate_rows, read_manifest
from ..data.readers.overlaps import known_overlaps
from ..image_processing_mmclip import MMCLIPImageProcessor
from ..modeling_mmclip import MMCLIPForPreTraining
from ..processing_mmclip import MMCLIPProcessor, default_tokenizer
from ..text.entities import load_recognizer, parse_labels
from ..text.vocabulary import canonical_label
from .arguments import AugmentationArguments, DataArguments, ModelArguments


logger = logging.getLogger(__name__)


def build_rows(data: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows to train on and rows to validate on (None when no validation data is given)."""
    train, validation = [], []
    for paths, split, parts in (
        (data.train_manifest, data.train_split, train),
        (data.validation_manifest, data.validation_split, validation),
    ):
        for path in paths:
            parts.append(read_manifest(path, split, data.drop_unlabelled, tuple(data.fully_labelled)))
    size, seed = data.phantom_size, data.phantom_seed
    if data.num_phantoms:
        train.append(
            phantom_dataset(
                data.num_phantoms, size=size, seed=seed, split="train", num_unpaired=data.num_unpaired_phantoms
            )
        )
    if data.num_validation_phantoms:
        validation.append(phantom_dataset(data.num_validation_phantoms, size=size, seed=seed, split="val"))
    train_rows = concatenate_rows(train)
    if data.paired_only:
        tables = train_rows.select_columns(["image", "report"]).with_format("arrow").iter(batch_size=1000)
        is_pair = [pc.and_(pc.is_valid(table["image"]), pc.is_valid(table["report"])).to_numpy() for table in tables]
        train_rows = train_rows.select(np.flatnonzero(np.concatenate(is_pair)))
        if not len(train_rows):
            raise ValueError("`paired_only`: no row to train on has both an image and a report.")
    validation_rows = concatenate_rows(validation) if validation else None
    check_rows(*([train_rows] if validation_rows is None else [train_rows, validation_rows]))
    images = train_rows.select_columns("image").with_format("arrow").iter(batch_size=1000)
    if all(table["image"].null_count == len(table) for table in images):
        logger.warning("No row to train on has an image: is the column of the table called `file`, `image` or `path`?")
    if validation_rows is not None:
        _check_overlap(train_rows, validation_rows)
    if data.shuffle_pairs:
        train_rows = shuffle_images(train_rows, seed=0)
    return train_rows, validation_rows


def _check_overlap(train_rows: datasets.Dataset, validation_rows: datasets.Dataset) -> None:
    """Raises ValueError for a picture in both, where preparation left its hash; warns of sets known to share some."""
    if "pixel_hash" in train_rows.column_names and "pixel_hash" in validation_rows.column_names:
        seen = set(train_rows["pixel_hash"]) - {""}
        shared = [index for index, pixels in enumerate(validation_rows["pixel_hash"]) if pixels in seen]
        if shared:
            raise ValueError(
                f"{len(shared)} of {len(validation_rows)} pictures to validate on are trained on too, the first in row "
                f"{validation_rows[shared[0]]['row_id']!r}. Prepare both sets in one run, with --duplicates drop."
            )
    for sentence in known_overlaps(train_rows.unique("source"), validation_rows.unique("source")):
        logger.warning(sentence)


def shuffle_images(rows: datasets.Dataset, seed: int) -> datasets.Dataset:
    """Every text with another row's image: what is still learned has nothing to do with what the images show."""
    # one cycle through the rows that have an image, so that no image can fall back to its own text
    cycle = np.random.default_rng(seed).permutation(np.flatnonzero(has_image(rows)))
    order = np.arange(len(rows))
    order[cycle] = np.roll(cycle, 1)
    images = rows.select_columns("image").select(order).flatten_indices()
    return datasets.concatenate_datasets([images, rows.remove_columns("image")], axis=1)


def build_tokenizer(model_arguments: ModelArguments, data: DataArguments):
    """The tokenizer that was named, or the text tower's own, or (None) the one that ships with the repository."""
    path = data.tokenizer_name_or_path or model_arguments.text_model_name_or_path
    return None if path is None else AutoTokenizer.from_pretrained(path)


def build_model_and_processor(
    model_arguments: ModelArguments, data: DataArguments
) -> tuple[MMCLIPForPreTraining, MMCLIPProcessor]:
    """The model and the processor that fits it; raises `ValueError` where tokenizer and text tower disagree."""
    if model_arguments.model_name_or_path is not None:
        model = MMCLIPForPreTraining.from_pretrained(model_arguments.model_name_or_path)
        processor = MMCLIPProcessor.from_pretrained(model_arguments.model_name_or_path)
        if data.tokenizer_name_or_path is not None:
            raise ValueError("`model_name_or_path` brings its own tokenizer; leave `tokenizer_name_or_path` out.")
        if data.max_length is not None:
            processor.tokenizer.model_max_length = data.max_length  # checked below against the text tower
    else:
        tokenizer = build_tokenizer(model_arguments, data) or default_tokenizer()
        model = _new_model(model_arguments, tokenizer)
        limit = max_text_length(model.config.text_config) or tokenizer.model_max_length
        if data.max_length is not None and data.max_length > limit:
            raise ValueError(f"`max_length` is {data.max_length}, but the text tower takes {limit} tokens at most.")
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit, data.max_length or limit)
        processor = MMCLIPProcessor(MMCLIPImageProcessor(size=model.image_size), tokenizer)
    processor.check_tokenizer(model.config)
    return model, processor


def _new_model(arguments: ModelArguments, tokenizer) -> MMCLIPForPreTraining:
    fields = arguments.config_fields()
    if arguments.text_model_name_or_path is None:
        # a new text tower is as wide as the tokenizer needs, unless its config says otherwise
        fields["text_config"] = {"model_type": "bert", "vocab_size": len(tokenizer), **fields.get("text_config", {})}
    vision = arguments.vision_model_name_or_path or fields.pop("vision_config", None)
    text = arguments.text_model_name_or_path or fields.pop("text_config")
    return MMCLIPForPreTraining.from_vision_text_pretrained(vision, text, **fields)


def build_augmentation(data: AugmentationArguments, processor: MMCLIPProcessor) -> RadiographAugmentation:
    """The changes of training images, between the values that black and white have after the image processor."""
    levels = processor.image_processor([Image.new("L", (8, 8), level) for level in (0, 255)], return_tensors="pt")
    black, white = levels["pixel_values"].amax(dim=(1, 2, 3)).tolist()
    values = {item.name: getattr(data, item.name) for item in fields(AugmentationArguments)}
    return RadiographAugmentation(black=black, white=white, **values)


def build_datasets(
    train_rows: datasets.Dataset,
    data: DataArguments,
    model: MMCLIPForPreTraining,
    processor: MMCLIPProcessor,
    seed: int,
) -> tuple[MMCLIPDataset, MMCLIPCollator]:
    """The training set, and the collator that makes its batches and knows its augmentation."""
    augmentation = build_augmentation(data, processor)
    recognizer = load_recognizer(data.recognizer, parse_labels(data.recognizer_labels))
    dataset = MMCLIPDataset(train_rows, recognizer=recognizer, seed=seed)
    labels = ()
    config = model.config
    if config.prompt_weight > 0 or config.local_weight > 0 or config.contrastive_targets == "labels":
        stated = label_counts(dataset)
        if data.prompt_labels == ["all"]:
            labels = tuple(sorted(label for label, (present, absent) in stated.items() if present and absent))
        else:
            labels = tuple(canonical_label(label, "prompt_labels") for label in data.prompt_labels)
        if unseen := [label for label in labels if label not in stated]:
            raise ValueError(f"`prompt_labels`: no training row says anything about {', '.join(unseen)}.")
    collator = MMCLIPCollator(
        processor,
        num_patches=model.num_patches,
        mlm_masking=data.mlm_masking,
        mlm_ratio=data.mlm_ratio,
        mlm_kinds=data.mlm_kinds,
        mlm_cue_ratio=data.mlm_cue_ratio,
        prompt_labels=labels,
        prompt_sides=data.prompt_sides and config.side_weight > 0,
        augmentation=augmentation,
        for_trainer=True,
    )
    return dataset, collator


def label_counts(dataset: MMCLIPDataset) -> dict[str, tuple[int, int]]:
    """Label -> (rows that state it present, rows that state it absent)."""
    present, absent = Counter(), Counter()
    for labels_present, labels_absent in dataset.labels():
        present.update(set(labels_present))
        absent.update(set(labels_absent))
    return {label: (present[label], absent[label]) for label in present.keys() | absent.keys()}

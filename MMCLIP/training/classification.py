"""Fine-tuning the vision tower for classification: rows, data set, layer-wise learning rates, LoRA and the Trainer."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer

from ..data.augmentation import RadiographAugmentation
from ..data.dataset import AUGMENTATION_STREAM, sample_generator
from ..data.manifest import check_rows
from ..data.phantom import phantom_dataset
from ..data.prepared import concatenate_rows, read_manifest
from ..data.readers.overlaps import known_overlaps
from ..evaluation.checkpoints import check_checkpoint
from ..evaluation.embeddings import ImageDataset
from ..evaluation.linear_probe import nested_subset, run_metrics
from ..evaluation.protocols import class_targets
from ..evaluation.zero_shot import label_matrix, patient_names, scored_rows
from ..modeling_mmclip import MMCLIPForImageClassification
from ..processing_mmclip import MMCLIPProcessor
from .building import build_augmentation
from .classification_arguments import ClassificationArguments, ClassificationDataArguments
from .trainer import _SetEpoch


logger = logging.getLogger(__name__)
ROLES = ("train", "validation", "test")


# ---------------------------------------------------------------------------------------------------------------- rows


class LabelledRows(NamedTuple):
    """Rows with an image and a label, by role (`validation` may lack), and what is true of them.

    `targets` are (n, F) of 1, 0 and -100, or (n,) class numbers under multi-class; `patients` are names, "" unknown.
    `left_out` are labels that training rows name, but with one value only.
    """

    rows: dict[str, datasets.Dataset]
    targets: dict[str, np.ndarray]
    patients: dict[str, list[str]]
    labels: list[str]
    left_out: list[str]

    @property
    def is_multi_class(self) -> bool:
        return self.targets["train"].ndim == 1


def read_labelled_rows(arguments: ClassificationArguments, data: ClassificationDataArguments) -> LabelledRows:
    """Read all rows, with every check that can be made before a model is loaded.

    Raises `ValueError` for a row, a patient or a picture in two roles, for labels that training rows do not state both
    ways, for a fraction and seed that draw nothing to learn from, and for validation rows on which no label can be
    scored.
    """
    found = {}
    for role, manifests, split, number, phantom_split in (
        ("train", data.train_manifest, data.train_split, data.num_phantoms, "train"),
        ("validation", data.validation_manifest, data.validation_split, data.num_validation_phantoms, "val"),
        ("test", data.test_manifest, data.test_split, data.num_test_phantoms, "test"),
    ):
        sources = tuple(data.fully_labelled)
        parts = [read_manifest(path, split, drop_unlabelled=True, fully_labelled=sources) for path in manifests]
        if number:
            parts.append(phantom_dataset(number, size=data.phantom_size, seed=data.phantom_seed, split=phantom_split))
        if parts:
            found[role] = concatenate_rows(parts)
    check_rows(*found.values())
    _check_apart(found)

    rows, targets = {}, {}
    labels, left_out = arguments.labels or None, []
    for role in (role for role in ROLES if role in found):
        try:
            rows[role], labels, _ = scored_rows(found[role], labels)
            if arguments.task == "multi-class":
                if role == "train" and not arguments.labels:
                    labels = sorted({label for row in rows[role]["present"] for label in row})
                targets[role] = class_targets(rows[role], labels)
            else:
                targets[role], _ = label_matrix(rows[role], labels, data.unlisted_is_absent, data.fully_labelled)
        except ValueError as error:
            raise ValueError(f"{role} rows: {error}") from error
        if role == "train":
            learnable = _learnable(targets[role], labels)
            left_out = [label for label in labels if label not in learnable]
            if left_out and (arguments.labels or not learnable or arguments.task == "multi-class"):
                raise ValueError(
                    f"No model can learn {', '.join(left_out)}: the {len(rows[role])} training rows do not state "
                    "each as present and as absent. Name other `labels`, add rows, "
                    "or say what an unlisted label means with `fully_labelled` or `unlisted_is_absent`."
                )
            if left_out:
                logger.warning(f"Left out, as training rows state them one way only: {', '.join(left_out)}.")
                targets[role] = targets[role][:, [label in learnable for label in labels]]
                labels = learnable
    patients = {role: patient_names(part) for role, part in rows.items()}
    for fraction in arguments.fractions:
        for seed in arguments.seeds:
            chosen = nested_subset(patients["train"], fraction, seed)
            if not _learnable(targets["train"][chosen], labels):
                raise ValueError(
                    f"Fraction {fraction:g}, seed {seed}: none of {', '.join(labels)} is both present and absent in "
                    f"the {len(chosen)} training rows that were drawn. Take a larger fraction or another seed."
                )
    if "validation" in rows and not arguments.method == "probe" and not _learnable(targets["validation"], labels):
        raise ValueError(
            f"No label can be scored on the {len(rows['validation'])} validation rows: each of {', '.join(labels)} "
            "needs an image with and one without. Add rows."
        )
    return LabelledRows(rows, targets, patients, labels, left_out)


def _check_apart(found: Mapping[str, datasets.Dataset]) -> None:
    """Raises ValueError for a patient or a picture in two roles, whatever their `split` is; "" is none.

    Warns of sets known to share pictures with those trained on.
    """
    for first, second in itertools.combinations(found, 2):
        for what, hint, names in (
            ("patients", "Split by patient, not by image.", patient_names),
            ("pictures", "Prepare both sets in one run, with --duplicates drop.", _pixel_hashes),
        ):
            seen, there = set(names(found[first])) - {""}, names(found[second])
            shared = [index for index, name in enumerate(there) if name in seen]
            if shared:
                raise ValueError(
                    f"{len({there[index] for index in shared})} {what} of the {second} rows are among the {first} rows "
                    f"too, the first in row {found[second][shared[0]]['row_id']!r}. {hint}"
                )
    for role in found.keys() - {"train"}:
        for sentence in known_overlaps(found["train"].unique("source"), found[role].unique("source")):
            logger.warning(sentence)


def _pixel_hashes(rows: datasets.Dataset) -> list[str]:
    """What preparation left; nothing for rows of a table."""
    return list(rows["pixel_hash"]) if "pixel_hash" in rows.column_names else []


def _learnable(targets: np.ndarray, labels: Sequence[str]) -> list[str]:
    """Labels that occur both present and absent; with classes, those that occur if there are two."""
    if targets.ndim == 1:
        there = [label for number, label in enumerate(labels) if (targets == number).any()]
        return there if len(there) > 1 else []
    return [label for label, column in zip(labels, targets.T, strict=True) if {0, 1} <= set(column.tolist())]


class ClassificationDataset(torch.utils.data.Dataset):
    """Rows as `pixel_values` (1, S, S) and `labels`, (F,) float32 of 1, 0 and -100, or a class number.

    With `augmented`, also `augmentation_draws`, drawn from (seed, epoch, row).
    """

    def __init__(self, rows: datasets.Dataset, targets: np.ndarray, processor, *, augmented: bool, seed: int = 0):
        self.images = ImageDataset(processor, rows.select_columns(["row_id", "image"]))
        self.targets = torch.from_numpy(np.asarray(targets))
        self.targets = self.targets.float() if self.targets.dim() == 2 else self.targets.long()
        self.augmented, self.seed = augmented, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared, so that live workers see it change

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {"pixel_values": self.images[index], "labels": self.targets[index]}
        if self.augmented:
            generator = sample_generator((self.seed, int(self._epoch), index), AUGMENTATION_STREAM)
            sample["augmentation_draws"] = torch.from_numpy(RadiographAugmentation.draw(generator))
        return sample


# --------------------------------------------------------------------------------------------------------------- model


def load_classifier(path: str, labels: Sequence[str], task: str) -> MMCLIPForImageClassification:
    """The vision tower of a checkpoint with a new classifier; raises `ValueError` where weights of the tower lack."""
    model, info = MMCLIPForImageClassification.from_pretrained(
        path,
        output_loading_info=True,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type="single_label_classification" if task == "multi-class" else "multi_label_classification",
        ignore_mismatched_sizes=True,  # the classifier of other labels; of the tower nothing may mismatch
    )
    mismatched = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
    wrong = sorted(name for name in {*info["missing_keys"], *mismatched} if not name.startswith("classifier."))
    if wrong:
        raise ValueError(
            f"{path}: the checkpoint lacks {len(wrong)} weights of the vision tower, or has them in another size, the "
            f"first is {wrong[0]}. Is it a whole MMCLIP checkpoint?"
        )
    nn.init.zeros_(model.classifier.bias)
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    return model


def load_processor(path: str) -> MMCLIPProcessor:
    """The processor beside the model; raises `ValueError` where there is none."""
    check_checkpoint(path, "`model_name_or_path`")
    return MMCLIPProcessor.from_pretrained(path)


def tower_blocks(vision_model: nn.Module) -> list[str]:
    """Names of the blocks of a vision tower, from the image on: of a ViT or Swin its layers, else its stages.

    They are the entries of the largest list of modules; where these are stages with `blocks`, as in Swin, the blocks.
    """

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    lists = [(name, module) for name, module in vision_model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"{type(vision_model).__name__} has no list of blocks, so it has no layer-wise learning rates."
        )
    name, stages = max(lists, key=lambda pair: size(pair[1]))  # of equal ones the outer, which comes first
    blocks = []
    for number, stage in enumerate(stages):
        inner = getattr(stage, "blocks", None)
        if isinstance(inner, nn.ModuleList):
            blocks += [f"{name}.{number}.blocks.{position}" for position in range(len(inner))]
        else:
            blocks.append(f"{name}.{number}")
    return blocks


def layer_numbers(model: MMCLIPForImageClassification) -> dict[str, int]:
    """Parameter -> 0 for the stem, 1 to N for the blocks, N + 1 for the last norm and the classifier (BEiT, MAE).

    What lies between the blocks of a stage and the next stage, as Swin's downsampling, goes with the last block.
    """
    blocks = [f"vision_model.{name}." for name in tower_blocks(model.vision_model)]
    stages = {block.partition(".blocks.")[0] + ".": number for number, block in enumerate(blocks, 1)}
    numbers, seen = {}, False
    for name, _ in model.named_parameters():
        number = next((n for n, block in enumerate(blocks, 1) if name.startswith(block)), None)
        if number is None:
            number = next((n for stage, n in stages.items() if name.startswith(stage)), None)
        seen = seen or number is not None
        numbers[name] = number if number is not None else (len(blocks) + 1) * seen
    return numbers


def lora_targets(model: MMCLIPForImageClassification, wanted: Sequence[str] = ()) -> list[str]:
    """Full names of the layers that get an adapter.

    `wanted` are ends of names, as `q_proj` or `layers.0.mlp.fc1`. Left out: queries and values (Hu et al. 2021); in a
    tower without attention the linear layers of the blocks, and in one without these the convolutions. Raises
    `ValueError` for an end that matches nothing.
    """
    kinds = (nn.Linear, nn.Conv2d)
    layers = {f"vision_model.{n}": m for n, m in model.vision_model.named_modules() if isinstance(m, kinds)}
    if wanted:
        for end in wanted:
            if not any(name.endswith(f".{end}") for name in layers):
                ends = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit()})
                raise ValueError(
                    f"`lora_target_modules`: no linear layer or convolution of the vision tower ends in {end!r}; the "
                    f"last parts of their names are {', '.join(ends)}."
                )
        return [name for name in layers if name.endswith(tuple(f".{end}" for end in wanted))]
    blocks = tuple(f"vision_model.{name}." for name in tower_blocks(model.vision_model))
    inside = {name: layer for name, layer in layers.items() if name.startswith(blocks)}
    attention = [n for n in inside if n.rpartition(".")[2] in ("q_proj", "v_proj", "query", "value", "qkv")]
    linear = [name for name, layer in inside.items() if isinstance(layer, nn.Linear)]
    return attention or linear or list(inside)


def add_adapters(model: MMCLIPForImageClassification, arguments: ClassificationArguments):
    """The model with LoRA adapters by peft: these and the classifier are trained, nothing else."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("The method lora needs the package peft: pip install 'peft>=0.19'.") from error
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=lora_targets(model, arguments.lora_target_modules),
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, config)


# ------------------------------------------------------------------------------------------------------------- Trainer


class ClassificationTrainer(Trainer):
    """Trains [`MMCLIPForImageClassification`], or that with adapters, on a [`ClassificationDataset`].

    Args beyond the Trainer's:
        labels: Names of the classes; validation gives `macro_auroc`, and with classes `accuracy`.
        augmentation: Applied where the batch is, in training alone.
        layer_decay: The learning rate of a block is that of the one above times this; the classifier has
            `learning_rate`.
        frozen: "tower" (no dropout, no moving statistics), "statistics" (those of BatchNorm stay, as adapters do not
            hold them) or "".
    """

    def __init__(
        self,
        *args,
        labels: Sequence[str],
        augmentation: RadiographAugmentation | None = None,
        layer_decay: float = 1.0,
        frozen: str = "",
        **kwargs,
    ):
        kwargs.setdefault("data_collator", default_collate)
        kwargs.setdefault("compute_metrics", self._validation_metrics)
        super().__init__(*args, **kwargs)
        size = self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and self.train_dataset is not None and len(self.train_dataset) < size:
            raise ValueError(
                f"{len(self.train_dataset)} training rows make no batch of {size}, and `dataloader_drop_last` drops "
                "the rest. Lower `per_device_train_batch_size` or leave `dataloader_drop_last` out."
            )
        self.labels, self.augmentation, self.layer_decay, self.frozen = labels, augmentation, layer_decay, frozen
        self.add_callback(_SetEpoch(self.train_dataset))
        # convolutions run faster with the channels last, on CPUs and on tensor cores; the numbers stay the same
        self._classifier().vision_model.to(memory_format=torch.channels_last)

    def _classifier(self) -> MMCLIPForImageClassification:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        draws = inputs.pop("augmentation_draws", None)
        if model.training:
            if draws is not None and self.augmentation is not None:
                inputs["pixel_values"] = self.augmentation(inputs["pixel_values"], draws)
            for module in self._classifier().vision_model.modules() if self.frozen else ():
                if self.frozen == "tower" or isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _validation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        targets, margins = prediction.label_ids, check_finite(prediction.predictions)
        targets = targets.astype(np.int64)
        metrics = run_metrics(targets, margins, self.labels)
        keys = ("macro_auroc", "accuracy") if targets.ndim == 1 else ("macro_auroc",)
        return {key: metrics[key] for key in keys}

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices and kernels decay; biases, norms, single vectors, tokens and positions do not."""
        names = super().get_decay_parameter_names(model)
        shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
        return [name for name in names if shapes[name] > 1 and "token" not in name and "position" not in name]

    def create_optimizer(self, *args, **kwargs):
        super().create_optimizer(*args, **kwargs)
        if self.layer_decay != 1:
            numbers = layer_numbers(self._classifier())
            top = max(numbers.values())
            number_of = {id(parameter): numbers[name] for name, parameter in self._classifier().named_parameters()}
            groups = []
            for group in self.optimizer.param_groups:
                for number in range(top + 1):
                    chosen = [parameter for parameter in group["params"] if number_of[id(parameter)] == number]
                    rate = group["lr"] * self.layer_decay ** (top - number)
                    groups.append({**group, "params": chosen, "lr": rate})
            self.optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return self.optimizer


def check_finite(margins: np.ndarray) -> np.ndarray:
    """`margins` as float64; raises `ValueError` for NaN and infinity, which a diverged training leaves."""
    margins = np.asarray(margins, dtype=np.float64)
    if not np.isfinite(margins).all():
        raise ValueError("Logits hold NaN or infinity: training diverged. Lower `learning_rate`, or warm up longer.")
    return margins


def build_trainer(
    model: MMCLIPForImageClassification,
    processor: MMCLIPProcessor,
    labelled: LabelledRows,
    chosen: np.ndarray,
    arguments: ClassificationArguments,
    data: ClassificationDataArguments,
    training_arguments,
) -> ClassificationTrainer:
    """The Trainer of one run on the training rows `chosen`; the seed is that of `training_arguments`."""
    if arguments.method == "frozen":
        model.vision_model.requires_grad_(False)
    elif arguments.method == "lora":
        model = add_adapters(model, arguments)
    train = ClassificationDataset(
        labelled.rows["train"].select(chosen),
        labelled.targets["train"][chosen],
        processor,
        augmented=True,
        seed=training_arguments.seed,
    )
    validation = None
    if "validation" in labelled.rows:
        validation = ClassificationDataset(
            labelled.rows["validation"], labelled.targets["validation"], processor, augmented=False
        )
    patience = arguments.early_stopping_patience
    return ClassificationTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
        labels=labelled.labels,
        augmentation=build_augmentation(data, processor),
        layer_decay=arguments.layer_decay,
        frozen={"frozen": "tower", "lora": "statistics"}.get(arguments.method, ""),
    )

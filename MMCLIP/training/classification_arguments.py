"""What a fine-tuning run can be told; keys, YAML files and errors work as in arguments.py."""

import dataclasses
import logging
from dataclasses import dataclass, fields

from ..evaluation.linear_probe import check_fractions_and_seeds
from ..text.vocabulary import canonical_label
from .arguments import AugmentationArguments, MMCLIPTrainingArguments, _option, check_manifests, parse_config


logger = logging.getLogger(__name__)
METHODS = ("probe", "frozen", "full", "lora")
TASKS = ("multi-label", "multi-class")


@dataclass
class ClassificationArguments:
    """Which model is fitted how, and how often."""

    model_name_or_path: str | None = _option("An MMCLIP checkpoint, as run_pretrain.py saves it")
    method: str = _option(
        "probe: logistic regression on the frozen features; frozen: a linear layer trained with augmentation; full: "
        "all of the vision tower; lora: low-rank adapters in it (needs peft)",
        "full",
    )
    task: str = _option("multi-label, or multi-class: each image has exactly one of the labels", "multi-label")
    labels: list[str] = _option("Labels to learn; left out, all that training rows state both ways", [])
    fractions: list[float] = _option("Shares of the training patients, each a run; a smaller lies in a larger", [1.0])
    seeds: list[int] = _option("Each seed is a run: it draws the patients, the new weights and the batches", [0])
    l2: float | None = _option("probe: its L2 strength; left out, each label's best on the validation rows")
    layer_decay: float = _option(
        "full, lora: factor on the learning rate from each block of the tower to the one below; 1 for none", 1.0
    )
    early_stopping_patience: int | None = _option(
        "Stop after so many validations without a better macro AUROC; left out, never"
    )
    lora_rank: int = _option("lora: rank of the adapters", 8)
    lora_alpha: float = _option("lora: the adapters count times alpha / rank", 16.0)
    lora_dropout: float = _option("lora: dropout in front of the adapters", 0.0)
    lora_target_modules: list[str] = _option(
        "lora: ends of the names of the layers that get one; left out, queries and values, or the convolutions", []
    )
    num_bootstrap: int = _option("Draws of test patients for the 95 % intervals", 1000)
    cache_dir: str | None = _option("probe: folder that keeps embeddings for other evaluations of the same model")

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError("Give `model_name_or_path`, the checkpoint to fine-tune.")
        for name, value, allowed in (("method", self.method, METHODS), ("task", self.task, TASKS)):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, but is {value!r}.")
        self.labels = list(dict.fromkeys(canonical_label(label, "labels") for label in self.labels))
        if self.task == "multi-class" and len(self.labels) == 1:
            raise ValueError(f"multi-class needs two or more `labels`, but only {self.labels[0]!r} is given.")
        check_fractions_and_seeds(self.fractions, self.seeds)
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"`seeds` must not be negative, but are {self.seeds}.")
        ranges = (
            ("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]"),
            ("early_stopping_patience", self.early_stopping_patience is None or self.early_stopping_patience > 0, ">0"),
            ("l2", self.l2 is None or self.l2 > 0, "above 0"),
            ("lora_rank", self.lora_rank > 0, "above 0"),
            ("lora_alpha", self.lora_alpha > 0, "above 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            ("num_bootstrap", self.num_bootstrap >= 0, "0 or more"),
        )
        for name, holds, expected in ranges:
            if not holds:
                raise ValueError(f"`{name}` must be {expected}, but is {getattr(self, name)}.")
        of_methods = {
            "l2": ("probe",),
            "cache_dir": ("probe",),
            "layer_decay": ("full", "lora"),
            "early_stopping_patience": ("frozen", "full", "lora"),
            **{item.name: ("lora",) for item in fields(self) if item.name.startswith("lora_")},
        }
        for item in fields(self):
            methods = of_methods.get(item.name, METHODS)
            default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
            if self.method not in methods and getattr(self, item.name) != default:
                logger.warning(
                    f"`{item.name}` does nothing under the method {self.method}; it is for {', '.join(methods)}."
                )


@dataclass
class ClassificationDataArguments(AugmentationArguments):
    """Which images and labels, and how images are changed in training."""

    train_manifest: list[str] = _option(
        "Folders of prepare_data.py, or tables (CSV, TSV, Parquet, JSON lines), to train on", []
    )
    train_split: str = _option("Rows with this `split` are trained on", "train")
    validation_manifest: list[str] = _option("The same, for early stopping, L2 strength and thresholds", [])
    validation_split: str = _option("Rows with this `split` are validated on", "val")
    test_manifest: list[str] = _option("The same, for the numbers of the report", [])
    test_split: str = _option("Rows with this `split` are tested on", "test")
    fully_labelled: list[str] = _option("Sources in which a label that is not listed is absent", [])
    unlisted_is_absent: bool | None = _option(
        "Does a label that a labelled row does not name count as absent? Left out, where a row lists no absent label"
    )
    num_phantoms: int = _option("Made-up radiographs to train on", 0)
    num_validation_phantoms: int = _option("Made-up radiographs to validate on", 0)
    num_test_phantoms: int = _option("Made-up radiographs to test on", 0)
    phantom_size: int = _option("Their side in pixels", 128)
    phantom_seed: int = _option("Their seed", 0)

    def __post_init__(self):
        for role, manifest, number in (
            ("train", "train_manifest", "num_phantoms"),
            ("test", "test_manifest", "num_test_phantoms"),
        ):
            if not getattr(self, manifest) and not getattr(self, number):
                raise ValueError(f"Nothing to {role} on: give `{manifest}` or `{number}`.")
        check_manifests([*self.train_manifest, *self.validation_manifest, *self.test_manifest])

    @property
    def has_validation(self) -> bool:
        return bool(self.validation_manifest or self.num_validation_phantoms)


@dataclass
class ClassificationTrainingArguments(MMCLIPTrainingArguments):
    """transformers' TrainingArguments, validated and saved once an epoch if nothing else is said."""

    eval_strategy: str = _option("no, steps or epoch: when to validate", "epoch")
    save_strategy: str | None = _option("When to keep a checkpoint; left out, with each validation")
    save_total_limit: int | None = _option("How many to keep while training; none is kept after it", 1)
    load_best_model_at_end: bool | None = _option("End with the best of them; left out, where there is validation")
    metric_for_best_model: str | None = _option("macro_auroc, or another of the validation metrics", "macro_auroc")

    def __post_init__(self):
        validates = str(self.eval_strategy) not in ("no", "IntervalStrategy.NO")
        if self.save_strategy is None:
            self.save_strategy = self.eval_strategy
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = validates
        super().__post_init__()
        if self.text_learning_rate is not None:
            raise ValueError("`text_learning_rate` does nothing here: a classifier has no text tower.")
        if self.push_to_hub:
            raise ValueError(
                "`push_to_hub` does nothing here, where one command makes many models; publish the best of them with "
                "examples/push_to_hub.py and a --card of your own."
            )
        if self.resume_from_checkpoint:
            raise ValueError(
                "`resume_from_checkpoint` does nothing here: runs that have ended are kept, others begin anew."
            )
        default = next(item.default for item in fields(self) if item.name == "seed")
        if self.seed != default:
            raise ValueError(f"`seed` does nothing here; write `seeds: [{self.seed}]`.")


def parse_classification_config(
    arguments: list[str] | None = None,
) -> tuple[ClassificationArguments, ClassificationDataArguments, ClassificationTrainingArguments]:
    """`[FILE.yaml] [--key value ...]` -> the arguments of a run; the command line lies on top of the file.

    Raises `ValueError` for an unknown key, with the nearest known ones, for a value that its key cannot take, and for
    keys that contradict each other.
    """
    types = (ClassificationArguments, ClassificationDataArguments, ClassificationTrainingArguments)
    model, data, training = parse_config(types, arguments)
    if not data.has_validation and model.method != "probe":
        if model.early_stopping_patience is not None:
            raise ValueError(
                "`early_stopping_patience` needs validation rows: give `validation_manifest` or "
                "`num_validation_phantoms`, or leave it out."
            )
        if str(training.eval_strategy.value) != "no":
            raise ValueError(
                "There are no validation rows, on which the best checkpoint would be chosen. Give "
                "`validation_manifest` or `num_validation_phantoms`, or set `eval_strategy: no`, and the last is taken."
            )
    if model.early_stopping_patience is not None and model.method != "probe" and not training.load_best_model_at_end:
        raise ValueError("`early_stopping_patience` needs `eval_strategy` and `load_best_model_at_end`.")
    return model, data, training

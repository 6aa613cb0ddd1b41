"""What a run can be told: each key has one home, and a YAML file and the command line set the same keys."""

import difflib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..configuration_mmclip import MMCLIPConfig
from ..text.entities import parse_labels
from ..text.vocabulary import canonical_label


def _option(help_text: str, default=None):
    help_text = help_text.replace("%", "%%")  # argparse fills in what follows a single one
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


@dataclass
class ModelArguments:
    """What changes the weights or the forward. MMCLIPConfig explains the fields and has the value of those left out."""

    model_name_or_path: str | None = _option("An MMCLIP checkpoint to go on from; then leave out the fields below")
    vision_model_name_or_path: str | None = _option("A pretrained vision tower, by name or folder")
    text_model_name_or_path: str | None = _option(
        "A pretrained text tower with its tokenizer; package://NAME/FOLDER is a folder of an installed Python package"
    )
    vision_config: str | None = _option("Fields of a new vision tower, among them `model_type` (YAML map or JSON)")
    text_config: str | None = _option("Fields of a new text tower, among them `model_type` (YAML map or JSON)")
    vision_stem: str | None = _option("patch or convolution")
    projection_dim: int | None = _option("Size of the shared space")
    image_pooling: str | None = _option("mean, max, cls or pooler")
    text_pooling: str | None = _option("mean, max, cls or pooler")
    logit_scale_init_value: float | None = _option("Initial log of the inverse temperature")
    decoder_hidden_size: int | None = _option("Width of the AttMIM and EntMLM decoders")
    decoder_num_layers: int | None = _option("Their layers")
    decoder_num_heads: int | None = _option("Their attention heads")
    contrastive_loss: str | None = _option("softmax or sigmoid")
    contrastive_targets: str | None = _option("text, or labels for soft targets by likeness of labels")
    label_temperature: float | None = _option("Temperature of those targets")
    logit_bias_init_value: float | None = _option("Initial bias of the sigmoid loss")
    mim_masking: str | None = _option("attention or random")
    mim_attention: str | None = _option("similarity or cross_attention")
    mim_level: str | None = _option("feature or input")
    mim_target: str | None = _option("pixel or feature")
    mim_text: bool | None = _option("AttMIM sees the text")
    mim_mask_ratio: float | None = _option("Share of the patches that AttMIM hides")
    mim_attended_share: float | None = _option("Share of the hidden patches from the more attended half")
    mim_row_ratio: float | None = _option("Share of a batch's rows that AttMIM sees")
    mlm_row_ratio: float | None = _option("Share of a batch's rows that EntMLM sees")
    contrastive_weight: float | None = _option("Factor of the contrastive loss; 0 leaves the branch out")
    mim_weight: float | None = _option("Factor of the AttMIM loss; 0 leaves the branch out")
    mlm_weight: float | None = _option("Factor of the EntMLM loss; 0 leaves the branch out")
    prompt_weight: float | None = _option("Factor of the disease-kind prompt loss; 0 leaves the branch out")
    local_weight: float | None = _option("Factor of the same loss of single patches; 0 leaves the branch out")
    side_weight: float | None = _option("Factor of the loss of `prompt_sides`; 0 leaves the branch out")
    initializer_range: float | None = _option("Standard deviation of new weights")

    def __post_init__(self):
        self.vision_config = _parse_json(self.vision_config, "vision_config")
        self.text_config = _parse_json(self.text_config, "text_config")
        for part in ("vision", "text"):
            path = getattr(self, f"{part}_model_name_or_path")
            setattr(self, f"{part}_model_name_or_path", resolve_path(path))
            if path is not None and getattr(self, f"{part}_config") is not None:
                raise ValueError(f"Give `{part}_model_name_or_path` or `{part}_config`, not both.")
        if self.model_name_or_path is not None and (given := self.config_fields()):
            raise ValueError(
                f"`model_name_or_path` brings its own config, so {', '.join(given)} would do nothing. Leave them out."
            )

    def config_fields(self) -> dict:
        """The fields of MMCLIPConfig that were given."""
        names = {item.name for item in fields(MMCLIPConfig)}
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name in names}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class AugmentationArguments:
    """How images are changed in training."""

    max_rotation: float = _option("Augmentation: degrees, either way", 5.0)
    max_translation: float = _option("Augmentation: share of the side, either way", 0.03)
    max_scaling: float = _option("Augmentation: share of the size, either way", 0.05)
    max_contrast: float = _option("Augmentation: change of contrast and gamma, either way", 0.2)
    noise_std: float = _option("Augmentation: noise in grey levels of 255", 4.0)


@dataclass
class DataArguments(AugmentationArguments):
    """Which images and texts, and what the batch is made of."""

    train_manifest: list[str] = _option(
        "Folders of prepare_data.py, or tables (CSV, TSV, Parquet, JSON lines), to train on", []
    )
    train_split: str = _option("Rows with this `split` are trained on", "train")
    validation_manifest: list[str] = _option("The same, to choose the best checkpoint on", [])
    validation_split: str = _option("Rows with this `split` are validated on", "val")
    fully_labelled: list[str] = _option("Sources in which a label that is not listed is absent", [])
    drop_unlabelled: bool = _option("Leave out rows that have neither text nor label, with a warning", False)
    paired_only: bool = _option(
        "Train on rows with image and report alone: plain CLIP, with the other weights at 0", False
    )
    num_phantoms: int = _option("Made-up radiographs to train on", 0)
    num_unpaired_phantoms: int = _option("How many of them come with labels only, no report", 0)
    num_validation_phantoms: int = _option("Made-up radiographs to validate on", 0)
    phantom_size: int = _option("Their side in pixels", 128)
    phantom_seed: int = _option("Their seed", 0)
    shuffle_pairs: bool = _option("Give every image another row's text and labels, for the floor of a result", False)
    tokenizer_name_or_path: str | None = _option("Tokenizer, when it is neither the text tower's nor the one shipped")
    max_length: int | None = _option("Longest text in tokens; left out, what the text tower takes")
    recognizer: str = _option(
        "What finds the entities of reports: lexicon, spacy:PIPELINE or hf:MODEL (of token classification)", "lexicon"
    )
    recognizer_labels: str | None = _option("What the labels of that pipeline or model mean, as JSON")
    mlm_masking: str = _option("entity: EntMLM hides whole entities; random: whole words", "entity")
    mlm_ratio: float = _option("Share of a text's entities that EntMLM hides, at least one", 0.5)
    mlm_kinds: list[str] = _option("Kinds of entities that it hides (finding, anatomy, ...); left out, every kind", [])
    mlm_cue_ratio: float = _option(
        "Share of the hidden absent and uncertain entities whose `no` or `may represent` is hidden with them, so that "
        "the image must say; 0, as the numbers in RESULTS.md were measured without it",
        0.0,
    )
    prompt_labels: list[str] = _option("Findings of the prompt loss; `all`: those that are stated both ways", [])
    prompt_sides: bool = _option(
        "Beside the prompt loss one that holds `left X` against `right X`, for those of `prompt_labels` whose side a "
        "report, a mask or a box tells",
        False,
    )
    validation_labels: list[str] = _option("Labels of the zero-shot validation; left out, all that can be scored", [])

    def __post_init__(self):
        if not self.train_manifest and not self.num_phantoms:
            raise ValueError("Nothing to train on: give `train_manifest` or `num_phantoms`.")
        parse_labels(self.recognizer_labels)
        self.tokenizer_name_or_path = resolve_path(self.tokenizer_name_or_path)
        self.validation_labels = [canonical_label(label, "validation_labels") for label in self.validation_labels]
        check_manifests([*self.train_manifest, *self.validation_manifest])


@dataclass
class MMCLIPTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments and what MMCLIP adds."""

    text_learning_rate: float | None = _option("Learning rate of the text tower; left out, `learning_rate`")
    grad_cache_rows: int | None = _option(
        "Rows that pass the towers at a time, while the losses see the whole batch (GradCache): a second forward buys "
        "the gradient of a batch that does not fit into memory"
    )
    group_by_text_length: bool = _option("Batches of texts of like length, which saves padding", False)
    logging_nan_inf_filter: bool = _option("A loss that is not finite stops the run and is never hidden", False)
    remove_unused_columns: bool = _option("The Trainer's own default would drop the image", False)
    hub_card: str | None = _option(
        "With push_to_hub: YAML file with what no run knows and the model card needs, at least `license`; see "
        "examples/push_to_hub.py"
    )
    report_to: str | None = _option("Where curves go; left out, tensorboard when it is installed, else none")

    def __post_init__(self):
        if self.report_to is None:
            self.report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"`hub_strategy: {self.hub_strategy.value}` would put optimizer states and pickles into a repository "
                "that others load from; take every_save or end. Checkpoints to go on from stay in `output_dir`."
            )
        if self.grad_cache_rows is not None and self.grad_cache_rows < 1:
            raise ValueError(f"`grad_cache_rows` is {self.grad_cache_rows}, expected at least 1.")
        if self.grad_cache_rows is not None and self.fp16:
            raise ValueError("`grad_cache_rows` knows no fp16 loss scaling; use --bf16 true.")
        if getattr(self, "train_sampling_strategy", "random") != "random":
            raise ValueError(
                f"`train_sampling_strategy: {self.train_sampling_strategy}` has no effect here: rows are drawn at "
                "random, or with --group_by_text_length true by length."
            )
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns: true` would drop the image from every sample; leave it out.")


def check_manifests(paths: list[str]) -> None:
    for path in paths:
        if not Path(path).exists():
            raise ValueError(f"There is no manifest file {path}, nor a folder of that name.")


def resolve_path(path: str | None) -> str | None:
    """`package://NAME/FOLDER` -> that folder of an installed Python package; anything else unchanged."""
    if path is None or not path.startswith("package://"):
        return path
    package, _, folder = path.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ValueError(f"{path}: the Python package {package} is not installed; pip install {name}.")
    found = Path(spec.submodule_search_locations[0]) / folder
    if not found.is_dir():
        raise ValueError(f"{path}: the package {package} has no folder {folder!r}.")
    return str(found)


def _parse_json(value, name: str) -> dict | None:
    if value is None or isinstance(value, dict):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be a map, in YAML or as JSON, but is {value!r}: {error}.") from error
    if parsed is not None and not isinstance(parsed, dict):  # null takes back what a YAML file gives
        raise ValueError(f"`{name}` must be a map, but is {value!r}.")
    return parsed


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}. `--help` lists all keys.")  # not ten screens of usage and an exit


class _YamlLoader(yaml.SafeLoader):
    """YAML as people write it: `1e-4` is a number, in nested maps too, and `eval_strategy: no` is the word no."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not (tag.endswith(":bool") and first in "yYnNoO")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _yaml_arguments(path: Path, known: set[str]) -> list[str]:
    """A YAML file as command-line arguments, so that both go the same way."""
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_YamlLoader) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, but holds a {type(content).__name__}.")
    arguments = []
    for key, value in content.items():
        _check_key(key, known, str(path))
        if value is None or value == []:
            continue  # the default; argparse wants at least one value
        arguments.append(f"--{key}")
        if isinstance(value, list):
            arguments += [str(item) for item in value]
        else:
            arguments.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return arguments


def _check_key(key: str, known: set[str], where: str):
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{where}: unknown key `{key}`.{hint} `--help` lists all keys.")


def parse_run_config(
    arguments: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, MMCLIPTrainingArguments]:
    """`[FILE.yaml] [--key value ...]` -> the arguments of a run; the command line lies on top of the file.

    Raises `ValueError` for an unknown key, with the nearest known ones, and for a value that its key cannot take.
    """
    return parse_config((ModelArguments, DataArguments, MMCLIPTrainingArguments), arguments)


def parse_config(types: tuple[type, ...], arguments: list[str] | None = None) -> tuple:
    """As [`parse_run_config`], for any dataclasses: one of each, in their order."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(types)
    known = {item.name for kind in types for item in fields(kind) if item.init}
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments.pop(0))
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise ValueError(f"The first argument must be a YAML file that exists, or a --key, but is {path}.")
        arguments = _yaml_arguments(path, known) + arguments
    for argument in arguments:
        if argument.startswith("--") and argument != "--help":
            key = argument[2:].partition("=")[0].replace("-", "_")
            _check_key(key, known | {f"no_{name}" for name in known}, "command line")
    return parser.parse_args_into_dataclasses(arguments)

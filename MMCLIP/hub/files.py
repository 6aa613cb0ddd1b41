"""Which files of a saved folder go to the Hub, cleaned of the folders of this machine, and whether they work there."""

import fnmatch
import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from .. import MMCLIPForImageClassification, MMCLIPForPreTraining, MMCLIPModel
from ..evaluation.embeddings import model_fingerprint
from ..inference.loading import load_model
from .paths import local_paths, public_name, without_folders


CARD = "README.md"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
SETTINGS = ("config.json", "processor_config.json", "preprocessor_config.json", "calibration.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt",
)  # fmt: skip
CLASSES = {each.__name__: each for each in (MMCLIPModel, MMCLIPForPreTraining, MMCLIPForImageClassification)}
# what is read by a machine that has no MMCLIP; all else in the folder, such as optimizer.pt, stays where it is
PUBLISHED = (*WEIGHTS, *SETTINGS, *TOKENIZER)
_NAMES_OF_MODELS = ("_name_or_path", "name_or_path", "base_model_name_or_path")


def is_published(name: str) -> bool:
    """Whether a file of this name at the top of a folder goes to the Hub; code goes by what the configs name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PUBLISHED)


def collect_files(model_dir: str | os.PathLike) -> tuple[dict[str, Path | bytes], list[str]]:
    """(name in the repository -> file or content, names that stay here), of a folder of `save_pretrained`.

    JSON is cleaned: a model that was given by a folder of this machine is not named. Raises `ValueError` where the
    folder is no MMCLIP with processor, weights and code, and where a path is left that nobody cleaned.
    """
    folder = Path(model_dir)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for part in ("model", "processor", "tokenizer"):
        name = "config.json" if part == "model" else f"{part}_config.json"
        if name not in names:
            raise ValueError(
                f"{folder} has no {name}, so it holds no {part}. Give the folder of a saved model and its processor, "
                "X/checkpoint."
            )
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "mmclip":
        raise ValueError(f"{folder}/config.json is of the model type {model_type!r}, expected 'mmclip'.")
    code = _code(folder)
    chosen = [name for name in names if is_published(name) or name in code]
    if not any(name.endswith(".safetensors") for name in chosen):
        raise ValueError(f"{folder} has no weights: expected model.safetensors, or its shards and their index.")
    files = {name: cleaned(folder / name) for name in chosen}
    return files, [name for name in names if name not in files and name != CARD]


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error


def _code(folder: Path) -> set[str]:
    """The modules that the configs name, and those that these import; each must be there."""
    named = set()

    def collect(value) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                collect(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                collect(inner)
        elif isinstance(value, str):
            named.add(f"{value.split('--')[-1].split('.')[0]}.py")

    def search(value) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(inner) if key == "auto_map" else search(inner)

    for name in SETTINGS + TOKENIZER[:2]:
        if name.endswith("config.json") and (folder / name).is_file():
            search(read_json(folder / name))
    to_read = sorted(named)
    while to_read:
        path = folder / to_read.pop()
        imported = {f"{module}.py" for module in get_relative_imports(path)} if path.is_file() else set()
        to_read += imported - named
        named |= imported
    if lacking := sorted(name for name in named if not (folder / name).is_file()):
        raise ValueError(
            f"{folder} lacks the code {', '.join(lacking)}, which its configs name. Save model and processor again by "
            "`save_pretrained` of the installed MMCLIP, which copies it."
        )
    return named


def cleaned(path: Path) -> Path | bytes:
    """`path`, or the content of a JSON file without the folders of this machine; raises `ValueError` for one left."""
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json", "model.safetensors.index.json"):
        return path
    content = read_json(path)
    cleaned = _without_local_models(content)
    if isinstance(cleaned.get("data"), str):  # of a calibration
        cleaned["data"] = without_folders(cleaned["data"])
    if left := local_paths(json.dumps(cleaned)):
        raise ValueError(f"{path} names {left[0]}, a folder of this machine. Take it out; it helps nobody else.")
    return path if cleaned == content else (json.dumps(cleaned, indent=2) + "\n").encode()


def _without_local_models(value):
    if isinstance(value, list):
        return [_without_local_models(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_local_models(inner)
        for key, inner in value.items()
        if not (key in _NAMES_OF_MODELS and inner and (public_name(inner) != inner or Path(inner).is_absolute()))
    }


# ------------------------------------------------------------------------------------------------------------- weights


def check_weights(model_dir: str | os.PathLike):
    """The config of a saved folder, after every weight was read.

    Raises `ValueError` naming weights that are missing, that no part of the model asked for, that have another size,
    and that hold NaN or infinity.
    """
    folder = Path(model_dir)
    architecture = (read_json(folder / "config.json").get("architectures") or ["MMCLIPModel"])[0]
    if architecture not in CLASSES:
        raise ValueError(f"{folder}/config.json names the class {architecture}; known are {', '.join(CLASSES)}.")
    model_class = CLASSES[architecture]
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
        stored = {name for path in folder.glob("model*.safetensors") for name in _names(path)}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error}). Save the model again.") from error
    own = model.state_dict()
    mismatched = {name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]}
    # what transformers was told to pass over in silence is extra too
    ignored = [re.compile(pattern) for pattern in model_class._keys_to_ignore_on_load_unexpected or ()]
    extra = {name for name in stored - own.keys() if any(pattern.search(name) for pattern in ignored)}
    extra |= set(info["unexpected_keys"])
    not_finite = {name for name, value in own.items() if value.is_floating_point() and not value.isfinite().all()}
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{', ...' * (len(names) > 5)}"
        for what, names in (
            ("are missing", set(info["missing_keys"])),
            ("belong to no part of it", extra),
            ("have another size than its config says", mismatched),
            ("hold NaN or infinity", not_finite - set(info["missing_keys"]) - mismatched),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{folder}: of the weights of {architecture}, {'; '.join(problems)}. Such a checkpoint is not "
            "published; save the model again from the run that made it."
        )
    return model.config


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def saved_fingerprint(model_dir: str | os.PathLike) -> str:
    """`model_fingerprint` without code, as evaluations have it; no code of the folder is run."""
    return model_fingerprint(*load_model(model_dir, device="cpu"), with_code=False)

"""What holds for the repository as a whole: its package, its shipped files, and the promise on the authors' page."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.dynamic_module_utils import get_imports

from MMCLIP import MMCLIPConfig, MMCLIPModel, MMCLIPProcessor


ROOT = Path(__file__).resolve().parent.parent
ROOT_MODULES = sorted(ROOT.glob("*_mmclip.py"))
SHIPPED = [*ROOT_MODULES, *sorted((ROOT / "MMCLIP").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def constant(path: Path, name: str):
    """The value that `name` is set to at the top of a file which must not be run."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path.name} sets no {name}")


# ------------------------------------------------------------------------------------------------------- shipped files


def test_the_default_text_tower_holds_the_shipped_tokenizer():
    config, processor = MMCLIPConfig(), MMCLIPProcessor()
    processor.check_tokenizer(config)  # vocabulary, padding, mask token, positions
    unused = config.text_config.vocab_size - len(processor.tokenizer)
    assert 0 <= unused < 1024, f"{unused} rows of the word embeddings stand for no word"
    assert config.vision_config.image_size == 224
    assert tuple(processor(images=np.zeros((9, 5), np.uint8))["pixel_values"].shape) == (1, 1, 224, 224)


def test_setup_lists_every_root_module_and_its_data():
    assert [f"{name}.py" for name in sorted(constant(ROOT / "setup.py", "ROOT_MODULES"))] == [
        path.name for path in ROOT_MODULES
    ]
    assert sorted(constant(ROOT / "setup.py", "ROOT_DATA")) == sorted(
        path.name for path in ROOT.glob("tokenizer*.json")
    )


def test_setup_and_the_package_have_the_same_version():
    version = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")).group(1)
    assert constant(ROOT / "MMCLIP" / "__init__.py", "__version__") == version


def test_every_folder_of_the_package_is_a_package():
    folders = {path.parent for path in (ROOT / "MMCLIP").rglob("*.py")}
    assert not [folder.name for folder in folders if not (folder / "__init__.py").is_file()]


@pytest.mark.slow
def test_a_wheel_holds_all_that_the_package_reads_and_works_away_from_the_checkout(tmp_path):
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "outputs", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tmp_path / "checkout")], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert {f"MMCLIP/{path.name}" for path in ROOT_MODULES} <= names
    assert {"MMCLIP/tokenizer.json", "MMCLIP/tokenizer_config.json"} <= names
    assert {"MMCLIP/text/vocabulary.yaml", "MMCLIP/text/words.txt", "MMCLIP/demo/style.css"} <= names
    assert "MMCLIP/hub/data_terms.yaml" in names
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "MMCLIP").rglob("*.py")}
    assert code <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"MMCLIP", next(top for top in tops if top.endswith(".dist-info"))}, "tests or examples slipped in"

    program = """
import sys
import MMCLIP, MMCLIP.training.trainer, MMCLIP.training.building, MMCLIP.evaluation.zero_shot, MMCLIP.modeling_mmclip
from MMCLIP.text.vocabulary import canonical_label
assert MMCLIP.__file__.startswith(sys.argv[1]) and MMCLIP.modeling_mmclip.__file__.startswith(sys.argv[1])
assert canonical_label("Effusion") == "pleural effusion"
print(MMCLIP.MMCLIPProcessor()(text="No pneumothorax.")["input_ids"].shape[1])
"""
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", program, str(installed)]
    done = subprocess.run(run, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(MMCLIPProcessor().tokenizer("No pneumothorax.")["input_ids"])


# ------------------------------------------------------------------------------------------------ what must not be here


def called_names(tree: ast.Module) -> list[str]:
    """`torch.save` and `model.cuda` of `torch.save(...)` and `model.cuda()`; the last two names of a longer chain."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            first = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            names.append(f"{first}.{node.func.attr}")
    return names


def imported_names(tree: ast.Module) -> set[str]:
    """Every module that is imported anywhere in a file, also inside functions; relative ones with their dots."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_shipped_file_pins_a_device_or_pickles_anything(path):
    tree = parsed(path)
    called = called_names(tree)
    assert not [name for name in called if name.endswith(".cuda")], "move with .to(device)"
    assert not {"torch.save", "torch.load"} & set(called), "weights are safetensors"
    assert not {"pickle", "cPickle", "dill", "joblib"} & {name.split(".")[0] for name in imported_names(tree)}
    text = path.read_text(encoding="utf-8")
    assert "pytorch_model.bin" not in text and "safe_serialization" not in text


@pytest.mark.parametrize("path", ROOT_MODULES, ids=lambda path: path.name)
def test_a_root_module_imports_what_the_hub_can_give_it_and_nothing_else(path):
    imported = imported_names(parsed(path))
    assert "__future__" not in imported, "auto_docstring and strict configs read the annotations"
    relative = {name for name in imported if name.startswith(".")}
    assert relative <= {f".{module.stem}" for module in ROOT_MODULES}
    outside = {name.split(".")[0] for name in imported - relative} - set(sys.stdlib_module_names)
    assert outside <= {
        "torch",
        "transformers",
        "numpy",
        "PIL",
        "huggingface_hub",
        "torchvision",
        "pydicom",
        "imagecodecs",
    }
    # transformers refuses a repository that needs what is not installed, unless the import stands in a `try`
    assert set(get_imports(path)) <= {"torch", "transformers", "numpy", "PIL", "huggingface_hub"} | set(
        sys.stdlib_module_names
    )


def test_no_weights_and_no_images_lie_in_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    suffixes = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".safetensors", ".dcm", ".npy", ".npz")
    assert not [name for name in tracked.stdout.splitlines() if name.lower().endswith(suffixes)]


# -------------------------------------------------------------------------------------------- what the authors promised


@pytest.mark.slow
def test_the_model_without_arguments_encodes_an_image_and_a_text_as_the_authors_promised(tmp_path):
    torch.manual_seed(0)
    model = MMCLIPModel()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50), dtype=np.uint8)
    path = tmp_path / "xray.png"
    Image.fromarray(pixels).save(path)
    model.train()
    model.text_model.eval()  # as a frozen tower would be
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()

    image_features, text_features = model.encode(str(path), "There is a left pleural effusion.")
    assert image_features.shape == text_features.shape == (1, 512)
    torch.testing.assert_close(image_features.norm(dim=-1), torch.ones(1))
    torch.testing.assert_close(text_features.norm(dim=-1), torch.ones(1))
    for image in (path, Image.fromarray(pixels), pixels, [str(path)]):
        torch.testing.assert_close(model.encode(image, None)[0], image_features)
    images, texts = model.encode([path, pixels], ["No pneumothorax.", "There is a left pleural effusion."])
    assert images.shape == texts.shape == (2, 512)
    torch.testing.assert_close(images, image_features.expand(2, -1))
    torch.testing.assert_close(texts[1:], text_features)
    assert not torch.allclose(texts[0], texts[1])

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not image_features.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state), "no dropout was drawn"

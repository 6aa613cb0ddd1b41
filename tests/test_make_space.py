"""A Space made by `examples/make_space.py` is complete: it starts from its own folder, without this checkout."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import save_tiny


ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "examples" / "space"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_space", ROOT / "examples" / "make_space.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def front_matter(page: Path) -> dict:
    return yaml.safe_load(page.read_text(encoding="utf-8").split("---\n")[1])


def listed_in_setup() -> tuple[list[str], dict[str, list[str]]]:
    """What setup.py requires, and the lists that it keeps by name."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = (node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    required = next(word.value for word in call.keywords if word.arg == "install_requires")
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("DICOM", "DEMO")
    }
    return ast.literal_eval(required), lists


def test_the_space_requires_what_setup_requires_and_dicom():
    required, lists = listed_in_setup()
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line[0] not in "#-"] == [*required, *lists["DICOM"]]


def test_the_front_matter_is_that_of_a_gradio_space_of_a_version_that_setup_allows():
    from packaging.requirements import Requirement

    card = front_matter(SPACE / "README.md")
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["license"] == "mit"
    (demo,) = map(Requirement, listed_in_setup()[1]["DEMO"])
    assert demo.specifier.contains(card["sdk_version"])
    assert len(card["short_description"]) <= 60  # the Hub's limit
    minor = re.search(r'python_requires=">=3\.(\d+)"', (ROOT / "setup.py").read_text()).group(1)
    assert int(card["python_version"].split(".")[1]) >= int(minor)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("run") / "checkpoint")
    (folder / "training_args.bin").write_bytes(b"private")
    (folder / "optimizer.pt").write_bytes(b"large")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "/home/anna/bert"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_folder_holds_the_app_the_package_and_the_weights_and_nothing_of_the_run(script, checkpoint, tmp_path):
    (tmp_path / "fit.json").write_text('{"data": "split val of /data/hospital/films.csv"}')
    (tmp_path / "mine.csv").write_text("text\nNo effusion.\n")
    options = ["--calibration", tmp_path / "fit.json", "--reports", tmp_path / "mine.csv"]
    script.main(["--model", str(checkpoint), "--output_dir", str(tmp_path / "space"), *map(str, options)])
    there = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*")}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "MMCLIP").rglob("*.py")}
    assert package | {"MMCLIP/demo/style.css", "modeling_mmclip.py", "tokenizer.json"} <= there
    assert {"README.md", "requirements.txt", "app.py", "LICENSE", "calibration.json", "reports.csv"} <= there
    weights = {name for name in there if name.startswith("checkpoint/")}
    names = ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
    assert weights == {f"checkpoint/{name}" for name in names}
    assert not [name for name in there if "__pycache__" in name]
    assert "anna" not in (tmp_path / "space" / "checkpoint" / "config.json").read_text()
    assert "split val of films.csv" in (tmp_path / "space" / "calibration.json").read_text()


def test_a_model_of_the_hub_is_named_and_not_copied(script, tmp_path, capsys):
    script.main(["--model", "OWNER/mmclip", "--output_dir", str(tmp_path / "space")])
    assert front_matter(tmp_path / "space" / "README.md")["models"] == ["OWNER/mmclip"]
    assert not (tmp_path / "space" / "checkpoint").exists()
    assert "set the variable MMCLIP_MODEL of the Space to OWNER/mmclip" in capsys.readouterr().out


def test_what_is_wrong_is_said_before_anything_is_written(script, checkpoint, tmp_path):
    def refused(message, *options):
        with pytest.raises(ValueError, match=message):
            script.main(["--model", str(checkpoint), "--output_dir", str(tmp_path / "space"), *map(str, options)])
        assert not (tmp_path / "space").exists()

    refused("no config.json", "--model", tmp_path)
    refused("--calibration: there is no file", "--calibration", tmp_path / "none.json")
    (tmp_path / "a.parquet").touch()
    refused("takes a .csv, got a.parquet", "--reports", tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="is not empty"):
        script.main(["--model", str(checkpoint), "--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_the_space_starts_from_its_own_folder_and_with_its_own_package(script, checkpoint, tmp_path):
    (tmp_path / "mine.csv").write_text("text\nNo effusion.\n")
    space = tmp_path / "space"
    script.main(["--model", str(checkpoint), "--output_dir", str(space), "--reports", str(tmp_path / "mine.csv")])
    program = """
import json
import app  # what is left out lies beside it
args = app.parse_arguments([])
reader = app.make_reader(args)
import MMCLIP
print(json.dumps([MMCLIP.__file__, args.model, reader.reports, reader.suggestions()]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(space)}
    environment.pop("MMCLIP_MODEL", None)
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, cwd=space, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    package, model, reports, findings = json.loads(done.stdout.splitlines()[-1])
    assert package.startswith(str(space)) and model == str(space / "checkpoint")
    assert reports == ["No effusion."] and "pleural effusion" in findings

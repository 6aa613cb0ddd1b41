import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tiny
from PIL import Image

from MMCLIP.text.prompts import negative_prompts, positive_prompts


SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "show_heatmaps.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("show_heatmaps", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def images(tmp_path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a" / "film.png", tmp_path / "b" / "film.jpg"]
    for path, shape in zip(paths, [(40, 60), (50, 30)], strict=True):
        path.parent.mkdir()
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return paths


def run(script, checkpoint, images, folder, *more):
    script.main([*map(str, ("--model", checkpoint, "--output_dir", folder, "--images", *images, *more))])


def test_each_film_and_finding_gets_a_picture_and_a_map_of_its_size(script, checkpoint, images, tmp_path, capsys):
    run(script, checkpoint, images, tmp_path / "out", "--finding", "effusion", "--finding", "mass")
    names = ["000_film_effusion", "000_film_mass", "001_film_effusion", "001_film_mass"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        name + ending for name in names for ending in (".png", ".npy")
    )
    for name, size in zip(names, [(40, 60)] * 2 + [(50, 30)] * 2, strict=True):
        heatmap = np.load(tmp_path / "out" / f"{name}.npy")
        assert heatmap.shape == size and heatmap.dtype == np.float32
        assert Image.open(tmp_path / "out" / f"{name}.png").size == size[::-1]
    row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"001_film_mass.png: highest at x {column}, y {row}")


def test_a_finding_is_the_sentence_against_its_denial(script, checkpoint, images, tmp_path, capsys):
    sentence = "--text", positive_prompts("mass")[0]
    run(script, checkpoint, images[:1], tmp_path / "finding", "--finding", "mass")
    run(script, checkpoint, images[:1], tmp_path / "text", *sentence, "--against", negative_prompts("mass")[0])
    assert "without --against" not in capsys.readouterr().out
    run(script, checkpoint, images[:1], tmp_path / "alone", *sentence)
    assert "without --against" in capsys.readouterr().out
    finding, text, alone = (np.load(next((tmp_path / n).glob("*.npy"))) for n in ("finding", "text", "alone"))
    np.testing.assert_array_equal(finding, text)
    assert np.abs(finding - alone).max() > 0


def test_sentences_that_begin_alike_do_not_overwrite_each_other(script, checkpoint, images, tmp_path):
    texts = [f"{'very ' * 20}{word}" for word in ("small", "large")]
    run(script, checkpoint, images[:1], tmp_path / "out", "--text", texts[0], "--text", texts[1])
    assert len(list((tmp_path / "out").glob("*.npy"))) == 2


def test_options_change_the_picture(script, checkpoint, images, tmp_path):
    options = {"none": (), "turbo": ("--colours", "turbo"), "faint": ("--opacity", 0.1), "bar": ("--colour_bar",)}
    for name, more in options.items():
        run(script, checkpoint, images[:1], tmp_path / name, "--finding", "mass", *more)
    assert len({next((tmp_path / name).glob("*.png")).read_bytes() for name in options}) == 4


def test_mistakes_are_errors_that_say_what_to_do(script, checkpoint, images, tmp_path, capsys):
    for message, arguments in (
        ("no config.json", (tmp_path, images, "--finding", "mass")),
        ("no file .*none.png; 1 of 2", (checkpoint, [images[0], tmp_path / "none.png"], "--finding", "mass")),
        ("'aches'", (checkpoint, images, "--finding", "aches")),
        ("one for each of 1 texts, got 2", (checkpoint, images, "--text", "a", "--against", "b", "--against", "c")),
        ("one is empty", (checkpoint, images, "--text", " ")),
        ("colour map", (checkpoint, images, "--finding", "mass", "--colours", "fire")),
    ):
        model, files, *more = arguments
        with pytest.raises(ValueError, match=message):
            run(script, model, files, tmp_path / "out", *more)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no processor_config.json"):
        run(script, tmp_path, images, tmp_path / "out", "--finding", "mass")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png"):
        run(script, checkpoint, [tmp_path / "text.png"], tmp_path / "out", "--finding", "mass")
    for more in ((), ("--finding", "mass", "--text", "a"), ("--finding", "mass", "--against", "a")):
        with pytest.raises(SystemExit):
            run(script, checkpoint, images, tmp_path / "out", *more)
    assert "--against is for --text" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mistake_ends_the_command_with_one_line(tmp_path):
    arguments = ["--model", tmp_path, "--images", "a.png", "--finding", "mass", "--output_dir", tmp_path]
    ended = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("ValueError: --model") and "Traceback" not in ended.stderr

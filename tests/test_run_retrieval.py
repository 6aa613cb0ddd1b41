import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tiny
from PIL import Image

from MMCLIP.evaluation import retrieval


SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "run_retrieval.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved model and processor, untrained."""
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch):
    spec = importlib.util.spec_from_file_location("run_retrieval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        module.main()

    return main


@pytest.fixture
def manifest(tmp_path):
    """Five rows of the test split, of which four have a report; two reports have the same words."""
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 32), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    reports = ["Lungs are clear.", "There is edema.", "Lungs are clear.", "", "There is a mass.", "There is a nodule."]
    lines = ["file,split,patient_id,source,labels,report"]
    for number, report in enumerate(reports):
        lines.append(f"{number}.png,{'train' if number == 5 else 'test'},p{number},a,Effusion,{report}")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def read(folder: Path) -> tuple[dict, list[dict]]:
    with (folder / "ranks.csv").open(encoding="utf-8", newline="") as file:
        return json.loads((folder / "metrics.json").read_text()), list(csv.DictReader(file))


def test_phantoms_are_searched_both_ways_and_the_files_tell_how(tmp_path, checkpoint, run, capsys):
    run("--model", checkpoint, "--phantoms", 12, "--phantom_size", 64, "--output_dir", tmp_path, "--num_bootstrap", 50)
    metrics, ranks = read(tmp_path)
    found = metrics["retrieval"]
    assert (found["num_images"], found["num_texts"], found["num_left_out"]) == (12, 12, 0)
    assert found["image_to_text"]["own_text_only"]["recall_at_10_chance"] == pytest.approx(10 / 12)
    assert metrics["command"].endswith("--num_bootstrap 50") and len(metrics["model_hash"]) == 20
    assert len(ranks) == 12 and all(1 <= float(line["image_to_text_own_text_only"]) <= 12 for line in ranks)
    report = (tmp_path / "report.md").read_text()
    table = capsys.readouterr().out.split("\n\n")[0]
    assert table in report and table.count("| chance |") == 4 and "equal similarities in random order" in report
    assert "Of the median rank less is better" in report and metrics["overlaps"] == [] and "caution" not in report


def test_a_split_of_a_manifest_is_searched_and_no_report_is_written_out(tmp_path, checkpoint, run, manifest, capsys):
    shared = ("--model", checkpoint, "--manifest", manifest, "--num_bootstrap", 20)
    run(*shared, "--split", "test", "--output_dir", tmp_path / "test", "--cache_dir", tmp_path / "cache")
    metrics, ranks = read(tmp_path / "test")
    caution = f"- caution, the model: {metrics['overlaps'][0]}"
    assert "`training_sources`" in caution and caution in (tmp_path / "test" / "report.md").read_text()
    assert caution in capsys.readouterr().out
    found = metrics["retrieval"]
    assert (found["num_images"], found["num_identical"], found["num_left_out"]) == (4, 2, 1)
    assert found["image_to_text"]["identical_texts_count"]["recall_at_1_chance"] == pytest.approx((2 + 2 + 1 + 1) / 16)
    assert found["image_to_text"]["own_text_only"]["recall_at_1_chance"] == 0.25
    written = "".join(path.read_text() for path in (tmp_path / "test").iterdir())
    assert "clear" not in written and "mass" not in written
    assert len({line["row_id"] for line in ranks}) == 4
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    run(*shared, "--output_dir", tmp_path / "all", "--cache_dir", tmp_path / "cache")
    assert read(tmp_path / "all")[0]["retrieval"]["num_images"] == 5


def test_backends_write_the_same_numbers(tmp_path, checkpoint, run, manifest):
    pytest.importorskip("faiss")
    shared = ("--model", checkpoint, "--manifest", manifest, "--num_bootstrap", 20)
    for backend in ("exact", "faiss"):
        run(*shared, "--backend", backend, "--output_dir", tmp_path / backend)
    (first, first_ranks), (second, second_ranks) = read(tmp_path / "exact"), read(tmp_path / "faiss")
    assert first["retrieval"] == second["retrieval"] and first_ranks == second_ranks


def test_mistakes_are_told_before_the_model_is_loaded(tmp_path, checkpoint, run, manifest, monkeypatch, capsys):
    out = ("--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="no config.json"):
        run("--model", tmp_path, "--phantoms", 4, *out)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no processor_config.json"):
        run("--model", tmp_path, "--phantoms", 4, *out)
    with pytest.raises(ValueError, match="split train: .*at least 2 rows.*1 of 1 have both"):
        run("--model", checkpoint, "--manifest", manifest, "--split", "train", *out)
    with pytest.raises(SystemExit):
        run("--model", checkpoint, "--phantoms", 4, "--split", "test", *out)
    assert "--split is for --manifest" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--model", checkpoint, "--phantoms", 4, "--backend", "fais", *out)
    assert "fais" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(retrieval, "EXACT_LIMIT", 3)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        run("--model", checkpoint, "--phantoms", 4, "--phantom_size", 64, *out)

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny
from PIL import Image

from MMCLIP.evaluation import figures, report
from MMCLIP.evaluation.metrics import classification_metrics
from MMCLIP.evaluation.zero_shot import ZeroShotPredictions


@pytest.fixture
def predictions():
    margins = np.array([[2.0, 0.0], [-1.0, 50.0], [0.5, -50.0]])
    return ZeroShotPredictions(["a", "b", "c"], ["edema", "mass"], np.array([[1, 1], [0, -100], [0, 1]]), margins)


@pytest.fixture
def results(predictions):
    zero_shot = classification_metrics(predictions.targets, predictions.margins, predictions.labels, num_bootstrap=50)
    zero_shot |= {"num_patients": 3, "num_without_label": 4, "num_without_image": 5, "num_unlisted_is_absent": 2}
    return {"zero_shot": zero_shot}


def make_run(folder: Path) -> Path:
    """A run's folder as the Trainer leaves it, with `checkpoint/` inside."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "train_results.json").write_text(
        json.dumps({"epoch": 2.0, "train_runtime": 12.5, "train_samples_per_second": 80.0, "train_loss": 1.5})
    )
    history = [
        {"step": 10, "loss": 2.0, "loss_mim": 0.9},
        {"step": 10, "eval_macro_auroc": 0.6},
        {"step": 20, "loss": 1.0},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder / "checkpoint"


def test_metrics_json_refuses_nan(tmp_path, results):
    report.write_metrics(tmp_path / "new", results)
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == results
    with pytest.raises(ValueError):
        report.write_metrics(tmp_path, {"zero_shot": {"macro_auroc": math.nan}})


def test_the_table_has_a_line_for_each_finding_and_the_mean(results):
    lines = report.zero_shot_table(results["zero_shot"]).splitlines()
    assert lines[0] == "| finding | AUROC (95 %) | average precision (95 %) | present | absent |"
    assert lines[2].startswith("| edema | 1.000 (1.000 to 1.000) | 1.000")
    assert lines[2].endswith("| 1 | 2 |")
    assert lines[3].startswith("| **mean of 1** | 1.000")


def test_the_markdown_tells_what_was_skipped_left_out_and_assumed(tmp_path, results):
    text = report.write_markdown(tmp_path, results, [tmp_path / "figures" / "roc.png"]).read_text()
    assert "Skipped, 1 labels: mass (no negative image)." in text
    assert "left out 4 rows without a label and 5 without an image" in text
    assert "In 2 images a label that is not named counts as absent" in text
    assert "no interval" not in text
    assert "(figures/roc.png)" in text and "Grounding" not in text and "Training" not in text


def test_the_markdown_says_why_a_mean_has_no_interval(tmp_path, results):
    results["zero_shot"] |= {"macro_auroc_ci": None, "num_bootstrap_macro": 3}
    text = report.write_markdown(tmp_path, results).read_text()
    assert "no interval" in text and "in only 3 of 50 draws" in text
    results["zero_shot"]["interval_reason"] = "all images are of one patient"
    text = report.write_markdown(tmp_path, results).read_text()
    assert "There are no intervals: all images are of one patient." in text and "in only" not in text


def test_the_roc_curve_is_straight_between_points_so_that_its_area_is_the_auroc(tmp_path, predictions, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    tied = predictions._replace(targets=np.array([[1, 1], [0, 1], [0, 1]]), margins=np.zeros((3, 2)))
    figures.plot_roc({"a": tied}, tmp_path)
    figures.plot_precision_recall({"a": tied}, tmp_path)
    roc, precision_recall = (figure.axes[0].lines[-1] for figure in drawn)
    assert roc.get_xydata().tolist() == [[0, 0], [1, 1]] and roc.get_drawstyle() == "default"
    assert precision_recall.get_drawstyle() == "steps-post"


def test_the_markdown_shows_sources_grounding_and_training_where_measured(tmp_path, results):
    per_class = {"edema": {"auroc": 0.25, "num_positive": 1, "num_negative": 2}}
    results["zero_shot"]["by_source"] = {
        "nih": {"macro_auroc": 0.25, "num_images": 2, "per_class": per_class},
        "other": {"macro_auroc": None, "num_images": 1, "per_class": {}},
    }
    found = {"heatmap_auroc": 0.7, "average_precision": 0.3, "pointing_game": 0.4, "num_pairs": 9}
    results["grounding"] = found | {
        "heatmap_auroc_ci": [0.6, 0.8],
        **{"heatmap_auroc_chance": 0.5, "average_precision_chance": 0.1, "pointing_game_chance": 0.05},
        "controls": {"other_finding": {**found, "heatmap_auroc": 0.55}},
        "per_finding": {"mass": found},
    }
    results["train"] = {"seconds": 12.5, "samples_per_second": 80.0}
    text = report.write_markdown(tmp_path, results).read_text()
    assert "| edema | 0.250 | n/a |" in text and "| **mean** | 0.250 | n/a |" in text
    assert "| **all** | 0.700 (0.600 to 0.800) | 0.300 | 0.400 | 9 |" in text
    assert "| all, mass | 0.700 | 0.300 | 0.400 | 9 |" in text and "| chance | 0.500 | 0.100 | 0.050 |  |" in text
    assert "| all, control: other finding | 0.550 | 0.300 |" in text
    assert "12 s, 80.0 samples a second." in text


def test_predictions_are_written_with_full_precision_and_unknown_targets_empty(tmp_path, predictions):
    with report.write_predictions(tmp_path, predictions).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row_id"] for row in rows] == ["a", "b", "c"]
    assert [row["target:mass"] for row in rows] == ["1", "", "1"]
    assert float(rows[0]["score:edema"]) == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-12)
    both = predictions._replace(margins=np.array([[50.0, 0.0], [51.0, 0.0], [0.1, 0.0]]), temperature=2.0)
    with report.write_predictions(tmp_path, both).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["margin:edema"]) for row in rows] == [50.0, 51.0, 0.1]  # whose scores are equal


def test_train_results_and_history_are_found_beside_the_checkpoint(tmp_path):
    checkpoint = make_run(tmp_path / "run")
    train, history = report.read_train_results(checkpoint)
    assert train == {"epoch": 2.0, "seconds": 12.5, "samples_per_second": 80.0, "loss": 1.5} and len(history) == 3
    named = report.read_train_results(tmp_path, tmp_path / "run" / "train_results.json")
    assert named == (train, history)


def test_a_model_without_a_run_has_no_training_results(tmp_path):
    (tmp_path / "alone" / "model").mkdir(parents=True)
    assert report.read_train_results(tmp_path / "alone" / "model") == (None, [])
    with pytest.raises(ValueError, match="no train_results file"):
        report.read_train_results(tmp_path, tmp_path / "nowhere.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json lacks train_runtime, train_samples_per_second"):
        report.read_train_results(tmp_path, tmp_path / "other.json")


def test_figures_are_pictures_and_missing_data_an_error(tmp_path, predictions):
    history = report.read_train_results(make_run(tmp_path / "run"))[1]
    for path in (
        figures.plot_roc({"a": predictions}, tmp_path / "new" / "roc.png"),
        figures.plot_loss_curves(history, tmp_path / "loss_curves.png"),
    ):
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors()) > 20  # not an empty page
    with pytest.raises(ValueError, match="no curve"):
        figures.plot_roc({"a": predictions._replace(targets=np.ones((3, 2)))}, tmp_path / "roc.png")
    with pytest.raises(ValueError, match="no loss"):
        figures.plot_loss_curves([{"step": 1, "eval_macro_auroc": 0.5}], tmp_path / "loss.png")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved model and processor inside a run's folder, untrained."""
    return save_tiny(make_run(tmp_path_factory.mktemp("run") / "outputs"))


@pytest.fixture
def run_zero_shot(monkeypatch):
    path = Path(__file__).parent.parent / "examples" / "run_zero_shot.py"
    spec = importlib.util.spec_from_file_location("run_zero_shot", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        module.main()

    return run


def test_the_script_evaluates_phantoms_with_grounding_and_training_numbers(tmp_path, checkpoint, run_zero_shot, capsys):
    run_zero_shot("--model", checkpoint, "--phantoms", 24, "--phantom_size", 64, "--output_dir", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 <= metrics["zero_shot"]["macro_auroc"] <= 1 and metrics["zero_shot"]["num_images"] == 24
    assert 0 <= metrics["grounding"]["heatmap_auroc"] <= 1 and metrics["grounding"]["num_pairs"] > 5
    assert (metrics["train"]["seconds"], metrics["train"]["samples_per_second"]) == (12.5, 80.0)
    assert metrics["command"].endswith(f"--output_dir {tmp_path}") and metrics["versions"]["torch"] == torch.__version__
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"roc.png", "heatmaps.png", "loss_curves.png"}
    assert "**mean of" in capsys.readouterr().out
    report_text = (tmp_path / "report.md").read_text()
    controls = metrics["grounding"]["controls"]
    assert all(f"{control.replace('_', ' ')}, " in report.GROUNDING_CONTROLS for control in controls)
    assert report.GROUNDING_CONTROLS in report_text


def test_the_script_evaluates_a_split_of_a_manifest(tmp_path, checkpoint, run_zero_shot, capsys):
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 32), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    lines = ["file,split,patient_id,source,labels"]
    lines += [f"{n}.png,test,p{n},a,{'Effusion' if n % 2 else 'no finding'}" for n in range(5)]
    (tmp_path / "rows.csv").write_text("\n".join([*lines, "5.png,train,p5,a,mass"]) + "\n")
    shared = ("--model", checkpoint, "--manifest", tmp_path / "rows.csv", "--num_bootstrap", 20)
    run_zero_shot(*shared, "--split", "test", "--output_dir", tmp_path / "all")
    metrics = json.loads((tmp_path / "all" / "metrics.json").read_text())
    assert "names no `training_sources`" in metrics["overlaps"][0]
    assert f"- caution, the model: {metrics['overlaps'][0]}" in (tmp_path / "all" / "report.md").read_text()
    assert "- caution, the model: its config names no" in capsys.readouterr().out
    assert list(metrics["zero_shot"]["per_class"]) == ["no finding", "pleural effusion"]
    assert metrics["zero_shot"]["num_images"] == 5 and "grounding" not in metrics
    run_zero_shot(*shared, "--labels", "effusion", "--fully_labelled", "a", "--output_dir", tmp_path / "one")
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert list(metrics["zero_shot"]["per_class"]) == ["pleural effusion"]
    assert metrics["zero_shot"]["num_images"] == 6 and metrics["zero_shot"]["num_unlisted_is_absent"] == 6
    assert metrics["zero_shot"]["fully_labelled"] == ["a"]
    one = ("--labels", "effusion", "--output_dir", tmp_path / "mine")
    (tmp_path / "mine.yaml").write_text("pooling: max_score\nlabels: {effusion: {positive: [Fluid., Wet.]}}\n")
    run_zero_shot(*shared, *one, "--prompts", tmp_path / "mine.yaml")
    prompts = json.loads((tmp_path / "mine" / "metrics.json").read_text())["zero_shot"]["prompts"]
    assert prompts == {"name": "mine", "source": str(tmp_path / "mine.yaml"), "pooling": "max_score"}
    assert "Prompts: `mine`" in (tmp_path / "mine" / "report.md").read_text()
    predictions = [(tmp_path / folder / "predictions.csv").read_text() for folder in ("one", "mine")]
    assert predictions[0] != predictions[1]
    with pytest.raises(ValueError, match="no prompts 'mien'; expected mmclip, sentence"):
        run_zero_shot(*shared, *one, "--prompts", "mien")
    with pytest.raises(ValueError, match="unknown label 'effussion'"):
        run_zero_shot(*shared, "--labels", "effussion", "--output_dir", tmp_path / "none")
    with pytest.raises(ValueError, match=r"No label can be scored on the 5 rows.* edema \(no positive image\)"):
        run_zero_shot(*shared, "--labels", "edema", "--split", "test", "--output_dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="no config.json"):
        run_zero_shot("--model", tmp_path, "--phantoms", 4, "--output_dir", tmp_path / "none")

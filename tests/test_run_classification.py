import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny
from PIL import Image
from transformers import AutoModelForImageClassification, AutoProcessor

from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.training.classification import load_classifier


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LABELS = ("cardiomegaly", "edema", "pleural effusion")
TRAINED = ("--num_train_epochs", 2, "--per_device_train_batch_size", 16, "--learning_rate", 0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch, checkpoint):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("run_classification", EXAMPLES / "run_classification.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(output_dir, *words, validation=20, labels=LABELS):
        words = [
            *("--model_name_or_path", checkpoint, "--output_dir", output_dir, "--num_phantoms", 40),
            *("--num_validation_phantoms", validation, "--num_test_phantoms", 30, "--phantom_size", 64),
            *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--num_bootstrap", 20),
            *(("--labels", *labels) if labels else ()),
            *words,
        ]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "run_classification.py"), *map(str, words)])
        module.main()
        return json.loads((Path(output_dir) / "metrics.json").read_text())

    return main


def predictions(folder: Path) -> np.ndarray:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return np.array([[float(row[f"logit:{label}"]) for label in LABELS] for row in csv.DictReader(file)])


def logits_of(folder: Path) -> np.ndarray:
    """Logits of the test phantoms from a saved folder, as somebody else would load it."""
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert model.config.id2label == dict(enumerate(LABELS))
    images = [row["image"] for row in phantom_dataset(30, size=64, split="test")]
    with torch.no_grad():
        return model(**processor.image_processor(images, return_tensors="pt")).logits.numpy()


def test_a_probe_at_two_fractions_and_seeds_is_fitted_summed_up_and_saved(run, tmp_path, capsys):
    metrics = run(tmp_path, "--method", "probe", "--fractions", 0.5, 1.0, "--seeds", 0, 1)
    found = metrics["classification"]
    assert list(found["fractions"]) == ["50 %", "100 %"] and found["labels"] == list(LABELS)
    half = found["fractions"]["50 %"]
    areas = [half["seeds"][seed]["metrics"]["macro_auroc"] for seed in ("0", "1")]
    assert half["macro_auroc"] == pytest.approx(np.mean(areas)) and half["num_patients"] == 20
    assert half["macro_auroc_sd"] == pytest.approx(np.std(areas, ddof=1)) and half["macro_auroc_ci"]
    assert len(metrics["model_hash"]) == len(metrics["data_hash"]) == 20 and "--fractions 0.5 1.0" in metrics["command"]
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == [f"fraction_{f}_seed_{s}" for f in ("0.5", "1") for s in (0, 1)]
    report = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out.split("\n\n")[0] in report and "best F1 on the validation rows" in report
    assert "| at 50 %, labels shuffled | " in report and "| source only | all images have the same source" in report
    shuffled = half["shuffled_labels"]
    assert shuffled["num_permutations"] == 20 and 0.3 < shuffled["macro_auroc"] < 0.7
    for name in names:
        logits = logits_of(tmp_path / name / "checkpoint")
        np.testing.assert_allclose(logits, predictions(tmp_path / name), rtol=1e-3, atol=1e-4)
    configured = json.loads((tmp_path / "run_config.json").read_text())
    assert configured["model"]["seeds"] == [0, 1]


def test_a_run_that_has_ended_is_kept_and_other_arguments_are_refused(run, tmp_path, capsys):
    first = run(tmp_path, "--method", "probe", "--fractions", 0.5)
    ended = tmp_path / "fraction_0.5_seed_0" / "metrics.json"
    written = ended.stat().st_mtime_ns
    second = run(tmp_path, "--method", "probe", "--fractions", 0.5, 1.0)
    assert ended.stat().st_mtime_ns == written
    assert second["classification"]["fractions"]["50 %"] == first["classification"]["fractions"]["50 %"]
    with pytest.raises(ValueError, match=r"fraction_0.5_seed_0 holds a run of other arguments: l2 was None and is 1.0"):
        run(tmp_path, "--method", "probe", "--fractions", 0.5, "--l2", 1.0)
    with pytest.raises(ValueError, match="data_hash was"):
        run(tmp_path, "--method", "probe", "--fractions", 0.5, labels=LABELS[:2])
    ended.unlink()  # as if it had been stopped
    run(tmp_path, "--method", "probe", "--fractions", 0.5)
    assert ended.is_file()


def test_without_validation_rows_there_are_no_thresholds_and_the_report_says_so(run, tmp_path):
    metrics = run(tmp_path, "--method", "probe", validation=0)
    found = metrics["classification"]["fractions"]["100 %"]
    assert "macro_f1" not in found and found["seeds"]["0"]["thresholds"] is None
    assert "There are no validation rows to choose thresholds on" in (tmp_path / "report.md").read_text()


def test_what_the_checkpoint_was_trained_on_is_held_against_the_test_rows(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = ["file,split,patient_id,source,labels,absent_labels"]
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        labels = "edema," if number % 2 else ",edema"
        lines.append(f"{number}.png,{'train' if number < 4 else 'test'},p{number},rsna,{labels}")
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    trained = save_tiny(tmp_path / "trained", training_sources=["chestxray14", "rsna"])
    data = ("--train_manifest", tmp_path / "rows.csv", "--test_manifest", tmp_path / "rows.csv")
    data += ("--num_phantoms", 0, "--num_test_phantoms", 0)
    words = (*data, "--method", "probe", "--model_name_or_path", trained)
    same, other = run(tmp_path / "out", *words, validation=0, labels=("edema",))["overlaps"]
    assert same.startswith("Training used rsna too") and "Images of rsna are in chestxray14" in other
    report, printed = (tmp_path / "out" / "report.md").read_text(), capsys.readouterr().out
    assert all(f"- caution, the model: {sentence}" in text for sentence in (same, other) for text in (report, printed))
    (unknown,) = run(tmp_path / "new", *data, "--method", "probe", validation=0, labels=("edema",))["overlaps"]
    assert "nothing tells" in unknown


def test_a_fixed_l2_strength_and_another_seed_change_the_probe(run, tmp_path):
    words = ("--method", "probe", "--fractions", 0.5)
    run(tmp_path / "a", *words)
    run(tmp_path / "b", *words, "--l2", 3.0)
    run(tmp_path / "c", *words, "--seeds", 1)
    base = predictions(tmp_path / "a" / "fraction_0.5_seed_0")
    assert not np.allclose(base, predictions(tmp_path / "b" / "fraction_0.5_seed_0"))
    assert not np.allclose(base, predictions(tmp_path / "c" / "fraction_0.5_seed_1"))


@pytest.mark.parametrize("method", ["frozen", "full", "lora"])
def test_a_trained_classifier_loads_with_auto_classes_and_gives_its_predictions(run, tmp_path, method):
    if method == "lora":
        pytest.importorskip("peft")
    metrics = run(tmp_path, *TRAINED, "--method", method, "--early_stopping_patience", 1)
    folder = tmp_path / "fraction_1_seed_0"
    np.testing.assert_allclose(logits_of(folder / "checkpoint"), predictions(folder), rtol=1e-3, atol=1e-4)
    record = metrics["classification"]["fractions"]["100 %"]["seeds"]["0"]
    assert record["num_steps"] == 6 and record["best_validation"] > 0 and record["thresholds"]
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob("**/training_args.bin"))
    assert (folder / "trainer_state.json").is_file() and (folder / "adapter").is_dir() == (method == "lora")
    run(tmp_path, *TRAINED, "--method", method, "--early_stopping_patience", 1)  # is kept
    with pytest.raises(ValueError, match="learning_rate was 0.01 and is 0.02"):
        run(tmp_path, *TRAINED, "--method", method, "--early_stopping_patience", 1, "--learning_rate", 0.02)


def test_adapters_are_kept_so_that_peft_loads_them_onto_the_checkpoint(run, tmp_path, checkpoint):
    peft = pytest.importorskip("peft")
    run(tmp_path, *TRAINED, "--method", "lora", "--eval_strategy", "no", validation=0)
    folder = tmp_path / "fraction_1_seed_0"
    model = load_classifier(str(checkpoint), LABELS, "multi-label")
    loaded = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    images = [row["image"] for row in phantom_dataset(30, size=64, split="test")]
    processor = AutoProcessor.from_pretrained(folder / "checkpoint", trust_remote_code=True)
    with torch.no_grad():
        logits = loaded(**processor.image_processor(images, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(logits, predictions(folder), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["probe", "full"])
def test_classes_are_learned_and_reported_by_accuracy(run, tmp_path, method, monkeypatch):
    from MMCLIP.training import classification

    drawn = classification.phantom_dataset

    def one_class_each(number, **options):
        rows = drawn(number, **options)
        labels = [["edema"] if index % 2 else ["pneumothorax"] for index in range(len(rows))]
        return rows.remove_columns("present").add_column("present", labels, feature=rows.features["present"])

    monkeypatch.setattr(classification, "phantom_dataset", one_class_each)
    monkeypatch.setattr(classification, "check_rows", lambda *rows: None)
    words = ("--task", "multi-class", "--method", method, *(TRAINED if method == "full" else ()))
    found = run(tmp_path, *words, labels=())["classification"]["fractions"]["100 %"]
    assert 0 <= found["accuracy"] <= 1 and found["accuracy_ci"] and "macro_auroc" not in found
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "fraction_1_seed_0" / "checkpoint", trust_remote_code=True
    )
    assert model.config.problem_type == "single_label_classification"
    assert model.config.id2label == {0: "edema", 1: "pneumothorax"}
    with (tmp_path / "fraction_1_seed_0" / "predictions.csv").open(newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} == {"edema", "pneumothorax"}


def test_mistakes_are_told_before_anything_is_fitted(run, tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        run(tmp_path / "out", "--method", "probe", "--model_name_or_path", tmp_path)
    with pytest.raises(ValueError, match="unknown key `fraction`.*fractions"):
        run(tmp_path / "out", "--fraction", 0.5)
    with pytest.raises(ValueError, match="unknown label"):
        run(tmp_path / "out", "--method", "probe", labels=("oedemaa",))
    with pytest.raises(ValueError, match="needs validation rows"):
        run(tmp_path / "out", "--early_stopping_patience", 1, validation=0)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_classifier_is_no_start_as_it_has_no_text_tower(run, tmp_path, checkpoint):
    load_classifier(str(checkpoint), LABELS, "multi-label").save_pretrained(tmp_path / "classifier")
    AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"classifier: \d+ weights are missing .*fine-tuned classifier"):
        run(tmp_path / "out", "--method", "probe", "--model_name_or_path", tmp_path / "classifier")

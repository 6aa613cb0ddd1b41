"""The file that turns margins into probabilities: how it is fitted, what it refuses, and that a command writes it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny

from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.evaluation.calibration import expected_calibration_error
from MMCLIP.evaluation.checkpoints import load_checkpoint
from MMCLIP.evaluation.embeddings import model_fingerprint
from MMCLIP.evaluation.probabilities import FindingCalibration, fit_calibration, load_calibration
from MMCLIP.evaluation.zero_shot import ZeroShotPredictions, evaluate_zero_shot
from MMCLIP.text.prompt_sets import load_prompt_set, prompt_set


LABELS = ["cardiomegaly", "pleural effusion"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint, "cpu")


@pytest.fixture(scope="module")
def rows():
    return phantom_dataset(40, size=32, split="val")


@pytest.fixture(scope="module")
def calibration(loaded, rows):
    return fit_calibration(*loaded, rows, LABELS, prompt_set("sentence"), data="phantoms", min_images=3)


def test_a_probability_is_the_sigmoid_of_the_line():
    finding = FindingCalibration(slope=2.0, intercept=-1.0, num_present=5, num_absent=5)
    assert finding.probability([0.5, 2.0]) == pytest.approx([0.5, 1 / (1 + np.exp(-3))])


def test_each_finding_is_fitted_to_its_own_images(loaded, rows, calibration):
    _, predictions = evaluate_zero_shot(*loaded, rows, LABELS, prompts="sentence", num_bootstrap=0)
    assert list(calibration.findings) == LABELS and calibration.left_out == {}
    for column, label in enumerate(LABELS):
        finding, targets = calibration.findings[label], predictions.targets[:, column]
        assert (finding.num_present, finding.num_absent) == ((targets == 1).sum(), (targets == 0).sum())
        # the fit makes the mean probability the mean of Platt's targets, whatever the margins
        present, absent = finding.num_present, finding.num_absent
        mean = (present * (present + 1) / (present + 2) + absent / (absent + 2)) / (present + absent)
        assert finding.probability(predictions.margins[:, column]).mean() == pytest.approx(mean, abs=1e-4)


def test_a_finding_of_too_few_images_is_left_out_and_named(loaded, rows):
    found = fit_calibration(*loaded, rows, [*LABELS, "scoliosis"], prompt_set("sentence"), data="", min_images=3)
    assert list(found.findings) == LABELS
    assert found.left_out == {"scoliosis": "0 images with and 0 without it, at least 3 of each are needed"}
    with pytest.raises(ValueError, match="No finding can be calibrated on the 40.*scoliosis: 0 images"):
        fit_calibration(*loaded, rows, ["scoliosis"], prompt_set("sentence"), data="")


def test_it_is_tested_on_images_of_known_label_only(calibration):
    margins = np.array([[1.0, 0.0], [-1.0, 0.0], [5.0, 0.0]])
    targets = np.array([[1, -100], [0, -100], [-100, -100]])
    tested = calibration.tested_on(ZeroShotPredictions(["a", "b", "c"], LABELS, targets, margins))
    first, second = (tested.findings[label] for label in LABELS)
    assert first.num_tested == 2 and first.share_present == 0.5 and second.ece is None
    expected = expected_calibration_error([1, 0], first.probability([1.0, -1.0]))
    assert first.ece == pytest.approx(expected) and tested.summary()["macro_ece"] == pytest.approx(expected)
    assert first.ece_as_it_is == pytest.approx(1 - 1 / (1 + np.exp(-1)))


def test_a_saved_file_comes_back_as_it_was(calibration, tmp_path):
    assert load_calibration(calibration.save(tmp_path)) == calibration


def test_it_holds_for_its_weights_and_prompts_only(loaded, calibration, tmp_path):
    model, processor = loaded
    calibration.check(model, processor, prompt_set("sentence"))
    with pytest.raises(ValueError, match="fitted with the prompts 'sentence', but those given, 'mmclip'"):
        calibration.check(model, processor, prompt_set("mmclip"))
    (tmp_path / "few.yaml").write_text("labels: {mass: {positive: [Mass.]}}\n")
    with pytest.raises(ValueError, match="'few', have other words"):
        calibration.check(model, processor, load_prompt_set(tmp_path / "few.yaml"))
    with torch.no_grad():
        model.logit_scale += 0.1
    try:
        with pytest.raises(ValueError, match="other weights"):
            calibration.check(model, processor, prompt_set("sentence"))
    finally:
        with torch.no_grad():
            model.logit_scale -= 0.1


def test_the_fingerprint_without_code_is_that_of_the_same_weights_under_other_code(loaded, monkeypatch):
    without, full = model_fingerprint(*loaded, with_code=False), model_fingerprint(*loaded)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"a later version")
    assert model_fingerprint(*loaded, with_code=False) == without and model_fingerprint(*loaded) != full


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("{", "JSONDecodeError"),
        ("[]", "expected a calibration"),
        ("{}", "findings"),
        (
            '{"findings": {"edema": {"slope": "1", "intercept": 0, "num_present": 1, "num_absent": 1}}}',
            "slope and intercept of 'edema' are no numbers",
        ),
    ],
)
def test_a_file_that_is_no_calibration_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"calibration.json.*{message}"):
        load_calibration(path)


@pytest.fixture
def script():
    path = Path(__file__).parent.parent / "examples" / "run_zero_shot.py"
    spec = importlib.util.spec_from_file_location("run_zero_shot", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_fits_on_one_stream_and_tests_on_the_other(script, checkpoint, tmp_path, capsys):
    phantoms = "--phantoms 30 --calibration_phantoms 100 --phantom_size 32 --num_bootstrap 0"
    script.main(["--model", str(checkpoint), *phantoms.split(), "--output_dir", str(tmp_path)])
    written = load_calibration(tmp_path / "calibration.json")
    assert written.findings and written.left_out and written.data == "phantoms of the validation stream"
    for finding in written.findings.values():
        assert finding.num_present + finding.num_absent == 100 and finding.num_tested == 30
    line = capsys.readouterr().out
    assert f"Calibrated on phantoms of the validation stream: {len(written.findings)} findings." in line
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["calibration"] == written.summary()
    assert "Calibrated on phantoms" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        "--phantoms 9 --calibration_split val",
        "--manifest a.csv --calibration_phantoms 9",
        "--manifest a.csv --split val --calibration_split val",
        "--manifest a.csv --calibration_split val",  # without --split all rows would be tested, those of val too
    ],
)
def test_a_fit_and_its_test_never_share_rows(script, options):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--model", "m", "--output_dir", "o", *options.split()])

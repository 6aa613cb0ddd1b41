import importlib.util
import json
from pathlib import Path

import pytest
from conftest import save_tiny, tiny_config
from MMCLIP.modeling_mmclip import MMCLIPModel
from PIL import Image

from MMCLIP.evaluation.checkpoints import load_checkpoint
from MMCLIP.training.classification import load_classifier


ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("run_evaluation", ROOT / "examples" / "run_evaluation.py")
run_evaluation = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_evaluation)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two untrained checkpoints, and a table of 24 films whose brightness tells an effusion."""
    home = tmp_path_factory.mktemp("home")
    for seed in (0, 1):
        save_tiny(home / f"model{seed}", seed)
    lines = ["file,text,labels,absent_labels,patient_id,view,split,source"]
    for number in range(24):
        split, sick = ("train", "val", "test")[number % 3], number % 2 == 0
        Image.new("L", (40, 40), 60 + 4 * number + 60 * sick).save(home / f"{number}.png")
        text, labels = ("Pleural effusion.", "pleural effusion,") if sick else ("No effusion.", ",pleural effusion")
        lines.append(f"{number}.png,{text} Film {number}.,{labels},p{number},PA,{split},h")
    (home / "manifest.csv").write_text("\n".join(lines) + "\n")
    return home


def evaluate(home, output, *more: str) -> dict:
    run_evaluation.main(
        ["--model", f"a={home / 'model0'}", "--model", f"b={home / 'model1'}", "--protocol",
         f"own={home / 'manifest.csv'}", "--output_dir", str(output), "--num_bootstrap", "50",
         "--fractions", "1.0", *more]
    )  # fmt: skip
    return json.loads((output / "metrics.json").read_text())


def test_one_command_compares_two_models_and_writes_all_files(home, tmp_path):
    results = evaluate(home, tmp_path)
    trial = results["trials"]["own"]
    assert results["models"]["a"]["hash"] != results["models"]["b"]["hash"]
    assert trial["data"]["num_scored"] == {"test": 8, "validation": 8, "train": 8}
    assert trial["data"]["prompts"]["texts"]["pleural effusion"]["positive"]
    for model in ("a", "b"):
        assert {"zero_shot", "linear_probe", "retrieval", "negation"} <= trial["models"][model].keys()
        assert "grounding" in trial["models"][model]["left_out"]
    # one wide-open difference between the probes: both see the brightness, which tells everything
    assert trial["models"]["a"]["linear_probe"]["fractions"]["100 %"]["macro_auroc"] > 0.5
    a, b = (trial["models"][m]["zero_shot"]["macro_auroc"] for m in ("a", "b"))
    assert trial["differences"]["a - b"]["zero_shot"]["macro_auroc"]["difference"] == pytest.approx(a - b)
    for name in ("zero_shot.csv", "retrieval.csv"):
        assert (tmp_path / "scores" / "own" / name).read_text().count("\n") > 8
    assert "Film" not in (tmp_path / "scores" / "own" / "retrieval.csv").read_text()
    assert trial["controls"]["view_only"]["reason"].startswith("all images have the same view")
    report = (tmp_path / "report.md").read_text()
    assert "| model | **macro AUROC** |" in report and "| a, probe at 100 %, labels shuffled | " in report
    for figure in ("roc", "precision_recall", "bars", "calibration"):
        assert f"figures/own/{figure}.png" in report and (tmp_path / "figures" / "own" / f"{figure}.png").is_file()


def test_a_cache_folder_gives_the_same_numbers_again(home, tmp_path):
    first = evaluate(home, tmp_path / "x", "--cache_dir", str(tmp_path / "cache"), "--evaluations", "zero_shot")
    again = evaluate(home, tmp_path / "y", "--cache_dir", str(tmp_path / "cache"), "--evaluations", "zero_shot")
    assert first["trials"]["own"]["models"] == again["trials"]["own"]["models"]
    assert len(list((tmp_path / "cache").glob("images-*.safetensors"))) >= 2


def test_an_evaluation_asked_for_by_name_must_be_possible(home, tmp_path):
    with pytest.raises(ValueError, match="grounding cannot be measured, as no row has a mask or a box"):
        evaluate(home, tmp_path, "--evaluations", "grounding")


def test_a_checkpoint_without_a_processor_is_an_error_that_says_so(home, tmp_path):
    MMCLIPModel(tiny_config()).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no processor"):
        run_evaluation.main(
            ["--model", str(tmp_path / "bare"), "--protocol", f"own={home / 'manifest.csv'}", "--output_dir", "o"]
        )


def test_a_classifier_without_a_text_tower_is_an_error_that_names_the_missing_weights(home, tmp_path):
    load_classifier(str(home / "model0"), ["edema"], "multi-label").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\d+ weights are missing or of another size, as logit_scale, text_.*classif"):
        load_checkpoint(tmp_path, "cpu")


def test_a_model_that_trained_on_images_of_the_protocol_is_told_in_the_report(home, tmp_path):
    model = save_tiny(tmp_path / "trained", training_sources=["chestxray14", "padchest"])
    table = (home / "manifest.csv").read_text().replace(",h\n", ",rsna\n").replace("pleural effusion", "pneumonia")
    (home / "rsna.csv").write_text(table)
    run_evaluation.main(
        ["--model", str(model), "--protocol", f"rsna={home / 'rsna.csv'}", "--output_dir", str(tmp_path / "out"),
         "--evaluations", "zero_shot", "--num_bootstrap", "0"]
    )  # fmt: skip
    told = "- caution, trained: Images of rsna are in chestxray14, which is trained on"
    report = (tmp_path / "out" / "report.md").read_text()
    assert told in report and "padchest" not in report and "prompts published for it" in report


def test_prompts_for_labels_that_are_not_scored_are_an_error_or_named_as_the_protocol_has_it(home, tmp_path):
    prompts = tmp_path / "mine.yaml"
    prompts.write_text("labels: {pleural effusion: {positive: [x]}, Pneumonia: {positive: [y]}}")
    with pytest.raises(ValueError, match="mine.yaml: there are texts for pneumonia, but no row states"):
        evaluate(home, tmp_path / "out", "--prompts", str(prompts))
    (tmp_path / "effusion.yaml").write_text("labels: [pleural effusion]\n")
    run_evaluation.main(
        ["--model", str(home / "model0"), "--protocol", f"{tmp_path / 'effusion.yaml'}={home / 'manifest.csv'}",
         "--prompts", str(prompts), "--output_dir", str(tmp_path / "out"), "--evaluations", "zero_shot"]
    )  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- prompts for labels that the protocol does not score: pneumonia" in report

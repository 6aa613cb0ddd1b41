import importlib.util
import json
import re
from pathlib import Path

import pytest
from conftest import save_tiny, tiny_config
from MMCLIP.modeling_mmclip import MMCLIPModel
from PIL import Image

from MMCLIP.evaluation.checkpoints import load_checkpoint
from MMCLIP.evaluation.comparison import describe_trial, load_trial
from MMCLIP.evaluation.protocols import protocol
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
    assert "the range of 95 % of 20 permutations" in report and "Thresholds come from the validation rows" in report
    assert report.count("| chance |") == 4 and "| b, image to text own text only |" in report
    assert "Of the median rank less is better: there a difference below 0 is in favour of the first" in report
    assert "- caution, a: its config names no `training_sources`" in report
    for figure in ("roc", "precision_recall", "bars", "calibration"):
        assert f"figures/own/{figure}.png" in report and (tmp_path / "figures" / "own" / f"{figure}.png").is_file()


def changed(home, name: str, change) -> Path:
    """A table whose lines (lists of cells) `change` has altered."""
    head, *lines = (home / "manifest.csv").read_text().splitlines()
    cells = [change(number, *line.split(",")) for number, line in enumerate(lines)]
    (home / name).write_text("\n".join([head, *(",".join(line) for line in cells)]) + "\n")
    return home / name


def evaluate_table(home, place: Path, output: Path, protocol: str = "own", *more: str) -> tuple[dict, str]:
    words = ("--model", f"a={home / 'model0'}", "--output_dir", str(output), "--num_bootstrap", "20", *more)
    run_evaluation.main([*words, "--protocol", f"{protocol}={place}"])
    trial = json.loads((output / "metrics.json").read_text())["trials"][Path(protocol).stem]
    return trial, (output / "report.md").read_text()


def test_labels_of_one_value_in_validation_or_training_are_told_as_such(home, tmp_path):
    def ill(number, file, text, present, absent, patient, view, split, source):
        if split != "test":
            present, absent = "pleural effusion", ""
        return file, text, present, absent, patient, view, split, source

    _, report = evaluate_table(home, changed(home, "ill.csv", ill), tmp_path)
    assert "F1 and accuracy are at the oracle threshold alone, as no label scored here has both values" in report
    assert "Thresholds come from" not in report
    for fraction in ("1 %", "10 %", "100 %"):
        told = f"At {fraction}, some seed drew no image with, or none without, so that nothing was learned: pleural"
        assert told in report


def test_without_validation_rows_and_with_one_patient_the_report_says_so(home, tmp_path):
    def alone(number, file, text, present, absent, patient, view, split, source):
        return file, text, present, absent, "p", view, "test", source

    _, report = evaluate_table(home, changed(home, "alone.csv", alone), tmp_path)
    assert "alone, as there are no validation rows." in report
    assert "There are no intervals: all images are of one patient." in report
    assert "| view only, learned from test, 5 folds of patients | all images have the same view" in report


def test_classes_of_several_sources_have_their_accuracy_within_each_and_no_word_of_thresholds(home, tmp_path):
    names = ("no finding", "pneumonia", "covid-19")

    def classes(number, file, text, present, absent, patient, view, split, source):
        view = "AP" if number % 2 else "PA"
        return file, text, names[number % 3], "", patient, view, "test", f"covidx-{number % 2}"

    trial, report = evaluate_table(home, changed(home, "classes.csv", classes), tmp_path, "covidx-3class")
    within = trial["models"]["a"]["zero_shot"]["by_source"]
    assert {values["num_images"] for values in within.values()} == {12} and set(within) == {"covidx-0", "covidx-1"}
    accuracies = [values["accuracy"] for values in within.values()]
    assert sum(accuracies) / 2 == pytest.approx(trial["models"]["a"]["zero_shot"]["accuracy"])
    assert f"Within covidx-0 (12 images): accuracy {accuracies[0]:.3f}." in report and "hreshold" not in report
    assert "| view only, learned from test | " in report


def test_rows_on_which_every_label_would_be_skipped_are_an_error_before_a_file_is_written(home, tmp_path):
    def all_ill(number, file, text, present, absent, patient, view, split, source):
        return file, text, "pleural effusion", "edema" * (number == 1), patient, view, split, "fully"

    place = changed(home, "all_ill.csv", all_ill)
    told = r"own, zero_shot on the test rows: No label .* pleural effusion \(no negative image\)"
    with pytest.raises(ValueError, match=told):
        evaluate_table(home, place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    evaluate_table(home, place, tmp_path / "out", "own", "--evaluations", "retrieval")


def test_the_report_says_what_its_numbers_rest_on(home, tmp_path):
    def rare(number, file, text, present, absent, patient, view, split, source):
        if number == 2:  # a test row without a label
            return file, text, "", "", patient, view, split, source
        if number == 8:
            present, absent = "mass", "edema"  # mass: one test image; edema: none
        return file, text, present, absent, patient, view, split, source

    trial, report = evaluate_table(home, changed(home, "rare.csv", rare), tmp_path)
    counts = trial["data"]["num_unlisted_is_absent"]
    assert counts["test"] == 2 and "counts as absent: 2 test" in report
    assert "without an image or a label: 1 test" in report
    assert "- labels skipped, 1: edema (no positive image)" in report
    used = trial["models"]["a"]["zero_shot"]["num_bootstrap_macro"]
    assert used < 20 and f"{used} of 20 draws, in which every label has" in report
    assert "Labels without a threshold, as validation rows lack one of their values: mass." in report


def test_differences_are_sorted_and_told_to_be_many_and_without_a_bootstrap_nothing_is_said_of_intervals(
    home, tmp_path
):
    results = evaluate(home, tmp_path, "--fractions", "1", "0.5", "0.25", "--evaluations", "linear_probe", "retrieval")
    names = list(results["trials"]["own"]["differences"]["a - b"])
    assert names == [f"linear_probe at {percent} %, seed 0" for percent in (25, 50, 100)] + ["retrieval"]
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"These are \d+ comparisons, and neither p nor intervals are corrected", report)
    evaluate(home, tmp_path, "--num_bootstrap", "0")
    report = (tmp_path / "report.md").read_text()
    assert "interval" not in report and "(95 %)" not in report and "| p |" not in report


def test_the_hash_of_the_data_covers_labels_and_patients(home):
    def other_patient(number, *cells):
        return (*cells[:4], f"q{number}", *cells[5:])

    def other_label(number, file, text, present, absent, *rest):
        return (file, text, absent, present, *rest)

    places = [home / "manifest.csv", changed(home, "same.csv", lambda number, *cells: cells)]
    places += [changed(home, "patient.csv", other_patient), changed(home, "label.csv", other_label)]
    trials = [load_trial(protocol("own"), str(place)) for place in places]
    assert len({tuple(trial.scored["test"]["row_id"]) for trial in trials}) == 1
    hashes = [describe_trial(trial)["data_hash"] for trial in trials]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_what_is_wrong_with_the_rows_of_a_role_is_told_with_protocol_and_role(home):
    def two_classes(number, file, text, present, absent, patient, view, split, source):
        both = "pneumonia;no finding" if split == "train" else "pneumonia"
        return file, text, both, "", patient, view, split, "covidx"

    with pytest.raises(ValueError, match="covidx-3class, train rows: Row .* exactly one of the classes"):
        load_trial(protocol("covidx-3class"), str(changed(home, "two.csv", two_classes)))


def test_a_cache_folder_gives_the_same_numbers_again(home, tmp_path):
    first = evaluate(home, tmp_path / "x", "--cache_dir", str(tmp_path / "cache"), "--evaluations", "zero_shot")
    again = evaluate(home, tmp_path / "y", "--cache_dir", str(tmp_path / "cache"), "--evaluations", "zero_shot")
    assert first["trials"]["own"]["models"] == again["trials"]["own"]["models"]
    assert len(list((tmp_path / "cache").glob("images-*.safetensors"))) >= 2


def test_an_evaluation_asked_for_by_name_must_be_possible(home, tmp_path):
    with pytest.raises(ValueError, match="grounding cannot be measured, as no row has a mask or a box"):
        evaluate(home, tmp_path, "--evaluations", "grounding")


@pytest.mark.parametrize("words", [("--fractions", "1.5"), ("--fractions", "0.1", "0.1"), ("--seeds", "1", "1")])
def test_fractions_and_seeds_that_cannot_be_drawn_are_an_error_at_once(words):
    with pytest.raises(ValueError, match=f"`{words[0][2:]}`"):
        run_evaluation.main(["--model", "missing", "--protocol", "phantom", "--output_dir", "o", *words])


def test_no_file_of_an_earlier_command_stays_beside_a_new_report(home, tmp_path):
    old = [tmp_path / part / key for part in ("scores", "figures") for key in ("own/x.csv", "own/x.png", "other/x.csv")]
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    evaluate(home, tmp_path, "--evaluations", "zero_shot")
    assert [path.is_file() for path in old] == [False, True, True, True, False, True]


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

"""The model card: what it says of a run, what it keeps to itself, and what it is refused for."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from conftest import tiny_config
from huggingface_hub import ModelCard

from MMCLIP.data.manifest import make_row, rows_to_dataset
from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.data.readers import SOURCES
from MMCLIP.evaluation.report import describe_rows
from MMCLIP.hub import model_card
from MMCLIP.hub.model_card import About, build_card, card_gaps, data_terms, read_about, restricted_sources
from MMCLIP.hub.paths import is_hub_id, local_paths, public_name, without_folders
from MMCLIP.hub.preparing import validation_of_run
from MMCLIP.hub.results import ZERO_SHOT as ZERO_SHOT_TASK
from MMCLIP.hub.results import Evaluation, read_results
from MMCLIP.hub.training_record import Run, count_rows, read_run, training_record, validation_of, write_record
from MMCLIP.training.arguments import DataArguments, MMCLIPTrainingArguments, ModelArguments


INTERVAL = [0.81234, 0.91234]
ZERO_SHOT = {
    "macro_auroc": 0.87654, "macro_auroc_ci": INTERVAL, "macro_average_precision": 0.5,
    "macro_average_precision_ci": None, "interval_reason": None, "num_bootstrap": 200,
    "per_class": {"edema": {
        "auroc": 0.75, "auroc_ci": [0.7, 0.8], "average_precision": 0.4, "average_precision_ci": None,
        "num_positive": 7, "num_negative": 9,
    }},
}  # fmt: skip
METRICS = {
    "zero_shot": ZERO_SHOT,
    "overlaps": ["Training used rsna too."],
    "command": "python /home/anna/mmclip/examples/run_zero_shot.py --model /home/anna/runs/a/checkpoint",
    "model": "/home/anna/runs/a/checkpoint",
    "data": "/data/hospital/films.csv, split test, 16 rows",
    "weights_hash": "abc",
    "dataset": {"sources": ["rsna"], "split": "test"},
}
RECORD = {
    "data": {
        "train": [{"source": "openi", "rows": 3000, "images": 2900, "reports": 2000, "patients": 1500}],
        "validation": [{"source": "openi", "rows": 10, "images": 10, "reports": 10, "patients": 10}],
    },
    "base_models": {"vision": "google/vit-base-patch16-224-in21k", "text": "local:my_bert"},
    "recipe": {"num_train_epochs": 3.0, "prompt_labels": ["edema", "fracture"]},
    "num_parameters": 1_500_000,
    "processes": 2,
    "machine": "cpu",
    "versions": {"torch": "2.13.0"},
}


def write_metrics(folder: Path, **changes) -> Path:
    path = folder / "metrics.json"
    path.write_text(json.dumps({**METRICS, **changes}))
    return path


@pytest.fixture
def evaluations(tmp_path):
    return read_results(write_metrics(tmp_path), tmp_path / "checkpoint", "abc")


def make_card(evaluations, record=RECORD, about=None, **fields) -> ModelCard:
    about = About(license="cc-by-nc-4.0") if about is None else about
    run = Run(record, seconds=1234.5, steps=500)
    return build_card("me/model", tiny_config(**fields), run, evaluations, about)


# --------------------------------------------------------------------------------------------------------- whole cards


def test_a_card_has_all_it_needs_and_survives_being_read_again(evaluations):
    card = make_card(evaluations)
    assert card_gaps(card) == []
    again = ModelCard(str(card))
    assert str(again) == str(card)
    data = again.data.to_dict()
    assert data["license"] == "cc-by-nc-4.0" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert data["base_model"] == ["google/vit-base-patch16-224-in21k"], "a folder is no base model"
    assert "datasets" not in data, "none of them is on the Hub"
    (index,) = data["model-index"]
    (result,) = index["results"]
    assert index["name"] == "model" and result["dataset"] == {
        "name": "films.csv, split test, 16 rows", "type": "rsna", "split": "test"
    }  # fmt: skip
    macro, precision, edema = result["metrics"]
    assert macro["type"] == "roc_auc" and macro["value"] == 0.8765
    assert macro["name"] == "macro AUROC (95 % interval 0.812 to 0.912)"
    assert macro["args"] == {
        "interval": [0.8123, 0.9123], "level": 0.95, "method": "bootstrap over patients", "draws": 200
    }  # fmt: skip
    assert precision["name"] == "macro average precision" and "args" not in precision
    assert edema["name"].startswith("AUROC, edema") and edema["value"] == 0.75


def test_the_text_tells_data_recipe_results_and_their_command(evaluations):
    text = make_card(evaluations).text
    assert (
        "[Open-i, the Indiana University collection](https://openi.nlm.nih.gov/) | 3,000 | 2,900 | 2,000 | 1,500 |"
        in (text)
    )
    assert "CC BY-NC-ND 4.0" in text and "Rows to validate on: 10 of openi." in text
    assert "| `num_train_epochs` | 3.0 |" in text and "| `prompt_labels` | edema, fracture |" in text
    assert "500 steps, 1,234 s, 2 processes on cpu, torch 2.13.0." in text and "1.5 M weights" in text
    assert "Pretrained text: `local:my_bert`." in text
    assert "| edema | 0.750 (0.700 to 0.800) | 0.400 | 7 | 9 |" in text
    assert "caution, the model: Training used rsna too." in text
    assert "Not for diagnosis" in text and "@article{mmclip2024" in text
    assert "run_zero_shot.py --model checkpoint" in text
    assert 'from_pretrained("me/model", trust_remote_code=True)' in text


def test_what_a_person_says_comes_on_top_of_what_the_run_says(evaluations, tmp_path):
    path = tmp_path / "about.yaml"
    path.write_text(
        "license: mit\nauthors: A. Nonymous\nintended_use: For films of adults.\nlimits: One scanner.\n"
        "citation: '@misc{me, title = {Mine}}'\nbase_model: a/b\n"
        "data:\n  openi: {terms: as agreed, hub_id: me/openi}\n"
    )
    card = make_card(evaluations, about=read_about(path, license="cc-by-4.0"))
    assert card.data.license == "cc-by-4.0" and card.data.datasets == ["me/openi"]
    assert card.data.base_model == ["a/b", "google/vit-base-patch16-224-in21k"]
    for text in ("A. Nonymous", "For films of adults.", "- One scanner.", "@misc{me", "| as agreed |", "Open-i"):
        assert text in card.text, text


def test_a_model_of_phantoms_alone_is_said_to_be_of_no_use_on_films(evaluations):
    phantoms = {"data": {"train": [{"source": "phantom", "rows": 5, "images": 5, "reports": 5, "patients": None}]}}
    assert model_card.ON_PHANTOMS in make_card(evaluations, phantoms).text
    assert model_card.ON_PHANTOMS not in make_card(evaluations, phantoms, training_sources=["openi"]).text


def test_sources_of_an_earlier_run_are_named_without_counts(evaluations):
    text = make_card(evaluations, training_sources=["chestxray14", "openi"]).text
    assert re.search(r"NIH ChestX-ray14\]\(\S+\) \|  \|  \|  \|  \|", text) and "in an earlier run" in text


# --------------------------------------------------------------------------------------------------------------- gaps


def test_everything_that_a_card_lacks_is_named_at_once():
    card = build_card("me/model", tiny_config(), Run(), [], About())
    gaps = card_gaps(card)
    assert [gap.split(":")[0] for gap in gaps] == ["licence", "training data", "results"]
    own = card_gaps(ModelCard("---\nlicense: other\n---\n# Mine\n\n## Intended use\n\n[More Information Needed]\n"))
    assert [gap.split(":")[0] for gap in own] == ["licence", "training data", "intended use", "results"]
    assert "license_name" in own[0]


def test_a_source_whose_terms_nobody_knows_is_named(evaluations):
    record = {"data": {"train": [{"source": "my_hospital", "rows": 1, "images": 1, "reports": 1, "patients": 1}]}}
    (gap,) = card_gaps(make_card(evaluations, record))
    assert gap.startswith("training data") and "my_hospital" in gap
    about = About(license="mit", data={"my_hospital": {"terms": "internal"}})
    assert card_gaps(make_card(evaluations, record, about)) == []


def test_a_validation_score_is_no_result_on_new_images_but_one_to_push_in_training():
    state = {"log_history": [{"eval_macro_auroc": 0.7, "step": 3}], "best_metric": 0.7}
    state["best_model_checkpoint"] = "run/checkpoint-3"
    card = make_card([validation_of_run(Run(RECORD, validation=validation_of(state, keeps_best=True)))])
    assert "chose the checkpoint" in card.text and card_gaps(card, results="validation") == []
    last = make_card([validation_of_run(Run(RECORD, validation=validation_of(state, keeps_best=False)))])
    assert "Macro AUROC 0.700 at step 3." in last.text and "chose the checkpoint" not in last.text
    (gap,) = card_gaps(card)
    assert gap.startswith("results")
    none = make_card([])
    assert card_gaps(none, results="none") == [] and card_gaps(none, results="validation")


@pytest.mark.parametrize(
    ("source", "split", "is_new"),
    [
        ("openi", "val", 0), ("openi", "validation", 0), ("openi", "Train", 0), ("openi", "dev", 0),
        ("openi", "test+train", 0), ("siim+openi", "val", 0), ("openi", "test", 1), ("openi", "all rows", 1),
        ("chexpert", "val", 1), ("chexpert", "test+train", 1), ("", "val", 1), ("chexpert", "validation", 0),
    ],
)  # fmt: skip
def test_only_results_on_rows_that_neither_trained_nor_chose_the_model_count(source, split, is_new):
    evaluation = Evaluation("films", source, split, "")
    evaluation.add(ZERO_SHOT_TASK, "roc_auc", "AUROC", 0.9)
    gaps = card_gaps(make_card([evaluation]), trained_on=["openi", "my hospital"])
    assert [gap.split(":")[0] for gap in gaps] == ["results"] * (1 - is_new)


def test_rows_are_described_by_their_sources_and_all_their_splits():
    places = [("openi", "val"), ("openi", "test"), ("chexpert", "test"), ("openi", "")]
    rows = [make_row(str(i), "a.png", source=source, split=split) for i, (source, split) in enumerate(places)]
    assert describe_rows(rows_to_dataset(rows)) == {"sources": ["chexpert", "openi"], "split": "test+val"}
    assert describe_rows(rows_to_dataset(rows[-1:]))["split"] is None


def test_a_folder_of_this_machine_in_a_card_is_a_gap(evaluations):
    card = make_card(evaluations, about=About(license="mit", summary="See https://a.org/b/c and a/b."))
    assert card_gaps(card) == []
    own = ModelCard(str(card) + "\nWeights came from /home/anna/runs/a.\n")
    assert card_gaps(own) == ["privacy: it names /home/anna/runs/a, a folder of this machine"]


def test_a_section_keeps_its_sub_sections_and_code_is_no_heading():
    parts = model_card.sections("# A\n## Training data\n### Set\ntext\n```bash\n# Intended use\n```\n## Next\n")
    assert "text" in parts["training data"] and "intended use" not in parts and parts["next"] == ""


# --------------------------------------------------------------------------------------------------- what it is made of


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("licence: mit", "unknown key 'licence'. Did you mean license"),
        ("data: {openi: {term: x}}", "data.openi: unknown key 'term'. Did you mean terms"),
        ("data: {openi: x}", "must be a map"),
        ("- mit", "holds a list"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_mistake_in_the_file_about_the_model_is_named(tmp_path, content, message):
    path = tmp_path / "about.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_about(path)


def test_terms_are_known_of_each_public_set_and_of_its_parts():
    for source in {*SOURCES, "phantom"} - {"folder"}:  # a folder is anybody's
        terms = data_terms(source, About())
        assert terms["title"] and terms["terms"] and (terms.get("url") or source == "phantom"), source
    assert data_terms("covidx-rsna", About())["title"] == "COVIDx CXR"
    assert restricted_sources(["mimic-cxr", "openi", "phantom", "padchest"], About()) == ["mimic-cxr", "padchest"]


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"weights_hash": "other"}, "abc", "was measured on weights other"),
        ({"weights_hash": None}, "abc", "/home/anna/runs/a/checkpoint, without a hash"),
        ({"zero_shot": None}, "abc", None),
    ],
)
def test_results_of_other_weights_are_refused(tmp_path, changes, weights, message):
    content = {key: value for key, value in {**METRICS, **changes}.items() if value is not None}
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message or "holds none of zero_shot, retrieval, trials"):
        read_results(path, tmp_path / "checkpoint", weights)


@pytest.mark.parametrize("content", [{"zero_shot": {}}, {"zero_shot": None}, {"retrieval": {}}, {"trials": {}}])
def test_results_in_another_form_are_refused_by_their_file(tmp_path, content):
    (tmp_path / "metrics.json").write_text(json.dumps({"weights_hash": "abc", **content}))
    with pytest.raises(ValueError, match="metrics.json is not as this version of the evaluation scripts writes it"):
        read_results(tmp_path, tmp_path / "checkpoint", "abc")


def test_a_comparison_gives_the_numbers_of_this_model_alone(tmp_path):
    def of(auroc):
        return {"overlaps": [], "zero_shot": {**ZERO_SHOT, "macro_auroc": auroc}}

    data = {"protocol": "rsna", "source": "the challenge", "num_scored": {"test": 16}, "num_patients": 15}
    trial = {"data": {**data, "cautions": ["Beware."]}, "models": {"a": of(0.6), "b": of(0.7)}, "controls": {}}
    models = {name: {"path": name, "weights_hash": f"hash {name}"} for name in "ab"}
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"models": models, "trials": {"rsna": trial}, "command": "python x.py"}))
    (found,) = read_results(tmp_path, "anywhere", "hash b")
    assert found.measured[0].metric_value == 0.7 and found.dataset == "rsna" and "- caution: Beware." in found.lines
    with pytest.raises(ValueError, match="compares a, b, none of which has the weights hash c"):
        read_results(path, "anywhere", "hash c")


def test_a_record_counts_rows_by_source_and_names_no_folder_row_or_patient(tmp_path):
    rows = rows_to_dataset(
        [
            make_row("secret-1", "/data/hospital/a.png", report="Clear.", patient_id="patient-7", source="openi"),
            make_row("secret-2", "/data/hospital/b.png", present=["edema"], patient_id="patient-7", source="openi"),
            make_row("secret-3", image=None, report="Clear.", source="other"),
        ]
    )
    assert count_rows(rows) == [
        {"source": "openi", "rows": 2, "images": 2, "reports": 1, "patients": 1},
        {"source": "other", "rows": 1, "images": 0, "reports": 1, "patients": None},
    ]
    (tmp_path / "my_bert").mkdir()
    arguments = (
        ModelArguments(text_model_name_or_path=str(tmp_path / "my_bert"), vision_model_name_or_path="google/vit"),
        DataArguments(num_phantoms=1, recognizer=f"spacy:{tmp_path / 'my_bert'}", max_rotation=0.0),
        MMCLIPTrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=0.25, report_to="none"),
    )
    record = training_record(arguments, rows, None, 5)
    path = write_record(tmp_path, record)
    written = path.read_text()
    assert not local_paths(written) and "secret" not in written and "patient-7" not in written
    assert record["base_models"] == {"vision": "google/vit", "text": "local:my_bert"}
    assert record["recipe"]["learning_rate"] == 0.25 and record["recipe"]["recognizer"] == "spacy:local:my_bert"
    assert record["recipe"]["max_rotation"] == 0.0, "a 0 that was chosen is part of the recipe"
    assert "max_steps" not in record["recipe"] and record["machine"] == "cpu"
    assert read_run(tmp_path).record == record


def test_the_validation_of_a_run_is_that_of_the_checkpoint_it_leaves(tmp_path):
    history = [{"eval_macro_auroc": 0.9, "step": 1}, {"loss": 1.0, "step": 2}, {"eval_macro_auroc": 0.8, "step": 3}]
    state = {"log_history": history, "best_metric": 0.9, "best_model_checkpoint": "r/checkpoint-1", "global_step": 3}
    assert validation_of(state, keeps_best=True)["step"] == 1 and validation_of(state, keeps_best=False)["step"] == 3
    by_another = validation_of({**state, "best_metric": 0.4}, keeps_best=True)  # metric_for_best_model: auroc_edema
    assert (by_another["step"], by_another["value"], by_another["chose"]) == (1, 0.9, False)
    never_saved = validation_of({**state, "best_model_checkpoint": None}, keeps_best=True)
    assert (never_saved["step"], never_saved["chose"]) == (3, False), "the Trainer then stays with the last weights"
    assert validation_of({"log_history": []}, keeps_best=True) is None
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "train_results.json").write_text('{"train_runtime": 7.5}')
    (tmp_path / "training_record.json").write_text('{"keeps_best": true}')
    run = read_run(tmp_path)
    assert (run.seconds, run.steps, run.validation["value"]) == (7.5, 3, 0.9)
    (tmp_path / "training_record.json").write_text("{")
    with pytest.raises(ValueError, match="training_record.json is no JSON"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("from /data/x/films.csv, here", ["/data/x/films.csv"]),
        (r"C:\Users\anna\films.csv", [r"C:\Users\anna\films.csv"]),
        (r'"C:\\Users\\anna"', [r"C:\\Users\\anna"]),
        ("~/films/a.csv file:///srv/a", ["~/films/a.csv", "file:///srv/a"]),
        ("--model=/srv/runs/a", ["/srv/runs/a"]),
        ("--manifest '/home/anna lee/films.csv' -x", ["/home/anna lee/films.csv"]),
        ("spacy:/home/anna/ner", ["/home/anna/ner"]),
        ("https://a.org/b/c http://x/y outputs/demo/a ../shared/a and/or 1/2 </p>", []),
    ],
)
def test_absolute_paths_are_found_and_urls_and_relative_ones_are_not(text, paths):
    assert local_paths(text) == paths
    assert local_paths(without_folders(text)) == []


def test_a_model_is_named_by_hub_id_package_or_last_folder(tmp_path):
    assert public_name("google/vit") == "google/vit" and is_hub_id("google/vit") and public_name(None) is None
    assert public_name(tmp_path) == f"local:{tmp_path.name}" and not is_hub_id(str(tmp_path))
    assert public_name("/nowhere/a/bert") == "local:bert"
    package = tmp_path / "lib" / "site-packages" / "minilm" / "model"
    package.mkdir(parents=True)
    assert public_name(package) == "package://minilm/model"


def test_the_example_in_the_readme_is_a_file_that_can_be_read(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL) if "license:" in code)
    (tmp_path / "about.yaml").write_text(example)
    about = read_about(tmp_path / "about.yaml")
    assert about.license and about.intended_use and about.data["my_hospital"]["terms"]
    assert {field.name for field in dataclasses.fields(About)} >= {"license", "may_share_weights"}


def test_phantoms_are_counted_without_patients_of_their_own_being_named():
    (counted,) = count_rows(phantom_dataset(4, size=32, num_unpaired=1))
    assert counted["rows"] == counted["images"] == 4 and counted["reports"] == 3

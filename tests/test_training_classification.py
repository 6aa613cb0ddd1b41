import copy
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_config, tiny_processor
from MMCLIP.modeling_mmclip import MMCLIPForImageClassification, MMCLIPModel
from PIL import Image

from MMCLIP.data.manifest import make_row, rows_to_dataset
from MMCLIP.evaluation.linear_probe import run_metrics
from MMCLIP.training import classification
from MMCLIP.training.classification import (
    ClassificationDataset,
    LabelledRows,
    add_adapters,
    build_augmentation,
    build_trainer,
    layer_numbers,
    load_classifier,
    load_processor,
    lora_targets,
    read_labelled_rows,
    tower_blocks,
)
from MMCLIP.training.classification_arguments import parse_classification_config


CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "configs"
RESNET = {
    "model_type": "resnet", "num_channels": 1, "image_size": 32, "embedding_size": 8, "hidden_sizes": [16, 32],
    "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip
TRANSFORMER = {
    "num_channels": 1, "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
STAGES = {"num_channels": 1, "image_size": 32, "hidden_sizes": [8, 16, 32, 48], "depths": [1, 2, 1, 1]}
SWIN = {
    "model_type": "swin", "num_channels": 1, "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2],
    "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip


def make_dataset(number, split, first=0):
    """Images of which the bright ones have an effusion and the ones with a bright left half edema."""
    rng = np.random.default_rng(first)
    rows = []
    for row in range(first, first + number):
        bright, left = row % 2, row // 2 % 2
        pixels = rng.integers(0, 60, (32, 32)) + 120 * bright
        pixels[:, :16] += 60 * left
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, format="PNG")
        labels = [("pleural effusion", bright), ("edema", left)]
        rows.append(
            make_row(
                f"{split}{row}",
                file.getvalue(),
                source="a",
                split=split,
                patient_id=f"p{row}",
                present=[label for label, is_present in labels if is_present],
                absent=[label for label, is_present in labels if not is_present],
            )
        )
    return rows_to_dataset(rows)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders with a saved model and processor, untrained, by the kind of tower."""
    folders = {}
    for name, fields in (("vit", {}), ("resnet", {"vision_config": RESNET})):
        folders[name] = str(tmp_path_factory.mktemp(name))
        processor = tiny_processor()
        torch.manual_seed(0)
        MMCLIPModel(tiny_config(vocab_size=len(processor.tokenizer), **fields)).save_pretrained(folders[name])
        processor.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def labelled():
    rows = {"train": make_dataset(16, "train"), "validation": make_dataset(8, "val", 100)}
    rows["test"] = make_dataset(8, "test", 200)
    targets = {
        role: np.array([[label in row["present"] for label in ("edema", "pleural effusion")] for row in part]) * 1
        for role, part in rows.items()
    }
    patients = {role: list(part["patient_id"]) for role, part in rows.items()}
    return LabelledRows(rows, targets, patients, ["edema", "pleural effusion"], [])


@pytest.fixture
def parse(tmp_path, checkpoints):
    def run(*words, data=("--num_phantoms", 8, "--num_validation_phantoms", 4, "--num_test_phantoms", 4), tower="vit"):
        words = (
            *("--model_name_or_path", checkpoints[tower], "--output_dir", tmp_path / "out", "--use_cpu", "true"),
            *("--report_to", "none", "--disable_tqdm", "true", *data, *words),
        )
        return parse_classification_config([str(word) for word in words])

    return run


@pytest.fixture
def trained(parse, labelled, checkpoints):
    """A short training; returns its Trainer and the logits of the test rows."""

    def run(*words, tower="vit", seed=0, labelled=labelled):
        short = ("--max_steps", 4, "--per_device_train_batch_size", 8, "--learning_rate", 0.01)
        what, data, training = parse(*short, "--eval_strategy", "no", *words, tower=tower)
        training = copy.copy(training)
        training.seed = seed
        torch.manual_seed(seed)
        processor = load_processor(checkpoints[tower])
        model = load_classifier(checkpoints[tower], labelled.labels, what.task)
        rows = np.arange(len(labelled.rows["train"]))
        trainer = build_trainer(model, processor, labelled, rows, what, data, training)
        trainer.train()
        test = ClassificationDataset(labelled.rows["test"], labelled.targets["test"], processor, augmented=False)
        return trainer, trainer.predict(test).predictions

    return run


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("name", ["classification_phantom", "classification_chestxray14"])
def test_the_configs_can_be_parsed_and_the_command_line_lies_on_top(name, tmp_path, parse, checkpoints):
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    content = {key: value for key, value in content.items() if key not in ("bf16", "dataloader_num_workers")}
    for key in ("train_manifest", "validation_manifest", "test_manifest"):
        if key in content:
            content[key] = [str(tmp_path)]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    words = ["--model_name_or_path", checkpoints["vit"], "--output_dir", str(tmp_path), "--seeds", "3", "4"]
    what, data, training = parse_classification_config([str(tmp_path / "run.yaml"), *words, "--use_cpu", "true"])
    assert what.seeds == [3, 4] and what.method == "full" and what.layer_decay < 1 and data.has_validation
    assert training.load_best_model_at_end and training.metric_for_best_model == "macro_auroc"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methd", "full"), "unknown key `methd`.*Did you mean .*method"),
        (("--method", "half"), "`method` must be one of probe, frozen, full, lora"),
        (("--task", "both"), "`task` must be one of"),
        (("--fractions", "0"), r"in \(0, 1\]"),
        (("--fractions", "0.1", "2"), r"in \(0, 1\]"),
        (("--seeds", "0", "0"), r"`seeds`.*different"),
        (("--seeds", "-1"), "must not be negative"),
        (("--labels", "pneumonja"), "unknown label 'pneumonja'.*pneumonia"),
        (("--layer_decay", "1.5"), "`layer_decay` must be"),
        (("--seed", "3"), r"write `seeds: \[3\]`"),
        (("--text_learning_rate", "1"), "no text tower"),
        (("--resume_from_checkpoint", "x"), "does nothing here"),
        (("--early_stopping_patience", "2", "--eval_strategy", "no"), "needs `eval_strategy`"),
        (("--task", "multi-class", "--labels", "edema"), "two or more `labels`"),
        (("--train_manifest", "/nowhere.csv"), "no manifest file /nowhere.csv"),
    ],
)
def test_keys_that_are_wrong_or_do_nothing_are_errors(parse, words, message):
    with pytest.raises(ValueError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    "words",
    [
        ("frozen", "layer_decay", 0.5),
        ("full", "lora_rank", 4),
        ("full", "l2", 1),
        ("probe", "early_stopping_patience", 2),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_a_setting_that_is_for_another_method_is_warned_of(parse, caplog, words):
    method, key, value = words
    parse("--method", method, f"--{key}", value)
    assert f"`{key}` does nothing under the method {method}; it is for" in caplog.text
    caplog.clear()
    parse("--method", method)
    assert "does nothing" not in caplog.text


def test_early_stopping_and_the_best_checkpoint_need_validation_rows(parse):
    data = ("--num_phantoms", 8, "--num_test_phantoms", 4)
    with pytest.raises(ValueError, match="`early_stopping_patience` needs validation rows"):
        parse("--early_stopping_patience", 2, data=data)
    with pytest.raises(ValueError, match="no validation rows.*`eval_strategy: no`"):
        parse(data=data)
    _, _, training = parse("--eval_strategy", "no", data=data)
    assert not training.load_best_model_at_end and training.save_strategy == "no"
    parse("--method", "probe", data=data)
    with pytest.raises(ValueError, match="Nothing to test on"):
        parse(data=("--num_phantoms", 8))
    with pytest.raises(ValueError, match="Nothing to train on"):
        parse(data=("--num_test_phantoms", 8))


# ---------------------------------------------------------------------------------------------------------------- rows


def write_table(folder, rows):
    """`rows` of (split, patient, labels) as a table with images; in `Effusion|-Edema` the minus stands for absent."""
    lines = ["file,split,patient_id,source,labels,absent_labels"]
    rng = np.random.default_rng(0)
    for number, (split, patient, labels) in enumerate(rows):
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / f"{number}.png")
        present = ";".join(label for label in labels.split("|") if not label.startswith("-"))
        absent = ";".join(label[1:] for label in labels.split("|") if label.startswith("-"))
        lines.append(f"{number}.png,{split},{patient},a,{present},{absent}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder / "rows.csv"


def of_table(path, validation=True):
    words = ("--train_manifest", path, "--test_manifest", path)
    return (*words, "--validation_manifest", path) if validation else words


GOOD = [
    ("train", "p1", "Effusion|-Edema"), ("train", "p2", "Edema|-Effusion"), ("train", "p3", "-Edema|Effusion|-Mass"),
    ("val", "p4", "Edema|-Effusion"), ("val", "p5", "Effusion|-Edema"), ("test", "p6", "Edema"),
]  # fmt: skip


def test_a_label_that_is_stated_one_way_only_is_left_out_and_named(tmp_path, parse, caplog):
    what, data, _ = parse(data=of_table(write_table(tmp_path, GOOD)))
    found = read_labelled_rows(what, data)
    assert found.labels == ["edema", "pleural effusion"] and found.left_out == ["mass"] and "mass" in caplog.text
    assert found.targets["train"].tolist() == [[0, 1], [1, 0], [0, 1]]
    assert found.targets["test"].tolist() == [[1, 0]] and {len(part) for part in found.rows.values()} == {3, 2, 1}
    what, data, _ = parse("--unlisted_is_absent", "false", data=of_table(tmp_path / "rows.csv"))
    assert read_labelled_rows(what, data).targets["test"].tolist() == [[1, -100]]
    what, data, _ = parse("--labels", "Edema", data=of_table(tmp_path / "rows.csv"))
    assert read_labelled_rows(what, data).labels == ["edema"]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (GOOD, ("--labels", "Mass"), "No model can learn mass: the 3 training rows"),
        (GOOD, ("--labels", "Pneumonia"), "No model can learn pneumonia"),
        (GOOD[3:], (), "split 'train'"),
        ([*GOOD, ("test", "p1", "Edema")], (), "patient 'p1' is in split 'test' here and in 'train'"),
        (GOOD, ("--fractions", "0.3"), "Fraction 0.3, seed 0: none of edema, pleural effusion is both"),
        ([*GOOD[:3], ("val", "p4", "Edema"), GOOD[5]], (), "No label can be scored on the 1 validation rows"),
        ([*GOOD, ("train", "p9", "Edema|Effusion")], ("--task", "multi-class"), "train rows: .*exactly one"),
        ([*GOOD[:5], ("test", "p6", "-Edema")], ("--task", "multi-class"), "test rows: .*exactly one"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused_before_a_model_is_loaded(tmp_path, parse, rows, words, message):
    what, data, _ = parse(*words, data=of_table(write_table(tmp_path, rows)))
    with pytest.raises(ValueError, match=message):
        read_labelled_rows(what, data)


@pytest.mark.parametrize(("first", "second"), [("train", "test"), ("train", "validation"), ("validation", "test")])
@pytest.mark.parametrize("shared", ["patient", "picture", "row"])
def test_a_patient_a_picture_or_a_row_in_two_roles_is_an_error(parse, tmp_path, monkeypatch, first, second, shared):
    parts = {}
    for start, role in enumerate(("train", "validation", "test")):
        rows = make_dataset(4, role, 10 * start)
        # as from tables without a column `split`: all of one, so that it keeps nobody apart
        rows = rows.remove_columns("split").add_column("split", ["x"] * 4, feature=rows.features["split"])
        parts[role] = rows.add_column("pixel_hash", [f"{role}{number}" for number in range(3)] + [""])
    column = {"patient": "patient_id", "picture": "pixel_hash", "row": "row_id"}[shared]
    values = [*parts[first][column][:2], *parts[second][column][2:]]
    feature = parts[second].features[column]
    parts[second] = parts[second].remove_columns(column).add_column(column, values, feature=feature)
    monkeypatch.setattr(classification, "read_manifest", lambda path, *_, **__: parts[Path(path).name])
    for role in parts:
        (tmp_path / role).mkdir()
    words = [word for role in parts for word in (f"--{role}_manifest", tmp_path / role)]
    what, data, _ = parse("--method", "probe", data=words)
    told = f"2 {shared}s of the {second} rows are among the {first} rows too, the first in row '{second}"
    with pytest.raises(ValueError, match=told if shared != "row" else "twice"):
        read_labelled_rows(what, data)


def test_classes_are_numbers_of_the_labels(tmp_path, parse):
    what, data, _ = parse("--task", "multi-class", data=of_table(write_table(tmp_path, GOOD)))
    found = read_labelled_rows(what, data)
    assert found.is_multi_class and found.labels == ["edema", "pleural effusion"]
    assert found.targets["train"].tolist() == [1, 0, 1] and found.targets["test"].tolist() == [0]


def test_augmentation_is_drawn_anew_in_each_epoch_and_never_in_validation(labelled, checkpoints):
    processor = load_processor(checkpoints["vit"])
    rows, targets = labelled.rows["train"], labelled.targets["train"]
    train = ClassificationDataset(rows, targets, processor, augmented=True, seed=1)
    first = train[3]["augmentation_draws"]
    assert torch.equal(first, train[3]["augmentation_draws"]) and not torch.equal(first, train[4]["augmentation_draws"])
    train.set_epoch(1)
    assert not torch.equal(first, train[3]["augmentation_draws"])
    other = ClassificationDataset(rows, targets, processor, augmented=True, seed=2)
    assert not torch.equal(first, other[3]["augmentation_draws"])
    validation = ClassificationDataset(rows, targets, processor, augmented=False)
    assert validation[3].keys() == {"pixel_values", "labels"} and validation[3]["labels"].dtype == torch.float32


def test_images_are_changed_in_training_and_left_alone_in_validation(trained, monkeypatch):
    seen = {True: [], False: []}
    forward = MMCLIPForImageClassification.forward

    def watch(self, pixel_values, **kwargs):
        seen[self.training].append(pixel_values.clone())
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(MMCLIPForImageClassification, "forward", watch)
    trainer, _ = trained("--max_steps", 1, "--num_train_epochs", 1)
    original = torch.stack([trainer.train_dataset[row]["pixel_values"] for row in range(16)])

    def is_original(image):
        return bool((original == image).flatten(1).all(dim=1).any())

    assert not any(is_original(image) for batch in seen[True] for image in batch)
    test = [image for batch in seen[False] for image in batch]
    dataset = ClassificationDataset(
        make_dataset(8, "test", 200), np.zeros((8, 2)), trainer.processing_class, augmented=False
    )
    assert all(torch.equal(image, dataset[row]["pixel_values"]) for row, image in enumerate(test))


# ------------------------------------------------------------------------------------------------------ learning rates


def test_learning_rates_fall_from_the_classifier_to_the_stem_by_hand(parse, labelled, checkpoints):
    what, data, training = parse("--learning_rate", 1.0, "--layer_decay", 0.5, "--weight_decay", 0.1)
    model = load_classifier(checkpoints["vit"], labelled.labels, what.task)
    trainer = build_trainer(model, load_processor(checkpoints["vit"]), labelled, np.arange(16), what, data, training)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = tower_blocks(model.vision_model)
    by_hand = {
        "classifier.weight": (1.0, 0.1),
        "classifier.bias": (1.0, 0.0),
        "vision_model.layernorm.weight": (1.0, 0.0),
        f"vision_model.{blocks[1]}.mlp.fc1.weight": (0.5, 0.1),
        f"vision_model.{blocks[1]}.layernorm_before.weight": (0.5, 0.0),
        f"vision_model.{blocks[0]}.mlp.fc2.weight": (0.25, 0.1),
        f"vision_model.{blocks[0]}.mlp.fc2.bias": (0.25, 0.0),
        "vision_model.embeddings.patch_embeddings.projection.weight": (0.125, 0.1),
        "vision_model.embeddings.position_embeddings": (0.125, 0.0),
        "vision_model.embeddings.cls_token": (0.125, 0.0),
    }
    assert {name: found[name] for name in by_hand} == by_hand
    assert all(decay == 0 for name, (_, decay) in found.items() if "norm" in name or name.endswith("bias"))


@pytest.mark.parametrize(
    ("tower", "num_blocks", "stem", "top"),
    [
        ({"model_type": "dinov2", **TRANSFORMER}, 2, "embeddings.cls_token", "layernorm.weight"),
        ({"model_type": "siglip_vision_model", **TRANSFORMER}, 2, "patch_embedding.weight", "post_layernorm.weight"),
        ({"model_type": "clip_vision_model", **TRANSFORMER}, 2, "pre_layrnorm.weight", "post_layernorm.weight"),
        (SWIN, 3, "patch_embeddings.projection.weight", "layernorm.weight"),
        (RESNET, 2, "embedder.convolution.weight", "classifier.weight"),
        ({"model_type": "convnext", **STAGES}, 4, "patch_embeddings.weight", "classifier.weight"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_every_kind_of_tower_has_its_blocks_in_order(tower, num_blocks, stem, top):
    model = MMCLIPForImageClassification(tiny_config(vision_config=tower, image_pooling="mean", num_labels=2))
    numbers = layer_numbers(model)
    assert len(tower_blocks(model.vision_model)) == num_blocks
    assert (
        set(numbers.values()) == set(range(num_blocks + 2)) and numbers.keys() == dict(model.named_parameters()).keys()
    )
    assert all(number == 0 for name, number in numbers.items() if name.endswith(stem)), "the stem is lowest"
    assert any(name.endswith(stem) for name in numbers)
    assert all(number == num_blocks + 1 for name, number in numbers.items() if name.endswith(f".{top}"))
    in_order = [number for name, number in numbers.items() if name.startswith("vision_model.")]
    assert in_order == sorted(in_order) and numbers["classifier.weight"] == num_blocks + 1


# ------------------------------------------------------------------------------------------------------------ training


def test_frozen_leaves_the_tower_and_its_statistics_as_they_were(trained, checkpoints, labelled):
    before = load_classifier(checkpoints["resnet"], labelled.labels, "multi-label").vision_model.state_dict()
    trainer, _ = trained("--method", "frozen", tower="resnet")
    after = trainer.model.vision_model.state_dict()
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.model.classifier.bias.abs().sum() > 0
    full, _ = trained(tower="resnet")
    moved = full.model.vision_model.state_dict()
    assert not torch.equal(
        before["embedder.embedder.convolution.weight"], moved["embedder.embedder.convolution.weight"]
    )


def test_full_training_learns_a_simple_task(trained, labelled):
    _, logits = trained("--max_steps", 40, "--learning_rate", 3e-3, "--max_contrast", 0, tower="resnet")
    assert run_metrics(labelled.targets["test"], logits, labelled.labels)["macro_auroc"] > 0.95


def test_early_stopping_stops_when_validation_gets_no_better_and_the_best_is_taken(trained):
    words = ("--eval_strategy", "epoch", "--num_train_epochs", 10, "--max_steps", -1, "--learning_rate", 0)
    trainer, _ = trained(*words, "--early_stopping_patience", 2)
    # at learning rate 0 the first epoch stays the best, so the third is the last; two steps each
    assert trainer.state.global_step == 6 and trainer.state.best_global_step == 2
    unstopped, _ = trained(*words)
    assert unstopped.state.global_step == 20


def test_a_training_that_diverges_is_told(trained):
    with pytest.raises(ValueError, match="training diverged. Lower `learning_rate`"):
        trained("--learning_rate", 1e30, "--max_grad_norm", 0, "--eval_strategy", "epoch", "--max_steps", 6)


@pytest.mark.parametrize(
    "words",
    [
        ("--learning_rate", 0.002), ("--layer_decay", 0.5), ("--noise_std", 0), ("--method", "frozen"),
        *(pytest.param(words, marks=pytest.mark.slow) for words in (
            ("--weight_decay", 5.0), ("--max_rotation", 0), ("--max_translation", 0), ("--max_scaling", 0),
            ("--max_contrast", 0), ("--method", "lora"),
        )),
    ],
    ids=lambda words: " ".join(map(str, words)),
)  # fmt: skip
def test_each_option_of_training_changes_the_result_and_the_same_options_do_not(trained, words):
    if "lora" in words:
        pytest.importorskip("peft")
    base = trained()[1]
    assert not np.array_equal(trained(*words)[1], base)
    if words[0] == "--learning_rate":
        assert np.array_equal(trained()[1], base)
        assert not np.array_equal(trained(seed=1)[1], base)


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_lora_trains_adapters_and_classifier_alone_and_merges_into_the_same_logits(
    tower, trained, checkpoints, labelled
):
    pytest.importorskip("peft")
    before = load_classifier(checkpoints[tower], labelled.labels, "multi-label").state_dict()
    trainer, logits = trained("--method", "lora", tower=tower)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trainable)
    assert any("lora_" in name for name in trainable) and any("classifier" in name for name in trainable)
    base = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        if not name.startswith("classifier"):
            key = name if name in base else ".".join([name.rpartition(".")[0], "base_layer", name.rpartition(".")[2]])
            assert torch.equal(base[key], value), name  # BatchNorm statistics too
    merged = trainer.model.merge_and_unload().eval()
    dataset = ClassificationDataset(
        labelled.rows["test"], labelled.targets["test"], trainer.processing_class, augmented=False
    )
    images = torch.stack([dataset[row]["pixel_values"] for row in range(8)])
    with torch.no_grad():
        np.testing.assert_allclose(merged(images).logits.numpy(), logits, rtol=1e-4, atol=1e-5)
    assert set(merged.state_dict()) == set(before)
    changed = [name for name, value in merged.state_dict().items() if not torch.allclose(value, before[name])]
    assert any(name.startswith("vision_model") for name in changed)


@pytest.mark.parametrize(
    "words",
    [("--lora_rank", 2), ("--lora_target_modules", "fc1"), *(pytest.param(words, marks=pytest.mark.slow) for words in (
        ("--lora_alpha", 64), ("--lora_dropout", 0.5), ("--layer_decay", 0.5)))],
    ids=lambda words: str(words[0]),
)  # fmt: skip
def test_each_option_of_lora_changes_the_result(trained, words):
    pytest.importorskip("peft")
    assert not np.array_equal(trained("--method", "lora")[1], trained("--method", "lora", *words)[1])


@pytest.mark.parametrize(
    ("tower", "ends"),
    [
        ({"model_type": "vit", **TRANSFORMER}, {"q_proj", "v_proj"}),
        ({"model_type": "siglip_vision_model", **TRANSFORMER}, {"q_proj", "v_proj"}),
        (SWIN, {"q_proj", "v_proj"}),
        (RESNET, {"convolution"}),
        ({"model_type": "convnext", **STAGES}, {"pwconv1", "pwconv2"}),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_layers_for_adapters_are_found_in_every_kind_of_tower(tower, ends):
    model = MMCLIPForImageClassification(tiny_config(vision_config=tower, image_pooling="mean", num_labels=2))
    names = lora_targets(model)
    layers = dict(model.named_modules())
    older = {"query": "q_proj", "value": "v_proj"}  # names in transformers before they were made alike
    found = {name.rpartition(".")[2] for name in names}
    assert {older.get(end, end) for end in found} == ends and all(name in layers for name in names)
    assert not any("embed" in name for name in names)


def test_names_that_match_no_layer_are_an_error_that_lists_what_there_is(checkpoints, labelled):
    model = load_classifier(checkpoints["vit"], labelled.labels, "multi-label")
    with pytest.raises(ValueError, match=r"ends in 'c_attn'.*fc1, fc2, k_proj"):
        lora_targets(model, ["fc1", "c_attn"])
    assert len(lora_targets(model, ["fc1", "fc2"])) == 4


def test_without_peft_lora_says_how_to_get_it(checkpoints, labelled, parse, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = load_classifier(checkpoints["vit"], labelled.labels, "multi-label")
    with pytest.raises(ValueError, match="pip install 'peft>=0.19'"):
        add_adapters(model, parse("--method", "lora")[0])


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_classifier_knows_its_labels_and_begins_anew(checkpoints, tmp_path):
    model = load_classifier(checkpoints["vit"], ["edema", "mass"], "multi-label")
    assert model.config.id2label == {0: "edema", 1: "mass"} and model.config.label2id == {"edema": 0, "mass": 1}
    assert model.config.problem_type == "multi_label_classification"
    model.save_pretrained(tmp_path)
    other = load_classifier(str(tmp_path), ["edema", "mass", "nodule"], "multi-class")
    assert other.classifier.out_features == 3 and other.config.problem_type == "single_label_classification"
    assert all(
        torch.equal(value, other.vision_model.state_dict()[name])
        for name, value in model.vision_model.state_dict().items()
    )


def test_a_checkpoint_without_processor_or_without_the_tower_is_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_processor(str(tmp_path))
    MMCLIPModel.from_pretrained(checkpoints["vit"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no processor_config.json"):
        load_processor(str(tmp_path))
    model = MMCLIPModel.from_pretrained(checkpoints["vit"])
    state = {name: value for name, value in model.state_dict().items() if "embeddings.cls_token" not in name}
    model.save_pretrained(tmp_path / "broken", state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 weights of the vision tower.*cls_token"):
        load_classifier(str(tmp_path / "broken"), ["edema"], "multi-label")


def test_black_and_white_of_the_augmentation_are_those_of_the_image_processor(parse, checkpoints):
    augmentation = build_augmentation(parse("--max_rotation", 7)[1], load_processor(checkpoints["vit"]))
    assert augmentation.max_rotation == 7 and augmentation.black < augmentation.white

"""The trainer and the training script: what is logged, decayed, saved, and gone on with to the last bit."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_config
from MMCLIP.modeling_mmclip import contrastive_loss
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor, TrainerState

from MMCLIP import MMCLIPForPreTraining, MMCLIPProcessor
from MMCLIP.data.augmentation import RadiographAugmentation
from MMCLIP.data.collator import MMCLIPCollator
from MMCLIP.data.dataset import COLLATOR_STREAM, MMCLIPDataset, sample_generator
from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.text.masking import MASKING_COUNTS, masking_rates
from MMCLIP.training.arguments import MMCLIPTrainingArguments
from MMCLIP.training.trainer import MMCLIPTrainer, _SetEpoch


ROOT = Path(__file__).resolve().parent.parent
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
NUM_ROWS, BATCH_SIZE, NUM_PATCHES = 24, 4, 16
STEPS_PER_EPOCH = NUM_ROWS // BATCH_SIZE
LOSSES = ("contrastive", "mim", "mlm", "prompt", "local")
# dropout and augmentation are on: a run that goes on must get every draw right
CONFIG = {
    "num_phantoms": NUM_ROWS,
    "num_unpaired_phantoms": 8,
    "phantom_size": 48,
    "prompt_labels": ["pleural effusion", "cardiomegaly"],
    "vision_config": {"model_type": "vit", "num_channels": 1, "image_size": 32, "patch_size": 8, **TOWER},
    "text_config": {"model_type": "bert", "max_position_embeddings": 96, **TOWER},
    **dict.fromkeys(("mim_weight", "mlm_weight", "prompt_weight", "local_weight"), 1.0),
    **dict.fromkeys(("mim_row_ratio", "mlm_row_ratio"), 1.0),
    "projection_dim": 16,
    "decoder_hidden_size": 16,
    "decoder_num_layers": 1,
    "decoder_num_heads": 2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": BATCH_SIZE,
    "learning_rate": "1e-3",
    "text_learning_rate": "1e-4",
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "seed": 3,
}


def load_script():
    spec = importlib.util.spec_from_file_location("run_pretrain", ROOT / "examples" / "run_pretrain.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


class RecordingTrainer(MMCLIPTrainer):
    """Keeps what each step was given to draw its masked patches from, and what was hidden of its texts."""

    seen: list[np.ndarray] = []
    counts: list[np.ndarray] = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append(inputs["mim_noise"].numpy().copy())
        self.counts.append(inputs["masking_counts"].sum(dim=0).numpy())
        return super().compute_loss(model, inputs, *args, **kwargs)


def run(folder: Path, *words: str, **changes) -> tuple[Path, list[list[tuple[int, int]]]]:
    """Runs examples/run_pretrain.py; returns its folder and the (epoch, row) pairs of each batch it trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}), encoding="utf-8")
    script = load_script()
    script.MMCLIPTrainer = RecordingTrainer
    RecordingTrainer.seen, RecordingTrainer.counts = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_pretrain.py", str(folder / "run.yaml"), "--output_dir", str(folder), *words])
        script.main()
    drawn = {}
    for epoch in range(CONFIG["num_train_epochs"]):
        for row in range(NUM_ROWS):
            generator = sample_generator((CONFIG["seed"], epoch, row), COLLATOR_STREAM)
            drawn[generator.random(NUM_PATCHES, dtype=np.float32).tobytes()] = (epoch, row)
    return folder, [[drawn[noise.tobytes()] for noise in batch] for batch in RecordingTrainer.seen]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken"))


# ------------------------------------------------------------------------------------------------ a run from end to end


def test_a_run_leaves_a_folder_that_auto_classes_load_its_config_its_results_and_its_log(unbroken):
    folder, _ = unbroken
    model = AutoModel.from_pretrained(folder / "checkpoint", trust_remote_code=True)
    pretraining = AutoModelForPreTraining.from_pretrained(folder / "checkpoint", trust_remote_code=True)
    assert model.config.training_sources == pretraining.config.training_sources == ["phantom"]
    processor = AutoProcessor.from_pretrained(folder / "checkpoint", trust_remote_code=True)
    saved = weights(folder / "checkpoint")
    assert same_bits(dict(pretraining.state_dict()), saved)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    model.processor = processor
    image_features, text_features = model.encode(np.zeros((40, 30), np.uint8), "No pneumothorax.")
    assert image_features.shape == text_features.shape == (1, 16)

    resolved = json.loads((folder / "run_config.json").read_text())
    assert resolved["model"]["projection_dim"] == 16 and resolved["data"]["num_phantoms"] == NUM_ROWS
    assert resolved["training"]["learning_rate"] == 1e-3
    assert resolved["data"]["mlm_ratio"] == 0.5, "a default is written down too"
    results = json.loads((folder / "train_results.json").read_text())
    assert results["train_samples_per_second"] > 0 and results["train_runtime"] > 0 and results["epoch"] == 2.0
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 2 * STEPS_PER_EPOCH
    assert not [path.name for path in (folder / "checkpoint").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_weights_of_a_run_have_moved_in_every_part(unbroken):
    folder, _ = unbroken
    first, last = weights(folder / "checkpoint-2"), weights(folder / "checkpoint")
    still = [name for name in first if torch.equal(first[name], last[name])]
    assert still == ["no_image_token"], "no row here is without an image"


def test_each_loss_is_logged_by_its_name_and_they_add_up_to_the_total(unbroken):
    steps = [entry for entry in log_of(unbroken[0]) if "loss" in entry]
    assert len(steps) == 2 * STEPS_PER_EPOCH
    for entry in steps:
        assert {name for name in entry if name.startswith("loss_")} == {f"loss_{name}" for name in LOSSES}
        assert sum(entry[f"loss_{name}"] for name in LOSSES) == pytest.approx(entry["loss"], abs=1e-3)
        assert 1 < entry["similarity_scale"] <= 100
    assert len({entry["loss_mim"] for entry in steps}) > 1


def test_a_branch_of_weight_zero_is_not_logged_and_the_others_carry_their_weight(tmp_path):
    folder, _ = run(tmp_path, "--max_steps", "2", mim_weight=0, local_weight=0, mlm_weight=0.5, save_strategy="no")
    for entry in (entry for entry in log_of(folder) if "loss" in entry):
        assert {name for name in entry if name.startswith("loss_")} == {"loss_contrastive", "loss_mlm", "loss_prompt"}
        total = entry["loss_contrastive"] + 0.5 * entry["loss_mlm"] + entry["loss_prompt"]
        assert total == pytest.approx(entry["loss"], abs=1e-3)


def rates_of(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name.startswith("mlm_")}


def test_the_rates_of_masking_are_those_of_all_texts_since_the_last_log(unbroken, tmp_path):
    changes = {"mlm_cue_ratio": 0.5, "mlm_kinds": ["finding", "disease"], "max_steps": 4, "save_strategy": "no"}
    folder, _ = run(tmp_path, logging_steps=2, **changes)
    entries = [entry for entry in log_of(folder) if "loss" in entry]
    assert len(entries) == 2 and len(RecordingTrainer.counts) == 4
    for entry, counts in zip(entries, (RecordingTrainer.counts[:2], RecordingTrainer.counts[2:]), strict=True):
        totals = dict(zip(MASKING_COUNTS, sum(counts).tolist(), strict=True))
        assert totals["texts"] == 2 * BATCH_SIZE and 0 < totals["hidden_entities_with_cue"] <= totals["hidden_entities"]
        assert rates_of(entry) == pytest.approx(masking_rates(totals), abs=1e-4)
        assert 0 < entry["mlm_token_ratio"] < 1 and len(rates_of(entry)) == 4
    every_kind = [rates_of(entry) for entry in log_of(unbroken[0]) if "loss" in entry]
    assert all("mlm_hidden_cue_ratio" not in rates for rates in every_kind), "off, so that nothing is counted"
    first_steps = sum(rates["mlm_entities_per_text"] for rates in every_kind[:2]) / 2
    assert entries[0]["mlm_entities_per_text"] < first_steps, "the same texts have sides and organs too"


def test_without_entmlm_no_rate_is_logged_and_in_evaluation_none_is_summed(tmp_path):
    folder, _ = run(tmp_path, "--max_steps", "1", mlm_weight=0, save_strategy="no")
    assert [rates_of(entry) for entry in log_of(folder) if "loss" in entry] == [{}]
    trainer = make_trainer(tmp_path)
    trainer.data_collator.for_trainer = True
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    trainer.model.eval()
    trainer.compute_loss(trainer.model, dict(batch))
    assert trainer._masking_counts is None
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    assert torch.equal(trainer._masking_counts, batch["masking_counts"].sum(dim=0))


def test_the_prompt_and_augmentation_streams_move_on_with_each_epoch(unbroken):
    _, batches = unbroken
    for epoch in range(2):
        rows = [pair for batch in batches[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH] for pair in batch]
        assert sorted(rows) == [(epoch, row) for row in range(NUM_ROWS)]


# ------------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (4, {}),
        (6, {}),
        (8, {}),
        (4, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
        (10, {"dataloader_num_workers": 2}),
    ],
    ids=["within epoch 0", "between epochs", "within epoch 1", "within epoch 0, 2 kept workers", "epoch 1, 2 workers"],
)
def test_a_run_that_goes_on_ends_with_the_same_bits_as_one_that_was_never_broken(unbroken, tmp_path, step, changes):
    whole, all_batches = unbroken
    words = ["--resume_from_checkpoint", str(whole / f"checkpoint-{step}"), "--save_strategy", "no"]
    folder, batches = run(tmp_path, *words, **changes)
    assert batches == all_batches[step:], "other rows, or rows of another epoch, from the first batch on"
    assert same_bits(weights(folder / "checkpoint"), weights(whole / "checkpoint"))


@pytest.mark.parametrize(
    ("told", "epoch"), [(None, 0), (0, 0), (4 / 6, 0), (1.0, 1), (8 / 6, 1), (0.1 * 3 / 0.3 - 1e-9, 1), (2.0, 2)]
)
def test_the_epoch_is_set_before_its_first_batch_also_when_a_run_goes_on_within_it(told, epoch):
    dataset = MMCLIPDataset(phantom_dataset(2, size=32))
    _SetEpoch(dataset).on_epoch_begin(None, TrainerState(epoch=told), None)
    assert dataset.epoch == epoch and dataset[1]["sample_seed"] == (0, epoch, 1)


def test_losses_are_averaged_over_the_steps_since_the_last_log(unbroken, tmp_path):
    whole, _ = unbroken
    folder, _ = run(tmp_path, logging_steps=2, save_strategy="no")
    singles = {entry["step"]: entry for entry in log_of(whole) if "loss" in entry}
    pairs = [entry for entry in log_of(folder) if "loss" in entry]
    assert [entry["step"] for entry in pairs] == [2, 4, 6, 8, 10, 12]
    for entry in pairs:
        for name in ("loss", *(f"loss_{name}" for name in LOSSES)):
            mean = (singles[entry["step"] - 1][name] + singles[entry["step"]][name]) / 2
            assert entry[name] == pytest.approx(mean, abs=2e-4), name


def test_last_goes_on_from_the_newest_checkpoint_and_begins_where_there_is_none(tmp_path, unbroken):
    whole, _ = unbroken
    words = ["--resume_from_checkpoint", "last"]
    folder, batches = run(tmp_path, *words, "--max_steps", "3", save_steps=2)
    assert len(batches) == 3 and (folder / "checkpoint-2").is_dir()
    folder, batches = run(tmp_path, *words, "--max_steps", "4", save_steps=2)
    assert len(batches) == 1, "checkpoint-3 was written at the end of the first run"
    assert batches == unbroken[1][3:4]


# ------------------------------------------------------------------------------------ validation chooses the checkpoint


def test_zero_shot_validation_is_logged_and_the_best_checkpoint_is_what_remains(tmp_path):
    folder, _ = run(
        tmp_path,
        num_validation_phantoms=20,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="macro_auroc",
        load_best_model_at_end=True,
        validation_labels=["Effusion", "support device"],
    )
    state = json.loads((folder / "trainer_state.json").read_text())
    scores = [entry for entry in state["log_history"] if "eval_macro_auroc" in entry]
    assert [entry["epoch"] for entry in scores] == [1.0, 2.0]
    for entry in scores:
        named = [entry["eval_auroc_pleural_effusion"], entry["eval_auroc_support_device"]]
        assert entry["eval_macro_auroc"] == pytest.approx(np.mean(named))
        assert sum(name.startswith("eval_auroc_") for name in entry) == 2
        assert entry["eval_samples_per_second"] > 0
    best = max(scores, key=lambda entry: entry["eval_macro_auroc"])  # the first of equals
    assert state["best_metric"] == best["eval_macro_auroc"]
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best['step']}"
    assert same_bits(weights(folder / "checkpoint"), weights(folder / f"checkpoint-{best['step']}"))


# ------------------------------------------------------------------------------------------------ augmented in training


class Listening(MMCLIPForPreTraining):
    """Keeps what it was given."""

    def forward(self, **batch):
        self.batch = batch
        return super().forward(**batch)


def test_the_model_trains_on_augmented_images_and_is_measured_on_plain_ones(tmp_path):
    trainer = make_trainer(tmp_path, Listening(tiny_config(vocab_size=len(MMCLIPProcessor().tokenizer))))
    augmentation = trainer.data_collator.augmentation = RadiographAugmentation()
    samples = [{**trainer.train_dataset[row], **({"image": None} if row == 2 else {})} for row in range(3)]
    batch = trainer.data_collator(samples)
    draws = batch["augmentation_draws"]
    assert batch["has_image"].tolist() == [True, True, False]

    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    seen = trainer.model.batch
    assert seen.keys() == batch.keys() - {"augmentation_draws"}
    assert torch.equal(seen["pixel_values"][:2], augmentation(batch["pixel_values"], draws)[:2])
    assert (seen["pixel_values"] - batch["pixel_values"])[:2].abs().flatten(1).mean(dim=1).min() > 0.05
    assert seen["pixel_values"][2].abs().max() == 0

    trainer.model.eval()
    trainer.compute_loss(trainer.model, dict(batch))
    assert torch.equal(trainer.model.batch["pixel_values"], batch["pixel_values"])
    assert "augmentation_draws" not in trainer.model.batch


def test_each_augmentation_option_of_a_run_reaches_the_images(tmp_path):
    off = {"max_rotation": 0, "max_translation": 0, "max_scaling": 0, "max_contrast": 0, "noise_std": 0}
    quick = {"num_phantoms": 8, "num_unpaired_phantoms": 0, "max_steps": 1, "save_strategy": "no"}
    changes = [off, *({**off, name: 0.1} for name in off)]
    runs = [run(tmp_path / str(number), **quick, **change)[0] for number, change in enumerate(changes)]
    losses = {log_of(folder)[0]["grad_norm"] for folder in runs}
    assert len(losses) == 6


# -------------------------------------------------------------------------------------------------------- the optimiser


def make_trainer(tmp_path, model=None, **arguments) -> MMCLIPTrainer:
    processor = MMCLIPProcessor()
    processor.image_processor.size = {"height": 32, "width": 32}
    model = model or MMCLIPForPreTraining(tiny_config(vocab_size=len(processor.tokenizer)))
    arguments = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, **arguments}
    return MMCLIPTrainer(
        model=model,
        args=MMCLIPTrainingArguments(output_dir=str(tmp_path), **arguments),
        train_dataset=MMCLIPDataset(phantom_dataset(6, size=32)),
        data_collator=MMCLIPCollator(processor, model.num_patches, max_length=64),
        processing_class=processor,
    )


@pytest.mark.parametrize("text_learning_rate", [None, 1e-5])
def test_every_parameter_is_in_one_group_with_its_learning_rate_and_weight_decay(tmp_path, text_learning_rate):
    trainer = make_trainer(tmp_path, learning_rate=1e-3, weight_decay=0.1, text_learning_rate=text_learning_rate)
    optimizer = trainer.create_optimizer()
    named = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    grouped = [(named[id(parameter)], group) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(name for name, _ in grouped) == sorted(named.values()), "a parameter was lost or doubled"
    assert len(optimizer.param_groups) == (2 if text_learning_rate is None else 4)
    for name, group in grouped:
        is_text = name.startswith("text_model.")
        assert group["lr"] == (text_learning_rate if is_text and text_learning_rate else 1e-3), name
        if name == "logit_scale" or name.endswith((".bias", "_token", "position_embeddings")) or "norm" in name.lower():
            assert group["weight_decay"] == 0, name
        else:  # matrices and kernels, and no vector
            assert group["weight_decay"] == (0.1 if trainer.model.get_parameter(name).dim() > 1 else 0), name
    decayed = {name for name, group in grouped if group["weight_decay"]}
    assert {"visual_projection.weight", "text_projection.weight"} <= decayed
    assert {"logit_scale", "mim_head.mask_token", "no_image_token"}.isdisjoint(decayed)


def test_the_stem_s_norms_do_not_decay_either(tmp_path):
    model = MMCLIPForPreTraining(tiny_config(vocab_size=len(MMCLIPProcessor().tokenizer), vision_stem="convolution"))
    trainer = make_trainer(tmp_path, model)
    norms = [
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
        for kind in ("weight", "bias")
    ]
    assert any("patch_embeddings" in name for name in norms)
    assert set(norms).isdisjoint(trainer.get_decay_parameter_names(model))


def test_both_learning_rates_follow_the_schedule_in_their_proportion(tmp_path):
    trainer = make_trainer(
        tmp_path, learning_rate=1e-3, text_learning_rate=1e-4, max_steps=4, warmup_steps=0, save_strategy="no",
        per_device_train_batch_size=3,
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    rates = trainer.lr_scheduler.get_last_lr()
    assert rates == pytest.approx([1e-3, 1e-4, 1e-3, 1e-4])
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([0.75e-3, 0.75e-4, 0.75e-3, 0.75e-4])


def test_a_text_tower_with_learning_rate_zero_stays_as_it_was(tmp_path):
    trainer = make_trainer(
        tmp_path, learning_rate=1e-2, text_learning_rate=0.0, max_steps=2, save_strategy="no",
        per_device_train_batch_size=3,
    )  # fmt: skip
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "visual_projection.weight" in moved and "logit_scale" in moved
    assert not [name for name in moved if name.startswith("text_model.")]


def test_rows_that_make_no_single_batch_are_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match="6 training rows make no batch of 50, `per_device"):
        make_trainer(tmp_path, per_device_train_batch_size=50, dataloader_drop_last=True)


def test_one_process_that_would_split_its_batches_over_many_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(MMCLIPTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="One process sees 2 GPUs.*accelerate launch"):
        make_trainer(tmp_path)


# ------------------------------------------------------------------------------------------- large and bucketed batches


def test_a_run_that_sends_a_few_rows_at_a_time_through_the_towers_learns_what_one_with_whole_batches_does(tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # or each chunk would draw its own
    changes = {
        "text_config": {**CONFIG["text_config"], **still}, "gradient_accumulation_steps": 2, "max_steps": 3,
        "save_strategy": "no",
    }  # fmt: skip
    plain, batches = run(tmp_path / "plain", **changes)
    cached, same_batches = run(tmp_path / "cached", grad_cache_rows=3, **changes)
    assert len(batches) == 6 and same_batches == [], "the whole batch never passes the model's forward"
    for entry, expected in zip(log_of(cached), log_of(plain), strict=True):
        names = [name for name in expected if name.startswith(("loss", "grad_norm", "mlm_"))]
        assert {name: entry[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, abs=2e-3
        )
    found = weights(cached / "checkpoint")
    for name, values in weights(plain / "checkpoint").items():
        # a step of Adam is as long as the learning rate, however small the gradient whose sign it has
        assert (found[name] - values).abs().mean() < 1e-5, name


def test_a_run_by_text_length_sees_every_row_in_other_batches(tmp_path, unbroken):
    _, batches = run(tmp_path, group_by_text_length=True, num_train_epochs=1, save_strategy="no")
    epoch = unbroken[1][:STEPS_PER_EPOCH]
    assert sorted(sum(batches, [])) == sorted(sum(epoch, [])) and batches != epoch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grad_cache_rows", "0"], "`grad_cache_rows` is 0, expected at least 1"),
        (["--grad_cache_rows", "2", "--fp16", "true"], "no fp16 loss scaling; use --bf16"),
        (["--train_sampling_strategy", "group_by_length"], "has no effect here.*--group_by_text_length true"),
    ],
)
def test_settings_that_could_do_nothing_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *words)


# ------------------------------------------------------------------------------------------------------- many processes


# Imports once, then forks: the two processes share the seconds that an import takes, and no thread is alive yet.
HALF_BATCHES = """
import sys
import torch
from MMCLIP.modeling_mmclip import contrastive_loss

def half_batch(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, batch in torch.load(f"{folder}/batch.pt").items():
        half = {key: value.chunk(2)[rank].clone() for key, value in batch.items()}
        embeds = [half.pop(key).requires_grad_() for key in ("image_embeds", "text_embeds")]
        scale = torch.tensor(10.0, requires_grad=True)
        loss = contrastive_loss(*embeds, scale, **half)
        torch.save((loss.detach(), torch.autograd.grad(loss, [*embeds, scale])), f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()

torch.multiprocessing.start_processes(half_batch, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_two_processes_at_half_the_batch_have_the_loss_and_gradient_of_one(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def unit(*shape):
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    plain = {"image_embeds": unit(8, 5), "text_embeds": unit(8, 5)}
    # rows 1 and 6 have the same text, but lie in different processes; one process has 4 images, the other 1
    full = {
        **plain,
        "group_ids": torch.tensor([0, 1, 2, 3, 4, 5, 1, 7]),
        "has_image": torch.tensor([True, True, True, True, False, False, True, False]),
    }
    batches = {"plain": plain, "full": full}
    torch.save(batches, tmp_path / "batch.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", HALF_BATCHES, str(tmp_path)], env=environment, check=True, timeout=120)
    for name, batch in batches.items():
        embeds = [batch[key].clone().requires_grad_() for key in ("image_embeds", "text_embeds")]
        scale = torch.tensor(10.0, requires_grad=True)
        rest = {key: value for key, value in batch.items() if key not in ("image_embeds", "text_embeds")}
        loss = contrastive_loss(*embeds, scale, **rest)
        images, texts, scales = torch.autograd.grad(loss, [*embeds, scale])
        halves = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        # data-parallel training averages over processes, so the mean is what counts
        torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, loss.detach())
        torch.testing.assert_close(torch.cat([half[1][0] for half in halves]) / 2, images)
        torch.testing.assert_close(torch.cat([half[1][1] for half in halves]) / 2, texts)
        torch.testing.assert_close((halves[0][1][2] + halves[1][1][2]) / 2, scales)
        assert loss > 0.1 and images.abs().sum() > 0.1


@pytest.mark.slow
def test_a_run_of_two_processes_trains_and_tells_it_once(tmp_path):
    changes = {"num_validation_phantoms": 10, "eval_strategy": "epoch", "save_strategy": "no", "disable_tqdm": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "examples" / "run_pretrain.py"), str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [*launch, *script, "--use_cpu", "True"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    steps = [entry for entry in log_of(tmp_path) if "loss" in entry]
    assert len(steps) == STEPS_PER_EPOCH, "two epochs of half as many steps: the batch is shared out"
    assert {f"loss_{name}" for name in LOSSES} <= set(steps[0])
    for entry in steps:
        assert sum(entry[f"loss_{name}"] for name in LOSSES) == pytest.approx(entry["loss"], abs=2e-3)
        assert 0 < entry["mlm_token_ratio"] < 1 and 0 < entry["mlm_entity_text_ratio"] <= 1
    assert said.count("'loss_contrastive'") == STEPS_PER_EPOCH, "each log line once"
    assert said.count("'eval_macro_auroc'") == 2
    assert said.count("rows to train on") == 1
    assert AutoModel.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True).config.projection_dim == 16

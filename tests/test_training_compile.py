"""`torch_compile`: towers and decoders are one graph each, made in the first epoch; the rest stays as it was."""

import pytest
import torch
from conftest import tiny_batch, tiny_config, tiny_processor
from test_modeling_mmclip import TOWERS
from transformers import TrainerCallback

from MMCLIP import MMCLIPForPreTraining
from MMCLIP.data.collator import MMCLIPCollator
from MMCLIP.data.dataset import MMCLIPDataset
from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.training.arguments import MMCLIPTrainingArguments
from MMCLIP.training.compiling import compile_parts
from MMCLIP.training.trainer import MMCLIPTrainer


# traces and differentiates as inductor does, but writes no code: graph breaks and recompilations are the same
BACKEND = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class CountGraphs(TrainerCallback):
    """How many graphs there are at the end of each epoch, before validation, and after it."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_epoch_end(self, *args, **kwargs):
        self.trained.append(num_graphs())

    def on_evaluate(self, *args, **kwargs):
        self.validated.append(num_graphs())


class ListeningTrainer(MMCLIPTrainer):
    """Keeps the shape of the texts of each batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.shapes = [*getattr(self, "shapes", []), tuple(inputs["input_ids"].shape)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def make_trainer(folder, **arguments) -> ListeningTrainer:
    """Two epochs of 10 rows in batches of 4, so that the last batch is smaller."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    processor = tiny_processor()
    config = tiny_config(vocab_size=len(processor.tokenizer), decoder_num_layers=1)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    model = MMCLIPForPreTraining(config)
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "num_train_epochs": 2}
    return ListeningTrainer(
        model=model,
        args=MMCLIPTrainingArguments(str(folder), per_device_train_batch_size=4, **fixed, **arguments),
        train_dataset=MMCLIPDataset(phantom_dataset(10, size=32, num_unpaired=4)),
        eval_dataset=phantom_dataset(6, size=32, split="val"),
        data_collator=MMCLIPCollator(processor, model.num_patches, prompt_labels=("pleural effusion", "cardiomegaly")),
        processing_class=processor,
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_two_compiled_epochs_give_the_plain_losses_and_the_second_compiles_nothing(tmp_path):
    plain = make_trainer(tmp_path / "plain", save_strategy="no")
    plain.train()
    assert num_graphs() == 0
    compiled = make_trainer(tmp_path / "compiled", eval_strategy="epoch", save_strategy="epoch", **BACKEND)
    counts = CountGraphs()
    compiled.add_callback(counts)
    compiled.train()
    assert len(set(compiled.shapes)) >= 4 and compiled.shapes[2][0] == 2, "lengths or batch sizes that differ"
    # one each of vision tower, text tower and two decoders; the vision tower again when its batch first was smaller
    assert counts.trained == [5, 5] and counts.validated == [5, 5]
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4) and len(losses(plain)) == 6
    saved = MMCLIPForPreTraining.from_pretrained(tmp_path / "compiled" / "checkpoint-6", output_loading_info=True)
    assert not any(saved[1].values()), "names of the checkpoint are those of a plain model"
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(saved[0].state_dict()[name], weight, atol=1e-4, rtol=0, msg=name)


@pytest.mark.slow
def test_a_compiled_run_takes_gradient_checkpointing_and_bfloat16(tmp_path):
    options = {"gradient_checkpointing": True, "bf16": True, "max_steps": 2, "save_strategy": "no"}
    plain = make_trainer(tmp_path, **options)
    plain.train()
    compiled = make_trainer(tmp_path, **options, **BACKEND)
    compiled.train()
    assert num_graphs() == 5  # the text tower once more for masked texts, which go through it row by row here
    assert losses(compiled) == pytest.approx(losses(plain), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["convolution", *TOWERS])
def test_every_vision_tower_is_one_graph(model_type):
    if model_type == "convolution":
        config, size = tiny_config(vision_stem="convolution"), 32
    else:
        config = tiny_config(vision_config={"model_type": model_type, "num_channels": 1, **TOWERS[model_type]})
        size = 64
    model = MMCLIPForPreTraining(config).train()
    batch = tiny_batch() | {"pixel_values": torch.randn(4, 1, size, size)}
    batch["mim_noise"] = torch.rand(4, model.num_patches)
    torch.manual_seed(0)  # of Swin's layers some are dropped
    expected = model(**batch).loss
    torch._dynamo.reset()
    model.vision_model.compile(backend="eager", fullgraph=True)
    torch.manual_seed(0)
    torch.testing.assert_close(model(**batch).loss, expected)


def compiled_parts(monkeypatch, folder, **arguments) -> list[tuple[torch.nn.Module, dict]]:
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: calls.append((module, options)))
    trainer = make_trainer(folder, **arguments)
    model = trainer.accelerator.prepare_model(trainer.model)
    assert model is trainer.model, "accelerate compiled the model around its parts"
    parts = [model.vision_model, model.text_model, model.mim_head, model.mlm_head.decoder]
    assert [module for module, _ in calls] in ([], parts)
    return [options for _, options in calls]


def test_backend_and_mode_reach_the_towers_and_decoders_and_nothing_is_compiled_unasked(tmp_path, monkeypatch):
    assert compiled_parts(monkeypatch, tmp_path) == []
    options = compiled_parts(monkeypatch, tmp_path, torch_compile=True)
    assert [each["backend"] for each in options] == ["inductor"] * 4 and all(each["fullgraph"] for each in options)
    options = compiled_parts(
        monkeypatch, tmp_path, torch_compile_backend="aot_eager", torch_compile_mode="max-autotune"
    )
    assert {(each["backend"], each["mode"]) for each in options} == {("aot_eager", "max-autotune")}
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # of `accelerate launch --dynamo_backend`
    assert [each["backend"] for each in compiled_parts(monkeypatch, tmp_path)] == ["eager"] * 4


def test_compiling_under_fsdp_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    compile_parts(trainer.accelerator, trainer.model, trainer.args)  # nothing to compile, nothing to refuse
    trainer.args.torch_compile_backend = "eager"
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", object(), raising=False)
    with pytest.raises(ValueError, match="FSDP shards the layers within.*Leave out one of the two"):
        compile_parts(trainer.accelerator, trainer.model, trainer.args)

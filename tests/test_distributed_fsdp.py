"""FSDP2 on two CPU processes: the numbers of data-parallel training, and folders that need neither FSDP nor MMCLIP."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from conftest import tiny_config
from test_training_trainer import CONFIG, ROOT, log_of, same_bits, weights

from MMCLIP import MMCLIPForPreTraining
from MMCLIP.training.sharding import prepare_for_sharding


CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
CHANGES = {
    "vision_stem": "convolution",  # its kernels have strides that FSDP could refuse
    "max_steps": 4,
    "num_validation_phantoms": 10,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "macro_auroc",
    "load_best_model_at_end": True,
}

# One launch for several runs, as its imports take longer than they do. FSDP is off in the first.
RUNS = """
import json, os, runpy, sys
from pathlib import Path
import torch
from MMCLIP.training import trainer

class Telling(trainer.MMCLIPTrainer):
    def compute_loss(self, *args, **kwargs):
        self.is_autocast = torch.is_autocast_enabled("cpu")
        return super().compute_loss(*args, **kwargs)

    def train(self, *args, **kwargs):
        results = super().train(*args, **kwargs)
        parts = [value.to_local() if hasattr(value, "to_local") else value for value in self.model.parameters()]
        told = {"num_values": sum(part.numel() for part in parts), "is_autocast": self.is_autocast}
        Path(self.args.output_dir, f"process-{os.environ['RANK']}.json").write_text(json.dumps(told))
        return results

trainer.MMCLIPTrainer = Telling
for sharded, words in json.loads(sys.argv[1]):
    os.environ["ACCELERATE_USE_FSDP"] = sharded
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
"""

# -P and another folder: the checkout is not importable
CLEAN_PROCESS = """
import sys
sys.modules["accelerate"] = sys.modules["MMCLIP"] = None
from transformers import AutoModel, AutoModelForPreTraining
for auto_class in (AutoModel, AutoModelForPreTraining):
    model, info = auto_class.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    print(type(model).__name__, tuple(model.logit_scale.shape), model.similarity_scale().item())
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the runs: `ddp`, `fsdp`, `resumed` from the second step of `fsdp`; and two steps without dropout, whose
    draws differ with the type: `float32`, and `bf16` with checkpointing."""
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "run.yaml").write_text(yaml.safe_dump({**CONFIG, **CHANGES}), encoding="utf-8")
    (folder / "runs.py").write_text(RUNS, encoding="utf-8")
    (folder / "resumed").mkdir()
    (folder / "resumed" / "checkpoint-2").symlink_to(folder / "fsdp" / "checkpoint-2")

    def run(name: str, *words: str) -> tuple[str, list[str]]:
        start = [str(ROOT / "examples" / "run_pretrain.py"), str(folder / "run.yaml"), "--output_dir"]
        sharded = "false" if name in ("ddp", "float32") else "true"
        return sharded, [*start, str(folder / name), "--use_cpu", "true", *words]

    text_config = {**CONFIG["text_config"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    two_steps = ["--max_steps", "2", "--text_config", json.dumps(text_config)]
    listed = [
        run("ddp"),
        run("fsdp"),
        run("resumed", "--resume_from_checkpoint", "last"),
        run("float32", *two_steps),
        run("bf16", "--bf16", "true", "--gradient_checkpointing", "true", *two_steps),
    ]
    config = ROOT / "examples" / "accelerate" / "fsdp2.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, "--main_process_port", "0", str(folder / "runs.py"), json.dumps(listed)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder


def steps_of(folder: Path) -> list[dict]:
    return [entry for entry in log_of(folder) if "loss" in entry]


def told(folder: Path, rank: int) -> dict:
    """What the process `rank` of a run wrote of itself."""
    return json.loads((folder / f"process-{rank}.json").read_text())


def numbers_of(entry: dict) -> dict:
    """The losses, the norm of the gradient and the temperature of a step."""
    names = ("grad_norm", "similarity_scale")
    return {name: value for name, value in entry.items() if name.startswith("loss") or name in names}


@pytest.mark.slow
def test_a_sharded_run_has_the_losses_the_validation_and_the_weights_of_a_data_parallel_one(runs):
    held, whole = ([told(runs / name, rank)["num_values"] for rank in range(2)] for name in ("fsdp", "ddp"))
    assert whole[0] == whole[1] == sum(held) and max(held) < 0.6 * whole[0]

    assert len(steps_of(runs / "fsdp")) == len(steps_of(runs / "ddp")) == 4
    for sharded, plain in zip(steps_of(runs / "fsdp"), steps_of(runs / "ddp"), strict=True):
        assert numbers_of(sharded) == pytest.approx(numbers_of(plain), rel=1e-5)
    scores = [
        [entry["eval_macro_auroc"] for entry in log_of(runs / name) if "eval_macro_auroc" in entry]
        for name in ("fsdp", "ddp")
    ]
    assert len(scores[0]) == 2 and scores[0] == scores[1]
    for step in (2, 4):
        sharded, plain = (weights(runs / name / f"checkpoint-{step}") for name in ("fsdp", "ddp"))
        assert sharded.keys() == plain.keys()
        for name, values in plain.items():
            assert sharded[name].shape == values.shape and sharded[name].dtype == values.dtype, name
            # a key's bias has no gradient but rounding errors, and Adam makes steps of them
            if not name.endswith(("k_proj.bias", "key.bias")):
                assert (sharded[name] - values).abs().max() < 1e-5, name


@pytest.mark.slow
def test_the_folder_of_a_sharded_run_is_that_of_any_other_and_loads_without_accelerate(runs, tmp_path):
    folder = runs / "fsdp" / "checkpoint"
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (runs / "ddp" / "checkpoint").iterdir())
    for name in names:
        if not name.endswith(".safetensors"):
            assert (folder / name).read_bytes() == (runs / "ddp" / "checkpoint" / name).read_bytes(), name
    best = Path(json.loads((runs / "fsdp" / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert same_bits(weights(folder), weights(best))

    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", CLEAN_PROCESS, str(folder)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scale = weights(folder)["logit_scale"].exp().item()
    first, second = (line.split(" () ") for line in done.stdout.splitlines())
    assert (first[0], second[0]) == ("MMCLIPModel", "MMCLIPForPreTraining")
    assert float(first[1]) == float(second[1]) == pytest.approx(scale)


@pytest.mark.slow
def test_a_sharded_run_that_goes_on_ends_with_the_same_bits_as_one_that_was_never_broken(runs):
    assert same_bits(weights(runs / "resumed" / "checkpoint-4"), weights(runs / "fsdp" / "checkpoint-4"))
    assert [numbers_of(entry) for entry in steps_of(runs / "resumed")] == [
        numbers_of(entry) for entry in steps_of(runs / "fsdp")
    ]


@pytest.mark.slow
def test_bf16_and_gradient_checkpointing_come_near_float32_and_keep_float32_weights(runs):
    for half, full in zip(steps_of(runs / "bf16"), steps_of(runs / "float32"), strict=True):
        assert numbers_of(half) == pytest.approx(numbers_of(full), rel=0.03)
        assert half["loss"] != full["loss"]
    # on a GPU it is autocast that keeps softmax, norms and losses in float32
    assert told(runs / "bf16", 0)["is_autocast"] and not told(runs / "fsdp", 0)["is_autocast"]
    assert {values.dtype for values in weights(runs / "bf16" / "checkpoint").values()} == {torch.float32}


def fake_accelerator(version: int = 2, state_dict_type: str = "FULL_STATE_DICT") -> SimpleNamespace:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type=state_dict_type)
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16")


def test_layers_are_sharded_apart_and_the_embeddings_and_the_temperature_with_the_rest():
    model, accelerator = MMCLIPForPreTraining(tiny_config()), fake_accelerator()
    scale = model.similarity_scale().item()
    prepare_for_sharding(accelerator, model)
    plugin = accelerator.state.fsdp_plugin
    assert plugin.transformer_cls_names_to_wrap == ["BertLayer", "CrossModalLayer", "ViTLayer"]
    assert model.get_input_embeddings() is None
    assert model.logit_scale.shape == (1,) and model.similarity_scale().item() == scale
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert not policy.cast_forward_inputs


def test_the_weights_of_a_tower_with_batch_norms_are_not_gathered_in_bf16():
    shape = {"num_channels": 1, "image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = tiny_config(vision_config={"model_type": "resnet", "layer_type": "basic", **shape})
    accelerator = fake_accelerator()
    prepare_for_sharding(accelerator, MMCLIPForPreTraining(config))
    plugin = accelerator.state.fsdp_plugin
    assert plugin.transformer_cls_names_to_wrap == ["BertLayer", "CrossModalLayer"]
    assert plugin.mixed_precision_policy.param_dtype is None


@pytest.mark.parametrize(("version", "state_dict_type"), [(1, "FULL_STATE_DICT"), (2, "SHARDED_STATE_DICT")])
def test_the_first_fsdp_and_weights_saved_in_shards_are_refused(version, state_dict_type):
    with pytest.raises(ValueError, match=f"FSDP {version} with {state_dict_type}.*fsdp_version: 2"):
        prepare_for_sharding(fake_accelerator(version, state_dict_type), MMCLIPForPreTraining(tiny_config()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_its_configs(path):
    config = load_config_from_file(str(path))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert config.num_processes == 2
    assert not [key for key in {**config.fsdp_config, **config.deepspeed_config} if key not in known]
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.stem]


def test_the_deepspeed_config_shards_gradients_and_moments_and_takes_the_rest_from_the_run():
    (path,) = (path for path in CONFIGS if path.stem == "deepspeed_zero2")
    resolved = DeepSpeedPlugin(**load_config_from_file(str(path)).deepspeed_config).deepspeed_config
    assert resolved["zero_optimization"]["stage"] == 2
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert resolved[key] == "auto", key

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training_trainer import CONFIG, NUM_ROWS, log_of, make_trainer, run, same_bits, weights

from MMCLIP.training import trainer as trainer_module
from MMCLIP.training.recovery import checkpoint_problem, last_whole_checkpoint


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two steps that saved after each."""
    return run(tmp_path_factory.mktemp("whole"), "--max_steps", "2", save_steps=1)[0]


@pytest.fixture
def folder(whole, tmp_path):
    for step in (1, 2):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


# ----------------------------------------------------------------------------------------------------- whole or not


def cut(path: Path, share: float = 0.5):
    os.truncate(path, int(path.stat().st_size * share))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "stopped while it was saving"),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is cut off"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: cut(folder / "model.safetensors", 0.9), "model.safetensors cannot be read"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "no optimiser"),
        (lambda folder: cut(folder / "optimizer.pt", 0.9), "optimizer.pt is cut off"),
        (lambda folder: cut(folder / "rng_state.pth"), "rng_state.pth is cut off"),
    ],
    ids=["no state", "half a state", "no weights", "half of them", "no optimiser", "half of it", "half an rng"],
)
def test_the_newest_whole_checkpoint_is_chosen_and_it_is_said_why_not_a_newer_one(folder, damage, problem, caplog):
    assert last_whole_checkpoint(folder) == folder / "checkpoint-2" and not caplog.records
    damage(folder / "checkpoint-2")
    assert problem in checkpoint_problem(folder / "checkpoint-2")
    assert last_whole_checkpoint(folder) == folder / "checkpoint-1"
    assert "checkpoint-2 is passed over: " in caplog.text and problem in caplog.text


def test_where_no_checkpoint_is_there_is_none(tmp_path):
    (tmp_path / "checkpoint").mkdir()  # the model of a run that has ended, not a place to go on from
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) is None and last_whole_checkpoint(tmp_path / "nothing") is None


def test_steps_are_compared_as_numbers(folder):
    (folder / "checkpoint-2").rename(folder / "checkpoint-10")
    (folder / "checkpoint-1").rename(folder / "checkpoint-9")
    assert last_whole_checkpoint(folder).name == "checkpoint-10"


def test_a_named_checkpoint_that_is_not_whole_is_an_error(folder):
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-2 is no checkpoint to go on from, as it has no trainer_state"):
        run(folder, "--resume_from_checkpoint", str(folder / "checkpoint-2"))


def test_saving_over_a_checkpoint_begins_by_marking_it_as_not_whole(folder, monkeypatch):
    """A run that goes on from step 1 writes step 2 anew; stopped in between, the old state must not vouch for it."""
    seen = []
    original = trainer_module.MMCLIPTrainer.save_model

    def save_model(self, output_dir=None, *args, **kwargs):
        seen.append(checkpoint_problem(output_dir))
        return original(self, output_dir, *args, **kwargs)

    monkeypatch.setattr(trainer_module.MMCLIPTrainer, "save_model", save_model)
    run(folder, "--max_steps", "2", "--resume_from_checkpoint", str(folder / "checkpoint-1"), save_steps=1)
    assert "no trainer_state.json" in seen[0] and checkpoint_problem(folder / "checkpoint-2") is None


# ------------------------------------------------------------------------------------------------ signals and failures


def test_a_signal_saves_after_the_step_and_the_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    steps, compute_loss = [], trainer_module.MMCLIPTrainer.compute_loss

    def stopped_in_the_third(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    unbroken = run(tmp_path / "unbroken", save_strategy="no")[0]
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.MMCLIPTrainer, "compute_loss", stopped_in_the_third)
        folder, _ = run(tmp_path / "stopped", save_strategy="no")
    assert steps == [0, 1, 2] and [path.name for path in folder.glob("checkpoint*")] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "afterwards a signal does what it did before"
    run(folder, "--resume_from_checkpoint", "last", save_strategy="no")
    assert same_bits(weights(folder / "checkpoint"), weights(unbroken / "checkpoint"))
    assert [entry["loss"] for entry in log_of(folder) if "loss" in entry] == [
        entry["loss"] for entry in log_of(unbroken) if "loss" in entry
    ]


def test_a_loss_that_is_nan_stops_the_run_and_names_its_rows_and_the_checkpoint(tmp_path, monkeypatch):
    class Poisoned(trainer_module.MMCLIPTrainer):
        def _batch_for_model(self, inputs, is_training):
            inputs = super()._batch_for_model(inputs, is_training)
            if self.state.global_step == 2:
                inputs["pixel_values"][0, 0, 0, 0] = torch.nan
            return inputs

    import test_training_trainer

    monkeypatch.setattr(test_training_trainer, "RecordingTrainer", type("R", (Poisoned,), {"seen": [], "counts": []}))
    with pytest.raises(ValueError) as error:
        run(tmp_path, save_steps=1)
    message = str(error.value)
    assert "The loss of step 3 is nan (" in message and "contrastive nan" in message
    named = message.partition("lower the learning rate: ")[2].partition(". ")[0].split(", ")
    assert len(set(named)) == CONFIG["per_device_train_batch_size"] and all(name for name in named)
    assert f"The last whole checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "checkpoint-2").values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.visual_projection.weight[0, 0] = torch.inf
    with pytest.raises(
        ValueError, match="weights visual_projection.weight hold NaN or infinity, so they are not saved"
    ):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_disk_that_is_full_ends_the_run_with_a_clear_error_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    save = torch.save

    def full(content, path, *args, **kwargs):
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        return save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-2 cannot be written .*No space left.*last whole checkpoint is .*-1;"):
        run(tmp_path, save_steps=1, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-1"]


# ------------------------------------------------------------------------------------------------------ real processes


def start(folder: Path, *words: str, num_processes: int = 1, **changes) -> subprocess.Popen:
    """run_pretrain.py as a process group of its own, so that a signal reaches all that it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"disable_tqdm": True, **changes}
    (folder / "run.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable]
    if num_processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    script = [str(ROOT / "examples" / "run_pretrain.py"), str(folder / "run.yaml"), "--output_dir", str(folder)]
    return subprocess.Popen(
        [*launch, *script, "--use_cpu", "True", *words],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    return said


def wait_for(path: Path, process: subprocess.Popen):
    start = time.monotonic()
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() - start < 240, f"{path} never came"
        time.sleep(0.005)


def losses(folder: Path) -> list[dict]:
    return [{k: v for k, v in e.items() if k.startswith("loss")} for e in log_of(folder) if "loss" in e]


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "workers"), [(1, 2), (2, 0)])
def test_a_run_that_is_killed_again_and_again_has_the_losses_and_weights_of_one_that_was_not(
    tmp_path, num_processes, workers
):
    changes = {"save_steps": 1, "dataloader_num_workers": workers, "save_total_limit": 2}
    end(start(tmp_path / "unbroken", num_processes=num_processes, **changes))
    broken, said = tmp_path / "broken", ""
    # killed while the model is written, while the optimiser is, and between two steps
    for kill_at in ("checkpoint-1/config.json", "checkpoint-2/model.safetensors", "checkpoint-3/trainer_state.json"):
        process = start(broken, "--resume_from_checkpoint", "last", num_processes=num_processes, **changes)
        wait_for(broken / kill_at, process)
        # torchrun gives each process a group of its own
        for victim in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
            victim.kill()
        said += process.communicate(timeout=60)[0]
    said += end(start(broken, "--resume_from_checkpoint", "last", num_processes=num_processes, **changes))
    assert "going on from" in said
    unbroken = tmp_path / "unbroken"
    found, expected = load_file(broken / "checkpoint/model.safetensors"), weights(unbroken / "checkpoint")
    if num_processes == 1:
        assert losses(broken) == losses(unbroken) and same_bits(found, expected)
    else:
        for one, other in zip(losses(broken), losses(unbroken), strict=True):
            assert one == pytest.approx(other, abs=1e-4)  # the log has four digits
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=0, atol=1e-6)
    assert not list(broken.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "workers"), [(1, 2), (2, 0)])
def test_sigterm_saves_and_exits_cleanly_and_the_run_goes_on(tmp_path, num_processes, workers):
    changes = {"save_strategy": "steps", "save_steps": 1000, "dataloader_num_workers": workers, "max_steps": 400}
    process = start(tmp_path, num_processes=num_processes, logging_steps=1, **changes)
    while "'loss_contrastive'" not in (line := process.stdout.readline()):
        assert line, "it ended before it trained"
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    # torchrun itself says with a traceback that it was told to stop
    assert "stopped by signal 15 after step" in said and said.count("Traceback") == int(num_processes > 1), said
    assert num_processes > 1 or process.returncode == 0
    saved = last_whole_checkpoint(tmp_path)
    step = json.loads((saved / "trainer_state.json").read_text())["global_step"]
    assert 1 <= step < 400 and not (tmp_path / "checkpoint").exists()
    words = ["--resume_from_checkpoint", "last", "--max_steps", str(step + 1)]
    end(start(tmp_path, *words, num_processes=num_processes, **{**changes, "max_steps": -1}))
    assert [entry["step"] for entry in log_of(tmp_path) if "loss" in entry] == list(range(1, step + 2))


@pytest.mark.slow
def test_a_process_that_may_write_no_more_ends_with_a_clear_error_and_a_usable_checkpoint(tmp_path):
    end(start(tmp_path, "--max_steps", "1", save_steps=1))
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    process = start(tmp_path, "--max_steps", "3", "--resume_from_checkpoint", "last", save_steps=1)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "checkpoint-2 cannot be written (" in said
    assert f"The last whole checkpoint is {tmp_path / 'checkpoint-1'}" in said
    assert not (tmp_path / "checkpoint-2").exists()
    end(start(tmp_path, "--max_steps", "3", "--resume_from_checkpoint", "last", save_steps=1))
    assert NUM_ROWS and (tmp_path / "checkpoint-3" / "trainer_state.json").is_file()

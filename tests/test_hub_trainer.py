"""Trainer.push_to_hub: what a run pushes beside its training and at its end, and what it is told before it begins."""

import json
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import READ_TOKEN, STRANGER_TOKEN, FakeHub, connect
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from safetensors.torch import load, load_file
from test_training_trainer import CONFIG, load_script, make_trainer

from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.training.arguments import parse_run_config
from MMCLIP.training.classification_arguments import parse_classification_config
from MMCLIP.training.pushing import PushingTrainer


FINE_TUNING = Path(__file__).parents[1] / "examples" / "configs" / "classification_phantom.yaml"
REPO = "tester/run"
SMALL = {
    "num_phantoms": 8, "num_unpaired_phantoms": 2, "num_validation_phantoms": 20, "max_steps": 2, "save_steps": 1,
    "eval_strategy": "steps", "eval_steps": 2, "validation_labels": ["support device"], "mim_weight": 0,
    "push_to_hub": True, "hub_model_id": REPO,
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs examples/run_pretrain.py with `changes`; returns its folder."""
    about = tmp_path / "about.yaml"
    about.write_text("license: mit\n")

    def start(**changes):
        values = {**CONFIG, **SMALL, "hub_card": str(about), "output_dir": str(tmp_path / "run"), **changes}
        words = []
        for key, value in values.items():
            if value is not None:
                words += [f"--{key}", *([json.dumps(value)] if isinstance(value, dict) else map(str, listed(value)))]
        monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *words])
        load_script().main()
        return tmp_path / "run"

    return start


def listed(value):
    return value if isinstance(value, list) else [value]


def test_a_run_pushes_each_checkpoint_and_its_end_with_our_card_and_without_the_optimizer(run, hub):
    folder = run(hub_always_push=True)
    repository = hub.repos[REPO]
    assert repository.private
    assert repository.messages == ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    first, *_, last = [files for files in repository.commits.values() if "config.json" in files]
    for files in (first, last):
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth")) or "state" in name or "/" in name]
        card = ModelCard(files["README.md"].decode())
        assert "made-up radiographs" in card.text and str(folder) not in str(card)
        assert "generated_from_trainer" not in str(card) and card.data.license == "mit"
    assert first["model.safetensors"] != last["model.safetensors"]
    assert ModelCard(first["README.md"].decode()).data.eval_results is None, "nothing was measured after one step"
    (result,) = ModelCard(last["README.md"].decode()).data.eval_results
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    scored = next(entry["eval_macro_auroc"] for entry in history if "eval_macro_auroc" in entry)
    assert result.metric_value == pytest.approx(scored, abs=1e-4) and result.dataset_split == "validation"
    saved = load_file(folder / "checkpoint" / "model.safetensors")
    pushed = load(last["model.safetensors"])
    assert saved.keys() == pushed.keys() and all(torch.equal(saved[name], pushed[name]) for name in saved)
    assert "2 steps" in last["README.md"].decode() and "| 8 | 8 | 6 |" in last["README.md"].decode()
    assert not list((folder / "hub").iterdir()), "nothing is left of what was pushed"


def test_at_the_end_only_where_that_is_asked_for(run, hub):
    run(hub_strategy="end")
    assert hub.repos[REPO].messages == ["End of training"]


@pytest.mark.parametrize(
    ("changes", "about", "message"),
    [
        ({"hub_strategy": "checkpoint"}, "license: mit", "would put optimizer states and pickles"),
        ({"eval_strategy": "no"}, "license: mit", "needs results for the model card"),
        ({"hub_card": None}, "", "- licence: "),
        ({}, "license: MITT", "does not take the front matter"),
    ],
)
def test_what_is_wrong_is_said_before_training(run, hub, tmp_path, monkeypatch, changes, about, message):
    (tmp_path / "about.yaml").write_text(about)
    monkeypatch.setattr(PushingTrainer, "train", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert hub.repos == {}


def test_a_token_that_may_only_read_and_a_repository_of_something_else_stop_the_run_at_once(run, hub, monkeypatch):
    monkeypatch.setattr(PushingTrainer, "train", lambda *_, **__: pytest.fail("it trains"))
    HfApi().create_repo(REPO, private=True)
    HfApi().create_commit(REPO, [CommitOperationAdd("notes.txt", b"mine")], commit_message="before")
    with pytest.raises(ValueError, match="holds something else already: notes.txt"):
        run()
    hub.repos.clear()
    HfApi().create_repo(REPO, private=False)
    with pytest.raises(ValueError, match="is public: pass --public .in training `hub_private_repo: false`"):
        run()
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(PermissionError, match="may only read"):
        run()


def test_a_push_that_fails_beside_the_training_does_not_end_it(run, hub, monkeypatch, caplog):
    real = PushingTrainer._push_folder

    def broken(self, folder, card, message, **options):
        if "progress" in message:
            raise ConnectionError("no route")
        return real(self, folder, card, message, **options)

    monkeypatch.setattr(PushingTrainer, "_push_folder", broken)
    folder = run()
    assert hub.repos[REPO].messages == ["End of training"] and (folder / "checkpoint" / "config.json").is_file()
    assert "the push failed, and training goes on. no route" in caplog.text
    assert not list((folder / "hub").iterdir()), "weights that the Trainer has deleted would stay on the disk"


def test_a_checkpoint_that_cannot_be_prepared_for_a_push_is_kept_and_training_goes_on(run, hub, monkeypatch, caplog):
    def full(source, target):
        if source.parent.name.startswith("checkpoint-"):
            raise OSError("no space left")

    monkeypatch.setattr("MMCLIP.training.pushing._link", full)
    folder = run()
    assert "checkpoint-1 is not pushed, and training goes on. no space left" in caplog.text
    assert (folder / "checkpoint-1" / "model.safetensors").is_file() and hub.repos[REPO].messages == ["End of training"]


def test_a_repository_that_may_not_be_made_stops_the_run_with_advice(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", STRANGER_TOKEN)
    with pytest.raises(PermissionError, match="may not write to tester/run.*with write permission"):
        run()


def test_a_trainer_of_one_s_own_pushes_beside_what_follows_and_writes_its_card(hub, tmp_path):
    (tmp_path / "about.yaml").write_text("license: mit\ndata: {phantom: {}}\n")
    trainer = make_trainer(tmp_path / "run", hub_model_id=REPO, hub_card=str(tmp_path / "about.yaml"))
    trainer.eval_dataset = phantom_dataset(20, size=32, split="val")
    with pytest.raises(ValueError, match="- results: "):
        trainer.push_to_hub()
    assert not hub.repos[REPO].messages
    score = trainer.evaluate()["eval_macro_auroc"]
    with pytest.raises(ValueError, match="private=False.*would not make tester/run public"):
        trainer.push_to_hub(private=False)
    published = trainer.push_to_hub("By hand", blocking=False, revision="dev").result(timeout=60)
    files = hub.repos[REPO].commits[published.commit]
    assert hub.repos[REPO].messages == ["By hand"] and hub.repos[REPO].branches["dev"] == published.commit
    assert ModelCard(files["README.md"].decode()).data.eval_results[0].metric_value == pytest.approx(score, abs=1e-4)
    trainer.create_model_card()
    written = (tmp_path / "run" / "README.md").read_text()
    assert "made-up radiographs" in written and "| `train_batch_size`" not in written and "## Intended use" in written


def test_fine_tuning_says_that_it_pushes_nothing():
    with pytest.raises(ValueError, match="publish the best of them with examples/push_to_hub.py"):
        parse_classification_config(
            [str(FINE_TUNING), "--output_dir", "o", "--model_name_or_path", "m", "--push_to_hub", "true"]
        )


def test_the_arguments_of_a_push_are_those_of_a_run():
    words = ["--num_phantoms", "1", "--output_dir", "o", "--hub_card", "a.yaml", "--use_cpu", "true"]
    assert parse_run_config(words)[2].hub_card == "a.yaml"

"""Publishing, over HTTP to a Hub on localhost: what goes, what stays, what is refused, and what can be loaded then."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny, tiny_config
from fake_hub import READ_TOKEN, STRANGER_TOKEN, FakeHub, connect
from huggingface_hub import CommitOperationAdd, HfApi, constants
from PIL import Image
from safetensors.torch import load, load_file, save_file

from MMCLIP import MMCLIPForImageClassification, MMCLIPModel, MMCLIPProcessor
from MMCLIP.hub import publishing
from MMCLIP.hub.files import check_weights, collect_files, saved_fingerprint
from MMCLIP.hub.model_card import About
from MMCLIP.hub.preparing import prepare


ROOT = Path(__file__).resolve().parent.parent
REPO = "tester/model"
CODE = {path.name for path in ROOT.glob("*_mmclip.py")}
PUBLISHED = CODE | {
    "README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"
}  # fmt: skip
CLEAN_PROCESS = """
import json, sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

repo_id, revision, picture = sys.argv[1:4]
torch.set_num_threads(1)
options = {"trust_remote_code": True, "revision": revision}
model = AutoModel.from_pretrained(repo_id, **options).eval()
processor = AutoProcessor.from_pretrained(repo_id, **options)
image = np.load(picture)
texts = ["There is edema.", "No edema."]
with torch.no_grad():
    logits = model(**processor(images=[image], text=texts)).logits_per_image
pipe = pipeline(task="zero-shot-image-classification", model=repo_id, **options)
scores = pipe(Image.fromarray(image), candidate_labels=texts, hypothesis_template="{}")
shares = {score["label"]: score["score"] for score in scores}
print("RESULT" + json.dumps([logits.tolist(), shares, type(model).__module__.split(".")[0]]))
"""


def load_script(name: str = "push_to_hub"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run as run_pretrain.py and run_zero_shot.py leave it, with all that must stay where it is."""
    run = tmp_path_factory.mktemp("run")
    folder = save_tiny(run / "checkpoint", training_sources=["phantom"])
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "/home/anna/bert"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoint-5").mkdir()
    for name in ("optimizer.pt", "training_args.bin", "rows.csv", "checkpoint-5/model.safetensors"):
        (folder / name).write_text("patient-7 /data/hospital")
    (folder / "trainer_state.json").write_text('{"global_step": 9, "log_history": [], "trial": "/data/hospital"}')
    counts = {"source": "phantom", "rows": 5, "images": 5, "reports": 4, "patients": 5}
    (run / "training_record.json").write_text(json.dumps({"data": {"train": [counts]}, "recipe": {"seed": 3}}))
    zero_shot = {
        "macro_auroc": 0.875, "macro_auroc_ci": [0.8, 0.9], "macro_average_precision": 0.5, "num_bootstrap": 100,
        "macro_average_precision_ci": None, "per_class": {}, "interval_reason": None,
    }  # fmt: skip
    results = {
        "zero_shot": zero_shot, "weights_hash": saved_fingerprint(folder), "data": "9 phantoms", "command": "python x",
        "dataset": {"sources": ["phantom"], "split": "test"},
    }  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(results))
    return run


@pytest.fixture
def run(made, tmp_path):
    """A copy of `made` that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        yield hub


def publish(run, *words: str, license: str | None = "mit"):
    given = ["--license", license] if license else []
    load_script().main(["--model", str(run / "checkpoint"), "--repo_id", REPO, *given, *words])


def messages(hub) -> list[str]:
    return hub.repos[REPO].messages


# ----------------------------------------------------------------------------------------------------- from end to end


def test_one_command_publishes_and_a_clean_process_loads_it_by_its_tag(run, hub, tmp_path, capsys):
    publish(run, "--tag", "v1", "--message", "First model")
    repository = hub.repos[REPO]
    assert repository.private and messages(hub) == ["First model"]
    assert set(repository.files) == PUBLISHED | {".gitattributes"}
    assert repository.tags == {"v1": repository.branches["main"]}
    told = capsys.readouterr().out
    assert f"{REPO} (private, a new repository), revision main" in told and "revision='v1'" in told
    assert "stays here: checkpoint-5/model.safetensors, optimizer.pt, rows.csv, trainer_state.json" in told

    image = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    np.save(tmp_path / "image.npy", image)
    # main goes on, the tag stays
    HfApi().create_commit(REPO, [CommitOperationAdd("model.safetensors", b"broken")], commit_message="later")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", "import sys; sys.modules['MMCLIP'] = None\n" + CLEAN_PROCESS]
    done = subprocess.run(
        [*command, REPO, "v1", str(tmp_path / "image.npy")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    logits, shares, module = json.loads(done.stdout.split("RESULT")[-1])
    model, processor = (each.from_pretrained(run / "checkpoint") for each in (MMCLIPModel, MMCLIPProcessor))
    with torch.no_grad():
        texts = ["There is edema.", "No edema."]
        expected = model.eval()(**processor(images=[image], text=texts)).logits_per_image
    torch.testing.assert_close(torch.tensor(logits), expected)
    torch.testing.assert_close(torch.tensor([shares[text] for text in texts]), expected.softmax(dim=-1)[0])
    assert module == "transformers_modules"


@pytest.mark.parametrize(
    ("name", "words", "metric", "table"),
    [
        ("run_zero_shot", ["--phantoms", "30"], "macro AUROC (95 % interval", "| edema |"),
        ("run_retrieval", ["--phantoms", "30"], "image to text recall at 5 of 30 (95 % interval", "| chance |"),
        pytest.param(
            "run_evaluation", ["--protocol", "phantom=30", "--evaluations", "zero_shot", "grounding"],
            "heat-map AUROC (95 % interval", "caution: Phantoms are drawn by rules", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_the_results_of_each_evaluation_script_make_a_card(made, tmp_path, monkeypatch, name, words, metric, table):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    checkpoint = made / "checkpoint"
    words = ["--model", str(checkpoint), *words, "--num_bootstrap", "20", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *words])
    load_script(name).main()
    card = prepare(checkpoint, REPO, About(license="mit"), results=[tmp_path]).card
    assert [result for result in card.data.eval_results if result.metric_name.startswith(metric)]
    assert {(result.dataset_type, result.dataset_split) for result in card.data.eval_results} == {("phantom", "test")}
    assert table in card.text and f"python examples/{name}.py --model checkpoint --" in card.text


def test_the_python_in_the_card_runs(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (40, 50), 90).save("xray.png")
    text = prepare(made / "checkpoint", REPO, About(license="mit")).card.text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(code.replace(REPO, str(made / "checkpoint")), {})
    shares = re.findall(r"0\.\d+", capsys.readouterr().out.splitlines()[-1])
    assert len(shares) == 2 and sum(map(float, shares)) == pytest.approx(1, abs=1e-3)


def test_nothing_of_this_machine_and_of_patients_is_in_what_was_published(run, hub):
    publish(run)
    for name, content in hub.repos[REPO].files.items():
        if not name.endswith((".safetensors", ".py", "tokenizer.json")):
            text = content.decode()
            assert "/home" not in text and "patient-7" not in text and str(run) not in text, name
    config = json.loads(hub.repos[REPO].files["config.json"])
    assert "_name_or_path" not in config["text_config"] and config["training_sources"] == ["phantom"]


def test_a_second_push_sends_only_what_changed_and_a_third_nothing(run, hub, capsys):
    publish(run)
    sent = len(hub.uploads)
    assert sent == 3  # weights, tokenizer and the model's code are large here
    record = json.loads((run / "training_record.json").read_text())
    (run / "training_record.json").write_text(json.dumps({**record, "recipe": {"seed": 4}}))
    capsys.readouterr()
    publish(run, "--dry_run")
    table = capsys.readouterr().out.split("The card")[0]
    assert "changed" in next(line for line in table.splitlines() if "README.md" in line)
    assert table.count("unchanged") == len(PUBLISHED) - 1 and "1 files to send" in table
    commits = len(hub.repos[REPO].commits)
    publish(run)
    assert len(hub.uploads) == sent and len(hub.repos[REPO].commits) == commits + 1
    assert "| `seed` | 4 |" in hub.repos[REPO].files["README.md"].decode()
    capsys.readouterr()
    publish(run)
    assert "nothing had changed" in capsys.readouterr().out and len(hub.repos[REPO].commits) == commits + 1


def test_a_dry_run_shows_files_and_card_and_sends_nothing(run, hub, capsys):
    publish(run, "--dry_run")
    told = capsys.readouterr().out
    assert hub.repos == {} and not [line for line in hub.log if not line.startswith("GET") and "validate" not in line]
    size = (run / "checkpoint" / "model.safetensors").stat().st_size
    assert f"new {size:>24,}  model.safetensors" in told and "README.md" in told
    assert told.split("The card, README.md:\n\n")[1].startswith("---\nlanguage: en")


def test_the_card_goes_to_the_endpoint_of_the_push_alone(run, hub, monkeypatch):
    elsewhere = HfApi(endpoint=constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    prepared = prepare(run / "checkpoint", REPO, About(license="mit"))
    plan = publishing.make_plan(elsewhere, REPO, prepared.files, prepared.card)
    assert plan.is_new and [line for line in hub.log if "validate" in line]


def test_a_dry_run_without_network_compares_nothing_and_says_so(run, hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    publish(run, "--dry_run")
    told = capsys.readouterr().out
    assert told.count("not compared") == len(PUBLISHED) + 1 and "cannot be reached" in told


# ------------------------------------------------------------------------------------------------------------- refused


def test_a_card_that_lacks_something_is_refused_before_anything_is_sent(run, hub):
    for name in ("metrics.json", "training_record.json"):
        (run / name).unlink()
    config = json.loads((run / "checkpoint" / "config.json").read_text())
    (run / "checkpoint" / "config.json").write_text(json.dumps({**config, "training_sources": None}))
    with pytest.raises(ValueError, match="(?s)- licence: .*- training data: .*- results: "):
        publish(run, license=None)
    own = run / "own.md"
    own.write_text("---\nlicense: mit\n---\n# Mine\n\n## Training data\n\nPhantoms.\n")
    with pytest.raises(ValueError, match="(?s)- intended use: .*- results: "):
        publish(run, "--card", str(own), license=None)
    assert hub.repos == {}


def test_a_card_of_one_s_own_goes_as_it_is(run, hub, capsys):
    publish(run, "--dry_run")
    own = run / "own.md"
    own.write_text(capsys.readouterr().out.split("README.md:\n\n")[1].replace("# model", "# My own words"))
    publish(run, "--card", str(own), license=None)
    assert "# My own words" in hub.repos[REPO].files["README.md"].decode()


def test_a_fine_tuned_classifier_goes_with_a_card_of_one_s_own_only(run, hub, capsys):
    publish(run, "--dry_run")
    (run / "own.md").write_text(capsys.readouterr().out.split("README.md:\n\n")[1])
    MMCLIPForImageClassification(tiny_config(num_labels=2)).save_pretrained(run / "checkpoint")
    with pytest.raises(ValueError, match="is a fine-tuned classifier, of which no card is made"):
        publish(run)
    publish(run, "--card", str(run / "own.md"), license=None)
    assert "classifier.weight" in load(hub.repos[REPO].files["model.safetensors"])


def test_a_licence_that_the_hub_does_not_know_is_refused_with_its_words(run, hub):
    with pytest.raises(ValueError, match='does not take the front matter.*"license" must be one of'):
        publish(run, license="MITT")
    assert hub.repos == {}


def test_results_of_other_weights_are_refused(run, hub):
    save_tiny(run / "checkpoint", seed=1, training_sources=["phantom"])
    with pytest.raises(ValueError, match="metrics.json was measured on weights"):
        publish(run)


def test_weights_of_restricted_data_become_public_only_when_somebody_says_they_may(run, hub, tmp_path):
    record = {"data": {"train": [{"source": "mimic-cxr", "rows": 1, "images": 1, "reports": 1, "patients": 1}]}}
    (run / "training_record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="Trained on mimic-cxr.*may_share_weights: true"):
        publish(run, "--public")
    publish(run)
    assert hub.repos[REPO].private and "PhysioNet asks" in hub.repos[REPO].files["README.md"].decode()
    hub.repos.clear()
    about = tmp_path / "about.yaml"
    about.write_text("license: mit\nmay_share_weights: true\n")
    publish(run, "--public", "--about", str(about))
    assert not hub.repos[REPO].private
    own = tmp_path / "own.md"
    own.write_bytes(hub.repos[REPO].files["README.md"])
    with_card = ("--public", "--card", str(own))
    with pytest.raises(ValueError, match="Trained on mimic-cxr"):
        publish(run, *with_card, license=None)
    with pytest.raises(ValueError, match="With --card, license of --about must stand in the card itself"):
        publish(run, *with_card, "--about", str(about), license=None)
    about.write_text("may_share_weights: true\n")
    publish(run, *with_card, "--about", str(about), license=None)


def test_a_folder_that_no_run_left_is_refused_as_run_dir(run, hub, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--run_dir .*empty holds none of training_record.json"):
        publish(run, "--run_dir", str(tmp_path / "empty"))


def test_a_public_repository_is_not_pushed_to_unless_asked_for(run, hub):
    HfApi().create_repo(REPO, private=False)
    with pytest.raises(ValueError, match="is public: pass --public"):
        publish(run)
    publish(run, "--public")
    hub.repos[REPO].private = True
    with pytest.raises(ValueError, match="is private: change that in its settings"):
        publish(run, "--public")


@pytest.mark.parametrize("config", [None, {"model_type": "bert"}])
def test_a_repository_with_something_else_is_left_alone_unless_told_otherwise(run, hub, config):
    HfApi().create_repo(REPO, private=True)
    files = {"notes.txt": b"mine"} | ({} if config is None else {"config.json": json.dumps(config).encode()})
    there = [CommitOperationAdd(name, content) for name, content in files.items()]
    HfApi().create_commit(REPO, there, commit_message="before")
    with pytest.raises(ValueError, match="holds something else already: (notes.txt|a model of the type 'bert')"):
        publish(run)
    assert len(messages(hub)) == 1
    publish(run, "--overwrite")
    assert hub.repos[REPO].files["notes.txt"] == b"mine" and PUBLISHED <= set(hub.repos[REPO].files)


def test_an_empty_repository_with_a_readme_may_be_filled(run, hub):
    HfApi().create_repo(REPO, private=True)
    HfApi().create_commit(REPO, [CommitOperationAdd("README.md", b"soon")], commit_message="before")
    publish(run)
    assert messages(hub)[-1] == "Publish MMCLIP"


def test_shards_of_larger_weights_before_go_away_and_files_of_others_stay(run, hub):
    publish(run)
    old = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "plots/roc.png": b"p"}
    HfApi().create_commit(REPO, [CommitOperationAdd(n, c) for n, c in old.items()], commit_message="old")
    publish(run)
    assert set(hub.repos[REPO].files) == PUBLISHED | {".gitattributes", "plots/roc.png"}


def test_a_branch_is_made_and_a_tag_that_stands_elsewhere_is_refused(run, hub):
    publish(run, "--tag", "v1")
    record = json.loads((run / "training_record.json").read_text())
    (run / "training_record.json").write_text(json.dumps({**record, "recipe": {"seed": 4}}))
    with pytest.raises(ValueError, match="has a tag v1 already"):
        publish(run, "--tag", "v1")
    assert len(messages(hub)) == 1
    publish(run, "--revision", "dev", "--tag", "v2")
    repository = hub.repos[REPO]
    assert repository.branches["main"] == repository.tags["v1"]
    assert repository.branches["dev"] == repository.tags["v2"] != repository.tags["v1"]
    publish(run, "--revision", "dev", "--tag", "v2")  # nothing changed, and the tag is there already
    assert len(messages(hub)) == 2


# --------------------------------------------------------------------------------------------------- network and rights


def test_without_network_token_or_right_to_write_the_error_says_what_to_do(run, hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ConnectionError, match="127.0.0.1:9 cannot be reached.*call again"):
            publish(run)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
            publish(run)
    for token, message in (
        (None, "no token of the Hub on this machine. Log in with `hf auth login`"),
        ("hf_nobody", "does not know the token"),
        (READ_TOKEN, "token of tester may only read"),
        (STRANGER_TOKEN, "may not write to tester/model.*rights to create a model"),
    ):
        with monkeypatch.context() as patch:
            patch.delenv("HF_TOKEN") if token is None else patch.setenv("HF_TOKEN", token)
            with pytest.raises(PermissionError, match=message):
                publish(run)
    assert hub.repos == {}


def test_the_command_line_ends_with_one_line_and_a_status(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    words = ["push_to_hub.py", "--model", str(run / "checkpoint"), "--repo_id", REPO, "--license", "mit"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / "push_to_hub.py"), run_name="__main__")
    assert str(ended.value).startswith("PermissionError: The token of tester may only read")


def test_an_interrupted_push_leaves_no_half_model_and_the_next_one_goes_on(run, hub, monkeypatch):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its tries
    real_create = HfApi.create_commit

    def one_by_one(self, *args, **kwargs):
        return real_create(self, *args, **kwargs, num_threads=1)

    monkeypatch.setattr(HfApi, "create_commit", one_by_one)
    hub.fail_after = 1
    with pytest.raises(ConnectionError, match="call again: what has arrived is not sent twice"):
        publish(run)
    assert set(hub.repos[REPO].files) == {".gitattributes"} and len(hub.uploads) == 1
    hub.fail_after = None
    publish(run)
    assert PUBLISHED <= set(hub.repos[REPO].files)
    assert len(hub.uploads) == 3 and len(set(hub.uploads)) == 3, "what had arrived was not sent again"


def test_a_push_of_somebody_else_in_between_is_not_overwritten(run, hub, monkeypatch):
    publish(run)
    real_plan = publishing.make_plan

    def plan_then_other_push(*args, **kwargs):
        plan = real_plan(*args, **kwargs)
        HfApi().create_commit(REPO, [CommitOperationAdd("config.json", b"{}")], commit_message="other")
        return plan

    (run / "training_record.json").write_text('{"data": {"train": []}}')
    script = load_script()
    script.make_plan = plan_then_other_push
    with pytest.raises(RuntimeError, match="Somebody else has pushed"):
        script.main(["--model", str(run / "checkpoint"), "--repo_id", REPO, "--license", "mit"])
    assert messages(hub)[-1] == "other"


# ------------------------------------------------------------------------------------------------------ broken folders


def test_weights_that_are_missing_extra_resized_or_not_finite_are_named(run):
    path = run / "checkpoint" / "model.safetensors"
    weights = load_file(path)
    assert check_weights(run / "checkpoint").model_type == "mmclip"
    del weights["visual_projection.weight"]
    weights["stranger.weight"] = weights["mim_head.mask_token"] = torch.zeros(2)
    weights["text_projection.weight"] = torch.zeros(3, 3)
    weights["logit_scale"] = torch.tensor(float("nan"))
    save_file({name: value.clone() for name, value in weights.items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        check_weights(run / "checkpoint")
    for part in (
        "1 are missing: visual_projection.weight",
        "2 belong to no part of it: mim_head.mask_token, stranger.weight",
        "1 have another size than its config says: text_projection.weight",
        "1 hold NaN or infinity: logit_scale",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json, so it holds no model"),
        ("processor_config.json", None, "has no processor_config.json, so it holds no processor"),
        ("model.safetensors", None, "has no weights"),
        ("image_processing_mmclip.py", None, "lacks the code image_processing_mmclip.py"),
        ("config.json", '{"model_type": "bert"}', "is of the model type 'bert'"),
        ("config.json", "{", "is no JSON"),
        ("processor_config.json", '{"cache": "/home/anna/cache"}', "names /home/anna/cache, a folder of this machine"),
        ("model.safetensors", "half", "the weights cannot be read"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(run, name, content, message):
    path = run / "checkpoint" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        collect_files(run / "checkpoint")
        check_weights(run / "checkpoint")


def test_a_calibration_goes_along_only_with_the_weights_it_was_fitted_for(run, hub):
    calibration = {
        "model": saved_fingerprint(run / "checkpoint"),
        "data": "split val of /data/films.csv",
        "findings": {},
    }
    (run / "calibration.json").write_text(json.dumps({**calibration, "model": "other"}))
    publish(run)
    assert "calibration.json" not in hub.repos[REPO].files
    (run / "calibration.json").write_text(json.dumps(calibration))
    publish(run)
    assert json.loads(hub.repos[REPO].files["calibration.json"])["data"] == "split val of films.csv"
    (run / "own.md").write_bytes(hub.repos[REPO].files["README.md"])
    publish(run, "--card", str(run / "own.md"), license=None)
    assert "calibration.json" in hub.repos[REPO].files, "a card of one's own takes it away"
    (run / "checkpoint" / "calibration.json").write_text(json.dumps({**calibration, "model": "other"}))
    with pytest.raises(ValueError, match="checkpoint/calibration.json was fitted for other weights"):
        publish(run)

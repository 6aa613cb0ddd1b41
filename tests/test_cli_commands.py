"""The command `mmclip`, called as its users do, on made-up films in PNG, 16-bit PNG, JPEG and DICOM."""

import ast
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import save_tiny
from dicom_files import file_bytes, make_dicom
from fake_hub import FakeHub, connect
from huggingface_hub import HfApi
from PIL import Image

from MMCLIP.cli import main
from MMCLIP.data.phantom import make_phantom
from MMCLIP.evaluation.embeddings import model_fingerprint
from MMCLIP.evaluation.probabilities import Calibration, FindingCalibration, hash_prompts
from MMCLIP.evaluation.zero_shot import zero_shot_scores
from MMCLIP.inference.loading import load_model
from MMCLIP.inference.reading import FilmReader
from MMCLIP.text.prompt_sets import prompt_set


ROOT = Path(__file__).resolve().parent.parent
REPORTS = ["Large left pleural effusion.", "Normal chest radiograph.", "The heart is enlarged."]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a folder of five good films in two layers, beside them what is no film, and a table of reports."""
    home = tmp_path_factory.mktemp("home")
    save_tiny(home / "model")
    films = home / "films"
    (films / "ward" / "deep").mkdir(parents=True)
    pixels = [make_phantom(0, index, 96).image for index in range(5)]
    Image.fromarray(pixels[0]).save(films / "a.png")
    Image.fromarray(pixels[1]).save(films / "b.jpg")
    Image.fromarray(pixels[2].astype(np.uint16) * 200).save(films / "ward" / "c.png")
    dicom = make_dicom(pixels[3].astype(np.uint16) * 16, bits=12, PatientName="Doe^Jane", PatientID="4711")
    (films / "ward" / "d.dcm").write_bytes(file_bytes(dicom))
    (films / "ward" / "deep" / "IM0001").write_bytes(file_bytes(make_dicom(pixels[4])))
    (films / "ward" / "notes.txt").write_text("no film")
    (films / ".hidden.png").write_bytes(b"no film")
    (home / "reports.csv").write_text("row_id,text\n" + "".join(f"r{i},{text}\n" for i, text in enumerate(REPORTS)))
    return home


PATHS = ["a.png", "b.jpg", "ward/c.png", "ward/d.dcm", "ward/deep/IM0001"]


@pytest.fixture
def inside(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def mmclip(command: str, *more: str) -> int:
    return main([*command.split(), *more, "--model", "model", "--device", "cpu"])


def read_csv(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_encode_puts_a_mixed_folder_into_one_parquet_file_with_the_embeddings_of_the_model(inside, tmp_path, capsys):
    output = tmp_path / "embeddings.parquet"
    assert mmclip(f"encode films --batch_size 2 --output {output}") == 0
    table = pq.read_table(output)
    assert table.column("path").to_pylist() == [f"films/{path}" for path in PATHS]
    model, processor = load_model("model", device="cpu")
    expected = model.encode([f"films/{path}" for path in PATHS])[0].numpy()
    np.testing.assert_allclose(np.stack(table.column("embedding").to_numpy()), expected, atol=1e-6)
    assert table.schema.field("embedding").type.list_size == 16
    assert set(table.column("model_hash").to_pylist()) == {model_fingerprint(model, processor, with_code=False)}
    assert min(table.column("xray_likeness").to_pylist()) > 0.5
    about = json.loads(pq.read_metadata(output).metadata[b"mmclip"])
    assert about["failed"] == [] and "Not for diagnosis" in about["notice"]
    told = capsys.readouterr().err
    assert "5 of 5 images done; written:" in told and "Research software. Not for diagnosis" in told
    content = output.read_bytes()
    assert b"Doe" not in content and b"4711" not in content  # no name of a patient gets out of a header


def test_encode_says_the_same_in_every_format(inside, tmp_path):
    for suffix in ("csv", "json", "jsonl"):
        assert mmclip(f"encode films --quiet --output {tmp_path / f'e.{suffix}'}") == 0
    as_json = json.loads((tmp_path / "e.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert lines == as_json["rows"] and len(lines) == 5
    rows = read_csv(tmp_path / "e.csv")
    for row, line in zip(rows, lines, strict=True):
        assert row["path"] == line["path"]
        assert [float(row[f"embedding_{place}"]) for place in range(16)] == line["embedding"]
    for suffix in ("csv", "jsonl"):
        assert json.loads((tmp_path / f"e.{suffix}.about.json").read_text()) == as_json["about"]


def test_zero_shot_gives_the_scores_of_the_evaluation_and_the_prompts_behind_them(inside, tmp_path):
    command = ["zero-shot", "films", "--findings", "effusion", "enlarged heart", "--output", str(tmp_path / "s.json")]
    assert main([*command, "--model", "model"]) == 0
    result = json.loads((tmp_path / "s.json").read_text())
    findings = ["pleural effusion", "cardiomegaly"]
    model, processor = load_model("model", device="cpu")
    expected = zero_shot_scores(model, processor, [f"films/{path}" for path in PATHS], findings)
    rows = result["rows"]
    assert [(row["path"], row["finding"]) for row in rows] == [(f"films/{p}", f) for p in PATHS for f in findings]
    np.testing.assert_allclose([row["present"] for row in rows], expected.ravel(), atol=1e-6)
    np.testing.assert_allclose([row["present"] + row["absent"] for row in rows], 1)
    assert all(row["probability"] is None for row in rows)
    prompts = result["about"]["findings"]["pleural effusion"]
    assert "There is pleural effusion." in prompts["present"] and "There is no pleural effusion." in prompts["absent"]
    assert result["about"]["probability"] == "none: no calibration was given"


def test_zero_shot_without_output_is_csv_on_the_screen_and_only_that(inside, capsys):
    assert mmclip("zero-shot films/a.png films/ward", "--findings", "pneumothorax") == 0
    shown = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["path"] for row in shown] == [f"films/{path}" for path in ("a.png", *PATHS[2:])]


def test_zero_shot_asks_a_phrase_of_your_own_and_says_how(inside, tmp_path, capsys):
    output = tmp_path / "s.csv"
    assert mmclip(f"zero-shot films/a.png --output {output}", "--findings", "purple spots") == 0
    assert (
        "'purple spots' is not in the vocabulary; it is asked as 'There are purple spots.'" in capsys.readouterr().err
    )
    about = json.loads((tmp_path / "s.csv.about.json").read_text())
    assert about["findings"]["purple spots"]["absent"] == ["There are no purple spots."]


def test_zero_shot_with_a_prompt_set_without_denials_has_no_score_of_absence(inside, tmp_path):
    assert (
        mmclip(f"zero-shot films/a.png --prompts biovil-rsna --findings pneumonia --output {tmp_path / 's.json'}") == 0
    )
    assert mmclip(f"zero-shot films/a.png --prompts gloria-style --findings edema --output {tmp_path / 'g.json'}") == 0
    (with_denial,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    (without,) = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert with_denial["absent"] is not None and without["absent"] is None


def test_zero_shot_with_a_calibration_gives_the_probability_of_the_finding_that_has_one(inside, tmp_path, capsys):
    model, processor = load_model("model", device="cpu")
    prompts = prompt_set("mmclip")
    fitted = FindingCalibration(slope=2.0, intercept=-1.0, num_present=30, num_absent=30)
    calibration = Calibration(
        model=model_fingerprint(model, processor, with_code=False),
        prompts="mmclip",
        prompts_hash=hash_prompts(prompts, ["edema"]),
        data="made up",
        findings={"edema": fitted},
        left_out={},
    )
    path = calibration.save(tmp_path)
    command = f"zero-shot films/a.png --calibration {path} --output {tmp_path / 's.json'}"
    assert mmclip(command, "--findings", "edema", "pneumothorax") == 0
    result = json.loads((tmp_path / "s.json").read_text())
    edema, pneumothorax = result["rows"]
    margin = np.log(edema["present"] / edema["absent"])
    assert edema["probability"] == pytest.approx(1 / (1 + np.exp(1 - 2 * margin)), abs=1e-6)
    assert pneumothorax["probability"] is None
    findings = result["about"]["findings"]
    assert findings["edema"]["is_calibrated"] and not findings["pneumothorax"]["is_calibrated"]
    assert mmclip(f"{command} --overwrite") == 0  # the findings are those of the calibration
    assert [row["finding"] for row in json.loads((tmp_path / "s.json").read_text())["rows"]] == ["edema"]
    assert mmclip(f"{command} --overwrite --prompts sentence") == 2
    assert "have other words" in capsys.readouterr().err


def test_a_model_of_the_hub_is_taken_at_its_revision(inside, tmp_path, monkeypatch, capsys):
    with FakeHub() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        api = HfApi(endpoint=hub.url)
        api.create_repo("tester/model")
        api.upload_folder(repo_id="tester/model", folder_path="model")
        api.create_tag("tester/model", tag="v1")
        api.upload_file(repo_id="tester/model", path_in_repo="config.json", path_or_fileobj=b"{}")  # main is spoilt
        hub.log.clear()
        command = ["encode", "films/a.png", "--model", "tester/model", "--output"]
        assert main([*command, str(tmp_path / "tagged.json"), "--revision", "v1"]) == 0
        assert main([*command, str(tmp_path / "main.json")]) == 2
        assert "tester/model holds a model of the type None" in capsys.readouterr().err
        assert main([*command, str(tmp_path / "main.json"), "--revision", "v2"]) == 2
        assert "tester/model cannot be loaded: v2 is not a valid" in capsys.readouterr().err
    assert mmclip(f"encode films/a.png --output {tmp_path / 'local.json'}") == 0
    tagged, local = (json.loads((tmp_path / name).read_text()) for name in ("tagged.json", "local.json"))
    assert tagged["about"]["model"]["revision"] == "v1" and tagged["rows"] == local["rows"]
    assert any("model.safetensors" in line for line in hub.log)
    assert not any(".py" in line for line in hub.log)  # no code of the repository was fetched, so none was run


def test_progress_is_shown_on_a_terminal_and_not_in_a_log(inside, tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert mmclip(f"encode films --output {tmp_path / 'a.csv'}") == 0
    assert "image/s" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert mmclip(f"encode films --output {tmp_path / 'b.csv'}") == 0
    assert "5/5" in sys.stderr.getvalue() and "encode: 100%" in sys.stderr.getvalue()


def test_heatmap_writes_a_picture_of_the_size_of_the_film_for_each_finding(inside, tmp_path):
    output = tmp_path / "maps"
    command = f"heatmap films/a.png films/ward/d.dcm --output_dir {output}"
    assert mmclip(command, "--findings", "pleural effusion", "edema") == 0
    rows = read_csv(output / "heatmaps.csv")
    assert len(rows) == 4 and len({row["picture"] for row in rows}) == 4
    for row in rows:
        picture = np.asarray(Image.open(output / row["picture"])).astype(int)
        assert picture.shape == (96, 96, 3)
        assert 0 <= int(row["highest_x"]) < 96 and 0 <= int(row["highest_y"]) < 96
        assert np.ptp(picture, axis=-1).max() > 50  # there is colour on it
    clear = tmp_path / "clear"
    assert mmclip(f"heatmap films/a.png --opacity 0 --findings edema --output_dir {clear}") == 0
    (shown,) = clear.glob("*.png")
    assert (np.asarray(Image.open(shown))[..., 0] == np.asarray(Image.open("films/a.png"))).all()


def test_heat_maps_of_many_findings_are_made_one_by_one(inside, tmp_path, monkeypatch):
    made = []
    real = FilmReader.heatmaps
    monkeypatch.setattr(FilmReader, "heatmaps", lambda self, *a: made.append(real(self, *a).shape) or real(self, *a))
    assert mmclip(f"heatmap films/a.png --output_dir {tmp_path} --findings edema cardiomegaly") == 0
    assert made == [(1, 96, 96)] * 2, "all at once, those of a film of 4,000 px and 16 findings would fill 1 GB"


def test_retrieve_lists_the_nearest_reports_with_their_names(inside, tmp_path):
    output = tmp_path / "nearest.csv"
    assert mmclip(f"retrieve films --reports reports.csv --top 2 --output {output}") == 0
    rows = read_csv(output)
    assert len(rows) == 10
    model, _ = load_model("model", device="cpu")
    images, texts = model.encode([f"films/{path}" for path in PATHS], REPORTS)
    cosines = (images @ texts.T).numpy()
    for number, row in enumerate(rows):
        order = np.argsort(-cosines[number // 2])
        assert row["report_id"].endswith(f"r{order[number % 2]}") and row["report"] == REPORTS[order[number % 2]]
        assert float(row["similarity"]) == pytest.approx(
            cosines[number // 2].max() if number % 2 == 0 else np.sort(cosines[number // 2])[-2], abs=1e-6
        )


def test_bad_images_are_named_and_the_rest_is_done(inside, tmp_path, capsys):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "nothing").mkdir()
    output = tmp_path / "e.json"
    sources = f"{tmp_path / 'films'} films/a.png films/nowhere.png {tmp_path / 'nothing'} films/ward/notes.txt"
    assert mmclip(f"encode {sources} --batch_size 1 --output {output}") == 1
    result = json.loads(output.read_text())
    assert [row["path"] for row in result["rows"]] == ["films/a.png"]
    failed = {entry["path"]: entry["error"] for entry in result["about"]["failed"]}
    assert set(failed) == {
        "films/nowhere.png", "films/ward/notes.txt", str(tmp_path / "nothing"), str(tmp_path / "films" / "broken.png")
    }  # fmt: skip
    assert failed["films/nowhere.png"] == "there is no such file or folder"
    shown = capsys.readouterr().err
    assert all(f"bad: {path}: {reason}" in shown for path, reason in failed.items())
    assert "1 of 3 images done, 4 bad" in shown


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_a_file_name_that_is_no_utf_8_is_written_with_its_bytes(inside, tmp_path, suffix):
    folder = tmp_path / "films"
    folder.mkdir()
    for name, content in ((b"M\xfcller.png", (inside / "films" / "a.png").read_bytes()), (b"\xff.png", b"no film")):
        Path(os.fsdecode(os.fsencode(folder / "x")[:-1] + name)).write_bytes(content)
    table = tmp_path / f"table{suffix}"
    assert mmclip(f"encode {folder} --output {table}") == 1
    assert b"M\\xfcller.png" in table.read_bytes().replace(b"\\\\", b"\\")


def test_a_mistake_of_ours_is_shown_with_its_way_and_is_no_bad_image(inside, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("MMCLIP.cli.commands.load_model", lambda *_: {}["lost"])
    assert mmclip(f"encode films --output {tmp_path / 'x.csv'}") == 2
    assert "Traceback" in capsys.readouterr().err


def test_when_every_image_is_bad_no_table_is_written(inside, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    for name in ("e.csv", "e.parquet"):
        assert mmclip(f"encode {tmp_path / 'broken.png'} --output {tmp_path / name}") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


def test_what_may_be_no_radiograph_is_a_warning_and_is_scored_all_the_same(inside, tmp_path, capsys):
    Image.new("RGB", (200, 200), (200, 30, 30)).save(tmp_path / "red.png")
    assert mmclip(f"encode {tmp_path / 'red.png'} --output {tmp_path / 'e.json'}") == 0
    assert "red.png may be no chest X-ray (likeness 0.02): one even shade" in capsys.readouterr().err
    assert json.loads((tmp_path / "e.json").read_text())["rows"][0]["xray_likeness"] == 0.02
    assert mmclip(f"encode {tmp_path / 'red.png'} --quiet --overwrite --output {tmp_path / 'e.json'}") == 0
    assert capsys.readouterr().err == ""


def test_reports_longer_than_the_text_tower_are_counted_with_their_tokens(inside, tmp_path, capsys):
    (tmp_path / "long.csv").write_text("text\n" + "The lungs are clear. " * 40 + "\nNo effusion.\n")
    assert mmclip(f"retrieve films/a.png --reports {tmp_path / 'long.csv'} --output {tmp_path / 'n.csv'}") == 0
    assert (
        "1 of 2 texts have more than the 64 tokens that the text tower reads, the longest 202"
        in capsys.readouterr().err
    )


MISTAKES = {
    "encode films --output e.txt": "must end with one of .csv",
    "encode films --output there.csv": "there.csv exists. Choose another name, or overwrite it with --overwrite",
    "encode films --output films": "must end with one of",
    "encode empty --output e.csv": "there is no image to read",
    "encode films --output e.csv --model films": "films has no config.json",
    "encode films --output e.csv --model lacking": "weights are missing or of another size, as visual_proj",
    "encode films --output e.csv --device moon": "device: moon cannot be used",
    "zero-shot films --findings no-such:thing... --prompts nothing": "nothing",
    "zero-shot films --findings no": "is a denial",
    "zero-shot films --findings edema --calibration nowhere.json": "nowhere.json",
    "retrieve films --reports nowhere.csv": "nowhere.csv",
    "retrieve films --reports blank.csv": "blank.csv",
    "heatmap films --output_dir maps --findings edema --colours mud": "expected a colour map of Matplotlib",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_in_the_command_ends_with_2_and_says_what_to_do(command, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("films", "model"):
        (tmp_path / name).symlink_to(home / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("old")
    (tmp_path / "blank.csv").write_text("text\n\n")
    if "lacking" in command:
        from safetensors.torch import load_file, save_file

        weights = load_file(save_tiny(tmp_path / "lacking") / "model.safetensors")
        weights.pop("visual_projection.weight")
        save_file(weights, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    model = [] if "--model" in command else ["--model", "model"]
    assert main([*command.split(), *model]) == 2
    assert MISTAKES[command] in capsys.readouterr().err
    assert not (tmp_path / "e.csv").exists() and (tmp_path / "there.csv").read_text() == "old"


@pytest.mark.parametrize("arguments", [[], ["encode", "x.png"], ["encode", "x", "--model", "m", "--batch_size", "0"]])
def test_wrong_options_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: mmclip" in capsys.readouterr().err


def test_overwrite_replaces_the_table(inside, tmp_path):
    (tmp_path / "e.csv").write_text("old")
    assert mmclip(f"encode films/a.png --overwrite --output {tmp_path / 'e.csv'}") == 0
    assert len(read_csv(tmp_path / "e.csv")) == 1


def test_a_full_gpu_ends_with_2_and_advice(inside, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("MMCLIP.modeling_mmclip.MMCLIPModel.encode_image", full)
    assert mmclip(f"encode films --output {tmp_path / 'e.csv'}") == 2
    assert "try a --batch_size below 16, or --device cpu (CUDA out of memory)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_table_is_not_there_when_the_command_is_stopped(inside, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("MMCLIP.cli.commands.overlay", stopped)
    assert mmclip(f"heatmap films --findings edema --output_dir {tmp_path / 'maps'}") == 130
    assert "no table was written" in capsys.readouterr().err and not list((tmp_path / "maps").iterdir())


def test_python_m_mmclip_is_the_command_and_a_closed_pipe_is_no_error(inside):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = (
        f"{sys.executable} -m MMCLIP zero-shot films --findings edema --model model | true; exit ${{PIPESTATUS[0]}}"
    )
    run = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr


# ---------------------------------------------------------------------------------------------------------- the README


@pytest.fixture
def reader(home, tmp_path, monkeypatch):
    """A folder as the reader of the README has it, and the text of the page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    (tmp_path / "outputs" / "demo" / "checkpoint").symlink_to(home / "model")
    (tmp_path / "my_xrays").symlink_to(home / "films")
    Image.open(home / "films" / "a.png").save("xray.png")
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_of_the_readme_run(reader, home):
    (home / "films" / "manifest.csv").write_text((home / "reports.csv").read_text())
    (code,) = re.findall(r"^```bash\n(mmclip .*?)^```", reader, flags=re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for line in code.replace("\\\n", " ").splitlines()]
    assert [command[1] for command in commands] == ["encode", "zero-shot", "heatmap", "retrieve"]
    for command in commands:
        assert main(command[1:]) == 0, command
    assert len(pq.read_table("outputs/embeddings.parquet")) == 5 and len(read_csv("outputs/scores.csv")) == 10
    assert len(read_csv("outputs/maps/heatmaps.csv")) == 1
    assert len(json.loads(open("outputs/nearest.json").read())["rows"]) == 15


def test_a_saved_folder_gives_first_scores_in_at_most_12_lines(reader, capsys):
    codes = re.findall(r"^```python\n(.*?)^```", reader, flags=re.DOTALL | re.MULTILINE)
    (code,) = [code for code in codes if "load_model(" in code]
    assert len(code.splitlines()) <= 12
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # by itself: nothing of the page before it is needed
    shown = ast.literal_eval(capsys.readouterr().out)
    assert list(shown) == ["pleural effusion", "cardiomegaly", "pneumothorax"]
    assert all(0 < score < 1 for score in shown.values())

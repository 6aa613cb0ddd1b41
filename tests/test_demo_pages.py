"""What the demo shows and keeps: nothing unescaped, no stack trace, no certainty, no upload on disk."""

import importlib.util
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tiny
from PIL import Image

from MMCLIP.data.phantom import make_phantom
from MMCLIP.demo import pages
from MMCLIP.demo.interface import Demo, build_page, remove_old, take_upload
from MMCLIP.evaluation.probabilities import Calibration, FindingCalibration
from MMCLIP.inference.loading import load_model
from MMCLIP.inference.reading import MAX_FINDINGS, FilmReader, Finding, Score
from MMCLIP.text.prompt_sets import prompt_set


LINE = FindingCalibration(1.0, 0.0, 30, 40, 100, 0.25, 0.031, 0.2, 0.1)
CALIBRATION = Calibration("", "sentence", "", "split val of <a>", {"edema": LINE}, {})
EDEMA = Finding("edema", ("There is edema.", "Edema."), ("There is no edema.", "No edema."), True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    model, processor = load_model(save_tiny(tmp_path_factory.mktemp("model")), device="cpu")
    return Demo(FilmReader(model, processor, prompt_set("sentence"), reports=["A <b>bold</b> report.", "Clear lungs."]))


@pytest.fixture
def upload(tmp_path):
    path = tmp_path / "0123" / "film <i>.png"
    path.parent.mkdir()
    Image.fromarray(make_phantom(seed=0, index=0, size=96).image).save(path)
    return path


def test_a_calibrated_finding_shows_both_probabilities_the_prompts_and_the_fit():
    page = pages.scores_page([Score(EDEMA, 0.99, 0.3, LINE)], CALIBRATION)
    text = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "edema present 30 % absent 70 %" in text and "not calibrated" not in text
    assert "“There is edema.” against “There is no edema.” and 1 more pair" in text
    assert "Present There is edema. Edema. Absent There is no edema. No edema." in text
    assert "30 images with and 40 without" in text and "Tested on 100 others, 25 % of them with it" in text
    assert "calibration error 0.031, without the fit 0.200" in text and "error was 3.1 points" in text
    assert 'style="width:30.0%"' in page and "split val of &lt;a&gt;" in page


def test_without_calibration_there_is_a_score_that_says_so_and_no_per_cent():
    page = pages.scores_page([Score(EDEMA, 0.99, None, None)], None)
    text = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "edema 0.99 score, not calibrated" in text and "is no probability" in text and "%" not in text


@pytest.mark.parametrize(
    "value, shown", [(0.0, "&lt; 1 %"), (0.004, "&lt; 1 %"), (0.006, "1 %"), (0.5, "50 %"), (0.996, "&gt; 99 %")]
)
def test_no_probability_is_shown_as_a_certainty(value, shown):
    assert pages.percent(value) == shown


def test_a_heat_map_is_clear_where_it_is_lowest_and_strongest_where_it_is_highest():
    heatmap = np.full((40, 80), 0.1, np.float32)
    heatmap[:10, 60:] = 0.4
    picture = np.asarray(pages.heat_picture(heatmap))
    assert picture.shape == (128, 256, 4)
    assert picture[100, 20, 3] == 0 and picture[5, 250, 3] == 255
    assert picture[5, 250, :3].sum() > 600 > 100 > picture[100, 20, :3].sum()  # inferno: light yellow, black
    assert not np.asarray(pages.heat_picture(np.ones((8, 8), np.float32)))[..., 3].any()


def test_what_comes_from_a_file_or_a_user_is_escaped(demo, upload):
    _, film, film_page, scores, maps, reports = demo.upload(str(upload), ["<script>alert(1)</script>", "edema"])
    assert film.name == "film <i>.png" and "film &lt;i&gt;.png" in film_page
    for page in (film_page, scores, maps, reports):
        assert "<script" not in page and "<i>." not in page and "<b>bold" not in page
    assert "&lt;script&gt;" in scores and "A &lt;b&gt;bold&lt;/b&gt; report." in reports


def test_an_upload_is_read_and_gone(demo, upload):
    cleared, film, film_page, scores, maps, reports = demo.upload(str(upload), ["edema", "Edema.", "mass"])
    assert cleared is None and not upload.exists()
    assert film.size == (96, 96) and "96 x 96 pixels" in film_page
    assert re.findall('data-finding="([^"]+)"', scores) == ["edema", "mass"]  # each once
    assert maps.count("mm-heat") == 2 and maps.count("--mm-film") == 1  # the film is sent once for all maps
    assert reports.count("similarity") == 2


def test_a_bad_file_gives_a_message_clears_the_page_and_is_gone(demo, tmp_path):
    path = tmp_path / "notes.pdf"
    path.write_bytes(b"%PDF-1.4")
    cleared, film, film_page, scores, maps, reports = demo.upload(str(path), ["edema"])
    assert cleared is None and film is None and film_page == maps == reports == "" and not path.exists()
    assert 'role="alert"' in scores and "notes.pdf: expected an image file" in scores
    assert str(tmp_path) not in scores and "Traceback" not in scores
    assert "the upload is gone" in demo.upload(str(path), ["edema"])[3]


def test_findings_that_cannot_be_asked_are_told_beside_the_others(demo, upload):
    film = demo.upload(str(upload), [])[1]
    scores, maps = demo.ask(film, ["no edema", "mass"])
    assert "is a denial" in scores and 'data-finding="mass"' in scores and maps.count("mm-heat") == 1
    many = [f"thing {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    scores, maps = demo.ask(film, many)
    assert scores.count("data-finding") == maps.count("mm-heat") == MAX_FINDINGS
    assert f"26 findings are too many: the first {MAX_FINDINGS} are shown" in scores
    assert demo.ask(film, []) == ('<p class="mm-hint">Choose or type a finding.</p>', "")
    assert demo.ask(None, ["mass"]) == (pages.empty(), "")


def test_a_picture_that_is_no_radiograph_gets_a_warning_and_scores(demo, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "holiday.jpg"
    colours = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((640, 480), Image.Resampling.BICUBIC).save(path)
    _, film, _, scores, _, _ = demo.upload(str(path), ["edema"])
    assert "may be no frontal chest radiograph" in scores and "colours in" in scores
    assert 'data-finding="edema"' in scores
    assert "may be no frontal chest radiograph" in demo.ask(film, ["mass"])[0]  # it stays


def test_the_made_up_radiograph_passes_for_one(demo):
    film, _, scores, *_ = demo.example(["edema"])
    assert film.name == "a made-up radiograph" and "may be no frontal" not in scores and "data-finding" in scores


def test_old_files_below_the_folder_of_uploads_are_removed_and_new_ones_stay(tmp_path):
    for name, age in (("a/old.dcm", 500), ("b/new.dcm", 1)):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(b"x")
        for touched in (path, path.parent):
            os.utime(touched, (time.time() - age, time.time() - age))
    remove_old(tmp_path, 120)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "b", "new.dcm"]  # "a" was just changed
    os.utime(tmp_path / "a", (0, 0))
    remove_old(tmp_path, 120)
    assert not (tmp_path / "a").exists() and (tmp_path / "b" / "new.dcm").exists()


def test_an_upload_that_cannot_be_read_is_removed_all_the_same(tmp_path, monkeypatch):
    path = tmp_path / "film.png"
    path.write_bytes(b"x")
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(PermissionError):
        take_upload(str(path))
    assert not path.exists()


def test_every_event_that_asks_the_model_waits_its_turn_and_is_no_public_interface(demo):
    pytest.importorskip("gradio")
    page = build_page(demo.reader, "a model")
    asking = [event for event in page.fns.values() if event.fn is not None]
    assert {event.fn.__name__ for event in asking} == {"upload", "example", "ask", "forget"}
    for event in asking:
        if event.fn.__name__ == "forget":
            continue
        assert (event.concurrency_id, event.concurrency_limit, event.api_visibility) == ("model", 1, "private")
    assert page.analytics_enabled is False


@pytest.fixture
def app():
    path = Path(__file__).parent.parent / "examples" / "app.py"
    spec = importlib.util.spec_from_file_location("app", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wrong_start_says_what_is_wrong_before_anything_is_served(app, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MMCLIP_MODEL", raising=False)
    with pytest.raises(SystemExit):
        app.parse_arguments([])
    assert "--model is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        app.parse_arguments(["--model", "m", "--max_upload_mb", "0"])
    monkeypatch.setenv("MMCLIP_MODEL", "OWNER/NAME")
    assert app.parse_arguments([]).model == "OWNER/NAME"
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(app, "launch", lambda *_, **__: pytest.fail("it was served"))
    for options, message in (
        (["--model", tmp_path], "no config.json"),
        (["--prompts", "mien"], "no prompts 'mien'"),
        (["--calibration", tmp_path / "none.json"], "none.json: the calibration cannot be read"),
        (["--reports", tmp_path / "none.csv"], "none.csv"),
    ):
        with pytest.raises(ValueError, match=message):
            app.main([str(option) for option in options])


def test_embeddings_of_reports_are_kept_for_the_next_start(app, tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "reports.csv").write_text("text\nNo effusion.\nClear lungs.\n")
    options = ["--model", tmp_path / "model", "--reports", tmp_path / "reports.csv", "--cache_dir", tmp_path / "kept"]
    args = app.parse_arguments([str(option) for option in options])
    first = app.make_reader(args).report_embeds
    assert len(list((tmp_path / "kept").iterdir())) == 1 and first.shape == (2, 16)
    assert (app.make_reader(args).report_embeds == first).all()

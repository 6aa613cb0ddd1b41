"""What demo and command line ask of the model: the same numbers as the evaluation, from one pass of the image tower."""

import io

import numpy as np
import pytest
from conftest import save_tiny
from dicom_files import make_dicom
from PIL import Image

from MMCLIP.data.phantom import make_phantom, phantom_dataset
from MMCLIP.evaluation.grounding import sentence_heatmaps
from MMCLIP.evaluation.probabilities import fit_calibration
from MMCLIP.evaluation.zero_shot import zero_shot_scores
from MMCLIP.inference.loading import load_model
from MMCLIP.inference.reading import FilmReader, known_findings, parse_finding, read_report_ids
from MMCLIP.text.prompt_sets import prompt_set
from MMCLIP.text.prompts import negative_prompts, positive_prompts
from MMCLIP.text.vocabulary import vocabulary


REPORTS = ["There is a pleural effusion.", "The heart is enlarged.", "Normal chest radiograph.", "No pneumothorax."]
SENTENCE = prompt_set("sentence")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(save_tiny(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture
def reader(loaded):
    return FilmReader(*loaded, prompt_set("mmclip"), reports=REPORTS)


@pytest.fixture(scope="module")
def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(make_phantom(seed=0, index=0, size=96).image[:80]).save(stream, "PNG")
    return stream.getvalue()


def asked(reader, *names):
    return [parse_finding(name, reader.prompts) for name in names]


@pytest.mark.parametrize("prompts", ["mmclip", "sentence", "mmclip-attributes"])
def test_scores_are_those_of_the_evaluation(loaded, png, prompts):
    reader, labels = FilmReader(*loaded, prompt_set(prompts)), ["pleural effusion", "cardiomegaly"]
    scores = [score.score for score in reader.score(reader.read(png, "a.png"), asked(reader, *labels))]
    assert scores == pytest.approx(zero_shot_scores(*loaded, [png], labels, prompts=prompts)[0], abs=1e-6)


def test_heat_maps_are_those_of_the_sentence_against_its_denial(loaded, reader, png):
    film = reader.read(png, "a.png")
    heatmaps = reader.heatmaps(film, asked(reader, "effusion", "green cheese"))
    texts = positive_prompts("pleural effusion")[:1], negative_prompts("pleural effusion")[:1]
    np.testing.assert_allclose(heatmaps[0], sentence_heatmaps(*loaded, png, *texts)[0], atol=1e-6)
    texts = ["There is green cheese."], ["There is no green cheese."]
    np.testing.assert_allclose(heatmaps[1], sentence_heatmaps(*loaded, png, *texts)[0], atol=1e-6)
    assert reader.heatmaps(film, []).shape == (0, *film.picture.size[::-1])


def test_the_image_tower_runs_once_for_a_film_whatever_is_asked(reader, png):
    calls = []
    handle = reader.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        film = reader.read(png, "a.png")
        for names in (["edema"], ["edema", "mass"], ["something new"]):
            reader.score(film, asked(reader, *names))
            reader.heatmaps(film, asked(reader, *names))
        reader.nearest_reports(film)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_texts_of_a_finding_are_encoded_once(reader, png):
    film, calls = reader.read(png, "a.png"), []
    reader.warm_up()
    handle = reader.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        reader.score(film, asked(reader, *reader.suggestions()))
        assert not calls
        reader.score(film, asked(reader, "scoliosis"))
        first = len(calls)
        reader.heatmaps(film, asked(reader, "scoliosis"))
        assert first == len(calls) > 0
    finally:
        handle.remove()


def test_a_calibrated_finding_has_a_probability_and_another_a_score(loaded, png):
    rows = phantom_dataset(40, size=32, split="val")
    calibration = fit_calibration(*loaded, rows, ["cardiomegaly"], SENTENCE, data="phantoms", min_images=3)
    reader = FilmReader(*loaded, SENTENCE, calibration)
    first, second = reader.score(reader.read(png, "a"), asked(reader, "cardiomegaly", "edema"))
    line = calibration.findings["cardiomegaly"]
    margin = np.log(first.score / (1 - first.score))
    assert first.probability == pytest.approx(float(line.probability(margin)), abs=1e-6)
    assert first.calibration == line and second.probability is None and second.calibration is None
    assert reader.suggestions() == ["cardiomegaly"]
    with pytest.raises(ValueError, match="fitted with the prompts 'sentence'"):
        FilmReader(*loaded, prompt_set("mmclip"), calibration)


def test_the_nearest_reports_come_by_similarity(reader, png):
    film = reader.read(png, "a.png")
    similarities = dict(zip(REPORTS, (film.embeds.double() @ reader.report_embeds.double().T)[0].tolist(), strict=True))
    found = reader.nearest_reports(film, 3)
    assert [text for text, _ in found] == sorted(REPORTS, key=similarities.get, reverse=True)[:3]
    assert [value for _, value in found] == pytest.approx([similarities[text] for text, _ in found])


def test_dicom_16_bit_and_large_films_are_read_alike(reader):
    pixels = make_phantom(seed=0, index=1, size=96).image
    deep = (pixels.astype(np.uint16) << 4) + 5
    dicom, deep_png, large = io.BytesIO(), io.BytesIO(), io.BytesIO()
    make_dicom(deep, bits=12, WindowCenter=2048.5, WindowWidth=4096).save_as(dicom, enforce_file_format=True)
    Image.fromarray(deep).save(deep_png, "PNG")
    Image.fromarray(pixels).resize((1500, 1500)).save(large, "PNG")
    embeds = [reader.read(stream.getvalue(), "film").embeds[0] for stream in (dicom, deep_png, large)]
    plain = reader.read(pixels, "film")
    assert plain.size == (96, 96)
    for one in embeds:
        assert float(one @ plain.embeds[0]) > 0.99
    assert max(reader.read(large.getvalue(), "film").picture.size) == 768


def test_what_is_no_image_is_named(reader):
    with pytest.raises(ValueError, match="^notes.pdf: expected an image file, but"):
        reader.read(b"%PDF-1.4 not an image", "notes.pdf")


# ----------------------------------------------------------------------------------------------------------- findings


def test_any_spelling_of_a_label_and_sentences_about_it_are_the_label():
    for text in ("Effusion", "pleural effusion", " Pleural  Effusion. ", "There is a pleural effusion."):
        finding = parse_finding(text, SENTENCE)
        assert (finding.name, finding.is_known) == ("pleural effusion", True)
        assert (finding.positive, finding.negative) == SENTENCE.prompts["pleural effusion"]
    assert parse_finding("no finding", SENTENCE).name == "no finding"


def test_a_phrase_of_ones_own_gets_a_sentence_and_its_denial():
    finding = parse_finding("There are sternal sutures of steel.", SENTENCE)
    assert finding == (
        "sternal sutures of steel",
        ("There are sternal sutures of steel.",),
        ("There are no sternal sutures of steel.",),
        False,
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("  ", "holds no word"),
        ("12 %", "holds no word"),
        ("no effusion", "is a denial"),
        ("There is no effusion.", "is a denial"),
        ("a very long phrase " * 5, "letters. Type a phrase of at most 80"),
    ],
)
def test_what_cannot_be_asked_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        parse_finding(text, SENTENCE)


def test_a_word_that_begins_like_a_denial_is_none():
    assert parse_finding("nodule", SENTENCE).name == "nodule"


def test_every_label_of_the_vocabulary_can_be_asked():
    names = known_findings(prompt_set("mmclip"))
    assert len(names) > 400 and set(names) <= set(vocabulary())
    assert [parse_finding(name, SENTENCE).name for name in names] == names
    assert set(known_findings(prompt_set("biovil-rsna"))) == {"pneumonia"}


def test_reports_are_read_once_each_from_a_table(tmp_path, caplog):
    table = tmp_path / "reports.csv"
    table.write_text("text\nNo effusion.\n The  heart is large.\nNo effusion.\n")
    assert list(read_report_ids(str(table))) == ["No effusion.", "The heart is large."]
    table.write_text("text,row_id\nNo effusion.,a\n,b\n")
    assert read_report_ids(str(table)) == {"No effusion.": "a"}
    assert "left out 1 rows of" in caplog.text and "line 3: the row has neither an image nor a text" in caplog.text
    table.write_text("file,labels\nmissing.png,edema\n")  # images are not looked for
    with pytest.raises(ValueError, match="reports.csv: none of 1 rows has a report"):
        read_report_ids(str(table))

import io
import time

import numpy as np
import pytest
import torch
from dicom_files import file_bytes, make_dicom
from MMCLIP.image_processing_mmclip import load_unrounded
from PIL import Image, ImageDraw, ImageFilter

from MMCLIP.data.phantom import make_phantom
from MMCLIP.data.plausibility import xray_likeness


def photograph(seed: int, size: int = 320) -> Image.Image:
    """A landscape: sky over hills over a meadow, a house, a soft lens."""
    random = np.random.default_rng(seed)
    picture = Image.new("RGB", (size, size), (120, 170, 230))
    draw = ImageDraw.Draw(picture)
    for color, base in (((70, 100, 60), 0.45), ((110, 140, 70), 0.65)):
        ridge = size * (base + 0.05 * np.cumsum(random.normal(size=9)) / 2)
        line = [(size * place / 8, height) for place, height in enumerate(ridge)]
        draw.polygon([(0, size), *line, (size, size)], fill=color)
    left, top = random.integers(size // 8, size // 2, 2)
    draw.rectangle((left, top, left + size // 4, top + size // 4), fill=(190, 60, 40))
    noise = Image.fromarray(random.integers(0, 30, (size, size, 3), dtype=np.uint8))
    return Image.blend(picture.filter(ImageFilter.GaussianBlur(1)), noise, 0.1)


def screenshot(dark: bool) -> Image.Image:
    page, ink = ((40, 40, 40), (220, 220, 220)) if dark else ((255, 255, 255), (20, 20, 20))
    picture = Image.new("RGB", (600, 500), page)
    draw = ImageDraw.Draw(picture)
    for line in range(12):
        draw.text((40, 40 + 30 * line), "PatientView  list of studies and a few words", fill=ink)
    return picture


def film(index: int, size: int = 256) -> Image.Image:
    return Image.fromarray(make_phantom(0, index, size).image)


def test_made_up_radiographs_are_believed():
    scores = [xray_likeness(film(index, 128)).score for index in range(30)]
    assert min(scores) > 0.3 and np.quantile(scores, 0.1) > 0.8 and np.median(scores) == 1
    assert xray_likeness(film(1)).reasons == []


@pytest.mark.parametrize("seed", range(5))
def test_photographs_are_doubted_by_their_colours_and_marked_down_in_grey(seed):
    in_colour, in_grey = xray_likeness(photograph(seed)), xray_likeness(photograph(seed).convert("L"))
    assert in_colour.is_doubtful and any("colours in" in reason for reason in in_colour.reasons)
    assert in_grey.score < 0.8 and in_grey.reasons == ["no dark lung fields beside a brighter middle"]
    assert in_colour.score < 0.2


@pytest.mark.parametrize("dark", [False, True])
def test_screenshots_are_doubted_as_pages(dark):
    likeness = xray_likeness(screenshot(dark))
    assert likeness.score < 0.2 and "exactly one shade" in " ".join(likeness.reasons)


def test_noise_is_doubted_as_noise():
    noise = np.random.default_rng(0).integers(0, 256, (600, 600), dtype=np.uint8)
    assert "as in noise" in " ".join(xray_likeness(noise).reasons) and xray_likeness(noise).score < 0.2


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_a_blank_picture_has_one_reason_and_nearly_no_score(shade):
    likeness = xray_likeness(np.full((300, 300), shade, np.uint8))
    assert likeness.score <= 0.02 and likeness.reasons == ["one even shade, there is nothing on it"]


def test_one_rule_after_the_other_is_broken_by_one_change_of_a_film():
    base = film(1)
    changes = {
        "one side is 3.0 times": base.resize((768, 256)),
        "only 24 x 24": base.resize((24, 24)),
        "hardly any contrast": base.point(lambda level: 100 + level // 32),
        "may be inverted": base.point(lambda level: 255 - level),
        "no dark lung fields": base.transpose(Image.Transpose.ROTATE_90),
    }
    for words, changed in changes.items():
        likeness = xray_likeness(changed)
        assert words in " ".join(likeness.reasons), (words, likeness)
        assert likeness.score < 0.8, (words, likeness)


def test_a_tinted_film_is_no_colour_picture_but_a_painted_one_is():
    gray = np.asarray(film(1)).astype(np.float32)[..., None]
    tinted = np.clip(gray * np.array([0.75, 0.9, 1.0]), 0, 255).astype(np.uint8)
    assert xray_likeness(tinted).score == 1
    painted = tinted.copy()
    painted[40:200, 40:200, 0] = 255
    assert "colours in" in xray_likeness(painted).reasons[0]


def test_the_form_of_the_picture_does_not_matter(tmp_path):
    picture = photograph(0)
    picture.save(tmp_path / "photo.png")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    array = np.asarray(picture)
    forms = (
        picture, array, tmp_path / "photo.png", str(tmp_path / "photo.png"), buffer.getvalue(),
        {"bytes": buffer.getvalue(), "path": None}, array.astype(np.float32) / 255,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    )  # fmt: skip
    scores = [xray_likeness(form).score for form in forms]
    np.testing.assert_allclose(scores, scores[0], rtol=0.2)  # floats keep what 8 bits round


def test_16_bit_and_dicom_films_are_believed(tmp_path):
    deep = np.asarray(film(1)).astype(np.uint16) * 16
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert xray_likeness(tmp_path / "deep.png").score == 1
    dicom = make_dicom(deep, bits=12)
    (tmp_path / "film.dcm").write_bytes(file_bytes(dicom))
    assert xray_likeness(tmp_path / "film.dcm").score == xray_likeness(dicom).score == 1


def test_a_picture_that_is_read_already_gives_the_same_answer(tmp_path):
    photograph(0).save(tmp_path / "photo.png")
    Image.fromarray(np.asarray(film(1)).astype(np.uint16) * 16).save(tmp_path / "deep.png")
    (tmp_path / "film.dcm").write_bytes(file_bytes(make_dicom(np.asarray(film(1)), Modality="MG")))
    for name in ("photo.png", "deep.png", "film.dcm"):
        path = tmp_path / name
        assert xray_likeness(path, load_unrounded(path)) == xray_likeness(path), name


def test_a_dicom_header_may_say_that_it_is_no_radiograph_of_a_chest(tmp_path):
    pixels = np.asarray(film(1))

    def judged(**header):
        dicom = make_dicom(pixels, PatientName="Doe^Jane", **header)
        (tmp_path / "film").write_bytes(file_bytes(dicom))
        found = xray_likeness(tmp_path / "film")
        assert found == xray_likeness(dicom) == xray_likeness((tmp_path / "film").read_bytes())
        assert not any("Doe" in reason for reason in found.reasons)
        return found

    assert judged(Modality="DX", BodyPartExamined="PORT CHEST").score == 1
    assert judged(Modality=None, BodyPartExamined="").score == 1
    mammogram = judged(Modality="MG", BodyPartExamined="BREAST")
    assert mammogram.reasons == [
        "its DICOM header says the modality MG", "its DICOM header says the body part BREAST"
    ]  # fmt: skip
    assert mammogram.score == pytest.approx(0.06)
    assert judged(Modality="CR", BodyPartExamined="HAND").reasons == ["its DICOM header says the body part HAND"]


def test_an_unreadable_file_is_the_error_of_the_reader(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png: expected an image file"):
        xray_likeness(tmp_path / "text.png")
    with pytest.raises(ValueError, match="there is no such image file"):
        xray_likeness(tmp_path / "nowhere.png")


@pytest.mark.slow
def test_a_film_of_2500_pixels_takes_less_than_20_ms():
    large = film(1).resize((2500, 2500))
    for image in (large, large.convert("RGB"), np.asarray(large)):
        times = []
        for _ in range(9):
            start = time.perf_counter()
            xray_likeness(image)
            times.append(time.perf_counter() - start)
        assert min(times) < 0.02  # of a quiet moment: the machine may be shared


def test_tensors_of_any_kind_and_bytes_of_any_kind_are_judged_by_their_colours():
    colours = np.zeros((3, 64, 64), np.uint8)
    colours[0, :32], colours[1, 32:] = 200, 200
    plain = xray_likeness(colours)
    assert any("colours" in reason for reason in plain.reasons)
    shares = torch.tensor(colours / 255, requires_grad=True)
    file = io.BytesIO()
    Image.fromarray(colours.transpose(1, 2, 0)).save(file, "PNG")
    for image in (torch.tensor(colours), shares, shares.bfloat16(), bytearray(file.getvalue()), file.getbuffer()):
        assert any("colours" in reason for reason in xray_likeness(image).reasons), type(image)

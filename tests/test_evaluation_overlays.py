import io

import numpy as np
import pytest
import torch
from conftest import tiny_config
from matplotlib import colormaps
from MMCLIP.modeling_mmclip import MMCLIPModel
from MMCLIP.processing_mmclip import MMCLIPImageProcessor
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutputWithPooling

from MMCLIP.data.manifest import make_row, rows_to_dataset
from MMCLIP.evaluation.grounding import evaluate_grounding, sentence_heatmaps
from MMCLIP.evaluation.overlays import OUTLINE, file_name, overlay, save_overlays


def to_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


class BrightModel(MMCLIPModel):
    """Every sentence points at bright patches, every denial at dark ones; 4 x 4 patches of 8 pixels."""

    def __init__(self):
        super().__init__(tiny_config())
        self.visual_projection = self.text_projection = nn.Identity()

    def encode_image(self, pixel_values):
        brightness = F.avg_pool2d((pixel_values + 2) / 4, 8).flatten(2).transpose(1, 2)  # (B, 16, 1), 0 to 1
        return None, F.pad(torch.cat([brightness, 1 - brightness], dim=-1), (0, 14)), None

    def encode_text(self, input_ids, attention_mask):
        return torch.eye(16)[input_ids[:, 0]], None, None

    def get_text_features(self, input_ids, attention_mask):
        return BaseModelOutputWithPooling(pooler_output=self.encode_text(input_ids, attention_mask)[0])


class DenialProcessor:
    """The real image processor; a text is 1 for a denial and 0 otherwise."""

    def __init__(self):
        self.image_processor = MMCLIPImageProcessor(size=32)
        self.resize_heatmap = self.image_processor.resize_heatmap

    def __call__(self, text, return_tensors):
        ids = torch.tensor([[int(" no " in one)] for one in text])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.fixture
def bright():
    torch.manual_seed(0)
    return BrightModel(), DenialProcessor()


# A film of 64 x 128 becomes 16 x 32 of the 32 x 32 pixels that the model sees, between two bars of 8 rows. So the patch
# in row 1, column 2 of the model is these pixels of the film:
PATCH = np.zeros((64, 128), dtype=bool)
PATCH[0:32, 64:96] = True
FILM = np.where(PATCH, 255, 0).astype(np.uint8)


def film_row(row_id: str = "a/film", **fields) -> dict:
    return make_row(row_id, to_png(FILM), source="a", present=["mass"], **fields)


MASK = {"finding": "mass", "side": "", "png": to_png(FILM)}
BOX = {"finding": "mass", "x": 64, "y": 0, "width": 32, "height": 32}


# ------------------------------------------------------------------------------------------------------ one film


def test_a_hot_patch_and_its_neighbours_land_on_exactly_their_pixels_of_a_film_that_is_not_square(bright):
    heatmap = sentence_heatmaps(*bright, FILM, ["There is a mass."], "There is no mass.")[0]
    assert heatmap.shape == (64, 128) and heatmap.dtype == np.float32
    # to the sides the neighbours have half of what the patch has, below, where the film ends, a third
    above_half = heatmap > heatmap.max() / 2
    assert np.flatnonzero(above_half[16]).tolist() == list(range(48, 112))
    assert np.flatnonzero(above_half[:, 80]).tolist() == list(range(40))
    assert PATCH[heatmap == heatmap.max()].all()


def test_the_hottest_pixel_is_covered_by_the_opacity_and_the_coldest_shows_the_film():
    film = np.array([[0, 100], [200, 200]], dtype=np.uint8)
    picture = np.asarray(overlay(film, np.array([[5.0, 1.0], [3.0, 1.0]]), opacity=0.5))
    hot, half = (np.array(colormaps["inferno"](at)[:3]) * 255 for at in (1.0, 0.5))
    assert picture.shape == (2, 2, 3)
    np.testing.assert_array_equal(picture[0, 0], np.rint(0.5 * 0 + 0.5 * hot))
    np.testing.assert_array_equal(picture[1, 0], np.rint(0.75 * 200 + 0.25 * half))
    assert picture[0, 1].tolist() == [100] * 3 and picture[1, 1].tolist() == [200] * 3


def test_a_constant_map_and_no_opacity_leave_the_film_as_it_is():
    film = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for heatmap, opacity in ((np.ones((3, 4)), 0.6), (film.astype(np.float32), 0.0)):
        np.testing.assert_array_equal(np.asarray(overlay(film, heatmap, opacity=opacity))[..., 1], film)


def test_colours_change_the_picture():
    film, heatmap = np.zeros((3, 4), np.uint8), np.arange(12.0).reshape(3, 4)
    assert overlay(film, heatmap).tobytes() != overlay(film, heatmap, colours="turbo").tobytes()


def test_the_truth_is_outlined_on_its_inner_border_and_closed_at_the_edge_of_the_film():
    truth = np.zeros((6, 8), dtype=bool)
    truth[0:4, 2:7] = True
    picture = np.asarray(overlay(np.zeros((6, 8), np.uint8), np.zeros((6, 8)), truth))
    border = truth.copy()
    border[1:3, 3:6] = False
    np.testing.assert_array_equal((picture == OUTLINE).all(axis=-1), border)


def test_a_large_film_has_a_thicker_outline():
    truth = np.zeros((1024, 1024), dtype=bool)
    truth[100:200, 100:200] = True
    drawn = (np.asarray(overlay(np.zeros((1024, 1024), np.uint8), np.zeros((1024, 1024)), truth)) == OUTLINE).all(-1)
    assert np.flatnonzero(drawn[150]).tolist() == [*range(100, 104), *range(196, 200)]


def test_a_colour_bar_stands_beside_the_film_and_leaves_it_alone():
    film, heatmap = np.full((64, 40), 50, np.uint8), np.linspace(0, 1, 64)[:, None] * np.ones(40)
    plain, wide = np.asarray(overlay(film, heatmap)), np.asarray(overlay(film, heatmap, colour_bar=True))
    assert wide.shape[0] == 64 and wide.shape[1] > 60
    np.testing.assert_array_equal(wide[:, :40], plain)
    bar = wide[:, 40:].astype(int).sum(axis=(1, 2))
    assert bar[22] > bar[40] > 0  # hot above


def test_a_map_that_does_not_fit_and_options_that_do_not_exist_are_refused():
    film = np.zeros((4, 6), np.uint8)
    for options, message in (
        ({"heatmap": np.ones((6, 4))}, r"heat map must have the size of the image, \(4, 6\).*has \(6, 4\)"),
        ({"truth": np.ones((2, 2), dtype=bool)}, "The truth must have"),
        ({"opacity": 60}, r"\[0, 1\], got 60"),
        ({"colours": "fire"}, "'fire', expected a colour map"),
        ({"heatmap": np.full((4, 6), np.nan)}, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            overlay(film, **{"heatmap": np.ones((4, 6)), **options})


def test_sentences_share_one_encoding_of_the_image_and_one_sentence_may_stand_against_all(bright):
    texts = ["There is a mass.", "There is no mass."]
    maps = sentence_heatmaps(*bright, FILM, texts, against=["There is no mass.", "There is a mass."])
    assert maps[0].argmax() != maps[1].argmax()
    same = sentence_heatmaps(*bright, FILM, texts, against="There is no mass.")
    np.testing.assert_array_equal(same[0], maps[0])
    np.testing.assert_allclose(same[1], 1 / 16, rtol=1e-6)  # a sentence against itself says nothing
    alone = sentence_heatmaps(*bright, FILM, texts)
    assert np.abs(alone[0] - maps[0]).max() > 0
    for texts, against, message in (
        ([], None, "none or one is empty"),
        (["a", " "], None, "empty"),
        (["a"], "", "emp"),
    ):
        with pytest.raises(ValueError, match=message):
            sentence_heatmaps(*bright, FILM, texts, against)
    with pytest.raises(ValueError, match="one for each of 3 texts, got 2"):
        sentence_heatmaps(*bright, FILM, ["a", "b", "c"], ["d", "e"])


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("truth", [{"masks": [MASK]}, {"boxes": [BOX]}], ids=["mask", "box"])
def test_saved_overlays_have_the_heat_on_the_lesion_and_its_outline_around_it(tmp_path, bright, truth):
    rows = rows_to_dataset([film_row(**truth)])
    assert evaluate_grounding(*bright, rows, num_bootstrap=0)[0]["pointing_game"] == 1.0
    (path,) = save_overlays(*bright, rows, tmp_path / "new")
    assert path == tmp_path / "new" / "00000_a_film_mass.png"
    picture = np.asarray(Image.open(path)).astype(int)
    is_outline = (picture == OUTLINE).all(axis=-1)
    border = PATCH.copy()
    border[1:31, 65:95] = False
    np.testing.assert_array_equal(is_outline, border)
    colour = picture.max(axis=-1) - picture.min(axis=-1)  # 0 where the film is grey
    inside = PATCH & ~is_outline
    assert colour[inside].max() > 100 and colour[:, :16].max() == 0 and colour[:, 120:].max() < 50


def test_overlays_are_limited_and_take_findings_without_truth(tmp_path, bright):
    rows = rows_to_dataset([film_row("a", masks=[MASK]), film_row("b"), film_row("c", boxes=[BOX])])
    names = [path.name for path in save_overlays(*bright, rows, tmp_path, batch_size=1)]
    assert names == ["00000_a_mass.png", "00002_c_mass.png"]
    assert [path.name for path in save_overlays(*bright, rows, tmp_path, limit=1)] == names[:1]
    chosen = save_overlays(*bright, rows, tmp_path, findings=["mass", "edema"], limit=2, batch_size=1)
    assert [path.name[6:-4] for path in chosen] == ["a_mass", "a_edema", "b_mass", "b_edema"]
    outlined = [(np.asarray(Image.open(path)) == OUTLINE).all(axis=-1).any() for path in chosen]
    assert outlined == [True, False, False, False]
    with pytest.raises(ValueError, match="None of 1 rows has an image and a lesion"):
        save_overlays(*bright, rows.select([1]), tmp_path)


def test_file_names_keep_letters_and_digits():
    assert file_name("chestxray14/00000001_000.png") == "chestxray14_00000001_000.png"
    assert file_name("There is a left-sided effusion.") == "There_is_a_left-sided_effusion"
    assert file_name("../..") == "_" and len(file_name("x" * 500)) == 60

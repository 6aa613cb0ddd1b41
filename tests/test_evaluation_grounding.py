import io

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_config
from MMCLIP.modeling_mmclip import MMCLIPModel
from MMCLIP.processing_mmclip import MMCLIPImageProcessor, MMCLIPProcessor
from PIL import Image
from torch import nn
from transformers import BatchFeature

from MMCLIP.data.manifest import FEATURES, make_row, rows_to_dataset
from MMCLIP.evaluation.grounding import (
    example_pairs,
    grounding_heatmaps,
    heatmap_auroc,
    heatmap_scores,
    read_mask,
    row_pairs,
)


def to_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def box(size: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[rows, columns] = True
    return mask


TOP, LEFT, RIGHT = (
    box(32, slice(0, 8), slice(8, 16)),
    box(32, slice(16, 32), slice(0, 8)),
    box(32, slice(8), slice(8)),
)


def make_rows(*masks: list[tuple[str, str, np.ndarray]], image_size: int = 32) -> datasets.Dataset:
    """One row for each list of (finding, side, mask); all images are black."""
    return rows_to_dataset(
        make_row(
            f"film{number}",
            to_png(np.zeros((image_size, image_size), dtype=np.uint8)),
            source="a",
            present=sorted({finding for finding, _, _ in listed}),
            masks=[{"finding": f, "side": s, "png": to_png(m.astype(np.uint8) * 255)} for f, s, m in listed],
        )
        for number, listed in enumerate(masks)
    )


class PointingModel(nn.Module):
    """Looks at patch 1 of 16 for "mass" (id 1), at patch 15 for every other text."""

    device, dtype = torch.device("cpu"), torch.float32

    def get_text_to_patch_attention(
        self, pixel_values, input_ids, attention_mask, contrast_input_ids, contrast_attention_mask
    ):
        assert len(pixel_values) == len(input_ids) == len(contrast_input_ids) and not self.training
        attention = torch.zeros(len(input_ids), 16)
        attention[range(len(input_ids)), torch.where(input_ids[:, 0] == 1, 1, 15)] = 1.0
        return attention


class PointingProcessor(MMCLIPImageProcessor):
    """The real image processor with texts reduced to whether they name a mass."""

    @property
    def image_processor(self):
        return super().__call__

    def __call__(self, text, return_tensors):
        ids = torch.tensor([[int("mass" in entry)] for entry in text])
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.fixture
def pointing():
    return PointingModel().train(), PointingProcessor(size=32)


def test_a_map_highest_on_the_lesion_scores_one():
    assert heatmap_scores(np.array([[9.0, 1.0], [2.0, 3.0]]), np.array([[True, False], [False, False]])) == (1.0, 1.0)


def test_scores_of_a_map_can_be_counted_by_hand():
    # lesion pixels 3 and 1 against 2 and 0: three of four pairs in order; the peak, 3, lies on the lesion
    assert heatmap_scores(np.array([[3.0, 2.0], [1.0, 0.0]]), np.array([[True, False], [True, False]])) == (0.75, 1.0)


def test_a_constant_map_scores_chance():
    assert heatmap_scores(np.ones((2, 2)), np.array([[True, False], [False, False]])) == (0.5, 0.25)


def test_a_map_of_another_size_or_with_nan_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\), but has \(2, 3\)"):
        heatmap_scores(np.ones((2, 3)), np.ones((2, 2), dtype=bool))
    with pytest.raises(ValueError, match="NaN"):
        heatmap_scores(np.array([[np.nan, 1.0]]), np.array([[True, False]]))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_masks_are_read_from_one_bit_and_eight_bit_png(mode):
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [0, 255]], dtype=np.uint8)).convert(mode).save(file, format="PNG")
    assert read_mask(file.getvalue()).tolist() == [[False, True], [False, True]]


def test_left_and_right_masks_of_a_finding_are_one_pair():
    rows = make_rows([("edema", "left", LEFT), ("edema", "right", RIGHT), ("mass", "left", TOP)])
    pairs = row_pairs(rows, 0)
    assert [pair.finding for pair in pairs] == ["edema", "mass"]
    np.testing.assert_array_equal(pairs[0].mask, LEFT | RIGHT)


def test_masks_of_two_sizes_in_one_image_are_an_error_that_names_the_row():
    with pytest.raises(ValueError, match="'film0'.*'mass'.*8, 8"):
        row_pairs(make_rows([("edema", "left", LEFT), ("mass", "left", TOP[:8, :8])]), 0)


def test_measures_are_means_over_findings_of_all_images(pointing):
    rows = make_rows([("mass", "", TOP), ("edema", "left", LEFT)], [], [("mass", "", TOP)])
    result = heatmap_auroc(*pointing, rows, batch_size=1, num_bootstrap=100)
    assert result["num_pairs"] == 3 and result["num_skipped"] == 0
    assert result["per_finding"]["mass"] == {
        "heatmap_auroc": pytest.approx(0.97, abs=0.03),
        "pointing_game": 1.0,
        "num_pairs": 2,
    }
    edema = result["per_finding"]["edema"]
    assert edema["heatmap_auroc"] < 0.5 and edema["pointing_game"] == 0.0
    assert result["heatmap_auroc"] == pytest.approx(
        (2 * result["per_finding"]["mass"]["heatmap_auroc"] + edema["heatmap_auroc"]) / 3
    )
    assert result["pointing_game"] == pytest.approx(2 / 3)
    assert result["pointing_game_chance"] == pytest.approx((64 + 64 + 128) / 3 / 1024)
    low, high = result["heatmap_auroc_ci"]
    assert low < result["heatmap_auroc"] <= high
    assert pointing[0].training


def test_empty_and_full_masks_are_skipped_and_counted(pointing):
    rows = make_rows([("mass", "", TOP), ("edema", "", TOP & False), ("nodule", "", TOP | True)])
    result = heatmap_auroc(*pointing, rows, num_bootstrap=0)
    assert (result["num_pairs"], result["num_skipped"], result["heatmap_auroc_ci"]) == (1, 2, None)


def test_rows_without_any_mask_are_an_error(pointing):
    with pytest.raises(ValueError, match="None of 2 rows"):
        heatmap_auroc(*pointing, make_rows([], []))


def test_heat_maps_have_the_size_of_their_mask_and_do_not_depend_on_the_batch():
    processor = MMCLIPProcessor(MMCLIPImageProcessor(size=32))
    torch.manual_seed(0)
    model = MMCLIPModel(tiny_config(vocab_size=len(processor.tokenizer)))
    rng = np.random.default_rng(0)
    rows = make_rows(
        [("edema", "", np.ones((40, 48)))], [("edema", "", np.ones((40, 48))), ("mass", "", np.ones((40, 48)))]
    )
    images = [{"path": None, "bytes": to_png(rng.integers(0, 256, (40, 48), dtype=np.uint8))} for _ in range(2)]
    rows = rows.remove_columns("image").add_column("image", images).cast(FEATURES)
    pairs = row_pairs(rows, 0) + row_pairs(rows, 1)
    heatmaps = grounding_heatmaps(model, processor, rows, pairs)
    assert [heatmap.shape for heatmap in heatmaps] == [(40, 48)] * 3
    assert np.abs(heatmaps[0] - heatmaps[1]).max() > 0  # another image, same finding
    assert np.abs(heatmaps[1] - heatmaps[2]).max() > 0  # same image, another finding
    for one, alone in zip(heatmaps, grounding_heatmaps(model, processor, rows, pairs, batch_size=1), strict=True):
        np.testing.assert_allclose(one, alone, atol=1e-6)


def test_examples_are_the_first_of_each_finding_then_repeats():
    mass, edema = ("mass", "", TOP), ("edema", "left", LEFT)
    rows = make_rows([mass], [mass], [mass, edema])
    assert [(pair.row, pair.finding) for pair in example_pairs(rows, 2)] == [(0, "mass"), (2, "edema")]
    assert [(pair.row, pair.finding) for pair in example_pairs(rows, 3)] == [(0, "mass"), (2, "edema"), (1, "mass")]

import io
import json

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_config
from MMCLIP.modeling_mmclip import MMCLIPModel
from MMCLIP.processing_mmclip import MMCLIPImageProcessor, MMCLIPProcessor
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutputWithPooling

from MMCLIP.data.manifest import FEATURES, make_row, rows_to_dataset
from MMCLIP.evaluation.grounding import (
    CONTROLS,
    MEASURES,
    OTHER_FINDINGS,
    box_mask,
    compare_grounding,
    evaluate_grounding,
    example_pairs,
    grounding_heatmaps,
    grounding_metrics,
    heatmap_auroc,
    heatmap_scores,
    read_mask,
    row_pairs,
)
from MMCLIP.text.prompts import negative_prompts, positive_prompts


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


def make_rows(*masks: list[tuple[str, str, np.ndarray]], image_size: int = 32, **fields) -> datasets.Dataset:
    """One row for each list of (finding, side, mask); all images are black. `fields` are lists of further values."""
    return rows_to_dataset(
        make_row(
            f"film{number}",
            to_png(np.zeros((image_size, image_size), dtype=np.uint8)),
            source="a",
            present=sorted({finding for finding, _, _ in listed}),
            masks=[{"finding": f, "side": s, "png": to_png(m.astype(np.uint8) * 255)} for f, s, m in listed],
            **{name: values[number] for name, values in fields.items()},
        )
        for number, listed in enumerate(masks)
    )


def lesion_box(finding: str, x: float, y: float, width: float, height: float) -> dict:
    return {"finding": finding, "x": x, "y": y, "width": width, "height": height}


class PointingModel(MMCLIPModel):
    """Looks at patch 1 of 16 for "mass" (id 1), at patch 15 for every other text; patch 12 has the longest vector."""

    def __init__(self):
        super().__init__(tiny_config())
        self.visual_projection = nn.Identity()
        self.num_encoded = 0

    def encode_image(self, pixel_values):
        assert not self.training
        self.num_encoded += len(pixel_values)
        tokens = torch.zeros(1, 16, 16)
        tokens[0, [1, 15, 12], [0, 1, 2]] = torch.tensor([1.0, 1.0, 3.0])
        tokens = tokens.repeat(len(pixel_values), 1, 1)
        return tokens.mean(dim=1), tokens, None

    def get_text_features(self, input_ids, attention_mask):
        return BaseModelOutputWithPooling(pooler_output=torch.eye(16)[[2, 0, 1]][input_ids[:, 0]])


class PointingProcessor:
    """The real image processor, with texts reduced to 0 for a denial, 1 for a mass and 2 for any other finding."""

    def __init__(self):
        self.image_processor = MMCLIPImageProcessor(size=32)
        self.resize_heatmap = self.image_processor.resize_heatmap

    def __call__(self, text, return_tensors):
        ids = [0 if " no " in one else 1 if "mass" in one else 2 for one in text]
        return BatchEncoding({"input_ids": torch.tensor(ids)[:, None], "attention_mask": torch.ones(len(ids), 1)})


@pytest.fixture
def pointing():
    return PointingModel().train(), PointingProcessor()


# ----------------------------------------------------------------------------------------------------- scores of a map


def test_a_map_highest_on_the_lesion_scores_one():
    assert heatmap_scores(np.array([[9.0, 1.0], [2.0, 3.0]]), np.array([[True, False], [False, False]])) == (1, 1, 1)


def test_scores_of_a_map_can_be_counted_by_hand():
    # lesion pixels 3 and 1 against 2 and 0: three of four pairs in order; precision 1 at the first of them, 2/3 at the
    # second; the peak, 3, lies on the lesion
    scores = heatmap_scores(np.array([[3.0, 2.0], [1.0, 0.0]]), np.array([[True, False], [True, False]]))
    assert scores == (0.75, pytest.approx(5 / 6), 1.0)


def test_a_constant_map_scores_chance():
    assert heatmap_scores(np.ones((2, 2)), np.array([[True, False], [False, False]])) == (0.5, 0.25, 0.25)


@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pixel_curves_are_those_of_scikit_learn_with_ties_too(levels, dtype):
    rng = np.random.default_rng(levels)
    for _ in range(20):
        heatmap = (rng.integers(0, levels, (13, 17)) / levels).astype(dtype)
        mask = rng.random((13, 17)) < rng.random()
        mask[0, :2] = True, False
        scores = heatmap_scores(heatmap, mask)
        assert scores.heatmap_auroc == pytest.approx(roc_auc_score(mask.ravel(), heatmap.ravel()), abs=1e-9)
        expected = average_precision_score(mask.ravel(), heatmap.ravel())
        assert scores.average_precision == pytest.approx(expected, abs=1e-9)


def test_a_map_of_another_size_or_with_nan_and_a_mask_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\), but has \(2, 3\)"):
        heatmap_scores(np.ones((2, 3)), np.ones((2, 2), dtype=bool))
    with pytest.raises(ValueError, match="NaN"):
        heatmap_scores(np.array([[np.nan, 1.0]]), np.array([[True, False]]))
    with pytest.raises(ValueError, match="ranks nothing"):
        heatmap_scores(np.ones((2, 2)), np.zeros((2, 2), dtype=bool))


# ------------------------------------------------------------------------------------------------------------- truths


@pytest.mark.parametrize("mode", ["1", "L"])
def test_masks_are_read_from_one_bit_and_eight_bit_png(mode):
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [0, 255]], dtype=np.uint8)).convert(mode).save(file, format="PNG")
    assert read_mask(file.getvalue()).tolist() == [[False, True], [False, True]]


def test_left_and_right_masks_of_a_finding_are_one_pair():
    rows = make_rows([("edema", "left", LEFT), ("edema", "right", RIGHT), ("mass", "left", TOP)])
    pairs = row_pairs(rows, 0)
    assert [(pair.finding, pair.truth) for pair in pairs] == [("edema", "mask"), ("mass", "mask")]
    np.testing.assert_array_equal(pairs[0].mask, LEFT | RIGHT)


def test_a_mask_of_another_size_than_its_image_is_an_error_that_names_the_row():
    with pytest.raises(ValueError, match=r"'film0'.*'mass' is \(8, 8\), but the image is \(32, 32\)"):
        row_pairs(make_rows([("edema", "left", LEFT), ("mass", "left", TOP[:8, :8])]), 0)


def test_a_mask_that_is_no_png_is_an_error_that_names_the_row():
    rows = rows_to_dataset(
        [make_row("x", to_png(RIGHT), source="a", masks=[{"finding": "mass", "side": "", "png": b"nothing"}])]
    )
    with pytest.raises(ValueError, match="'x'.*'mass' cannot be read"):
        row_pairs(rows, 0)


def pixels_of(mask: np.ndarray) -> tuple[list[int], list[int]]:
    """The rows and the columns that `mask` touches."""
    return np.flatnonzero(mask.any(axis=1)).tolist(), np.flatnonzero(mask.any(axis=0)).tolist()


def test_a_box_of_whole_pixels_covers_exactly_those():
    mask = box_mask(lesion_box("mass", x=3, y=1, width=4, height=2), (5, 10))
    assert mask.shape == (5, 10) and mask.sum() == 8
    assert pixels_of(mask) == ([1, 2], [3, 4, 5, 6])


def test_a_box_covers_the_pixels_whose_centre_it_holds_and_at_least_one():
    assert pixels_of(box_mask(lesion_box("mass", 1.4, 2.6, 2.2, 2.0), (6, 6))) == ([3, 4], [1, 2, 3])
    assert pixels_of(box_mask(lesion_box("mass", 2.6, 4.1, 0.2, 0.2), (6, 6))) == ([4], [2])
    assert pixels_of(box_mask(lesion_box("mass", 5.8, 5.7, 9, 9), (6, 6))) == ([5], [5])


def test_a_box_partly_outside_is_cut_and_one_wholly_outside_is_an_error_that_names_the_row():
    assert pixels_of(box_mask(lesion_box("mass", -2, 4, 4, 9), (6, 6))) == ([4, 5], [0, 1])
    rows = make_rows([], boxes=[[lesion_box("mass", 32, 0, 5, 5)]])
    with pytest.raises(ValueError, match="'film0', 'mass'.*outside the image, which is 32 x 32"):
        row_pairs(rows, 0)


@pytest.mark.parametrize("change", [{"width": 0}, {"height": -1}, {"x": float("nan")}, {"y": float("inf")}])
def test_a_box_without_area_is_an_error(change):
    with pytest.raises(ValueError, match="some area"):
        box_mask({**lesion_box("mass", 0, 0, 1, 1), **change}, (4, 4))


def test_boxes_of_a_finding_are_joined_and_a_mask_of_it_counts_before_them():
    boxes = [lesion_box("edema", 0, 0, 2, 2), lesion_box("edema", 1, 1, 2, 2), lesion_box("mass", 0, 0, 32, 16)]
    pairs = row_pairs(make_rows([("mass", "", TOP)], boxes=[boxes]), 0)
    assert [(pair.finding, pair.truth, pair.mask.sum()) for pair in pairs] == [
        ("mass", "mask", 64),
        ("edema", "box", 7),
    ]


# --------------------------------------------------------------------------------------------------------- evaluation


def test_measures_are_means_over_findings_of_all_images(pointing):
    rows = make_rows([("mass", "", TOP), ("edema", "left", LEFT)], [], [("mass", "", TOP)])
    result = heatmap_auroc(*pointing, rows, batch_size=1, num_bootstrap=100)
    assert (result["num_pairs"], result["num_images"], result["num_skipped"]) == (3, 2, 0)
    mass, edema = result["per_finding"]["mass"], result["per_finding"]["edema"]
    assert mass["heatmap_auroc"] > 0.94 and (mass["pointing_game"], mass["num_pairs"]) == (1.0, 2)
    assert edema["heatmap_auroc"] < 0.5 and edema["pointing_game"] == 0.0
    for measure in MEASURES:
        assert result[measure] == pytest.approx((2 * mass[measure] + edema[measure]) / 3)
        assert result["macro"][measure] == pytest.approx((mass[measure] + edema[measure]) / 2)
        low, high = result[f"{measure}_ci"]
        assert low < result[measure] <= high
    assert result["pointing_game_chance"] == result["average_precision_chance"] == pytest.approx(256 / 3 / 1024)
    assert result["macro"]["pointing_game_chance"] == pytest.approx((64 + 128) / 2 / 1024)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert pointing[0].training


def test_an_image_is_encoded_once_for_all_its_findings(pointing):
    rows = make_rows([("mass", "", TOP), ("edema", "", LEFT), ("nodule", "", RIGHT)], [], [("mass", "", TOP)])
    evaluate_grounding(*pointing, rows, num_bootstrap=0)
    assert pointing[0].num_encoded == 2
    grounding_heatmaps(*pointing, rows, row_pairs(rows, 0))
    assert pointing[0].num_encoded == 3


def test_boxes_are_measured_like_masks_of_their_pixels(pointing):
    as_masks = evaluate_grounding(*pointing, make_rows([("mass", "", TOP), ("edema", "", LEFT)]), num_bootstrap=0)
    boxes = [lesion_box("mass", 8, 0, 8, 8), lesion_box("edema", 0, 16, 8, 16)]
    as_boxes = evaluate_grounding(*pointing, make_rows([], boxes=[boxes]), num_bootstrap=0)
    np.testing.assert_array_equal(as_masks[1].values["map"], as_boxes[1].values["map"])
    assert as_masks[0]["num_by_truth"] == {"mask": 2} and as_boxes[0]["num_by_truth"] == {"box": 2}
    assert as_boxes[1].truths == ["box", "box"]


def test_what_cannot_be_measured_is_counted_by_reason(pointing):
    rows = make_rows([("mass", "", TOP), ("edema", "", TOP & False), ("nodule", "", TOP | True)], [("mass", "", TOP)])
    rows = rows.map(lambda row, index: {"image": None if index else row["image"]}, with_indices=True, features=FEATURES)
    result, scores = evaluate_grounding(*pointing, rows, num_bootstrap=0)
    assert (result["num_pairs"], result["num_skipped"], result["heatmap_auroc_ci"]) == (1, 3, None)
    assert result["skipped"] == {"empty mask": 1, "mask covers the whole image": 1, "no image": 1}
    assert scores.findings == ["mass"]


def test_rows_without_any_lesion_are_an_error(pointing):
    with pytest.raises(ValueError, match="None of 2 rows"):
        heatmap_auroc(*pointing, make_rows([], []))
    with pytest.raises(ValueError, match="None of 1 rows.*1 with empty mask"):
        heatmap_auroc(*pointing, make_rows([("mass", "", TOP & False)]))
    with pytest.raises(ValueError, match="None of 2 rows"):
        heatmap_auroc(*pointing, make_rows([], []).remove_columns(["masks", "boxes"]))


def test_a_map_with_nan_is_an_error_that_names_the_row(pointing):
    pointing[0].logit_scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="Row 'film0', 'mass': The heat map holds NaN"):
        evaluate_grounding(*pointing, make_rows([("mass", "", TOP)]))


def test_the_control_of_patch_length_does_not_read_the_text(pointing):
    # the longest patch, 12, lies in the lower left corner
    scores = evaluate_grounding(*pointing, make_rows([("mass", "", TOP), ("edema", "", LEFT)]), num_bootstrap=0)[1]
    assert scores.values["patch_length"][:, MEASURES.index("pointing_game")].tolist() == [0, 1]


def test_the_other_finding_is_one_that_the_image_lacks_and_no_kind_of_its_own(pointing):
    rows = make_rows([("mass", "", TOP), ("edema", "", LEFT)], [("mass", "", TOP)], [("lung lesion", "", TOP)])
    result, scores = evaluate_grounding(*pointing, rows, num_bootstrap=0)
    drawn = dict(zip(zip(scores.row_ids, scores.findings, strict=True), scores.other_findings, strict=True))
    assert drawn["film1", "mass"] == drawn["film2", "lung lesion"] == "edema"  # a mass is a lung lesion
    assert drawn["film0", "mass"] in OTHER_FINDINGS  # the image has both findings of these rows
    mass = result["per_finding"]["mass"]
    assert mass["pointing_game"] == 1 and mass["controls"]["other_finding"]["pointing_game"] == 0
    assert mass["controls"]["other_finding"]["pointing_game_difference"] == 1


def prior_aurocs(pointing, rows) -> list[float]:
    scores = evaluate_grounding(*pointing, rows, num_bootstrap=0)[1]
    return scores.values["prior"][:, MEASURES.index("heatmap_auroc")].tolist()


def test_the_prior_is_where_the_finding_lies_in_other_patients(pointing):
    mass, same, elsewhere = ("mass", "", TOP), ("mass", "", TOP), ("mass", "", RIGHT)
    # RIGHT, unmarked, against 64 marked pixels of 960; TOP among twice 64 that are marked alike
    alone, shared = 0.5 * (1 - 64 / 960), (0.5 * 64 + 896) / 960
    rows = make_rows([mass], [same], [elsewhere], patient_id=["p", "q", "r"])
    assert prior_aurocs(pointing, rows) == pytest.approx([shared, shared, alone])
    rows = make_rows([mass], [same], [elsewhere], patient_id=["p", "p", "r"])
    assert prior_aurocs(pointing, rows) == pytest.approx([alone, alone, alone])


def test_the_prior_of_a_finding_of_one_patient_is_that_of_all_findings_then_flat(pointing):
    assert prior_aurocs(pointing, make_rows([("mass", "", TOP)], [("edema", "", TOP)])) == [1, 1]
    assert prior_aurocs(pointing, make_rows([("mass", "", TOP), ("edema", "", TOP)])) == [0.5, 0.5]


def test_findings_of_an_image_without_a_patient_are_drawn_together_and_equal_names_of_two_sources_apart(pointing):
    both = [("mass", "", TOP), ("edema", "", LEFT)]
    result, scores = evaluate_grounding(*pointing, make_rows(both, both), num_bootstrap=0)
    assert result["num_patients"] == 2 and result["num_pairs"] == 4
    assert scores.patient_ids[0] == scores.patient_ids[1] != scores.patient_ids[2]
    rows = make_rows(both, both, patient_id=["7", "7"])
    assert evaluate_grounding(*pointing, rows, num_bootstrap=0)[0]["num_patients"] == 1
    two = datasets.concatenate_datasets([rows, rows.map(lambda row: {"source": "b", "row_id": row["row_id"] + "b"})])
    assert evaluate_grounding(*pointing, two, num_bootstrap=0)[0]["num_patients"] == 2


def test_a_patient_seen_ten_times_counts_once_in_the_intervals(pointing):
    rows = make_rows(*([("mass", "", TOP)], [("edema", "", LEFT)], [("mass", "", LEFT)], [("edema", "", TOP)]))
    scores = evaluate_grounding(*pointing, rows, num_bootstrap=0)[1]
    tenfold = scores._replace(
        **{name: getattr(scores, name) * 10 for name in ("row_ids", "patient_ids", "findings", "truths")},
        shares=np.tile(scores.shares, 10),
        values={name: np.tile(values, (10, 1)) for name, values in scores.values.items()},
    )
    once, often = grounding_metrics(scores, 200), grounding_metrics(tenfold, 200)
    assert often["num_pairs"] == 40 and often["num_patients"] == 4
    for measure in MEASURES:
        assert often[f"{measure}_ci"] == pytest.approx(once[f"{measure}_ci"])
        assert often["macro"][f"{measure}_ci"] == pytest.approx(once["macro"][f"{measure}_ci"])


def test_the_interval_of_a_mean_over_findings_gives_each_finding_the_same_weight(pointing):
    rows = make_rows(*[[("mass", "", TOP)]] * 6, *[[("edema", "", LEFT)]] * 2)
    scores = evaluate_grounding(*pointing, rows, num_bootstrap=0)[1]
    is_mass = np.array([finding == "mass" for finding in scores.findings])
    constant = scores._replace(
        values={name: np.where(is_mass, 0.2, 0.8)[:, None] + np.zeros(3) for name in scores.values}
    )
    result = grounding_metrics(constant, 200)
    assert result["heatmap_auroc"] == pytest.approx(0.35) and result["macro"]["heatmap_auroc"] == pytest.approx(0.5)
    low, high = result["heatmap_auroc_ci"]
    assert low < 0.3 and high > 0.4
    assert result["macro"]["heatmap_auroc_ci"] == pytest.approx([0.5, 0.5])  # no patient changes any finding's mean


def test_one_patient_alone_has_no_interval(pointing):
    rows = make_rows([("mass", "", TOP)], [("mass", "", LEFT)], patient_id=["p", "p"])
    result = evaluate_grounding(*pointing, rows, num_bootstrap=100)[0]
    assert result["heatmap_auroc_ci"] is None and result["per_finding"]["mass"]["pointing_game_ci"] is None
    assert result["controls"]["prior"]["heatmap_auroc_difference_ci"] is None


def test_a_model_that_is_better_for_every_patient_leads_in_every_draw(pointing):
    rows = make_rows(*[[("mass", "", TOP), ("edema", "", LEFT)]] * 4)
    worse = evaluate_grounding(*pointing, rows, num_bootstrap=0)[1]
    better = worse._replace(values={"map": worse.values["map"] + np.linspace(0.1, 0.3, 8)[:, None]})
    result = compare_grounding(better, worse, num_bootstrap=199)
    for entry in (result["heatmap_auroc"], result["macro"]["heatmap_auroc"]):
        assert entry["difference"] == pytest.approx(0.2) and entry["difference"] == entry["first"] - entry["second"]
        assert 0.1 <= entry["difference_ci"][0] < 0.2 < entry["difference_ci"][1] <= 0.3
        assert entry["p_value"] == pytest.approx(2 / 200)
    other_way = compare_grounding(worse, better, num_bootstrap=199)["heatmap_auroc"]
    assert other_way["difference"] == pytest.approx(-0.2) and other_way["p_value"] == pytest.approx(2 / 200)
    assert compare_grounding(worse, worse, num_bootstrap=199)["heatmap_auroc"]["p_value"] == 1
    assert compare_grounding(better, worse, num_bootstrap=0)["heatmap_auroc"]["p_value"] is None


def test_scores_of_other_pairs_are_not_compared(pointing):
    both = evaluate_grounding(*pointing, make_rows([("mass", "", TOP)], [("edema", "", LEFT)]), num_bootstrap=0)[1]
    one = evaluate_grounding(*pointing, make_rows([("mass", "", TOP)]), num_bootstrap=0)[1]
    with pytest.raises(ValueError, match="`row_ids` differ.*2 and 1 pairs"):
        compare_grounding(both, one)
    with pytest.raises(ValueError, match="`truths` differ"):
        compare_grounding(both, both._replace(truths=["mask", "box"]))


def test_the_table_has_a_line_for_each_pair_with_all_its_scores(pointing):
    rows = make_rows([("mass", "", TOP)], [("edema", "", LEFT)])
    result, scores = evaluate_grounding(*pointing, rows, num_bootstrap=0)
    lines = scores.table()
    assert [(line["row_id"], line["finding"], line["truth"]) for line in lines] == [
        ("film0", "mass", "mask"),
        ("film1", "edema", "mask"),
    ]
    assert lines[0]["truth_share"] == 64 / 1024
    assert np.mean([line["heatmap_auroc"] for line in lines]) == pytest.approx(result["heatmap_auroc"])
    for control in CONTROLS:
        mean = np.mean([line[f"{control}_average_precision"] for line in lines])
        assert mean == pytest.approx(result["controls"][control]["average_precision"])


def test_heat_maps_have_the_size_of_their_mask_and_do_not_depend_on_the_batch():
    processor = MMCLIPProcessor(MMCLIPImageProcessor(size=32))
    torch.manual_seed(0)
    model = MMCLIPModel(tiny_config(vocab_size=len(processor.tokenizer)))
    rng = np.random.default_rng(0)
    half = np.arange(40)[:, None] < np.full(48, 20)
    rows = make_rows([("edema", "", half)], [("edema", "", half), ("mass", "", half)])
    images = [{"path": None, "bytes": to_png(rng.integers(0, 256, (40, 48), dtype=np.uint8))} for _ in range(2)]
    rows = rows.remove_columns("image").add_column("image", images).cast(FEATURES)
    pairs = row_pairs(rows, 0) + row_pairs(rows, 1)
    heatmaps = grounding_heatmaps(model, processor, rows, pairs)
    assert [heatmap.shape for heatmap in heatmaps] == [(40, 48)] * 3
    assert np.abs(heatmaps[0] - heatmaps[1]).max() > 0  # another image, same finding
    assert np.abs(heatmaps[1] - heatmaps[2]).max() > 0  # same image, another finding
    for one, alone in zip(heatmaps, grounding_heatmaps(model, processor, rows, pairs, batch_size=1), strict=True):
        np.testing.assert_allclose(one, alone, atol=1e-6)
    backwards = grounding_heatmaps(model, processor, rows, pairs[::-1])[::-1]
    np.testing.assert_allclose(np.stack(backwards), np.stack(heatmaps), atol=1e-6)

    tokens, denial = (processor(text=[f(pairs[2].finding)[0]]) for f in (positive_prompts, negative_prompts))
    attention = model.eval().get_text_to_patch_attention(
        processor(images=[images[1]["bytes"]])["pixel_values"], **tokens, contrast_input_ids=denial["input_ids"]
    )
    np.testing.assert_allclose(heatmaps[2], processor.resize_heatmap(attention[0], (40, 48)), atol=1e-6)

    scores = evaluate_grounding(model, processor, rows, batch_size=1, num_bootstrap=0)[1]
    expected = [heatmap_scores(one, pair.mask) for one, pair in zip(heatmaps, pairs, strict=True)]
    np.testing.assert_allclose(scores.values["map"], expected, atol=1e-4)


def test_examples_are_the_first_of_each_finding_then_repeats():
    mass, edema = ("mass", "", TOP), ("edema", "left", LEFT)
    rows = make_rows([mass], [mass], [mass, edema])
    assert [(pair.row, pair.finding) for pair in example_pairs(rows, 2)] == [(0, "mass"), (2, "edema")]
    assert [(pair.row, pair.finding) for pair in example_pairs(rows, 3)] == [(0, "mass"), (2, "edema"), (1, "mass")]

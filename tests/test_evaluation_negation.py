import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature

from MMCLIP.data.manifest import make_row, rows_to_dataset
from MMCLIP.evaluation.metrics import UNKNOWN, resample_patients
from MMCLIP.evaluation.negation import evaluate_negation, evaluate_side


class WordProcessor:
    """A text becomes its number among the texts seen."""

    def __init__(self):
        self.texts = []

    def __call__(self, text, return_tensors):
        numbers = []
        for entry in text:
            if entry not in self.texts:
                self.texts.append(entry)
            numbers.append([self.texts.index(entry)])
        return BatchFeature({"input_ids": torch.tensor(numbers), "attention_mask": torch.ones(len(numbers), 1)})


class WordModel(nn.Module):
    """Texts lie where `place(text)` says, (3,) and at unit length; the scale is 10."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(projection_dim=3)

    def __init__(self, processor, place):
        super().__init__()
        self.processor, self.place = processor, place

    def similarity_scale(self):
        return torch.tensor(10.0)

    def get_text_features(self, input_ids, attention_mask):
        vectors = [self.place(self.processor.texts[number]) for number in input_ids[:, 0].tolist()]
        return SimpleNamespace(pooler_output=nn.functional.normalize(torch.tensor(vectors), dim=-1))


def made(place):
    processor = WordProcessor()
    return WordModel(processor, place), processor


def reads_no(text):
    """First axis: the finding is there; second: it is not."""
    return [0.0, 1.0, 0.0] if " no " in text else [1.0, 0.0, 0.0]


def ignores_no(text):
    return [1.0, 0.0, 0.0]


def prefers_presence(text):
    """Names the finding, and a denial lies off every image."""
    return [0.0, 0.0, -1.0] if " no " in text else [1.0, 0.0, 0.0]


def images(*angles: float) -> torch.Tensor:
    """Unit vectors at these degrees from the first axis towards the second: 0 shows the finding, 90 does not."""
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin(), torch.zeros_like(radians)], dim=1).float()


def column(*values: int) -> np.ndarray:
    return np.array(values)[:, None]


# ----------------------------------------------------------------------------------------------------------- negation


def test_accuracies_and_margins_can_be_worked_by_hand():
    # images at 0, 30 and 60 degrees have the finding, at 20 and 90 they do not; beyond 45 the denial is nearer
    targets = column(1, 1, 1, 0, 0)
    result, margins = evaluate_negation(*made(reads_no), images(0, 30, 60, 20, 90), targets, ["edema"], num_bootstrap=0)
    expected = [10 * (math.cos(math.radians(a)) - math.sin(math.radians(a))) for a in (0, 30, 60, 20, 90)]
    np.testing.assert_allclose(margins[:, 0], expected, atol=1e-5)
    edema = result["per_finding"]["edema"]
    assert edema["accuracy_positive"] == pytest.approx(2 / 3) and edema["accuracy_negative"] == 0.5
    assert edema["balanced_accuracy"] == pytest.approx(7 / 12) and edema["accuracy"] == pytest.approx(3 / 5)
    assert edema["auroc"] == edema["control_auroc"] == pytest.approx(4 / 6)  # 0 beats both, 30 and 60 beat 90
    assert (edema["num_positive"], edema["num_negative"]) == (3, 2)
    assert edema["prompts"] == ["There is pulmonary edema.", "There is no pulmonary edema."]
    assert edema["accuracy_ci"] is None and result["macro_accuracy"] == edema["accuracy"]


def test_a_model_that_reads_no_scores_one():
    result, _ = evaluate_negation(*made(reads_no), images(0, 10, 80, 90), column(1, 1, 0, 0), ["mass"])
    for measure in ("accuracy", "accuracy_positive", "accuracy_negative", "balanced_accuracy", "auroc"):
        assert result[f"macro_{measure}"] == 1 and result[f"macro_{measure}_ci"] == [1, 1]


def test_a_model_that_does_not_read_no_scores_chance_and_its_control_shows_that_it_knows_the_finding():
    result, margins = evaluate_negation(*made(ignores_no), images(0, 10, 80, 90), column(1, 1, 0, 0), ["mass"])
    assert (margins == 0).all()
    for measure in ("accuracy", "accuracy_positive", "accuracy_negative", "balanced_accuracy", "auroc"):
        assert result[f"macro_{measure}"] == result["chance"] == 0.5
    assert result["macro_control_auroc"] == 1 and result["per_finding"]["mass"]["control_auroc_ci"] == [1, 1]


def test_a_constant_preference_for_presence_is_right_in_positives_alone():
    result, _ = evaluate_negation(*made(prefers_presence), images(0, 10, 80, 85), column(1, 1, 0, 0), ["mass"])
    assert (result["macro_accuracy_positive"], result["macro_accuracy_negative"]) == (1, 0)
    assert result["macro_balanced_accuracy"] == 0.5 and result["macro_auroc"] == 1


def test_the_mean_is_over_findings_and_unknown_images_do_not_count():
    targets = np.array([[1, 1], [1, UNKNOWN], [0, 0], [0, UNKNOWN]])
    embeds = images(0, 60, 90, 90)
    result, margins = evaluate_negation(*made(reads_no), embeds, targets, ["mass", "nodule"], num_bootstrap=0)
    mass, nodule = result["per_finding"]["mass"], result["per_finding"]["nodule"]
    assert (mass["accuracy"], nodule["accuracy"], result["macro_accuracy"]) == (0.75, 1, 0.875)
    assert (nodule["num_positive"], nodule["num_negative"]) == (1, 1)
    # what is unknown may be anything
    other, _ = evaluate_negation(*made(reads_no), images(0, 60, 90, 20), targets[:, 1:], ["nodule"], num_bootstrap=0)
    assert other["macro_accuracy"] == 1 and other["num_images"] == 2
    assert margins.shape == (4, 2)


def test_the_order_of_images_and_of_findings_changes_nothing():
    rng = np.random.default_rng(0)
    targets, labels = rng.integers(0, 2, (40, 3)), ["mass", "edema", "nodule"]
    embeds, order = images(*rng.uniform(0, 90, 40)), rng.permutation(40)
    first, margins = evaluate_negation(*made(reads_no), embeds, targets, labels, num_bootstrap=0)
    second, moved = evaluate_negation(
        *made(reads_no), embeds[order], targets[order][:, ::-1], labels[::-1], num_bootstrap=0
    )
    np.testing.assert_allclose(moved, margins[order][:, ::-1], atol=1e-12)
    assert first["macro_accuracy"] == pytest.approx(second["macro_accuracy"])
    for label in labels:
        for measure in ("accuracy", "accuracy_positive", "accuracy_negative", "auroc", "control_auroc"):
            expected = first["per_finding"][label][measure]
            assert second["per_finding"][label][measure] == pytest.approx(expected, abs=1e-12)


def test_no_finding_is_left_out_and_a_finding_of_one_value_is_skipped_with_its_reason():
    targets = np.array([[1, 0, 1], [0, 1, 1]])
    labels = ["mass", "no finding", "edema"]
    result, margins = evaluate_negation(*made(reads_no), images(0, 90), targets, labels, num_bootstrap=0)
    assert result["labels"] == ["mass", "edema"] and margins.shape == (2, 2)
    assert result["left_out"] == ["no finding"] and list(result["per_finding"]) == ["mass"]
    assert result["skipped"] == [{"name": "edema", "reason": "no negative image"}] and result["num_skipped"] == 1


def test_intervals_are_those_of_repeating_patients_and_the_result_fits_into_json():
    rng = np.random.default_rng(1)
    targets, embeds = column(*rng.integers(0, 2, 60)), images(*rng.uniform(0, 90, 60))
    patients = [f"p{number // 4}" for number in range(60)]
    result, margins = evaluate_negation(*made(reads_no), embeds, targets, ["mass"], patients, num_bootstrap=400, seed=3)
    draws = []
    for weights in resample_patients(patients, 60, 400, 3):
        for counts in weights:
            drawn = np.repeat(np.arange(60), counts)
            right = (margins[drawn, 0] > 0) == (targets[drawn, 0] == 1)
            positive = targets[drawn, 0] == 1
            draws.append((right.mean(), right[positive].mean(), right[~positive].mean()))
    draws = np.array(draws)
    mass = result["per_finding"]["mass"]
    for name, values in (
        ("accuracy", draws[:, 0]),
        ("accuracy_positive", draws[:, 1]),
        ("accuracy_negative", draws[:, 2]),
        ("balanced_accuracy", draws[:, 1:].mean(axis=1)),
    ):
        assert mass[f"{name}_ci"] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())
        assert result[f"macro_{name}_ci"] == mass[f"{name}_ci"]
    assert result["num_patients"] == 15
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_one_patient_gives_no_interval_and_says_why():
    result, _ = evaluate_negation(*made(reads_no), images(0, 90), column(1, 0), ["mass"], ["p", "p"])
    assert result["no_interval_because"] == "all images are of one patient" and result["num_patients"] == 1
    intervals = {key: value for key, value in result.items() if key.endswith("_ci")}
    intervals |= {key: value for key, value in result["per_finding"]["mass"].items() if key.endswith("_ci")}
    assert len(intervals) > 10 and set(intervals.values()) == {None}


def test_a_finding_of_one_patient_among_several_has_no_interval():
    targets = np.array([[1, 1], [0, 0], [UNKNOWN, 1], [UNKNOWN, 0]])
    shown = (*made(reads_no), images(0, 90, 0, 90))
    result, _ = evaluate_negation(*shown, targets, ["mass", "edema"], ["p", "p", "q", "r"])
    mass, edema = result["per_finding"]["mass"], result["per_finding"]["edema"]
    assert {value for key, value in mass.items() if key.endswith("_ci")} == {None}
    assert edema["accuracy_ci"] == result["macro_accuracy_ci"] == [1.0, 1.0]
    targets[3, 1] = UNKNOWN  # the one film without edema is of p
    edema = evaluate_negation(*shown, targets, ["mass", "edema"], ["p", "p", "q", "r"])[0]["per_finding"]["edema"]
    assert edema["accuracy_negative_ci"] is None and edema["accuracy_positive_ci"] == [1.0, 1.0]


def test_nothing_to_deny_and_nothing_of_both_values_are_errors():
    with pytest.raises(ValueError, match=r"must name a finding, but is \['no finding'\]"):
        evaluate_negation(*made(reads_no), images(0, 90), column(1, 0), ["no finding"])
    with pytest.raises(ValueError, match=r"none has both \(mass: no positive image\)"):
        evaluate_negation(*made(reads_no), images(0, 90), column(0, 0), ["mass"])


def test_embeddings_of_another_shape_or_length_or_with_nan_are_refused():
    shared = (column(1, 0), ["mass"])
    with pytest.raises(ValueError, match=r"`targets` must be \(3, 1\).*\(2, 1\)"):
        evaluate_negation(*made(reads_no), images(0, 90, 90), *shared)
    with pytest.raises(ValueError, match=r"2 dimensions, but the texts of the model have 3"):
        evaluate_negation(*made(reads_no), images(0, 90)[:, :2], *shared)
    with pytest.raises(ValueError, match="length 1, but their lengths reach from 2 to 2"):
        evaluate_negation(*made(reads_no), 2 * images(0, 90), *shared)
    with pytest.raises(ValueError, match="finite.*3 values"):
        evaluate_negation(*made(reads_no), torch.cat([images(0), torch.full((1, 3), math.nan)]), *shared)


# --------------------------------------------------------------------------------------------------------------- side


def png(width: int = 100, height: int = 50) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, format="PNG")
    return file.getvalue()


def make_rows(*lesions: dict):
    neutral = {"image": png(), "source": "a", "view": "PA"}
    return rows_to_dataset(
        make_row(**{"row_id": str(number), **neutral, "present": ["mass"], **row}) for number, row in enumerate(lesions)
    )


def masks(finding: str, *sides: str) -> dict:
    return {"present": [finding], "masks": [{"finding": finding, "side": side, "png": png()} for side in sides]}


def box(finding: str, x: float, width: float = 20) -> dict:
    lesion = {"finding": finding, "x": x, "y": 0, "width": width, "height": 10}
    return {"present": [finding], "boxes": [lesion]}


def reads_sides(text):
    """First axis: left; second: right."""
    return [1.0, 0.0, 0.0] if "left" in text else [0.0, 1.0, 0.0]


def test_left_beats_right_is_measured_where_masks_tell_the_side():
    mass, nodule = (masks("mass", "left"), masks("mass", "right")), (masks("nodule", "right"), masks("nodule", "left"))
    rows = make_rows(mass[0], *mass, *nodule)
    result, scores = evaluate_side(*made(reads_sides), rows, images(0, 60, 90, 90, 0), num_bootstrap=0)
    mass, nodule = result["per_finding"]["mass"], result["per_finding"]["nodule"]
    assert (mass["accuracy_left"], mass["accuracy_right"], mass["accuracy"]) == pytest.approx((0.5, 1, 2 / 3))
    assert mass["auroc"] == 1 and nodule["accuracy"] == 1
    assert result["macro_accuracy"] == pytest.approx(5 / 6) and result["macro_balanced_accuracy"] == 0.875
    assert mass["prompts"] == ["There is a left lung mass.", "There is a right lung mass."]
    assert (mass["num_left"], mass["num_right"]) == (2, 1)
    assert scores.labels == ["mass", "nodule"]
    assert scores.targets.tolist() == [[1, UNKNOWN], [1, UNKNOWN], [0, UNKNOWN], [UNKNOWN, 0], [UNKNOWN, 1]]
    np.testing.assert_allclose(scores.margins[0], [10, 10], atol=1e-5)
    lines = scores.table()
    assert [line["row_id"] for line in lines] == list("01234")
    assert lines[3] == {"row_id": "3", "finding": "nodule", "side": "right", "margin": pytest.approx(-10)}
    assert "control_auroc" not in mass


def test_a_box_on_the_right_of_a_frontal_film_is_on_the_patients_left():
    rows = make_rows(
        box("mass", x=70), box("mass", x=10), box("mass", x=70) | {"view": "LATERAL"}, box("mass", x=40)
    )  # the last crosses the middle of 100 pixels
    result, scores = evaluate_side(*made(reads_sides), rows, images(0, 90, 90, 90), num_bootstrap=0)
    assert scores.targets[:, 0].tolist() == [1, 0, UNKNOWN, UNKNOWN]
    assert result["macro_accuracy"] == 1 and result["num_images"] == 2
    assert (result["num_bilateral"], result["num_unknown_side"]) == (0, 1)


def test_both_sides_an_unknown_side_and_findings_without_sides_are_left_out():
    rows = make_rows(
        masks("mass", "left"),
        masks("mass", "right"),
        masks("mass", "left", "right"),
        masks("mass", "bilateral"),
        masks("mass", ""),
        masks("cardiomegaly", "left"),
    )
    result, scores = evaluate_side(*made(reads_sides), rows, images(0, 90, 0, 0, 0, 0), num_bootstrap=0)
    assert scores.labels == ["mass"] and result["num_images"] == 2
    assert (result["num_bilateral"], result["num_unknown_side"]) == (2, 1)


def test_a_model_that_does_not_read_sides_scores_chance():
    rows = make_rows(masks("mass", "left"), masks("mass", "right"), masks("mass", "right"))
    result, _ = evaluate_side(*made(ignores_no), rows, images(0, 30, 90), num_bootstrap=0)
    for measure in ("accuracy", "accuracy_left", "accuracy_right", "balanced_accuracy", "auroc"):
        assert result[f"macro_{measure}"] == 0.5


def test_equal_names_in_two_sources_are_two_patients_and_images_without_one_are_their_own():
    patients = ({"patient_id": "p"}, {"patient_id": "p", "source": "b"}, {}, {"patient_id": "p"})
    rows = make_rows(*(masks("mass", side) | of for side, of in zip(("left", "right") * 2, patients, strict=True)))
    result, scores = evaluate_side(*made(reads_sides), rows, images(0, 90, 0, 90), num_bootstrap=50)
    assert result["num_patients"] == 3 and scores.patient_ids[0] == scores.patient_ids[3]
    alone = evaluate_side(*made(reads_sides), rows.select([0, 3]), images(0, 90), num_bootstrap=50)[0]
    assert alone["num_patients"] == 1 and alone["macro_accuracy_ci"] is None
    assert alone["no_interval_because"] == "all images are of one patient"


def test_no_known_side_and_one_side_alone_are_errors():
    with pytest.raises(ValueError, match="None of 2 rows tells on which side"):
        evaluate_side(*made(reads_sides), make_rows({}, masks("mass", "")), images(0, 90))
    with pytest.raises(ValueError, match="a left and a right image.*mass: no right image"):
        evaluate_side(*made(reads_sides), make_rows(masks("mass", "left"), {}), images(0, 90))
    with pytest.raises(ValueError, match="a row for each of 2 rows"):
        evaluate_side(*made(reads_sides), make_rows({}, {}), images(0))

"""Intervals and paired comparisons. The slow tests simulate studies whose truth is known."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import accuracy_score, roc_auc_score

from MMCLIP.evaluation import bootstrap
from MMCLIP.evaluation.bootstrap import (
    compare_means,
    compare_models,
    compare_multiclass,
    mean_with_interval,
    resample_patients,
)
from MMCLIP.evaluation.metrics import choose_thresholds, classification_metrics


def _two_models(num_images=80, num_classes=2, lead=0.7):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (num_images, num_classes))
    noise = rng.normal(0, 1, labels.shape)
    return labels, (1 + lead) * labels + noise, labels + noise + rng.normal(0, 0.3, labels.shape)


PATIENTS = [f"p{row // 2}" for row in range(80)]
NAMES = ["edema", "mass"]


def test_a_draw_holds_as_many_patients_as_there_are_with_all_their_images():
    (weights,) = resample_patients(["a", "a", "b", "", ""], 5, 200)
    assert weights.shape == (200, 5) and (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [0, 2, 3, 4]].sum(axis=1) == 4).all() and (weights[:, 3] != weights[:, 4]).any()


def test_the_difference_is_that_of_the_point_values_and_its_interval_that_of_the_same_draws():
    labels, first, second = _two_models()
    compared = compare_models(labels, first, second, NAMES, PATIENTS, 200, seed=3)
    (weights,) = resample_patients(PATIENTS, 80, 200, seed=3)
    leads = np.array(
        [
            [
                roc_auc_score(labels[:, c], first[:, c], sample_weight=w)
                - roc_auc_score(labels[:, c], second[:, c], sample_weight=w)
                for c in (0, 1)
            ]
            for w in weights
        ]
    )
    for number, name in enumerate(NAMES):
        found = compared["per_class"][name]["auroc"]
        assert found["ci"] == pytest.approx(np.percentile(leads[:, number], [2.5, 97.5]).tolist(), abs=1e-9)
    macro = leads.mean(axis=1)
    assert compared["macro_auroc"]["ci"] == pytest.approx(np.percentile(macro, [2.5, 97.5]).tolist(), abs=1e-9)
    rarer = min((macro <= 0).sum(), (macro >= 0).sum())
    assert compared["macro_auroc"]["p_value"] == pytest.approx(min(1, 2 * (1 + rarer) / 201))
    alone = [
        classification_metrics(labels, scores, NAMES, num_bootstrap=0)["macro_auroc"] for scores in (first, second)
    ]
    assert compared["macro_auroc"]["difference"] == pytest.approx(alone[0] - alone[1], abs=1e-12)


def test_two_models_that_are_one_do_not_differ():
    labels, first, _ = _two_models()
    thresholds = choose_thresholds(labels, first, NAMES)
    compared = compare_models(
        labels, first, 3 * first, NAMES, PATIENTS, 50, thresholds_a=thresholds,
        thresholds_b={name: 3 * value for name, value in thresholds.items()},
    )  # fmt: skip
    for key in ("auroc", "average_precision", "f1", "accuracy", "mcc"):
        for values in (compared[f"macro_{key}"], *(one[key] for one in compared["per_class"].values())):
            assert values == {"difference": 0.0, "ci": [0.0, 0.0], "p_value": 1.0}


def test_exchanged_models_change_the_sign_alone():
    labels, first, second = _two_models()
    there = compare_models(labels, first, second, NAMES, PATIENTS, 300)["macro_auroc"]
    back = compare_models(labels, second, first, NAMES, PATIENTS, 300)["macro_auroc"]
    assert back["difference"] == pytest.approx(-there["difference"])
    assert back["ci"] == pytest.approx([-there["ci"][1], -there["ci"][0]]) and back["p_value"] == there["p_value"]


def test_a_p_value_is_small_where_one_model_is_clearly_better_but_never_0():
    labels = np.tile([[1], [0]], (40, 1))
    right = labels.astype(float)
    compared = compare_models(labels, right, -right, ["edema"], None, 1000)["macro_auroc"]
    assert compared == {"difference": 1.0, "ci": [1.0, 1.0], "p_value": pytest.approx(2 / 1001)}


def test_thresholded_differences_need_a_threshold_in_both_models():
    labels, first, second = _two_models()
    compared = compare_models(
        labels, first, second, NAMES, None, 20, thresholds_a={"edema": 0.5, "mass": 0.5}, thresholds_b={"mass": 0.5}
    )
    assert "f1" not in compared["per_class"]["edema"]
    lead = np.subtract(*(accuracy_score(labels[:, 1], scores[:, 1] >= 0.5) for scores in (first, second)))
    assert compared["per_class"]["mass"]["accuracy"]["difference"] == pytest.approx(lead)
    assert compared["macro_accuracy"] == compared["per_class"]["mass"]["accuracy"]
    assert "macro_f1" not in compare_models(labels, first, second, NAMES, None, 20, thresholds_a={"mass": 0.5})


def test_classes_with_one_label_are_skipped_and_named():
    labels, first, second = _two_models()
    labels[:, 0] = 1
    compared = compare_models(labels, first, second, NAMES, None, 20)
    assert compared["skipped"] == ["edema"] and list(compared["per_class"]) == ["mass"]
    labels[:, 1] = -100
    nothing = compare_models(labels, first, second, NAMES, None, 20)
    assert nothing["macro_auroc"] == {"difference": None, "ci": None, "p_value": None} and not nothing["per_class"]


def test_one_patient_gives_differences_without_intervals_and_the_reason():
    labels, first, second = _two_models()
    one = ["a"] * len(labels)
    compared = compare_models(labels, first, second, NAMES, one, 20)
    assert compared["interval_reason"] == "all images are of one patient"
    assert compared["macro_auroc"]["difference"] > 0
    assert compared["macro_auroc"]["ci"] is compared["macro_auroc"]["p_value"] is None
    mean = compare_means([1.0, 2.0], [0.0, 0.0], ["a", "a"])
    assert mean == {"difference": 1.5, "ci": None, "p_value": None}
    assert mean_with_interval([1.0, 2.0], ["a", "a"]) == (1.5, None)


def test_a_class_that_is_known_in_one_patient_alone_has_a_difference_without_a_p_value():
    labels, first, second = _two_models()
    labels[:, 1] = -100
    labels[:2, 1] = [1, 0]
    compared = compare_models(labels, first, second, NAMES, PATIENTS, 50)["per_class"]
    assert compared["mass"]["auroc"]["ci"] is compared["mass"]["auroc"]["p_value"] is None
    assert compared["mass"]["auroc"]["difference"] is not None and compared["edema"]["auroc"]["ci"] is not None


def test_multi_class_models_are_compared_in_all_metrics():
    classes = np.tile([0, 1, 2], 20)
    right, wrong = np.eye(3)[classes], np.eye(3)[(classes + 1) % 3]
    compared = compare_multiclass(classes, right, wrong, ["a", "b", "c"], None, 100)
    assert compared["accuracy"] == {"difference": 1.0, "ci": [1.0, 1.0], "p_value": pytest.approx(2 / 101)}
    assert compared["mcc"]["difference"] == pytest.approx(1.5)  # -1 / 2 for the shifted ones
    assert compared["macro_auroc"]["difference"] == pytest.approx(1 - 0.25)  # pairs of two wrong classes tie
    assert set(compared) >= {"balanced_accuracy", "macro_f1", "interval_reason", "num_images"}


def test_means_are_compared_over_rows_and_drawn_by_patients():
    values = np.array([3.0, 3.0, 0.0, 0.0])
    patients = ["a", "a", "b", ""]
    mean, interval = mean_with_interval(values, patients, 400, seed=1)
    (weights,) = resample_patients(patients, 4, 400, seed=1)
    draws = (weights * values).sum(axis=1) / weights.sum(axis=1)
    assert mean == 1.5 and interval == pytest.approx(np.percentile(draws, [2.5, 97.5]).tolist())
    compared = compare_means(values, np.zeros(4), patients, 400, seed=1)
    assert compared["difference"] == 1.5 and compared["ci"] == pytest.approx(interval)
    assert compared["p_value"] == pytest.approx(2 * (1 + (draws <= 0).sum()) / 401)
    assert mean_with_interval(values, patients, 0) == (1.5, None)


def test_draws_are_the_same_in_blocks_however_small(monkeypatch):
    labels, first, second = _two_models()
    whole = compare_models(labels, first, second, NAMES, PATIENTS, 50)
    monkeypatch.setattr(bootstrap, "_BLOCK", 1)
    one_by_one = compare_models(labels, first, second, NAMES, PATIENTS, 50)
    for key in ("macro_auroc", "macro_average_precision", "macro_sensitivity_at_specificity"):
        assert one_by_one[key]["ci"] == pytest.approx(whole[key]["ci"], abs=1e-12)
        assert one_by_one[key]["p_value"] == whole[key]["p_value"]


def test_bad_input_is_refused_with_a_reason():
    labels, first, second = _two_models()
    with pytest.raises(ValueError, match=r"\['nodule'\], which are not among"):
        compare_models(labels, first, second, NAMES, thresholds_a={"nodule": 1.0}, thresholds_b={})
    with pytest.raises(ValueError, match="'mass' in row 1"):
        second[1, 1] = np.nan
        compare_models(labels, first, second, NAMES)
    with pytest.raises(ValueError, match=r"\(80, 1\)"):
        compare_models(labels, first, second[:, :1], NAMES)
    with pytest.raises(ValueError, match="same rows"):
        compare_means([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="1 that are not finite"):
        mean_with_interval([1.0, np.nan])
    with pytest.raises(ValueError, match="2 patients"):
        mean_with_interval([1.0, 2.0], ["a"])


# ------------------------------------------------------------------------------------------------- simulated studies


NUM_STUDIES, NUM_PATIENTS = 500, 300
SHIFTS, SHARES = np.array([1.5, 1.0, 0.5]), np.array([0.3, 0.2, 0.5])  # of three findings
ALIKE = 0.6  # correlation of the images of a patient, in labels and scores


def _normal_images(rng, patients):
    """(n, findings) of standard normal numbers that are alike within a patient."""
    of_patient = rng.normal(size=(patients.max() + 1, len(SHIFTS)))[patients]
    return np.sqrt(ALIKE) * of_patient + np.sqrt(1 - ALIKE) * rng.normal(size=of_patient.shape)


def _study(rng, lead):
    """Labels, scores of two models that see partly the same noise, patients of 1 to 3 images each.

    The score of a present image is normal around the shift of its finding, of an absent one around 0. The first model
    has a shift that is larger by `lead`.
    """
    patients = np.repeat(np.arange(NUM_PATIENTS), rng.integers(1, 4, NUM_PATIENTS))
    labels = (_normal_images(rng, patients) < norm.ppf(SHARES)).astype(int)
    first = _normal_images(rng, patients)
    second = 0.7 * first + np.sqrt(1 - 0.7**2) * _normal_images(rng, patients)
    return labels, labels * SHIFTS + first, labels * (SHIFTS - lead) + second, [f"p{number}" for number in patients]


@pytest.mark.slow
def test_intervals_hold_the_truth_in_95_percent_of_studies():
    names, thresholds = ["a", "b", "c"], SHIFTS / 2
    lead = 0.3
    areas, areas_second = norm.cdf(SHIFTS / np.sqrt(2)), norm.cdf((SHIFTS - lead) / np.sqrt(2))
    truth = {
        "auroc": areas[0],
        "accuracy": norm.cdf(thresholds[0]),  # half-way between two normals of equal width
        "macro_auroc": areas.mean(),
        "difference": (areas - areas_second).mean(),
    }
    rng, held = np.random.default_rng(0), dict.fromkeys(truth, 0)
    for number in range(NUM_STUDIES):
        labels, first, second, patients = _study(rng, lead)
        options = {"patient_ids": patients, "num_bootstrap": 1000, "seed": number}
        given = dict(zip(names, thresholds, strict=True))
        found = classification_metrics(labels, first, names, thresholds=given, **options)
        intervals = {
            "auroc": found["per_class"]["a"]["auroc_ci"],
            "accuracy": found["per_class"]["a"]["accuracy_ci"],
            "macro_auroc": found["macro_auroc_ci"],
            "difference": compare_models(labels, first, second, names, **options)["macro_auroc"]["ci"],
        }
        for key, (low, high) in intervals.items():
            held[key] += low <= truth[key] <= high
    shares = {key: count / NUM_STUDIES for key, count in held.items()}
    print(shares)
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


@pytest.mark.slow
def test_models_that_are_equally_good_differ_significantly_in_5_percent_of_studies():
    rng, significant = np.random.default_rng(1), 0
    for number in range(NUM_STUDIES):
        labels, first, second, patients = _study(rng, lead=0.0)
        compared = compare_models(labels, first, second, ["a", "b", "c"], patients, 1000, number)["macro_auroc"]
        significant += compared["p_value"] < 0.05
    print(significant / NUM_STUDIES)
    assert 0.03 <= significant / NUM_STUDIES <= 0.07

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from MMCLIP.evaluation import bootstrap, metrics, weighted_metrics
from MMCLIP.evaluation.metrics import auroc, average_precision, classification_metrics


def test_auroc_counts_a_tie_one_half():
    # pairs (present, absent): .9 > .8, .9 > .1, .8 = .8, .8 > .1
    assert auroc([1, 0, 1, 0], [0.9, 0.8, 0.8, 0.1]) == 3.5 / 4


def test_average_precision_is_the_mean_precision_at_each_present_image():
    # the present images are found at rank 1 (1 of 1) and rank 3 (2 of 3)
    assert average_precision([1, 0, 1], [0.9, 0.8, 0.7]) == pytest.approx((1 + 2 / 3) / 2)


def test_both_metrics_are_nan_when_only_one_label_occurs():
    for labels in ([1, 1], [0, 0], []):
        assert np.isnan(auroc(labels, np.zeros(len(labels)))) and np.isnan(
            average_precision(labels, np.zeros(len(labels)))
        )


@pytest.mark.parametrize("digits", [1, 6])  # one digit makes many ties
def test_weighted_metrics_equal_scikit_learn(digits):
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 60), rng.random(60).round(digits)
    weights = rng.integers(0, 4, (5, 60))
    ranking = weighted_metrics.Ranking(labels, scores, np.arange(60), 60)
    for weight, (area, precision, _) in zip(weights, ranking(weights.T.astype(float)).T, strict=True):
        assert area == pytest.approx(roc_auc_score(labels, scores, sample_weight=weight), abs=1e-9)
        assert precision == pytest.approx(average_precision_score(labels, scores, sample_weight=weight), abs=1e-9)


def test_a_class_with_one_label_is_skipped_counted_and_left_out_of_the_mean():
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]])
    scores = np.array([[0.9, 0.5, 0.5], [0.8, 0.6, 0.4], [0.7, 0.7, 0.3]])
    result = classification_metrics(labels, scores, ["edema", "mass", "nodule"], num_bootstrap=0)
    assert result["macro_auroc"] == result["per_class"]["edema"]["auroc"] == 0.5
    assert list(result["per_class"]) == ["edema"] and result["num_skipped"] == 2
    assert [(entry["name"], entry["reason"]) for entry in result["skipped"]] == [
        ("mass", "no positive image"),
        ("nodule", "no negative image"),
    ]


def test_means_are_none_not_nan_when_every_class_is_skipped():
    result = classification_metrics(np.ones((3, 1)), np.zeros((3, 1)), ["edema"], num_bootstrap=10)
    assert result["macro_auroc"] is None and result["macro_auroc_ci"] is None and result["per_class"] == {}


def test_images_of_unknown_label_do_not_count_for_that_class():
    labels = np.array([[1], [0], [-100]])
    result = classification_metrics(labels, np.array([[0.9], [0.1], [np.nan]]), ["edema"], num_bootstrap=0)
    assert result["per_class"]["edema"]["auroc"] == 1.0
    assert (result["per_class"]["edema"]["num_positive"], result["per_class"]["edema"]["num_negative"]) == (1, 1)


def test_macro_is_the_mean_over_classes():
    labels = np.array([[1, 1], [0, 0]])
    result = classification_metrics(labels, np.array([[1.0, 0.0], [0.0, 1.0]]), ["edema", "mass"], num_bootstrap=0)
    assert result["macro_auroc"] == 0.5  # one class perfect, one wrong
    assert result["macro_average_precision"] == (1 + 0.5) / 2


def _random_problem(num_rows=40, num_classes=2):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (num_rows, num_classes))
    return labels, labels + rng.normal(0, 1, labels.shape)


def test_intervals_draw_patients_so_copies_of_an_image_do_not_narrow_them():
    labels, scores = _random_problem()
    patients = [f"p{row:02d}" for row in range(len(labels))]
    once = classification_metrics(labels, scores, ["edema", "mass"], patients, num_bootstrap=200)
    copied = classification_metrics(
        np.repeat(labels, 5, axis=0), np.repeat(scores, 5, axis=0), ["edema", "mass"], np.repeat(patients, 5), 200
    )
    as_images = classification_metrics(
        np.repeat(labels, 5, axis=0), np.repeat(scores, 5, axis=0), ["edema", "mass"], None, 200
    )

    def width(result):
        low, high = result["per_class"]["edema"]["auroc_ci"]
        return high - low

    assert copied["macro_auroc_ci"] == pytest.approx(once["macro_auroc_ci"])
    assert copied["per_class"]["mass"]["average_precision_ci"] == pytest.approx(
        once["per_class"]["mass"]["average_precision_ci"]
    )
    assert width(as_images) < width(once) / 1.5


def test_rows_without_a_patient_stand_for_one_each():
    labels, scores = _random_problem()
    names = ["edema", "mass"]
    without = classification_metrics(labels, scores, names, [""] * len(labels), num_bootstrap=100)
    assert without == classification_metrics(labels, scores, names, None, num_bootstrap=100)


def test_interval_holds_the_estimate_and_depends_on_the_seed_alone():
    labels, scores = _random_problem()
    results = [classification_metrics(labels, scores, ["edema", "mass"], seed=seed) for seed in (0, 0, 1)]
    low, high = results[0]["macro_auroc_ci"]
    assert 0.5 < low < results[0]["macro_auroc"] < high < 1
    assert results[0] == results[1] != results[2]


def test_draws_are_the_same_in_blocks(monkeypatch):
    labels, scores = _random_problem()
    whole = classification_metrics(labels, scores, ["edema", "mass"], num_bootstrap=50)
    monkeypatch.setattr(bootstrap, "_BLOCK", 7 * len(labels))
    blocks = classification_metrics(labels, scores, ["edema", "mass"], num_bootstrap=50)
    assert blocks["macro_auroc_ci"] == pytest.approx(whole["macro_auroc_ci"], rel=1e-12)
    assert blocks["num_bootstrap_macro"] == whole["num_bootstrap_macro"] == 50


def test_draws_in_which_a_rare_class_has_no_image_are_left_out_of_the_mean_and_counted():
    labels = np.zeros((50, 1), dtype=int)
    labels[0] = 1
    result = classification_metrics(labels, np.linspace(1, 0, 50)[:, None], ["edema"], num_bootstrap=1000)
    assert 580 < result["num_bootstrap_macro"] < 690  # 1 - 1 / e of the draws hold the one present image
    assert result["macro_auroc_ci"] == [1.0, 1.0]


def test_an_interval_from_too_few_usable_draws_is_none():
    assert metrics.percentile_interval(np.array([0.5] * 9 + [np.nan] * 91), 100) is None
    assert metrics.percentile_interval(np.array([0.5] * 10 + [np.nan] * 90), 100) == [0.5, 0.5]


@pytest.mark.parametrize(
    "labels, scores, names, patients, message",
    [
        ([[1], [0]], [[0.1], [np.nan]], ["edema"], None, "'edema' in row 1"),
        ([[1], [0]], [[0.1], [np.inf]], ["edema"], None, "NaN or infinite"),
        ([[1], [2]], [[0.1], [0.2]], ["edema"], None, "2"),
        ([[1], [0]], [[0.1, 0.2], [0.1, 0.2]], ["edema"], None, r"\(2, 1\) and \(2, 2\)"),
        ([[1], [0]], [[0.1], [0.2]], ["edema"], ["a"], "2 patients"),
        ([[1, 1]], [[0.1, 0.2]], ["edema", "edema"], None, "once"),
        (np.zeros((0, 1)), np.zeros((0, 1)), ["edema"], None, "no image"),
    ],
)
def test_bad_input_is_refused_with_a_reason(labels, scores, names, patients, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array(labels), np.array(scores), names, patients)


def test_the_evaluate_metric_gives_the_same_numbers_offline():
    labels, scores = _random_problem()
    computed = metrics.MultiLabelAUROC().compute(
        predictions=scores.tolist(), references=labels.tolist(), names=["edema", "mass"], num_bootstrap=50
    )
    assert computed == classification_metrics(labels, scores, ["edema", "mass"], num_bootstrap=50)
    assert list(metrics.MultiLabelAUROC().compute(predictions=scores, references=labels)["per_class"]) == ["0", "1"]

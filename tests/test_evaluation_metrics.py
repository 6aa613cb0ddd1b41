import json

import numpy as np
import pytest
import sklearn.metrics as sklearn_metrics
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from MMCLIP.evaluation import bootstrap, metrics, weighted_metrics
from MMCLIP.evaluation.calibration import expected_calibration_error, fit_temperature
from MMCLIP.evaluation.metrics import (
    auroc,
    average_precision,
    choose_thresholds,
    classification_metrics,
    multiclass_metrics,
    sensitivity_at_specificity,
    threshold_metrics,
)


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


def test_the_interval_of_a_mean_uses_the_draws_in_which_every_class_has_both_labels():
    labels, scores = _random_problem()
    labels[:, 1] = 0
    labels[0, 1] = 1
    result = classification_metrics(labels, scores, ["edema", "mass"], num_bootstrap=100)
    (weights,) = bootstrap.resample_patients(None, len(labels), 100)
    means = [
        np.mean([roc_auc_score(labels[:, c], scores[:, c], sample_weight=weight) for c in (0, 1)])
        for weight in weights
        if weight[0] > 0
    ]
    assert result["num_bootstrap_macro"] == len(means) < 80
    assert result["macro_auroc_ci"] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), abs=1e-9)


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


# ---------------------------------------------------------------------------------------- points, against scikit-learn


def test_sensitivity_at_a_specificity_takes_the_best_threshold_that_keeps_it():
    # ten absent images: one may be called present at 0.9, so all present images above the second highest absent count
    labels = [1, 0, 1, 1, 0, 1] + [0] * 8
    scores = [9, 8, 7, 6, 5, 4] + [1] * 8
    assert sensitivity_at_specificity(labels, scores) == 0.75
    assert sensitivity_at_specificity(labels, scores, 1.0) == 0.25
    assert sensitivity_at_specificity(labels, scores, 0.8) == 1.0


def test_a_tie_of_present_and_absent_is_one_step_and_calling_nothing_present_always_keeps_the_specificity():
    assert sensitivity_at_specificity([1, 0, 1], [2, 2, 1]) == 0  # the first step already loses the one absent image
    assert np.isnan(sensitivity_at_specificity([1, 1], [2, 1])) and np.isnan(sensitivity_at_specificity([0], [2]))


@pytest.mark.parametrize("digits", [1, 6])
@pytest.mark.parametrize("specificity", [0.5, 0.8, 0.9, 0.95])
def test_sensitivity_at_a_specificity_is_read_off_the_curve_of_scikit_learn(digits, specificity):
    rng = np.random.default_rng(2)
    labels, scores = np.tile([1, 0, 0], 40), rng.random(120).round(digits)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    expected = true[1 - false >= specificity - 1e-12].max()
    assert sensitivity_at_specificity(labels, scores, specificity) == pytest.approx(expected, abs=1e-9)


SKLEARN = {
    "f1": lambda y, p, w=None: sklearn_metrics.f1_score(y, p, sample_weight=w, zero_division=np.nan),
    "accuracy": lambda y, p, w=None: sklearn_metrics.accuracy_score(y, p, sample_weight=w),
    "mcc": lambda y, p, w=None: sklearn_metrics.matthews_corrcoef(y, p, sample_weight=w),
    "sensitivity": lambda y, p, w=None: sklearn_metrics.recall_score(y, p, sample_weight=w, zero_division=np.nan),
    "specificity": lambda y, p, w=None: sklearn_metrics.recall_score(
        y, p, pos_label=0, sample_weight=w, zero_division=np.nan
    ),
}


@pytest.mark.parametrize("threshold", [-1, 0.3, 0.5, 1, 2])  # also: everything present, nothing present
def test_metrics_at_a_threshold_are_those_of_scikit_learn_and_a_score_at_it_is_present(threshold):
    rng = np.random.default_rng(3)
    labels, scores = rng.integers(0, 2, 50), rng.random(50).round(1)
    found = threshold_metrics(labels, scores, threshold)
    for key, metric in SKLEARN.items():
        assert found[key] == pytest.approx(metric(labels, scores >= threshold), abs=1e-9), key
    (right, false), (missed, hit) = confusion_matrix(labels, scores >= threshold).tolist()
    assert found["confusion"] == {
        "true_positive": hit, "false_negative": missed, "false_positive": false, "true_negative": right
    }  # fmt: skip


def test_without_one_of_the_labels_only_what_needs_both_is_undefined():
    for labels, scores in (([1, 1], [0, 1]), ([0, 0], [0, 1]), ([0, 0], [0, 0]), ([1, 1], [1, 1])):
        found = threshold_metrics(labels, scores, 0.5)
        assert np.isnan(found["mcc"])  # scikit-learn gives 0
        for key in ("f1", "accuracy", "sensitivity", "specificity"):
            expected = SKLEARN[key](np.array(labels), np.array(scores) >= 0.5)
            assert found[key] == pytest.approx(expected, nan_ok=True), key
    assert np.isnan(threshold_metrics([0, 0], [0, 0], 0.5)["f1"])


def test_every_metric_of_every_draw_is_that_of_scikit_learn_with_weights():
    rng = np.random.default_rng(4)
    labels, scores = rng.integers(0, 2, (60, 2)), rng.random((60, 2)).round(1)
    labels[:7, 0] = -100
    probabilities, patients = rng.random((60, 2)).round(2), rng.permutation(np.arange(60) % 25)
    statistics = weighted_metrics.MultiLabelStatistics(
        labels, scores, patients, thresholds=np.array([0.5, 0.3]), probabilities=probabilities, specificity=0.8
    )
    counts = rng.multinomial(25, np.full(25, 1 / 25), size=20)
    found = statistics(counts.T.astype(float))
    for draw, count in enumerate(counts):
        for column, threshold in ((0, 0.5), (1, 0.3)):
            rows = np.flatnonzero(labels[:, column] != -100)
            y, s, p = labels[rows, column], scores[rows, column], probabilities[rows, column]
            weight = count[patients[rows]]
            copies = np.repeat(np.arange(len(rows)), weight)
            expected = {
                "auroc": roc_auc_score(y, s, sample_weight=weight),
                "average_precision": average_precision_score(y, s, sample_weight=weight),
                "sensitivity_at_specificity": sensitivity_at_specificity(y[copies], s[copies], 0.8),
                "brier": sklearn_metrics.brier_score_loss(y, p, sample_weight=weight),
                "ece": expected_calibration_error(y[copies], p[copies]),
                **{key: metric(y, s >= threshold, weight) for key, metric in SKLEARN.items()},
            }
            assert set(expected) == set(found)
            for key, value in expected.items():
                assert found[key][column, draw] == pytest.approx(value, abs=1e-9), key


# -------------------------------------------------------------------------------------------------------- thresholds


def test_the_chosen_threshold_is_the_best_of_all_scores():
    rng = np.random.default_rng(5)
    labels, scores = rng.integers(0, 2, (80, 1)), rng.random((80, 1)).round(2)
    measures = {
        "f1": lambda found: found["f1"],
        "mcc": lambda found: found["mcc"],
        "youden": lambda found: found["sensitivity"] + found["specificity"],
    }
    for criterion, measure in measures.items():
        chosen = choose_thresholds(labels, scores, ["edema"], criterion)["edema"]
        values = {t: measure(threshold_metrics(labels[:, 0], scores[:, 0], t)) for t in np.unique(scores)}
        assert values[chosen] == max(values.values())
        assert chosen == max(t for t, value in values.items() if value == max(values.values()))


def test_of_equally_good_thresholds_the_highest_is_chosen():
    # F1 is 2/3 for calling one image present, and for calling all four present
    labels = np.array([[1], [0], [0], [1]])
    assert choose_thresholds(labels, np.array([[4.0], [3.0], [2.0], [1.0]]), ["edema"]) == {"edema": 4.0}


def test_a_label_without_both_values_gets_no_threshold():
    labels = np.array([[1, 1, -100], [0, 1, -100], [-100, 1, -100]])
    scores = np.array([[0.7, 0.1, np.nan], [0.2, 0.2, np.nan], [np.nan, 0.3, np.nan]])
    assert choose_thresholds(labels, scores, ["edema", "mass", "nodule"]) == {"edema": 0.7}


def _with_thresholds(**options):
    labels = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 1]])
    scores = np.array([[0.9, 0.4, 0.1], [0.2, 0.6, 0.1], [0.5, 0.8, 0.1], [0.1, 0.2, 0.1]])
    return classification_metrics(labels, scores, ["edema", "mass", "nodule"], None, 50, **options)


def test_thresholds_add_their_metrics_to_the_labels_that_have_one_and_the_others_are_named():
    result = _with_thresholds(thresholds={"edema": 0.5})
    edema = result["per_class"]["edema"]
    assert edema["confusion"] == {"true_positive": 1, "false_negative": 1, "false_positive": 1, "true_negative": 1}
    assert (edema["threshold"], edema["f1"], edema["accuracy"], edema["mcc"]) == (0.5, 0.5, 0.5, 0.0)
    assert edema["sensitivity"] == edema["specificity"] == 0.5
    assert edema["accuracy_ci"][0] < 0.5 < edema["accuracy_ci"][1]
    assert not {"threshold", "f1", "confusion"} & set(result["per_class"]["mass"])
    assert result["no_threshold"] == ["mass"]  # the nodule is skipped, as no image lacks it
    assert result["macro_f1"] == 0.5 and result["macro_f1_ci"] == edema["f1_ci"]


def test_without_thresholds_there_is_no_f1_but_under_the_name_of_the_oracle():
    result = _with_thresholds()
    assert "macro_f1" not in result and "no_threshold" not in result
    # edema: 0.9 alone gives F1 2/3, from 0.2 on 4/5; mass: 0.8 gives 2/3, from 0.4 on 4/5
    assert result["per_class"]["edema"]["oracle_threshold"] == {"threshold": 0.2, "f1": 0.8, "accuracy": 0.75}
    assert result["per_class"]["mass"]["oracle_threshold"] == {"threshold": 0.4, "f1": 0.8, "accuracy": 0.75}
    assert result["oracle_threshold"] == {"macro_f1": 0.8, "macro_accuracy": 0.75}
    assert not {"f1", "accuracy", "threshold"} & set(result["per_class"]["edema"])


def test_the_oracle_is_the_best_f1_of_the_curve_of_scikit_learn():
    labels, scores = _random_problem(200, 1)
    precision, recall, _ = precision_recall_curve(labels[:, 0], scores[:, 0])
    best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    result = classification_metrics(labels, scores, ["edema"], num_bootstrap=0)
    assert result["per_class"]["edema"]["oracle_threshold"]["f1"] == pytest.approx(best, abs=1e-9)


def test_probabilities_add_calibration_of_the_scored_classes():
    probabilities = np.full((4, 3), 0.75)
    result = _with_thresholds(probabilities=probabilities)
    assert result["macro_ece"] == pytest.approx(0.25) and result["macro_brier"] == pytest.approx(0.3125)
    assert set(result["per_class"]["mass"]) >= {"ece", "ece_ci", "brier", "brier_ci"}
    labels, scores = _random_problem()
    both = classification_metrics(labels, scores, ["a", "b"], num_bootstrap=0, probabilities=1 / (1 + np.exp(-scores)))
    assert both["macro_ece"] == pytest.approx(expected_calibration_error(labels, 1 / (1 + np.exp(-scores))), abs=1e-12)


def test_every_number_has_its_interval_beside_it_and_json_holds_all():
    labels, scores = _random_problem()
    probabilities = 1 / (1 + np.exp(-scores))
    thresholds = choose_thresholds(labels, scores, ["edema", "mass"])
    result = classification_metrics(
        labels, scores, ["edema", "mass"], num_bootstrap=50, thresholds=thresholds, probabilities=probabilities
    )
    keys = [*weighted_metrics.RANKED, *weighted_metrics.THRESHOLDED, *weighted_metrics.CALIBRATED]
    for values, prefix in ((result, "macro_"), *((inner, "") for inner in result["per_class"].values())):
        for key in keys:
            low, high = values[f"{prefix}{key}_ci"]
            assert low < high and (key == "ece" or low <= values[f"{prefix}{key}"] <= high)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_one_patient_has_numbers_but_no_interval_and_the_reason_stands_there():
    labels, scores = _random_problem()
    result = classification_metrics(labels, scores, ["edema", "mass"], ["a"] * len(labels), 50)
    assert result["macro_auroc"] > 0.5 and result["macro_auroc_ci"] is result["per_class"]["mass"]["auroc_ci"] is None
    assert result["interval_reason"] == "all images are of one patient"
    assert classification_metrics(labels, scores, ["edema", "mass"])["interval_reason"] is None


def test_a_class_that_is_known_in_one_patient_alone_has_no_interval_of_its_own():
    labels, scores = _random_problem()
    labels[4:, 1] = -100
    labels[:4, 1] = [0, 1, 0, 1]
    patients = ["a"] * 4 + [""] * (len(labels) - 4)
    result = classification_metrics(labels, scores, ["edema", "mass"], patients, 50)
    assert result["per_class"]["mass"]["auroc_ci"] is None
    assert result["per_class"]["mass"]["interval_reason"] == "its known images are of one patient"
    assert result["per_class"]["edema"]["auroc_ci"] is not None
    alone = classification_metrics(labels[:, 1:], scores[:, 1:], ["mass"], patients, 50)
    assert alone["macro_auroc"] is not None and alone["macro_auroc_ci"] is None


def test_a_class_whose_images_are_of_one_patient_has_no_interval_of_its_own():
    classes, scores = _class_problem()
    patients = ["x" if number == 0 else "" for number in classes]
    result = multiclass_metrics(classes, scores, ["a", "b", "c"], patients, 50)
    assert result["per_class"]["a"]["recall"] is not None and result["per_class"]["a"]["recall_ci"] is None
    assert result["per_class"]["a"]["interval_reason"] == "its images are of one patient"
    assert result["per_class"]["b"]["recall_ci"] is not None and "interval_reason" not in result["per_class"]["b"]


def test_where_every_label_is_unknown_all_classes_are_skipped():
    nothing = np.full((3, 2), -100)
    result = classification_metrics(
        nothing, np.zeros((3, 2)), ["a", "b"], thresholds={"a": 0.5}, probabilities=np.zeros((3, 2))
    )
    assert result["num_skipped"] == 2 and result["macro_f1"] is result["macro_ece"] is result["macro_auroc"] is None
    assert [entry["reason"] for entry in result["skipped"]] == ["no positive and negative image"] * 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"thresholds": {"edema": 0.5, "nodules": 0.5}}, r"\['nodules'\], which are not among"),
        ({"thresholds": {"edema": np.nan}}, r"\['edema'\] are not"),
        ({"probabilities": np.full((4, 3), 1.5)}, r"in \[0, 1\]"),
        ({"probabilities": np.zeros((4, 2))}, r"\(4, 3\) and \(4, 2\)"),
        ({"specificity": 90}, "`specificity` must"),
    ],
)
def test_bad_options_are_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        _with_thresholds(**options)


def test_an_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match="f1, youden, mcc, but is 'gmean'"):
        choose_thresholds(np.array([[1], [0]]), np.zeros((2, 1)), ["edema"], "gmean")


# ------------------------------------------------------------------------------------------------- one class an image


def _class_problem(num_images=90, num_classes=3, digits=1):
    rng = np.random.default_rng(6)
    classes = rng.integers(0, num_classes, num_images)
    raw = rng.normal(0, 1, (num_images, num_classes)) + np.eye(num_classes)[classes]
    scores = np.exp(raw.round(digits))
    return classes, scores / scores.sum(axis=1, keepdims=True)


def _sklearn_of_classes(classes, scores, weights=None):
    predicted = scores.argmax(axis=1)
    return {
        "accuracy": sklearn_metrics.accuracy_score(classes, predicted, sample_weight=weights),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(classes, predicted, sample_weight=weights),
        "macro_f1": sklearn_metrics.f1_score(classes, predicted, average="macro", sample_weight=weights),
        "mcc": sklearn_metrics.matthews_corrcoef(classes, predicted, sample_weight=weights),
        "macro_auroc": np.mean(
            [roc_auc_score(classes == k, scores[:, k], sample_weight=weights) for k in range(scores.shape[1])]
        ),
    }


def test_multi_class_metrics_are_those_of_scikit_learn():
    classes, scores = _class_problem()
    names = ["covid", "pneumonia", "normal"]
    result = multiclass_metrics(classes, scores, names, num_bootstrap=0)
    expected = _sklearn_of_classes(classes, scores)
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, abs=1e-9), key
    assert result["macro_auroc"] == pytest.approx(roc_auc_score(classes, scores, multi_class="ovr"), abs=1e-9)
    assert result["confusion"] == confusion_matrix(classes, scores.argmax(axis=1)).tolist()
    found = sklearn_metrics.precision_recall_fscore_support(classes, scores.argmax(axis=1))
    for key, values in zip(("precision", "recall", "f1", "num_images"), found, strict=True):
        assert [result["per_class"][name][key] for name in names] == pytest.approx(values.tolist(), abs=1e-9)


def test_every_multi_class_metric_of_every_draw_is_that_of_scikit_learn_with_weights():
    classes, scores = _class_problem()
    statistics = weighted_metrics.MultiClassStatistics(classes, scores, np.arange(90) // 2)
    counts = np.random.default_rng(7).multinomial(45, np.full(45, 1 / 45), size=10)
    found = statistics(counts.T.astype(float))
    for draw, count in enumerate(counts):
        for key, value in _sklearn_of_classes(classes, scores, count[np.arange(90) // 2]).items():
            assert found[key][draw] == pytest.approx(value, abs=1e-9), key


def test_the_first_of_equal_scores_is_predicted():
    result = multiclass_metrics(np.array([0, 1]), np.ones((2, 2)), ["a", "b"], num_bootstrap=0)
    assert result["confusion"] == [[1, 0], [1, 0]] and result["accuracy"] == 0.5
    assert result["mcc"] == 0.0 and result["per_class"]["b"]["precision"] is None  # as it is never predicted
    assert result["per_class"]["b"]["f1"] == result["per_class"]["b"]["recall"] == 0.0


def test_a_class_without_images_is_named_and_counts_as_in_scikit_learn():
    classes = np.array([0, 0, 1, 1])
    scores = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]])
    result = multiclass_metrics(classes, scores, ["a", "b", "c"], num_bootstrap=20)
    assert result["absent_classes"] == ["c"] and result["per_class"]["c"]["recall"] is None
    assert result["per_class"]["c"]["auroc"] is result["per_class"]["c"]["auroc_ci"] is None
    assert result["balanced_accuracy"] == 0.5  # the mean over a and b
    # a: 1 of 2 predicted and 1 of 2 true, b: 1 of 1 and 1 of 2, c: predicted in vain
    assert result["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert result["macro_auroc"] == pytest.approx((0.5 + 1.0) / 2)  # a: 0.6 leads both others, 0.1 neither


def test_images_of_a_single_class_have_an_accuracy_but_no_auroc_nor_mcc():
    result = multiclass_metrics(np.zeros(3, dtype=int), np.array([[2, 1], [2, 1], [1, 2]]), ["a", "b"], num_bootstrap=9)
    assert result["accuracy"] == result["balanced_accuracy"] == pytest.approx(2 / 3)
    assert result["macro_auroc"] is result["mcc"] is result["macro_auroc_ci"] is None


def test_multi_class_intervals_draw_patients_and_one_patient_has_none():
    classes, scores = _class_problem()
    names = ["a", "b", "c"]
    result = multiclass_metrics(classes, scores, names, [f"p{row // 3}" for row in range(90)], 100, seed=2)
    (weights,) = bootstrap.resample_patients([f"p{row // 3}" for row in range(90)], 90, 100, seed=2)
    right = scores.argmax(axis=1) == classes
    draws = (weights * right).sum(axis=1) / weights.sum(axis=1)
    assert result["accuracy_ci"] == pytest.approx(np.percentile(draws, [2.5, 97.5]).tolist(), abs=1e-12)
    low, high = result["per_class"]["a"]["recall_ci"]
    assert low <= result["per_class"]["a"]["recall"] <= high
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    one = multiclass_metrics(classes, scores, names, ["a"] * 90)
    assert one["accuracy"] == result["accuracy"] and one["accuracy_ci"] is None
    assert one["interval_reason"] == "all images are of one patient"


@pytest.mark.parametrize(
    "classes, scores, names, message",
    [
        ([0, 3], np.zeros((2, 2)), ["a", "b"], r"from 0 to 1, but \[3\]"),
        ([0, -100], np.zeros((2, 2)), ["a", "b"], r"\[-100\] occur. Leave out"),
        ([0, 1], np.zeros((2, 3)), ["a", "b"], r"\(2,\) and \(2, 3\)"),
        ([0, 1], [[0, 1], [np.nan, 1]], ["a", "b"], "'a' in row 1"),
        ([], np.zeros((0, 2)), ["a", "b"], "no image"),
        ([0, 0], np.zeros((2, 1)), ["a"], "two or more"),
    ],
)
def test_bad_multi_class_input_is_refused_with_a_reason(classes, scores, names, message):
    with pytest.raises(ValueError, match=message):
        multiclass_metrics(np.array(classes), np.array(scores), names)


# ----------------------------------------------------------------------------------------------------- evaluate.Metric


def test_the_other_evaluate_metrics_give_the_numbers_of_their_functions_offline():
    labels, scores = _random_problem()
    probabilities, thresholds = 1 / (1 + np.exp(-scores)), {"0": 0.5}
    computed = metrics.MultiLabelClassification().compute(
        predictions=scores, references=labels, thresholds=thresholds, probabilities=probabilities, num_bootstrap=20
    )
    assert computed == classification_metrics(
        labels, scores, ["0", "1"], None, 20, thresholds=thresholds, probabilities=probabilities
    )
    classes, scores = _class_problem()
    computed = metrics.MultiClassClassification().compute(
        predictions=scores, references=classes, names=["a", "b", "c"], num_bootstrap=20
    )
    assert computed == multiclass_metrics(classes, scores, ["a", "b", "c"], None, 20)


def test_the_evaluate_metric_of_calibration_takes_one_class():
    computed = metrics.CalibrationError().compute(predictions=[0.9, 0.9, 0.9, 0.1, 0.5], references=[1, 1, 0, 0, -100])
    assert computed["ece"] == pytest.approx((3 * (0.9 - 2 / 3) + 0.1) / 4) and computed["num_images"] == 4
    assert computed["share_present"] == pytest.approx([0, 2 / 3]) and computed["brier"] == pytest.approx(0.84 / 4)
    margins = np.log([9, 9, 9, 1 / 9])
    assert computed["temperature"] == pytest.approx(fit_temperature(np.array([1, 1, 0, 0]), margins))
    extreme = metrics.CalibrationError().compute(predictions=[1.0, 0.5], references=[1, 0])
    assert extreme["temperature"] is None
    unknown = metrics.CalibrationError().compute(predictions=[0.5], references=[-100])
    assert unknown["ece"] is unknown["brier"] is unknown["temperature"] is None


def test_the_evaluate_metric_of_retrieval_takes_ranks_alone():
    computed = metrics.RetrievalRecall().compute(predictions=[1, 3, 11, 2], num_bootstrap=100)
    assert (computed["recall_at_1"], computed["recall_at_5"], computed["recall_at_10"]) == (0.25, 0.75, 0.75)
    assert computed["median_rank"] == 2.5 and computed["num_queries"] == 4
    assert computed["recall_at_5_ci"][0] < 0.75 < computed["recall_at_5_ci"][1]
    with pytest.raises(ValueError, match="from 1"):
        metrics.RetrievalRecall().compute(predictions=[0, 1])
    with pytest.raises(AttributeError, match="has no attribute 'Recall'"):
        _ = metrics.Recall

import time

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from MMCLIP.evaluation.linear_probe import (
    DEFAULT_L2,
    L2_GRID,
    check_fractions_and_seeds,
    evaluate_linear_probe,
    fit_linear_probe,
    nested_subset,
    run_metrics,
    seeds_summary,
)
from MMCLIP.evaluation.metrics import UNKNOWN, auroc, classification_metrics


def made_up(num_rows=200, num_features=12, num_labels=3, seed=0):
    """Features (n, H) of very different scales, and targets (n, F) that depend on them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_rows, num_features)) @ rng.normal(size=(num_features, num_features))
    weight = np.random.default_rng(9).normal(size=(num_features, num_labels)) / 4
    targets = (features @ weight + rng.logistic(size=(num_rows, num_labels)) > 0.5).astype(int)
    return features * 10.0 ** np.linspace(-2, 2, num_features) + 3, targets


def by_sklearn(features, targets, l2, standardised_by=None):
    reference = features if standardised_by is None else standardised_by
    mean, deviation = reference.mean(axis=0), reference.std(axis=0)
    model = LogisticRegression(C=1 / (len(targets) * l2), solver="newton-cholesky", tol=1e-14, max_iter=1000)
    return model.fit((features - mean) / deviation, targets), lambda rows: (rows - mean) / deviation


# ------------------------------------------------------------------------------------------------------------- subsets


def test_a_smaller_fraction_lies_inside_a_larger_one_and_patients_stay_whole():
    patients = [f"p{number // 3}" for number in range(300)]
    parts = {fraction: set(nested_subset(patients, fraction, seed=1)) for fraction in (0.01, 0.1, 0.5, 1.0)}
    assert parts[0.01] < parts[0.1] < parts[0.5] < parts[1.0] == set(range(300))
    assert [len(part) for part in parts.values()] == [3, 30, 150, 300]
    names = {patients[row] for row in parts[0.1]}
    assert parts[0.1] == {row for row in range(300) if patients[row] in names}


def test_subsets_depend_on_the_seed_and_on_names_but_not_on_the_order_of_rows():
    patients = [f"p{number}" for number in range(100)]
    first = nested_subset(patients, 0.2, seed=0)
    assert set(first) != set(nested_subset(patients, 0.2, seed=1))
    turned = nested_subset(patients[::-1], 0.2, seed=0)
    assert {patients[row] for row in first} == {patients[::-1][row] for row in turned}
    assert (np.diff(first) > 0).all()


def test_at_least_one_patient_is_drawn_and_rows_without_a_name_are_patients_of_their_own():
    assert len(nested_subset(["a", "a", "b"], 0.001)) in (1, 2)
    assert len(nested_subset([""] * 50, 0.1)) == 5


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        nested_subset(["a"], fraction)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        check_fractions_and_seeds([fraction], [0])


def test_no_rows_and_equal_seeds_are_refused():
    with pytest.raises(ValueError, match="no training row"):
        nested_subset([], 0.5)
    with pytest.raises(ValueError, match=r"`seeds`.*\[0, 0\]"):
        check_fractions_and_seeds([1.0], [0, 0])
    with pytest.raises(ValueError, match="`fractions`"):
        check_fractions_and_seeds([], [0])


# ------------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("l2", [1e-4, 0.1, 10.0])
def test_margins_are_those_of_scikit_learn_on_complete_labels(l2):
    features, targets = made_up()
    probe = fit_linear_probe(features, targets, ["a", "b", "c"], l2=l2)
    for column in range(3):
        model, standardised = by_sklearn(features, targets[:, column], l2)
        expected = model.decision_function(standardised(features))
        np.testing.assert_allclose(probe.margins(features)[:, column], expected, rtol=0, atol=2e-6)
    assert probe.l2 == dict.fromkeys("abc", l2) and probe.constant_labels == []


def test_classes_give_the_probabilities_of_scikit_learn():
    features, targets = made_up()
    classes = targets[:, 0] + targets[:, 1]
    probe = fit_linear_probe(features, classes, ["a", "b", "c"], l2=0.01)
    model, standardised = by_sklearn(features, classes, 0.01)
    found = torch.from_numpy(probe.margins(features)).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, model.predict_proba(standardised(features)), rtol=0, atol=1e-6)


def test_unknown_labels_do_not_move_the_fit():
    features, targets = made_up()
    hidden = targets.copy()
    hidden[50:120, 0] = UNKNOWN
    probe = fit_linear_probe(features, hidden, ["a", "b", "c"], l2=0.1)
    known = hidden[:, 0] != UNKNOWN
    model, standardised = by_sklearn(features[known], targets[known, 0], 0.1, standardised_by=features)
    expected = model.decision_function(standardised(features))
    np.testing.assert_allclose(probe.margins(features)[:, 0], expected, rtol=0, atol=2e-6)
    # the other labels do not notice, and rows that know nothing are as if they were not there
    complete = fit_linear_probe(features, targets, ["a", "b", "c"], l2=0.1)
    np.testing.assert_allclose(probe.weight[:, 1:], complete.weight[:, 1:], rtol=0, atol=1e-7)
    more = np.concatenate([features, 100 + features[:20]])
    unknown = np.concatenate([hidden, np.full((20, 3), UNKNOWN)])
    assert np.array_equal(fit_linear_probe(more, unknown, ["a", "b", "c"], l2=0.1).weight, probe.weight)


def test_a_label_is_fitted_alike_alone_and_in_company():
    features, targets = made_up()
    together = fit_linear_probe(features, targets, ["a", "b", "c"], l2=0.03).margins(features)
    alone = fit_linear_probe(features, targets[:, 1:2], ["b"], l2=0.03).margins(features)
    np.testing.assert_allclose(together[:, 1:2], alone, rtol=0, atol=1e-6)


def test_the_unit_of_a_feature_and_a_constant_feature_do_not_matter():
    features, targets = made_up()
    expected = fit_linear_probe(features, targets, ["a", "b", "c"], l2=0.1).margins(features)
    changed = np.concatenate([1000 * features[:, :5] - 7, features[:, 5:], np.full((len(features), 1), 0.3)], axis=1)
    probe = fit_linear_probe(changed, targets, ["a", "b", "c"], l2=0.1)
    np.testing.assert_allclose(probe.margins(changed), expected, rtol=0, atol=1e-6)
    assert (probe.weight[-1] == 0).all()


def test_more_features_than_rows_are_fitted_too():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(20, 300)), np.arange(20)[:, None] % 2
    probe = fit_linear_probe(features.astype(np.float32), targets, ["a"], l2=0.1)
    model, standardised = by_sklearn(features.astype(np.float32).astype(np.float64), targets[:, 0], 0.1)
    expected = model.decision_function(standardised(features.astype(np.float32)))
    np.testing.assert_allclose(probe.margins(features.astype(np.float32))[:, 0], expected, rtol=0, atol=1e-5)


def test_each_label_gets_the_l2_strength_that_is_best_on_validation_rows():
    features, targets = made_up(60, 20)
    validation, truth = made_up(150, 20, seed=1)
    probe = fit_linear_probe(features, targets, ["a", "b", "c"], validation, truth)
    best = {}
    for strength in sorted(L2_GRID, reverse=True):
        margins = fit_linear_probe(features, targets, ["a", "b", "c"], l2=strength).margins(validation)
        for column, label in enumerate("abc"):
            area = auroc(truth[:, column], margins[:, column])
            best[label] = max(best.get(label, (0, 0)), (area, strength))
    assert probe.l2 == {label: strength for label, (_, strength) in best.items()}
    assert len(set(probe.l2.values())) > 1
    for column, label in enumerate("abc"):
        alone = fit_linear_probe(features, targets, ["a", "b", "c"], l2=probe.l2[label])
        both = [fitted.margins(validation)[:, column] for fitted in (probe, alone)]
        np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)


def test_of_strengths_that_are_equally_good_the_strongest_is_taken_and_without_truth_the_default():
    features = np.concatenate([np.zeros((10, 1)), np.ones((10, 1))]) + 0.01 * np.arange(20)[:, None]
    targets = np.repeat([0, 1], 10)[:, None]
    assert fit_linear_probe(features, targets, ["a"], features, targets).l2 == {"a": max(L2_GRID)}
    unknown = np.full_like(targets, UNKNOWN)
    assert fit_linear_probe(features, targets, ["a"], features, unknown).l2 == {"a": DEFAULT_L2}
    assert fit_linear_probe(features, targets, ["a"]).l2 == {"a": DEFAULT_L2}
    assert fit_linear_probe(features, targets, ["a"], l2=0.5).l2 == {"a": 0.5}


def test_a_label_of_one_value_gets_its_log_odds_and_is_named():
    features, targets = made_up(40)
    targets[:, 1], targets[:, 2] = 1, UNKNOWN
    targets[:3, 1] = UNKNOWN
    probe = fit_linear_probe(features, targets, ["a", "b", "c"], l2=0.1)
    assert probe.constant_labels == ["b", "c"] and probe.l2["b"] is None
    assert np.allclose(probe.margins(features)[:, 1], np.log(37.5 / 0.5))
    assert (probe.margins(features)[:, 2] == 0).all()


def test_a_class_without_a_training_image_is_not_predicted():
    features, targets = made_up(80)
    probe = fit_linear_probe(features, 2 * targets[:, 0], ["a", "b", "c"], l2=0.1)
    assert probe.constant_labels == ["b"] and not (probe.margins(features).argmax(axis=1) == 1).any()
    model, standardised = by_sklearn(features, targets[:, 0], 0.1)
    # two columns share what one has in the binary form, at half the penalty each
    assert (probe.margins(features).argmax(axis=1) == 2 * model.predict(standardised(features))).mean() > 0.95
    only = fit_linear_probe(features, np.ones(80, dtype=int), ["a", "b", "c"])
    assert only.constant_labels == ["a", "b", "c"] and (only.margins(features).argmax(axis=1) == 1).all()


def test_tensors_arrays_and_repeated_fits_give_the_same_bits():
    features, targets = made_up()
    first = fit_linear_probe(features, targets, ["a", "b", "c"])
    second = fit_linear_probe(torch.from_numpy(features), targets, ["a", "b", "c"])
    assert np.array_equal(first.weight, second.weight) and np.array_equal(first.bias, second.bias)
    assert first.margins(torch.from_numpy(features)).dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, t: (f[:-1], t), "training targets must be"),
        (lambda f, t: (f, t[:, :2]), "training targets must be"),
        (lambda f, t: (f, t + 1), r"not \{2\}"),
        (lambda f, t: (np.where(f == f[0, 0], np.nan, f), t), "NaN or infinity"),
        (lambda f, t: (f[0], t), r"must be \(images, values\)"),
        (lambda f, t: (f, np.full_like(t, UNKNOWN)), "No training row has a label"),
    ],
)
def test_features_and_targets_that_do_not_fit_are_refused(change, message):
    features, targets = change(*made_up(30))
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(features, targets, ["a", "b", "c"])


def test_other_features_than_those_of_training_are_refused():
    features, targets = made_up(30)
    with pytest.raises(ValueError, match=r"must be \(n, 12\), as in training"):
        fit_linear_probe(features, targets, ["a", "b", "c"]).margins(features[:, :5])
    with pytest.raises(ValueError, match="do not fit those of training"):
        fit_linear_probe(features, targets, ["a", "b", "c"], features[:, :5], targets)


# ------------------------------------------------------------------------------------------------------ the evaluation


@pytest.fixture
def study():
    parts = {role: made_up(n, seed=s) for s, (role, n) in enumerate((("train", 300), ("validation", 90), ("test", 80)))}
    features = {role: part[0] for role, part in parts.items()}
    targets = {role: part[1] for role, part in parts.items()}
    patients = {role: [f"{role}{row // 2}" for row in range(len(part[0]))] for role, part in parts.items()}
    return features, targets, patients


def test_each_fraction_and_seed_is_the_probe_of_its_patients(study):
    features, targets, patients = study
    results, margins = evaluate_linear_probe(
        features, targets, ["a", "b", "c"], patients, fractions=(0.1, 1.0), seeds=(0, 5), num_bootstrap=50
    )
    assert list(results["fractions"]) == ["10 %", "100 %"] and set(margins) == {
        (0.1, 0), (0.1, 5), (1.0, 0), (1.0, 5),
    }  # fmt: skip
    chosen = nested_subset(patients["train"], 0.1, 5)
    probe = fit_linear_probe(
        features["train"][chosen], targets["train"][chosen], ["a", "b", "c"],
        features["validation"], targets["validation"],
    )  # fmt: skip
    assert np.array_equal(margins[0.1, 5], probe.margins(features["test"]))
    small = results["fractions"]["10 %"]
    assert (small["num_patients"], small["num_images"]) == (15, 30)
    areas = [small["seeds"][seed]["metrics"]["macro_auroc"] for seed in ("0", "5")]
    assert small["macro_auroc"] == pytest.approx(np.mean(areas)) and areas[0] != areas[1]
    assert small["macro_auroc_sd"] == pytest.approx(abs(areas[0] - areas[1]) / np.sqrt(2))
    assert small["macro_auroc_ci"][0] < small["macro_auroc"] < small["macro_auroc_ci"][1]
    assert results["fractions"]["100 %"]["macro_auroc_sd"] == 0  # all patients, whatever the seed
    assert small["macro_f1"] is not None and small["seeds"]["0"]["l2"].keys() == {"a", "b", "c"}


def test_without_validation_rows_there_are_no_thresholds_and_the_default_l2(study):
    features, targets, patients = ({r: p[r] for r in ("train", "test")} for p in study)
    results, _ = evaluate_linear_probe(features, targets, ["a", "b", "c"], patients, fractions=(1.0,), num_bootstrap=0)
    found = results["fractions"]["100 %"]
    assert "macro_f1" not in found and found["macro_auroc_ci"] is None and found["macro_auroc_sd"] is None
    assert set(found["seeds"]["0"]["l2"].values()) == {DEFAULT_L2} and results["num_validation_images"] == 0


def test_classes_are_measured_by_accuracy(study):
    features, targets, patients = study
    classes = {role: part[:, 0] + part[:, 1] for role, part in targets.items()}
    results, margins = evaluate_linear_probe(
        features, classes, ["a", "b", "c"], patients, fractions=(1.0,), num_bootstrap=50
    )
    found = results["fractions"]["100 %"]
    assert found["accuracy"] == pytest.approx((margins[1.0, 0].argmax(axis=1) == classes["test"]).mean())
    assert found["accuracy_ci"][0] <= found["accuracy"] <= found["accuracy_ci"][1] and "macro_auroc" not in found


def test_roles_that_lack_or_differ_are_refused(study):
    features, targets, patients = study
    with pytest.raises(ValueError, match="need the roles train and test"):
        evaluate_linear_probe({"train": features["train"]}, targets, ["a", "b", "c"], patients)
    with pytest.raises(ValueError, match="all the same"):
        evaluate_linear_probe(
            {r: features[r] for r in ("train", "test")}, targets, ["a", "b", "c"], patients, fractions=(1.0,)
        )


def test_a_summary_of_two_fits_is_their_mean_and_deviation_by_hand():
    targets = np.array([[0], [0], [1], [1]])
    right, half = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([[0.0], [3.0], [1.0], [2.0]])
    found = seeds_summary(targets, [right, half], ["a"], None, [{"a": 2.0}, {"a": 2.0}], num_bootstrap=0)
    assert found["macro_auroc"] == pytest.approx((1 + 0.5) / 2)
    assert found["macro_auroc_sd"] == pytest.approx(0.5 / np.sqrt(2))
    # at 2.0 the first calls the two right ones present, the second one of them and one absent
    assert found["macro_f1"] == pytest.approx((1 + 0.5) / 2) and found["per_class"]["a"]["accuracy"] == 0.75
    assert found["macro_auroc_ci"] is None and found["interval_reason"]


def test_a_summary_of_one_fit_has_the_interval_of_the_metrics_module_and_names_what_it_skips():
    features, targets = made_up(120)
    targets[:, 2] = 0
    patients = [f"p{row // 2}" for row in range(120)]
    margins = features[:, :3]
    found = seeds_summary(targets, [margins], ["a", "b", "c"], patients, num_bootstrap=200, seed=4)
    expected = classification_metrics(targets, margins, ["a", "b", "c"], patients, num_bootstrap=200, seed=4)
    for key in ("macro_auroc", "macro_auroc_ci", "macro_average_precision_ci"):
        assert found[key] == pytest.approx(expected[key])
    assert found["per_class"]["a"]["auroc_ci"] == pytest.approx(expected["per_class"]["a"]["auroc_ci"])
    assert found["skipped"] == ["c"] and found["macro_auroc_sd"] is None
    targets[4:, 0], targets[:4, 0] = UNKNOWN, [0, 1, 0, 1]
    alone = seeds_summary(targets, [margins], ["a", "b", "c"], ["x"] * 4 + [""] * (len(targets) - 4), num_bootstrap=20)
    assert alone["per_class"]["a"]["auroc"] is not None and alone["per_class"]["a"]["auroc_ci"] is None
    assert alone["per_class"]["b"]["auroc_ci"] and alone["macro_auroc_ci"]
    nothing = seeds_summary(np.zeros_like(targets), [margins], ["a", "b", "c"], num_bootstrap=10)
    assert nothing["macro_auroc"] is None and nothing["skipped"] == ["a", "b", "c"]


def test_run_metrics_count_right_classes():
    assert run_metrics(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]), ["a", "b"])["accuracy"] == 0.5


@pytest.mark.slow
def test_25_000_images_of_768_values_and_14_labels_are_fitted_in_less_than_a_minute():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(60, 768)) * np.exp(-np.arange(60) / 15)[:, None]
    features = (rng.normal(size=(30_000, 60)) @ mixing + 0.1 * rng.normal(size=(30_000, 768))).astype(np.float32)
    logits = features @ rng.normal(size=(768, 14)) * 0.15
    targets = (logits + rng.logistic(size=logits.shape) > 2).astype(int)
    targets[rng.random(targets.shape) < 0.2] = UNKNOWN
    names = [str(number) for number in range(14)]
    start = time.perf_counter()
    fit_linear_probe(features[:25_000], targets[:25_000], names, features[25_000:], targets[25_000:])
    assert time.perf_counter() - start < 60

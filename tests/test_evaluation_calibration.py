import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from MMCLIP.evaluation.calibration import (
    bin_numbers,
    brier_score,
    expected_calibration_error,
    fit_platt,
    fit_temperature,
    reliability_curve,
)


def _sigmoid(margins):
    return 1 / (1 + np.exp(-margins))


def _problem(num_images=4000, sharpness=1.0):
    rng = np.random.default_rng(0)
    margins = rng.normal(-1, 2, num_images)
    return (rng.random(num_images) < _sigmoid(margins)).astype(int), sharpness * margins


def test_the_error_is_the_mean_distance_of_probability_and_share_by_bin():
    # three images in the bin of 0.9, two of them present: |0.9 - 2/3|; one in that of 0.1, absent: 0.1
    error = expected_calibration_error([1, 1, 0, 0], [0.9, 0.9, 0.9, 0.1], num_bins=15)
    assert error == pytest.approx((3 * (0.9 - 2 / 3) + 0.1) / 4, abs=1e-12)


def test_opposite_errors_within_a_bin_cancel_and_in_two_bins_do_not():
    assert expected_calibration_error([1, 0], [0.5, 0.5]) == 0
    assert expected_calibration_error([1, 0], [0.3, 0.7], num_bins=2) == pytest.approx(0.7)
    assert expected_calibration_error([1, 0], [0.3, 0.7], num_bins=1) == pytest.approx(0)


def test_a_bin_holds_its_upper_end_and_the_first_also_0():
    assert bin_numbers(np.array([0, 0.25, 0.26, 0.5, 0.75, 1]), 4).tolist() == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("digits", [1, 6])  # one digit lies on the ends of bins
def test_the_curve_is_that_of_scikit_learn_and_leaves_out_empty_bins(digits):
    labels, margins = _problem(300)
    probabilities = _sigmoid(margins).round(digits)
    share, mean = calibration_curve(labels, probabilities, n_bins=15)
    curve = reliability_curve(labels, probabilities, 15)
    assert np.allclose(curve[0], mean, rtol=0, atol=1e-9) and np.allclose(curve[1], share, rtol=0, atol=1e-9)
    assert len(reliability_curve([1, 0], [0.1, 0.9])[0]) == 2


def test_the_brier_score_is_that_of_scikit_learn():
    labels, margins = _problem(200)
    assert brier_score(labels, _sigmoid(margins)) == pytest.approx(
        brier_score_loss(labels, _sigmoid(margins)), abs=1e-9
    )
    assert brier_score([1, 0, -100], [0.8, 0.4, np.nan]) == pytest.approx((0.04 + 0.16) / 2)


def test_images_of_unknown_label_do_not_count():
    labels, margins = _problem(50)
    probabilities = _sigmoid(margins)
    more = np.append(labels, [-100, -100]), np.append(probabilities, [np.nan, 0.5])
    assert expected_calibration_error(*more) == expected_calibration_error(labels, probabilities)
    for one, other in zip(reliability_curve(*more), reliability_curve(labels, probabilities), strict=True):
        assert one.tolist() == other.tolist()
    assert fit_temperature(more[0], np.append(margins, [np.nan, 9])) == fit_temperature(labels, margins)


def test_of_several_classes_it_is_the_mean_over_those_with_both_labels():
    labels = np.array([[1, 1, -100, 1], [0, 1, -100, 0]])
    probabilities = np.array([[0.9, 0.2, 0.5, 0.6], [0.1, 0.2, 0.5, 0.6]])
    assert expected_calibration_error(labels, probabilities) == pytest.approx((0.1 + 0.1) / 2)  # first and last column
    assert np.isnan(expected_calibration_error(labels[:, 1:3], probabilities[:, 1:3]))


def test_where_nothing_is_known_measures_are_nan_and_no_temperature_is_fitted():
    unknown = np.full(3, -100)
    assert np.isnan(expected_calibration_error(unknown, np.zeros(3))) and np.isnan(brier_score(unknown, np.zeros(3)))
    assert len(reliability_curve(unknown, np.zeros(3))[0]) == 0
    with pytest.raises(ValueError, match="No label is known"):
        fit_temperature(unknown, np.zeros(3))


def test_the_temperature_is_one_over_the_slope_of_a_logistic_regression_without_intercept():
    labels, margins = _problem(sharpness=5)
    regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, solver="newton-cholesky")
    slope = regression.fit(margins[:, None], labels).coef_[0, 0]
    assert fit_temperature(labels, margins) == pytest.approx(1 / slope, rel=1e-7)
    assert 4.5 < 1 / slope < 5.5


def test_the_temperature_grows_with_the_margins_and_leaves_their_best_probabilities_as_they_are():
    labels, margins = _problem(500)
    once = fit_temperature(labels, margins)
    assert fit_temperature(labels, 20 * margins) == pytest.approx(20 * once, rel=1e-9)
    halves = labels.reshape(250, 2), margins.reshape(250, 2)
    assert fit_temperature(*halves) == pytest.approx(once, rel=1e-12)  # one temperature for all classes


def test_margins_without_a_best_temperature_get_a_bound_and_zeros_get_1():
    labels, margins = np.array([1, 1, 0]), np.array([2.0, 1.0, -3.0])
    assert fit_temperature(labels, margins) == 1e-3  # order is perfect: the sharper the better
    assert fit_temperature(labels, -margins) == 1e3
    assert fit_temperature(labels, 0 * margins) == 1
    assert fit_temperature(np.array([1, 0]), np.array([1e5, 2e5])) == 1e3


@pytest.mark.parametrize(
    "labels, probabilities, message",
    [
        ([1, 0], [0.5, 1.5], r"1 do not, the first, 1.5, at \(1,\)"),
        ([1, 0], [np.nan, 0.5], "nan"),
        ([1, 2], [0.5, 0.5], r"\{2\} occurs"),
        ([1, 0], [0.5], r"\(2,\) and \(1,\)"),
    ],
)
def test_bad_input_is_refused_with_a_reason(labels, probabilities, message):
    for measure in (expected_calibration_error, brier_score, reliability_curve):
        with pytest.raises(ValueError, match=message):
            measure(np.array(labels), np.array(probabilities))


def test_a_temperature_of_bad_margins_is_refused():
    for labels, margins, message in (
        ([1, 0], [np.inf, 1], "finite"),
        ([1, 3], [1, 1], r"\{3\} occurs"),
        ([1], [1, 2], r"\(1,\) and \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_temperature(np.array(labels), np.array(margins))
    with pytest.raises(ValueError, match="at least 1"):
        expected_calibration_error([1, 0], [0.5, 0.5], num_bins=0)


def test_platt_is_a_logistic_regression_on_softened_targets():
    labels, margins = _problem(600, sharpness=5)
    margins = margins + 3  # a shift that no temperature takes back
    present, absent = (labels == 1).sum(), (labels == 0).sum()
    high, low = (present + 1) / (present + 2), 1 / (absent + 2)
    # a softened target is a share of the weight of an image, present so far and absent for the rest
    targets = np.where(labels == 1, high, low)
    regression = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky").fit(
        np.concatenate([margins, margins])[:, None],
        np.repeat([1, 0], len(labels)),
        sample_weight=np.concatenate([targets, 1 - targets]),
    )
    slope, intercept = fit_platt(np.append(labels, -100), np.append(margins, np.nan))
    assert slope == pytest.approx(regression.coef_[0, 0], rel=1e-5)
    assert intercept == pytest.approx(regression.intercept_[0], rel=1e-5)
    assert 0.15 < slope < 0.25 and intercept == pytest.approx(-3 * slope, abs=0.25)


def test_platt_stays_finite_where_order_is_perfect_and_flat_where_it_is_no_better_than_none():
    labels, margins = np.array([1, 1, 0, 0, 0]), np.array([3.0, 2.0, -1.0, -2.0, -3.0])
    slope, intercept = fit_platt(labels, margins)
    assert 0 < slope < 10 and _sigmoid(slope * 3 + intercept) < 1
    slope, intercept = fit_platt(labels, -margins)  # the wrong way round: no finding is held against itself
    mean = (2 * 3 / 4 + 3 * 1 / 5) / 5
    assert slope == 0 and _sigmoid(intercept) == pytest.approx(mean, abs=1e-6)
    assert fit_platt(labels, 0 * margins) == (0, pytest.approx(np.log(mean / (1 - mean))))


def test_platt_needs_both_labels():
    with pytest.raises(ValueError, match="3 images are present and 0 are absent"):
        fit_platt(np.array([1, 1, 1, -100]), np.arange(4.0))

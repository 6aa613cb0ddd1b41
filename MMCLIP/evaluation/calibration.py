"""Calibration: how far probabilities can be taken at their word, and the fits that mend them. NumPy, SciPy.

Probabilities are P(present). They are sorted into `num_bins` bins of equal width, (0, 1/15], (1/15, 2/15], ...; 0 lies
in the first. This is the binning of scikit-learn's `calibration_curve`. The expected calibration error (ECE) is the
mean over images of |mean probability - share present| of the bin an image lies in (Naeini et al. 2015), of P(present)
itself and not of the confidence in the likelier answer (Guo et al. 2017). Noise within the bins only ever adds to it:
few images make it larger, and draws of a bootstrap make it larger again, so that its interval may lie above it. Values
that are undefined are NaN.
"""

import numpy as np


UNKNOWN = -100  # a label that is neither present nor absent; such an image does not count for that class
NUM_BINS = 15
TEMPERATURES = (1e-3, 1e3)  # the bounds of a fitted temperature


def bin_numbers(probabilities: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """The bin of each probability, ints of the same shape from 0 to `num_bins - 1`."""
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, but is {num_bins}.")
    return np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], probabilities)


def check_probabilities(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of one shape; raises `ValueError` for other labels than 1, 0, -100 and values outside [0, 1]."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if labels.shape != probabilities.shape:
        raise ValueError(
            f"`labels` and `probabilities` must have one shape, but are {labels.shape} and {probabilities.shape}."
        )
    strange = set(np.unique(labels).tolist()) - {0, 1, UNKNOWN}
    if strange:
        raise ValueError(f"Labels must be 1 (present), 0 (absent) or {UNKNOWN} (unknown), but {strange} occurs.")
    bad = ~((probabilities >= 0) & (probabilities <= 1)) & (labels != UNKNOWN)  # NaN is in no range
    if bad.any():
        first = tuple(int(number) for number in np.argwhere(bad)[0])
        raise ValueError(
            f"Probabilities must lie in [0, 1], but {bad.sum()} do not, the first, {probabilities[first]}, at {first}. "
            "Margins become probabilities by a sigmoid."
        )
    return labels, probabilities


def reliability_curve(
    labels: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS
) -> tuple[np.ndarray, np.ndarray]:
    """Mean probability and share present of each bin that holds an image of known label, in rising order.

    `labels` and `probabilities` are (n,); both results have one value for each such bin, none where nothing is known.
    """
    labels, probabilities = check_probabilities(labels, probabilities)
    known = labels != UNKNOWN
    labels, probabilities = labels[known], probabilities[known]
    bins = bin_numbers(probabilities, num_bins)
    counts = np.bincount(bins, minlength=num_bins)
    filled = counts > 0
    sums = [np.bincount(bins, weights=values, minlength=num_bins)[filled] for values in (probabilities, labels)]
    return sums[0] / counts[filled], sums[1] / counts[filled]


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """ECE of one class, `labels` and `probabilities` (n,), or the mean over the classes of (n, F).

    The mean runs over classes that have both labels, those that [`classification_metrics`] averages. NaN where no label
    is known, or no class has both.
    """
    labels, probabilities = check_probabilities(labels, probabilities)
    if labels.ndim == 2:
        both = [column for column, values in enumerate(labels.T) if {0, 1} <= set(values.tolist())]
        errors = [expected_calibration_error(labels[:, c], probabilities[:, c], num_bins) for c in both]
        return float(np.mean(errors)) if errors else float("nan")
    known = labels != UNKNOWN
    if not known.any():
        return float("nan")
    bins = bin_numbers(probabilities[known], num_bins)
    excess = np.bincount(bins, weights=probabilities[known] - labels[known], minlength=num_bins)
    return float(np.abs(excess).sum() / known.sum())


def brier_score(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean squared difference of `probabilities` (n,) and `labels` (n,) of known images; NaN where there is none."""
    labels, probabilities = check_probabilities(labels, probabilities)
    known = labels != UNKNOWN
    return float(np.mean((probabilities[known] - labels[known]) ** 2)) if known.any() else float("nan")


def _known(labels: np.ndarray, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels 1 and 0 and their margins, (m,) each; raises `ValueError` where nothing can be fitted to them."""
    labels, margins = np.asarray(labels), np.asarray(margins, dtype=np.float64)
    if labels.shape != margins.shape:
        raise ValueError(f"`labels` and `margins` must have one shape, but are {labels.shape} and {margins.shape}.")
    known = labels != UNKNOWN
    labels, margins = labels[known], margins[known]
    if not len(labels):
        raise ValueError("No label is known, so no calibration can be fitted. Give validation rows with labels.")
    strange = set(np.unique(labels).tolist()) - {0, 1}
    if strange:
        raise ValueError(f"Labels must be 1 (present), 0 (absent) or {UNKNOWN} (unknown), but {strange} occurs.")
    if not np.isfinite(margins).all():
        raise ValueError(f"Margins must be finite, but {(~np.isfinite(margins)).sum()} of {margins.size} are not.")
    return labels, margins


def fit_temperature(labels: np.ndarray, margins: np.ndarray) -> float:
    """The temperature T for which sigmoid(margins / T) has the least negative log-likelihood (Guo et al. 2017).

    `labels` hold 1 present, 0 absent, -100 unknown; `margins` of the same shape, (n,) or (n, F), are the logits of
    P(present); one T for all classes. To be fitted on validation rows. The likelihood is convex in 1 / T, so its slope
    has one root, which Brent's method finds. T stays in [0.001, 1000]: margins that order all images rightly have no
    best T and get the lower bound, margins that are no better than none the upper one. Margins that are all 0 get 1.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    labels, margins = _known(labels, margins)
    size = np.abs(margins).max()
    if size == 0:
        return 1.0

    def slope(log_temperature: float) -> float:
        return float(np.mean(margins / size * (expit(margins * np.exp(-log_temperature)) - labels)))

    low, high = np.log(TEMPERATURES)
    if slope(low) <= 0:  # sharper is better still
        return TEMPERATURES[0]
    if slope(high) >= 0:
        return TEMPERATURES[1]
    return float(np.exp(brentq(slope, low, high, xtol=1e-13, rtol=1e-13)))


def fit_platt(labels: np.ndarray, margins: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) for which sigmoid(slope * margins + intercept) is P(present) of one finding (Platt 1999).

    `labels` (n,) hold 1 present, 0 absent, -100 unknown; `margins` (n,) rank the images. To be fitted on validation
    rows. Platt's targets, (P + 1) / (P + 2) and 1 / (A + 2) for P present and A absent images, keep the slope finite
    where margins order all images rightly. The slope is never below 0: margins that are no better than none give the
    same P(present), nearly P / (P + A), to every image. Raises `ValueError` unless both labels occur.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    labels, margins = _known(labels, margins)
    num_present, num_absent = int((labels == 1).sum()), int((labels == 0).sum())
    if not num_present or not num_absent:
        raise ValueError(f"Both labels must occur, but {num_present} images are present and {num_absent} are absent.")
    targets = np.where(labels == 1, (num_present + 1) / (num_present + 2), 1 / (num_absent + 2))
    middle, spread = margins.mean(), margins.std()
    if spread == 0:
        return 0.0, float(np.log(targets.mean() / (1 - targets.mean())))
    standard = (margins - middle) / spread  # the fit is equally good for margins of any size

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        logits = values[0] * standard + values[1]
        excess = expit(logits) - targets
        negative_log_likelihood = np.mean(np.logaddexp(0, logits) - targets * logits)
        return negative_log_likelihood, np.array([np.mean(excess * standard), np.mean(excess)])

    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    fit = minimize(
        loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None)], options=options
    )
    slope = fit.x[0] / spread
    return float(slope), float(fit.x[1] - slope * middle)

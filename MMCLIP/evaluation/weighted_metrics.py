"""Metrics of one set of scores under many weightings at once: what a bootstrap over patients has to compute.

A weighting says how often each patient is drawn; with all ones it gives the plain metrics. The images are sorted and
counted once, into sparse matrices of (cells, patients); a product with the weightings (patients, R) then gives each
count of each draw. Counts are whole numbers, so a draw equals scikit-learn's metric with `sample_weight`.

Undefined values are NaN, here and in all that is built on it:
- AUROC, average precision, MCC and sensitivity at a specificity: without an image of each label. (scikit-learn gives 0
  for MCC, and for average precision without a present image.)
- sensitivity without a present, specificity without an absent image; precision, recall and F1 of 0 / 0, which
  scikit-learn returns for `zero_division=nan`.
MCC is 0, as in scikit-learn, where all predictions are one value.
"""

from collections.abc import Sequence

import numpy as np

from .calibration import NUM_BINS, UNKNOWN, bin_numbers


CELLS = ("true_positive", "false_negative", "false_positive", "true_negative")
RANKED = ("auroc", "average_precision", "sensitivity_at_specificity")
THRESHOLDED = ("f1", "accuracy", "mcc", "sensitivity", "specificity")
CALIBRATED = ("ece", "brier")
MULTICLASS = ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "macro_auroc")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN for 0 / 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return numerator / denominator


def _sum_matrix(cells: np.ndarray, patients: np.ndarray, values: np.ndarray | None, shape: tuple[int, int]):
    """Sparse (cells, patients): the sum of the values of a patient's images in a cell, or their number."""
    from scipy.sparse import coo_array

    values = np.ones(len(cells)) if values is None else values
    return coo_array((values, (cells, patients)), shape=shape).tocsr()


class Ranking:
    """The images of one class in order of their scores, to be weighted.

    `labels` (m,) hold 0 and 1, `scores` (m,), `patients` (m,) are numbers below `num_patients`. Only the steps of the
    curve at which a present image is found matter: between two of them the absent images are counted together.
    """

    def __init__(
        self,
        labels: np.ndarray,
        scores: np.ndarray,
        patients: np.ndarray,
        num_patients: int,
        specificity: float = 0.9,
    ):
        self.specificity = specificity
        present = labels == 1
        steps, of_present = np.unique(-scores[present], return_inverse=True)  # equal scores are one step
        absent = -scores[~present]
        of_absent = np.searchsorted(steps, absent)  # the first step at which it has been passed; the last: never
        is_tied = of_absent < len(steps)
        is_tied[is_tied] = steps[of_absent[is_tied]] == absent[is_tied]
        size = (len(steps), num_patients)
        self._present = _sum_matrix(of_present, patients[present], None, size)
        self._absent = _sum_matrix(of_absent, patients[~present], None, (len(steps) + 1, num_patients))
        tied = patients[~present][is_tied]
        self._tied = _sum_matrix(of_absent[is_tied], tied, None, size) if len(tied) else None

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """(3, R), in the order of `RANKED`, for `weights` (patients, R) of whole numbers, float64."""
        found = self._present @ weights  # (steps, R)
        passed = np.cumsum(self._absent @ weights, axis=0)
        num_absent, passed = passed[-1], passed[:-1]
        true_positives = np.cumsum(found, axis=0)
        num_present = true_positives[-1] if len(found) else np.zeros(weights.shape[1])
        # pairs of a present and an absent image in the wrong order; a tie counts one half
        wrong = np.einsum("sr,sr->r", found, passed)
        if self._tied is not None:
            wrong -= np.einsum("sr,sr->r", found, self._tied @ weights) / 2
        pairs = num_present * num_absent
        auroc = _ratio(pairs - wrong, pairs)
        # the margin is for rounding: 0.9 times a whole number of images is meant exactly
        allowed = passed <= num_absent * (1 - self.specificity + 1e-12)
        sensitivity = _ratio(np.max(true_positives, axis=0, where=allowed, initial=0), num_present)
        passed += true_positives
        np.maximum(passed, 1, out=passed)  # 0 only before the first image that has weight
        np.divide(true_positives, passed, out=passed)
        precision = _ratio(np.einsum("sr,sr->r", found, passed), num_present)
        return np.where(pairs > 0, np.stack([auroc, precision, sensitivity]), np.nan)


def confusion_metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """`THRESHOLDED` of `counts` (4, ...), in the order of `CELLS`; each (...)."""
    hit, missed, false, right = np.asarray(counts, dtype=np.float64)
    present, absent, predicted, denied = hit + missed, false + right, hit + false, missed + right
    mcc = _ratio(hit * right - missed * false, np.sqrt(present * absent) * np.sqrt(predicted * denied))
    mcc = np.where((predicted == 0) | (denied == 0), 0.0, mcc)
    return {
        "f1": _ratio(2 * hit, 2 * hit + missed + false),
        "accuracy": _ratio(hit + right, present + absent),
        "mcc": np.where((present == 0) | (absent == 0), np.nan, mcc),
        "sensitivity": _ratio(hit, present),
        "specificity": _ratio(right, absent),
    }


class MultiLabelStatistics:
    """All metrics of each class of a multi-label problem, to be weighted.

    `labels` (n, F) hold 1, 0 and -100, `scores` (n, F), `patients` (n,) are numbers from 0. `thresholds` (F,) are NaN
    for a class that has none; an image is called present whose score is at least the threshold. `probabilities` (n, F).
    """

    def __init__(
        self,
        labels: np.ndarray,
        scores: np.ndarray,
        patients: np.ndarray,
        *,
        thresholds: np.ndarray | None = None,
        probabilities: np.ndarray | None = None,
        specificity: float = 0.9,
    ):
        self.num_patients = int(patients.max()) + 1
        self.num_classes = labels.shape[1]
        self.thresholds, self._has_probabilities = thresholds, probabilities is not None
        known = [np.flatnonzero(column != UNKNOWN) for column in labels.T]
        self._rankings = [
            Ranking(labels[rows, c], scores[rows, c], patients[rows], self.num_patients, specificity)
            for c, rows in enumerate(known)
        ]
        rows, columns = np.concatenate(known), np.repeat(np.arange(self.num_classes), [len(k) for k in known])
        labels, scores, patients = labels[rows, columns], scores[rows, columns], patients[rows]
        self._cells = self._bins = self._squares = None
        if thresholds is not None:
            cells = 2 * (1 - labels) + (labels == 1) * (scores < thresholds[columns])
            cells += (labels == 0) * (scores < thresholds[columns])  # in the order of CELLS
            self._cells = _sum_matrix(cells * self.num_classes + columns, patients, None, self._size(len(CELLS)))
        if probabilities is not None:
            excess = probabilities[rows, columns] - labels
            bins = bin_numbers(probabilities[rows, columns]) * self.num_classes + columns
            self._bins = _sum_matrix(bins, patients, excess, self._size(NUM_BINS))
            self._squares = _sum_matrix(columns, patients, excess**2, self._size(1))
            self._known = _sum_matrix(columns, patients, None, self._size(1))

    def _size(self, num_cells: int) -> tuple[int, int]:
        return num_cells * self.num_classes, self.num_patients

    def confusion(self, weights: np.ndarray) -> np.ndarray:
        """(4, F, R) counts in the order of `CELLS`."""
        return (self._cells @ weights).reshape(len(CELLS), self.num_classes, -1)

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> (F, R) for `weights` (patients, R)."""
        ranked = np.stack([ranking(weights) for ranking in self._rankings], axis=1)  # (3, F, R)
        result = dict(zip(RANKED, ranked, strict=True))
        if self._cells is not None:
            has_none = np.isnan(self.thresholds)[:, None]
            for key, values in confusion_metrics(self.confusion(weights)).items():
                result[key] = np.where(has_none, np.nan, values)
        if self._has_probabilities:
            excess = np.abs((self._bins @ weights).reshape(NUM_BINS, self.num_classes, -1)).sum(axis=0)
            known = self._known @ weights
            result["ece"], result["brier"] = _ratio(excess, known), _ratio(self._squares @ weights, known)
        return result


class MultiClassStatistics:
    """All metrics of a problem where each image has one class, to be weighted.

    `classes` (n,) are numbers below K, `scores` (n, K), `patients` (n,) are numbers from 0. The class with the highest
    score is predicted, the first of equal ones.
    """

    def __init__(self, classes: np.ndarray, scores: np.ndarray, patients: np.ndarray):
        self.num_patients, self.num_classes = int(patients.max()) + 1, scores.shape[1]
        cells = classes * self.num_classes + scores.argmax(axis=1)
        self._confusion = _sum_matrix(cells, patients, None, (self.num_classes**2, self.num_patients))
        self._rankings = [
            Ranking((classes == number).astype(np.int64), scores[:, number], patients, self.num_patients)
            for number in range(self.num_classes)
        ]

    def confusion(self, weights: np.ndarray) -> np.ndarray:
        """(K, K, R) counts, true class first."""
        return (self._confusion @ weights).reshape(self.num_classes, self.num_classes, -1)

    def per_class(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Recall, precision, F1 and one-vs-rest AUROC: each (K, R)."""
        counts = self.confusion(weights)
        hit, true, predicted = np.einsum("kkr->kr", counts), counts.sum(axis=1), counts.sum(axis=0)
        return {
            "recall": _ratio(hit, true),
            "precision": _ratio(hit, predicted),
            "f1": _ratio(2 * hit, true + predicted),
            "auroc": np.stack([ranking(weights)[0] for ranking in self._rankings]),
        }

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """`MULTICLASS`, each (R,), and the metrics of each class, (K, R), under `class_<metric>`.

        The balanced accuracy is the mean recall of the classes with images, macro F1 the mean over classes with images
        or predictions, as in scikit-learn; macro AUROC the mean over the classes with images.
        """
        counts, per_class = self.confusion(weights), self.per_class(weights)
        hit, true, predicted = np.einsum("kkr->r", counts), counts.sum(axis=1), counts.sum(axis=0)
        total = true.sum(axis=0)
        spread_true, spread_predicted = total**2 - (true**2).sum(axis=0), total**2 - (predicted**2).sum(axis=0)
        mcc = _ratio(total * hit - (true * predicted).sum(axis=0), np.sqrt(spread_true) * np.sqrt(spread_predicted))
        mcc = np.where(spread_predicted == 0, 0.0, mcc)
        result = {
            "accuracy": _ratio(hit, total),
            "balanced_accuracy": _mean_of_known(per_class["recall"]),
            "macro_f1": _mean_of_known(per_class["f1"]),
            "mcc": np.where(spread_true == 0, np.nan, mcc),
            "macro_auroc": _mean_of_known(per_class["auroc"]),
        }
        return result | {f"class_{key}": values for key, values in per_class.items()}


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(axis=0), known.sum(axis=0))


def check_scores(
    labels: np.ndarray, scores: np.ndarray, names: Sequence[str], patient_ids: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; raises `ValueError` where they cannot be those of a multi-label problem."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 2 or labels.shape != scores.shape or labels.shape[1] != len(names):
        raise ValueError(
            f"`labels` and `scores` must both be (images, {len(names)}), one column for each name, but are "
            f"{labels.shape} and {scores.shape}."
        )
    _check_rows(scores, names, patient_ids)
    strange = set(np.unique(labels).tolist()) - {0, 1, UNKNOWN}
    if strange:
        raise ValueError(f"Labels must be 1 (present), 0 (absent) or {UNKNOWN} (unknown), but {strange} occurs.")
    _check_finite(scores, labels != UNKNOWN, names)
    return labels.astype(np.int64), scores


def check_class_scores(
    classes: np.ndarray, scores: np.ndarray, names: Sequence[str], patient_ids: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; raises `ValueError` where they cannot be those of a problem with one class an image."""
    classes, scores = np.asarray(classes), np.asarray(scores, dtype=np.float64)
    if classes.ndim != 1 or scores.shape != (len(classes), len(names)) or len(names) < 2:
        raise ValueError(
            f"`classes` must be (images,) and `scores` (images, {len(names)}), a column for each of two or more names, "
            f"but they are {classes.shape} and {scores.shape}."
        )
    _check_rows(scores, names, patient_ids)
    strange = [number for number in np.unique(classes).tolist() if number not in range(len(names))]
    if strange:
        raise ValueError(
            f"`classes` must be whole numbers from 0 to {len(names) - 1}, but {strange[:5]} occur. Leave out images "
            "whose class is unknown."
        )
    _check_finite(scores, np.ones(scores.shape, dtype=bool), names)
    return classes.astype(np.int64), scores


def _check_rows(scores: np.ndarray, names: Sequence[str], patient_ids: Sequence[str] | None) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"Each name may occur once, but `names` is {list(names)}.")
    if len(scores) == 0:
        raise ValueError("There is no image to evaluate: `labels` and `scores` have 0 rows.")
    if patient_ids is not None and len(patient_ids) != len(scores):
        raise ValueError(
            f"`patient_ids` must name {len(scores)} patients, one for each row, but has {len(patient_ids)}."
        )


def _check_finite(scores: np.ndarray, used: np.ndarray, names: Sequence[str]) -> None:
    bad = np.argwhere(~np.isfinite(scores) & used)
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"Scores must be finite, but {len(bad)} are NaN or infinite, the first for {names[column]!r} in row {row}. "
            "Look for diverged weights or a half-precision overflow in the model."
        )

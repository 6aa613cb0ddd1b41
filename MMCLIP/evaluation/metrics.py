"""Metrics of classification with bootstrap intervals over patients. NumPy and SciPy; nothing here knows a model.

Which values are undefined, and NaN or None instead of a number, is said in weighted_metrics.py; how calibration is
measured, in calibration.py; what an interval and a p-value are, in bootstrap.py.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .bootstrap import (
    bootstrap_draws,
    interval_reason,
    number_or_none,
    patient_numbers,
    percentile_interval,
    resample_patients,
    threshold_array,
)
from .calibration import UNKNOWN, check_probabilities
from .weighted_metrics import (
    CALIBRATED,
    CELLS,
    MULTICLASS,
    RANKED,
    THRESHOLDED,
    MultiClassStatistics,
    MultiLabelStatistics,
    Ranking,
    check_class_scores,
    check_scores,
    confusion_metrics,
)


__all__ = [
    "UNKNOWN",
    "auroc",
    "average_precision",
    "choose_thresholds",
    "classification_metrics",
    "multiclass_metrics",
    "percentile_interval",
    "resample_patients",
    "sensitivity_at_specificity",
    "threshold_metrics",
]
CRITERIA = ("f1", "youden", "mcc")
EVALUATE_METRICS = (
    "CalibrationError",
    "MultiClassClassification",
    "MultiLabelAUROC",
    "MultiLabelClassification",
    "RetrievalRecall",
)


def _ranked(labels: np.ndarray, scores: np.ndarray, key: str, specificity: float = 0.9) -> float:
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    ranking = Ranking(labels, scores, np.zeros(len(labels), dtype=np.int64), 1, specificity)
    return float(ranking(np.ones((1, 1)))[RANKED.index(key), 0])


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of `scores` (n,) for `labels` (n,) of 0 and 1; NaN when only one label occurs."""
    return _ranked(labels, scores, "auroc")


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision of `scores` (n,) for `labels` (n,) of 0 and 1; NaN when only one label occurs."""
    return _ranked(labels, scores, "average_precision")


def sensitivity_at_specificity(labels: np.ndarray, scores: np.ndarray, specificity: float = 0.9) -> float:
    """The highest sensitivity of a threshold whose specificity is at least `specificity`; NaN with one label only.

    `labels` (n,) of 0 and 1, `scores` (n,). Images with equal scores are called present together. The threshold above
    all scores counts as well, so there is always one.
    """
    return _ranked(labels, scores, "sensitivity_at_specificity", _checked_specificity(specificity))


def threshold_metrics(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict:
    """F1, accuracy, MCC, sensitivity, specificity and `confusion` where a score of at least `threshold` is present.

    `labels` (n,) of 0 and 1, `scores` (n,). A value that is undefined is NaN.
    """
    labels, predicted = np.asarray(labels), np.asarray(scores) >= threshold
    cells = [((labels == present) & (predicted == called)).sum() for present in (1, 0) for called in (True, False)]
    metrics = {key: float(value) for key, value in confusion_metrics(np.array(cells)).items()}
    return metrics | {"confusion": {name: int(count) for name, count in zip(CELLS, cells, strict=True)}}


def _every_threshold(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct scores (t,), falling, and the counts (4, t) in the order of `CELLS` with each as threshold."""
    values, step = np.unique(-scores, return_inverse=True)
    hit, false = (np.cumsum(np.bincount(step[labels == value], minlength=len(values))) for value in (1, 0))
    return -values, np.stack([hit, hit[-1] - hit, false, false[-1] - false])


def _best_threshold(labels: np.ndarray, scores: np.ndarray, criterion: str = "f1") -> tuple[float, dict[str, float]]:
    thresholds, counts = _every_threshold(labels, scores)
    metrics = confusion_metrics(counts)
    if criterion == "youden":
        best = int(np.argmax(metrics["sensitivity"] + metrics["specificity"]))
    else:
        best = int(np.argmax(metrics[criterion]))
    return float(thresholds[best]), {key: float(values[best]) for key, values in metrics.items()}


def choose_thresholds(
    labels: np.ndarray, scores: np.ndarray, names: Sequence[str], criterion: str = "f1"
) -> dict[str, float]:
    """The best threshold for each label on *validation* rows, to be handed to [`classification_metrics`].

    `labels` (n, F) hold 1 present, 0 absent, -100 unknown, `scores` (n, F). `criterion` is "f1", "mcc" or "youden",
    sensitivity + specificity. A threshold is one of the scores, the highest of several that are equally good; a score
    of at least the threshold means present. A label without images of both values is missing in the result.
    """
    labels, scores = check_scores(labels, scores, names, None)
    if criterion not in CRITERIA:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, but is {criterion!r}.")
    thresholds = {}
    for column, name in enumerate(names):
        known = labels[:, column] != UNKNOWN
        if {0, 1} <= set(labels[known, column].tolist()):
            thresholds[name] = _best_threshold(labels[known, column], scores[known, column], criterion)[0]
    return thresholds


def _checked_specificity(specificity: float) -> float:
    if not 0 <= specificity <= 1:
        raise ValueError(f"`specificity` must lie in [0, 1], but is {specificity}.")
    return specificity


def classification_metrics(
    labels: np.ndarray,
    scores: np.ndarray,
    names: Sequence[str],
    patient_ids: Sequence[str] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    *,
    thresholds: Mapping[str, float] | None = None,
    probabilities: np.ndarray | None = None,
    specificity: float = 0.9,
) -> dict:
    """Metrics of each class and their means over classes, with 95 % bootstrap intervals; values that JSON can hold.

    `labels` (n, F) holds 1 present, 0 absent, -100 unknown; `scores` (n, F) is higher where the class is likelier;
    `names` are the F classes. Intervals draw patients with replacement (images, where `patient_ids` names none).

    `per_class` of a name has `auroc`, `average_precision`, `sensitivity_at_specificity`, `num_positive`,
    `num_negative`; with `thresholds` (name -> threshold, chosen on validation by [`choose_thresholds`]) also
    `threshold`, `f1`, `accuracy`, `mcc`, `sensitivity`, `specificity`, `confusion`; with `probabilities` (n, F) `ece`
    and `brier`. `oracle_threshold` is what the threshold of the best F1 on these very images gives: no result of a
    model, but what papers print who choose it on test. `macro_<metric>` is the mean over the classes that have the
    metric, and `<metric>_ci` beside each number its interval.

    A class with only one of the two labels is not averaged but listed under `skipped`; a scored one without a threshold
    under `no_threshold`. The interval of a mean uses the draws in which every class has the metric;
    `num_bootstrap_macro` counts them for the AUROC, and where they are fewer than a tenth the interval is None. All
    intervals are None for a single patient and for `num_bootstrap=0`, as `interval_reason` says. The means are None
    when every class is skipped. Raises `ValueError` for shapes that disagree, scores that are not finite, probabilities
    outside [0, 1], and thresholds of labels that are not there.
    """
    labels, scores = check_scores(labels, scores, names, patient_ids)
    given = threshold_array(thresholds, names)
    if probabilities is not None:
        _, probabilities = check_probabilities(labels, probabilities)
    patients = patient_numbers(patient_ids, len(labels))

    per_class, skipped, kept = {}, [], []
    for column, name in enumerate(names):
        num_positive, num_negative = (int((labels[:, column] == value).sum()) for value in (1, 0))
        counts = {"num_positive": num_positive, "num_negative": num_negative}
        if min(counts.values()) == 0:
            missing = " and ".join(key.removeprefix("num_") for key, count in counts.items() if count == 0)
            skipped.append({"name": name, "reason": f"no {missing} image", **counts})
        else:
            per_class[name] = counts
            kept.append(column)
    keys = list(RANKED)
    keys += THRESHOLDED if thresholds is not None else ()
    keys += CALIBRATED if probabilities is not None else ()
    result = {
        **{f"macro_{key}{end}": None for key in keys for end in ("", "_ci")},
        "oracle_threshold": {"macro_f1": None, "macro_accuracy": None},
        "specificity": _checked_specificity(specificity),
        "per_class": per_class,
        "skipped": skipped,
        "num_skipped": len(skipped),
        "num_images": len(labels),
        "num_bootstrap": num_bootstrap,
        "num_bootstrap_macro": 0,
        "interval_reason": interval_reason(patients, num_bootstrap),
    }
    if thresholds is not None:
        result["no_threshold"] = [name for name in per_class if name not in thresholds]
    if not per_class:
        return result

    statistics = MultiLabelStatistics(
        labels[:, kept],
        scores[:, kept],
        patients,
        thresholds=None if given is None else given[kept],
        probabilities=None if probabilities is None else probabilities[:, kept],
        specificity=specificity,
    )
    _add_values(result, statistics, labels[:, kept], scores[:, kept])
    if result["interval_reason"] is None:
        draws = bootstrap_draws(statistics, statistics.num_patients, num_bootstrap, seed, len(labels))
        several = [len(np.unique(patients[labels[:, column] != UNKNOWN])) > 1 for column in kept]
        _add_intervals(result, draws, several, num_bootstrap)
    return result


def _add_values(result: dict, statistics: MultiLabelStatistics, labels: np.ndarray, scores: np.ndarray) -> None:
    """Put the point values into `result`; labels and scores are those of the classes under `per_class`."""
    weights = np.ones((statistics.num_patients, 1))
    point = {key: values[:, 0] for key, values in statistics(weights).items()}
    confusion = None if statistics.thresholds is None else statistics.confusion(weights)[..., 0]
    for column, values in enumerate(result["per_class"].values()):
        has_threshold = confusion is not None and not np.isnan(statistics.thresholds[column])
        for key, numbers in point.items():
            if key not in THRESHOLDED or has_threshold:
                values |= {key: number_or_none(numbers[column]), f"{key}_ci": None}
        if has_threshold:
            values["threshold"] = float(statistics.thresholds[column])
            values["confusion"] = {name: int(count) for name, count in zip(CELLS, confusion[:, column], strict=True)}
        known = labels[:, column] != UNKNOWN
        threshold, best = _best_threshold(labels[known, column], scores[known, column])
        values["oracle_threshold"] = {"threshold": threshold, "f1": best["f1"], "accuracy": best["accuracy"]}
    for key, numbers in point.items():
        if not np.isnan(numbers).all():
            result[f"macro_{key}"] = float(np.mean(numbers[~np.isnan(numbers)]))
    for key in ("f1", "accuracy"):
        best = [values["oracle_threshold"][key] for values in result["per_class"].values()]
        result["oracle_threshold"][f"macro_{key}"] = float(np.mean(best))


def _add_intervals(result: dict, draws: dict[str, np.ndarray], several: Sequence[bool], num_bootstrap: int) -> None:
    """`draws` maps metrics to (F, R); `several` (F,): is the class known in more than one patient?"""
    for key, values in draws.items():
        of_class = list(result["per_class"].values())
        kept = [number for number, inner in enumerate(of_class) if inner.get(key) is not None]
        for number in kept:
            if several[number]:
                of_class[number][f"{key}_ci"] = percentile_interval(values[number], num_bootstrap)
            else:
                of_class[number]["interval_reason"] = "its known images are of one patient"
        if any(several[number] for number in kept):  # NaN where a class lacks the metric, such a draw is left out
            result[f"macro_{key}_ci"] = percentile_interval(values[kept].mean(axis=0), num_bootstrap)
    result["num_bootstrap_macro"] = int((~np.isnan(draws["auroc"].mean(axis=0))).sum())


def multiclass_metrics(
    classes: np.ndarray,
    scores: np.ndarray,
    names: Sequence[str],
    patient_ids: Sequence[str] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Metrics where each image has exactly one of K classes, with 95 % bootstrap intervals; values that JSON can hold.

    `classes` (n,) are numbers of `names`, `scores` (n, K); the class with the highest score is predicted, the first of
    equal ones. Returns `accuracy`, `balanced_accuracy` (mean recall of classes with images), `macro_f1` (over classes
    with images or predictions), `mcc` and `macro_auroc` (one class against the rest, of the scores as they are, over
    classes with images), each with `<metric>_ci`; `confusion` (K lists of K counts, true class first), `per_class` with
    `recall`, `precision`, `f1`, `auroc`, their intervals and `num_images`, and `absent_classes`, names without an
    image. Undefined values are None. Intervals and errors are as in [`classification_metrics`]; a class whose images
    are of one patient has none, and `interval_reason`.
    """
    classes, scores = check_class_scores(classes, scores, names, patient_ids)
    patients = patient_numbers(patient_ids, len(classes))
    statistics = MultiClassStatistics(classes, scores, patients)
    weights = np.ones((statistics.num_patients, 1))
    point = {key: values[..., 0] for key, values in statistics(weights).items()}
    reason, draws = interval_reason(patients, num_bootstrap), {}
    if reason is None:
        draws = bootstrap_draws(statistics, statistics.num_patients, num_bootstrap, seed, len(classes))

    def described(name: str, key: str, index: tuple = (), several: bool = True) -> dict:
        value, interval = number_or_none(point[key][index]), None
        if draws and several and value is not None:
            interval = percentile_interval(draws[key][index], num_bootstrap)
        return {name: value, f"{name}_ci": interval}

    result = {}
    for key in MULTICLASS:
        result |= described(key, key)
    counts = np.bincount(classes, minlength=len(names))
    per_class = {name: {"num_images": int(count)} for name, count in zip(names, counts, strict=True)}
    for number, values in enumerate(per_class.values()):
        several = len(np.unique(patients[classes == number])) != 1
        for key in ("recall", "precision", "f1", "auroc"):
            values |= described(key, f"class_{key}", (number,), several)
        if draws and not several:
            values["interval_reason"] = "its images are of one patient"
    return {
        **result,
        "confusion": statistics.confusion(weights)[..., 0].astype(int).tolist(),
        "per_class": per_class,
        "absent_classes": [name for name, count in zip(names, counts, strict=True) if count == 0],
        "num_images": len(classes),
        "num_bootstrap": num_bootstrap,
        "interval_reason": reason,
    }


def __getattr__(name: str):
    # `evaluate` takes seconds to import, so its metric classes are made on first use
    if name not in EVALUATE_METRICS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import evaluate_metric

    return getattr(evaluate_metric, name)

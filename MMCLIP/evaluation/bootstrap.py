"""Bootstrap over patients: 95 % intervals, and the difference of two models on the same patients.

Patients are drawn with replacement, with all their images, as the images of one patient resemble each other. Intervals
are percentile intervals: the 2.5th and 97.5th percentile of the metric over the draws.

A difference is that of two models in each draw, the same draws for both. Its two-sided p-value is twice the share of
draws on the rarer side of 0, `2 * (1 + min(draws <= 0, draws >= 0)) / (1 + draws)` and at most 1. It is never 0, with
1,000 draws at least 0.002, and below 0.05 where the interval does not hold 0, give or take one draw.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from .calibration import UNKNOWN
from .weighted_metrics import (
    MULTICLASS,
    MultiClassStatistics,
    MultiLabelStatistics,
    check_class_scores,
    check_scores,
)


_BLOCK = 1_000_000  # bootstrap weights held at once; bounds the memory to some 100 MB


def patient_numbers(patient_ids: Sequence[str] | None, num_rows: int) -> np.ndarray:
    """(num_rows,) numbers from 0, equal for rows of one patient. A row without one ("" or no ids) is its own."""
    names = [""] * num_rows if patient_ids is None else list(patient_ids)
    return np.unique([name or f"\0{row}" for row, name in enumerate(names)], return_inverse=True)[1]


def count_patients(patient_ids: Sequence[str]) -> int:
    """How many patients there are; "" is a patient of its own."""
    return len(set(patient_ids) - {""}) + list(patient_ids).count("")


def _patient_draws(num_patients: int, num_bootstrap: int, seed: int, width: int) -> Iterator[np.ndarray]:
    """Blocks of (r, num_patients), how often each patient is drawn; `width` numbers a draw are held at once."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // width)
    for start in range(0, num_bootstrap, block):
        size = min(block, num_bootstrap - start)
        yield rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=size)


def resample_patients(
    patient_ids: Sequence[str] | None, num_rows: int, num_bootstrap: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """Bootstrap weights in blocks of (r, num_rows): how often each row is drawn when whole patients are drawn.

    Rows without a patient ("" or no `patient_ids` at all) stand for a patient each. The blocks together have
    `num_bootstrap` rows; they are yielded one by one, so memory stays bounded.
    """
    patients = patient_numbers(patient_ids, num_rows)
    for counts in _patient_draws(int(patients.max()) + 1, num_bootstrap, seed, num_rows):
        yield counts[:, patients]


def percentile_interval(values: np.ndarray, num_bootstrap: int) -> list[float] | None:
    """95 % percentile interval of bootstrap `values` (R,), or None when fewer than a tenth of the draws are usable.

    A draw in which a rare class lost all its positives has no AUROC (NaN) and is left out.
    """
    values = values[~np.isnan(values)]
    if len(values) < max(2, num_bootstrap / 10):
        return None
    return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]


def interval_reason(patients: np.ndarray, num_bootstrap: int) -> str | None:
    """Why there can be no interval at all, or None. `patients` (n,) are those of [`patient_numbers`]."""
    if num_bootstrap < 1:
        return "no bootstrap was asked for"
    return None if len(np.unique(patients)) > 1 else "all images are of one patient"


def bootstrap_draws(
    statistics: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    num_patients: int,
    num_bootstrap: int,
    seed: int,
    num_rows: int,
) -> dict[str, np.ndarray]:
    """Metric -> (..., R) over all draws. `statistics` maps weights (patients, r) to metrics (..., r)."""
    blocks = []
    for counts in _patient_draws(num_patients, num_bootstrap, seed, num_rows):
        blocks.append(statistics(np.ascontiguousarray(counts.T, dtype=np.float64)))
    return {key: np.concatenate([block[key] for block in blocks], axis=-1) for key in (blocks[0] if blocks else ())}


def number_or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def p_value(leads: np.ndarray) -> float:
    """The two-sided p-value of the module for differences `leads` (R,), of which NaN are left out."""
    leads = leads[~np.isnan(leads)]
    rarer = min((leads <= 1e-12).sum(), (leads >= -1e-12).sum())  # what is 0 but for rounding is on both sides
    return float(min(1.0, 2 * (1 + rarer) / (1 + len(leads))))


def first_and_second(first: float, second: float, leads: np.ndarray, num_bootstrap: int) -> dict:
    """Both values, `first` minus `second`, and the interval and p-value of the draws `leads` (R,) of that."""
    interval = percentile_interval(leads, num_bootstrap)
    return {
        "first": float(first),
        "second": float(second),
        "difference": float(first - second),
        "difference_ci": interval,
        "p_value": None if interval is None else p_value(leads),
    }


def _difference(value: float, draws: np.ndarray | None, num_bootstrap: int) -> dict:
    """`draws` (R,) are differences, None where there is no bootstrap."""
    result = {"difference": number_or_none(value), "ci": None, "p_value": None}
    if draws is None or result["difference"] is None:
        return result
    result["ci"] = percentile_interval(draws, num_bootstrap)
    result["p_value"] = None if result["ci"] is None else p_value(draws)
    return result


def _paired(statistics: Sequence, patients: np.ndarray, num_bootstrap: int, seed: int) -> tuple[dict, dict]:
    """Point values and draws of the differences of two statistics, metric -> (...,) and (..., R)."""

    def lead(weights: np.ndarray) -> dict[str, np.ndarray]:
        first, second = (one(weights) for one in statistics)
        return {key: first[key] - second[key] for key in first if key in second}

    num_patients = int(patients.max()) + 1
    point = {key: values[..., 0] for key, values in lead(np.ones((num_patients, 1))).items()}
    if interval_reason(patients, num_bootstrap):
        return point, {}
    return point, bootstrap_draws(lead, num_patients, num_bootstrap, seed, len(patients))


def threshold_array(thresholds: Mapping[str, float] | None, names: Sequence[str]) -> np.ndarray | None:
    """(F,) thresholds in the order of `names`, NaN where there is none; None for None."""
    if thresholds is None:
        return None
    strange = sorted(set(thresholds) - set(names))
    if strange:
        raise ValueError(f"`thresholds` are given for {strange}, which are not among the names {list(names)}.")
    values = np.array([thresholds.get(name, np.nan) for name in names], dtype=np.float64)
    broken = [name for name in thresholds if not np.isfinite(thresholds[name])]
    if broken:
        raise ValueError(f"Thresholds must be finite, but those of {broken} are not. Leave out labels without one.")
    return values


def compare_models(
    labels: np.ndarray,
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    names: Sequence[str],
    patient_ids: Sequence[str] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    *,
    thresholds_a: Mapping[str, float] | None = None,
    thresholds_b: Mapping[str, float] | None = None,
    specificity: float = 0.9,
) -> dict:
    """Model a minus model b on the same images: {"macro_auroc": {"difference", "ci", "p_value"}, ..., "per_class"}.

    `labels` (n, F) hold 1 present, 0 absent, -100 unknown, `scores_a` and `scores_b` (n, F). Metrics are those of
    [`classification_metrics`]; F1, accuracy, MCC, sensitivity and specificity are there for classes that have a
    threshold in both models. Interval and p-value: see the module. Classes without both labels are `skipped`; where no
    interval is possible, for a single patient, it and the p-value are None and `interval_reason` says why. They are
    None as well for a class whose known images are of one patient.
    """
    labels, scores_a = check_scores(labels, scores_a, names, patient_ids)
    labels, scores_b = check_scores(labels, scores_b, names, patient_ids)
    both = [column for column, values in enumerate(labels.T) if {0, 1} <= set(values.tolist())]
    thresholds = [threshold_array(given, names) for given in (thresholds_a, thresholds_b)]
    thresholds = [None if any(one is None for one in thresholds) else one[both] for one in thresholds]
    patients = patient_numbers(patient_ids, len(labels))
    result = {
        "per_class": {},
        "skipped": [name for column, name in enumerate(names) if column not in both],
        "num_images": len(labels),
        "num_bootstrap": num_bootstrap,
        "interval_reason": interval_reason(patients, num_bootstrap),
    }
    if not both:
        empty = _difference(np.nan, None, num_bootstrap)
        return {"macro_auroc": empty, "macro_average_precision": dict(empty)} | result
    statistics = [
        MultiLabelStatistics(labels[:, both], scores[:, both], patients, thresholds=given, specificity=specificity)
        for scores, given in zip((scores_a, scores_b), thresholds, strict=True)
    ]
    point, draws = _paired(statistics, patients, num_bootstrap, seed)
    # images of one patient are drawn together, so their draws are all alike
    several = np.array([len(np.unique(patients[labels[:, column] != UNKNOWN])) > 1 for column in both])
    macro = {}
    for key, values in point.items():
        kept = ~np.isnan(values)
        if kept.any():
            mean = draws[key][kept].mean(axis=0) if draws and several[kept].any() else None
            macro[f"macro_{key}"] = _difference(values[kept].mean(), mean, num_bootstrap)
    for number, column in enumerate(both):
        result["per_class"][names[column]] = {
            key: _difference(values[number], draws[key][number] if draws and several[number] else None, num_bootstrap)
            for key, values in point.items()
            if not np.isnan(values[number])
        }
    return macro | result


def compare_multiclass(
    classes: np.ndarray,
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    names: Sequence[str],
    patient_ids: Sequence[str] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """As [`compare_models`] where each image has one of K classes: `classes` (n,), scores (n, K).

    {"accuracy": {"difference", "ci", "p_value"}, ...} for the metrics of [`multiclass_metrics`].
    """
    classes, scores_a = check_class_scores(classes, scores_a, names, patient_ids)
    classes, scores_b = check_class_scores(classes, scores_b, names, patient_ids)
    patients = patient_numbers(patient_ids, len(classes))
    statistics = [MultiClassStatistics(classes, scores, patients) for scores in (scores_a, scores_b)]
    point, draws = _paired(statistics, patients, num_bootstrap, seed)
    return {
        **{key: _difference(point[key], draws.get(key), num_bootstrap) for key in MULTICLASS},
        "num_images": len(classes),
        "num_bootstrap": num_bootstrap,
        "interval_reason": interval_reason(patients, num_bootstrap),
    }


def _mean_statistic(values: np.ndarray, patient_ids: Sequence[str] | None) -> tuple[Callable, np.ndarray]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"`values` must be finite numbers, one for each row and at least one, but are {values.shape} with "
            f"{(~np.isfinite(values)).sum()} that are not finite."
        )
    if patient_ids is not None and len(patient_ids) != len(values):
        raise ValueError(f"`patient_ids` must name {len(values)} patients, but has {len(patient_ids)}.")
    patients = patient_numbers(patient_ids, len(values))
    sums, counts = np.bincount(patients, weights=values), np.bincount(patients)
    return lambda weights: {"mean": (sums @ weights) / (counts @ weights)}, patients


def mean_with_interval(
    values: np.ndarray, patient_ids: Sequence[str] | None = None, num_bootstrap: int = 1000, seed: int = 0
) -> tuple[float, list[float] | None]:
    """Mean of `values` (n,), one for each row, and its 95 % interval: None for one patient or no bootstrap."""
    statistic, patients = _mean_statistic(values, patient_ids)
    if interval_reason(patients, num_bootstrap):
        return float(np.mean(values)), None
    draws = bootstrap_draws(statistic, int(patients.max()) + 1, num_bootstrap, seed, len(patients))
    return float(np.mean(values)), percentile_interval(draws["mean"], num_bootstrap)


def compare_means(
    values_a: np.ndarray,
    values_b: np.ndarray,
    patient_ids: Sequence[str] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Mean of `values_a` (n,) minus that of `values_b` (n,) of the same rows: {"difference", "ci", "p_value"}."""
    if np.shape(values_a) != np.shape(values_b):
        raise ValueError(
            f"Both sets of values must belong to the same rows, but are {np.shape(values_a)} and {np.shape(values_b)}."
        )
    statistic, patients = _mean_statistic(np.asarray(values_a) - np.asarray(values_b), patient_ids)
    num_patients, draws = int(patients.max()) + 1, None
    if not interval_reason(patients, num_bootstrap):
        draws = bootstrap_draws(statistic, num_patients, num_bootstrap, seed, len(patients))["mean"]
    return _difference(float(statistic(np.ones(num_patients))["mean"]), draws, num_bootstrap)

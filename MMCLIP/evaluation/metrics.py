"""Multi-label ranking metrics with bootstrap intervals over patients. NumPy only; nothing here knows a model."""

from collections.abc import Iterator, Sequence

import numpy as np


UNKNOWN = -100  # a label that is neither present nor absent; such an image does not count for that class
_BLOCK = 4_000_000  # bootstrap weights held at once; bounds the memory to some 100 MB


def _area_under_curves(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision for each row of `weights`.

    `labels` (n,) holds 0 and 1, `scores` (n,), `weights` (R, n) whole numbers: how often each image counts. Returns two
    (R,) arrays, NaN where one of the two labels has no weight. Equal scores form one step of the curve, so a tie counts
    one half in the AUROC, as in scikit-learn.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last image of each run of equal scores
    weights = np.ones((1, len(scores)), dtype=np.int64) if weights is None else weights[:, order]
    true_positives = np.cumsum(weights * (labels[order] == 1), axis=1)[:, ends].astype(np.float64)
    false_positives = np.cumsum(weights * (labels[order] == 0), axis=1)[:, ends].astype(np.float64)
    positives, negatives = true_positives[:, -1], false_positives[:, -1]
    new_true = np.diff(true_positives, axis=1, prepend=0)
    new_false = np.diff(false_positives, axis=1, prepend=0)
    found = np.maximum(true_positives + false_positives, 1)  # 0 only before the first image that has weight
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (new_false * (true_positives - new_true / 2)).sum(axis=1) / (positives * negatives)
        precision = (new_true * true_positives / found).sum(axis=1) / positives
    one_label = (positives == 0) | (negatives == 0)
    return np.where(one_label, np.nan, auroc), np.where(one_label, np.nan, precision)


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of `scores` (n,) for `labels` (n,) of 0 and 1; NaN when only one label occurs."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    return float(_area_under_curves(labels, scores)[0][0]) if len(labels) else float("nan")


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision of `scores` (n,) for `labels` (n,) of 0 and 1; NaN when only one label occurs."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    return float(_area_under_curves(labels, scores)[1][0]) if len(labels) else float("nan")


def resample_patients(
    patient_ids: Sequence[str] | None, num_rows: int, num_bootstrap: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """Bootstrap weights in blocks of (r, num_rows): how often each row is drawn when whole patients are drawn.

    Rows without a patient ("" or no `patient_ids` at all) stand for a patient each. The blocks together have
    `num_bootstrap` rows; they are yielded one by one, so memory stays bounded.
    """
    names = [""] * num_rows if patient_ids is None else list(patient_ids)
    _, patient = np.unique([name or f"\0{row}" for row, name in enumerate(names)], return_inverse=True)
    num_patients = int(patient.max()) + 1
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // num_rows)
    for start in range(0, num_bootstrap, block):
        size = min(block, num_bootstrap - start)
        counts = rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=size)
        yield counts[:, patient]


def percentile_interval(values: np.ndarray, num_bootstrap: int) -> list[float] | None:
    """95 % percentile interval of bootstrap `values` (R,), or None when fewer than a tenth of the draws are usable.

    A draw in which a rare class lost all its positives has no AUROC (NaN) and is left out.
    """
    values = values[~np.isnan(values)]
    if len(values) < max(2, num_bootstrap / 10):
        return None
    return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]


def _check(labels: np.ndarray, scores: np.ndarray, names: Sequence[str], patient_ids: Sequence[str] | None) -> None:
    if labels.ndim != 2 or labels.shape != scores.shape or labels.shape[1] != len(names):
        raise ValueError(
            f"`labels` and `scores` must both be (images, {len(names)}), one column for each name, but are "
            f"{labels.shape} and {scores.shape}."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"Each name may occur once, but `names` is {list(names)}.")
    if len(labels) == 0:
        raise ValueError("There is no image to evaluate: `labels` and `scores` have 0 rows.")
    if patient_ids is not None and len(patient_ids) != len(labels):
        raise ValueError(
            f"`patient_ids` must name {len(labels)} patients, one for each row, but has {len(patient_ids)}."
        )
    strange = set(np.unique(labels).tolist()) - {0, 1, UNKNOWN}
    if strange:
        raise ValueError(f"Labels must be 1 (present), 0 (absent) or {UNKNOWN} (unknown), but {strange} occurs.")
    bad = np.argwhere(~np.isfinite(scores) & (labels != UNKNOWN))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"Scores must be finite, but {len(bad)} are NaN or infinite, the first for {names[column]!r} in row {row}. "
            "Look for diverged weights or a half-precision overflow in the model."
        )


def classification_metrics(
    labels: np.ndarray,
    scores: np.ndarray,
    names: Sequence[str],
    patient_ids: Sequence[str] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """AUROC and average precision for each class and their mean over classes, with 95 % bootstrap intervals.

    `labels` (n, F) holds 1 present, 0 absent, -100 unknown; `scores` (n, F) is higher where the class is likelier;
    `names` are the F classes. Intervals draw patients with replacement (images, where `patient_ids` names none);
    `num_bootstrap=0` leaves them None. A class with only one of the two labels is not averaged but listed under
    `skipped`. The interval of a mean uses the draws in which every class has both labels; `num_bootstrap_macro` counts
    them, and where they are fewer than a tenth the interval is None. Returns values that JSON can hold; the means are
    None when every class is skipped. Raises `ValueError` for shapes that disagree and scores that are not finite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    _check(labels, scores, names, patient_ids)

    per_class, skipped, kept = {}, [], []
    for column, name in enumerate(names):
        known = labels[:, column] != UNKNOWN
        num_positive = int((labels[known, column] == 1).sum())
        counts = {"num_positive": num_positive, "num_negative": int(known.sum()) - num_positive}
        if min(counts.values()) == 0:
            missing = " and ".join(key.removeprefix("num_") for key, count in counts.items() if count == 0)
            skipped.append({"name": name, "reason": f"no {missing} image", **counts})
            continue
        area, precision = _area_under_curves(labels[known, column], scores[known, column])
        per_class[name] = {
            "auroc": float(area[0]),
            "auroc_ci": None,
            "average_precision": float(precision[0]),
            "average_precision_ci": None,
            **counts,
        }
        kept.append((name, column, known))

    result = {
        "macro_auroc": float(np.mean([values["auroc"] for values in per_class.values()])) if per_class else None,
        "macro_auroc_ci": None,
        "macro_average_precision": (
            float(np.mean([values["average_precision"] for values in per_class.values()])) if per_class else None
        ),
        "macro_average_precision_ci": None,
        "per_class": per_class,
        "skipped": skipped,
        "num_skipped": len(skipped),
        "num_images": len(labels),
        "num_bootstrap": num_bootstrap,
        "num_bootstrap_macro": 0,
    }
    if not per_class or num_bootstrap == 0:
        return result

    blocks = []
    for weights in resample_patients(patient_ids, len(labels), num_bootstrap, seed):
        curves = [_area_under_curves(labels[known, c], scores[known, c], weights[:, known]) for _, c, known in kept]
        blocks.append(np.stack([np.stack(curve) for curve in curves]))  # (classes, 2, r)
    draws = np.concatenate(blocks, axis=-1)
    for (name, _, _), (area, precision) in zip(kept, draws, strict=True):
        per_class[name]["auroc_ci"] = percentile_interval(area, num_bootstrap)
        per_class[name]["average_precision_ci"] = percentile_interval(precision, num_bootstrap)
    macro = draws.mean(axis=0)  # (2, R); NaN where any class lacks a label, and such a draw is left out
    result["macro_auroc_ci"] = percentile_interval(macro[0], num_bootstrap)
    result["macro_average_precision_ci"] = percentile_interval(macro[1], num_bootstrap)
    result["num_bootstrap_macro"] = int((~np.isnan(macro[0])).sum())
    return result


def __getattr__(name: str):
    # `evaluate` takes seconds to import, so its metric class is made on first use
    if name != "MultiLabelAUROC":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .evaluate_metric import MultiLabelAUROC

    return MultiLabelAUROC

"""Linear probe: logistic regression on the frozen image features, at shares of the training patients.

The optimum is exact: features are standardised and turned into their principal axes, in which the curvature is nearly
diagonal, so that L-BFGS needs few steps. The L2 strength of each label is chosen on validation rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .bootstrap import (
    bootstrap_draws,
    count_patients,
    interval_reason,
    number_or_none,
    patient_numbers,
    percentile_interval,
)
from .controls import shuffled_control
from .metrics import UNKNOWN, auroc, choose_thresholds, classification_metrics, multiclass_metrics
from .weighted_metrics import RANKED, THRESHOLDED, MultiClassStatistics, MultiLabelStatistics


# strong to weak, so that each fit starts from the one before
L2_GRID = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
DEFAULT_L2 = 0.1  # where nothing can be validated: standardised features are many, labelled images few
ROLES = ("train", "validation", "test")


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe: `margins = features @ weight + bias`, with `weight` (H, F) and `bias` (F,) float64.

    `l2` is the strength chosen for each label, None for those in `constant_labels`: what was seen of these in training
    had one value only, so their margin is a constant.
    """

    labels: list[str]
    weight: np.ndarray
    bias: np.ndarray
    l2: dict[str, float | None]
    constant_labels: list[str]

    def margins(self, features) -> np.ndarray:
        """Logits (n, F) float64 of `features` (n, H), a tensor or an array: of each label, or of each class."""
        features = _matrix(features, "features")
        if features.shape[1] != len(self.weight):
            raise ValueError(f"`features` must be (n, {len(self.weight)}), as in training, but are {features.shape}.")
        return features @ self.weight + self.bias


def nested_subset(patient_ids: Sequence[str], fraction: float, seed: int = 0) -> np.ndarray:
    """Row indices, ascending, of `fraction` of the patients, at least one; "" is a patient of its own.

    With one seed a smaller fraction lies inside a larger one, and names alone decide who is drawn, not their order.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"A fraction of the training patients must lie in (0, 1], but is {fraction}.")
    if len(patient_ids) == 0:
        raise ValueError("There is no training row to take a fraction of. Check the split of the training rows.")
    patient = patient_numbers(patient_ids, len(patient_ids))
    num_patients = int(patient.max()) + 1
    place = np.empty(num_patients, dtype=np.int64)
    place[np.random.default_rng(seed).permutation(num_patients)] = np.arange(num_patients)
    return np.flatnonzero(place[patient] < max(1, round(fraction * num_patients)))


def fit_linear_probe(
    features,
    targets: np.ndarray,
    labels: Sequence[str],
    validation_features=None,
    validation_targets: np.ndarray | None = None,
    *,
    l2_grid: Sequence[float] = L2_GRID,
    l2: float = DEFAULT_L2,
) -> LinearProbe:
    """Logistic regression of `targets` on `features` (n, H).

    `targets` (n, F) hold 1 present, 0 absent, -100 unknown: one regression for each label, on the rows that know it.
    `targets` (n,) hold class numbers: one multinomial regression. Minimised is the mean loss plus `l2 / 2` times the
    squared length of the weights of standardised features; the intercept is free. (For scikit-learn, `C = 1 / (rows *
    l2)`.) Of `l2_grid` a label takes what gives the best AUROC on the validation rows, classes the best accuracy, equal
    ones the stronger; `l2` where these are missing or hold one value only. Mean and deviation are those of the rows
    with any label. Deterministic. Raises `ValueError` where shapes disagree or no row has a label.
    """
    features, targets = _matrix(features, "features"), np.asarray(targets)
    is_multi_class = targets.ndim == 1
    _check_targets(targets, labels, len(features), "training")
    if validation_features is not None:
        validation_features, validation_targets = (
            _matrix(validation_features, "validation_features"),
            np.asarray(validation_targets),
        )
        _check_targets(validation_targets, labels, len(validation_features), "validation")
        if validation_targets.ndim != targets.ndim or validation_features.shape[1] != features.shape[1]:
            raise ValueError(
                f"Validation features {validation_features.shape} and targets {validation_targets.shape} do not fit "
                f"those of training, {features.shape} and {targets.shape}."
            )
    if not is_multi_class:
        labelled = (targets != UNKNOWN).any(axis=1)
        features, targets = features[labelled], targets[labelled]
    if len(features) == 0:
        raise ValueError("No training row has a label, so there is nothing to fit. Check the labels of the rows.")

    num_classes = np.array(
        [(targets == column).sum() for column in range(len(labels))]
        if is_multi_class
        else [min((targets[:, column] == 0).sum(), (targets[:, column] == 1).sum()) for column in range(len(labels))]
    )
    fitted = np.flatnonzero(num_classes > 0)
    if is_multi_class and len(fitted) < 2:
        fitted = fitted[:0]
    weight, bias = np.zeros((features.shape[1], len(labels))), np.zeros(len(labels))
    chosen: dict[str, float | None] = dict.fromkeys(labels)
    if len(fitted):
        axes = _Axes(features)
        loss = _multinomial(np.searchsorted(fitted, targets)) if is_multi_class else _logistic(targets[:, fitted])
        strengths = np.full(len(fitted), float(l2))
        if validation_features is not None:
            best = np.full(len(fitted), -np.inf)
            for strength in sorted({*l2_grid, l2}, reverse=True):
                axes.minimise(loss, np.full(len(fitted), float(strength)), 1e-4)  # near enough to choose
                some_weight, some_bias = axes.fitted()
                margins = validation_features @ some_weight + some_bias
                score = _validate(margins, validation_targets, fitted, np.full(len(fitted), float(strength == l2)))
                strengths, best = np.where(score > best, strength, strengths), np.maximum(score, best)
        axes.minimise(loss, strengths, 1e-9)
        weight[:, fitted], bias[fitted] = axes.fitted()
        chosen.update((labels[column], float(strength)) for column, strength in zip(fitted, strengths, strict=True))
    constant = [column for column in range(len(labels)) if column not in fitted]
    for column in constant:
        bias[column] = _constant(targets, column, features, weight[:, fitted], bias[fitted])
    return LinearProbe(list(labels), weight, bias, chosen, [labels[column] for column in constant])


def _matrix(features, name: str) -> np.ndarray:
    """`features` (n, H) as float64."""
    features = np.asarray(features.detach().cpu() if hasattr(features, "detach") else features, dtype=np.float64)
    if features.ndim != 2:
        raise ValueError(f"`{name}` must be (images, values), but are {features.shape}.")
    if not np.isfinite(features).all():
        raise ValueError(f"`{name}` hold NaN or infinity. Look for diverged weights in the model that made them.")
    return features


def _check_targets(targets: np.ndarray, labels: Sequence[str], num_rows: int, where: str) -> None:
    expected = f"({num_rows}, {len(labels)}), or ({num_rows},) of class numbers"
    if targets.shape not in ((num_rows, len(labels)), (num_rows,)):
        raise ValueError(f"The {where} targets must be {expected}, but are {targets.shape}.")
    allowed = {0, 1, UNKNOWN} if targets.ndim == 2 else set(range(len(labels)))
    if strange := set(np.unique(targets).tolist()) - allowed:
        raise ValueError(f"The {where} targets must be {expected}, with values of {sorted(allowed)}, not {strange}.")


# ------------------------------------------------------------------------------------------------------------- the fit

# parameters or logits (m, F) -> the value of each of P problems, (P,), and the gradient, (m, F)
Function = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _logistic(targets: np.ndarray) -> tuple[Function, np.ndarray]:
    """Mean logistic loss of each column over its known rows, and the curvature p (1 - p) at the base rates."""
    known = targets != UNKNOWN
    share = known / known.sum(axis=0)
    present = (targets == 1).astype(np.float64)
    rates = (present * share).sum(axis=0)

    def loss(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        small = np.exp(-np.abs(logits))
        values = (share * (np.maximum(logits, 0) - present * logits + np.log1p(small))).sum(axis=0)
        probabilities = np.where(logits >= 0, 1.0, small) / (1 + small)
        return values, share * (probabilities - present)

    return loss, rates * (1 - rates)


def _multinomial(classes: np.ndarray) -> tuple[Function, np.ndarray]:
    """Mean cross entropy of rows of one class each: one problem, however many columns."""
    truth = np.eye(classes.max() + 1)[classes]
    rates = truth.mean(axis=0)

    def loss(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = logits - logits.max(axis=1, keepdims=True)
        exponents = np.exp(logits)
        totals = exponents.sum(axis=1, keepdims=True)
        value = (np.log(totals[:, 0]) - (truth * logits).sum(axis=1)).mean()
        return np.array([value]), (exponents / totals - truth) / len(truth)

    return loss, rates * (1 - rates)


class _Axes:
    """Standardised features in their principal axes, and the weights found there last."""

    def __init__(self, features: np.ndarray):
        self.mean, self.deviation = features.mean(axis=0), features.std(axis=0)
        varies = self.deviation > 1e-9 * np.abs(self.mean)
        self.deviation = np.where(varies, self.deviation, np.inf)  # a constant feature is left out
        standardised = (features - self.mean) / self.deviation
        if len(features) < features.shape[1]:  # few rows span few axes
            _, singular, self.turn = np.linalg.svd(standardised, full_matrices=False)
            self.variance, self.turn = singular**2 / len(features), self.turn.T
        else:
            self.variance, self.turn = np.linalg.eigh(standardised.T @ standardised / len(features))
        kept = self.variance > 1e-12 * self.variance.max()
        self.variance, self.turn = self.variance[kept], self.turn[:, kept]
        self.values = standardised @ self.turn  # (n, r)
        self.parameters = None  # (r + 1, F), the bias last

    def minimise(self, loss_and_curvature: tuple[Function, np.ndarray], l2: np.ndarray, tolerance: float) -> None:
        """Go from the last weights to the minimum of the loss plus `l2 / 2` (F,) times their squared length."""
        loss, curvature = loss_and_curvature
        # in units of `scale` the curvature is nearly 1
        scale = 1 / np.sqrt(np.concatenate([np.outer(self.variance, curvature) + l2, [curvature]]))
        if self.parameters is None:
            self.parameters = np.zeros_like(scale)

        def objective(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            parameters = scale * scaled.reshape(scale.shape)
            weight, bias = parameters[:-1], parameters[-1]
            values, slope = loss(self.values @ weight + bias)
            gradient = np.concatenate([self.values.T @ slope + l2 * weight, [slope.sum(axis=0)]])
            penalty = (l2 / 2 * weight**2).sum(axis=0)
            penalty = penalty if len(values) > 1 else penalty.sum(keepdims=True)
            return values + penalty, (scale * gradient).reshape(scaled.shape)

        num_problems = len(loss(np.zeros((len(self.values), len(curvature))))[0])
        start = (self.parameters / scale).reshape(-1, num_problems)
        self.parameters = scale * _lbfgs(objective, start, tolerance).reshape(scale.shape)

    def fitted(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights (H, F) and biases (F,) for features as they come."""
        weight = self.turn @ self.parameters[:-1] / self.deviation[:, None]
        return weight, self.parameters[-1] - self.mean @ weight


def _lbfgs(objective: Function, point: np.ndarray, tolerance: float, max_steps: int = 2000) -> np.ndarray:
    """The minima of P smooth convex functions at once, each a column of `point` (m, P), by L-BFGS (Nocedal 1980).

    A column is done when no slope exceeds `tolerance`. The columns share the passes over the data and nothing else.
    """

    def dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.einsum("mp,mp->p", first, second)

    value, gradient = objective(point)
    history, curvature = [], np.ones(point.shape[1])  # of (step, change of the gradient, 1 / their product)
    for _ in range(max_steps):
        moving = np.abs(gradient).max(axis=0) > tolerance
        if not moving.any():
            break
        direction, shares = -gradient, []
        for step, change, inverse in reversed(history):
            shares.append(inverse * dot(step, direction))
            direction = direction - shares[-1] * change
        direction = direction / curvature
        for (step, change, inverse), share in zip(history, reversed(shares), strict=True):
            direction = direction + (share - inverse * dot(change, direction)) * step
        direction = np.where(moving, direction, 0.0)
        slope, length = dot(gradient, direction), np.ones(point.shape[1])
        for _ in range(40):
            new_point = point + length * direction
            new_value, new_gradient = objective(new_point)
            lower = new_value <= value + 1e-4 * length * slope + 1e-14 * np.abs(value)
            if lower.all():
                break
            length = np.where(lower, length, length / 2)
        step, change = new_point - point, new_gradient - gradient
        product, square = dot(step, change), dot(change, change)
        bends = product > 1e-12 * square  # False in columns that are done
        history = [*history[-9:], (step, change, np.where(bends, 1 / np.where(bends, product, 1), 0.0))]
        curvature = np.where(bends, square / np.where(bends, product, 1), curvature)
        point, value, gradient = new_point, new_value, new_gradient
    return point


def _validate(margins: np.ndarray, targets: np.ndarray, columns: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """AUROC of each column, or the accuracy for all; `otherwise` for a label without both values."""
    if targets.ndim == 1:
        return np.full(len(columns), (columns[margins.argmax(axis=1)] == targets).mean())
    scores = otherwise.copy()
    for number, column in enumerate(columns):
        known = targets[:, column] != UNKNOWN
        if len(np.unique(targets[known, column])) == 2:
            scores[number] = auroc(targets[known, column], margins[known, number])
    return scores


def _constant(targets: np.ndarray, column: int, features: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
    """Log odds of a label seen with one value, half an image added to both; a class never seen is below the others."""
    if targets.ndim == 2:
        present, absent = (targets[:, column] == 1).sum(), (targets[:, column] == 0).sum()
        return float(np.log((present + 0.5) / (absent + 0.5)))
    if not weight.shape[1]:
        return float(np.log((targets == column).sum() + 0.5))
    return float((features @ weight + bias).max(axis=1).min() - np.log(2 * len(targets)))


# ------------------------------------------------------------------------------------------------------ the evaluation


def evaluate_linear_probe(
    features: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
    labels: Sequence[str],
    patient_ids: Mapping[str, Sequence[str]],
    *,
    fractions: Sequence[float] = (0.01, 0.1, 1.0),
    seeds: Sequence[int] = (0,),
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[dict, dict[tuple[float, int], np.ndarray]]:
    """Probes fitted at each fraction of the training patients, for each seed that draws them; and their test margins.

    The mappings have the roles `train` and `test`, and `validation` where there is one, on which the L2 strength and
    thresholds are chosen, whatever the fraction. `features` are (n, H), `targets` (n, F) of 1, 0 and -100, or (n,) of
    class numbers. Under `fractions` stands for each, by its percentage, what [`seeds_summary`] returns (`macro_auroc`,
    with classes `accuracy`, `_sd` and `_ci`), `num_patients` and mean `num_images` trained on, the `constant_labels` of
    any seed, and under `seeds` all metrics and the `l2` of each.
    """
    check_fractions_and_seeds(fractions, seeds)
    _check_roles(features, targets, patient_ids)
    truth = {role: np.asarray(values) for role, values in targets.items()}
    values = {role: _matrix(part, f"{role} features") for role, part in features.items()}
    validation = (values["validation"], truth["validation"]) if "validation" in values else ()
    results, margins, fits = {}, {}, {}
    for fraction in fractions:
        by_seed, thresholds = {}, []
        for draw in seeds:
            chosen = nested_subset(patient_ids["train"], fraction, draw)
            if chosen.tobytes() not in fits:  # all patients are the same with every seed
                fits[chosen.tobytes()] = fit_linear_probe(
                    values["train"][chosen], truth["train"][chosen], labels, *validation
                )
            probe = fits[chosen.tobytes()]
            margins[fraction, draw] = probe.margins(values["test"])
            thresholds.append(
                validation_thresholds(probe.margins(validation[0]), validation[1], labels) if validation else None
            )
            by_seed[str(draw)] = {
                "metrics": run_metrics(truth["test"], margins[fraction, draw], labels, thresholds[-1]),
                **subset_size(patient_ids["train"], chosen),
                "constant_labels": probe.constant_labels,
                "l2": probe.l2,
            }
        summary = seeds_summary(
            truth["test"],
            [margins[fraction, draw] for draw in seeds],
            labels,
            patient_ids["test"],
            thresholds,
            num_bootstrap,
            seed,
        )
        results[f"{100 * fraction:g} %"] = {**fraction_entry(fraction, labels, by_seed, summary), "seeds": by_seed}
    about = {"num_validation_images": len(validation[0]) if validation else 0, "num_bootstrap": num_bootstrap}
    return {"fractions": results, "num_test_images": len(truth["test"]), **about}, margins


def fraction_entry(fraction: float, labels: Sequence[str], by_seed: Mapping, summary: Mapping) -> dict:
    """What stands in a result for one fraction: its size, the `summary` of [`seeds_summary`], and `constant_labels`.

    `by_seed` maps seeds to records with `num_patients`, `num_images` and `constant_labels`.
    """
    records = list(by_seed.values())
    return {
        "fraction": fraction,
        "num_patients": records[0]["num_patients"],  # the same for every seed
        "num_images": float(np.mean([record["num_images"] for record in records])),
        **summary,
        "constant_labels": [name for name in labels if any(name in record["constant_labels"] for record in records)],
    }


def check_fractions_and_seeds(fractions: Sequence[float], seeds: Sequence[int]) -> None:
    """Raises `ValueError` for a fraction outside (0, 1], for one given twice, for equal seeds, and for none."""
    for name, values in (("fractions", fractions), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"`{name}` must be one or more different numbers, but are {list(values)}.")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"`fractions` are shares of the training patients in (0, 1], but {fraction} is given.")


def _check_roles(*parts: Mapping) -> None:
    for mapping in parts:
        roles = set(mapping)
        if not {"train", "test"} <= roles or roles - set(ROLES) or roles != set(parts[0]):
            raise ValueError(
                "Features, targets and patients need the roles train and test, and may have validation, all the same, "
                f"but one has {', '.join(sorted(roles))}."
            )


def subset_size(patient_ids: Sequence[str], rows: np.ndarray) -> dict[str, int]:
    """`num_patients` and `num_images` of some rows; "" is a patient of its own."""
    return {"num_patients": count_patients([patient_ids[row] for row in rows]), "num_images": len(rows)}


def validation_thresholds(margins: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> dict[str, float] | None:
    """The thresholds of best F1 on validation rows; None with classes, where the highest score decides."""
    return choose_thresholds(targets, margins, labels) if targets.ndim == 2 else None


def run_metrics(
    targets: np.ndarray, margins: np.ndarray, labels: Sequence[str], thresholds: Mapping[str, float] | None = None
) -> dict:
    """All metrics of one fit on test rows, without intervals: `targets` (n, F), or (n,) of class numbers."""
    if targets.ndim == 1:
        return multiclass_metrics(targets, margins, labels, num_bootstrap=0)
    return classification_metrics(targets, margins, labels, num_bootstrap=0, thresholds=thresholds)


def seeds_summary(
    targets: np.ndarray,
    margins: Sequence[np.ndarray],
    labels: Sequence[str],
    patient_ids: Sequence[str] | None = None,
    thresholds: Sequence[Mapping[str, float] | None] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Mean over fits (of one fraction, by several seeds) of their metrics on the same test rows.

    `margins` are (n, F) each. Returns `macro_<metric>` (with classes `accuracy`, `balanced_accuracy`, `macro_f1`,
    `mcc`), `<metric>_sd` over the fits (None of one) and `<metric>_ci`, and the same of each label under `per_class`.
    An interval draws test patients, the same for every fit, and takes the mean over fits in each draw: it tells what
    other test patients would change, and the deviation what other training patients and seeds would. It is None where
    the known images are of one patient. Labels with one value among the test rows are under `skipped`.
    `shuffled_labels` is the [`shuffled_control`] of the first fit; with classes there is none, and the commonest class
    is the control.
    """
    targets, is_multi_class = np.asarray(targets), np.ndim(targets) == 1
    patients = patient_numbers(patient_ids, len(targets))
    kept = list(range(len(labels)))
    if not is_multi_class:
        kept = [c for c in kept if {0, 1} <= set(np.unique(targets[:, c]).tolist())]
        several = np.array([len(np.unique(patients[targets[:, c] != UNKNOWN])) > 1 for c in kept])
    scored, thresholds = [labels[column] for column in kept], thresholds or [None] * len(margins)
    fits = []
    for part, chosen in zip(margins, thresholds, strict=True):
        if is_multi_class:
            fits.append(MultiClassStatistics(targets, part, patients))
        elif kept:
            limits = None if chosen is None else np.array([chosen.get(name, np.nan) for name in scored])
            fits.append(MultiLabelStatistics(targets[:, kept], part[:, kept], patients, thresholds=limits))

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> (S, ..., r) for S fits."""
        found = [fit(weights) for fit in fits]
        return {key: np.stack([one[key] for one in found]) for key in (found[0] if found else ())}

    num_patients = int(patients.max()) + 1
    point = {key: values[..., 0] for key, values in statistics(np.ones((num_patients, 1))).items()}
    reason, draws = interval_reason(patients, num_bootstrap), {}
    if fits and reason is None:
        draws = bootstrap_draws(
            lambda weights: {key: values.mean(axis=0) for key, values in statistics(weights).items()},
            num_patients,
            num_bootstrap,
            seed,
            len(targets) * len(fits),
        )

    def described(name: str, values: np.ndarray, drawn: np.ndarray | None) -> dict:
        value = number_or_none(values.mean())
        return {
            name: value,
            f"{name}_sd": float(values.std(ddof=1)) if len(values) > 1 and value is not None else None,
            f"{name}_ci": None if drawn is None or value is None else percentile_interval(drawn, num_bootstrap),
        }

    result, per_class = {}, {name: {} for name in scored}
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "mcc") if is_multi_class else (*RANKED, *THRESHOLDED):
        if is_multi_class:
            result |= described(key, point[key], draws.get(key))
            continue
        values, drawn = point.get(key), draws.get(key)
        if values is None:
            if key == "auroc":
                result |= {"macro_auroc": None, "macro_auroc_sd": None, "macro_auroc_ci": None}
            continue
        known = ~np.isnan(values).any(axis=0)  # (F,), without labels that have no threshold
        for number in np.flatnonzero(known):
            has_draws = drawn is not None and several[number]
            per_class[scored[number]] |= described(key, values[:, number], drawn[number] if has_draws else None)
        if known.any():
            drawn = drawn[known].mean(axis=0) if drawn is not None and several[known].any() else None
            result |= described(f"macro_{key}", values[:, known].mean(axis=1), drawn)
    skipped = [name for number, name in enumerate(labels) if number not in kept]
    if not is_multi_class:
        names = [str(number) for number in patients]
        result["shuffled_labels"] = shuffled_control(targets, margins[0], labels, names, seed=seed)
    return {**result, "per_class": per_class, "skipped": skipped, "interval_reason": reason}

"""Controls that stand beside every number on real data: how much can be had without looking at an image?

`shuffled_control` gives the labels to other patients: what is left of a score is chance. `group_controls` predicts
each label from the view of a film, from its source, and from both: what these reach, a model may have reached by
telling AP from PA or one hospital from another.
"""

from collections.abc import Hashable, Mapping, Sequence

import datasets
import numpy as np

from ..data.readers.tables import hashed_share
from .bootstrap import mean_with_interval, patient_numbers
from .metrics import UNKNOWN, auroc, classification_metrics


CONTROLS = {"view_only": ("view",), "source_only": ("source",), "view_and_source": ("view", "source")}
NUM_FOLDS = 5


def shuffled_control(
    targets: np.ndarray,
    scores: np.ndarray,
    names: Sequence[str],
    patient_ids: Sequence[str],
    num_permutations: int = 20,
    seed: int = 0,
) -> dict:
    """Macro AUROC of `scores` (n, F) against `targets` (n, F) that were dealt out anew to the patients.

    The label vectors of a patient stay together, in a row: the patients are put in a random order, and their vectors
    laid over the images, which stay sorted by patient. So they land on one patient as far as the numbers of images
    allow, and else on neighbours. An unknown label moves with its vector.

    Returns `macro_auroc`, the mean over `num_permutations`, `macro_auroc_range`, in which 95 % of them lie, `per_class`
    {name: mean}, and `num_permutations`. Labels without both values are left out. With fewer than two patients, or no
    label to score, the means are None and `reason` says why.
    """
    targets, scores = np.asarray(targets), np.asarray(scores, dtype=np.float64)
    if targets.shape != scores.shape or targets.shape != (len(patient_ids), len(names)):
        raise ValueError(
            f"`targets` and `scores` must both be ({len(patient_ids)}, {len(names)}), a row for each patient id and a "
            f"column for each name, but are {targets.shape} and {scores.shape}."
        )
    kept = [column for column in range(len(names)) if {0, 1} <= set(targets[:, column].tolist())]
    patients = patient_numbers(patient_ids, len(patient_ids))
    num_patients = int(patients.max(initial=-1)) + 1
    result = {"macro_auroc": None, "macro_auroc_range": None, "per_class": {}, "num_permutations": num_permutations}
    if num_patients < 2 or not kept:
        reason = "no label has images with and without it" if not kept else "there is one patient only"
        return {**result, "num_permutations": 0, "reason": reason}
    order = np.argsort(patients, kind="stable")  # images by patient
    blocks = np.split(order, np.flatnonzero(np.diff(patients[order])) + 1)
    rng = np.random.default_rng(seed)
    areas = np.empty((num_permutations, len(kept)))
    for draw in areas:
        dealt = np.empty_like(targets)
        dealt[order] = targets[np.concatenate([blocks[number] for number in rng.permutation(num_patients)])]
        for place, column in enumerate(kept):
            known = dealt[:, column] != UNKNOWN
            draw[place] = auroc(dealt[known, column], scores[known, column])
    macro = areas.mean(axis=1)
    return {
        **result,
        "macro_auroc": float(macro.mean()),
        "macro_auroc_range": [float(bound) for bound in np.percentile(macro, [2.5, 97.5])],
        "per_class": {names[column]: float(mean) for column, mean in zip(kept, areas.mean(axis=0), strict=True)},
    }


def group_scores(train_groups: Sequence[Hashable], train_targets: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """Share of images of the same group that have a label, (n, F) in (0, 1), for the `groups` (n,) of other images.

    Learned from `train_targets` (m, F) of images in `train_groups` (m,); unknown labels are left out. One image with
    the overall share is added to each group, so a small group is drawn to it and a group never seen has it. The overall
    share has half a present and half an absent image added.
    """
    train_targets = np.asarray(train_targets)
    if train_targets.ndim != 2 or len(train_targets) != len(train_groups):
        raise ValueError(
            f"`train_targets` must be ({len(train_groups)}, F), a row for each of `train_groups`, but is "
            f"{train_targets.shape}."
        )
    present, known = train_targets == 1, train_targets != UNKNOWN
    overall = (present.sum(axis=0) + 0.5) / (known.sum(axis=0) + 1)
    shares = {}
    for group in set(groups):
        members = np.array([name == group for name in train_groups], dtype=bool)
        shares[group] = (present[members].sum(axis=0) + overall) / (known[members].sum(axis=0) + 1)
    return np.array([shares[group] for group in groups]).reshape(len(groups), train_targets.shape[1])


def group_controls(
    rows: Mapping[str, datasets.Dataset],
    targets: Mapping[str, np.ndarray],
    names: Sequence[str],
    patient_ids: Mapping[str, Sequence[str]],
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """[`control_results`] of the role `test`, or [`class_control_results`] where `targets` are class numbers (n,).

    The mappings have the role `test`; where they have `train`, the controls are learned from it.
    """
    measure = control_results if np.ndim(targets["test"]) == 2 else class_control_results
    train = (rows["train"], targets["train"]) if "train" in rows else (None, None)
    return measure(
        rows["test"],
        targets["test"],
        names,
        patient_ids["test"],
        *train,
        num_bootstrap=num_bootstrap,
        seed=seed,
    )


def control_results(
    test_rows: datasets.Dataset,
    targets: np.ndarray,
    names: Sequence[str],
    patient_ids: Sequence[str],
    train_rows: datasets.Dataset | None = None,
    train_targets: np.ndarray | None = None,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """What the view, the source, and both tell of the labels of the test images: {"view_only": {...}, ...}.

    `targets` (n, F) belong to `test_rows`, `train_targets` (m, F) to `train_rows`; the score of an image is that of
    [`group_scores`] of the training images. Without training rows it is learned from the test rows of other patients,
    in five folds by a hash of the patient; each fold's overall share is subtracted then, as folds differ in it. On a
    few hundred images such an AUROC is some hundredths too low, as an image that is left out pulls its group down.

    Each control has `macro_auroc`, `macro_auroc_ci`, `per_class` {name: auroc, auroc_ci, num_positive, num_negative},
    `num_skipped`, `num_groups` and `num_unseen` (test images of a group that training has not), and `fitted_on`. Where
    all test images share one group, it tells nothing: `macro_auroc` is None and `reason` says so.
    """
    targets = np.asarray(targets)
    _check_rows(test_rows, targets, patient_ids, train_rows, train_targets)
    results = {}
    for control, columns in CONTROLS.items():
        result, groups, train_groups = _described(test_rows, columns, train_rows)
        result["fitted_on"] = "train" if train_rows is not None else f"test, {NUM_FOLDS} folds of patients"
        results[control] = result = {"macro_auroc": None, "macro_auroc_ci": None, "per_class": {}, **result}
        if "reason" in result:
            continue
        if train_groups is None:
            scores = _fitted_in_folds(groups, targets, _folds(test_rows, patient_ids))
        else:
            scores = group_scores(train_groups, train_targets, groups)
        metrics = classification_metrics(targets, scores, names, patient_ids, num_bootstrap, seed)
        result.update({key: metrics[key] for key in ("macro_auroc", "macro_auroc_ci", "num_skipped")})
        result["per_class"] = {
            name: {key: values[key] for key in ("auroc", "auroc_ci", "num_positive", "num_negative")}
            for name, values in metrics["per_class"].items()
        }
    return results


def class_control_results(
    test_rows: datasets.Dataset,
    classes: np.ndarray,
    names: Sequence[str],
    patient_ids: Sequence[str],
    train_rows: datasets.Dataset | None = None,
    train_classes: np.ndarray | None = None,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """As [`control_results`] where each image has one class: `classes` (n,) and `train_classes` (m,) of numbers.

    The class that is most frequent in the group of an image is predicted; a tie goes to the class that is more frequent
    overall. Each control has `accuracy` and `accuracy_ci`. `majority_class` predicts the one `class` that is most
    frequent in the training images for all. Without training rows all are learned from the test images themselves, so
    that they are some hundredths too high; in folds they would be too low, as a class left out is the rarer one there.
    """
    classes = np.asarray(classes)
    one_hot = np.eye(len(names), dtype=np.int64)
    train_targets = None if train_classes is None else one_hot[np.asarray(train_classes)]
    _check_rows(test_rows, one_hot[classes], patient_ids, train_rows, train_targets)
    counts = np.bincount(classes if train_classes is None else train_classes, minlength=len(names))
    largest = int(counts.argmax())
    accuracy = _accuracy(classes == largest, patient_ids, num_bootstrap, seed)
    fitted_on = "train" if train_rows is not None else "test"
    results = {"majority_class": {**accuracy, "class": names[largest], "fitted_on": fitted_on}}
    for control, columns in CONTROLS.items():
        result, groups, train_groups = _described(test_rows, columns, train_rows)
        results[control] = result = {"accuracy": None, "accuracy_ci": None, **result, "fitted_on": fitted_on}
        if "reason" not in result:
            learned_from = (groups, one_hot[classes]) if train_groups is None else (train_groups, train_targets)
            shares = group_scores(*learned_from, groups)
            result.update(_accuracy(shares.argmax(axis=1) == classes, patient_ids, num_bootstrap, seed))
    return results


def _check_rows(test_rows, targets, patient_ids, train_rows, train_targets) -> None:
    if (train_rows is None) != (train_targets is None):
        raise ValueError("`train_rows` and their targets go together: give both, or neither.")
    for what, rows, values in (("test", test_rows, targets), ("train", train_rows, train_targets)):
        if rows is not None and len(rows) != len(values):
            raise ValueError(f"There are {len(rows)} {what} rows, but targets of {len(values)}.")
    if len(patient_ids) != len(test_rows):
        raise ValueError(f"`patient_ids` must name {len(test_rows)} patients, a row each, but has {len(patient_ids)}.")
    if not len(test_rows):
        raise ValueError("There is no test row to predict.")


def _groups(rows: datasets.Dataset, columns: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(rows[column] for column in columns), strict=True))


def _described(test_rows, columns, train_rows) -> tuple[dict, list[tuple], list[tuple] | None]:
    """What is true of a control before it is measured, the groups of the test rows, and those of the training rows."""
    groups = _groups(test_rows, columns)
    train_groups = None if train_rows is None else _groups(train_rows, columns)
    result = {
        "num_groups": len(set(groups)),
        "num_unseen": 0 if train_groups is None else sum(group not in set(train_groups) for group in groups),
    }
    if len(set(groups)) == 1:
        value = ", ".join(repr(name) if name else "unknown" for name in groups[0])
        result["reason"] = f"all images have the same {' and '.join(columns)} ({value}), which tells nothing"
    return result, groups, train_groups


def _folds(rows: datasets.Dataset, patient_ids: Sequence[str]) -> np.ndarray:
    """(n,) ints below `NUM_FOLDS`; a patient lies in one fold, the same on every machine."""
    names = [name or f"\0{row_id}" for name, row_id in zip(patient_ids, rows["row_id"], strict=True)]
    return np.array([int(NUM_FOLDS * hashed_share("controls", name)) for name in names])


def _fitted_in_folds(groups, targets, folds) -> np.ndarray:
    scores = np.empty(targets.shape)
    for fold in np.unique(folds):
        inside, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        others_groups = [groups[row] for row in others]
        nobody = [None]  # a group that nobody is in has the overall share
        overall = group_scores(others_groups, targets[others], nobody)
        scores[inside] = group_scores(others_groups, targets[others], [groups[row] for row in inside]) - overall
    return scores


def _accuracy(is_right: np.ndarray, patient_ids: Sequence[str], num_bootstrap: int, seed: int) -> dict:
    mean, interval = mean_with_interval(is_right, patient_ids, num_bootstrap, seed)
    return {"accuracy": mean, "accuracy_ci": interval}

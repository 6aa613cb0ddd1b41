"""`evaluate.Metric`s that need no network. Apart, because `evaluate` takes seconds to import.

They are attributes of `MMCLIP.evaluation.metrics`: `metrics.MultiLabelClassification().compute(predictions=...)`.
Each returns what the function of its docstring returns. `patient_ids`, one for each row, makes the bootstrap draw
patients; `num_bootstrap` defaults to 0, no interval.
"""

import datasets
import evaluate
import numpy as np

from .bootstrap import mean_with_interval
from .calibration import NUM_BINS, brier_score, expected_calibration_error, fit_temperature, reliability_curve
from .metrics import UNKNOWN, classification_metrics, multiclass_metrics


VECTORS = {
    "predictions": datasets.Sequence(datasets.Value("float64")),
    "references": datasets.Sequence(datasets.Value("int32")),
}


def _names(names, scores: np.ndarray) -> list[str]:
    return [str(column) for column in range(scores.shape[-1])] if names is None else list(names)


class _OfflineMetric(evaluate.Metric):
    columns: dict = VECTORS

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__.partition("\n")[0],
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(self.columns),
        )


class MultiLabelAUROC(_OfflineMetric):
    """Macro AUROC and average precision over the classes of a multi-label problem.

    `predictions` are score vectors and `references` label vectors of 1 present, 0 absent, -100 unknown. `compute` also
    takes `names` (defaults to the column numbers), `patient_ids`, `num_bootstrap` and `seed`, and returns what
    [`classification_metrics`] returns.
    """

    def _compute(self, predictions, references, names=None, patient_ids=None, num_bootstrap=0, seed=0) -> dict:
        labels, scores = np.asarray(references), np.asarray(predictions)
        return classification_metrics(labels, scores, _names(names, scores), patient_ids, num_bootstrap, seed)


class MultiLabelClassification(_OfflineMetric):
    """All metrics of a multi-label problem, with thresholds that were chosen on validation rows.

    As [`MultiLabelAUROC`]; `compute` also takes `thresholds` (name -> threshold), `probabilities` (vectors) and
    `specificity`, see [`classification_metrics`].
    """

    def _compute(
        self,
        predictions,
        references,
        names=None,
        patient_ids=None,
        num_bootstrap=0,
        seed=0,
        thresholds=None,
        probabilities=None,
        specificity=0.9,
    ) -> dict:
        labels, scores = np.asarray(references), np.asarray(predictions)
        return classification_metrics(
            labels,
            scores,
            _names(names, scores),
            patient_ids,
            num_bootstrap,
            seed,
            thresholds=thresholds,
            probabilities=probabilities,
            specificity=specificity,
        )


class MultiClassClassification(_OfflineMetric):
    """Accuracy and other metrics of a problem where each image has exactly one class.

    `predictions` are score vectors, `references` the numbers of the true classes. `compute` also takes `names`,
    `patient_ids`, `num_bootstrap` and `seed`, and returns what [`multiclass_metrics`] returns.
    """

    columns = {"predictions": VECTORS["predictions"], "references": datasets.Value("int32")}

    def _compute(self, predictions, references, names=None, patient_ids=None, num_bootstrap=0, seed=0) -> dict:
        classes, scores = np.asarray(references), np.asarray(predictions)
        return multiclass_metrics(classes, scores, _names(names, scores), patient_ids, num_bootstrap, seed)


class CalibrationError(_OfflineMetric):
    """Expected calibration error of probabilities of one class, their Brier score and the reliability curve.

    `predictions` are P(present), `references` labels of 1 present, 0 absent, -100 unknown. Returns `ece`, `brier`,
    `mean_probability` and `share_present` of each bin that is not empty, `num_images` of known label, and
    `temperature`: the one by which the logits of these very probabilities ought to be divided. It is a diagnosis; one
    that is to be used is fitted on validation rows by [`fit_temperature`]. It is None where a probability is 0 or 1.
    `ece`, `brier` and `temperature` are None where no label is known.
    """

    columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("int32")}

    def _compute(self, predictions, references, num_bins=NUM_BINS) -> dict:
        labels, probabilities = np.asarray(references), np.asarray(predictions)
        mean_probability, share_present = reliability_curve(labels, probabilities, num_bins)
        known = labels != UNKNOWN
        inside = probabilities[known]
        has_logits = known.any() and inside.min() > 0 and inside.max() < 1
        return {
            "ece": expected_calibration_error(labels, probabilities, num_bins) if known.any() else None,
            "brier": brier_score(labels, probabilities) if known.any() else None,
            "temperature": fit_temperature(labels[known], np.log(inside / (1 - inside))) if has_logits else None,
            "mean_probability": mean_probability.tolist(),
            "share_present": share_present.tolist(),
            "num_images": int(known.sum()),
        }


class RetrievalRecall(_OfflineMetric):
    """Recall@k and median rank of a retrieval.

    `predictions` are the ranks, from 1, at which queries found their first right answer; there are no references.
    `compute` also takes `ks`, `patient_ids`, `num_bootstrap` and `seed`. Returns `recall_at_<k>` and
    `recall_at_<k>_ci` for each k, `median_rank` and `num_queries`.
    """

    columns = {"predictions": datasets.Value("int64")}

    def _compute(self, predictions, ks=(1, 5, 10), patient_ids=None, num_bootstrap=0, seed=0) -> dict:
        ranks = np.asarray(predictions)
        if not len(ranks) or ranks.min() < 1:
            raise ValueError(f"Ranks must be whole numbers from 1, one for each query, but are {ranks[:5].tolist()}.")
        result = {}
        for k in ks:
            recall, interval = mean_with_interval(ranks <= k, patient_ids, num_bootstrap, seed)
            result |= {f"recall_at_{k}": recall, f"recall_at_{k}_ci": interval}
        return {**result, "median_rank": float(np.median(ranks)), "num_queries": len(ranks)}

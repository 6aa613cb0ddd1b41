"""`MultiLabelAUROC`, an `evaluate.Metric` that needs no network. Apart, because `evaluate` takes seconds to import."""

import datasets
import evaluate
import numpy as np

from .metrics import classification_metrics


class MultiLabelAUROC(evaluate.Metric):
    """Macro AUROC and average precision over the classes of a multi-label problem.

    `predictions` are score vectors and `references` label vectors of 1 present, 0 absent, -100 unknown. `compute` also
    takes `names` (defaults to the column numbers), `patient_ids`, `num_bootstrap` and `seed`, and returns what
    [`classification_metrics`] returns.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Macro AUROC over the classes that have both labels; the others are skipped and counted.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int32")),
                }
            ),
        )

    def _compute(self, predictions, references, names=None, patient_ids=None, num_bootstrap=0, seed=0) -> dict:
        labels, scores = np.asarray(references), np.asarray(predictions)
        names = [str(column) for column in range(labels.shape[-1])] if names is None else names
        return classification_metrics(labels, scores, names, patient_ids, num_bootstrap, seed)

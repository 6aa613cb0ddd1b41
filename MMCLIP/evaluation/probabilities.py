"""From zero-shot scores to probabilities: a file that says for each finding how its margins become P(present).

It is fitted on labelled validation rows (`run_zero_shot.py --calibration_split`), one slope and intercept for each
finding (`fit_platt`), and holds for the weights and the prompts that it was fitted with, which it names by hashes. A
probability is true for images like those rows: where the finding is commoner or rarer it is too low or too high.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import datasets
import numpy as np
from scipy.special import expit

from ..text.prompt_sets import PromptSet
from .calibration import UNKNOWN, brier_score, expected_calibration_error, fit_platt
from .embeddings import EmbeddingCache, image_features, model_fingerprint
from .zero_shot import ZeroShotPredictions, label_matrix, prompt_margins, scored_rows


FILE_NAME = "calibration.json"
MIN_IMAGES = 20  # with and without a finding; fewer leave the slope to chance


@dataclass(frozen=True)
class FindingCalibration:
    """sigmoid(`slope` * margin + `intercept`) is P(present), fitted on so many images with and without the finding.

    `num_tested` other images, of which `share_present` have the finding, gave the expected calibration error `ece`,
    that of sigmoid(margin), `ece_as_it_is`, and the Brier score; None where none were tested.
    """

    slope: float
    intercept: float
    num_present: int
    num_absent: int
    num_tested: int = 0
    share_present: float | None = None
    ece: float | None = None
    ece_as_it_is: float | None = None
    brier: float | None = None

    def probability(self, margins: np.ndarray) -> np.ndarray:
        """P(present) of `margins`, of the same shape."""
        return expit(self.slope * np.asarray(margins, dtype=np.float64) + self.intercept)


@dataclass(frozen=True)
class Calibration:
    """`findings` by canonical label; `left_out` says why others have none. `data` names the validation rows in words.

    `model` is the `model_fingerprint` without code, `prompts` the name of the prompt set, `prompts_hash` its words.
    """

    model: str
    prompts: str
    prompts_hash: str
    data: str
    findings: Mapping[str, FindingCalibration]
    left_out: Mapping[str, str]

    def check(self, model, processor, prompts: PromptSet) -> None:
        """Raises `ValueError` unless it was fitted with these weights and these prompts."""
        advice = "Fit a new one: run_zero_shot.py --calibration_split."
        if self.prompts_hash != hash_prompts(prompts, list(self.findings)):
            raise ValueError(
                f"The calibration was fitted with the prompts {self.prompts!r}, but those given, {prompts.name!r}, "
                f"have other words. Choose the same (--prompts {self.prompts}). {advice}"
            )
        if self.model != model_fingerprint(model, processor, with_code=False):
            raise ValueError(f"The calibration was fitted for other weights, or another image processor. {advice}")

    def tested_on(self, predictions: ZeroShotPredictions) -> "Calibration":
        """The same with what its probabilities are worth on images that it was not fitted on."""
        tested = dict(self.findings)
        for label, targets, margins in zip(
            predictions.labels, predictions.targets.T, predictions.margins.T, strict=True
        ):
            known = targets != UNKNOWN
            if label in tested and known.any():
                probabilities = tested[label].probability(margins)
                tested[label] = replace(
                    tested[label],
                    num_tested=int(known.sum()),
                    share_present=float(targets[known].mean()),
                    ece=expected_calibration_error(targets, probabilities),
                    ece_as_it_is=expected_calibration_error(targets, expit(margins)),
                    brier=brier_score(targets, probabilities),
                )
        return replace(self, findings=tested)

    def summary(self) -> dict:
        """For metrics.json: the data, the number of findings, and the mean calibration error over those tested."""
        tested = [finding for finding in self.findings.values() if finding.ece is not None]
        return {
            "data": self.data,
            "num_findings": len(self.findings),
            "left_out": dict(self.left_out),
            "macro_ece": float(np.mean([finding.ece for finding in tested])) if tested else None,
            "macro_ece_as_it_is": float(np.mean([finding.ece_as_it_is for finding in tested])) if tested else None,
        }

    def save(self, folder: str | os.PathLike) -> Path:
        """Write calibration.json into `folder`."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path


def hash_prompts(prompts: PromptSet, labels: Sequence[str]) -> str:
    """20 hex digits of the texts for `labels`, in any order, and of how they are pooled; "" where texts are missing."""
    if any(label not in prompts.prompts for label in labels):
        return ""
    texts = {label: prompts.prompts[label] for label in sorted(labels)}
    return hashlib.blake2b(json.dumps([prompts.pooling, texts]).encode(), digest_size=10).hexdigest()


def fit_calibration(
    model,
    processor,
    rows: datasets.Dataset,
    labels: Sequence[str],
    prompts: PromptSet,
    *,
    data: str,
    unlisted_is_absent: bool | None = None,
    fully_labelled: Sequence[str] = (),
    min_images: int = MIN_IMAGES,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: str = "",
    cache: EmbeddingCache | None = None,
) -> Calibration:
    """Fit `labels` on validation rows; a finding with fewer than `min_images` of either kind is left out, and named.

    Other arguments are those of `evaluate_zero_shot`. Raises `ValueError` when every finding is left out.
    """
    kept, labels, _ = scored_rows(rows, labels)
    targets, _ = label_matrix(kept, labels, unlisted_is_absent, fully_labelled)
    counts = {
        label: (int((column == 1).sum()), int((column == 0).sum()))
        for label, column in zip(labels, targets.T, strict=True)
    }
    left_out = {
        label: f"{present} images with and {absent} without it, at least {min_images} of each are needed"
        for label, (present, absent) in counts.items()
        if min(present, absent) < min_images
    }
    if len(left_out) == len(labels):
        named = "; ".join(f"{label}: {reason}" for label, reason in left_out.items())
        raise ValueError(f"No finding can be calibrated on the {len(kept)} validation rows. {named}.")
    features = image_features(
        model, processor, kept, cache=cache, batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    margins = prompt_margins(model, processor, features.embeds, labels, prompts, cache).numpy()
    findings = {
        label: FindingCalibration(*fit_platt(targets[:, column], margins[:, column]), *counts[label])
        for column, label in enumerate(labels)
        if label not in left_out
    }
    fingerprint = model_fingerprint(model, processor, with_code=False)
    return Calibration(fingerprint, prompts.name, hash_prompts(prompts, list(findings)), data, findings, left_out)


def load_calibration(path: str | os.PathLike) -> Calibration:
    """Read a file that `Calibration.save` wrote. Raises `ValueError` for one that is missing or something else."""
    try:
        entry = json.loads(Path(path).read_text(encoding="utf-8"))
        findings = {label: FindingCalibration(**values) for label, values in entry.pop("findings").items()}
        for label, finding in findings.items():
            if not all(isinstance(number, (int, float)) for number in (finding.slope, finding.intercept)):
                raise TypeError(f"slope and intercept of {label!r} are no numbers")
        return Calibration(findings=findings, **entry)
    except OSError as error:
        raise ValueError(f"{path}: the calibration cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        names = ", ".join(field.name for field in fields(Calibration))
        raise ValueError(
            f"{path}: expected a calibration with {names}, as run_zero_shot.py --calibration_split writes it, but "
            f"{error!r}."
        ) from error

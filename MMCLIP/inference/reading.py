"""One film and everything that is asked of it. The image tower runs once; findings and heat maps use what it gave."""

import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.plausibility import XrayLikeness, xray_likeness
from ..data.prepared import read_prepared
from ..data.readers import read_csv_manifest
from ..evaluation.embeddings import text_features
from ..evaluation.probabilities import Calibration, FindingCalibration
from ..evaluation.retrieval import nearest
from ..evaluation.zero_shot import pooled_logits
from ..image_processing_mmclip import load_shrunk
from ..modeling_mmclip import evaluating
from ..text.prompt_sets import PromptSet
from ..text.prompts import fill_template, make_noun, negative_prompts, positive_prompts
from ..text.vocabulary import LABEL_KINDS, NO_FINDING, canonical_label, vocabulary


logger = logging.getLogger(__name__)
SHOWN_SIDE = 768  # pixels of the longer side of a film on the page
MAX_FINDINGS = 16
MAX_LETTERS = 80  # of a finding that the vocabulary lacks
# the five by which CheXpert compares models, and pneumothorax
COMMON_FINDINGS = ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion", "pneumothorax")
_DENIAL = re.compile(r"(no|not|without|absence of|absent)\b", re.IGNORECASE)
_EXISTENCE = re.compile(r"there (is|are) (an? )?", re.IGNORECASE)


class Film(NamedTuple):
    """An image as the model has seen it: `embeds` (1, D), `patch_tokens` (1, N, H); `picture` is grey, for the page.

    `name` is that of the file, `size` its (width, height) upright.
    """

    name: str
    size: tuple[int, int]
    picture: Image.Image
    embeds: Tensor
    patch_tokens: Tensor
    likeness: XrayLikeness


class Finding(NamedTuple):
    """What is asked, and the texts that stand for its presence and absence; `is_known` if the vocabulary has it."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    is_known: bool


class Score(NamedTuple):
    """`score` in [0, 1] ranks films; `probability` is P(present) where the finding has a `calibration`, else None."""

    finding: Finding
    score: float
    probability: float | None
    calibration: FindingCalibration | None


def encode_pixels(model, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, S, S) -> embeddings (B, D), float32 on the CPU, and patch tokens (B, N, H) where the model is."""
    with evaluating(model):
        pixel_values = pixel_values.to(device=model.device, dtype=model.dtype)
        pooled, patch_tokens, _ = model.encode_image(pixel_values)
        return model.project_image(pooled).float().cpu(), patch_tokens


def known_findings(prompts: PromptSet) -> list[str]:
    """The labels of the vocabulary that `prompts` have texts for, in alphabetical order."""
    labels = [concept.name for concept in vocabulary().values() if concept.kind in LABEL_KINDS]
    return sorted(label for label in (*labels, NO_FINDING) if label in prompts.prompts)


def parse_finding(text: str, prompts: PromptSet) -> Finding:
    """The finding that somebody typed: a label in any spelling, or a phrase of their own, "There is ..." around it.

    Raises `ValueError` for what is blank, denied ("no effusion") or too long for a phrase.
    """
    phrase = _EXISTENCE.sub("", " ".join(text.split()), count=1).strip(" .")
    if not re.search(r"[^\W\d_]", phrase):
        raise ValueError(f"{text!r} holds no word. Type a finding, such as pleural effusion.")
    if _DENIAL.match(phrase) and phrase.lower() != NO_FINDING:
        raise ValueError(f"{text!r} is a denial. Type the finding alone: present and absent are both shown.")
    try:
        label = canonical_label(phrase)
    except ValueError:
        label = None
    if label in prompts.prompts:
        return Finding(label, *prompts.prompts[label], True)
    if len(phrase) > MAX_LETTERS:
        raise ValueError(f"{phrase[:40]!r}... has {len(phrase)} letters. Type a phrase of at most {MAX_LETTERS}.")
    noun = make_noun(phrase, countable=False)
    positive, negative = (fill_template(f"There {{is}} {gap}.", noun) for gap in ("{a_phrase}", "no {phrase}"))
    return Finding(phrase, (positive,), (negative,), False)


class FilmReader:
    """A model with what it is asked with: prompts, and where supplied calibration and reports.

    `calibration` must have been fitted with these weights and prompts. `reports` are texts to find the nearest of, and
    `report_embeds` (R, D) their embeddings where somebody keeps them.
    """

    def __init__(
        self,
        model,
        processor,
        prompts: PromptSet,
        calibration: Calibration | None = None,
        reports: Sequence[str] = (),
        report_embeds: Tensor | None = None,
    ):
        if calibration is not None:
            calibration.check(model, processor, prompts)
        self.model, self.processor, self.prompts, self.calibration = model, processor, prompts, calibration
        self.reports = list(reports)
        self.report_embeds = text_features(model, processor, self.reports) if report_embeds is None else report_embeds
        self._embedded = functools.lru_cache(maxsize=1024)(self._embed)

    def suggestions(self) -> list[str]:
        """Findings to begin with: those with a calibration, else common ones."""
        named = list(self.calibration.findings) if self.calibration is not None else COMMON_FINDINGS
        return [name for name in named if name in self.prompts.prompts][:MAX_FINDINGS]

    def warm_up(self) -> None:
        """Embed the texts of the first findings and one blank film, so that the first film does not wait for them."""
        findings = [parse_finding(name, self.prompts) for name in self.suggestions()]
        blank = self.read(np.zeros((64, 64), np.uint8), "blank film")
        self.score(blank, findings)
        self.heatmaps(blank, findings)

    def read(self, source: Any, name: str) -> Film:
        """Encode one image, anything that the processor reads. Raises `ValueError`, or `ImportError` for DICOM without
        pydicom, beginning with `name`."""
        try:
            picture, size = load_shrunk(source, longer_side=SHOWN_SIDE)
            pixel_values = self.processor.image_processor([source], return_tensors="pt")["pixel_values"]
            likeness = xray_likeness(source)
        except (ValueError, ImportError) as error:
            raise type(error)(f"{name}: {error}") from error
        embeds, patch_tokens = encode_pixels(self.model, pixel_values)
        if not embeds.isfinite().all():
            raise ValueError(f"{name}: the model gives NaN or infinity for it. Look for diverged weights.")
        return Film(name, size, picture, embeds, patch_tokens, likeness)

    def _embed(self, finding: Finding) -> tuple[Tensor, Tensor, Tensor]:
        """Texts of presence (P, D), of absence (A, D), and the direction of the heat map (D,)."""
        shown = finding.positive[:1] + finding.negative[:1]
        if finding.is_known:  # the pair that grounding is measured with, whatever the prompts
            shown = positive_prompts(finding.name)[0], negative_prompts(finding.name)[0]
        texts = [*finding.positive, *finding.negative, *shown]
        embeds = text_features(self.model, self.processor, texts)
        positive, negative, shown = embeds.split([len(finding.positive), len(finding.negative), 2])
        return positive, negative, shown[0] - shown[1]

    def score(self, film: Film, findings: Sequence[Finding]) -> list[Score]:
        """What the film answers to each finding. The image tower does not run."""
        scores = []
        for finding in findings:
            logits = pooled_logits(self.model, film.embeds, self._embedded(finding)[:2], self.prompts.pooling)[0]
            margin = (logits[0] - logits[1]).item()
            fitted = self.calibration.findings.get(finding.name) if self.calibration is not None else None
            probability = float(fitted.probability(margin)) if fitted is not None else None
            scores.append(Score(finding, torch.tensor(margin).sigmoid().item(), probability, fitted))
        return scores

    def heatmaps(self, film: Film, findings: Sequence[Finding]) -> np.ndarray:
        """Where the patches answer the presence of each finding more than its absence, (F, height, width) float32.

        At the size of `film.picture`. The image tower does not run.
        """
        width, height = film.picture.size
        if not findings:
            return np.zeros((0, height, width), np.float32)
        directions = torch.stack([self._embedded(finding)[2] for finding in findings]).to(film.patch_tokens)
        with evaluating(self.model):
            tokens = film.patch_tokens.expand(len(directions), -1, -1)
            attention = self.model.attention_to_patches(tokens, directions).float()
        return np.stack([self.processor.resize_heatmap(one, (height, width)) for one in attention])

    def nearest_reports(self, film: Film, num: int = 5) -> list[tuple[str, float]]:
        """The `num` reports most similar to the film with their cosine similarities, the nearest first."""
        if not self.reports:
            return []
        indices, similarities = nearest(film.embeds, self.report_embeds, num)
        return [(self.reports[index], float(value)) for index, value in zip(indices[0], similarities[0], strict=True)]


def read_report_ids(path: str) -> dict[str, str]:
    """Report -> its `row_id` (that of the first of several) of a table or a prepared folder, without its images.

    Rows of a table that cannot be used are left out, with one warning that counts them and names the first.
    """
    problems: list[str] = []
    if Path(path).is_dir():
        rows = read_prepared(path)
    else:
        rows = read_csv_manifest(
            path,
            drop_unlabelled=True,
            check_images=False,
            report_problem=lambda where, reason: problems.append(f"{where}: {reason}"),
        )
    if problems:
        logger.warning("reports: left out %d rows of %s, the first: %s", len(problems), path, problems[0])
    found: dict[str, str] = {}
    for report, row_id in zip(rows["report"], rows["row_id"], strict=True):
        if report and report.strip():
            found.setdefault(" ".join(report.split()), row_id)
    if not found:
        raise ValueError(f"reports: {path}: none of {len(rows)} rows has a report; give a column `text`.")
    return found

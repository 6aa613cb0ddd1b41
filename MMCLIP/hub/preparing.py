"""Everything that a push needs of a saved folder: files, card and what speaks against it, before a byte is sent."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from huggingface_hub import ModelCard

from ..evaluation.probabilities import FILE_NAME as CALIBRATION
from .files import check_weights, cleaned, collect_files, read_json, saved_fingerprint
from .model_card import About, build_card, card_gaps, restricted_sources, training_sources
from .results import read_results, validation_result
from .training_record import RUN_FILES, Run, find_run, read_run


@dataclass
class Release:
    """A model that is ready to go: `files` by their names in the repository, its `card`, and what `stays` here."""

    files: dict[str, Path | bytes]
    card: ModelCard
    stays: list[str]


def prepare(
    model_dir: str | os.PathLike,
    repo_id: str,
    about: About,
    *,
    run_dir: str | os.PathLike | None = None,
    results: Sequence[str | os.PathLike] | None = None,
    card_file: str | os.PathLike | None = None,
    public: bool = False,
) -> Release:
    """The release of a folder that run_pretrain.py left; `results` are metrics.json of evaluations of these weights.

    The run is looked for in the folder and above it, and so is a metrics.json where `results` is None; a
    calibration.json there goes too if it was fitted for these weights. A card of one's own, `card_file`, goes as it is
    and must have all that ours has; of `about` it needs `data` and `may_share_weights` alone. Raises `ValueError` for a
    folder that is not whole, and for a card with gaps, naming all of them.
    """
    files, stays = collect_files(model_dir)
    config = check_weights(model_dir)
    if run_dir is not None and not any(Path(run_dir, name).is_file() for name in RUN_FILES):
        raise ValueError(f"--run_dir {run_dir} holds none of {', '.join(RUN_FILES)}. Give the --output_dir of the run.")
    run_dir = find_run(model_dir) if run_dir is None else Path(run_dir)
    run = read_run(run_dir, model_dir)
    is_classifier = "ForImageClassification" in (config.architectures or [""])[0]
    if is_classifier and card_file is None:
        raise ValueError(f"{model_dir} is a fine-tuned classifier, of which no card is made: write one, for --card.")
    fingerprint = "" if is_classifier else saved_fingerprint(model_dir)
    if CALIBRATION in files and not _is_calibration_of(Path(model_dir, CALIBRATION), fingerprint):
        raise ValueError(f"{model_dir}/{CALIBRATION} was fitted for other weights. Fit a new one, or take it out.")
    if CALIBRATION not in files and _is_calibration_of(run_dir / CALIBRATION, fingerprint):
        files[CALIBRATION] = cleaned(run_dir / CALIBRATION)
    if card_file is not None:
        _check_only_about_data(about)
        card = ModelCard(_read_card(card_file))
    else:
        if results is None:
            results = [run_dir / "metrics.json"] if (run_dir / "metrics.json").is_file() else []
        evaluations = [found for path in results for found in read_results(path, model_dir, fingerprint)]
        if run.validation is not None:
            evaluations.append(validation_of_run(run))
        card = build_card(repo_id, config, run, evaluations, about)
    check_card(card, trained_on=training_sources(run, config, about))
    if public:
        check_may_be_public(run, config, about)
    return Release(files, card, stays)


def validation_of_run(run: Run):
    """The validation score of a run, as an evaluation on the sources of its validation rows."""
    sources = [entry["source"] or "unknown" for entry in run.record.get("data", {}).get("validation", ())]
    return validation_result(run.validation, "+".join(sources) or "unknown")


def check_card(card: ModelCard, results: str = "test", trained_on: Sequence[str] = ()) -> None:
    """Raises `ValueError` with everything that the card lacks, see [`card_gaps`]."""
    if gaps := card_gaps(card, results, trained_on):
        raise ValueError("The model card is not complete, so nothing is published:\n- " + "\n- ".join(gaps))


def check_may_be_public(run: Run, config, about: About) -> None:
    """Raises `ValueError` where nobody has said that weights trained on restricted data may be made public."""
    restricted = restricted_sources(training_sources(run, config, about), about)
    if restricted and not about.may_share_weights:
        raise ValueError(
            f"Trained on {', '.join(restricted)}, whose terms may forbid that the weights are made public. Publish "
            "without --public, or read the terms and put `may_share_weights: true` into the file for --about."
        )


def _check_only_about_data(about: About) -> None:
    given = [item.name for item in fields(About) if getattr(about, item.name) != getattr(About(), item.name)]
    if unused := sorted({*given} - {"data", "may_share_weights"}):
        raise ValueError(
            f"With --card, {', '.join(unused)} of --about must stand in the card itself; take it out there."
        )


def _is_calibration_of(path: Path, fingerprint: str) -> bool:
    return path.is_file() and read_json(path).get("model") == fingerprint


def _read_card(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--card {path} cannot be read: {error}.") from error

"""What each command of `mmclip` does."""

import argparse
import csv
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from .. import __version__
from ..evaluation.embeddings import model_fingerprint
from ..evaluation.overlays import file_name, overlay
from ..evaluation.probabilities import load_calibration
from ..inference.files import find_images, read_films, shown_path
from ..inference.loading import load_model
from ..inference.reading import Film, FilmReader, Finding, Score, parse_finding, read_report_ids
from ..inference.tables import TableWriter, check_output, flat_row
from ..text.prompt_sets import prompt_set


NOTICE = "Research software. Not for diagnosis, triage or any decision on care."
HEATMAP_TABLE = "heatmaps.csv"


def run(args: argparse.Namespace) -> int:
    """The exit code of a command: 0, or 1 where an image was bad. Mistakes of the user's raise `ValueError`."""
    command = {"encode": encode, "zero-shot": zero_shot, "heatmap": heatmap, "retrieve": retrieve}[args.command]
    processor_logger = logging.getLogger("MMCLIP.processing_mmclip")
    level = processor_logger.level
    processor_logger.setLevel(logging.ERROR)  # it tells of one text that is cut, `_warn_of_long_texts` of all
    try:
        return command(args)
    finally:
        processor_logger.setLevel(level)


class _Run:
    """The images of one command, its model, and what went wrong on the way."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.num_done = 0
        self.failed: list[dict[str, str]] = []
        self.paths = find_images(args.images, self.report_problem)
        if not self.paths:
            raise ValueError("there is no image to read; give files, or folders with images in them.")
        disable_progress_bar()
        self.model, self.processor = load_model(args.model, args.revision, args.device)
        self.model_hash = model_fingerprint(self.model, self.processor, with_code=False)

    def report_problem(self, path: str, reason: str) -> None:
        path = shown_path(path)
        self.failed.append({"path": path, "error": reason})
        tqdm.write(f"bad: {path}: {reason}", file=sys.stderr)

    def warn(self, text: str) -> None:
        if not self.args.quiet:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def films(self, with_pictures: bool = False) -> Iterator[Film]:
        """One for each readable image, with a progress bar on a terminal and a warning for what may be no X-ray."""
        # hidden where nobody sees it move: in logs and pipes
        bar = tqdm(total=len(self.paths), desc=self.args.command, unit="image", disable=self.args.quiet or None)
        num_bad_before = len(self.failed)
        options = {"batch_size": self.args.batch_size, "num_threads": self.args.num_workers}
        with bar:
            films = read_films(
                self.model, self.processor, self.paths, self.report_problem, with_pictures=with_pictures, **options
            )
            for film in films:
                if film.likeness.is_doubtful:
                    reasons = "; ".join(film.likeness.reasons)
                    self.warn(f"{film.name} may be no chest X-ray (likeness {film.likeness.score:.2f}): {reasons}")
                self.num_done += 1
                yield film
                bar.update(self.num_done + len(self.failed) - num_bad_before - bar.n)  # and the bad ones before it

    def about(self, **more: Any) -> dict[str, Any]:
        args = self.args
        model = {"name": str(args.model), "revision": args.revision, "hash": self.model_hash}
        return {"notice": NOTICE, "mmclip": __version__, "model": model, **more, "failed": self.failed}

    def end(self, output: Path | None) -> int:
        """Says how it went and returns the exit code."""
        if not self.args.quiet:
            where = f"; written: {output}" if output is not None and self.num_done else ""
            failed = f", {len(self.failed)} bad" if self.failed else ""
            print(f"{self.num_done} of {len(self.paths)} images done{failed}{where}", NOTICE, sep="\n", file=sys.stderr)
        return 1 if self.failed else 0


class _Screen:
    """The rows of a table as CSV on standard output, where no file is asked for."""

    def __init__(self):
        self.about: dict[str, Any] = {}
        self._writer = None

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        sys.stdout.flush()

    def write(self, row: dict[str, Any]) -> None:
        flat = flat_row(row)
        if self._writer is None:
            self._writer = csv.DictWriter(sys.stdout, list(flat), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(flat)


def _table(output: Path | None) -> TableWriter | _Screen:
    return _Screen() if output is None else TableWriter(output)


# ------------------------------------------------------------------------------------------------------------ commands


def encode(args: argparse.Namespace) -> int:
    check_output(args.output, args.overwrite)
    run = _Run(args)
    with TableWriter(args.output) as table:
        for film in run.films():
            row = {"path": film.name, "model_hash": run.model_hash, "xray_likeness": round(film.likeness.score, 4)}
            table.write(row | {"embedding": film.embeds[0].numpy()})
        table.about = run.about(embedding="projected by the image tower, float32, length 1")
    return run.end(args.output)


def zero_shot(args: argparse.Namespace) -> int:
    if args.output is not None:
        check_output(args.output, args.overwrite)
    run, reader, findings = _reading(args)
    with _table(args.output) as table:
        for film in run.films():
            for score in reader.score(film, findings):
                table.write({"path": film.name, **_score_row(score), "xray_likeness": round(film.likeness.score, 4)})
        table.about = run.about(**_about_findings(reader, findings))
    return run.end(args.output)


def heatmap(args: argparse.Namespace) -> int:
    table_file = args.output_dir / HEATMAP_TABLE
    check_output(table_file, args.overwrite)
    run, reader, findings = _reading(args)
    with TableWriter(table_file) as table:
        for film in run.films(with_pictures=True):
            stem = f"{run.num_done:05d}_{file_name(Path(film.name).stem)}"
            for number, score in enumerate(reader.score(film, findings)):
                (one,) = reader.heatmaps(film, [score.finding])  # of the size of the film: one by one
                name = f"{stem}_{number}_{file_name(score.finding.name, 40)}.png"
                picture = overlay(film.picture, one, opacity=args.opacity, colours=args.colours)
                picture.save(args.output_dir / name)
                row, column = divmod(int(one.argmax()), one.shape[1])
                place = {"picture": name, "highest_x": column, "highest_y": row}
                likeness = round(film.likeness.score, 4)
                table.write({"path": film.name, **_score_row(score), **place, "xray_likeness": likeness})
        meaning = "where patches answer the presence of the finding more than its absence, be it there or not"
        table.about = run.about(heatmap=meaning, **_about_findings(reader, findings))
    return run.end(args.output_dir)


def retrieve(args: argparse.Namespace) -> int:
    if args.output is not None:
        check_output(args.output, args.overwrite)
    ids = read_report_ids(args.reports)
    run = _Run(args)
    reports = list(ids)
    _warn_of_long_texts(run, reports)
    reader = FilmReader(run.model, run.processor, prompt_set("mmclip"), reports=reports)
    with _table(args.output) as table:
        for film in run.films():
            for rank, (text, similarity) in enumerate(reader.nearest_reports(film, args.top), 1):
                found = {"rank": rank, "similarity": similarity, "report_id": ids[text], "report": text}
                table.write({"path": film.name, **found, "xray_likeness": round(film.likeness.score, 4)})
        table.about = run.about(reports=str(args.reports), num_reports=len(reports))
    return run.end(args.output)


def _reading(args: argparse.Namespace) -> tuple[_Run, FilmReader, list[Finding]]:
    """What zero-shot and heatmap share. Options are checked before the model is loaded."""
    prompts = prompt_set(args.prompts)
    calibration = load_calibration(args.calibration) if args.calibration else None
    findings = [parse_finding(name, prompts) for name in args.findings or ()]
    run = _Run(args)
    reader = FilmReader(run.model, run.processor, prompts, calibration)
    findings = findings or [parse_finding(name, prompts) for name in reader.suggestions()]
    if not findings:
        raise ValueError(f"findings: the prompts {prompts.name} have none of the common ones; name some.")
    findings = list({finding.name: finding for finding in findings}.values())
    _warn_of_long_texts(run, [text for finding in findings for text in (*finding.positive, *finding.negative)])
    for finding in findings:
        if not finding.is_known:
            run.warn(f"{finding.name!r} is not in the vocabulary; it is asked as {finding.positive[0]!r}")
    return run, reader, findings


def _score_row(score: Score) -> dict[str, Any]:
    """`present` and `absent` compare the texts of the two sides; without texts of absence `present` only ranks."""
    absent = 1 - score.score if score.finding.negative else None
    return {
        "finding": score.finding.name,
        "present": score.score,
        "absent": absent,
        "probability": score.probability,
    }


def _about_findings(reader: FilmReader, findings: list[Finding]) -> dict[str, Any]:
    fitted = reader.calibration.findings if reader.calibration is not None else {}
    return {
        "prompt_set": reader.prompts.name,
        "present": "score in [0, 1] that ranks images; no probability",
        "probability": "calibrated, for images like those of the fit" if fitted else "none: no calibration was given",
        "findings": {
            finding.name: {
                "present": list(finding.positive),
                "absent": list(finding.negative),
                "is_in_vocabulary": finding.is_known,
                "is_calibrated": finding.name in fitted,
            }
            for finding in findings
        },
    }


def _warn_of_long_texts(run: _Run, texts: list[str]) -> None:
    """Says how many tokens the texts have that the text tower cuts, here for all of them at once."""
    limit = run.processor.tokenizer.model_max_length
    lengths = [len(ids) for ids in run.processor.tokenizer(texts, verbose=False)["input_ids"]]
    if long := [length for length in lengths if length > limit]:
        run.warn(
            f"{len(long)} of {len(texts)} texts have more than the {limit} tokens that the text tower reads, the "
            f"longest {max(long)}; of these only the first {limit} count"
        )

"""Compare saved MMCLIP checkpoints on protocols, all evaluations in one command:

python examples/run_evaluation.py --model full=X/checkpoint --model contrastive=Y/checkpoint --protocol phantom \\
    --protocol rsna=prepared/rsna --output_dir outputs/comparison

A protocol is NAME=PLACE: a name of MMCLIP/evaluation/protocols.yaml (or a YAML file of your own) and the folder that
prepare_data.py made, or a table; for `phantom` the number of radiographs. The first model is the one that all others
are compared with. The output folder gets metrics.json, report.md, a CSV of every image's scores, and figures.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

import torch

from MMCLIP.evaluation import comparison, comparison_report, figures, report
from MMCLIP.evaluation.checkpoints import check_checkpoint, load_checkpoint
from MMCLIP.evaluation.controls import group_controls
from MMCLIP.evaluation.embeddings import EmbeddingCache, model_fingerprint
from MMCLIP.evaluation.linear_probe import check_fractions_and_seeds
from MMCLIP.evaluation.protocols import EVALUATIONS, protocol, protocol_names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="[NAME=]FOLDER", help="may be repeated")
    parser.add_argument(
        "--protocol",
        action="append",
        required=True,
        metavar="NAME[=PLACE]",
        help=f"may be repeated; {', '.join(protocol_names())}, or a YAML file; phantom=NUMBER draws so many test "
        "images, always the same; those to validate and train on do not change with it",
    )
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--evaluations", nargs="+", choices=EVALUATIONS, help="default: all that apply")
    parser.add_argument("--prompts", help="a prompt set or YAML file, in place of each protocol's own")
    defaults = comparison.Options()
    parser.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        default=list(defaults.fractions),
        help="shares of the training patients that a linear probe learns from (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(defaults.seeds),
        help="each draws the shares of training patients anew (default: %(default)s)",
    )
    parser.add_argument(
        "--num_bootstrap",
        type=int,
        default=defaults.num_bootstrap,
        help="draws of patients for the 95 %% intervals, 0 for none (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of these draws and of the controls (default: %(default)s)")
    parser.add_argument("--cache_dir", help="folder that keeps embeddings for the next command")
    parser.add_argument("--batch_size", type=int, default=defaults.batch_size, help="images (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    check_fractions_and_seeds(args.fractions, args.seeds)
    args.models = named(
        args.model, lambda folder: Path(folder).parent.name if Path(folder).name == "checkpoint" else Path(folder).name
    )
    args.trials = {}
    for entry in args.protocol:
        name, _, place = entry.partition("=")
        key = Path(name).stem if name.endswith((".yaml", ".yml")) else name
        if key in args.trials:
            key = entry.replace("/", "_")  # also a folder's name
        args.trials[key] = (name, place)
    return args


def named(entries: list[str], default) -> dict[str, str]:
    """NAME=VALUE or VALUE, each name once."""
    found = {}
    for entry in entries:
        name, is_pair, value = entry.partition("=")
        name, value = (name, value) if is_pair else (default(entry), entry)
        if not name or not value or name in found:
            raise ValueError(
                f"--model {entry}: expected NAME=FOLDER with another name than {', '.join(found) or 'none'}."
            )
        found[name] = value
    return found


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    args = parse_arguments(arguments)
    for name, folder in args.models.items():
        check_checkpoint(folder, f"--model {name}")
    options = comparison.Options(
        evaluations=tuple(args.evaluations) if args.evaluations else None,
        prompts=args.prompts,
        fractions=tuple(args.fractions),
        seeds=tuple(args.seeds),
        num_bootstrap=args.num_bootstrap,
        seed=args.seed,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=True,
    )
    trials = {
        key: comparison.load_trial(protocol(name), place, args.prompts) for key, (name, place) in args.trials.items()
    }
    for trial in trials.values():
        comparison.applicable(trial, options.evaluations)  # before the long part

    for key in trials:  # no file of an earlier command stays beside the new report
        for part, pattern in (("scores", "*.csv"), ("figures", "*.png")):
            for old in (args.output_dir / part / key).glob(pattern):
                old.unlink()
    results = {"models": {}, "trials": {}, **report.describe_command(), "options": dataclasses.asdict(options)}
    outcomes = {key: {} for key in trials}
    drawn = {key: [] for key in trials}
    cache = EmbeddingCache(args.cache_dir)
    for name, folder in args.models.items():
        model, processor = load_checkpoint(folder, args.device)
        for key, trial in trials.items():
            outcome = comparison.evaluate_model(model, processor, trial, options, cache)
            outcomes[key][name] = outcome
            results["models"][name] = {
                "path": folder,
                "hash": outcome.results["model_hash"],
                "weights_hash": model_fingerprint(model, processor, with_code=False),
            }
            if outcome.grounding is not None:
                path = args.output_dir / "figures" / key / f"heatmaps_{name}.png"
                drawn[key].append(figures.plot_heatmaps(model, processor, trial.rows["test"], path))
    first = next(iter(args.models))
    for key, trial in trials.items():
        results["trials"][key] = {
            "data": comparison.describe_trial(trial),
            "models": {name: outcome.results for name, outcome in outcomes[key].items()},
            "controls": group_controls(
                trial.scored, trial.targets, trial.labels, trial.patients, args.num_bootstrap, args.seed
            ),
            "differences": {
                f"{first} - {name}": comparison.compare_models(trial, outcomes[key][first], outcome, options)
                for name, outcome in outcomes[key].items()
                if name != first
            },
        }
        drawn[key] = [*comparison_report.draw(args.output_dir / "figures" / key, trial, outcomes[key]), *drawn[key]]
        comparison_report.write_scores(args.output_dir / "scores" / key, trial, outcomes[key])
    report.write_metrics(args.output_dir, results)
    markdown = comparison_report.write_report(args.output_dir / "report.md", results, drawn)
    print(markdown.read_text(encoding="utf-8"))
    print(f"\ntable: {markdown}, metrics.json beside it")
    print(f"scores: {args.output_dir / 'scores'}\npictures: {args.output_dir / 'figures'}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a mistake of the user's: what is wrong, without the way it took
        sys.exit(f"ValueError: {error}")

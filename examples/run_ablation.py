"""Train and evaluate every row of a bench with several seeds, and compare them: which part of the method pays?

python examples/run_ablation.py examples/configs/ablation_phantoms_unpaired.yaml --output_dir outputs/ablation
python examples/run_ablation.py BENCH.yaml --output_dir X --rows full contrastive --seeds 0 1 2 --budget time --jobs 2

Every run is a line of OUTPUT_DIR/NAME/results_steps.jsonl (or results_time.jsonl) as soon as it is measured; the same
command goes on where it stopped. table_steps.md has means and the paired differences from the bench's reference row,
differences_steps.png and measures_steps.png draw them.
"""

import argparse
import functools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from MMCLIP.ablation.bench import Bench, load_bench, measured, with_table, write_folds
from MMCLIP.ablation.costs import equal_steps, equal_time_steps, step_costs
from MMCLIP.ablation.figures import draw_bench
from MMCLIP.ablation.table import markdown_table, summarise
from MMCLIP.evaluation import comparison
from MMCLIP.evaluation.checkpoints import load_checkpoint
from MMCLIP.evaluation.protocols import protocol


HERE = Path(__file__).resolve().parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", help="YAML file of a bench")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--rows", nargs="+", help="default: all; the reference is always among them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--budget",
        choices=("steps", "time"),
        default="steps",
        help="as many steps for all rows, or as many as take the time of the reference's, measured first",
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, each with its share of threads")
    parser.add_argument(
        "--launcher",
        default=sys.executable,
        help='what starts run_pretrain.py, such as "accelerate launch"; default: this Python',
    )
    parser.add_argument("--keep_checkpoints", action="store_true", help="default: deleted once they are measured")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {args.jobs}")
    return args


def steps_of_rows(bench: Bench, rows: list[str], budget: str, folder: Path, table: Path | None) -> dict:
    """Row -> stage -> steps. Costs are measured once and kept, so that a bench that goes on has the same steps.

    Costs of rows that come later are scaled by the median of what the earlier ones cost then and now.
    """
    if budget == "steps":
        return equal_steps(bench, rows)
    path = folder / "costs.json"
    costs = json.loads(path.read_text()) if path.exists() else {}
    if missing := [row for row in rows if row not in costs]:
        known = [row for row in costs if row in bench.rows] or [bench.reference]
        found = step_costs(bench, list(dict.fromkeys([*known, *missing])), table=table)
        scale = statistics.median(costs.get(row, found[row])["main"] / found[row]["main"] for row in known)
        scaled = {row: {stage: cost * scale for stage, cost in stages.items()} for row, stages in found.items()}
        costs = scaled | costs
        path.write_text(json.dumps(costs, indent=2) + "\n")
    return equal_time_steps(bench, {row: costs[row] for row in rows})


def train(run: dict, folder: Path, args: argparse.Namespace, table: Path | None) -> Path:
    """The checkpoint of one run, after its stages. One that was stopped goes on."""
    environment = dict(os.environ)
    if args.jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    tower: list[str] = []
    for stage, arguments in run["arguments"].items():
        place = folder if stage == "main" else folder / stage
        command = [*shlex.split(args.launcher), str(HERE / "run_pretrain.py"), *with_table(arguments, table), *tower]
        command += ["--output_dir", str(place), "--resume_from_checkpoint", "last", "--disable_tqdm", "true"]
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "log.txt", "a", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            raise RuntimeError(f"row {run['row']!r}, seed {run['seed']}: training failed, see {place / 'log.txt'}")
        tower = ["--vision_model_name_or_path", str(place / "checkpoint"), "--vision_config", "null"]
    return folder / "checkpoint"


def earlier_runs(path: Path, planned: dict[tuple[str, int], dict]) -> list[dict]:
    """The lines of the results file. Raises ValueError for one that ran with other arguments than it would now."""
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for run in runs:
        if run["arguments"] != planned.get((run["row"], run["seed"]), run)["arguments"]:
            raise ValueError(
                f"{path}: row {run['row']!r}, seed {run['seed']} was run with other arguments than the bench has now. "
                "Take another --output_dir, or delete its line."
            )
    return runs


def plan(bench: Bench, rows: list[str], seeds: list[int], steps: dict) -> dict[tuple[str, int], dict]:
    """(row, seed) -> what is known of each run before it, seed by seed, so that there is a whole table early."""
    planned = {}
    for seed in seeds:
        for row in rows:
            arguments = {stage: bench.arguments(row, seed, number, stage) for stage, number in steps[row].items()}
            planned[row, seed] = {"row": row, "seed": seed, "steps": steps[row], "arguments": arguments}
    return planned


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    bench = load_bench(args.bench)
    if unknown := sorted(set(args.rows or ()) - set(bench.rows)):
        raise ValueError(f"--rows: {', '.join(unknown)}: no row of {args.bench}, expected {', '.join(bench.rows)}.")
    rows = [row for row in bench.rows if not args.rows or row in (*args.rows, bench.reference)]
    folder = args.output_dir / bench.name
    folder.mkdir(parents=True, exist_ok=True)
    tables = write_folds(folder=folder / "folds", **bench.folds) if bench.folds else []

    def table_of(seed: int) -> Path | None:
        return tables[seed % len(tables)] if tables else None

    steps = steps_of_rows(bench, rows, args.budget, folder, table_of(0))
    planned = plan(bench, rows, args.seeds, steps)
    results_path = folder / f"results_{args.budget}.jsonl"
    runs = earlier_runs(results_path, planned)
    missing = [key for key in planned if key not in {(run["row"], run["seed"]) for run in runs}]
    options = comparison.Options(num_bootstrap=0, fractions=bench.fractions)

    @functools.cache
    def trial_of(seed: int) -> comparison.Trial:
        (place,) = with_table([bench.place], table_of(seed))
        return comparison.load_trial(protocol(bench.protocol), place)

    if missing:
        trial_of(missing[0][1])  # what is wrong with the data is said before anything is trained

    def trained(key: tuple[str, int]) -> Path:
        row, seed = key
        return train(planned[key], folder / args.budget / f"{row}-{seed}", args, table_of(seed))

    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(trained, key): key for key in missing}
        try:
            for future in as_completed(futures):
                run = planned[futures[future]]
                model, processor = load_checkpoint(str(future.result()), None)
                outcome = comparison.evaluate_model(model, processor, trial_of(run["seed"]), options)
                numbers = {name: measured(outcome.results, path) for name, path in bench.measures.items()}
                runs.append({**run, "measures": numbers})
                with open(results_path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
                print(
                    f"{len(runs)} runs; {run['row']}, seed {run['seed']}, steps {run['steps']}: {numbers}", flush=True
                )
                if not args.keep_checkpoints:
                    place = future.result().parent
                    for path in (*place.glob("checkpoint*"), *place.glob("first/checkpoint*")):
                        shutil.rmtree(path)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    summary = summarise(runs, list(bench.measures), bench.reference)
    (folder / f"summary_{args.budget}.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    table = folder / f"table_{args.budget}.md"
    table.write_text(markdown_table(summary, list(bench.rows), list(bench.measures)), encoding="utf-8")
    figures = draw_bench(runs, summary, bench, args.budget, folder)
    print(f"{table.read_text(encoding='utf-8')}\ntable: {table}, runs: {results_path}")
    print(f"figures: {', '.join(map(str, figures))}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")

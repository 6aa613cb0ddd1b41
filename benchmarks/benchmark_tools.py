"""What all benchmarks share: taking turns, the machine they ran on, and the table and JSON file they write."""

import argparse
import importlib.metadata
import json
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path


COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def in_turns(
    num_rounds: int, clock: Callable[[], float] = time.perf_counter, **functions: Callable[[], object]
) -> dict[str, float]:
    """Seconds of each function, the median of `num_rounds`, all in turns; a first round is not counted."""
    seconds = {name: [] for name in functions}
    for _ in range(num_rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def machine(threads: str, packages: Sequence[str]) -> dict[str, str]:
    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(": ")[2] for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "machine": f"{processor}, {os.cpu_count()} cores",
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--quick", action="store_true", help="a few seconds, numbers that mean nothing")
    return parser


def add_processor_time(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processor_time",
        action="store_true",
        help="seconds of the processor, not of the clock, for a CPU that others use too; set OMP_NUM_THREADS=1",
    )


def write_results(
    measures: dict[str, tuple], results: dict[str, float | None], about: dict, path: str | None, details: dict
) -> None:
    """Print the table of `measures` (name -> what it is, and its target where it has one), and write it to `path`.

    A quick run reaches nothing. `details` go into the file alone.
    """
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    print("\n| what | measured | target | |\n| --- | --- | --- | --- |")
    rows = {}
    for name, (label, *target) in measures.items():
        value = results.get(name)
        known = target and value is not None and not about["quick"]
        reached = COMPARE[target[0]](value, target[1]) if known else None
        rows[name] = {"value": value, "target": " ".join(map(str, target)) or None, "reached": reached}
        shown = "not measured here" if value is None else f"{value:.4g}"
        verdict = {True: "reached", False: "NOT reached", None: ""}[reached]
        print(f"| {label} | {shown} | {rows[name]['target'] or ''} | {verdict} |")
    if path:
        content = {"about": about, "results": rows, **({"details": details} if details else {})}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

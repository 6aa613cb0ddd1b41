"""A bench: a base config, what all its rows share, and what each of them changes. Read from YAML, see `load_bench`."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..evaluation.protocols import protocol
from ..text.prompt_sets import read_yaml
from ..training.arguments import parse_run_config


@dataclass(frozen=True)
class Bench:
    """One table of an ablation.

    base: YAML file of run_pretrain.py. shared: keys that all rows set. steps: optimiser steps of the reference row.
    reference: the row that the others are compared with. protocol, place: what each checkpoint is evaluated on.
    seed_keys: keys that a run's seed is written to. measures: name -> path in the results of
    [`evaluate_model`][MMCLIP.evaluation.comparison], with "a|b" in it for the mean over a and b. rows: name -> keys.
    """

    name: str
    base: str
    steps: int
    reference: str
    protocol: str
    place: str
    measures: Mapping[str, str]
    rows: Mapping[str, Mapping]
    shared: Mapping = field(default_factory=dict)
    seed_keys: tuple[str, ...] = ("seed",)
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)

    def arguments(self, row: str, seed: int, steps: int) -> list[str]:
        """What run_pretrain.py is called with, but for the output folder."""
        keys = {**self.shared, **self.rows[row], "max_steps": steps, **dict.fromkeys(self.seed_keys, seed)}
        arguments = [self.base]
        for key, value in keys.items():
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{key}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
        return arguments


def load_bench(path: str | os.PathLike) -> Bench:
    """Read and check a bench, every row included, so that a slip is found before the first hour of training.

    Raises ValueError, beginning with the file: for keys that are unknown or missing, a reference that is no row, and
    whatever run_pretrain.py would refuse of a row.
    """
    path = Path(path)
    entry = read_yaml(path, "a bench of ablations", "the keys of a bench")
    del entry["source"]
    known = {item.name: item for item in fields(Bench)}
    if unknown := sorted(set(entry) - set(known)):
        raise ValueError(f"{path}: unknown keys {unknown}, expected some of {', '.join(known)}.")
    required = [name for name in known if name not in ("name", "shared", "seed_keys", "fractions")]
    if missing := [name for name in required if not entry.get(name)]:
        raise ValueError(f"{path}: {', '.join(missing)} must be given.")
    entry |= {name: tuple(entry[name]) for name in ("seed_keys", "fractions") if name in entry}
    bench = Bench(**entry)
    if bench.reference not in bench.rows:
        raise ValueError(f"{path}: `reference` is {bench.reference!r}, expected one of {', '.join(bench.rows)}.")
    protocol(bench.protocol)
    for row in bench.rows:
        try:
            parse_run_config([*bench.arguments(row, 0, bench.steps), "--output_dir", "unused"])
        except ValueError as error:
            raise ValueError(f"{path}: row {row!r}: {error}") from error
    return bench


def measured(results: Mapping, path: str) -> float | None:
    """The number at a dotted `path` of nested `results`; of "a|b" the mean over both; None where it is not known."""
    head, _, rest = path.partition(".")
    found = []
    for name in head.split("|"):
        if name not in results:
            raise KeyError(f"{path!r}: the results have no {name!r}, expected one of {', '.join(map(str, results))}.")
        found.append(measured(results[name], rest) if rest else results[name])
    return None if None in found else sum(found) / len(found)

"""A bench: a base config, what all its rows share, and what each of them changes. Read from YAML, see `load_bench`."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

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

    A row may have `first: {share: 0.3, key: value, ...}`: a run before the other, whose vision tower that one begins
    with. It differs by the further keys and takes `share` of the row's steps, or of its time.

    folds: {table: FILE.csv, splits: [train, val], number: 5}: run number `seed` trains on all but one of as many parts
    of the patients in those splits, and is evaluated on that part ([`write_folds`]). What is in no such split is never
    read. The place `"{fold}"` and the same as a manifest stand for the table of a run.
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
    folds: Mapping | None = None

    def arguments(self, row: str, seed: int, steps: int, stage: str = "main") -> list[str]:
        """What run_pretrain.py is called with, but for the output folder, and for the tower of an earlier stage."""
        keys = {**self.shared, **self.rows[row]}
        first = keys.pop("first", None)
        if stage == "first":
            keys |= {key: value for key, value in first.items() if key != "share"}
        keys |= {"max_steps": steps, **dict.fromkeys(self.seed_keys, seed)}
        arguments = [self.base]
        for key, value in keys.items():
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{key}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
        return arguments

    def shares(self, row: str) -> dict[str, float]:
        """The stages of a row, in order, and the share of its steps or time that each takes."""
        if "first" not in self.rows[row]:
            return {"main": 1.0}
        share = self.rows[row]["first"]["share"]
        return {"first": share, "main": 1 - share}


def with_table(arguments: Sequence[str], table: str | os.PathLike | None) -> list[str]:
    """`arguments` with the table of a fold in the place of "{fold}"; without a table as they are."""
    return [str(table) if word == "{fold}" and table is not None else word for word in arguments]


def write_folds(table: str | os.PathLike, splits: Sequence[str], number: int, folder: Path) -> list[Path]:
    """Cross-validation: `number` CSV files, in each another part of the patients as split "test", the others "train".

    Rows of `splits` alone, with their files by absolute paths. Parts are drawn by patient within each source, so that
    each has its share of every source.
    """
    table = Path(table)
    with open(table, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] in splits]
    patients = sorted({(row["source"], row["patient_id"]) for row in rows})
    order = np.random.default_rng(0).permutation(len(patients))
    order = sorted(order, key=lambda index: patients[index][0])  # stable: drawn order within a source
    part = {patients[index]: place % number for place, index in enumerate(order)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"fold_{fold}.csv" for fold in range(number)]
    for fold, path in enumerate(paths):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                is_test = part[row["source"], row["patient_id"]] == fold
                place = str((table.parent / row["file"]).resolve())
                writer.writerow({**row, "file": place, "split": "test" if is_test else "train"})
    return paths


def load_bench(path: str | os.PathLike) -> Bench:
    """Read and check a bench, every row included, so that a slip is found before the first hour of training.

    A file may be `like: OTHER.yaml` beside it: then it has the keys that it lacks from there, `shared` is that of both,
    and a row may be the name of one of the other's.

    Raises ValueError, beginning with the file: for keys that are unknown or missing, a reference that is no row, and
    whatever run_pretrain.py would refuse of a row.
    """
    path = Path(path)
    entry = _read_bench(path)
    known = {item.name: item for item in fields(Bench)}
    if unknown := sorted(set(entry) - set(known)):
        raise ValueError(f"{path}: unknown keys {unknown}, expected some of {', '.join(known)}.")
    required = [name for name in known if name not in ("name", "shared", "seed_keys", "fractions", "folds")]
    if missing := [name for name in required if not entry.get(name)]:
        raise ValueError(f"{path}: {', '.join(missing)} must be given.")
    entry |= {name: tuple(entry[name]) for name in ("seed_keys", "fractions") if name in entry}
    bench = Bench(**entry)
    if bench.reference not in bench.rows:
        raise ValueError(f"{path}: `reference` is {bench.reference!r}, expected one of {', '.join(bench.rows)}.")
    protocol(bench.protocol)
    for row in bench.rows:
        if "first" in bench.rows[row] and not 0 < bench.rows[row]["first"].get("share", 0) < 1:
            raise ValueError(f"{path}: row {row!r}: `first` needs a `share` between 0 and 1.")
        for stage in bench.shares(row):
            table = bench.folds["table"] if bench.folds else None  # those of the folds are not written yet
            arguments = with_table(bench.arguments(row, 0, bench.steps, stage), table)
            try:
                parse_run_config([*arguments, "--output_dir", "unused"])
            except ValueError as error:
                raise ValueError(f"{path}: row {row!r}: {error}") from error
    return bench


def _read_bench(path: Path) -> dict:
    entry = read_yaml(path, "a bench of ablations", "the keys of a bench")
    del entry["source"]
    if "like" not in entry:
        return entry
    other = _read_bench(path.parent / entry.pop("like"))
    for row, keys in entry.get("rows", {}).items():
        if isinstance(keys, str):
            if keys not in other["rows"]:
                raise ValueError(f"{path}: row {row!r}: {other['name']} has no row {keys!r} that it could be like.")
            entry["rows"][row] = other["rows"][keys]
    return {**other, **entry, "shared": {**other.get("shared", {}), **entry.get("shared", {})}}


def measured(results: Mapping, path: str) -> float | None:
    """The number at a dotted `path` of nested `results`; of "a|b" the mean over both; None where it is not known."""
    head, _, rest = path.partition(".")
    found = []
    for name in head.split("|"):
        if name not in results:
            raise KeyError(f"{path!r}: the results have no {name!r}, expected one of {', '.join(map(str, results))}.")
        found.append(measured(results[name], rest) if rest else results[name])
    return None if None in found else sum(found) / len(found)

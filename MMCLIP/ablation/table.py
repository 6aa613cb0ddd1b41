"""Rows of a bench against its reference, seed by seed: mean differences with 95 % intervals and p-values."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> dict:
    """Mean of `values` minus `reference` over the same seeds: `difference`, `ci` (95 %), `p_value`, of a paired t-test.

    It takes the differences as normal; `ci` and `p_value` are None with one seed, or where all differences are equal.
    What varies is what the seed sets, not the patients of the test set.
    """
    differences = np.subtract(values, reference, dtype=float)
    result = {"difference": float(differences.mean()), "ci": None, "p_value": None, "num_seeds": len(differences)}
    if len(differences) < 2 or np.ptp(differences) == 0:
        return result
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    half = stats.t.ppf(0.975, len(differences) - 1) * error
    result["ci"] = [result["difference"] - half, result["difference"] + half]
    result["p_value"] = float(2 * stats.t.sf(abs(result["difference"] / error), len(differences) - 1))
    return result


def summarise(runs: Sequence[Mapping], measures: Sequence[str], reference: str) -> dict[str, dict]:
    """Row -> measure -> mean, sd over its `num_runs` seeds and, but for the reference, the [`paired_difference`].

    That is of the seeds which the row shares with the reference. `runs` are lines of the results file: `row`, `seed`
    and `measures`; a measure that is None in a run is left out.
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        for name in measures:
            if run["measures"].get(name) is not None:
                values.setdefault(run["row"], {}).setdefault(name, {})[run["seed"]] = run["measures"][name]
    summary: dict[str, dict] = {}
    for row, by_measure in values.items():
        for name, by_seed in by_measure.items():
            known = list(by_seed.values())
            cell = {"mean": float(np.mean(known)), "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None}
            cell["num_runs"] = len(known)
            others = values.get(reference, {}).get(name, {})
            shared = sorted(by_seed.keys() & others.keys())
            if row != reference and shared:
                cell |= paired_difference([by_seed[seed] for seed in shared], [others[seed] for seed in shared])
            summary.setdefault(row, {})[name] = cell
    return summary


def markdown_table(summary: Mapping, rows: Sequence[str], measures: Sequence[str]) -> str:
    """A line for each row that was run: its seeds, the first measure with its difference from the reference, 95 %
    interval and p-value, the others with + or - behind the mean where the interval of their difference excludes 0."""
    first, *others = measures
    lines = [f"| row | seeds | {first} | difference (95 %) | p | {' | '.join(others)}{' |' if others else ''}"]
    lines.append("| --- |" + " --- |" * (4 + len(others)))
    for row in rows:
        if row in summary:
            cells = [*_first_cells(summary[row].get(first)), *(_cell(summary[row].get(name)) for name in others)]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _first_cells(cell: Mapping | None) -> tuple[str, str, str, str]:
    if cell is None:
        return "", "", "", ""
    known = str(cell["num_runs"]), f"{cell['mean']:.3f}"
    if "difference" not in cell:
        return *known, "", ""
    interval = "" if cell["ci"] is None else f" ({cell['ci'][0]:+.3f} to {cell['ci'][1]:+.3f})"
    p_value = "" if cell["p_value"] is None else f"{cell['p_value']:.1g}"
    return *known, f"{cell['difference']:+.3f}{interval}", p_value


def _cell(cell: Mapping | None) -> str:
    if cell is None:
        return ""
    low, high = cell.get("ci") or (0, 0)
    return f"{cell['mean']:.3f}" + (" +" if low > 0 else " -" if high < 0 else "")

"""The figures of a bench, as PNG files, from the lines of its results file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..evaluation.figures import save_figure, subplots
from .bench import Bench


def draw_bench(runs: Sequence[Mapping], summary: Mapping, bench: Bench, name: str, folder: Path) -> list[Path]:
    """`differences_NAME.png`: the first measure less that of the reference, with its interval and each seed;
    `measures_NAME.png`: every measure of every row, mean and standard deviation over seeds. `summary` is that of `runs`
    by [`summarise`][MMCLIP.ablation.table]."""
    rows = [row for row in bench.rows if row in summary]
    others = [row for row in rows if row != bench.reference]
    measures = list(bench.measures)
    return [
        _draw_differences(runs, summary, others, bench.reference, measures[0], folder / f"differences_{name}.png"),
        _draw_measures(summary, rows, measures, folder / f"measures_{name}.png"),
    ]


def _draw_differences(runs, summary, rows, reference: str, measure: str, path: Path) -> Path:
    figure, ((axis,),) = subplots(1, 1, 7, 1 + 0.34 * len(rows))
    known = {(run["row"], run["seed"]): run["measures"].get(measure) for run in runs}
    for place, row in enumerate(rows):
        cell = summary[row].get(measure, {})
        if "difference" not in cell:
            continue
        seeds = [seed for name, seed in known if name == row and known.get((reference, seed)) is not None]
        dots = [known[row, seed] - known[reference, seed] for seed in seeds if known[row, seed] is not None]
        axis.plot(dots, [place] * len(dots), "o", color="0.75", markersize=4)
        if cell["ci"]:
            axis.plot(cell["ci"], [place] * 2, color="tab:blue", linewidth=2)
        axis.plot(cell["difference"], place, "D", color="tab:blue", markersize=5)
    axis.axvline(0, color="0.4", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.set_xlabel(f"{measure} less that of {reference!r}:\nmean, 95 % interval, and each seed")
    return save_figure(figure, path)


def _draw_measures(summary, rows, measures: Sequence[str], path: Path) -> Path:
    figure, (axes,) = subplots(1, len(measures), 1.6, 0.9 + 0.3 * len(rows), sharey=True)
    for axis, measure in zip(axes, measures, strict=True):
        for place, row in enumerate(rows):
            if cell := summary[row].get(measure):
                axis.errorbar(
                    cell["mean"], place, xerr=cell["sd"] or 0, fmt="o", color="tab:blue", capsize=2, markersize=4
                )
        axis.set_title(measure, fontsize=9)
        axis.grid(axis="x", color="0.9")
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    return save_figure(figure, path)

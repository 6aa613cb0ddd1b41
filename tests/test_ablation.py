"""Benches of ablations: what is read, how rows are compared, and a run that goes on where it stopped."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from scipy import stats

from MMCLIP.ablation.bench import load_bench, measured
from MMCLIP.ablation.costs import equal_time_steps, step_costs
from MMCLIP.ablation.table import markdown_table, paired_difference, summarise


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
BENCHES = sorted((ROOT / "examples" / "configs").glob("ablation_*.yaml"))
BENCH = {
    "base": str(ROOT / "examples" / "configs" / "phantom_tiny.yaml"),
    "steps": 2,
    "reference": "plain",
    "protocol": "phantom",
    "place": "24",
    "fractions": [1.0],
    "shared": {
        "num_phantoms": 8, "num_unpaired_phantoms": 4, "num_validation_phantoms": 0, "per_device_train_batch_size": 4,
        "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "use_cpu": True,
    },
    "measures": {"auroc": "zero_shot.macro_auroc"},
    "rows": {"plain": {"mim_weight": 0, "mlm_weight": 0}, "full": {}},
}  # fmt: skip


def write(folder, **changes) -> str:
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({**BENCH, **changes}, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_every_bench_of_ours_is_one_that_run_pretrain_takes(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    bench = load_bench(path)
    assert len(bench.rows) >= 5 and bench.reference in bench.rows


def test_a_row_sets_what_it_changes_last_and_the_seed_where_the_bench_says(tmp_path):
    bench = load_bench(write(tmp_path, seed_keys=["seed", "phantom_seed"], rows={"plain": {"num_phantoms": 9}}))
    arguments = bench.arguments("plain", seed=3, steps=7)
    assert arguments[0] == BENCH["base"]
    for key, value in (("num_phantoms", "9"), ("seed", "3"), ("phantom_seed", "3"), ("max_steps", "7")):
        assert arguments[arguments.index(f"--{key}") + 1] == value


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"row": {}}, r"unknown keys \['row'\]"),
        ({"steps": None}, "steps must be given"),
        ({"reference": "clip"}, "`reference` is 'clip', expected one of plain, full"),
        ({"rows": {"plain": {"mim_wieght": 0}}}, "row 'plain': .*mim_wieght.*mim_weight"),
        ({"protocol": "phantoms"}, "no protocol 'phantoms'"),
    ],
)
def test_a_slip_in_a_bench_is_named_before_anything_is_trained(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_bench(write(tmp_path, **changes))


def test_a_measure_is_found_by_its_path_and_averaged_over_names():
    results = {"zero_shot": {"macro": 0.5, "per_class": {"mass": {"auroc": 0.6}, "edema": {"auroc": 0.8}}}}
    assert measured(results, "zero_shot.macro") == 0.5
    assert measured(results, "zero_shot.per_class.mass|edema.auroc") == pytest.approx(0.7)
    with pytest.raises(KeyError, match="no 'makro'"):
        measured(results, "zero_shot.makro")


def test_differences_are_those_of_the_same_seeds_with_the_interval_of_a_paired_t_test():
    values, reference = [0.8, 0.9, 0.85, 0.95], [0.7, 0.85, 0.8, 0.8]
    found = paired_difference(values, reference)
    expected = stats.ttest_rel(values, reference)
    assert found["difference"] == pytest.approx(0.0875) and found["p_value"] == pytest.approx(expected.pvalue)
    assert found["ci"] == pytest.approx(list(expected.confidence_interval(0.95)))
    assert paired_difference([0.8], [0.7])["ci"] is None and paired_difference([1, 2], [0, 1])["p_value"] is None


def test_a_summary_pairs_rows_by_seed_and_leaves_out_what_is_not_known():
    runs = [
        {"row": row, "seed": seed, "measures": {"auroc": value, "side": None}}
        for row, seed, value in [
            ("plain", 0, 0.7),
            ("plain", 1, 0.8),
            ("full", 1, 0.9),
            ("full", 0, 0.9),
            ("full", 2, 0),
        ]
    ]
    summary = summarise(runs, ["auroc", "side"], "plain")
    assert summary["full"]["auroc"]["difference"] == pytest.approx(0.15) and summary["full"]["auroc"]["num_seeds"] == 2
    assert "side" not in summary["full"] and "difference" not in summary["plain"]["auroc"]
    table = markdown_table(summary, ["plain", "full", "not run"], ["auroc", "side"])
    assert "| plain | 0.750 |  |" in table and "+0.150" in table and "not run" not in table


def test_rows_of_equal_time_get_steps_by_what_a_step_costs(tmp_path):
    bench = load_bench(write(tmp_path, steps=100))
    assert equal_time_steps(bench, {"plain": 1.0, "full": 2.0}) == {"plain": 100, "full": 50}


@pytest.mark.slow
def test_a_step_of_the_full_method_costs_more_than_one_without_its_heads(tmp_path):
    costs = step_costs(load_bench(write(tmp_path)), ["plain", "full"])
    assert costs["full"] > costs["plain"] > 0


@pytest.mark.slow
def test_a_bench_is_trained_measured_and_goes_on_where_it_stopped(tmp_path, capsys):
    import run_ablation

    command = [write(tmp_path), "--output_dir", str(tmp_path / "out"), "--jobs", "2", "--seeds", "0"]
    run_ablation.main([*command, "--rows", "plain"])
    results = tmp_path / "out" / "bench" / "results_steps.jsonl"
    first = results.read_text()
    assert json.loads(first)["row"] == "plain" and 0 <= json.loads(first)["measures"]["auroc"] <= 1
    assert not list((tmp_path / "out" / "bench" / "steps" / "plain-0").glob("checkpoint*"))
    run_ablation.main(command)
    assert results.read_text().startswith(first) and len(results.read_text().splitlines()) == 2
    assert "| full |" in capsys.readouterr().out
    write(tmp_path, steps=3)
    with pytest.raises(ValueError, match="row 'plain', seed 0 was run with other arguments"):
        run_ablation.main(command)

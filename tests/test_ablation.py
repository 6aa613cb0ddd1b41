"""Benches of ablations: what is read, how rows are compared, and a run that goes on where it stopped."""

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from scipy import stats

from MMCLIP.ablation.bench import load_bench, measured, write_folds
from MMCLIP.ablation.costs import equal_steps, equal_time_steps, step_costs
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


def test_a_bench_can_be_like_another_and_a_row_like_one_of_its_rows(tmp_path):
    other = load_bench(write(tmp_path))
    child = tmp_path / "child.yaml"
    fields = {"like": "bench.yaml", "steps": 9, "shared": {"num_phantoms": 4}}
    child.write_text(yaml.safe_dump({**fields, "rows": {"plain": {"mim_weight": 0}, "whole": "full"}}))
    bench = load_bench(child)
    assert (bench.name, bench.steps, bench.base) == ("child", 9, other.base)
    assert bench.shared == {**other.shared, "num_phantoms": 4}
    assert bench.rows == {"plain": {"mim_weight": 0}, "whole": other.rows["full"]}
    child.write_text(yaml.safe_dump(fields))
    assert load_bench(child).rows == other.rows
    child.write_text(yaml.safe_dump({**fields, "rows": {"plain": "fulll"}}))
    with pytest.raises(ValueError, match="row 'plain': bench has no row 'fulll'"):
        load_bench(child)


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
    assert "| plain | 2 | 0.750 |  |  |  |" in table
    assert "| full | 3 | 0.600 | +0.150 (-0.485 to +0.785) | 0.2 |" in table
    assert "not run" not in table


def test_a_measure_behind_the_first_is_marked_where_its_interval_excludes_zero():
    def cell(*ci):
        return {"mean": 0.5, "sd": 0.1, "num_runs": 4, "difference": 0.1, "ci": list(ci) or None, "p_value": None}

    summary = {"full": {"a": cell(), "b": cell(0.05, 0.2), "c": cell(-0.2, -0.1), "d": cell(-0.1, 0.2)}}
    line = markdown_table(summary, ["full"], list("abcd")).splitlines()[-1]
    assert line == "| full | 4 | 0.500 | +0.100 |  | 0.500 + | 0.500 - | 0.500 |"


def test_rows_of_equal_time_get_steps_by_what_a_step_costs(tmp_path):
    bench = load_bench(write(tmp_path, steps=100))
    steps = equal_time_steps(bench, {"plain": {"main": 1.0}, "full": {"main": 2.0}})
    assert steps == {"plain": {"main": 100}, "full": {"main": 50}}
    assert equal_steps(bench, ["plain"]) == {"plain": {"main": 100}}


def test_costs_are_kept_and_those_of_later_rows_are_scaled_by_all_that_is_known(tmp_path, monkeypatch):
    import run_ablation

    rows = {name: {} for name in ("plain", "second", "third", "new")}
    bench = load_bench(write(tmp_path, steps=100, rows=rows))
    first = {name: {"main": 1.0} for name in ("plain", "second", "third")}
    # a machine at half the speed, and one row of which the measurement went wrong
    then = {"plain": {"main": 9.0}, "second": {"main": 2.0}, "third": {"main": 2.0}, "new": {"main": 4.0}}
    measured_rows = []

    def costs_of(bench, rows, table):
        measured_rows.append(rows)
        return {row: (then if "new" in rows else first)[row] for row in rows}

    monkeypatch.setattr(run_ablation, "step_costs", costs_of)
    steps = run_ablation.steps_of_rows(bench, ["plain", "second", "third"], "time", tmp_path, None)
    assert steps == {name: {"main": 100} for name in first}
    (tmp_path / "costs.json").write_text(json.dumps({**first, "no longer a row": {"main": 1.0}}))
    for _ in range(2):
        assert run_ablation.steps_of_rows(bench, ["plain", "new"], "time", tmp_path, None) == {
            "plain": {"main": 100},
            "new": {"main": 50},
        }
    assert measured_rows == [["plain", "second", "third"], ["plain", "second", "third", "new"]]


def test_a_stage_before_the_other_takes_its_share_and_sets_its_own_keys(tmp_path):
    staged = {"mlm_weight": 0, "first": {"share": 0.25, "contrastive_weight": 0, "learning_rate": 0.5}}
    bench = load_bench(write(tmp_path, steps=100, rows={"plain": {}, "staged": staged}))
    first, main = (bench.arguments("staged", 0, 7, stage) for stage in bench.shares("staged"))
    assert "--mlm_weight" in first and "--mlm_weight" in main
    assert "--learning_rate" in first and "--learning_rate" not in main and "--share" not in first + main
    assert equal_steps(bench, ["staged"]) == {"staged": {"first": 25, "main": 75}}
    costs = {"plain": {"main": 2.0}, "staged": {"first": 5.0, "main": 1.0}}
    assert equal_time_steps(bench, costs)["staged"] == {"first": 10, "main": 150}
    with pytest.raises(ValueError, match="`first` needs a `share`"):
        load_bench(write(tmp_path, rows={"plain": {"first": {"mlm_weight": 0}}}))


def test_folds_share_no_patient_hold_every_row_once_and_leave_other_splits_alone(tmp_path):
    table = tmp_path / "table.csv"
    lines = ["file,split,source,patient_id,text"]
    for number in range(40):
        split = "test" if number % 8 == 0 else "train"
        lines.append(f'images/{number}.jpg,{split},{"a" if number < 30 else "b"},p{number // 2},"one, two"')
    table.write_text("\n".join(lines) + "\n")
    paths = write_folds(table, ["train"], 3, tmp_path / "folds")
    tested = []
    for path in paths:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}
        assert len(rows) == 35 and len(parts["train"]) + len(parts["test"]) == 35
        patients = [{(row["source"], row["patient_id"]) for row in part} for part in parts.values()]
        assert not patients[0] & patients[1]
        assert {row["source"] for row in parts["test"]} == {"a", "b"}
        assert rows[0]["file"] == str(tmp_path / "images" / "1.jpg") and rows[0]["text"] == "one, two"
        tested += [row["file"] for row in parts["test"]]
    assert len(tested) == len(set(tested)) == 35
    assert [path.read_text() for path in write_folds(table, ["train"], 3, tmp_path / "folds")] == [
        path.read_text() for path in paths
    ]


@pytest.mark.slow
def test_a_step_of_the_full_method_costs_more_than_one_without_its_heads(tmp_path):
    bench = load_bench(write(tmp_path, shared={**BENCH["shared"], "max_rotation": 5.0}))  # images are augmented too
    costs = step_costs(bench, ["plain", "full"])
    assert costs["full"]["main"] > costs["plain"]["main"] > 0


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
    staged = {"first": {"share": 0.5, "mim_weight": 1, "contrastive_weight": 0, "mlm_weight": 0}}
    run_ablation.main([write(tmp_path, rows={**BENCH["rows"], "staged": staged}), *command[1:]])
    log = (tmp_path / "out" / "bench" / "steps" / "staged-0" / "log.txt").read_text()
    assert json.loads(results.read_text().splitlines()[-1])["steps"] == {"first": 1, "main": 1}, log
    for name in ("differences_steps.png", "measures_steps.png"):
        with Image.open(results.with_name(name)) as figure:
            assert min(figure.size) > 100 and len(figure.convert("L").getcolors(256)) > 10
    write(tmp_path, steps=3)
    with pytest.raises(ValueError, match="row 'plain', seed 0 was run with other arguments"):
        run_ablation.main(command)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "ablations").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_tables_in_the_results_are_those_of_the_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, _, budget = path.stem.rpartition("_")
    bench = load_bench(f"examples/configs/ablation_{name}.yaml")
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    for run in runs:
        assert run["row"] in bench.rows and run["measures"].keys() == bench.measures.keys()
        for stage, steps in run["steps"].items():
            assert run["arguments"][stage] == bench.arguments(run["row"], run["seed"], steps, stage)
    table = markdown_table(
        summarise(runs, list(bench.measures), bench.reference), list(bench.rows), list(bench.measures)
    )
    assert budget in ("time", "steps") and table in (ROOT / "RESULTS.md").read_text()

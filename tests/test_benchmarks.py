"""Each benchmark runs to its end and writes what it names. Times are never tested: others may be using the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
MEASURED = {
    "data_pipeline": {
        "decode_speedup", "decode_difference", "loading_speedup", "picture_speedup", "loading_rate", "augmentation_ms",
        "processor_speedup", "epochs_memory_mb", "index_seconds", "index_memory_gb",
    },
}  # fmt: skip


def test_every_benchmark_is_run_here():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == set(MEASURED)


@pytest.mark.parametrize("name", MEASURED)
def test_a_quick_run_prints_its_table_and_writes_every_number(name, tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", "--json", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["about"]["quick"] and written["about"]["machine"] and written["about"]["torch"]
    for measure in MEASURED[name]:
        value = written["results"][measure]["value"]
        # memory is read from /proc, which not every system has
        assert isinstance(value, float) or (measure.endswith(("_mb", "_gb")) and not Path("/proc/self/status").exists())
        assert written["results"][measure]["reached"] is None, "a quick run reaches nothing"
    assert done.stdout.count("\n| ") == len(written["results"]) + 2

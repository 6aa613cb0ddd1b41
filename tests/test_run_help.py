import runpy
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = [*sorted(path.name for path in EXAMPLES.glob("run_*.py")), "show_heatmaps.py", "export_onnx.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_its_help(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--output" in shown and "%%" not in shown

"""Each benchmark runs to its end and writes what it names. Times are never tested: others may be using the machine."""

import collections
import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from MMCLIP.text.entities import LexiconRecognizer
from MMCLIP.text.vocabulary import vocabulary


ROOT = Path(__file__).resolve().parent.parent
OPENI = ROOT.parent / "shared" / "data" / "openi-reports" / "reports.jsonl.gz"
MEASURED = {
    "data_pipeline": {
        "decode_speedup", "decode_difference", "loading_speedup", "picture_speedup", "loading_rate", "augmentation_ms",
        "processor_speedup", "epochs_memory_mb", "index_seconds", "index_memory_gb",
    },
    "evaluation": {
        "bootstrap_seconds", "bootstrap_memory_mb", "sklearn_seconds", "bootstrap_speedup", "zero_shot_seconds",
        "zero_shot_image_share",
    },
    "entities": {
        "entity_share", "label_share", "entities_per_report", "masked_share", "rate", "seconds", "tokenizer_ratio",
    },
    "training_step": {
        "contrastive_speedup", "full_ratio", "full_ratio_even", "naive_ratio", "samples_full", "samples_dual_encoder",
        "memory_full_mb", "memory_naive_mb", "memory_full_checkpointing_mb", "flops_ratio",
    },
    "scaling": {
        "step_4_2_cached_rate", "step_4_2_cached_mb", "loss_64_whole_rate", "loss_64_chunked_mb",
    },
    "onnx_encoders": {
        "image_b_onnx_speedup", "image_b_int8_speedup", "image_b_onnx_plain_speedup", "image_b_bfloat16_speedup",
        "image_b_onnx_8_speedup", "image_b_rate", "text_b_onnx_speedup", "text_b_int8_speedup", "text_b_rate_torch",
    },
    "pretraining_heads": {
        "mlm_loss_own", "mlm_loss_other", "mlm_accuracy_own", "mlm_accuracy_other", "mim_loss_own", "mim_loss_other",
    },
    "encoding": {
        "images_speedup_1024", "images_speedup_256", "images_rate_1024", "preprocessing_speedup_256",
        "image_tower_speedup", "preprocessing_share_1024", "texts_speedup", "texts_rate", "texts_rate_clip_77",
    },
}  # fmt: skip


def test_every_benchmark_is_run_here():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == {*MEASURED, "benchmark_tools"}


SLOW = {"data_pipeline", "scaling", "onnx_encoders", "training_step"}  # more than ten seconds each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MEASURED]
)
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


@pytest.fixture
def entities(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the benchmark asks for one thread
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("entities")
    sys.modules.pop("entities")


def mesh():
    return yaml.safe_load((ROOT / "benchmarks" / "openi_mesh.yaml").read_text(encoding="utf-8"))


def test_mesh_headings_mean_concepts_of_the_vocabulary_or_say_why_not():
    for heading, lines in mesh().items():
        for concepts in [lines] if isinstance(lines, str) else lines.values():
            assert isinstance(concepts, str) or set(concepts) <= set(vocabulary()), heading


@pytest.mark.skipif(not OPENI.is_file(), reason="the Open-i reports are not beside this checkout")
def test_every_mesh_heading_of_ten_reports_is_listed():
    with gzip.open(OPENI, "rt", encoding="utf-8") as file:
        headings = [{code.partition("/")[0] for code in json.loads(line)["mesh_major"]} for line in file]
    counts = collections.Counter(heading for found in headings for heading in found)
    common = {heading for heading, number in counts.items() if number >= 10}
    assert len(common) > 60 and common <= set(mesh())


def test_the_first_line_whose_qualifiers_are_there_decides(entities):
    lines = {
        "Lung": {"nodes+large": ["lymphadenopathy"], "nodes": ["lymph node"], "other": "says nothing"},
        "Mass": {"any": ["mass"]},
        "No Indexing": "nothing",
    }
    expected = {
        "Lung/nodes": ("lymph node",), "Lung/large/left/nodes": ("lymphadenopathy",), "Lung/left": None,
        "Lung/other": None, "Mass/left": ("mass",), "No Indexing": None, "Rib": None,
    }  # fmt: skip
    for code, concepts in expected.items():
        rule = entities.deciding_rule(code, lines)
        assert (rule and rule.concepts) == concepts, code


def report(uid, findings, *codes, indication=""):
    return {"uid": uid, "findings": findings, "impression": "", "indication": indication, "mesh_major": list(codes)}


def test_recall_counts_a_concept_of_ten_reports_and_names_the_cause_of_each_miss(entities):
    recognizer = LexiconRecognizer()
    reports = [report(f"r{number}", "No rib fracture.", "Fractures, Bone/ribs") for number in range(6)]
    reports += [
        report("removed", "Compression XXXX of the spine. Vertebral XXXX fracture.", "Fractures, Bone"),
        report("apart", "The rib shows an old break or perhaps bone, which was broken.", "Fractures, Bone"),
        report("elsewhere", "Clear.", "Fractures, Bone", indication="Rib fracture?"),
        report("unsaid", "Clear.", "Fractures, Bone/left", "Mass"),
    ]
    found = {one["uid"]: recognizer(one["findings"]) for one in reports}
    found["removed"] = []
    results, details = entities.measure_recall(reports, found, recognizer)
    # the mass is coded once, so it does not count
    assert results == {"recall": 0.6, "recall_not_absent": 0.0, "recall_pairs": 10}
    assert {miss["uid"]: miss["cause"] for miss in details["misses"]} == {
        "removed": "a word of it may be removed (XXXX)",
        "apart": "its words stand apart",
        "elsewhere": "in the indication alone",
        "unsaid": "wording unknown or not said",
    }


def test_normal_reports_are_those_coded_normal_alone_and_only_what_is_present_counts(entities):
    recognizer = LexiconRecognizer()
    reports = [
        report("healthy", "No pneumonia or mass. Pacemaker.", "normal"),
        report("ill", "Pneumonia. Pneumonia and a nodule.", "normal"),
        report("other", "Pneumonia.", "normal", "Opacity"),
        report("seen", "Scoliosis.", "normal"),
        report("hedged", "Possible pneumonia.", "normal"),
    ]
    found = {one["uid"]: recognizer(one["findings"]) for one in reports}
    results, details = entities.measure_normal(reports, found)
    assert results == {"normal_disease_share": 0.25, "normal_abnormal_share": 0.5}
    assert details == {
        "reports": 4, "disease": {"ill": ["pneumonia"]}, "finding": {"ill": ["nodule"], "seen": ["scoliosis"]}
    }  # fmt: skip


def test_assertion_accuracy_takes_the_entity_that_overlaps_and_counts_a_miss_as_wrong(entities):
    text = "No edema. Possible mass. Odd thing."
    sample = [
        {"uid": "a", "start": 3, "end": 8, "assertion": "absent", "part": "tune", "stratum": "random"},
        {"uid": "a", "start": 10, "end": 23, "assertion": "uncertain", "part": "test", "stratum": "hard"},
        {"uid": "a", "start": 19, "end": 23, "assertion": "present", "part": "test", "stratum": "hard"},
        {"uid": "a", "start": 25, "end": 34, "assertion": "present", "part": "test", "stratum": "random"},
    ]
    groups = entities.assertion_accuracy(LexiconRecognizer(), sample, [report("a", text)])
    accuracies = {group: row["accuracy"] for group, row in groups.items() if group != "wrong"}
    assert accuracies == {"tune": 1, "tune random": 1, "test": 1 / 3, "test hard": 0.5, "test random": 0}
    assert groups["test"]["number"] == 3 and groups["test"]["denial"] == 2 / 3
    assert [(one["start"], one["said"]) for one in groups["wrong"]] == [(19, "uncertain"), (25, "not found")]
    assert not any("text" in one for one in groups["wrong"])

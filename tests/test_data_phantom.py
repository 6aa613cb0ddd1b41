import io
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from MMCLIP.data import phantom as module
from MMCLIP.data.manifest import FEATURES, check_rows
from MMCLIP.data.phantom import FINDINGS, Finding, contact_sheet, make_phantom, phantom_dataset, write_report
from MMCLIP.data.phantom_chest import Chest
from MMCLIP.data.phantom_findings import DEVICE_SIDES, fill_in


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(3, index, 64) for index in range(300)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_same_arguments_give_the_same_phantom_and_another_index_or_seed_another():
    first, again = make_phantom(1, 2, 64), make_phantom(1, 2, 64)
    assert np.array_equal(first.image, again.image)
    assert (first.report, first.findings, first.present) == (again.report, again.findings, again.present)
    assert not np.array_equal(first.image, make_phantom(1, 3, 64).image)
    assert not np.array_equal(first.image, make_phantom(2, 2, 64).image)


def test_another_size_shows_the_same_patient():
    small, large = make_phantom(1, 5, 64), make_phantom(1, 5, 256)
    assert small.image.shape == (64, 64) and large.image.shape == (256, 256)
    assert (small.findings, small.report) == (large.findings, large.report)
    reduced = large.image.reshape(64, 4, 64, 4).mean((1, 3))
    assert np.corrcoef(reduced.ravel(), small.image.ravel())[0, 1] > 0.98


def test_labels_are_complete_and_prevalences_are_those_of_a_hospital(phantoms):
    for phantom in phantoms:
        assert set(phantom.present) | set(phantom.absent) == set(FINDINGS)
        assert not set(phantom.present) & set(phantom.absent)
        assert sorted(item.name for item in phantom.findings) == phantom.present
        assert len(phantom.findings) <= 4
    for name in FINDINGS:
        assert 0.06 < np.mean([name in phantom.present for phantom in phantoms]) < 0.24
    assert 0.18 < np.mean([not phantom.present for phantom in phantoms]) < 0.32


def test_every_finding_has_a_mask_and_a_normal_chest_has_none(phantoms):
    for phantom in phantoms:
        assert set(phantom.masks) == {(item.name, item.side) for item in phantom.findings}
        for mask in phantom.masks.values():
            assert mask.shape == (64, 64) and mask.dtype == bool
            assert 0 < mask.mean() < 0.5
    assert make_phantom(0, 0, 64, findings=()).masks == {}


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_changes_the_film_where_its_mask_is(name):
    # the same patient with and without: shape and noise come from streams that do not depend on the finding
    gains = []
    for index in range(6):
        ill, well = make_phantom(4, index, 128, [name]), make_phantom(4, index, 128, [])
        mask = np.any(list(ill.masks.values()), axis=0)
        change = np.abs(ill.image.astype(float) - well.image.astype(float))
        gains.append(change[mask].mean() - change[~mask].mean())
    assert np.mean(gains) > 4, gains


@pytest.mark.parametrize("name", ["pneumothorax", "pleural effusion", "mass", "nodule", "consolidation", "atelectasis"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_left_of_the_patient_is_the_right_of_the_image(name, side):
    for index in range(5):
        columns = np.nonzero(make_phantom(0, index, 64, [Finding(name, side)]).masks[name, side])[1]
        assert (columns.mean() > 32) == (side == "left")


def test_fluid_and_consolidation_are_white_and_a_pneumothorax_is_dark():
    def grey(name, severity):
        values = []
        for index in range(8):
            ill = make_phantom(2, index, 96, [Finding(name, "left", severity)])
            well = make_phantom(2, index, 96, [])
            (mask,) = ill.masks.values()
            values.append(float(ill.image[mask].mean()) - float(well.image[mask].mean()))
        return np.mean(values)

    assert grey("pleural effusion", "large") > 40
    assert grey("consolidation", "severe") > 40
    assert grey("pneumothorax", "moderate") < -2


def test_heart_is_over_half_of_the_chest_exactly_when_cardiomegaly_is_present(phantoms):
    def ratio(index, findings):
        patient = np.random.default_rng([3, index, 9])
        chest = Chest(64, fill_in(findings, patient), patient, patient, patient)
        visible = slice(int(60 + chest.level(0.5)) * 2, int(60 + chest.level(1.0)) * 2)
        width = chest.heart_left[visible].max() + chest.heart_right[visible].max()
        return width / (2 * chest.outer[visible].max())

    normal = [ratio(index, []) for index in range(60)]
    others = [ratio(index, ["emphysema", "pneumothorax", "pleural effusion"]) for index in range(60)]
    enlarged = [ratio(index, ["cardiomegaly", "edema"]) for index in range(60)]
    assert 0.36 < min(normal) and max(normal) < 0.5 and max(others) < 0.5
    assert 0.53 < min(enlarged) and max(enlarged) < 0.75


def test_more_severe_findings_take_more_of_the_film():
    for name, low, high in (
        ("pleural effusion", "small", "large"),
        ("pneumothorax", "small", "large"),
        ("consolidation", "mild", "severe"),
        ("mass", "small", "large"),
        ("nodule", "small", "large"),
        ("hiatal hernia", "small", "large"),
        ("cardiomegaly", "mild", "severe"),
        ("pleural thickening", "mild", "severe"),
    ):
        areas = []
        for severity in (low, high):
            made = [make_phantom(6, index, 96, [Finding(name, severity=severity)]) for index in range(8)]
            areas.append(np.mean([sum(mask.sum() for mask in phantom.masks.values()) for phantom in made]))
        assert areas[1] > 1.1 * areas[0], (name, areas)


def test_noise_exposure_and_marker_do_not_depend_on_the_findings():
    # where no patient is, films of one patient with and without findings are the same
    for index in range(12):
        ill = make_phantom(8, index, 64, ["edema", "pleural effusion", "cardiomegaly"]).image
        well = make_phantom(8, index, 64, []).image
        assert np.array_equal(ill[:2, :6], well[:2, :6])
        assert np.array_equal(ill[:2, -6:], well[:2, -6:])


def test_reports_name_each_finding_with_its_side_and_severity(phantoms):
    words = {
        "cardiomegaly": "cardiomegaly|enlarge", "consolidation": "consolidation|airspace", "edema": "edema",
        "emphysema": "emphysema", "hiatal hernia": "hernia|hiatus", "mass": "mass", "nodule": "nodul",
        "atelectasis": "atelectasis|volume loss", "pleural effusion": "effusion|fluid",
        "pleural thickening": "thickening", "pneumothorax": "pneumothorax",
    }  # fmt: skip
    for phantom in phantoms:
        sentences = re.split(r"(?<=\.) ", phantom.report)
        assert 3 <= len(sentences) <= 7, phantom.report
        assert len(set(sentences)) == len(sentences), phantom.report
        for item in phantom.findings:
            if item.name == "support device":
                continue
            denied = r"^(no|there is no|negative)\b"
            named = [s.lower() for s in sentences if re.search(words[item.name], s.lower())]
            named = [s for s in named if not re.match(denied, s)]
            assert named, (item, phantom.report)
            if item.side in ("left", "right"):
                assert any(item.side in s for s in named), (item, phantom.report)


def test_reports_vary_and_deny_some_absent_findings(phantoms):
    reports = [phantom.report for phantom in phantoms]
    assert len(set(reports)) > 290
    assert np.mean(["No " in report or " no " in report or "Negative" in report for report in reports]) > 0.6
    assert "  " not in " ".join(reports) and "{" not in " ".join(reports)
    words = {word for report in reports for word in report.lower().split()}
    assert {"left", "right", "bilateral", "mild", "moderate", "severe", "small", "large"} <= words


def test_an_unaltered_finding_keeps_what_it_was_given_and_draws_the_rest():
    given = Finding("support device", "left", zone="pacemaker")
    assert make_phantom(0, 0, 32, [given]).findings == (given,)
    for kind in DEVICE_SIDES:
        (made,) = make_phantom(0, 1, 32, [Finding("support device", zone=kind)]).findings
        assert made.zone == kind and made.side in DEVICE_SIDES[kind]
    drawn = make_phantom(0, 0, 32, ["consolidation"]).findings[0]
    assert drawn.side and drawn.severity and drawn.zone


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        (["effusions"], "'effusions' cannot be drawn"),
        ([Finding("edema", "left")], "side is 'left'"),
        ([Finding("mass", "left", "mild")], "severity is 'mild'"),
        ([Finding("support device", zone="stent")], "zone is 'stent'"),
        (["mass", Finding("mass", "left")], "given twice"),
        ([Finding("support device", "left", zone="sternal wires")], "side is 'left'"),
    ],
)
def test_a_finding_that_cannot_be_drawn_is_an_error(findings, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(0, 0, 32, findings)


def test_impossible_arguments_are_errors():
    with pytest.raises(ValueError, match="index=-1"):
        make_phantom(0, -1)
    with pytest.raises(ValueError, match="size of at least 16"):
        make_phantom(0, 0, 8)
    with pytest.raises(ValueError, match="num_unpaired=3"):
        phantom_dataset(2, num_unpaired=3)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], "nowhere.png")


def test_dataset_rows_are_manifest_rows_whose_last_ones_have_no_report(cache):
    rows = phantom_dataset(12, size=32, num_unpaired=5, split="train")
    assert rows.features == FEATURES
    check_rows(rows, phantom_dataset(4, size=32, split="val"))
    assert [row["report"] is None for row in rows] == [False] * 7 + [True] * 5
    for row in rows:
        assert len(row["present"]) + len(row["absent"]) == len(FINDINGS)
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert (image.mode, image.size) == ("L", (32, 32))
        for mask in row["masks"]:
            assert mask["finding"] in row["present"]
            pixels = np.asarray(Image.open(io.BytesIO(mask["png"])))
            assert pixels.shape == (32, 32) and pixels.any()


def test_dataset_splits_differ_and_a_longer_dataset_begins_with_the_shorter(cache):
    train, longer = phantom_dataset(4, size=32), phantom_dataset(6, size=32)
    assert train[:4]["report"] == longer[:4]["report"]
    assert train[:4]["image"] == longer[:4]["image"]
    test = phantom_dataset(4, size=32, split="test")
    assert not {bytes(image["bytes"]) for image in train["image"]} & {bytes(image["bytes"]) for image in test["image"]}
    assert not set(train["patient_id"]) & set(test["patient_id"])


def test_dataset_is_drawn_once_and_again_when_an_argument_changes(cache, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "make_phantom", lambda *args: calls.append(args) or make_phantom(*args))
    phantom_dataset(3, size=32)
    assert len(calls) == 3
    phantom_dataset(3, size=32)
    assert len(calls) == 3
    phantom_dataset(3, size=32, seed=1)
    assert len(calls) == 6


def test_two_processes_draw_the_same_rows_in_the_same_order(cache, monkeypatch, tmp_path):
    one = phantom_dataset(120, size=16)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    two = phantom_dataset(120, size=16, num_proc=2)
    assert one["row_id"][:] == two["row_id"][:]
    assert one[119]["image"] == two[119]["image"]


def test_contact_sheet_has_a_tile_for_each_phantom(tmp_path):
    phantoms = [make_phantom(0, index, 64, ["mass"]) for index in range(3)]
    contact_sheet(phantoms, tmp_path / "sheet.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert np.array_equal(sheet[:64, 68:132, 0], phantoms[1].image)
    contact_sheet(phantoms, tmp_path / "masks.png", columns=2, outline_masks=True)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "masks.png")), sheet)


def test_command_line_draws_the_findings_asked_for(tmp_path, capsys):
    module.main(["--num", "2", "--size", "32", "--findings", "edema", "--output", str(tmp_path / "a.png")])
    assert "2 phantoms" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot be drawn"):
        module.main(["--num", "1", "--size", "32", "--findings", "oedema", "--output", str(tmp_path / "b.png")])


def test_report_of_a_normal_chest_denies_nothing_wrongly():
    for seed in range(50):
        report = write_report((), np.random.default_rng(seed))
        assert not re.search("mild|moderate|severe|left|right", report.lower()), report

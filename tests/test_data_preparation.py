"""From sources to shards: what goes in, what is put aside and why, and what a run that was killed leaves behind."""

import csv
import fcntl
import importlib.util
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from MMCLIP.data import preparation
from MMCLIP.data.indexing import PreparationOptions, drawer, is_frontal, write_index
from MMCLIP.data.manifest import make_row
from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.data.preparation import WORK, prepare, prepare_row
from MMCLIP.text.entities import LexiconRecognizer


ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("file", "text", "labels", "patient_id", "view", "split", "source")


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """Smooth noise, another one for each seed, saved by the ending of `path`; returns what was written."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path.read_bytes()


@pytest.fixture
def table(tmp_path):
    """Writes NAME/metadata.csv from dicts, and a picture for each file named `p<seed>.*`; returns the folder."""

    def write(*rows: dict, name: str = "own", columns=COLUMNS) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for row in rows:
            file = row.get("file", "")
            if re.match(r"p\d", file):
                picture(folder / file, int(Path(file).stem[1:]))
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as sink:
            writer = csv.DictWriter(sink, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        return str(folder)

    return write


def rows_of(output_dir) -> dict[str, dict]:
    """row_id -> row, over all shards; a row that is there twice fails here."""
    found = [row for path in sorted(Path(output_dir).glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len({row["row_id"] for row in found}) == len(found)
    return {row["row_id"]: row for row in found}


def quarantine(output_dir) -> list[dict]:
    with (Path(output_dir) / "quarantine.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def contents(output_dir) -> dict[str, bytes]:
    paths = [*Path(output_dir).glob("*/*.parquet"), Path(output_dir) / "quarantine.csv"]
    return {str(path.relative_to(output_dir)): path.read_bytes() for path in paths}


# ------------------------------------------------------------------------------------------------------ what comes out


def test_a_row_keeps_what_the_table_says_and_gets_a_small_grey_image_and_its_entities(table, tmp_path):
    folder = table({"file": "p1.png", "text": "Small left effusion. No mass.", "view": "PA", "split": "test"})
    prepare({"own": folder}, tmp_path / "D", PreparationOptions(shorter_side=15, image_format="png"), num_proc=1)
    (row,) = rows_of(tmp_path / "D").values()
    assert [path.parent.name for path in (tmp_path / "D").glob("*/*.parquet")] == ["test"]
    assert row["row_id"] == "own/p1.png" and row["source"] == "own" and row["report"] == "Small left effusion. No mass."
    assert (row["original_width"], row["original_height"]) == (40, 30)
    assert pixels(row).shape == (15, 20) and pixels(row).dtype == np.uint8
    found = [(row["report"][entity["start"] : entity["end"]], entity["assertion"]) for entity in row["entities"]]
    assert ("effusion", "present") in found and ("mass", "absent") in found


def test_options_choose_the_size_and_the_encoding(table, tmp_path):
    folder = table({"file": "p1.png", "labels": "mass"})
    for name, options, kind, size in (
        ("jpeg", {"shorter_side": 10}, "JPEG", (13, 10)),
        ("png", {"shorter_side": 10, "image_format": "png"}, "PNG", (13, 10)),
        ("larger", {"shorter_side": 500}, "JPEG", (40, 30)),
        ("longer", {"longer_side": 20}, "JPEG", (20, 15)),
        ("coarse", {"shorter_side": 500, "quality": 5}, "JPEG", (40, 30)),
    ):
        prepare({"own": folder}, tmp_path / name, PreparationOptions(**options), num_proc=1)
        (row,) = rows_of(tmp_path / name).values()
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert (image.format, image.mode, image.size) == (kind, "L", size)
    sizes = [len(next(iter(rows_of(tmp_path / name).values()))["image"]["bytes"]) for name in ("larger", "coarse")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(
    "options",
    [
        {"image_format": "gif"},
        {"views": "side"},
        {"shorter_side": 0},
        {"longer_side": -1},
        {"longer_side": 10, "shorter_side": 10},
        {"quality": 101},
        {"val_share": 0.6, "test_share": 0.4},
    ],
)
def test_an_option_that_cannot_be_is_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PreparationOptions(**options)


def test_boxes_and_masks_shrink_with_the_image_and_a_mask_never_vanishes():
    def png(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        return file.getvalue()

    mask = np.zeros((200, 400), dtype=bool)
    mask[20:60, 100:200] = True
    dot = np.zeros((200, 400), dtype=bool)
    dot[7, 9] = True
    row = make_row(
        "a",
        png(np.arange(80000, dtype=np.uint32).reshape(200, 400).astype(np.uint8)),
        source="own",
        present=["mass"],
        masks=[{"finding": "mass", "side": "left", "png": png(m)} for m in (mask, dot)],
        boxes=[{"finding": "mass", "x": 40.0, "y": 20.0, "width": 100.0, "height": 50.0}],
    )
    small = prepare_row(dict(row), LexiconRecognizer(), PreparationOptions(shorter_side=100))
    assert small["boxes"] == [{"finding": "mass", "x": 20.0, "y": 10.0, "width": 50.0, "height": 25.0}]
    first, second = (np.asarray(Image.open(io.BytesIO(item["png"]))) > 0 for item in small["masks"])
    assert first.shape == second.shape == (100, 200)
    assert (first == mask[::2, ::2]).all()
    assert np.argwhere(second).tolist() == [[3, 4]]
    as_it_was = prepare_row(dict(row), LexiconRecognizer(), PreparationOptions(shorter_side=200))
    assert as_it_was["masks"] == row["masks"] and as_it_was["boxes"] == row["boxes"]


def test_phantoms_are_those_of_phantom_dataset_whoever_draws_them(tmp_path):
    options = PreparationOptions(image_format="png", rows_per_shard=3, val_share=0.3)
    given = {"phantom": {"size": "32", "seed": "5", "num_unpaired": "4"}}
    prepare({"phantom": "10"}, tmp_path / "D", options, source_options=given, num_proc=1)
    prepared = rows_of(tmp_path / "D")
    expected = list(phantom_dataset(10, size=32, seed=5, num_unpaired=4))
    assert sorted(prepared) == [row["row_id"] for row in expected]
    for row in expected:
        found = prepared[row["row_id"]]
        assert (pixels(found) == pixels(row)).all()
        assert all(found[name] == row[name] for name in ("report", "present", "absent", "masks", "patient_id", "view"))
    assert sum(row["report"] is None for row in prepared.values()) == 4
    assert {row["split"] for row in prepared.values()} == {"train", "val"}


def test_an_option_of_a_source_is_typed_and_an_unknown_one_is_named(table, tmp_path):
    rows = [{"file": f"p{i}.png", "labels": label, "source": "nih"} for i, label in enumerate(("mass", "edema"))]
    prepare({"own": table(*rows)}, tmp_path / "D", source_options={"own": {"fully_labelled": "nih,other"}}, num_proc=1)
    assert [row["absent"] for row in rows_of(tmp_path / "D").values()] == [["edema"], ["mass"]]
    with pytest.raises(ValueError, match="own knows no option fully; its options are drop_unlabelled, fully_labelled"):
        prepare({"own": table(*rows)}, tmp_path / "E", source_options={"own": {"fully": "nih"}}, num_proc=1)
    with pytest.raises(ValueError, match="phantom.size is 'big', expected int"):
        prepare({"phantom": "3"}, tmp_path / "F", source_options={"phantom": {"size": "big"}}, num_proc=1)
    with pytest.raises(ValueError, match="phantom=many: expected the number"):
        prepare({"phantom": "many"}, tmp_path / "G", num_proc=1)


def test_a_source_that_is_nothing_known_says_what_would_be(tmp_path):
    with pytest.raises(ValueError, match="'nothing' is no public data set known here .*chexpert.*metadata.csv"):
        prepare({"nothing": str(tmp_path / "nowhere")}, tmp_path / "D", num_proc=1)
    with pytest.raises(ValueError, match="name 'a/b' of a source"):
        prepare({"a/b": str(tmp_path)}, tmp_path / "D", num_proc=1)


def test_a_source_whose_name_begins_another_ones_keeps_its_own_shards(table, tmp_path):
    first = table({"file": "p1.png", "labels": "mass"}, {"file": "p2.png", "labels": "mass"}, name="a")
    second = table({"file": "p3.png", "labels": "mass"}, name="a-1")
    prepare({"a": first, "a-1": second}, tmp_path / "D", num_proc=1)
    summary = (tmp_path / "D" / "summary.md").read_text()
    assert "| a | 2 | 0 | 0 |" in summary and "| a-1 | 1 | 0 | 0 |" in summary


# ------------------------------------------------------------------------------------------------- summary and sheets


def test_the_summary_counts_what_is_there(table, tmp_path):
    folder = table(
        {"file": "p1.png", "text": "Left effusion.", "patient_id": "7", "view": "PA", "split": "train"},
        {"file": "p2.png", "text": "Small mass on the left.", "patient_id": "7", "view": "AP", "split": "train"},
        {"file": "p3.png", "labels": "mass;edema", "patient_id": "8", "view": "PA", "split": "val"},
        {"file": "p4.png", "labels": "mass", "split": "test"},
        {"file": "", "text": "Clear lungs.", "split": "train"},
        {"file": "p5.png", "labels": "mass", "view": "LATERAL", "split": "train"},
        {"file": "p6.png", "split": "train"},
        {"file": "missing.png", "labels": "mass", "split": "train"},
    )
    given = {"own": {"fully_labelled": "own"}}
    summary = prepare({"own": folder}, tmp_path / "D", source_options=given, num_proc=1, max_bad_share=0.2).read_text()
    size = sum(path.stat().st_size for path in (tmp_path / "D").glob("*/*.parquet")) / 1e6
    assert (
        f"| own | 3 | 1 | 1 | 4 | 3 | 0 | 0 | {size:.1f} | 1 | 1 view LATERAL, 1 for the reasons in quarantine.csv |"
    ) in summary
    assert "| mass | 2 | 0 | 0 |\n| edema | 1 | 0 | 0 |" in summary
    assert "| own | PA | 2 |\n| own | not known | 2 |\n| own | AP | 1 |" in summary
    assert "| own | 2 | 2 | 2 | 4 | 5 | 5 |" in summary  # of 2, 2 and 5 words


def test_the_contact_sheet_shows_the_pictures(tmp_path):
    prepare({"phantom": "30"}, tmp_path / "D", PreparationOptions(rows_per_shard=7), num_proc=1)
    sheet = np.asarray(Image.open(tmp_path / "D" / "sheet-phantom.png"))
    assert sheet.shape == (4 * (160 + 24), 6 * 160)
    for top in range(0, sheet.shape[0], 184):
        for left in range(0, sheet.shape[1], 160):
            cell = sheet[top : top + 160, left : left + 160]
            assert cell.std() > 30 and cell[16:144, 16:144].mean() > 40
            assert sheet[top + 160 : top + 184, left : left + 160].max() > 200  # the caption


# ------------------------------------------------------------------------------------------------------------ bad input


def test_each_kind_of_bad_row_is_put_aside_with_its_reason_and_the_others_stay(table, tmp_path):
    folder = Path(tmp_path / "own")
    folder.mkdir()
    good = picture(folder / "good.jpg", 3, (400, 300))
    (folder / "truncated.jpg").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.png").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (folder / "wrong-ending.png").write_bytes(picture(folder / "other.jpg", 4))
    table(
        {"file": "good.jpg", "labels": "mass", "row_id": "good"},
        {"file": "wrong-ending.png", "labels": "mass", "row_id": "wrong ending"},
        {"file": "truncated.jpg", "labels": "mass", "row_id": "truncated"},
        {"file": "empty.png", "labels": "mass", "row_id": "empty"},
        {"file": "page.png", "labels": "mass", "row_id": "page"},
        {"file": "missing.png", "labels": "mass", "row_id": "missing"},
        {"file": "p1.png", "labels": "masss", "row_id": "unknown label"},
        {"text": "Mass.", "row_id": "twice"},
        {"text": "No mass.", "row_id": "twice"},
        {"file": "p2.png", "row_id": "nothing said"},
        {"labels": "mass", "row_id": "nothing shown"},
        {"file": "p3.png", "labels": "mass", "patient_id": "7", "split": "train", "row_id": "first"},
        {"file": "p4.png", "labels": "mass", "patient_id": "7", "split": "test", "row_id": "second"},
        columns=(*COLUMNS, "row_id"),
    )
    prepare({"own": str(folder)}, tmp_path / "D", num_proc=1, max_bad_share=1.0)
    assert set(rows_of(tmp_path / "D")) == {"good", "wrong ending", "twice", "first"}
    line = f"{folder / 'metadata.csv'}, line"
    expected = [
        (f"{line} 8", "", "unknown label 'masss'"),
        ("", "twice", "`row_id` occurs twice"),
        (f"{line} 11", "", "left out: the row has neither a text nor labels"),
        (f"{line} 12", "", "neither an image nor a text"),
        (f"{line} 14", "", "patient '7' is in split 'test' here and in 'train'"),
        (f"{folder}/truncated.jpg", "truncated", "truncated"),
        (f"{folder}/empty.png", "empty", "the file is empty"),
        (f"{folder}/page.png", "page", "web page"),
        (f"{folder}/missing.png", "missing", "no such image file"),
    ]
    found = quarantine(tmp_path / "D")
    assert len(found) == len(expected)
    for file, row_id, reason in expected:
        (entry,) = [entry for entry in found if (entry["file"], entry["row_id"]) == (file, row_id)]
        assert reason in entry["reason"] and entry["source"] == "own"


def test_a_table_with_renamed_columns_is_an_error_that_names_them(table, tmp_path):
    folder = table({"picture": "p1.png", "finding": "mass"}, columns=("picture", "finding"))
    with pytest.raises(ValueError, match=r"expected one of the columns .*'file'.*found \['picture', 'finding'\]"):
        prepare({"own": folder}, tmp_path / "D", num_proc=1)


def test_reports_in_latin_1_are_read(tmp_path):
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "a.png", 1)
    (tmp_path / "in" / "a.txt").write_bytes("Größe unverändert. No effusion.".encode("latin-1"))
    prepare({"folder": str(tmp_path / "in")}, tmp_path / "D", num_proc=1)
    assert [row["report"] for row in rows_of(tmp_path / "D").values()] == ["Größe unverändert. No effusion."]
    (tmp_path / "in" / "metadata.csv").write_bytes("file,text\na.png,Größe unverändert.\n".encode("latin-1"))
    prepare({"own": str(tmp_path / "in")}, tmp_path / "E", num_proc=1)
    assert [row["report"] for row in rows_of(tmp_path / "E").values()] == ["Größe unverändert."]


def test_more_bad_files_than_allowed_fail_at_the_end_and_allowing_them_redoes_nothing(table, tmp_path, monkeypatch):
    rows = [{"file": f"p{i}.png", "labels": "mass"} for i in range(8)]
    folder = table(*rows, {"file": "missing1.png", "labels": "mass"}, {"file": "missing2.png", "labels": "mass"})
    with pytest.raises(ValueError, match=r"not fit for training: of own, 2 of 10 rows cannot be used \(at most 19.0%"):
        prepare({"own": folder}, tmp_path / "D", num_proc=1, max_bad_share=0.19)
    assert len(quarantine(tmp_path / "D")) == 2 and not (tmp_path / "D" / "preparation.json").exists()
    monkeypatch.setattr(preparation, "_prepare_chunk", None)
    prepare({"own": folder}, tmp_path / "D", num_proc=1, max_bad_share=0.2)
    assert len(rows_of(tmp_path / "D")) == 8 and (tmp_path / "D" / "preparation.json").exists()


def test_a_table_with_more_bad_rows_than_allowed_fails_before_a_picture_is_read_and_may_be_mended(
    table, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="of own, 1 of 2 rows cannot be used"):
        patch.setattr(preparation, "_prepare_chunk", None)
        prepare(
            {"own": table({"file": "p1.png", "labels": "masss"}, {"file": "p2.png", "labels": "mass"})}, tmp_path / "D"
        )
    assert "masss" in quarantine(tmp_path / "D")[0]["reason"]
    folder = table({"file": "p1.png", "labels": "mass"}, {"file": "p2.png", "labels": "mass"})
    prepare({"own": folder}, tmp_path / "D", num_proc=1)
    assert len(rows_of(tmp_path / "D")) == 2 and not quarantine(tmp_path / "D")


def test_a_file_that_was_mended_is_read_again_on_demand_and_chunks_without_bad_rows_are_not(table, tmp_path):
    rows = [{"file": f"p{i}.png", "labels": "mass"} for i in range(4)]
    folder = Path(table(*rows, {"file": "missing.png", "labels": "mass"}))
    options = PreparationOptions(rows_per_shard=2)
    prepare({"own": str(folder)}, tmp_path / "D", options, num_proc=1, max_bad_share=0.5)
    picture(folder / "missing.png", 9)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "D" / "train").iterdir()}
    prepare({"own": str(folder)}, tmp_path / "D", options, num_proc=1, max_bad_share=0.5)
    assert len(rows_of(tmp_path / "D")) == 4
    prepare({"own": str(folder)}, tmp_path / "D", options, num_proc=1, retry_bad=True)
    assert len(rows_of(tmp_path / "D")) == 5 and not quarantine(tmp_path / "D")
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


# --------------------------------------------------------------------------------------------------------------- splits


def test_rows_without_a_split_are_shared_out_by_patient(table, tmp_path):
    rows = [{"file": f"x{i}.png", "labels": "mass", "patient_id": str(i // 2)} for i in range(2000)]
    folder = table(*rows)

    def splits(seed: int) -> list[str]:
        options = PreparationOptions(val_share=0.2, test_share=0.1, seed=seed)
        write_index(tmp_path / f"index{seed}", "own", folder, options=options)
        return pq.read_table(tmp_path / f"index{seed}" / "index.parquet")["split"].to_pylist()

    first = splits(0)
    assert all(first[i] == first[i + 1] for i in range(0, 2000, 2))
    assert 160 < first.count("val") / 2 < 240 and 70 < first.count("test") / 2 < 130  # of 1000 patients
    assert splits(0) == first and splits(1) != first


def test_a_split_of_the_table_is_kept_under_our_name_and_an_unknown_one_is_an_error(table, tmp_path):
    names = ("train", "validate", "Validation", "valid", "val", "test")
    rows = [{"file": f"x{i}.png", "labels": "mass", "split": name} for i, name in enumerate(names)]
    write_index(tmp_path / "index", "own", table(*rows), options=PreparationOptions(val_share=0.9))
    found = pq.read_table(tmp_path / "index" / "index.parquet")["split"].to_pylist()
    assert found == ["train", "val", "val", "val", "val", "test"]
    with pytest.raises(
        ValueError, match="row 'own/x1.png' has the split 'fold1', expected train, val, test or nothing"
    ):
        write_index(tmp_path / "index", "own", table({"file": "x1.png", "labels": "mass", "split": "fold1"}))


def test_a_patient_in_two_splits_is_an_error_across_tables_before_a_picture_is_read(table, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_prepare_chunk", None)
    row = {"labels": "mass", "patient_id": "7", "source": "hospital"}
    first = table({"file": "p1.png", "split": "train", **row}, name="first")
    second = table({"file": "p2.png", "split": "test", **row}, name="second")
    with pytest.raises(
        ValueError, match="patient '7' of 'hospital' is in two splits, in train with row 'first/p1.png'"
    ):
        prepare({"first": first, "second": second}, tmp_path / "D")
    with pytest.raises(ValueError, match="row 'first/p1.png' is in the sources again and first"):
        prepare({"again": first, "first": first}, tmp_path / "E")


def test_the_same_patient_number_of_another_source_is_another_patient(table, tmp_path):
    row = {"labels": "mass", "patient_id": "7"}
    first = table({"file": "p1.png", "split": "train", **row}, name="first")
    second = table({"file": "p2.png", "split": "test", **row}, name="second")
    prepare({"first": first, "second": second}, tmp_path / "D", num_proc=1)
    assert len(rows_of(tmp_path / "D")) == 2


@pytest.fixture
def copies(table, tmp_path):
    """p2.png of train is the picture of p1.bmp in val and of p3.png in test; p4.png is in train twice."""
    splits = {
        "p1.bmp": "val",
        "p2.png": "train",
        "p3.png": "test",
        "p4.png": "train",
        "p5.png": "train",
        "p6.png": "val",
    }
    folder = Path(table(*({"file": file, "labels": "mass", "split": split} for file, split in splits.items())))
    for name in ("p1.bmp", "p2.png", "p3.png"):
        picture(folder / name, 77)
    picture(folder / "p5.png", 4)
    return str(folder)


def test_the_same_picture_in_two_splits_is_an_error_that_names_both(copies, tmp_path):
    with pytest.raises(
        ValueError, match="2 pictures are in two splits.*'own/p1.bmp' in val: .* own/p3.png of split test"
    ):
        prepare({"own": copies}, tmp_path / "D", num_proc=1)
    assert not (tmp_path / "D" / "preparation.json").exists()


def test_copies_are_dropped_on_demand_and_the_one_in_test_stays(copies, tmp_path):
    options = PreparationOptions(rows_per_shard=2)
    prepare({"own": copies}, tmp_path / "D", options, num_proc=1, duplicates="drop")
    expected = ["own/p3.png", "own/p4.png", "own/p5.png", "own/p6.png"]
    assert sorted(rows_of(tmp_path / "D")) == expected
    dropped = [("own/p1.bmp", "test"), ("own/p2.png", "test")]
    assert sorted((entry["row_id"], entry["reason"][-4:]) for entry in quarantine(tmp_path / "D")) == dropped
    assert "| own | 2 | 1 | 1 | 4 |" in (tmp_path / "D" / "summary.md").read_text()
    prepare({"own": copies}, tmp_path / "D", options, num_proc=1)  # nothing is left to object to
    assert sorted(rows_of(tmp_path / "D")) == expected and len(quarantine(tmp_path / "D")) == 2


def test_an_evaluation_set_known_to_be_inside_a_training_set_is_warned_of(table, tmp_path, caplog):
    first = table({"file": "p1.png", "labels": "mass", "split": "train", "source": "chestxray14"}, name="first")
    second = table({"file": "p2.png", "labels": "mass", "split": "test", "source": "rsna"}, name="second")
    with caplog.at_level(logging.WARNING):
        summary = prepare({"first": first, "second": second}, tmp_path / "D", num_proc=1).read_text()
    assert "Images of rsna are in chestxray14" in caplog.text and "**Warning**: Images of rsna are in" in summary
    caplog.clear()
    prepare({"first": first}, tmp_path / "E", num_proc=1)
    assert "Images of" not in caplog.text


@pytest.mark.parametrize(
    ("view", "frontal"),
    [("PA", True), ("AP Supine", True), ("", True), ("frontal", True), ("AP_horizontal", True), ("LATERAL", False),
     ("LL", False), ("OTHER", False), ("Lateral left", False)],
)  # fmt: skip
def test_frontal_views_are_those_called_so_and_those_not_known(view, frontal):
    assert is_frontal(view) == frontal


def test_other_views_are_left_out_unless_all_are_wanted(table, tmp_path):
    folder = table(*({"file": f"p{i}.png", "labels": "mass", "view": view} for i, view in enumerate(("PA", "LL", ""))))
    prepare({"own": folder}, tmp_path / "D", num_proc=1)
    assert sorted(rows_of(tmp_path / "D")) == ["own/p0.png", "own/p2.png"]
    prepare({"own": folder}, tmp_path / "E", PreparationOptions(views="all"), num_proc=1)
    assert len(rows_of(tmp_path / "E")) == 3
    with pytest.raises(ValueError, match="no row is left to prepare; 1 rows left out: view LL"):
        prepare({"own": table({"file": "p1.png", "labels": "mass", "view": "LL"})}, tmp_path / "F", num_proc=1)


# ------------------------------------------------------------------------------------------------------ runs that go on


def test_other_options_than_those_it_was_begun_with_are_refused_and_the_folder_stays_as_it_is(table, tmp_path):
    folder = table({"file": "p1.png", "labels": "mass"})
    prepare({"own": folder}, tmp_path / "D", num_proc=1)
    before = contents(tmp_path / "D")
    for changed in ({"options": PreparationOptions(shorter_side=100)}, {"source_options": {"own": {}}}):
        with pytest.raises(ValueError, match="begun with other options: (shorter_side was 256, is 100|source_options)"):
            prepare({"own": folder}, tmp_path / "D", **changed)
    with pytest.raises(ValueError, match="sources was"):
        prepare({"own": folder, "phantom": "3"}, tmp_path / "D")
    assert contents(tmp_path / "D") == before and (tmp_path / "D" / "preparation.json").exists()


def test_the_same_source_may_be_named_from_another_folder(table, tmp_path, monkeypatch):
    table({"file": "p1.png", "labels": "mass"})
    monkeypatch.chdir(tmp_path)
    prepare({"own": "own"}, "D", num_proc=1)
    monkeypatch.chdir(tmp_path / "own")
    prepare({"own": "../own/"}, "../D", num_proc=1)


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_goes_on(tmp_path):
    (tmp_path / "D" / WORK).mkdir(parents=True)
    with (tmp_path / "D" / WORK / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is preparing this folder"):
            prepare({"phantom": "2"}, tmp_path / "D", num_proc=1)
    prepare({"phantom": "2"}, tmp_path / "D", num_proc=1)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_ends_at_any_write_goes_on_to_the_same_files(copies, tmp_path, monkeypatch, when):
    sources, options = {"own": copies, "phantom": "3"}, PreparationOptions(rows_per_shard=2)
    given = {"phantom": {"size": "16"}}

    def run(folder):
        prepare(sources, folder, options, source_options=given, num_proc=1, duplicates="drop")

    run(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    replace, killed_at = os.replace, 0
    while True:
        left = killed_at

        def replace_or_die(source, target):
            nonlocal left
            if left == 0 and when == "before":
                raise Killed
            replace(source, target)
            if left == 0:
                raise Killed
            left -= 1

        folder = tmp_path / f"killed{killed_at}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_die)
            try:
                run(folder)
                break  # there was no write number `killed_at`
            except Killed:
                assert when == "after" or not (folder / "preparation.json").exists()
        run(folder)
        assert contents(folder) == whole and not list(folder.rglob("*.tmp")), killed_at
        killed_at += 1
    assert killed_at > 15


def test_a_killed_process_goes_on_with_nothing_lost_or_doubled(table, tmp_path):
    pictures = [{"file": f"p{i}.png", "labels": "mass", "patient_id": str(i)} for i in range(60)]
    texts = [{"text": f"Nodule number {i}, no effusion."} for i in range(1400)]
    sources = {"own": table(*pictures, {"file": "missing.png", "labels": "mass"}, *texts), "phantom": "150"}
    options = PreparationOptions(rows_per_shard=50)
    prepare(sources, tmp_path / "whole", options, num_proc=1)
    whole = contents(tmp_path / "whole")
    num_chunks = len(list((tmp_path / "whole" / WORK).glob("*/chunk-*.json")))
    assert num_chunks == 30 + 3

    folder = tmp_path / "D"
    command = [sys.executable, str(ROOT / "examples" / "prepare_data.py"), "--output_dir", str(folder)]
    command += [f"--source={name}={place}" for name, place in sources.items()] + ["--rows_per_shard", "50"]

    def num_done() -> int:
        return len(list((folder / WORK).glob("*/chunk-*.json")))

    def workers_of(pid: int) -> list[int]:
        return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    for is_time, num_proc in (
        (lambda: (folder / WORK / "own" / "index.parquet.tmp").exists(), 1),
        (lambda: num_done() > 0, 1),
        (lambda: num_done() > num_chunks // 3, 2),
    ):
        process = subprocess.Popen([*command, "--num_proc", str(num_proc)], stderr=subprocess.DEVNULL)
        while not is_time():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.001)
        children = workers_of(process.pid)
        process.kill()
        assert process.wait() == -signal.SIGKILL and (num_proc == 1 or len(children) >= num_proc)
        deadline = time.time() + 10
        while any(Path(f"/proc/{child}").exists() and is_running(child) for child in children):
            assert time.time() < deadline, "a worker outlives the process that started it"
            time.sleep(0.05)
        assert not (folder / "preparation.json").exists()
    assert num_chunks // 3 < num_done() < num_chunks
    prepare(sources, folder, options, num_proc=1)
    assert contents(folder) == whole and not list(folder.rglob("*.tmp"))
    assert len(rows_of(folder)) == 60 + 1400 + 150


def die_at_7(row: dict) -> dict:
    if row["row_id"] == "phantom-0-train-000007":
        os._exit(1)  # as a decoder that crashes does
    return drawer("phantom", "12", {"size": "16"})(row)


@pytest.mark.slow
def test_the_row_at_which_a_worker_died_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "drawer", lambda *source: die_at_7)
    options, given = PreparationOptions(rows_per_shard=4), {"phantom": {"size": "16"}}
    with pytest.raises(RuntimeError, match="died .* at one of the rows .*phantom-0-train-000007"):
        prepare({"phantom": "12"}, tmp_path / "D", options, source_options=given, num_proc=2)
    monkeypatch.undo()
    prepare({"phantom": "12"}, tmp_path / "D", options, source_options=given, num_proc=1)
    assert len(rows_of(tmp_path / "D")) == 12


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# -------------------------------------------------------------------------------------------------- command and scale


def load_script():
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "examples" / "prepare_data.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_command_prepares_and_says_how_to_train_on_it(table, tmp_path, capsys):
    folder = table({"file": "p1.png", "labels": "mass"}, {"file": "missing.png", "labels": "mass"})
    words = [
        "--source",
        f"own={folder}",
        "--output_dir",
        str(tmp_path / "D"),
        "--shorter_side",
        "12",
        "--num_proc",
        "1",
    ]
    with pytest.raises(SystemExit, match="ValueError: .*1 of 2 rows cannot be used"):
        load_script().main(words)
    load_script().main([*words, "--max_bad_share", "0.5"])
    assert f"--train_manifest {tmp_path / 'D'}" in capsys.readouterr().out
    assert [pixels(row).shape for row in rows_of(tmp_path / "D").values()] == [(12, 16)]
    assert json.loads((tmp_path / "D" / "preparation.json").read_text())["options"]["shorter_side"] == 12


@pytest.mark.parametrize(
    "words",
    [["--source", "own"], ["--source", "own=a", "--source", "own=b"], ["--source", "own=a", "--option", "other.x=1"]],
)
def test_a_source_or_option_that_is_not_understood_ends_with_usage(words, capsys):
    with pytest.raises(SystemExit):
        load_script().main([*words, "--output_dir", "D"])
    assert words[-1] in capsys.readouterr().err


@pytest.mark.slow
def test_a_large_table_is_indexed_at_more_than_6300_rows_a_second_in_5_kilobytes_a_row(tmp_path):
    # 377,000 rows in 60 s and 2 GB; a process of its own, since the peak of this one is that of all tests
    num_rows = 40_000
    with (tmp_path / "metadata.csv").open("w", encoding="utf-8") as file:
        file.write("file,text,labels,absent_labels,patient_id,study_id,view,split\n")
        for i in range(num_rows):
            text = f"Film {i}. " + "The lungs are clear, the heart is not enlarged, and there is no effusion. " * 6
            file.write(f'files/p{i // 5}/s{i}/{i:044d}.jpg,"{text}",mass;edema,nodule,{i // 5},{i},PA,train\n')
    code = (
        "import resource, sys, time\nfrom pathlib import Path\n"
        "from MMCLIP.data.indexing import check_indexes, write_index\n"
        "from MMCLIP.data.readers import read_csv_manifest\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "folder, before, start = Path(sys.argv[1]), peak(), time.perf_counter()\n"
        "write_index(folder / 'index', 'own', str(folder))\ncheck_indexes({'own': folder / 'index'})\n"
        "indexed = time.perf_counter()\n"
        "print(len(read_csv_manifest(folder / 'metadata.csv', check_images=False)))\n"
        "print(indexed - start, time.perf_counter() - indexed, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    number, numbers = done.stdout.split("\n")[:2]
    index_seconds, manifest_seconds, size = map(float, numbers.split())
    assert int(number) == num_rows == pq.ParquetFile(tmp_path / "index" / "index.parquet").metadata.num_rows
    assert index_seconds < num_rows / 6300 and manifest_seconds < num_rows / 6300
    assert size < num_rows * 5000


def test_a_mistake_in_the_first_command_does_not_bind_the_folder(table, tmp_path):
    folder = table({"file": "p1.png", "labels": "mass"})
    with pytest.raises(ValueError, match="neither a table"):
        prepare({"own": f"{folder}-misspelt"}, tmp_path / "D", num_proc=1)
    prepare({"own": folder}, tmp_path / "D", num_proc=1)
    assert list(rows_of(tmp_path / "D")) == ["own/p1.png"]

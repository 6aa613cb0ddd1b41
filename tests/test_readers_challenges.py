"""Public sets of challenges, with boxes and masks, each in its official layout, with made-up patients.

A test that is named after a trap is about a known difference between what such a folder looks like and what it holds.
"""

import csv
import json

import numpy as np
import pytest
from public_sets import draw, labels, read, write_table

from MMCLIP.data.manifest import check_rows, rows_to_dataset
from MMCLIP.data.readers import source_rows
from MMCLIP.data.readers.siim import decode_rle
from MMCLIP.data.readers.vindr_cxr import GLOBAL, LOCAL
from MMCLIP.evaluation.grounding import read_mask


# ----------------------------------------------------------------------------------------------------------------- RSNA


def rsna(folder):
    write_table(
        folder / "stage_2_train_labels.csv",
        "patientId,x,y,width,height,Target",
        "a,264.0,152.0,213.0,379.0,1",
        "a,562.0,152.0,256.0,453.0,1",
        "b,,,,,0",
        "c,,,,,0",
    )
    draw(*(folder / "stage_2_train_images" / f"{name}.dcm" for name in "abc"))
    return folder


def test_trap_3_rsna_lines_of_one_film_become_its_boxes(tmp_path):
    rows, problems = read("rsna", rsna(tmp_path))
    check_rows(rows_to_dataset(rows.values()))
    assert list(rows) == ["a", "b", "c"] and problems == []
    assert rows["a"]["boxes"] == [
        {"finding": "pneumonia", "x": 264.0, "y": 152.0, "width": 213.0, "height": 379.0},
        {"finding": "pneumonia", "x": 562.0, "y": 152.0, "width": 256.0, "height": 453.0},
    ]
    assert rows["b"]["boxes"] == []
    # without the detailed classes, a film without pneumonia may show anything else
    assert labels(rows["a"])["present"] == ["pneumonia"]
    assert labels(rows["b"]) == labels(rows["c"]) == {"absent": ["pneumonia"]}


def test_rsna_detailed_classes_tell_normal_films_from_others(tmp_path):
    write_table(
        rsna(tmp_path) / "stage_2_detailed_class_info.csv",
        *("patientId,class", "a,Lung Opacity", "a,Lung Opacity", "b,Normal", "c,No Lung Opacity / Not Normal"),
    )
    rows, _ = read("rsna", tmp_path)
    assert labels(rows["a"]) == {"present": ["pneumonia"], "absent": ["no finding"]}
    assert labels(rows["b"]) == {"present": ["no finding"], "absent": ["pneumonia"]}
    assert labels(rows["c"]) == {"absent": ["pneumonia", "no finding"]}


def test_rsna_contradictions_are_reported(tmp_path):
    write_table(
        rsna(tmp_path) / "stage_2_detailed_class_info.csv",
        *("patientId,class", "a,Normal", "b,Nothing"),
    )
    with (tmp_path / "stage_2_train_labels.csv").open("a") as file:
        file.write("c,1,2,3,4,1\nd,1,2,3,,1\n")
    rows, problems = read("rsna", tmp_path)
    assert "a" not in rows and rows["c"]["boxes"] == []
    assert ["expected one of" in reason for _, reason in problems].count(True) == 1
    assert any("`Target` is 1, but the detailed class is 'Normal'" in reason for _, reason in problems)
    assert any("the same on each line" in reason for _, reason in problems)
    assert any("not four numbers" in reason for _, reason in problems)


def test_rsna_mapping_gives_the_films_of_one_patient_one_number(tmp_path):
    mapping = rsna(tmp_path) / "pneumonia-challenge-dataset-mappings_2018.json"
    films = [("a", "00000013_005.png"), ("b", "00000013_006.png")]
    mapping.write_text(json.dumps([{"subset_img_id": film, "img_id": name} for film, name in films]))
    rows, _ = read("rsna", tmp_path)
    assert [row["patient_id"] for row in rows.values()] == ["13", "13", "c"]
    mapping.write_text("[{}]")
    with pytest.raises(ValueError, match="expected a list of objects with `subset_img_id`"):
        list(source_rows("rsna", tmp_path))


# ----------------------------------------------------------------------------------------------------------------- SIIM


def siim(folder, *lines, header="ImageId, EncodedPixels"):
    write_table(folder / "train-rle.csv", header, *lines)
    for name in {line.split(",")[0] for line in lines}:
        draw(folder / "dicom-images-train" / f"{name}.0" / f"{name}.1" / f"{name}.dcm")
    return folder


def test_trap_1_siim_has_a_blank_in_its_header_and_two_ways_to_say_no_mask(tmp_path):
    for header, none in (("ImageId, EncodedPixels", "-1"), ("ImageId,EncodedPixels", " -1")):
        rows, problems = read("siim", siim(tmp_path, f"1.2,{none}", "1.3,5 2", "1.3,9 1", header=header))
        check_rows(rows_to_dataset(rows.values()))
        assert problems == [] and list(rows) == ["1.2", "1.3"]
        assert labels(rows["1.2"]) == {"absent": ["pneumothorax"]} and rows["1.2"]["masks"] == []
        assert labels(rows["1.3"]) == {"present": ["pneumothorax"]} and len(rows["1.3"]["masks"]) == 1


def test_trap_2_siim_codes_are_relative_run_down_the_columns_and_are_joined(tmp_path):
    # 3 high, 4 wide; pixel 1 and 2, then a gap of 1, then pixel 4: column 0 rows 1, 2 and column 1 row 1
    mask = decode_rle(["1 2 1 1"], (3, 4))
    assert mask.astype(int).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    joined = decode_rle(["1 2 1 1", "2 1 8 1"], (3, 4))
    assert joined.sum() == 4 and joined[2, 3] and joined[1, 0]
    rows, _ = read("siim", siim(tmp_path, "1.3,1024 2", "1.3,0 1"))
    stored = read_mask(rows["1.3"]["masks"][0]["png"])
    assert stored.shape == (1024, 1024) and np.argwhere(stored).tolist() == [[0, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("1 2 3", "pairs of gap and length"),
        ("1 x", "whole numbers"),
        ("1048570 7", "ends at pixel 1048577, the image has 1048576"),
        ("5 -2", "pairs of gap and length"),
        ("", "pairs of gap and length"),
    ],
)
def test_siim_code_that_is_damaged_is_reported(tmp_path, code, reason):
    rows, problems = read("siim", siim(tmp_path, "1.2,-1", f"1.3,{code}"))
    assert list(rows) == ["1.2"] and reason in problems[0][1]


def test_siim_film_that_is_positive_and_negative_is_reported(tmp_path):
    rows, problems = read("siim", siim(tmp_path, "1.2,-1", "1.2,5 2"))
    assert rows == {} and "among 2" in problems[0][1]


def test_trap_12_siim_films_and_not_lines_are_the_rows_that_are_split(tmp_path):
    rows, _ = read("siim", siim(tmp_path, "1.3,5 2", "1.4,-1", "1.3,9 1", "1.3,20 1"))
    assert [(row["patient_id"], row["split"]) for row in rows.values()] == [("1.3", ""), ("1.4", "")]


def test_siim_stage_2_and_the_png_edition_are_read(tmp_path):
    write_table(tmp_path / "2/stage_2_train.csv", "ImageId,EncodedPixels", "ID_1,5 2", "ID_2,-1")
    draw(*(tmp_path / "2/stage_2_images" / f"ID_{n}.dcm" for n in (1, 2)))
    rows, problems = read("siim", tmp_path / "2")
    check_rows(rows_to_dataset(rows.values()))
    assert list(rows) == ["ID_1", "ID_2"] and problems == []

    png = tmp_path / "png"
    write_table(png / "stage_1_train_images.csv", "new_filename,ImageId,has_pneumo", "0_train_0_.png,1.2,0")
    write_table(
        png / "stage_1_test_images.csv", "new_filename,ImageId,has_pneumo", "0_test_1_.png,1.3,1", "1_test_1_.png,1.4,1"
    )
    draw(png / "png_images/0_train_0_.png", png / "png_images/0_test_1_.png", png / "png_masks/0_test_1_.png")
    rows, problems = read("siim", png)
    check_rows(rows_to_dataset(rows.values()))
    assert {name: row["split"] for name, row in rows.items()} == {"0_train_0_": "", "0_test_1_": "test"}
    assert read_mask(rows["0_test_1_"]["masks"][0]["png"]).all()
    assert "png_masks/1_test_1_.png cannot be read" in problems[0][1]


# ---------------------------------------------------------------------------------------------------------------- VinDr


def vindr_line(image, *seen, reader=None):
    assert set(seen) <= {*LOCAL, *GLOBAL}
    values = ["1" if name in seen else "0" for name in (*LOCAL, "Other lesion", *GLOBAL)]
    return [image, *([reader] if reader else []), *values, "0"]


def vindr(folder):
    columns = [*LOCAL, "Other lesion", *GLOBAL]
    box = ["x_min", "y_min", "x_max", "y_max"]
    write_table(
        folder / "annotations/image_labels_train.csv",
        ["image_id", "rad_id", *columns, "Other diseases"],
        vindr_line("a", "Cardiomegaly", "Nodule/Mass", reader="R1"),
        vindr_line("a", "Cardiomegaly", reader="R2"),
        vindr_line("a", "No finding", reader="R3"),
        *(vindr_line("b", "No finding", reader=f"R{n}") for n in (1, 2, 3)),
    )
    write_table(
        folder / "annotations/annotations_train.csv",
        ["image_id", "rad_id", "class_name", *box],
        ["a", "R1", "Cardiomegaly", 10.5, 20, 110.5, 70],
        ["a", "R1", "Other lesion", 1, 2, 3, 4],
        ["b", "R1", "No finding", "", "", "", ""],
    )
    write_table(
        folder / "annotations/image_labels_test.csv",
        ["image_id", *columns, "Other disease"],
        vindr_line("t", "Tuberculosis"),
    )
    write_table(
        folder / "annotations/annotations_test.csv",
        ["image_id", "class_name", *box],
        ["t", "Tuberculosis", 1, 1, 5, 6],
    )
    draw(folder / "train/a.dicom", folder / "train/b.dicom", folder / "test/t.dicom")
    return folder


def test_trap_7_vindr_cxr_tables_of_training_and_test_differ(tmp_path):
    rows, problems = read("vindr-cxr", vindr(tmp_path))
    check_rows(rows_to_dataset(rows.values()))
    assert problems == [] and [row["split"] for row in rows.values()] == ["train", "train", "test"]
    # two of three readers: present; one of three: uncertain
    assert (rows["a"]["present"], rows["a"]["uncertain"]) == (["cardiomegaly"], ["lung lesion"])
    assert rows["b"]["present"] == ["no finding"] and len(rows["b"]["absent"]) == 25
    assert rows["t"]["present"] == ["tuberculosis"] and len(rows["t"]["absent"]) == 24
    assert rows["a"]["boxes"] == [{"finding": "cardiomegaly", "x": 10.5, "y": 20.0, "width": 100.0, "height": 50.0}]
    anyone, _ = read("vindr-cxr", tmp_path, labels="any")
    assert (anyone["a"]["present"], anyone["a"]["uncertain"]) == (["cardiomegaly", "lung lesion"], [])


def test_vindr_cxr_blank_cells_are_zero_and_a_missing_reader_is_reported(tmp_path):
    table = vindr(tmp_path) / "annotations/image_labels_train.csv"
    blank = [cell if cell != "0" else "" for cell in vindr_line("c", "COPD", reader="R1")]
    with table.open("a") as file:
        csv.writer(file).writerows([blank, vindr_line("b", "COPD", reader="R3"), ["d", "R1", *["2"] * 28]])
    rows, problems = read("vindr-cxr", tmp_path)
    assert list(rows) == ["a", "b", "t"] and rows["b"]["present"] == ["no finding"]
    reasons = [reason for _, reason in problems]
    assert "'R3' is there twice" in reasons[0] and "neither 0 nor 1" in reasons[1]
    assert reasons[2] == "1 readers, expected 3"


def test_vindr_cxr_of_kaggle_is_one_table_and_small_pictures_have_no_boxes(tmp_path):
    lines = [f"{image},{name},{n},R{n},{box}" for image, name, n, box in (
        ("a", "Pleural effusion", 1, "10,20,110,70"), ("a", "Pleural effusion", 1, "11,21,31,41"),
        ("a", "Pleural effusion", 2, "10,20,110,70"), ("a", "No finding", 3, ",,,"),
        ("b", "No finding", 1, ",,,"), ("b", "No finding", 2, ",,,"), ("b", "Other lesion", 3, "1,2,3,4"),
    )]  # fmt: skip
    write_table(tmp_path / "train.csv", "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max", *lines)
    rows, problems = read("vindr-cxr", tmp_path)
    assert problems == [] and {row["split"] for row in rows.values()} == {"train"}
    assert rows["a"]["present"] == ["pleural effusion"] and len(rows["a"]["boxes"]) == 3
    assert rows["b"]["present"] == ["no finding"] and rows["b"]["boxes"] == []
    assert rows["a"]["image"]["path"].endswith("train/a.dicom")
    draw(tmp_path / "train/a.png", tmp_path / "train/b.png")
    rows, _ = read("vindr-cxr", tmp_path)
    check_rows(rows_to_dataset(rows.values()))
    assert rows["a"]["boxes"] == []


# --------------------------------------------------------------------------------------------------------------- COVIDx


def test_trap_9_covidx_lists_have_no_header_and_a_misspelt_source(tmp_path):
    (tmp_path / "train_COVIDx9B.txt").write_text("p1 1.png positive cohen\np2 2.jpg negative rnsa\n")
    (tmp_path / "test_COVIDx9B.txt").write_text("p3 3.png negative rsna\n")
    draw(tmp_path / "train/1.png", tmp_path / "train/2.jpg", tmp_path / "test/3.png")
    rows, problems = read("covidx", tmp_path, version="9B")
    check_rows(rows_to_dataset(rows.values()))
    # the first line is a row, too; the collection is the source, as scores are compared within a source
    assert problems == [] and list(rows) == ["train/1.png", "train/2.jpg", "test/3.png"]
    assert [row["source"] for row in rows.values()] == ["covidx-cohen", "covidx-rsna", "covidx-rsna"]
    assert [row["split"] for row in rows.values()] == ["train", "train", "test"]
    assert [labels(row) for row in rows.values()] == [{"present": ["covid-19"]}] + [{"absent": ["covid-19"]}] * 2


def test_covidx_cxr_4_three_classes_and_three_fields_are_read(tmp_path):
    (tmp_path / "train.txt").write_text("1 a.png COVID-19 bimcv\n2 b.png pneumonia\n3 c.png normal\n")
    (tmp_path / "val.txt").write_text("4 d.png negative ricord\n\n")
    rows, problems = read("covidx", tmp_path)
    assert problems == [] and [row["split"] for row in rows.values()] == ["train"] * 3 + ["val"]
    assert labels(rows["train/a.png"]) == {"present": ["covid-19"]}
    assert labels(rows["train/b.png"]) == {"present": ["pneumonia"], "absent": ["covid-19"]}
    assert labels(rows["train/c.png"]) == {"present": ["no finding"], "absent": ["covid-19", "pneumonia"]}
    assert rows["train/b.png"]["source"] == "covidx" and rows["val/d.png"]["source"] == "covidx-ricord"
    assert rows["val/d.png"]["patient_id"] == "4"


def test_covidx_header_line_unknown_class_and_missing_list_are_told(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/train_COVIDx9A.txt").write_text(
        "patient_id filename class source\np a.png flu cohen\np b.png normal\np b.png normal\np c d.png normal rsna x\n"
    )
    rows, problems = read("covidx", tmp_path, version="9A")
    assert list(rows) == ["train/b.png"]
    assert [where.rsplit(" ", 1)[1] for where, _ in problems] == ["1", "2", "4", "5"]
    with pytest.raises(ValueError, match="no train.txt; found train_COVIDx9A.txt. Give `version`"):
        list(source_rows("covidx", tmp_path))

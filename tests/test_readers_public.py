"""Public sets with labels of many findings, each in its official layout, with made-up patients.

A test that is named after a trap is about a known difference between what such a folder looks like and what it holds.
"""

from collections import Counter

import pytest
from public_sets import draw, labels, read, write_table

from MMCLIP.data.manifest import check_rows, rows_to_dataset
from MMCLIP.data.preparation import prepare
from MMCLIP.data.prepared import read_prepared
from MMCLIP.data.readers import LEFT_OUT, SOURCES, source_rows
from MMCLIP.data.readers.chestxray14 import LABELS as NIH_LABELS
from MMCLIP.data.readers.chexpert import LABELS as CHEXPERT_LABELS
from MMCLIP.data.readers.overlaps import known_overlaps
from MMCLIP.data.readers.padchest import parse_labels
from MMCLIP.text.vocabulary import canonical_label


# --------------------------------------------------------------------------------------------------------- all readers


@pytest.mark.parametrize("name", SOURCES)
def test_a_wrong_folder_and_an_unknown_option_are_errors_that_say_what_to_do(name, tmp_path):
    with pytest.raises(ValueError, match="there is no|found none of|there are no"):
        list(source_rows(name, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=f"{name} knows no option colour; its options are"):
        source_rows(name, tmp_path, colour="blue")


def test_an_unknown_data_set_is_an_error_that_names_those_that_are_known():
    with pytest.raises(ValueError, match="no data set 'mimic'; known are chestxray14, chexpert"):
        source_rows("mimic", ".")


def test_trap_11_sets_inside_one_another_are_named():
    (sentence,) = known_overlaps(["chestxray14", "mimic-cxr"], ["rsna", "vindr-cxr", "chestxray14"])
    assert sentence.startswith("Images of rsna are in chestxray14")
    assert len(known_overlaps(["chestxray14"], ["rsna", "siim", "covidx"])) == 3
    assert len(known_overlaps(["rsna", "siim"], ["chestxray14"])) == 2
    public = [name for name in SOURCES if name not in ("mimic-cxr", "padchest", "folder")]
    assert known_overlaps(["mimic-cxr", "padchest"], public) == []
    assert len(known_overlaps({"chestxray14"}, ["covidx-rsna", "covidx-cohen"])) == 1
    assert known_overlaps(["covidx-rsna"], ["covidx-rsna", "covidx"]) == []


# --------------------------------------------------------------------------------------------------------- ChestX-ray14

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def nih_line(image, found, patient, view="PA"):
    return [image, found, 0, patient, 58, "M", view, 2682, 2749, 0.143, 0.143]


def chestxray14(folder, *lines):
    lines = lines or (
        nih_line("00000001_000.png", "Cardiomegaly|Effusion", 1),
        nih_line("00000002_000.png", "No Finding", 2, "AP"),
        nih_line("00000003_000.png", "Pleural_Thickening|Infiltration", 3),
    )
    write_table(folder / "Data_Entry_2017_v2020.csv", NIH_HEADER, *lines)
    (folder / "train_val_list.txt").write_text("00000001_000.png\n00000002_000.png\n")
    (folder / "test_list.txt").write_text("00000003_000.png")
    write_table(
        folder / "BBox_List_2017.csv",
        "Image Index,Finding Label,Bbox [x,y,w,h],,,",
        "00000003_000.png,Infiltrate,225.08,547.02,86.78,79.19,,,",
        "00000001_000.png,Cardiomegaly,1.5,2.5,3,4",
    )
    return folder


@pytest.mark.parametrize("place", ["images_001/images", "images"])
def test_chestxray14_has_complete_labels_the_official_split_views_and_patients(tmp_path, place):
    chestxray14(tmp_path)
    draw(*(tmp_path / place / f"0000000{n}_000.png" for n in (1, 2, 3)))
    rows, problems = read("chestxray14", tmp_path, val_share=0.0)
    assert problems == []
    check_rows(rows_to_dataset(rows.values()))
    first, second, third = rows.values()
    assert first["present"] == ["cardiomegaly", "pleural effusion"] and len(first["absent"]) == 12
    assert second["present"] == ["no finding"]
    assert second["absent"] == [canonical_label(name) for name in NIH_LABELS]
    assert [row["split"] for row in rows.values()] == ["train", "train", "test"]
    assert [(row["patient_id"], row["view"]) for row in rows.values()] == [("1", "PA"), ("2", "AP"), ("3", "PA")]
    assert first["image"]["path"] == str(tmp_path / place / "00000001_000.png")
    assert (first["report"], first["source"]) == (None, "chestxray14")


def test_trap_4_headers_of_chestxray14_that_hold_a_comma_are_read(tmp_path):
    rows, problems = read("chestxray14", chestxray14(tmp_path))
    assert len(rows) == 3 and problems == []
    # the older table, and a gzip of it, are read as well
    table = tmp_path / "Data_Entry_2017_v2020.csv"
    table.rename(tmp_path / "Data_Entry_2017.csv")
    assert list(read("chestxray14", tmp_path)[0]) == list(rows)


def test_trap_5_chestxray14_spellings_become_the_canonical_ones(tmp_path):
    rows, _ = read("chestxray14", chestxray14(tmp_path))
    assert rows["00000003_000.png"]["present"] == ["pleural thickening", "infiltration"]
    assert rows["00000003_000.png"]["boxes"] == [
        {"finding": "infiltration", "x": 225.08, "y": 547.02, "width": 86.78, "height": 79.19}
    ]
    assert rows["00000001_000.png"]["boxes"][0]["finding"] == "cardiomegaly"
    assert rows["00000001_000.png"]["present"][1] == "pleural effusion"


def test_chestxray14_validation_is_a_share_of_the_patients_and_the_same_every_time(tmp_path):
    lines = [nih_line(f"{p:08d}_{n:03d}.png", "Mass", p) for p in range(1, 401) for n in range(2)]
    chestxray14(tmp_path, *lines)
    (tmp_path / "train_val_list.txt").write_text("\n".join(line[0] for line in lines))
    rows, _ = read("chestxray14", tmp_path, val_share=0.25)
    of_patient = {}
    for row in rows.values():
        if row["split"] != "test":
            of_patient.setdefault(row["patient_id"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in of_patient.values())
    assert 75 <= Counter(next(iter(splits)) for splits in of_patient.values())["val"] <= 125
    assert read("chestxray14", tmp_path, val_share=0.25)[0] == rows


def test_chestxray14_names_file_and_line_of_what_is_wrong(tmp_path):
    chestxray14(
        tmp_path,
        nih_line("00000001_000.png", "Mass", 1),
        nih_line("00000001_000.png", "Mass", 1),
        nih_line("00000002_000.png", "Masss", 2),
        nih_line("00000003_000.png", "No Finding|Mass", 3),
        nih_line("00000009_000.png", "Mass", 9),
        "00000003_000.png,Mass,0",
        nih_line("00000003_000.png", "Mass", 3) + ["and more"],
    )
    rows, problems = read("chestxray14", tmp_path)
    assert list(rows) == ["00000001_000.png"]
    table = tmp_path / "Data_Entry_2017_v2020.csv"
    assert [where for where, _ in problems] == [f"{table}, line {line}" for line in range(3, 9)]
    for (_, reason), expected in zip(
        problems,
        ["occurs twice", "unknown label 'Masss'", "'no finding' is present together with ['mass']",
         "in neither test_list.txt nor train_val_list.txt", "3 fields, but the header has 11", "12 fields"],
        strict=True,
    ):  # fmt: skip
        assert expected in reason
    with pytest.raises(ValueError, match="line 3: image '00000001_000.png' occurs twice"):
        list(source_rows("chestxray14", tmp_path))


def test_preparation_takes_a_public_set_with_options_of_its_reader(tmp_path):
    chestxray14(tmp_path / "nih")
    draw(*(tmp_path / "nih/images" / f"0000000{n}_000.png" for n in (1, 2, 3)))
    options = {"chestxray14": {"val_share": "0.999999"}}  # as text, as from a command line
    prepare({"chestxray14": str(tmp_path / "nih")}, tmp_path / "out", source_options=options, num_proc=1)
    splits = {row["row_id"]: row["split"] for row in read_prepared(tmp_path / "out")}
    assert list(splits.values()).count("val") == 2 and splits["chestxray14/00000003_000.png"] == "test"
    with pytest.raises(ValueError, match="chestxray14.val_share is 'many', expected float"):
        options = {"chestxray14": {"val_share": "many"}}
        prepare({"chestxray14": str(tmp_path / "nih")}, tmp_path / "other", source_options=options, num_proc=1)


def test_chestxray14_without_its_test_list_is_an_error(tmp_path):
    (chestxray14(tmp_path) / "test_list.txt").unlink()
    with pytest.raises(ValueError, match="found none of test_list.txt"):
        list(source_rows("chestxray14", tmp_path))


def test_renamed_column_is_an_error_that_lists_those_that_are_there(tmp_path):
    table = chestxray14(tmp_path) / "Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text().replace("Patient ID", "Patient No"))
    with pytest.raises(ValueError, match="no column 'Patient ID'; the header has Image Index, .*Patient No"):
        list(source_rows("chestxray14", tmp_path))


# ------------------------------------------------------------------------------------------------------------- CheXpert

CHEXPERT_HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_LABELS]


def chexpert_line(path, kind="Frontal", view="AP", **stated):
    values = [stated.pop(name.replace(" ", "_"), "") for name in CHEXPERT_LABELS]
    assert not stated
    return [path, "Female", 61, kind, view, *values]


def chexpert(folder, *lines, small="-small"):
    name = f"CheXpert-v1.0{small}"
    lines = lines or (
        chexpert_line(
            f"{name}/train/patient00001/study1/view1_frontal.jpg",
            Edema="1.0", Pneumonia="-1.0", Fracture="0.0", Support_Devices="1.0",
        ),
        chexpert_line(
            f"{name}/train/patient00001/study1/view2_lateral.jpg", "Lateral", "",
            No_Finding="1.0", Support_Devices="1.0",
        ),
        chexpert_line(f"{name}/train/patient00002/study3/view1_frontal.jpg", view="LL", No_Finding="1.0"),
        chexpert_line(f"{name}/train/patient00003/study1/view1_frontal.jpg"),
        chexpert_line(f"{name}/train/patient00003/study2/view1_frontal.jpg", Edema="-1.0"),
    )  # fmt: skip
    write_table(folder / "train.csv", CHEXPERT_HEADER, *lines)
    none = dict.fromkeys([label.replace(" ", "_") for label in CHEXPERT_LABELS], "0.0")
    write_table(
        folder / "valid.csv",
        CHEXPERT_HEADER,
        chexpert_line(f"{name}/valid/patient64541/study1/view1_frontal.jpg", view="PA", **none),
    )
    return folder


def test_chexpert_keeps_present_absent_uncertain_and_not_mentioned_apart(tmp_path):
    rows, problems = read("chexpert", chexpert(tmp_path))
    first = rows["train/patient00001/study1/view1_frontal.jpg"]
    assert labels(first) == {
        "present": ["edema", "support device"], "absent": ["fracture"], "uncertain": ["pneumonia"]
    }  # fmt: skip
    assert (first["patient_id"], first["study_id"], first["view"]) == ("patient00001", "patient00001/study1", "AP")
    # "No Finding" with a device is about what else is there; a frontal film stays one whatever LL says
    assert rows["train/patient00001/study1/view2_lateral.jpg"]["present"] == ["support device"]
    assert rows["train/patient00001/study1/view2_lateral.jpg"]["view"] == "LATERAL"
    assert labels(rows["train/patient00002/study3/view1_frontal.jpg"]) == {"present": ["no finding"]}
    assert rows["train/patient00002/study3/view1_frontal.jpg"]["view"] == ""
    assert [reason for _, reason in problems] == [LEFT_OUT + "no label", LEFT_OUT + "no label is certain"]
    valid = rows["valid/patient64541/study1/view1_frontal.jpg"]
    assert (valid["split"], valid["view"], len(valid["absent"]), valid["present"]) == ("val", "PA", 14, [])
    assert {row["split"] for name, row in rows.items() if name.startswith("train")} == {"train"}
    # what is left out on purpose raises nothing
    assert len(list(source_rows("chexpert", tmp_path))) == len(rows)


@pytest.mark.parametrize("small", ["", "-small"])
def test_chexpert_images_are_found_under_every_name_of_the_folder(tmp_path, small):
    chexpert(tmp_path, small=small)
    train = ["patient00001/study1/view1_frontal.jpg", "patient00001/study1/view2_lateral.jpg"]
    draw(*(tmp_path / "train" / name for name in (*train, "patient00002/study3/view1_frontal.jpg")))
    draw(tmp_path / "valid" / "patient64541/study1/view1_frontal.jpg")
    check_rows(rows_to_dataset(read("chexpert", tmp_path)[0].values()))


def test_chexpert_batches_as_they_are_downloaded_are_read(tmp_path):
    first = tmp_path / "CheXpert-v1.0 batch 1 (validate & csv)"
    chexpert(first, small="")
    draw(first / "valid/patient64541/study1/view1_frontal.jpg")
    draw(tmp_path / "CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg")
    draw(tmp_path / "CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view2_lateral.jpg")
    draw(tmp_path / "CheXpert-v1.0 batch 4 (train 3)/patient00002/study3/view1_frontal.jpg")
    rows, _ = read("chexpert", tmp_path)
    assert len(rows) == 4
    check_rows(rows_to_dataset(rows.values()))


def test_chexlocalize_has_no_view_columns_and_calls_the_validation_folder_val(tmp_path):
    header = ["Path", *CHEXPERT_LABELS]
    zeros = ["1.0", *["0.0"] * 13]
    write_table(
        tmp_path / "val_labels.csv", header, ["CheXpert-v1.0/valid/patient64541/study1/view1_frontal.jpg", *zeros]
    )
    write_table(
        tmp_path / "test_labels.csv",
        header,
        ["CheXpert-v1.0/test/patient64741/study1/view1_frontal.jpg", *zeros],
        ["CheXpert-v1.0/test/patient64741/study1/view2_lateral.jpg", *zeros],
    )
    draw(tmp_path / "val/patient64541/study1/view1_frontal.jpg")
    draw(*(tmp_path / "test/patient64741/study1" / name for name in ("view1_frontal.jpg", "view2_lateral.jpg")))
    rows, problems = read("chexpert", tmp_path)
    check_rows(rows_to_dataset(rows.values()))
    assert problems == []
    assert [(row["split"], row["view"]) for row in rows.values()] == [("val", ""), ("test", ""), ("test", "LATERAL")]


def chexpert_with_candidates(folder):
    """210 candidates of each class, two of each patient."""
    lines = []
    for number, name in enumerate(["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural_Effusion"]):
        for film in range(210):
            path = f"CheXpert-v1.0/train/patient{number * 200 + film // 2:05d}/study{film % 2 + 1}/view1_frontal.jpg"
            lines.append(chexpert_line(path, **{name: "1.0"}, Pneumothorax="0.0"))
    lines += [  # none of these is a candidate
        chexpert_line("CheXpert-v1.0/train/patient90001/study1/view1_frontal.jpg", Edema="1.0", Lung_Lesion="-1.0"),
        chexpert_line("CheXpert-v1.0/train/patient90002/study1/view1_frontal.jpg", Edema="1.0", Support_Devices="1.0"),
        chexpert_line("CheXpert-v1.0/train/patient90003/study1/view1_lateral.jpg", "Lateral", "", Edema="1.0"),
    ]
    return chexpert(folder, *lines, small="")


def test_chexpert_5x200_becomes_the_test_part_and_its_patients_leave_the_training_part(tmp_path):
    write_table(  # the official test set is not read beside it
        chexpert_with_candidates(tmp_path) / "test_labels.csv",
        ["Path", *CHEXPERT_LABELS],
        ["CheXpert-v1.0/test/patient64741/study1/view1_frontal.jpg", *["0.0"] * 14],
    )
    rows, problems = read("chexpert", tmp_path, selection="5x200")
    test = [row for row in rows.values() if row["split"] == "test"]
    five = ["atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion"]
    assert Counter(row["present"][0] for row in test) == dict.fromkeys(five, 200)
    assert all(sorted([*row["present"], *row["absent"]]) == sorted([*five, "pneumothorax"]) for row in test)
    train = {row["patient_id"] for row in rows.values() if row["split"] == "train"}
    assert {"patient90001", "patient90002", "patient90003"} <= train
    assert not train & {row["patient_id"] for row in test}
    assert all("is in the selected test set" in reason for _, reason in problems)
    assert len(rows) + len(problems) == 1050 + 3 + 1
    # the same films on any machine
    assert read("chexpert", tmp_path, selection="5x200")[0] == rows


def test_chexpert_selection_of_another_author_is_read_from_a_list(tmp_path):
    chexpert_with_candidates(tmp_path)
    listed = write_table(
        tmp_path / "chexpert_5x200.csv",
        ["Path", "Report Impression"],
        ["CheXpert-v1.0/train/patient00000/study2/view1_frontal.jpg", "made up"],
    )
    rows, problems = read("chexpert", tmp_path, selection=str(listed))
    assert [name for name, row in rows.items() if row["split"] == "test"] == [
        "train/patient00000/study2/view1_frontal.jpg"
    ]
    assert "train/patient00000/study1/view1_frontal.jpg" not in rows and len(problems) == 1
    write_table(listed, ["Path"], ["CheXpert-v1.0/train/patient77777/study1/view1_frontal.jpg"])
    with pytest.raises(ValueError, match="1 of 1 films are not in train.csv, as 'train/patient77777"):
        list(source_rows("chexpert", tmp_path, selection=str(listed)))
    write_table(listed, ["Path"], ["somewhere.jpg"])
    with pytest.raises(ValueError, match="line 2: `Path` 'somewhere.jpg' is not"):
        list(source_rows("chexpert", tmp_path, selection=str(listed)))


def test_chexpert_5x200_of_an_incomplete_table_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="needs 200 films of each class, but there are 0 of 'Atelectasis'"):
        list(source_rows("chexpert", chexpert(tmp_path), selection="5x200"))


def test_chexpert_value_that_is_no_statement_and_a_strange_path_are_reported(tmp_path):
    path = "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"
    chexpert(
        tmp_path,
        chexpert_line(path, Edema="1.0"),
        chexpert_line(path, Edema="1.0"),
        chexpert_line("CheXpert-v1.0/train/patient00002/study1/view1_frontal.jpg", Edema="maybe"),
        chexpert_line("film.jpg", Edema="1.0"),
    )
    rows, problems = read("chexpert", tmp_path)
    assert len(rows) == 2
    twice, value, strange = [reason for _, reason in problems]
    assert "occurs twice" in twice and "'Edema' holds 'maybe'" in value and "'film.jpg' is not" in strange


# ------------------------------------------------------------------------------------------------------------- PadChest

PADCHEST_COLUMNS = ["", "ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Report", "MethodLabel", "Labels"]


def padchest(folder, *lines):
    lines = [[number, *line[:5], "sin hallazg .", *line[5:]] for number, line in enumerate(lines)]
    write_table(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", PADCHEST_COLUMNS, *lines)
    return folder


def test_padchest_is_unpaired_and_the_physicians_films_are_the_test_part(tmp_path):
    padchest(
        tmp_path,
        ["a.png", 0, "s1", "p1", "PA", "Physician", "['normal']"],
        ["b.png", 54, "s2", "p1", "L", "RNN_model", "['cardiomegaly']"],
        ["c.png", 7, "s3", "p2", "AP_horizontal", "RNN_model", "['NSG tube', 'infiltrates']"],
        ["d.png", 7, "s3", "p2", "COSTAL", "RNN_model", "['rib fracture']"],
        ["e.png", 7, "s4", "p3", "UNK", "RNN_model", "['scoliosis']"],
    )
    draw(tmp_path / "0/a.png", tmp_path / "54/b.png", *(tmp_path / "7" / f"{n}.png" for n in "cde"))
    rows, problems = read("padchest", tmp_path)
    check_rows(rows_to_dataset(rows.values()))
    assert {name: (row["split"], row["view"]) for name, row in rows.items()} == {
        "a.png": ("test", "PA"), "c.png": ("", "AP"), "d.png": ("", "OTHER"), "e.png": ("", "")
    }  # fmt: skip
    assert labels(rows["a.png"]) == {"present": ["no finding"]}
    assert labels(rows["c.png"]) == {"present": ["nasogastric tube", "infiltration"]}
    assert (rows["c.png"]["patient_id"], rows["c.png"]["study_id"], rows["c.png"]["report"]) == ("p2", "s3", None)
    assert [reason for _, reason in problems] == [
        LEFT_OUT + "another film of this patient is in the test part (labelled by a physician)"
    ]
    everything, problems = read("padchest", tmp_path, test="none")
    assert len(everything) == 5 and problems == [] and {row["split"] for row in everything.values()} == {""}
    assert list(read("padchest", tmp_path, method="physician")[0]) == ["a.png"]


def test_trap_8_labels_of_padchest_are_lists_in_text_with_blanks_missing_rows_and_pseudo_labels(tmp_path):
    assert parse_labels("['normal', ' pneumonia', '']") == ["normal", "pneumonia", ""]
    assert parse_labels("normal") is None and parse_labels("[1]") is None and parse_labels("['a'") is None
    film = ["s", "p", "PA", "RNN_model"]
    padchest(
        tmp_path,
        ["1.png", 0, *film, "[' pneumonia', 'pneumonia', '']"],
        ["2.png", 0, *film, "nan"],
        ["3.png", 0, *film, ""],
        ["4.png", 0, *film, "['unchanged', '']"],
        ["5.png", 0, *film, "['suboptimal study', 'normal']"],
        ["6.png", 0, *film, "['exclude', 'cardiomegaly']"],
        ["7.png", 0, *film, "['']"],
        ["8.png", 0, *film, "['normal', 'kyphosis']"],
        ["9.png", 0, *film, "['sunshine']"],
        ["10.png", 0, *film, "pneumonia"],
        ["1.png", 0, *film, "['normal']"],
    )
    rows, problems = read("padchest", tmp_path)
    assert {name: row["present"] for name, row in rows.items()} == {
        "1.png": ["pneumonia"], "5.png": ["no finding"], "8.png": ["kyphosis"]
    }  # fmt: skip
    reasons = [reason for _, reason in problems]
    assert reasons[:2] == [LEFT_OUT + "no labels"] * 2
    nothing = LEFT_OUT + "no label that says what the film shows: "
    assert reasons[2:5] == [nothing + "unchanged", nothing + "exclude, cardiomegaly", nothing + "none at all"]
    assert "unknown label 'sunshine'" in reasons[5] and "expected a list such as" in reasons[6]
    assert "'1.png' occurs twice" in reasons[7]


def test_padchest_names_that_only_suggest_a_finding_make_it_uncertain(tmp_path):
    film = ["s", "p", "PA", "RNN_model"]
    padchest(
        tmp_path,
        ["1.png", 0, *film, "['costophrenic angle blunting']"],
        ["2.png", 0, *film, "['alveolar pattern', 'consolidation']"],
        ["3.png", 0, *film, "['volume loss']"],
        ["4.png", 0, *film, "['bone metastasis']"],
        ["5.png", 0, *film, "['respiratory distress']"],
    )
    rows, problems = read("padchest", tmp_path)
    assert labels(rows["1.png"]) == {"present": ["costophrenic angle blunting"], "uncertain": ["pleural effusion"]}
    assert labels(rows["2.png"]) == {"present": ["lung opacity", "consolidation"]}
    assert labels(rows["3.png"]) == {"present": ["volume loss"], "uncertain": ["atelectasis"]}
    assert labels(rows["4.png"]) == {"present": ["bone metastasis"]}
    assert [reason for _, reason in problems] == [LEFT_OUT + "no label that is certain: respiratory distress"]

import json
import logging
from pathlib import Path

import pandas
import pytest
from PIL import Image

from MMCLIP.data.manifest import FEATURES, check_rows
from MMCLIP.data.readers import read_csv_manifest


SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "cxr-mini" / "metadata.csv"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png", "3.png"):
        Image.new("L", (4, 4)).save(tmp_path / "images" / name)
    return tmp_path


def write(folder, text, name="rows.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_row_has_the_columns_of_the_table(folder):
    path = write(
        folder,
        "file,text,labels,absent_labels,patient_id,view,split,source,license\n"
        'images/1.png,"Small  effusion, ""left"".\nStable.",Effusion;Mass,hernia,p1,PA,train,here,CC0\n'
        "images/2.png,,no finding,,p2,AP,test,here,CC0\n"
        ",Clear lungs.,,,p3,,train,,\n",
    )
    rows = read_csv_manifest(path)
    check_rows(rows)
    assert rows.features == FEATURES
    first, second, third = rows
    assert first["image"] == {"path": (folder / "images/1.png").as_posix(), "bytes": None}
    assert first["report"] == 'Small effusion, "left". Stable.'
    assert (first["present"], first["absent"]) == (["pleural effusion", "mass"], ["hiatal hernia"])
    assert [first[name] for name in ("patient_id", "view", "split", "source")] == ["p1", "PA", "train", "here"]
    assert (second["report"], second["present"], second["absent"]) == (None, ["no finding"], [])
    assert (third["image"], third["report"]) == (None, "Clear lungs.")
    assert len({row["row_id"] for row in rows}) == 3


def test_every_file_type_gives_the_same_rows(folder):
    records = [
        {"path": "images/1.png", "report": "No mass.", "labels": "edema;mass"},
        {"path": "images/2.png", "report": None, "labels": "nodule"},
    ]
    frame = pandas.DataFrame(records)
    frame.to_csv(folder / "rows.csv", index=False)
    frame.to_csv(folder / "rows.tsv", index=False, sep="\t")
    frame.to_parquet(folder / "rows.parquet")
    write(folder, "\n".join(json.dumps(record) for record in records) + "\n", "rows.jsonl")
    lists = [{**record, "labels": record["labels"].split(";")} for record in records]
    write(folder, "\n".join(json.dumps(record) for record in lists), "lists.jsonl")
    first, *others = [
        read_csv_manifest(folder / name).to_list()
        for name in ("rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl", "lists.jsonl")
    ]
    assert first[0]["present"] == ["edema", "mass"] and first[1]["report"] is None
    assert all(other == first for other in others)


def test_split_keeps_its_rows_and_an_unknown_one_is_an_error(folder):
    path = write(folder, "file,labels,split\nimages/1.png,mass,train\nimages/2.png,mass,test\n")
    assert [row["row_id"][-5:] for row in read_csv_manifest(path, split="test")] == ["2.png"]
    with pytest.raises(ValueError, match="no row has split 'validation'.*'train': 1, 'test': 1"):
        read_csv_manifest(path, split="validation")


def test_unlabelled_row_is_an_error_that_names_its_line_or_is_left_out_with_one_warning(folder, caplog):
    path = write(folder, 'file,text,labels\nimages/1.png,"two\nlines",\nimages/2.png,,\nimages/3.png, ,\n')
    with pytest.raises(ValueError, match="2 of 3 rows have neither text nor labels, the first on line 4"):
        read_csv_manifest(path)
    with caplog.at_level(logging.WARNING):
        assert len(read_csv_manifest(path, drop_unlabelled=True)) == 1
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == [
        "left out 2 of 3 rows with neither text nor labels."
    ]


def test_fully_labelled_source_makes_unlisted_labels_absent(folder):
    path = write(
        folder,
        "file,labels,source,split\n"
        "images/1.png,no finding,nih,train\n"
        "images/2.png,covid-19;mass,nih,train\n"
        "images/3.png,pneumonia,nih,test\n"
        "images/3.png,edema,other,test\n",
    )
    assert all(row["absent"] == [] for row in read_csv_manifest(path))
    normal, covid, pneumonia, other = read_csv_manifest(path, fully_labelled=("nih",))
    assert normal["absent"] == ["covid-19", "mass", "pneumonia"]
    assert covid["absent"] == ["no finding"]  # covid-19 is a pneumonia
    assert pneumonia["absent"] == ["covid-19", "mass", "no finding"]
    assert other["absent"] == []
    # the labels a source uses do not depend on the split that is kept
    assert read_csv_manifest(path, split="train", fully_labelled=("nih",))[0]["absent"] == normal["absent"]


def test_fully_labelled_source_without_rows_is_warned_of(folder, caplog):
    path = write(folder, "file,labels,source\nimages/1.png,mass,nih\n")
    with caplog.at_level(logging.WARNING):
        read_csv_manifest(path, fully_labelled=("nhi",))
    assert "'nhi', of which there is no row" in caplog.text


def test_rows_that_share_an_image_get_ids_of_their_own(folder):
    path = write(folder, "file,text\nimages/1.png,No mass.\nimages/1.png,Mass.\n")
    rows = read_csv_manifest(path)
    check_rows(rows)
    assert [row["row_id"].rsplit("#")[-1] for row in rows] == ["2", "3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,labels\nimages/1.png,masss\n", "rows.csv, line 2: unknown label 'masss'"),
        ("file,labels\nimages/9.png,mass\n", "1 of 1 image files do not exist, the first on line 2"),
        ("file,labels,absent_labels\nimages/1.png,mass,Mass\n", "line 2: 'mass' is both present and absent"),
        ("file,labels\n,mass\n", "line 2: the row has neither an image nor a text"),
        ("file,image,labels\na,b,mass\n", r"\['file', 'image'\] mean the same"),
        ("picture,labels\na,mass\n", "expected one of the columns .*'file'.*found \\['picture', 'labels'\\]"),
        ("file,view\na,PA\n", "expected one of the columns .*'labels'"),
        ("file,labels\nimages/1.png,mass,edema\n", "line 2: the row has another number of fields"),
        ("file,labels\nimages/1.png\n", "line 2: the row has another number of fields"),
        ("file,labels\n", "has no rows"),
        ("", "has no rows"),
        ("file,labels,labels\nimages/1.png,mass,edema\n", r"names \['labels'\] more than once"),
        (
            "file,labels,patient_id,split\nimages/1.png,mass,p,train\nimages/2.png,mass,p,test\n",
            "line 3: patient 'p' is in split 'test' here and in 'train' on line 2",
        ),
    ],
)
def test_mistake_in_a_table_names_file_and_line(folder, text, message):
    with pytest.raises(ValueError, match=message):
        read_csv_manifest(write(folder, text))


def test_missing_table_broken_json_and_unknown_type_are_errors(folder):
    with pytest.raises(ValueError, match="nothing.csv: the manifest file does not exist"):
        read_csv_manifest(folder / "nothing.csv")
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        read_csv_manifest(write(folder, '{"file": "images/1.png", "labels": "mass"}\n{"file"\n', "rows.jsonl"))
    with pytest.raises(ValueError, match="'.xlsx'; expected .csv"):
        read_csv_manifest(write(folder, "x", "rows.xlsx"))


def test_lines_that_are_not_utf8_are_read_as_windows_1252(folder):
    lines = "file,text\nimages/1.png,Ödem\n".encode() + "images/2.png,Größe unverändert\n".encode("cp1252")
    (folder / "mixed.csv").write_bytes(lines)
    assert read_csv_manifest(folder / "mixed.csv")["report"][:] == ["Ödem", "Größe unverändert"]


def test_a_row_with_another_number_of_fields_is_left_out_where_problems_are_reported(folder):
    path = write(folder, "file,text\nimages/1.png,No mass.,x\nimages/2.png,Mass.\nimages/3.png\n")
    problems = []
    rows = read_csv_manifest(path, report_problem=lambda where, reason: problems.append((where, reason)))
    assert rows["report"][:] == ["Mass."]
    assert [where.rpartition(" ")[2] for where, _ in problems] == ["2", "4"]
    assert all("another number of fields than the header's 2" in reason for _, reason in problems)


@pytest.mark.skipif(not SAMPLES.is_file(), reason="the real samples are not beside this checkout")
def test_real_samples_are_read_whole():
    read = {split: read_csv_manifest(SAMPLES, split=split, drop_unlabelled=True) for split in ("train", "val", "test")}
    check_rows(*read.values())
    assert {split: len(rows) for split, rows in read.items()} == {"train": 850, "val": 116, "test": 236}
    assert sum(row["report"] is not None for rows in read.values() for row in rows) == 340

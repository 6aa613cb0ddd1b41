import io

import datasets
import pytest
from PIL import Image

from MMCLIP.data.manifest import FEATURES, check_rows, has_image, make_row, rows_to_dataset


def png(value=0):
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def row(row_id="a", **fields):
    return {
        "row_id": row_id,
        "image": {"path": None, "bytes": png()},
        "report": "No effusion.",
        "present": [],
        "absent": [],
        "uncertain": [],
        "patient_id": "",
        "study_id": "",
        "view": "PA",
        "split": "train",
        "source": "made up",
        "masks": [],
        "boxes": [],
        **fields,
    }


def dataset(*rows):
    return datasets.Dataset.from_list(list(rows), features=FEATURES)


def test_good_rows_pass_paired_unpaired_and_text_only():
    check_rows(
        dataset(
            row("a"),
            row("b", report=None, present=["mass"]),
            row("c", image=None),
            row("d", masks=[{"finding": "mass", "side": "left", "png": png()}]),
        )
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a"), row("a")], "row 'a': `row_id` occurs twice"),
        ([row("")], "`row_id` is empty"),
        ([row(report="")], "row 'a': `report` is empty"),
        ([row(report=" \n")], "row 'a': `report` is empty"),
        ([row(report=None)], "row 'a' has neither a report nor labels"),
        ([row(report=None, uncertain=["mass"])], "neither a report nor labels"),
        ([row(image=None, report=None, present=["mass"])], "row 'a' has neither an image nor a report"),
        ([row(image={"path": "/nowhere/x.png", "bytes": None})], "row 'a': the image file '/nowhere/x.png' does not"),
        ([row(present=["masss"])], "row 'a', `present`: unknown label 'masss'"),
        ([row(absent=["Effusion"])], "canonical name is 'pleural effusion'"),
        ([row(present=["mass"], absent=["mass"])], "'mass' is in `present` and in `absent`"),
    ],
)
def test_bad_row_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        check_rows(dataset(*rows))
    with pytest.raises(ValueError, match="^notes.csv: "):
        check_rows(dataset(*rows), where="notes.csv")


def test_patient_in_two_splits_is_found_across_datasets():
    train = dataset(row("a", patient_id="7"), row("b", patient_id="8"))
    test = dataset(row("c", patient_id="7", split="test"))
    check_rows(train)
    check_rows(test)
    with pytest.raises(ValueError, match="patient '7' is in split 'test' here and in 'train' at row 'a'"):
        check_rows(train, test)


def test_same_patient_number_of_another_source_is_another_patient():
    check_rows(dataset(row("a", patient_id="7")), dataset(row("b", patient_id="7", split="test", source="elsewhere")))


def test_repeated_row_is_found_across_datasets_and_in_a_selection():
    rows = dataset(row("a"), row("b"), row("c"))
    with pytest.raises(ValueError, match="row 'b': `row_id` occurs twice"):
        check_rows(rows.select([1, 0]), rows.select([1]))


def test_missing_column_is_named():
    with pytest.raises(ValueError, match=r"lacks the columns \['report'\]"):
        check_rows(dataset(row()).remove_columns("report"))
    check_rows(dataset(row()).remove_columns("masks"))


def test_which_rows_have_an_image_is_told_in_their_order_after_a_selection_too():
    made = [make_row(str(number), b"x" if number % 3 else None, source="s", report="r") for number in range(5)]
    rows = rows_to_dataset(made)
    assert has_image(rows).tolist() == [False, True, True, False, True]
    assert has_image(rows.select([4, 3, 1])).tolist() == [True, False, True]
    assert has_image(rows.select([])).tolist() == []

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from MMCLIP.data.dataset import MMCLIPDataset, find_entities, known_sides
from MMCLIP.data.manifest import FEATURES
from MMCLIP.text.entities import Entity, LexiconRecognizer


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 12), value, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def rows():
    common = {
        "uncertain": [],
        "patient_id": "",
        "study_id": "",
        "view": "",
        "split": "train",
        "source": "",
        "masks": [],
        "boxes": [],
    }
    return datasets.Dataset.from_list(
        [
            {
                "row_id": "paired",
                "image": {"path": None, "bytes": png(100)},
                "report": "Small effusion. No mass.",
                "present": ["mass", "edema"],
                "absent": ["nodule"],
                **common,
            },
            {
                "row_id": "unpaired",
                "image": {"path": None, "bytes": png(50)},
                "report": None,
                "present": ["edema", "mass"],
                "absent": ["nodule", "fibrosis", "pneumothorax"],
                **common,
            },
            {"row_id": "text", "image": None, "report": "Pacemaker.", "present": [], "absent": [], **common},
        ],
        features=FEATURES,
    )


def test_paired_row_has_its_report_and_the_labels_that_the_report_states():
    sample = MMCLIPDataset(rows(), seed=3)[0]
    assert sample["row_id"] == "paired" and sample["sample_seed"] == (3, 0, 0)
    assert sample["image"].mode == "L" and sample["image"].size == (12, 16)
    assert np.asarray(sample["image"]).min() == np.asarray(sample["image"]).max() == 100
    assert sample["text"] == "Small effusion. No mass."
    assert sample["entities"] == [
        Entity(0, 5, "small", "descriptor", "present"),
        Entity(6, 14, "pleural effusion", "finding", "present"),
        Entity(19, 23, "mass", "finding", "absent", 16, 18),
    ]
    assert sample["present"] == ["pleural effusion"]
    assert sample["absent"] == ["mass", "no finding"]


def test_unpaired_row_has_its_own_labels_and_a_prompt_drawn_anew_in_each_epoch():
    dataset = MMCLIPDataset(rows())
    texts = []
    for epoch in range(20):
        dataset.set_epoch(epoch)
        sample = dataset[1]
        assert sample["present"] == ["edema", "mass"] and sample["absent"] == ["nodule", "fibrosis", "pneumothorax"]
        said = {e.concept for e in sample["entities"] if e.assertion == "present" and e.kind == "finding"}
        assert said == {"edema", "mass"}
        texts.append(sample["text"])
    assert len(set(texts)) > 10
    dataset.set_epoch(4)
    assert dataset[1]["text"] == texts[4] and dataset[1]["sample_seed"] == (0, 4, 1)


def test_text_only_row_has_no_image():
    sample = MMCLIPDataset(rows())[2]
    assert sample["image"] is None and sample["text"] == "Pacemaker."


def test_labels_come_without_images_in_the_order_of_samples():
    dataset = MMCLIPDataset(rows())
    assert list(dataset.labels()) == [(sample["present"], sample["absent"]) for sample in dataset]


def test_options_change_texts_and_labels():
    assert MMCLIPDataset(rows(), unpaired_texts="label")[1]["text"] == "edema, mass"
    assert MMCLIPDataset(rows(), paired_labels="stored")[0]["present"] == ["mass", "edema"]
    both = MMCLIPDataset(rows(), paired_labels="both")[0]
    assert both["present"] == ["pleural effusion", "edema"]  # of mass the report knows better
    assert both["absent"] == ["mass", "no finding", "nodule"]
    prompts = MMCLIPDataset(rows(), max_negatives=0)
    for epoch in range(20):
        prompts.set_epoch(epoch)
        assert all(entity.assertion == "present" for entity in prompts[1]["entities"])


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_epoch_reaches_workers_that_already_run(start):
    dataset = MMCLIPDataset(rows())
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    assert [sample["sample_seed"][1] for sample in loader] == [0, 0, 0]
    dataset.set_epoch(5)
    assert [tuple(sample["sample_seed"]) for sample in loader] == [(0, 5, 0), (0, 5, 1), (0, 5, 2)]


def test_negative_and_too_large_indices_behave_as_in_a_list():
    dataset = MMCLIPDataset(rows())
    assert dataset[-1]["sample_seed"] == (0, 0, 2)
    with pytest.raises(IndexError):
        dataset[3]


def test_entities_of_reports_are_found_once_and_cached(tmp_path):
    class Counting(LexiconRecognizer):
        calls = 0

        def find(self, texts):
            Counting.calls += len(texts)
            return super().find(texts)

    rows().save_to_disk(tmp_path / "rows")
    stored = datasets.load_from_disk(tmp_path / "rows")
    dataset = MMCLIPDataset(stored, recognizer=Counting())
    for _ in range(3):
        dataset[0]
    assert Counting.calls == 2  # two of the three rows have a report
    again = find_entities(datasets.load_from_disk(tmp_path / "rows").remove_columns(["masks", "boxes"]), Counting())
    assert Counting.calls == 2 and len(again[0]["entities"]) == 3
    smaller = {name: c for name, c in LexiconRecognizer().concepts.items() if name != "small"}
    other = find_entities(
        datasets.load_from_disk(tmp_path / "rows").remove_columns(["masks", "boxes"]), Counting(smaller)
    )
    assert Counting.calls == 4 and len(other[0]["entities"]) == 2


def test_unreadable_image_and_row_without_words_name_the_row():
    bad = rows().to_list()
    bad[0]["image"]["bytes"] = b"no picture"
    bad[1].update(present=[], absent=[])
    dataset = MMCLIPDataset(datasets.Dataset.from_list(bad, features=FEATURES))
    with pytest.raises(ValueError, match="row 'paired'"):
        dataset[0]
    with pytest.raises(ValueError, match="row 'unpaired'.*at least one present label"):
        dataset[1]


@pytest.mark.parametrize("option", [{"unpaired_texts": "report"}, {"paired_labels": "none"}, {"seed": -1}])
def test_unknown_option_value_is_an_error(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        MMCLIPDataset(rows(), **option)


def box(finding, x, width):
    return {"finding": finding, "x": x, "y": 2.0, "width": width, "height": 4.0}


def test_a_box_tells_the_side_of_the_patient_and_one_near_the_middle_none():
    boxes = [box("mass", 10, 20), box("nodule", 70, 10), box("edema", 10, 20), box("edema", 60, 30)]
    assert known_sides([], boxes, 100) == {"mass": "right", "nodule": "left", "edema": "bilateral"}
    assert known_sides([], [box("mass", 30, 19.9)], 100) == {"mass": "right"}  # centre at 40 of 100
    for x, width in ((30, 20.2), (10, 41), (40, 60), (50, 18)):
        assert known_sides([], [box("mass", x, width)], 100) == {}
    assert known_sides([], [box("mass", 10, 20), box("mass", 45, 10)], 100) == {}


def test_a_mask_tells_the_side_that_it_names_and_one_without_a_side_none():
    masks = [
        {"finding": name, "side": side} for name, side in (("mass", "left"), ("edema", "bilateral"), ("nodule", ""))
    ]
    assert known_sides(masks, [], 100) == {"mass": "left", "edema": "bilateral"}
    assert known_sides(masks, [box("mass", 10, 20)], 100)["mass"] == "bilateral"


def unpaired(present, view="PA", **lesions):
    row = {**rows()[1], "report": None, "present": present, "absent": [], "view": view, **lesions}
    dataset = MMCLIPDataset(datasets.Dataset.from_list([row], features=FEATURES))
    texts = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        texts.append(dataset[0]["text"])
    return texts


def test_a_prompt_tells_the_side_of_masks_and_of_boxes_in_a_frontal_film():
    masks = [
        {"finding": "mass", "side": "left", "png": b""},
        {"finding": "support device", "side": "right", "png": b""},
    ]
    texts = unpaired(["mass", "support device"], masks=masks)
    assert 8 < sum("left" in text for text in texts) < 32 and not any("right" in text for text in texts)
    boxes = [box("mass", 1, 3), box("cardiomegaly", 1, 3), box("nodule", 1, 3)]  # the film is 12 wide
    texts = unpaired(["mass", "cardiomegaly"], boxes=boxes)
    assert 8 < sum("right" in text for text in texts) < 32 and not any("nodule" in text for text in texts)
    assert all(" mass" in text or "Mass" in text for text in texts if "right" in text.lower())
    assert not any("right" in text for text in unpaired(["mass"], view="LATERAL", boxes=boxes))


def test_rows_without_masks_and_boxes_have_prompts_too():
    dataset = MMCLIPDataset(rows().remove_columns(["masks", "boxes"]))
    assert "mass" in dataset[1]["text"].lower()

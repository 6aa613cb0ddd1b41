import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from public_sets import draw, write_table

from MMCLIP.data.indexing import PreparationOptions
from MMCLIP.data.phantom import FINDINGS
from MMCLIP.data.preparation import prepare
from MMCLIP.data.prepared import read_manifest
from MMCLIP.data.readers import SOURCES, source_rows
from MMCLIP.data.readers.chestxray14 import LABELS as CHESTXRAY14
from MMCLIP.data.readers.chexpert import FIVE
from MMCLIP.data.readers.covidx import CLASSES as COVIDX
from MMCLIP.data.readers.openi import AUTOMATIC
from MMCLIP.data.readers.rsna import CLASSES as RSNA
from MMCLIP.data.readers.vindr_cxr import GLOBAL, LOCAL
from MMCLIP.evaluation.protocols import (
    PROTOCOLS_FILE,
    check_labels,
    class_targets,
    load_protocol,
    overlap_cautions,
    protocol,
    protocol_names,
    protocol_rows,
)
from MMCLIP.text.prompt_sets import prompt_set
from MMCLIP.text.vocabulary import canonical_label, has_no_concept, with_broader_labels


NAMES = protocol_names()
COLUMNS = ("file", "split", "source", "patient_id", "view", "text", "labels", "absent_labels")


def table(folder, *rows, columns=COLUMNS):
    """A table whose rows differ from a labelled frontal film of the split "test" in what is given; one picture."""
    draw(folder / "film.png")
    neutral = {"file": "film.png", "split": "test", "source": "rsna", "view": "PA", "labels": "pneumonia"}
    path = folder / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({**neutral, **row} for row in rows)
    return path


def own_file(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------------ named protocols


def labels_of_reader(name, tmp_path):
    """The canonical labels that the reader of a protocol can give to a row."""
    if name == "siim":
        write_table(tmp_path / "train-rle.csv", "ImageId, EncodedPixels", "a,0 1", "b, -1")
        return {label for row in source_rows("siim", tmp_path) for label in row["present"] + row["absent"]}
    spelled = {
        "rsna": [label for pair in RSNA.values() for part in pair for label in part],
        "covidx": [label for pair in COVIDX.values() for part in pair for label in part],
        "chestxray14": CHESTXRAY14,
        "chexpert": FIVE,
        "vindr-cxr": [*LOCAL, *GLOBAL],
        "openi": AUTOMATIC.values(),
        "phantom": FINDINGS,
        "padchest": [
            *Path(__file__).with_name("padchest_labels.txt").read_text(encoding="utf-8").splitlines(),
            "normal",
        ],
    }
    usable = [label.strip() for label in spelled[protocol(name).data] if not has_no_concept(label)]
    return set(with_broader_labels(canonical_label(label) for label in usable))


def test_the_protocols_of_the_field_are_there():
    expected = {"chexpert-5x200", "rsna", "siim", "covidx", "chestxray14", "chexpert", "padchest", "vindr-cxr", "openi"}
    assert expected | {"phantom", "own"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_scores_labels_that_its_reader_gives_and_every_prompt_set_of_it_has_words_for(name, tmp_path):
    chosen = protocol(name)
    assert [canonical_label(label) for label in chosen.labels] == list(chosen.labels)
    assert chosen.source and chosen.cautions
    for prompts in (chosen.prompts, *chosen.published_prompts):
        prompt_set(prompts).texts(chosen.labels)
    if name != "own":
        assert chosen.data in SOURCES or chosen.data == "phantom"
        assert set(chosen.labels) <= labels_of_reader(name, tmp_path)


@pytest.mark.parametrize("name", ["chexpert-5x200", "covidx-3class"])
def test_multi_class_protocols_are_headed_by_accuracy_and_need_no_negation(name):
    chosen = protocol(name)
    assert chosen.task == "multi-class" and chosen.headline == "accuracy" and "negation" not in chosen.evaluations


def test_labels_stand_in_the_published_order():
    assert protocol("chestxray14").labels == tuple(map(canonical_label, CHESTXRAY14))
    assert protocol("chexpert").labels == protocol("chexpert-5x200").labels == tuple(map(canonical_label, FIVE))
    assert protocol("phantom").labels == FINDINGS


def test_the_head_of_the_file_explains_every_key():
    head = PROTOCOLS_FILE.read_text(encoding="utf-8").split("\n\n")[0]
    keys = {field.name for field in dataclasses.fields(protocol("own"))} - {"name"}
    assert [key for key in keys if key not in head] == []


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no protocol 'rnsa'; expected .*rsna.*own, or a file that ends in .yaml"):
        protocol("rnsa")


# ---------------------------------------------------------------------------------------------- a protocol of one's own


def test_a_file_of_ones_own_has_canonical_labels_and_the_defaults(tmp_path):
    made = protocol(own_file(tmp_path, "labels: [Effusion, Hernia]\ntest_split: holdout\nunlisted_is_absent: true\n"))
    assert made.name == "mine" and made.labels == ("pleural effusion", "hiatal hernia")
    assert (made.split("test"), made.split("validation"), made.split("train")) == ("holdout", "val", "train")
    assert made.unlisted_is_absent is True and made.prompts == "mmclip" and made.evaluations[0] == "zero_shot"


def test_a_file_of_prompts_is_looked_for_beside_the_protocol(tmp_path):
    own_file(tmp_path, "labels:\n  mass: {positive: [a mass]}\n", "words.yaml")
    made = protocol(own_file(tmp_path, "labels: [mass]\nprompts: words.yaml\n"))
    assert prompt_set(made.prompts).texts(["mass"]) == [(("a mass",), ())]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label: [mass]", "unknown keys \\['label'\\], expected .*labels"),
        ("labels: mass", "`labels` must be a list of texts.*is 'mass'"),
        ("labels: [unicorn]", "`labels`: unknown label 'unicorn'"),
        ("labels: [effusion, pleural effusion]", "`labels` names 'pleural effusion' more than once"),
        ("task: multilabel", "`task` has 'multilabel', expected multi-label, multi-class"),
        ("task: multi-class\nlabels: [mass]", "`labels` must name the classes of a multi-class task"),
        ("evaluations: [zeroshot]", "`evaluations` has 'zeroshot'"),
        ("evaluations: []", "`evaluations` is empty"),
        ("headline: f1", "`headline` has 'f1'"),
        ("frontal_only: 1", "`frontal_only` must be true or false, but is 1"),
        ("unlisted_is_absent: sometimes", "`unlisted_is_absent` must be true, false or null"),
        ("test_split: ''", "`test_split` is empty"),
        ("validation_split: test", "share rows: test, test, train"),
        ("test_split: '*'", "share rows: \\*, val, train"),
        ("images_per_class: 5", "`images_per_class` is for `task: multi-class`"),
        ("images_per_class: -1", "`images_per_class` must be a whole number"),
        ("data: phantom", "`sizes` and `data: phantom` go together"),
        ("data: phantom\nsizes: {test: 3}", "`sizes` must be whole numbers above 0 under test, validation"),
        ("prompts: nonsense", "`prompts`: There are no prompts 'nonsense'"),
        ("published_prompts: [nonsense]", "`published_prompts` has 'nonsense'"),
        ("- a list", "expected the keys of a protocol, but the file holds list"),
        ("{", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_file_and_key(tmp_path, text, message):
    path = own_file(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load_protocol(path)
    assert str(error.value).startswith(path)


def test_the_protocol_among_the_configs_can_be_read():
    found = load_protocol(Path(__file__).parents[1] / "examples" / "configs" / "protocol_cxr_mini.yaml")
    assert found.labels == (
        "pneumonia", "no finding", "infiltration", "atelectasis", "edema", "pleural effusion"
    )  # fmt: skip
    assert found.fully_labelled == ("nih-chestxray8",)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file .*none.yaml with a protocol"):
        protocol(str(tmp_path / "none.yaml"))


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_are_those_of_the_split_the_source_and_the_frontal_views(tmp_path):
    place = table(
        tmp_path,
        {"patient_id": "a"},
        {"patient_id": "b", "view": "LATERAL"},
        {"patient_id": "c", "source": "siim"},
        {"patient_id": "d", "split": "val"},
        {"patient_id": "e", "view": ""},
    )
    assert protocol_rows(protocol("rsna"), place, "test")["patient_id"] == ["a", "e"]
    assert protocol_rows(protocol("rsna"), str(place), "validation")["patient_id"] == ["d"]
    assert protocol_rows(protocol("rsna"), place, "train") is None  # there is no such split
    everything = dataclasses.replace(protocol("own"), frontal_only=False)
    assert protocol_rows(everything, place, "test")["patient_id"] == ["a", "b", "c", "e"]


def test_collections_of_covidx_are_covidx(tmp_path):
    place = table(tmp_path, {"source": "covidx-rsna"}, {"source": "covidx"}, {"source": "covidx2"})
    assert protocol_rows(protocol("covidx"), place, "test")["source"] == ["covidx-rsna", "covidx"]


def test_validation_rows_of_other_sources_or_without_labels_are_none(tmp_path):
    other = {"split": "val", "source": "siim"}
    unlabelled = {"split": "train", "labels": "", "text": "Clear lungs."}
    place = table(tmp_path, {}, other, unlabelled)
    assert protocol_rows(protocol("rsna"), place, "validation") is None
    assert protocol_rows(protocol("rsna"), place, "train") is None


def test_validation_rows_with_labels_and_no_image_are_none_and_warned_of(tmp_path, caplog):
    bare = {"file": "", "text": "Clear lungs."}
    place = table(tmp_path, {}, {"split": "val", **bare}, {"split": "train", **bare})
    assert (
        protocol_rows(protocol("rsna"), place, "validation") is protocol_rows(protocol("rsna"), place, "train") is None
    )
    assert "rsna: no validation row of" in caplog.text and "no train row" in caplog.text


def test_a_test_split_of_star_takes_all_rows(tmp_path):
    place = table(tmp_path, {"split": ""}, {"split": "whatever"})
    made = load_protocol(own_file(tmp_path, "test_split: '*'\nvalidation_split: ''\ntrain_split: ''\n"))
    assert len(protocol_rows(made, place, "test")) == 2
    assert protocol_rows(made, place, "validation") is None


def test_fully_labelled_sources_have_their_absent_labels(tmp_path):
    place = table(tmp_path, {"labels": "pneumonia"}, {"labels": "mass"})
    made = dataclasses.replace(protocol("own"), fully_labelled=("rsna",))
    assert protocol_rows(made, place, "test")["absent"] == [["mass"], ["pneumonia"]]
    assert protocol_rows(protocol("own"), place, "test")["absent"] == [[], []]


def test_a_prepared_folder_is_read_by_split(tmp_path):
    prepare({"phantom": "8"}, tmp_path / "out", PreparationOptions(shorter_side=32, val_share=0.5), num_proc=1)
    as_phantoms = dataclasses.replace(protocol("own"), data="phantom", test_split="val", validation_split="test")
    rows = protocol_rows(dataclasses.replace(as_phantoms, data=""), tmp_path / "out", "test")
    assert rows["row_id"] == read_manifest(tmp_path / "out", "val")["row_id"] and len(rows) < 8
    assert protocol_rows(dataclasses.replace(as_phantoms, data=""), tmp_path / "out", "validation") is None
    with pytest.raises(ValueError, match="own: .*no row has the split 'test'.*--test_share"):
        protocol_rows(protocol("own"), tmp_path / "out", "test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"source": "siim"}, {"source": ""}], "rsna: no test row of .* has the source 'rsna'.*are '', 'siim'"),
        ([{"split": "train"}, {"split": "val"}], "rsna: .*no row has split 'test'.*column `split`.*--test_share"),
        ([{"labels": ""}, {"split": "train"}], "rsna: .*neither text nor labels"),
        ([{"labels": "", "text": "Clear lungs."}], "rsna: none of 1 test rows of .* has a label, so nothing"),
        ([{"view": "LATERAL"}], "none of 0 test rows of .* has a label, after lateral films were left out"),
    ],
)
def test_data_that_cannot_be_scored_are_refused(tmp_path, rows, message):
    place = table(tmp_path, *rows)
    with pytest.raises(ValueError, match=message):
        protocol_rows(protocol("rsna"), place, "test")


def test_a_place_that_is_not_there_or_not_given_is_told(tmp_path):
    with pytest.raises(ValueError, match="rsna: there is no .*nowhere. Write rsna=PLACE"):
        protocol_rows(protocol("rsna"), tmp_path / "nowhere", "test")
    with pytest.raises(ValueError, match="rsna: no data are given. Write rsna=PLACE"):
        protocol_rows(protocol("rsna"), "", "test")
    with pytest.raises(ValueError, match="there is no preparation.json"):
        protocol_rows(protocol("rsna"), tmp_path, "test")


def test_phantoms_come_from_the_streams_of_the_demo():
    small = dataclasses.replace(protocol("phantom"), sizes={"test": 3, "validation": 2, "train": 4, "image_size": 32})
    sizes = {role: len(protocol_rows(small, "", role)) for role in ("test", "validation", "train")}
    assert sizes == {"test": 3, "validation": 2, "train": 4}
    assert protocol_rows(small, "", "train")["row_id"][0] == "phantom-0-train-000000"
    assert protocol_rows(small, "5", "test")["row_id"] == [f"phantom-0-test-00000{i}" for i in range(5)]
    assert len(protocol_rows(small, "5", "validation")) == 2  # the number is that of test images
    for wrong in ("0", "many", "-3", "1.5", "²"):
        with pytest.raises(ValueError, match="is no number of test images; write phantom=500"):
            protocol_rows(small, wrong, "test")


# -------------------------------------------------------------------------------------------------------------- labels


def selection(folder, num_edema=200):
    classes = {"atelectasis": 200, "cardiomegaly": 200, "consolidation": 200, "edema": num_edema, "effusion": 200}
    return table(folder, *({"source": "chexpert", "labels": label} for label, n in classes.items() for _ in range(n)))


def test_chexpert_5x200_takes_200_films_of_each_class_and_nothing_else(tmp_path):
    chosen = protocol("chexpert-5x200")
    rows = protocol_rows(chosen, selection(tmp_path), "test")
    assert np.bincount(class_targets(rows, chosen.labels)).tolist() == [200] * 5
    assert protocol_rows(chosen, selection(tmp_path), "train") is None
    with pytest.raises(ValueError, match="must have 200 test images of each class, but has .*199 of edema"):
        protocol_rows(chosen, selection(tmp_path, num_edema=199), "test")


def test_the_official_test_set_is_no_5x200_selection(tmp_path):
    place = table(tmp_path, {"source": "chexpert", "labels": "edema;atelectasis"})
    message = "no such selection. Row .* exactly one .* has atelectasis, edema. .*--option chexpert.selection=5x200"
    with pytest.raises(ValueError, match=message):
        protocol_rows(protocol("chexpert-5x200"), place, "test")


def test_class_targets_are_numbers_of_the_labels_and_a_kind_wins_over_its_broader_class(tmp_path):
    place = table(
        tmp_path,
        *({"labels": text} for text in ("covid-19;pneumonia", "pneumonia", "no finding", "covid-19;ards")),
    )
    rows = protocol_rows(protocol("own"), place, "test")
    assert class_targets(rows, protocol("covidx-3class").labels).tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize(("text", "found"), [("mass", "none"), ("edema;atelectasis", "atelectasis, edema")])
def test_a_row_of_no_class_or_of_two_is_named(tmp_path, text, found):
    rows = protocol_rows(protocol("own"), table(tmp_path, {"labels": "edema"}, {"labels": text}), "test")
    with pytest.raises(ValueError, match=f"Row '.*film.png#3' must have exactly one of .* but has {found}"):
        class_targets(rows, protocol("chexpert").labels)


def test_labels_that_the_data_lack_stay_and_those_that_are_not_scored_are_told(tmp_path):
    place = table(tmp_path, {"labels": "effusion;mass", "absent_labels": "edema"}, {"labels": "devices"})
    rows = protocol_rows(protocol("own"), place, "test")
    labels, unused = check_labels(protocol("chexpert"), rows, prompt_set("mmclip"), protocol("chexpert").labels)
    assert labels == list(protocol("chexpert").labels)
    assert unused == ["mass", "support device"]


def test_a_broader_label_counts_as_present(tmp_path):
    rows = protocol_rows(protocol("own"), table(tmp_path, {"labels": "covid-19"}), "test")
    assert check_labels(protocol("rsna"), rows, prompt_set("mmclip"), ["pneumonia"]) == (["pneumonia"], ["covid-19"])


def test_data_with_none_of_the_labels_are_refused(tmp_path):
    rows = protocol_rows(protocol("own"), table(tmp_path, {"labels": "mass", "absent_labels": "pneumonia"}), "test")
    with pytest.raises(ValueError, match="rsna: no test row has any of pneumonia present.* rows are mass, pneumonia"):
        check_labels(protocol("rsna"), rows, prompt_set("mmclip"), ["pneumonia"])


def test_a_prompt_set_without_a_text_is_refused_and_one_with_more_is_not(tmp_path):
    rows = protocol_rows(protocol("own"), table(tmp_path, {"labels": "mass"}, {}), "test")
    message = "own: the prompt set 'biovil-rsna' has no text for mass. .*fit here are .*mmclip"
    with pytest.raises(ValueError, match=message):
        check_labels(protocol("own"), rows, prompt_set("biovil-rsna"), ["mass", "pneumonia"])
    assert check_labels(protocol("own"), rows, prompt_set("medklip-style"), ["mass"]) == (["mass"], ["pneumonia"])


def test_training_on_a_source_that_shares_images_or_on_the_source_itself_is_told():
    assert overlap_cautions(["rsna"], ["padchest", "mimic-cxr"]) == []
    (sentence,) = overlap_cautions(["rsna"], ["chestxray14", "padchest", ""])
    assert "Images of rsna are in chestxray14" in sentence
    same, other = overlap_cautions(["covidx-rsna", "covidx-sirm"], ["rsna", "covidx-sirm"])
    assert same.startswith("Training used covidx-sirm too") and "negatives of COVIDx are RSNA images" in other
    (same,) = overlap_cautions(["my hospital"], ["my hospital", "other"])  # rows of a table of one's own
    assert same.startswith("Training used my hospital too: scores on my hospital are held out only if")
    assert overlap_cautions(["phantom"], ["phantom"]) == overlap_cautions(["phantom"], None) == []
    assert "training_sources" in overlap_cautions(["rsna"], None)[0]
    assert "training_sources" in overlap_cautions([""], None)[0] and overlap_cautions([""], ["rsna"]) == []

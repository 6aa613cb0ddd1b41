"""The readers against the label tables of the public sets, which come with the package torchxrayvision.

Each count is one of the published table. The package is found, not imported.
"""

import ast
import importlib.util
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from MMCLIP.data.readers import LEFT_OUT, source_rows
from MMCLIP.data.readers.chexpert import LABELS, candidates_5x200, select_5x200
from MMCLIP.data.readers.openi import xml_studies
from MMCLIP.data.readers.padchest import parse_labels
from MMCLIP.data.readers.tables import chexpert_labels, raise_problem, read_table
from MMCLIP.evaluation.grounding import read_mask


SPEC = importlib.util.find_spec("torchxrayvision")
TABLES = Path(SPEC.submodule_search_locations[0]) / "data" if SPEC else None
pytestmark = [
    pytest.mark.real_tables,
    pytest.mark.skipif(SPEC is None, reason="the tables are not here: pip install --no-deps torchxrayvision==1.5.7"),
]
PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"


def lay_out(folder, **files):
    """A folder as the set is published: name there (`.` as `__`) = name in the package."""
    for name, table in files.items():
        shutil.copy(TABLES / table, folder / name.replace("__", "."))
    return folder


def read(name, folder, **options):
    """Rows, and the reasons why rows were left out on purpose; any other problem raises."""
    left_out = []

    def report_problem(where, reason):
        if not reason.startswith(LEFT_OUT):
            raise_problem(where, reason)
        left_out.append(reason.removeprefix(LEFT_OUT))

    return list(source_rows(name, folder, report_problem=report_problem, **options)), left_out


def count(rows, column):
    return Counter(label for row in rows for label in row[column])


def test_chestxray14_has_the_published_images_patients_labels_views_and_boxes(tmp_path):
    folder = lay_out(tmp_path, Data_Entry_2017_v2020__csv__gz="Data_Entry_2017_v2020.csv.gz")
    lay_out(folder, BBox_List_2017__csv__gz="BBox_List_2017.csv.gz")
    (folder / "test_list.txt").write_text("00000003_000.png\n")  # the official lists are not in the package
    rows, left_out = read("chestxray14", folder)
    assert (len(rows), len({row["patient_id"] for row in rows}), left_out) == (112_120, 30_805, [])
    assert Counter(row["view"] for row in rows) == {"PA": 67_310, "AP": 44_810}
    present = {
        "no finding": 60_361, "infiltration": 19_894, "pleural effusion": 13_317, "atelectasis": 11_559,
        "nodule": 6_331, "mass": 5_782, "pneumothorax": 5_302, "consolidation": 4_667, "pleural thickening": 3_385,
        "cardiomegaly": 2_776, "emphysema": 2_516, "edema": 2_303, "fibrosis": 1_686, "pneumonia": 1_431,
        "hiatal hernia": 227,
    }  # fmt: skip
    assert count(rows, "present") == present
    # of the 14 findings, what is not present is absent
    absent = {label: 112_120 - number for label, number in present.items() if label != "no finding"}
    assert count(rows, "absent") == absent
    boxes = [box for row in rows for box in row["boxes"]]
    assert len(boxes) == 984 and len({box["finding"] for box in boxes}) == 8
    assert all(0 <= box["x"] and box["x"] + box["width"] <= 1024 for box in boxes)
    assert all(0 <= box["y"] and box["y"] + box["height"] <= 1024 for box in boxes)
    assert Counter(row["split"] for row in rows if row["boxes"] or row["split"] == "test")["test"] == 1


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("chexpert"), train__csv__gz="chexpert_train.csv.gz")


def test_chexpert_table_has_the_published_films_and_uncertain_labels(chexpert):
    columns = ["Path", "Frontal/Lateral", "AP/PA", *LABELS]
    views, uncertain, blank = Counter(), Counter(), 0
    patients, studies = set(), set()
    for where, record in read_table(chexpert / "train.csv.gz", columns):
        labels = chexpert_labels(where, record, LABELS, raise_problem)
        views[record["Frontal/Lateral"], record["AP/PA"]] += 1
        uncertain.update(labels["uncertain"])
        blank += not any(labels.values())
        patient, study = record["Path"].split("/")[2:4]
        patients.add(patient)
        studies.add((patient, study))
    assert (sum(views.values()), len(patients), len(studies)) == (223_414, 64_540, 187_641)
    assert views == {
        ("Frontal", "AP"): 161_590, ("Frontal", "PA"): 29_420, ("Frontal", "LL"): 16, ("Frontal", "RL"): 1,
        ("Lateral", ""): 32_387,
    }  # fmt: skip
    assert blank == 12
    assert {label: uncertain[label] for label in ("atelectasis", "cardiomegaly", "consolidation", "edema")} == {
        "atelectasis": 33_739,
        "cardiomegaly": 8_087,
        "consolidation": 27_742,
        "edema": 12_984,
    }
    assert (uncertain["pleural effusion"], uncertain["pneumonia"]) == (11_628, 18_770)
    assert uncertain["no finding"] == 0


def test_chexpert_rows_are_the_published_films_less_those_of_which_nothing_is_certain(chexpert):
    rows, left_out = read("chexpert", chexpert)
    assert Counter(left_out) == {"no label": 12, "no label is certain": 2_578}
    assert len(rows) == 223_414 - 12 - 2_578
    assert {row["split"] for row in rows} == {"train"}
    assert Counter(row["view"] for row in rows) == {"AP": 160_095, "PA": 28_913, "LATERAL": 31_800, "": 16}


def test_chexpert_5x200_has_the_published_number_of_candidates(chexpert):
    candidates = candidates_5x200(chexpert / "train.csv.gz")
    assert {name: len(files) for name, files in candidates.items()} == {
        "Atelectasis": 1_087,
        "Cardiomegaly": 1_034,
        "Consolidation": 537,
        "Edema": 2_257,
        "Pleural Effusion": 2_425,
    }
    chosen = select_5x200(chexpert / "train.csv.gz")
    assert [len(chosen & set(files)) for files in candidates.values()] == [200] * 5


def test_chexpert_5x200_takes_its_patients_out_of_the_training_part(chexpert):
    rows, left_out = read("chexpert", chexpert, selection="5x200")
    test = [row for row in rows if row["split"] == "test"]
    assert len(test) == 1_000
    five = ["atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion"]
    assert Counter(label for row in test for label in row["present"] if label in five) == dict.fromkeys(five, 200)
    assert all(set(five) <= {*row["present"], *row["absent"]} for row in test)
    patients = {row["patient_id"] for row in test}
    assert not patients & {row["patient_id"] for row in rows if row["split"] == "train"}
    assert len(rows) + len(left_out) == 223_414


def test_padchest_table_has_the_published_images_projections_and_labels():
    columns = ["ImageID", "StudyID", "PatientID", "Projection", "MethodLabel", "Labels", "ImageDir"]
    ids = {name: set() for name in ("ImageID", "StudyID", "PatientID", "ImageDir")}
    projections, methods, raw, stripped, num_rows, num_missing = Counter(), Counter(), Counter(), Counter(), 0, 0
    for _, record in read_table(TABLES / PADCHEST, columns):
        num_rows += 1
        for name, seen in ids.items():
            seen.add(record[name])
        projections[record["Projection"]] += 1
        methods[record["MethodLabel"]] += 1
        if record["Labels"] == "nan":
            num_missing += 1
        else:
            stripped.update(parse_labels(record["Labels"]))
            raw.update(ast.literal_eval(record["Labels"]))
    assert (num_rows, len(ids["ImageID"]), num_missing) == (160_861, 160_861, 103)
    assert (len(ids["PatientID"]), len(ids["StudyID"]), len(ids["ImageDir"])) == (67_625, 109_931, 52)
    assert projections == {
        "PA": 91_728, "L": 49_579, "AP_horizontal": 14_346, "AP": 4_559, "COSTAL": 630, "EXCLUDE": 11, "UNK": 8,
    }  # fmt: skip
    assert methods == {"Physician": 39_053, "RNN_model": 121_808}
    assert (len(raw), len(stripped)) == (350, 194)
    listed = (Path(__file__).parent / "padchest_labels.txt").read_text(encoding="utf-8").splitlines()
    assert {"", *listed} == set(stripped)
    assert raw.most_common(6) == [
        ("normal", 50_340), ("COPD signs", 23_280), ("cardiomegaly", 14_535), ("unchanged", 14_207),
        ("aortic elongation", 10_348), ("scoliosis", 7_795),
    ]  # fmt: skip
    assert (raw[""], raw["exclude"], raw["suboptimal study"]) == (3_041, 1_284, 1_546)


def test_padchest_rows_keep_the_patients_of_the_physicians_films_apart(tmp_path):
    folder = lay_out(tmp_path, **{PADCHEST.replace(".", "__"): PADCHEST})
    rows, left_out = read("padchest", folder)
    assert len(rows) + len(left_out) == 160_861
    reasons = Counter(reason.split(":")[0].split(" (")[0] for reason in left_out)
    assert reasons["another film of this patient is in the test part"] == 24_687
    test = [row for row in rows if row["split"] == "test"]
    assert 39_053 - 3_000 < len(test) < 39_053
    assert not {row["patient_id"] for row in test} & {row["patient_id"] for row in rows if row["split"] == ""}
    assert {row["view"] for row in rows} == {"PA", "AP", "LATERAL", "OTHER", ""}


@pytest.mark.slow
def test_padchest_without_a_test_part_has_every_film_that_has_a_label(tmp_path):
    folder = lay_out(tmp_path, **{PADCHEST.replace(".", "__"): PADCHEST})
    rows, left_out = read("padchest", folder, test="none")
    assert len(rows) + len(left_out) == 160_861
    assert left_out.count("no labels") == 103
    assert {row["split"] for row in rows} == {""}
    present = count(rows, "present")
    # less 3 and 16 films that say "exclude", too; 6 films say "cardiomegaly" twice, with outer blanks and without
    assert (present["copd"], present["cardiomegaly"]) == (23_280 - 3, 15_028 - 16 - 6)


def test_rsna_has_the_published_films_and_boxes(tmp_path):
    folder = lay_out(tmp_path, stage_2_train_labels__csv__zip="kaggle_stage_2_train_labels.csv.zip")
    rows, left_out = read("rsna", folder)
    assert (len(rows), left_out) == (26_684, [])
    assert count(rows, "present") == {"pneumonia": 6_012} and count(rows, "absent")["pneumonia"] == 20_672
    assert Counter(len(row["boxes"]) for row in rows) == {0: 20_672, 1: 2_614, 2: 3_266, 3: 119, 4: 13}
    assert sum(len(row["boxes"]) for row in rows) == 9_555


def test_siim_has_the_published_films_and_each_mask_is_the_union_of_its_lines(tmp_path):
    folder = lay_out(tmp_path, **{"train-rle__csv__gz": "siim-pneumothorax-train-rle.csv.gz"})
    codes: dict[str, list[list[int]]] = {}
    for _, record in read_table(folder / "train-rle.csv.gz", ["ImageId", "EncodedPixels"]):
        numbers = [] if record["EncodedPixels"] == "-1" else list(map(int, record["EncodedPixels"].split()))
        codes.setdefault(record["ImageId"], []).append(numbers)
    assert sum(map(len, codes.values())) == 12_954
    assert max(sum(numbers) for lines in codes.values() for numbers in lines) == 1_021_949  # gaps and lengths add up
    num_lines = Counter(len(lines) for lines in codes.values() if lines[0])
    assert [num_lines[n] for n in range(1, 6)] == [2_045, 447, 112, 40, 18]
    assert sum(num_lines[n] for n in range(6, 11)) == 7 and max(num_lines) == 10

    rows, left_out = read("siim", folder)
    assert (len(rows), left_out) == (12_047, [])
    assert count(rows, "present") == {"pneumothorax": 2_669} and count(rows, "absent") == {"pneumothorax": 9_378}
    shared = 0
    for row in [row for row in rows if row["masks"]][::25]:
        mask = read_mask(row["masks"][0]["png"])
        lengths = sum(sum(numbers[1::2]) for numbers in codes[row["row_id"].removeprefix("siim/")])
        assert mask.shape == (1024, 1024) and 0 < mask.sum() <= lengths
        shared += mask.sum() < lengths
        if len(codes[row["row_id"].removeprefix("siim/")]) == 1:
            assert mask.sum() == lengths
    assert len([row for row in rows if row["masks"]]) == 2_669
    assert np.count_nonzero([len(row["masks"]) > 1 for row in rows]) == 0


def test_vindr_cxr_of_kaggle_has_the_published_images_and_lines(tmp_path):
    folder = lay_out(tmp_path, train__csv__gz="vinbigdata-train.csv.gz")
    lines = [record for _, record in read_table(folder / "train.csv.gz", ["image_id", "rad_id", "class_name", "x_min"])]
    assert len(lines) == 67_914 and len({record["rad_id"] for record in lines}) == 17
    rows, left_out = read("vindr-cxr", folder)
    assert (len(rows), left_out) == (15_000, [])
    present = count(rows, "present")
    assert present["no finding"] == 10_606
    # a line with a box is a box, but for those of no named finding
    named = [record for record in lines if record["x_min"] and record["class_name"] != "Other lesion"]
    assert sum(len(row["boxes"]) for row in rows) == len(named)
    anyone = count(source_rows("vindr-cxr", folder, labels="any"), "present")
    votes = {(record["image_id"], record["class_name"]) for record in named}
    assert anyone["pneumothorax"] == sum(name == "Pneumothorax" for _, name in votes)
    assert present["pneumothorax"] < anyone["pneumothorax"]


def test_openi_has_the_published_reports_sections_and_images(tmp_path):
    folder = lay_out(tmp_path, NLMCXR_reports__tgz="NLMCXR_reports.tgz")
    studies = list(xml_studies(folder, raise_problem))
    assert len(studies) == len({uid for _, uid, *_ in studies}) == 3_955
    assert Counter(len(images) for *_, images in studies) == {0: 104, 1: 446, 2: 3_208, 3: 181, 4: 15, 5: 1}
    texts = [{name for name in ("findings", "impression") if sections[name]} for _, _, sections, *_ in studies]
    assert sum("findings" in found for found in texts) == 3_425
    assert sum("impression" in found for found in texts) == 3_921
    assert (sum(len(found) == 2 for found in texts), sum(not found for found in texts)) == (3_419, 28)
    rows, left_out = read("openi", folder)
    assert Counter(left_out) == {"the report has no findings+impression": 28, "the report has no image": 101}
    assert len({row["study_id"] for row in rows}) == 3_955 - 28 - 101
    assert len({row["row_id"] for row in rows}) == len(rows) <= 7_470
    assert count(rows, "present").keys() <= {
        "atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion", "emphysema", "fibrosis",
        "fracture", "granuloma", "hiatal hernia", "infiltration", "lung lesion", "mass", "nodule", "lung opacity",
        "pleural thickening", "pneumonia", "pneumothorax", "no finding",
    }  # fmt: skip

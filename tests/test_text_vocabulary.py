import pytest

from MMCLIP.text.vocabulary import (
    KINDS,
    LABEL_KINDS,
    broader_labels,
    canonical_label,
    load_vocabulary,
    vocabulary,
    with_broader_labels,
)


NIH = (
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation Edema Emphysema "
    "Fibrosis Pleural_Thickening Hernia"
).split()
CHEXPERT = (
    "No Finding|Enlarged Cardiomediastinum|Cardiomegaly|Lung Opacity|Lung Lesion|Edema|Consolidation|Pneumonia|"
    "Atelectasis|Pneumothorax|Pleural Effusion|Pleural Other|Fracture|Support Devices"
).split("|")
VINDR = (
    "Aortic enlargement|Atelectasis|Calcification|Cardiomegaly|Clavicle fracture|Consolidation|Edema|Emphysema|"
    "Enlarged PA|ILD|Infiltration|Lung Opacity|Lung cavity|Lung cyst|Mediastinal shift|Nodule/Mass|Pleural effusion|"
    "Pleural thickening|Pneumothorax|Pulmonary fibrosis|Rib fracture|COPD|Lung tumor|Pneumonia|Tuberculosis|No finding"
).split("|")
SAMPLES = (
    "pneumonia;covid-19;no finding;infiltration;atelectasis;edema;effusion;consolidation;pleural thickening;mass;ards;"
    "nodule;cardiomegaly;sars;pneumocystis;pneumothorax;emphysema;fibrosis;klebsiella;streptococcus;e. coli;mycoplasma;"
    "varicella;hernia;legionella;lipoid;influenza"
).split(";")


@pytest.mark.parametrize("names", [NIH, CHEXPERT, VINDR, SAMPLES], ids=["nih", "chexpert", "vindr", "samples"])
def test_labels_of_a_public_set_map_to_different_concepts(names):
    assert len({canonical_label(name) for name in names}) == len(names)


def test_spellings_of_one_label_have_one_name():
    assert canonical_label("Effusion") == canonical_label(" pleural  EFFUSION ") == "pleural effusion"
    assert canonical_label("hernia") == "hiatal hernia"
    assert canonical_label("Pleural_Thickening") == "pleural thickening"
    assert canonical_label("Airspace Opacity") == "lung opacity"


def test_every_label_is_its_own_canonical_name():
    for concept in vocabulary().values():
        if concept.kind in LABEL_KINDS:
            assert canonical_label(concept.name) == concept.name


def test_unknown_label_names_the_place_and_what_is_near():
    with pytest.raises(ValueError, match=r"rows\.csv, line 3: unknown label 'pneumotorax'.*'pneumothorax'"):
        canonical_label("pneumotorax", where="rows.csv, line 3")


@pytest.mark.parametrize("name", ["left", "lung", "normal heart size"])
def test_anatomy_descriptors_and_normal_statements_are_no_labels(name):
    assert name in vocabulary()
    with pytest.raises(ValueError, match="unknown label"):
        canonical_label(name)


def test_broader_labels_begin_with_the_label_itself():
    assert broader_labels("covid-19") == ("covid-19", "pneumonia")
    assert with_broader_labels(["pacemaker", "covid-19"]) == ["pacemaker", "support device", "covid-19", "pneumonia"]


def test_vocabulary_covers_every_kind_with_more_than_150_concepts():
    assert len(vocabulary()) >= 150
    assert {concept.kind for concept in vocabulary().values()} == set(KINDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: mass, kind: lesion}", "kind 'lesion'"),
        ("- {name: mass, kind: finding, synonym: [x]}", "unknown keys \\['synonym'\\]"),
        ("- {name: mass, kind: finding}\n- {name: mass, kind: disease}", "'mass' occurs twice"),
        ("- {name: mass, kind: finding, is_a: [tumor]}", "refers to 'tumor'"),
    ],
)
def test_mistake_in_a_vocabulary_file_is_named(tmp_path, text, message):
    file = tmp_path / "vocabulary.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_vocabulary(file)

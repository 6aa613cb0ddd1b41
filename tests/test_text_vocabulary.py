from pathlib import Path

import pytest

from MMCLIP.data.phantom import FINDINGS
from MMCLIP.text.lexicon import find_words
from MMCLIP.text.vocabulary import (
    GROUPS,
    KINDS,
    LABEL_KINDS,
    NO_CONCEPT,
    NO_FINDING,
    broader_labels,
    canonical_label,
    has_no_concept,
    load_vocabulary,
    vocabulary,
    with_broader_labels,
    write_out,
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

PADCHEST = (Path(__file__).parent / "padchest_labels.txt").read_text(encoding="utf-8").splitlines()
SETS = {
    "nih": NIH,
    "chexpert": CHEXPERT,
    "vindr": [*VINDR, "Other lesion", "Other disease", "Other diseases"],
    "padchest": ["", *PADCHEST],
    "rsna": ["Lung Opacity", "Normal", "No Lung Opacity / Not Normal"],
    "siim": ["Pneumothorax"],
    "covidx": ["normal", "pneumonia", "COVID-19", "positive", "negative"],
    "samples": SAMPLES,
    "phantoms": FINDINGS,
}


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_every_label_of_a_public_set_has_a_concept_or_a_reason_why_not(names):
    for name in names:
        if has_no_concept(name):
            with pytest.raises(ValueError, match="names no finding: "):
                canonical_label(name)
        else:
            concept = vocabulary()[canonical_label(name)]
            assert concept.kind in LABEL_KINDS or concept.name == NO_FINDING


def test_what_has_no_concept_is_a_label_of_some_set_and_the_list_is_short():
    known = {name.lower() for names in SETS.values() for name in names}
    assert set(NO_CONCEPT) <= known and len(NO_CONCEPT) < 20
    assert len(PADCHEST) == 193 and sum(map(has_no_concept, PADCHEST)) == 9


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


def test_things_that_are_not_the_same_are_not_one_concept():
    for one, other in [
        ("lobectomy", "pneumonectomy"), ("honeycombing", "lung cyst"), ("osteoporosis", "osteopenia"),
        ("volume loss", "atelectasis"), ("air trapping", "hyperinflation"), ("emphysema", "copd"),
        ("bulla", "lung cyst"), ("aortic dissection", "aortic aneurysm"), ("bronchitis", "pneumonia"),
        ("costophrenic angle blunting", "pleural effusion"), ("aspergilloma", "pneumonia"), ("lucency", "cavitation"),
        ("left ventricular assist device", "balloon pump"), ("gallstones", "calcification"),
    ]:  # fmt: skip
        one, other = canonical_label(one), canonical_label(other)
        assert not {one, other} <= set(broader_labels(one)) and not {one, other} <= set(broader_labels(other))


@pytest.mark.parametrize(
    ("narrow", "broad"),
    [
        ("lobar atelectasis", "atelectasis"), ("interstitial edema", "edema"), ("rib fracture", "fracture"),
        ("consolidation", "lung opacity"), ("tension pneumothorax", "pneumothorax"),
        ("aortic aneurysm", "aortic enlargement"), ("small cell lung cancer", "lung cancer"),
        ("calcified granuloma", "granuloma"), ("picc", "central venous catheter"), ("picc", "support device"),
        ("dextroscoliosis", "scoliosis"), ("osteophyte", "degenerative change"),
    ],
)  # fmt: skip
def test_a_narrow_concept_is_a_broad_one(narrow, broad):
    assert canonical_label(broad) in broader_labels(canonical_label(narrow))
    assert canonical_label(narrow) not in broader_labels(canonical_label(broad))


def test_no_concept_is_a_kind_of_itself_in_a_roundabout_way():
    for concept in vocabulary().values():
        assert all(concept.name not in broader_labels(other) for other in concept.is_a)
        assert all(vocabulary()[other].kind in LABEL_KINDS for other in (*concept.is_a, *concept.excludes))


def test_vocabulary_has_600_concepts_of_every_kind_and_group_in_words_no_two_of_them_share():
    assert len(vocabulary()) >= 600
    assert {concept.kind for concept in vocabulary().values()} == set(KINDS)
    assert {concept.group for concept in vocabulary().values() if concept.kind == "descriptor"} == set(GROUPS)
    owners: dict[tuple, str] = {}
    for concept in vocabulary().values():
        for wording in concept.wordings:
            words = tuple(word.stem for word in find_words(wording))
            assert owners.setdefault(words, concept.name) == concept.name, wording


def test_statements_of_normality_deny_labels_and_say_nothing_else():
    for concept in vocabulary().values():
        assert bool(concept.excludes) == (
            concept.kind == "normal" and concept.name not in (NO_FINDING, "normal soft tissues")
        )


def test_brackets_write_several_wordings_at_once():
    assert write_out("(small|large) [left] mass") == ("small left mass", "small mass", "large left mass", "large mass")
    assert write_out("[left|right] [left|right] lung")[-1] == "lung"
    assert write_out("mass") == ("mass",)
    for pattern in ("(small mass", "small) mass", "[small|large mass", "small|large mass", "((a|b) c|d)) mass"):
        with pytest.raises(ValueError, match="do not match"):
            write_out(pattern)
    with pytest.raises(ValueError, match="more than 1000 wordings"):
        write_out("(a|b|c|d|e|f|g|h|i|j) " * 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: mass, kind: lesion}", "kind 'lesion'"),
        ("- {name: mass, kind: finding, synonym: [x]}", "unknown keys \\['synonym'\\]"),
        ("- {name: mass, kind: finding}\n- {name: mass, kind: disease}", "'mass' occurs twice"),
        ("- {name: mass, kind: finding, is_a: [tumor]}", "refers to 'tumor'"),
        ("- {name: left, kind: descriptor}", "'left' has group None"),
        ("- {name: left, kind: descriptor, group: place}", "'left' has group 'place'"),
        ("- {name: mass, kind: finding, group: size}", "'mass' has group 'size'"),
        ('- {name: mass, kind: finding, synonyms: ["(big mass"]}', "'mass': '\\(big mass' has brackets"),
    ],
)
def test_mistake_in_a_vocabulary_file_is_named(tmp_path, text, message):
    file = tmp_path / "vocabulary.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_vocabulary(file)

import gzip
import json
from pathlib import Path

import pytest

from MMCLIP.text.entities import Entity, LexiconRecognizer, report_labels, report_sides
from MMCLIP.text.reports import clean_report
from MMCLIP.text.vocabulary import Concept


OPENI = Path(__file__).resolve().parents[2] / "shared" / "data" / "openi-reports" / "reports.jsonl.gz"


@pytest.fixture(scope="module")
def recognizer():
    return LexiconRecognizer()


def labels(recognizer, text):
    """{label: assertion} of a text, "no finding" left out."""
    stated = zip(("present", "absent", "uncertain"), report_labels(recognizer(text)), strict=True)
    return {label: assertion for assertion, names in stated for label in names if label != "no finding"}


def test_entity_has_the_offsets_kind_and_assertion_of_its_words(recognizer):
    found = recognizer("Small left pleural effusion. No nodules.")
    assert found == [
        Entity(0, 5, "small", "descriptor", "present"),
        Entity(6, 10, "left", "descriptor", "present"),
        Entity(11, 27, "pleural effusion", "finding", "present"),
        Entity(32, 39, "nodule", "finding", "absent", 29, 31),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No pneumothorax or pleural effusion.", {"pneumothorax": "absent", "pleural effusion": "absent"}),
        (
            "No focal consolidation, large effusion, or pneumothorax.",
            {"consolidation": "absent", "pleural effusion": "absent", "pneumothorax": "absent"},
        ),
        ("No pneumothorax but a large effusion.", {"pneumothorax": "absent", "pleural effusion": "present"}),
        ("No effusion. Cardiomegaly.", {"pleural effusion": "absent", "cardiomegaly": "present"}),
        ("No effusion; cardiomegaly.", {"pleural effusion": "absent", "cardiomegaly": "present"}),
        ("Small effusion, no pneumothorax.", {"pleural effusion": "present", "pneumothorax": "absent"}),
        ("Effusion without pneumothorax.", {"pleural effusion": "present", "pneumothorax": "absent"}),
        ("No effusion, small pneumothorax.", {"pleural effusion": "absent", "pneumothorax": "present"}),
        (
            "No effusion is seen, and the heart is enlarged.",
            {"pleural effusion": "absent", "cardiomegaly": "present"},
        ),
        ("Lungs are free of edema and consolidation.", {"edema": "absent", "consolidation": "absent"}),
        ("Negative for pneumothorax.", {"pneumothorax": "absent"}),
        ("The lungs are clear of edema or effusion.", {"edema": "absent", "pleural effusion": "absent"}),
        ("Neither edema nor effusion is present.", {"edema": "absent", "pleural effusion": "absent"}),
        ("The pneumothorax has resolved.", {"pneumothorax": "absent"}),
        ("Resolved pneumothorax.", {"pneumothorax": "absent"}),
        ("Pneumothorax and effusion are not seen.", {"pneumothorax": "absent", "pleural effusion": "absent"}),
        ("No change in the effusion.", {"pleural effusion": "present"}),
        ("Unchanged cardiomegaly.", {"cardiomegaly": "present"}),
    ],
)
def test_negation_acts_on_its_list_and_no_further(recognizer, text, expected):
    assert labels(recognizer, text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Possible pneumonia.",
        "Pneumonia cannot be excluded.",
        "Findings suspicious for pneumonia.",
        "This may represent pneumonia.",
        "Pneumonia is suspected.",
    ],
)
def test_hedged_finding_is_uncertain(recognizer, text):
    assert labels(recognizer, text) == {"pneumonia": "uncertain"}


def test_hedge_leaves_what_stands_before_it_alone(recognizer):
    text = "Opacity may represent pneumonia or atelectasis."
    assert labels(recognizer, text) == {
        "lung opacity": "present",
        "pneumonia": "uncertain",
        "atelectasis": "uncertain",
    }


def test_longest_wording_wins(recognizer):
    assert [e.concept for e in recognizer("Pericardial effusion")] == ["pericardial effusion"]
    assert [e.concept for e in recognizer("Subcutaneous emphysema")] == ["subcutaneous emphysema"]


def test_only_whole_words_match(recognizer):
    assert recognizer("Massively amassed unedematous masseter") == []


@pytest.mark.parametrize(
    "text", ["effusions", "EFFUSION", "pneumothoraces", "hydropneumothoraces", "ground-glass opacities", "PTX"]
)
def test_plural_case_hyphen_and_abbreviation_do_not_matter(recognizer, text):
    assert [(e.start, e.end, e.kind) for e in recognizer(text)] == [(0, len(text), "finding")]


def test_abbreviation_in_lower_case_is_an_ordinary_word(recognizer):
    assert recognizer("the cap of the bottle") == []
    assert [e.concept for e in recognizer("treated for CAP")] == ["pneumonia"]
    assert recognizer("THE CAP OF THE BOTTLE") == []
    assert [e.concept for e in recognizer("THE PATIENT HAS COPD")] == ["copd"]


def test_offsets_hold_in_text_whose_lower_case_is_longer(recognizer):
    text = "İstanbul: İ pneumothorax"  # İ has two characters in lower case
    (entity,) = recognizer(text)
    assert text[entity.start : entity.end] == "pneumothorax"


def test_statement_of_normality_makes_what_it_excludes_absent(recognizer):
    assert labels(recognizer, "Heart size is normal.") == {"cardiomegaly": "absent"}
    assert labels(recognizer, "The lungs are clear.") == {
        "consolidation": "absent",
        "infiltration": "absent",
        "lung opacity": "absent",
    }


def test_no_finding_is_present_only_beside_no_finding_or_disease(recognizer):
    def no_finding(text):
        present, absent, _ = report_labels(recognizer(text))
        return ("no finding" in present, "no finding" in absent)

    assert no_finding("No acute cardiopulmonary process.") == (True, False)
    assert no_finding("No acute cardiopulmonary process. Pacemaker.") == (True, False)
    assert no_finding("No acute cardiopulmonary process. Cardiomegaly.") == (False, True)
    assert no_finding("No pneumothorax.") == (False, False)
    assert no_finding("No acute cardiopulmonary process. Possible pneumonia.") == (False, False)


def test_presence_passes_to_broader_labels_and_absence_does_not(recognizer):
    assert labels(recognizer, "Right-sided pacemaker.") == {"pacemaker": "present", "support device": "present"}
    assert labels(recognizer, "No pacemaker.") == {"pacemaker": "absent"}
    assert labels(recognizer, "COVID-19.") == {"covid-19": "present", "pneumonia": "present"}


def test_present_wins_over_absent_in_one_report(recognizer):
    assert labels(recognizer, "No effusion on the left. Effusion on the right.") == {"pleural effusion": "present"}


def test_wording_of_two_concepts_is_an_error():
    concepts = {
        "mass": Concept("mass", "finding", synonyms=("tumour",)),
        "tumor": Concept("tumor", "disease", synonyms=("tumours",)),
    }
    with pytest.raises(ValueError, match="'mass' and 'tumor'"):
        LexiconRecognizer(concepts)


def test_fingerprint_changes_with_the_vocabulary():
    one = LexiconRecognizer({"mass": Concept("mass", "finding")})
    other = LexiconRecognizer({"mass": Concept("mass", "finding", synonyms=("tumour",))})
    assert one.fingerprint == LexiconRecognizer({"mass": Concept("mass", "finding")}).fingerprint != other.fingerprint


def test_phantom_reports_give_back_their_labels(recognizer):
    phantom = pytest.importorskip("MMCLIP.data.phantom")
    for index in range(500):
        made = phantom.make_phantom(seed=7, index=index, size=32)
        present, absent, uncertain = (set(names) for names in report_labels(recognizer(made.report)))
        assert set(made.present) == present & set(phantom.FINDINGS), made.report
        assert absent & set(phantom.FINDINGS) <= set(made.absent), made.report
        assert not uncertain & set(made.absent), made.report


@pytest.mark.skipif(not OPENI.is_file(), reason="the Open-i reports are not beside this checkout")
def test_normal_openi_reports_name_no_acute_finding(recognizer):
    with gzip.open(OPENI, "rt", encoding="utf-8") as file:
        reports = [json.loads(line) for line in file]
    acute = {"pneumothorax", "pleural effusion", "consolidation", "pneumonia", "edema", "mass"}
    normal = [r for r in reports if r["mesh_major"] == ["normal"]]
    texts = [clean_report(f"{r['findings']} {r['impression']}") for r in normal]
    wrong = [text for text in texts if acute & set(report_labels(recognizer(text))[0])]
    assert len(texts) > 1000 and len(wrong) < 0.005 * len(texts)


@pytest.mark.parametrize(
    "report, sides",
    [
        ("Small left pleural effusion.", {"pleural effusion": "left"}),
        ("There is a RIGHT-sided pneumothorax. No left effusion.", {"pneumothorax": "right"}),
        ("Nodular opacity in the right lung.", {"nodule": "right"}),  # of the broader label too
        ("Left effusion and right pneumothorax.", {}),  # which is where?
        ("Left effusion. Right effusion.", {}),
        ("Bilateral effusions, left greater than right.", {}),
        ("Possible left effusion.", {}),
        ("Effusion. The left lung is clear.", {}),
        ("Leftover contrast. Effusion.", {}),
    ],
)
def test_a_side_is_told_by_a_sentence_that_names_one_finding_and_one_side(report, sides):
    found = report_sides(report, LexiconRecognizer()(report))
    assert {label: found[label] for label in found if label in ("pleural effusion", "pneumothorax", "nodule")} == sides

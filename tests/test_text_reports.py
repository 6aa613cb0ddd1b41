import pytest

from MMCLIP.text.reports import clean_report, report_sections, split_sentences


def test_marks_of_removed_words_and_runs_of_blanks_go():
    assert clean_report("  Heart\t is XXXX normal .\r\n No ___ effusion, [**Name 1**] seen.") == (
        "Heart is normal. No effusion, seen."
    )


def test_sentence_of_removed_words_alone_goes_with_its_period():
    assert clean_report("Lungs clear. XXXX. Heart normal. ___ ___.") == "Lungs clear. Heart normal."


def test_blank_line_stays_a_sentence_border():
    assert clean_report("Heart normal\n\nLungs clear.\n\nNo effusion") == "Heart normal. Lungs clear. No effusion"


def test_text_of_nothing_but_marks_is_empty():
    assert clean_report(" XXXX ___ \n") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion. Heart normal.", ["No effusion.", "Heart normal."]),
        ("A nodule of 2.5 cm. Stable.", ["A nodule of 2.5 cm.", "Stable."]),
        ("Seen by Dr. Smith. Pneumonia vs. edema.", ["Seen by Dr. Smith.", "Pneumonia vs. edema."]),
        ("E. coli pneumonia. Edema.", ["E. coli pneumonia.", "Edema."]),
        ("No effusion; heart normal", ["No effusion;", "heart normal"]),
        ("1. Edema. 2. Mass.", ["1. Edema.", "2. Mass."]),
        ("Effusion? No. Heart normal!", ["Effusion?", "No.", "Heart normal!"]),
        ("Edema\n\nMass", ["Edema", "Mass"]),
        ("  ", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text, expected):
    assert [text[start:end] for start, end in split_sentences(text)] == expected


def test_sections_are_found_by_their_headers_and_the_last_of_a_name_counts():
    report = (
        "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n INDICATION:  Cough.\n \n"
        " COMPARISON:  None.\n \n FINDINGS: \n \n Lungs are clear.\n Heart is normal.\n \n"
        " IMPRESSION: \n \n No pneumonia.\n \n IMPRESSION:  Small nodule.\n"
    )
    sections = report_sections(report)
    assert clean_report(sections["findings"]) == "Lungs are clear. Heart is normal."
    assert (sections["impression"], sections["indication"], sections["examination"]) == (
        "Small nodule.",
        "Cough.",
        "CHEST (PA AND LAT)",
    )
    assert "last_paragraph" not in sections


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("HISTORY: Cough.\n\nPORTABLE AP CHEST RADIOGRAPH: No mass.", {"indication": "Cough.", "findings": "No mass."}),
        ("CHEST: Old film.\n\nFINDINGS: No mass.", {"findings": "No mass."}),
        ("Findings: No mass.\nImpression : Normal.", {"findings": "No mass.", "impression": "Normal."}),
        ("IMPRESSION: Edema.\nNOTIFICATION: Dr. A was called.", {"impression": "Edema."}),
        ("Seen at noon.\n\nLungs: clear, no mass.", {"last_paragraph": "Lungs: clear, no mass."}),
        ("REASON FOR EXAM: Cough.", {"indication": "Cough."}),
        ("", {}),
    ],
)
def test_sections_of_reports_that_are_written_differently(report, expected):
    assert report_sections(report) == expected

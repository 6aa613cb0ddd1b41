import pytest

from MMCLIP.text.reports import clean_report, split_sentences


def test_marks_of_removed_words_and_runs_of_blanks_go():
    assert clean_report("  Heart\t is XXXX normal .\r\n No ___ effusion, [**Name 1**] seen.") == (
        "Heart is normal. No effusion, seen."
    )


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

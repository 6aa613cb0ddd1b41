import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MMCLIP.text.entities import LexiconRecognizer
from MMCLIP.text.reports import (
    TEXTS,
    clean_report,
    is_all_capitals,
    report_sections,
    report_text,
    split_sentences,
)


OPENI = Path(__file__).resolve().parents[2] / "shared" / "data" / "openi-reports" / "reports.jsonl.gz"


@pytest.fixture(scope="module")
def recognizer():
    return LexiconRecognizer()


def sentences(text):
    return [text[start:end] for start, end in split_sentences(text)]


# ------------------------------------------------------------------------------------------------------------- cleaning


def test_marks_of_removed_words_and_runs_of_blanks_go():
    assert clean_report("  Heart\t is XXXX normal .\r\n No ___ effusion, [**Name 1**] seen.") == (
        "Heart is normal. No effusion, seen."
    )


def test_sentence_of_removed_words_alone_goes_with_its_period():
    assert clean_report("Lungs clear. XXXX. Heart normal. ___ ___.") == "Lungs clear. Heart normal."
    assert clean_report("XXXX. Heart normal. 2. XXXX, XXXX. 3. Edema.") == "Heart normal. 3. Edema."


def test_blank_line_stays_a_sentence_border():
    assert clean_report("Heart normal\n\nLungs clear.\n\nNo effusion") == "Heart normal. Lungs clear. No effusion"


@pytest.mark.parametrize(
    "text", ["", " XXXX ___ \n", " . ", "...", "\0\r\n", "[ ] ( )", "<p>&nbsp;</p>", "FINAL REPORT\n___"]
)
def test_text_of_nothing_but_marks_is_empty(text):
    assert clean_report(text) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Seen on XXXX-XXXX, xxxx and ___/___.", "Seen on and."),
        ("<DATE> film of [NAME 1], {{ID}} and <unk>: clear.", "film of and: clear."),
        ("XXXX's lung, XXXX-filled dual-XXXX lead XXXX/fluid.", "lung, filled dual lead fluid."),
        ("The 4XXXX rib at 3 XXXXPM.", "The 4 rib at 3 PM."),
        ("Nodule (XXXX), mass (XXXX, old), scar (since ___).", "Nodule, mass (old), scar (since)."),
        ("Called at ___:___ p.m. ___/___. Edema.", "Called at. Edema."),
        ("Chest X-XXXX and x-xxxx. Left XXXX-A-XXXX.", "Chest X-ray and x-ray. Left port-a-cath."),
        ("Seen by Dr. J. XXXX. Edema.", "Seen by. Edema."),
        ("Dr. XXXX was told.", "Dr. was told."),
        ("No XXXX, effusion or XXXX.", "No effusion or."),
    ],
)
def test_what_hung_on_a_removed_word_goes_with_it(text, expected):
    assert clean_report(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "No XXXX. Effusion.",
        "There is no XXXX. Effusion.",
        "There is no ___. 2. Effusion.",
        "No change per Dr. XXXX. Effusion.",
        "No edema vs. XXXX. Effusion.",
        "No mass on ___\n\nEffusion.",
        "No mass since\n___. Effusion.",
        "- No mass\n- Effusion",
        "* No mass\n* Effusion",
        "- No mass - Effusion",
        "1) No mass\n2) Effusion",
        "<ul><li>No mass<li>Effusion</ul>",
        "No mass\n______\nEffusion",
        "No mass\nEffusion",
        "No mass period Effusion period",
        "no mass new paragraph effusion",
        "No hepatitis C. Effusion.",
    ],
)
def test_border_of_sentences_that_is_lost_would_deny_a_finding(recognizer, text):
    (entity,) = (entity for entity in recognizer(clean_report(text)) if entity.concept == "pleural effusion")
    assert entity.assertion == "present"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Clear.. Heart normal. . No mass....", "Clear. Heart normal. No mass..."),
        ("A node of .5 cm ,, in in the The lung", "A node of .5 cm, in the lung"),
        ("Follow-up up to 5 5 mm, right right-sided", "Follow-up up to 5 5 mm, right right-sided"),
        ("[<Lungs clear.>] Heart [normal]. [ ] Mass ( ).", "Lungs clear. Heart normal. Mass."),
        ("? pneumonia", "? pneumonia"),
        ("No mass comma edema period Heart large period", "No mass, edema. Heart large."),
        ("NO MASS COMMA EDEMA PERIOD HEART LARGE PERIOD", "NO MASS, EDEMA. HEART LARGE."),
        ("Over a period of time. In this period Mr. X", "Over a period of time. In this period Mr. X"),
        ("Mass in the colon. No new line. Stable over the treatment period",) * 2,
        ("Normal. END OF IMPRESSION.", "Normal."),
        ("Normal.\nDictated and signed by: Dr. A. Bee, M.D., 1/2/2015\nADDENDUM: Edema", "Normal. ADDENDUM: Edema"),
        ("Normal. Electronically signed by A. Bee. Edema.", "Normal. Edema."),
        ("Signed off the ventilator. Approved tube position.",) * 2,
        ("FINAL REPORT\n Edema", "Edema"),
    ],
)
def test_what_dictation_leaves_behind_goes_and_words_stay(text, expected):
    assert clean_report(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>Heart</b> normal<br/>today<p class='x'>No&nbsp;mass</p>", "Heart normal today. No mass"),
        ("&lt;5 mm, size &gt; 3 mm, a<b and <Heart normal>", "<5 mm, size > 3 mm, a<b and <Heart normal>"),
        ("&amp;amp;lt;5 mm &amp; more", "<5 mm & more"),
        (
            "\u201cPatient\u2019s\u201d \ufb01brosis\u00a05\u201310 mm\u2026 \u00ad\u200bend\x07",
            '"Patient\'s" fibrosis 5-10 mm... end',
        ),
        ("\u2022 Mass\u2022 Edema \u2014 large", "Mass. Edema - large"),
        ("Ödem rechts, 3 µm 🙂 правое лёгкое",) * 2,
        ("NO ACUTE DISEASE. CAP OF THE STOMACH.",) * 2,
    ],
)
def test_mark_up_and_typographic_signs_become_plain_text(text, expected):
    assert clean_report(text) == expected


# ------------------------------------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion. Heart normal.", ["No effusion.", "Heart normal."]),
        ("A nodule of 2.5 cm. Stable.", ["A nodule of 2.5 cm.", "Stable."]),
        ("Nodule of 2. 5 cm, approx. 3 mm. 5 cm. lower.", ["Nodule of 2. 5 cm, approx. 3 mm.", "5 cm. lower."]),
        ("Seen by Dr. Smith. Pneumonia vs. Edema.", ["Seen by Dr. Smith.", "Pneumonia vs. Edema."]),
        ("Told Dr. A. B. See, and by J. Doe. Edema.", ["Told Dr. A. B. See, and by J. Doe.", "Edema."]),
        ("E. coli pneumonia. Edema.", ["E. coli pneumonia.", "Edema."]),
        ("Hepatitis C. Effusion. Recommend MR. Mass.", ["Hepatitis C.", "Effusion.", "Recommend MR.", "Mass."]),
        ("At 3 a.m. Edema. At 4 p.m. no mass, e.g. Scar.", ["At 3 a.m.", "Edema.", "At 4 p.m. no mass, e.g. Scar."]),
        ("No effusion; heart normal", ["No effusion;", "heart normal"]),
        ("Effusion? No. Heart normal!", ["Effusion?", "No.", "Heart normal!"]),
        ('(No mass.) "Edema." Scar', ["(No mass.)", '"Edema."', "Scar"]),
        ("Scar... or mass... Edema.. is\u2026 seen", ["Scar... or mass...", "Edema..", "is\u2026 seen"]),
        ("Lungs clear.No mass.2. Edema(old).CT", ["Lungs clear.", "No mass.", "2. Edema(old).", "CT"]),
        ("LUNGS CLEAR.NO MASS. U.S.A. FILM VS. CT", ["LUNGS CLEAR.", "NO MASS.", "U.S.A.", "FILM VS. CT"]),
        ("No. 3 is broken. Rib no. 4 is not.", ["No. 3 is broken.", "Rib no. 4 is not."]),
        ("Edema\n\nMass", ["Edema", "Mass"]),
        ("  ", []),
        (".", ["."]),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text, expected):
    assert sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. Edema. 2. Mass.", ["1. Edema.", "2. Mass."]),
        ("1. No edema 2. Mass 3. Scar", ["1. No edema", "2. Mass", "3. Scar"]),
        ("1) No edema 2) Mass (3) Scar", ["1) No edema", "2) Mass", "(3) Scar"]),
        ("1.No edema.2.Mass", ["1.No edema.", "2.Mass"]),
        ("1. 2.5 cm mass. 2. Edema", ["1. 2.5 cm mass.", "2. Edema"]),
        ("Chest: 1. Edema 2. Mass. Knee: 1. Scar.", ["Chest: 1. Edema", "2. Mass.", "Knee: 1. Scar."]),
        ("Broken rib 2. Edema", ["Broken rib 2.", "Edema"]),  # no list has begun
        ("A. No edema. B. Mass", ["A. No edema.", "B. Mass"]),
        ("- No edema\n- Mass\n\u2022 Scar \u2022 Node", ["- No edema", "- Mass", "\u2022 Scar", "\u2022 Node"]),
        ("FINDINGS: No edema IMPRESSION:\n1. Mass", ["FINDINGS: No edema", "IMPRESSION:\n1. Mass"]),
        ("Lungs clear\r\nNo edema\r\nHeart large", ["Lungs clear", "No edema", "Heart large"]),
        ("The line before was wrapped as it had grown too long, no\nKerley B lines", 1),
        ("No\nKerley B lines", 1),
        ("right lung,\nSwan-Ganz catheter", 1),
    ],
)
def test_items_of_lists_and_short_lines_are_sentences(text, expected):
    assert sentences(text) == ([text] if expected == 1 else expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NO ACUTE DISEASE.", True),
        ("CAP OF THE", True),
        ("LARGE EFFUSION ON THE LEFT, 5 cm.", True),
        ("COPD, CHF.", False),
        ("s/p NSTEMI, CAP", False),
        ("Heart normal. COPD AND PNEUMONIA.", False),
        ("", False),
        ("12. 3", False),
    ],
)
def test_text_is_all_capitals_when_ordinary_words_are(text, expected):
    assert is_all_capitals(text) is expected


# ------------------------------------------------------------------------------------------------------------- sections


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
        ("REASON FOR EXAM: Cough.", {"indication": "Cough."}),
        ("FINDINGS:\n FRONTAL VIEW OF THE CHEST: Mass.", {"findings": "Mass."}),
        ("FINDINGS: Scar.\n FRONTAL VIEW: Mass.", {"findings": "Scar.\n FRONTAL VIEW: Mass."}),
        ("FINDINGS:\n LUNGS: Clear\n HEART: Large", {"findings": "LUNGS: Clear\n HEART: Large"}),
        ("FINDINGS\n--------\nMass\n\nImpression\nScar", {"findings": "Mass", "impression": "Scar"}),
        ("FINDNGS: Mass.\n IMPRESSON: Scar.", {"findings": "Mass.", "impression": "Scar."}),
        ("FINDINGS/ IMPRESSION: Mass.", {"impression": "Mass."}),
        ("FINDINGS AND IMPRESSION: Mass.\nIMPRESSION: Scar.", {"findings": "Mass.", "impression": "Scar."}),
        ("Technique: PA. Findings: Mass. Impression: Scar.",
         {"technique": "PA.", "findings": "Mass.", "impression": "Scar."}),
        ("The findings: none of note. No comparison: lost.",
         {"last_paragraph": "The findings: none of note. No comparison: lost."}),
        ("EXAM: CHEST. FINDINGS: MASS, HEART SIZE: LARGE. IMPRESSION: SCAR.",
         {"examination": "CHEST.", "findings": "MASS, HEART SIZE: LARGE.", "impression": "SCAR."}),
        ("FINDINGS: LARGE HEART.\nTHERE IS ALSO: MASS.", {"findings": "LARGE HEART.\nTHERE IS ALSO: MASS."}),
        ("<b>FINDINGS:</b> Mass<br><b>Impression</b>:&nbsp;Scar", {"findings": "Mass", "impression": "Scar"}),
        ("FINDINGS: Mass.\r\nIMPRESSION: Scar.\r\nDICTATED BY: A. Bee", {"findings": "Mass.", "impression": "Scar."}),
        ("WET READ: Mass.\n________\n FINAL REPORT\n IMPRESSION: Scar.\n ADDENDUM: Told.\n END OF IMPRESSION: x",
         {"wet_read": "Mass.", "impression": "Scar.", "addendum": "Told."}),
        ("IMPRESSION: Mass.\n ADDENDUM:\n IMPRESSION: Scar.", {"impression": "Scar."}),
        ("IMPRESSION: Seen at\n 3:45 p.m. Compared with ___:\n Mass.",
         {"impression": "Seen at\n 3:45 p.m. Compared with ___:\n Mass."}),
        ("", {}),
        ("\0 \n", {}),
        ("FINDINGS:", {}),
    ],
)  # fmt: skip
def test_sections_of_reports_that_are_written_differently(report, expected):
    assert report_sections(report) == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Seen at noon.\n\nLungs: clear, no mass.", "Lungs: clear, no mass."),
        ("No mass", "No mass"),
        (" FINAL REPORT\n PORTABLE CHEST, ___\n \n Compared with ___.\n \n Mass.", "Compared with ___.\n\n Mass."),
        (" FINAL REPORT\n Mass.", "Mass."),
        (" HISTORY: Cough.\n \n COMPARISON: None.\n \n Mass.\n \n Scar.", "Mass.\n\n Scar."),
        (" HISTORY: Cough.\n \n IMPRESSION: \n", ""),
    ],
)
def test_last_paragraph_is_all_after_the_first_blank_line_of_the_last_section(report, expected):
    sections = report_sections(report)
    assert sections.get("last_paragraph", "") == expected
    assert sections.get("comparison", "None.") == "None."  # goes on no further


def test_text_to_train_on_is_chosen_by_name():
    both = {"findings": "Lungs are clear", "impression": "1. Mass XXXX.", "comparison": "None."}
    texts = {name: report_text(both, name) for name in TEXTS}
    assert texts == {
        "findings+impression": "Lungs are clear. 1. Mass.",
        "impression": "1. Mass.",
        "impression or findings": "1. Mass.",
        "findings": "Lungs are clear.",
        "longer": "Lungs are clear.",
        "mimic-cxr": "1. Mass.",
    }
    assert report_text(both) == texts["findings+impression"]
    only = {"findings": None, "impression": " ___ ", "last_paragraph": "Edema", "comparison": "Scar"}
    assert [report_text(only, name) for name in TEXTS] == ["Edema.", "", "Edema.", "", "", "Edema."]
    last = {"comparison": "Scar"}
    assert [report_text(last, name) for name in TEXTS] == ["", "", "", "", "", "Scar."]
    with pytest.raises(ValueError, match="text is 'all', expected one of findings"):
        report_text(both, "all")


# ------------------------------------------------------------------------------------------------------- whatever comes

PIECES = st.sampled_from(
    """XXXX x-XXXX ___ [**N**] <DATE> No no Dr. vs. e.g. p.m. E. effusion Heart HEART the The . .. ... \u2026 , ; : - *
    \u2022 1. 2. 2) 2.5 cm ( ) [ ] < > { } &lt; &amp; lt; &nbsp; <br> <p> <li> period comma paragraph new Dictated
    signed by END OF REPORT FINDINGS: IMPRESSION LUNGS: Findings: FINAL _____
    a \u00e9 \u0130 \U0001f642 \0 \u201c \u2019
    \ufb01 \u2014 \u200b 's / ? ! % = # \ud800""".split()
    + ["\n", "\n\n", "\r\n", "\r", "\t", " ", "  ", "\u00a0", "\u2028"]
)
TEXT = st.one_of(
    st.text(max_size=60),
    st.lists(st.tuples(PIECES, st.sampled_from(["", " ", "\n"])), max_size=25).map(
        lambda pairs: "".join(piece + space for piece, space in pairs)
    ),
)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_cleaning_what_is_clean_changes_nothing(text):
    cleaned = clean_report(text)
    assert clean_report(cleaned) == cleaned == clean_report(text)
    assert cleaned == " ".join(cleaned.split()) and "\0" not in cleaned and not re.search("X{4}|_{2}", cleaned)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_sentences_are_in_order_and_between_them_is_nothing_but_blanks(text):
    position = 0
    for start, end in split_sentences(text):
        assert position <= start < end <= len(text)
        assert not text[position:start].strip() and text[start:end] == text[start:end].strip()
        position = end
    assert not text[position:].strip()


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_sections_of_any_text_are_parts_of_it(text):
    for body in report_sections(text).values():
        assert body and body == body.strip()
        assert set(body) <= set(text) | set("\n- '\"fistl.<>&°µ×")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from("no No effusion heart, mass. 2.5 cm (old) vs. Dr. 1. the; is: lungs".split()), max_size=30)
)
def test_ordinary_text_loses_no_word_but_doubled_ones(words):
    def plain(text):
        found = re.findall(r"[a-z0-9]+", text.lower())
        return [word for before, word in zip(["", *found], found, strict=False) if word != before]

    assert plain(clean_report(" ".join(words))) == plain(" ".join(words))


@pytest.mark.parametrize(
    "piece",
    [
        "\n",
        " ",
        "_",
        "XXXX ",
        "A.",
        "A. ",
        "1. ",
        "FINDINGS:",
        "LUNGS:\n",
        "Dr. ",
        "<p ",
        "&amp;",
        "[**",
        "(",
        "\u2022",
        "a",
    ],
)
def test_a_hundred_thousand_characters_of_one_kind_are_read(piece):
    text = (piece * 100_000)[:100_000]  # with a cost that grows as the square, this would take minutes
    spans = split_sentences(text)
    assert not spans or spans[-1][1] == len(text.rstrip())
    assert clean_report(clean_report(text)) == clean_report(text)
    assert isinstance(report_sections(text), dict) and not is_all_capitals(text.lower())


@pytest.mark.skipif(not OPENI.is_file(), reason="the Open-i reports are not beside this checkout")
def test_cleaning_the_openi_reports_takes_out_marks_and_little_else():
    with gzip.open(OPENI, "rt", encoding="utf-8") as file:
        texts = [record[name] for record in map(json.loads, file) for name in ("findings", "impression")]
    cleaned = [clean_report(text) for text in texts]
    # a count of words, so that a failure shows none of them
    before = sum(len(re.findall(r"[A-Za-z]+", re.sub(r"X{3,}", " ", text))) for text in texts)
    after = sum(len(re.findall(r"[A-Za-z]+", text)) for text in cleaned)
    restored = 72 + 2 * 10  # x-ray; port and cath
    assert len(texts) == 7910 and not any("XXX" in text or ".." in text.replace("...", "") for text in cleaned)
    assert 0 <= before + restored - after < 60
    assert sum(bool(text) for text in texts) - sum(bool(text) for text in cleaned) < 10

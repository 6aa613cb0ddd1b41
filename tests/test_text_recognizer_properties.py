"""Whatever the text: spans lie inside it, in order and apart, and come out the same again."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from MMCLIP.text.assertion import ASSERTIONS
from MMCLIP.text.entities import LexiconRecognizer
from MMCLIP.text.vocabulary import KINDS, vocabulary


WORDS = [
    "no", "No", "without", "may represent", "cannot be excluded", "and", "or", ",", ".", ";", ":", "\n", "\n\n", "1.",
    "pleural effusion", "Effusions", "PNEUMOTHORAX", "ground-glass", "opacity", "versus", "resolved", "left", "heart",
    "___", "XXXX", "and/or", "but", "unchanged", "COPD", "cardiomegaly", "lungs are clear", "(", ")", "2.5", "cm",
    "<b>", "&amp;", "İ", "ﬁ", "é", "🫁", "\x00", "\u202e", "Erguss", "胸水", "\t", "no change in", "either", "nor",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=300),
    st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join),
    st.lists(st.sampled_from([*WORDS, "a", "-", "'", "’", "ß"]), max_size=40).map("".join),
)


@pytest.fixture(scope="module")
def recognizer():
    return LexiconRecognizer()


def check(text, entities):
    end = 0
    for entity in entities:
        assert end <= entity.start < entity.end <= len(text)
        end = entity.end
        assert text[entity.start : entity.end].strip() == text[entity.start : entity.end] != ""
        assert entity.concept in vocabulary() and entity.kind in KINDS and entity.assertion in ASSERTIONS
        assert (entity.cue_start is None) == (entity.cue_end is None)
        if entity.cue_start is not None:
            assert entity.assertion != "present" and 0 <= entity.cue_start < entity.cue_end <= len(text)
        else:
            assert entity.assertion == "present"


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_spans_lie_inside_the_text_apart_and_come_again(recognizer, text):
    entities = recognizer(text)
    check(text, entities)
    assert recognizer(text) == entities == LexiconRecognizer.find(recognizer, ["no effusion", text])[1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=TEXTS, second=TEXTS)
def test_what_follows_a_blank_line_says_nothing_of_what_stands_before(recognizer, first, second):
    first = first.rstrip() + ". X"  # a sentence begins, so that the last mark of `first` is complete
    alone = recognizer(first)
    assert recognizer(f"{first}.\n\n{second}")[: len(alone)] == alone


@pytest.mark.parametrize(
    "text",
    [
        " " * 100_000,
        "\n" * 100_000,
        "no " * 33_334,
        "effusion " * 11_112,
        "no effusion or " * 6_667,
        "a" * 100_000,
        "effusion, " * 10_000,
        "🫁" * 100_000,
        "_" * 100_000,
        "XXXX " * 20_000,
        "1. " * 33_334,
        "<p>No effusion.</p>" * 5_264,
        "No effusion. " * 7_693,
        "versus effusion and " * 5_000,
    ],
    ids=lambda text: text[:12],
)
def test_very_long_text_is_read_to_its_end(recognizer, text):
    entities = recognizer(text)
    check(text, entities)
    assert len(entities) == text.count("effusion")


@pytest.mark.parametrize(
    ("text", "concepts"),
    [
        ("", []),
        (" \n\t ", []),
        ("Ninguna alteración. Derrame pleural.", ["pleura"]),
        ("Kein Pneumothorax.", ["pneumothorax"]),
        ("<b>Cardiomegaly</b> &amp; <i>edema</i>", ["cardiomegaly", "edema"]),
        ("ple\x00ural effu\x00sion", []),
        ("🫁effusion🫁", ["pleural effusion"]),
        ("pleural_effusion", ["pleural effusion"]),
    ],
)
def test_other_texts_than_reports(recognizer, text, concepts):
    assert [entity.concept for entity in recognizer(text)] == concepts

"""Present, absent or uncertain: against labels that were given by reading, and rule by rule."""

import collections
import gzip
import json
from pathlib import Path

import pytest
import yaml

from MMCLIP.text.assertion import CUES_FILE, add_cues, assert_spans
from MMCLIP.text.entities import LexiconRecognizer, sentence_numbers
from MMCLIP.text.lexicon import PhraseIndex, find_words, longest
from MMCLIP.text.vocabulary import LABEL_KINDS


SAMPLE = Path(__file__).with_name("assertion_sample.yaml")
OPENI = Path(__file__).resolve().parents[2] / "shared" / "data" / "openi-reports" / "reports.jsonl.gz"


@pytest.fixture(scope="module")
def recognizer():
    return LexiconRecognizer()


@pytest.fixture(scope="module")
def sample():
    return yaml.load(SAMPLE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def said(recognizer, text, start, end):
    """What a text says of its mention from `start` to `end`; "missed" where none of its words is found."""
    met = [entity for entity in recognizer(text) if entity.start < end and entity.end > start]
    met.sort(key=lambda entity: entity.kind in LABEL_KINDS)
    return met[-1].assertion if met else "missed"


def verdicts(recognizer, text):
    """{concept: assertion} of findings, diseases and devices."""
    return {entity.concept: entity.assertion for entity in recognizer(text) if entity.kind in LABEL_KINDS}


def test_paraphrased_mentions_are_read_as_they_were_labelled(recognizer, sample):
    counts = collections.Counter()
    for mention in (mention for mention in sample if "text" in mention):
        before, inside, after = mention["text"].replace("»", "«").split("«")
        found = said(recognizer, before + inside + after, len(before), len(before + inside))
        counts["missed" if found == "missed" else found == mention["assertion"]] += 1
    assert sum(counts.values()) >= 300
    assert counts["missed"] <= 0.05 * sum(counts.values())
    assert counts[True] >= 0.97 * (counts[True] + counts[False]), counts


@pytest.mark.skipif(not OPENI.is_file(), reason="the Open-i reports are not beside this checkout")
@pytest.mark.parametrize("part", ["tune", "test"])
def test_original_mentions_are_read_as_they_were_labelled(recognizer, sample, part):
    with gzip.open(OPENI, "rt", encoding="utf-8") as file:
        texts = {r["uid"]: f"{r['findings']}\n\n{r['impression']}" for r in map(json.loads, file)}
    mentions = [mention for mention in sample if mention["part"] == part]
    right = [m for m in mentions if said(recognizer, texts[m["uid"]], m["start"], m["end"]) == m["assertion"]]
    assert len(mentions) >= 300 and len(right) >= 0.97 * len(mentions)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the cause of what is seen is hedged, what is seen is not
        ("Opacity may represent pneumonia.", {"lung opacity": "present", "pneumonia": "uncertain"}),
        ("Opacity possibly due to pneumonia.", {"lung opacity": "present", "pneumonia": "uncertain"}),
        ("Opacity due to pneumonia.", {"lung opacity": "present", "pneumonia": "present"}),
        # alternatives
        ("Atelectasis versus pneumonia.", {"atelectasis": "uncertain", "pneumonia": "uncertain"}),
        ("Mass, atelectasis vs. edema.", {"mass": "present", "atelectasis": "uncertain", "edema": "uncertain"}),
        ("Atelectasis or pneumonia at the left base.", {"atelectasis": "uncertain", "pneumonia": "uncertain"}),
        ("No atelectasis or pneumonia.", {"atelectasis": "absent", "pneumonia": "absent"}),
        ("No change in atelectasis or pneumothorax.", {"atelectasis": "present", "pneumothorax": "present"}),
        ("Nodule and mass.", {"nodule": "present", "mass": "present"}),
        # behind the entity
        ("Pneumonia cannot be completely excluded.", {"pneumonia": "uncertain"}),
        ("Pneumonia is less likely but not excluded.", {"pneumonia": "uncertain"}),
        ("Small pneumothorax, which has resolved.", {"pneumothorax": "absent"}),
        ("Edema has resolved but cardiomegaly persists.", {"edema": "absent", "cardiomegaly": "present"}),
        ("The pacemaker has been removed.", {"pacemaker": "absent"}),
        # a cue ends with its clause
        ("No edema, although cardiomegaly is seen.", {"edema": "absent", "cardiomegaly": "present"}),
        ("Cardiomegaly without edema or mass.", {"cardiomegaly": "present", "edema": "absent", "mass": "absent"}),
        ("Rule out pneumonia. Cardiomegaly.", {"pneumonia": "uncertain", "cardiomegaly": "present"}),
        ("Free of edema.\n\nCardiomegaly", {"edema": "absent", "cardiomegaly": "present"}),
        ("1. No edema 2. Cardiomegaly", {"edema": "absent", "cardiomegaly": "present"}),
        ("NO EDEMA. CARDIOMEGALY.", {"edema": "absent", "cardiomegaly": "present"}),
        # hides a shorter cue
        ("Effusion is not significantly changed.", {"pleural effusion": "present"}),
        ("Effusion is not well seen.", {"pleural effusion": "present"}),
        # the denial of a statement of normality goes on
        ("No acute osseous abnormality or pneumothorax.", {"pneumothorax": "absent"}),
        ("No acute bony abnormality, edema, or mass.", {"edema": "absent", "mass": "absent"}),
        ("No acute osseous abnormality. Edema.", {"edema": "present"}),
        ("No acute osseous abnormality, small pneumothorax.", {"pneumothorax": "present"}),
        # a new statement, though only a comma parts it
        ("No pneumothorax, heart is mildly enlarged.", {"pneumothorax": "absent", "cardiomegaly": "present"}),
        ("No pneumothorax, mass is seen.", {"pneumothorax": "absent", "mass": "absent"}),
        ("No effusion, possible pneumonia.", {"pleural effusion": "absent", "pneumonia": "uncertain"}),
        ("No effusion and mild cardiomegaly.", {"pleural effusion": "absent", "cardiomegaly": "present"}),
        ("No mass following pacemaker placement.", {"mass": "absent", "pacemaker": "present"}),
        # forms and short forms
        ("Pneumothorax: none. Edema: none.", {"pneumothorax": "absent", "edema": "absent"}),
        ("R/O pneumonia. Mass w/o edema.", {"pneumonia": "uncertain", "mass": "present", "edema": "absent"}),
        # gone in part, or not yet
        ("Partially resolved consolidation.", {"consolidation": "present"}),
        ("The pacemaker has not been removed.", {"pacemaker": "present"}),
        ("No mass effect.", {"mass": None}),
        ("Heart size is normal to mildly enlarged.", {"cardiomegaly": None}),
        # stronger than a hedge within it
        ("No definite or suspected pneumonia.", {"pneumonia": "absent"}),
        ("Density, XXXX representing atelectasis.", {"atelectasis": "uncertain"}),
    ],
)  # fmt: skip
def test_each_rule(recognizer, text, expected):
    found = verdicts(recognizer, text)
    assert {concept: found.get(concept) for concept in expected} == expected


def test_entity_tells_the_cue_that_made_it(recognizer):
    text = "No edema, and nodules may be granulomas. Mass cannot be excluded."
    cues = {e.concept: text[e.cue_start : e.cue_end] for e in recognizer(text) if e.cue_start is not None}
    assert (cues["edema"], cues["granuloma"], cues["mass"]) == ("No", "may", "cannot be excluded")


def test_verdicts_do_not_depend_on_where_the_spans_come_from():
    words = find_words("no zebra, but a mule")
    index = PhraseIndex()
    add_cues(index)
    spans = [(1, 2), (5, 6)]
    found = assert_spans(
        words, sentence_numbers("no zebra, but a mule", words), spans, ["finding"] * 2, index.find(words)
    )
    assert [verdict.assertion for verdict in found] == ["absent", "present"]


def test_longest_phrase_wins_and_none_reaches_over_the_end_of_a_sentence():
    index = PhraseIndex()
    for phrase in ("rib", "rib fracture", "fracture of rib"):
        index.add(phrase, phrase)
    words = find_words("rib fractures of rib. fracture of ribs")
    in_two, cut = [0] * 5 + [1] * 3, [0] * 6 + [1] * 2
    assert [match.value for match in longest(index.find(words), in_two)] == ["fracture of rib"] * 2 + ["rib"]
    assert [match.value for match in longest(index.find(words), cut)] == ["fracture of rib", "rib", "rib"]
    assert [match.first for match in longest(index.find(words), in_two, spans=[(0, 2)])] == [5, 0, 3]


def test_every_cue_of_the_file_is_text_and_stands_there_once():
    groups = yaml.safe_load(CUES_FILE.read_text(encoding="utf-8"))
    assert set(groups) == {"absent", "uncertain", "pseudo", "unchanged", "end", "cause"}
    assert set(groups["absent"]) | set(groups["uncertain"]) == {"before", "after", "nearest", "between"}
    for group in (*groups["absent"].values(), *groups["uncertain"].values(), *(groups[g] for g in list(groups)[2:])):
        phrases = [phrase for line in group for phrase in line]
        assert all(isinstance(phrase, str) for phrase in phrases), "an unquoted no is False in YAML"
        assert len(phrases) == len(set(phrases))

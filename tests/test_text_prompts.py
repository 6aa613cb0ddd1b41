import itertools

import numpy as np
import pytest
import yaml

from MMCLIP.text.entities import LexiconRecognizer, report_labels
from MMCLIP.text.prompts import (
    SIDES,
    WORDS_FILE,
    attribute_nouns,
    has_side,
    label_nouns,
    make_noun,
    negative_prompts,
    positive_prompts,
    sample_prompt,
    severities,
)
from MMCLIP.text.vocabulary import LABEL_KINDS, vocabulary, with_broader_labels


LABELS = [concept.name for concept in vocabulary().values() if concept.kind in LABEL_KINDS]
DESCRIBED = [label for label in LABELS if has_side(label) or severities(label)]


@pytest.fixture(scope="module")
def recognizer():
    return LexiconRecognizer()


def drawn(*arguments, seed=0, number=200, **options):
    generator = np.random.default_rng(seed)
    return [sample_prompt(*arguments, generator, **options) for _ in range(number)]


def described(label):
    """Every (side, severity) that may be said of a label, None for not known."""
    return itertools.product((None, *SIDES) if has_side(label) else (None,), (None, *severities(label)))


def test_first_pair_is_the_plain_statement():
    assert positive_prompts("Effusion")[0] == "There is pleural effusion."
    assert negative_prompts("Effusion")[0] == "There is no pleural effusion."
    assert positive_prompts("hiatal hernia")[0] == "There is a hiatal hernia."
    assert positive_prompts("sternal wires")[0] == "There are sternal wires."
    assert negative_prompts("sternal wires")[:2] == ["There are no sternal wires.", "Sternal wires are not present."]


def test_articles_and_verbs_follow_the_noun():
    first = {label: positive_prompts(label)[0] for label in LABELS}
    assert first["bronchiectasis"] == "There is bronchiectasis."
    assert first["endotracheal tube"] == "There is an endotracheal tube."
    assert first["low lung volume"] == "There are low lung volumes."
    assert first["sars"].startswith("There is ")
    plural = {"Kerley lines", "septic emboli", "bullae", "sequelae of tuberculosis", "opacities in both lungs"}
    singular = {"ascites", "SARS", "crowding of the bronchovascular markings", "scoliosis", "thymus", "abscess"}
    assert {phrase for phrase in plural | singular if make_noun(phrase, countable=False).is_plural} == plural
    articles = {
        phrase: make_noun(phrase, countable=True).article
        for phrase in ("old fracture", "ureteral stent", "nodule", "nodules")
    }
    assert articles == {"old fracture": "an ", "ureteral stent": "a ", "nodule": "a ", "nodules": ""}
    for label, text in first.items():
        noun = label_nouns(label)[0]
        assert text == f"There {noun.verb} {noun.article}{noun.text}."
        assert noun.article in ({""} if noun.is_plural or not vocabulary()[label].countable else {"a ", "an "})


def test_positive_prompt_says_present_and_its_partner_absent(recognizer):
    for label in LABELS:
        pairs = list(zip(positive_prompts(label), negative_prompts(label), strict=True))
        assert len(pairs) >= 5
        for positive, negative in pairs:
            assert label in report_labels(recognizer(positive))[0], positive
            present, absent, _ = report_labels(recognizer(negative))
            assert label in absent and not present, negative


def test_no_finding_has_its_own_words_both_ways(recognizer):
    assert "Normal chest radiograph." in positive_prompts("no finding")
    assert not any("no finding" in prompt.lower() for prompt in positive_prompts("no finding"))
    for negative in negative_prompts("No Finding"):
        assert "no finding" not in report_labels(recognizer(negative))[0]


def test_side_and_severity_are_read_as_grammar_wants():
    assert attribute_nouns("pleural effusion", "left", "small")[0].text == "small left pleural effusion"
    texts = drawn(["effusion"], [], attributes={"effusion": {"side": "left", "severity": "small"}}, attribute_ratio=1)
    assert "There is a small left pleural effusion." in texts
    assert "A small left-sided pleural effusion is present." in texts
    assert "The radiograph shows a small pleural effusion on the left." in texts
    texts = drawn(["consolidation"], [], attributes={"consolidation": {"side": "bilateral"}}, attribute_ratio=1)
    assert "Bilateral consolidation is present." in texts
    assert "There is airspace consolidation on both sides." in texts
    texts = drawn(["nodule"], [], attributes={"nodule": {"side": "bilateral"}}, attribute_ratio=1)
    assert "There are bilateral pulmonary nodules." in texts and "Bilateral nodules are seen." in texts
    texts = drawn(["cardiomegaly"], [], attributes={"cardiomegaly": {"severity": "mild"}}, attribute_ratio=1)
    assert "There is mild cardiomegaly." in texts


def test_what_has_a_side_or_severity_is_a_label_with_words_for_each():
    assert len(DESCRIBED) >= 30 and set(yaml.safe_load(WORDS_FILE.read_text())["attributes"]) == set(DESCRIBED)
    for label in DESCRIBED:
        for side, severity in described(label):
            for noun in attribute_nouns(label, side, severity):
                assert (severity or "") in noun.text
                words = {"left": ("left",), "right": ("right",), "bilateral": ("bilateral", "both sides")}.get(side)
                assert words is None or any(word in noun.text for word in words)
                assert noun.article == "" if noun.is_plural else noun.text.split()[0] != noun.article.strip()


def test_a_described_label_is_read_back_as_that_label(recognizer):
    for label in DESCRIBED:
        for side, severity in described(label):
            for noun in attribute_nouns(label, side, severity):
                texts = (f"There {noun.verb} {noun.article}{noun.text}.", f"{noun.text}.")
                for text in texts:
                    present, _, uncertain = report_labels(recognizer(text))
                    assert label in present and not uncertain, text
                denial = f"There {noun.verb} no {noun.text}."
                present, absent, _ = report_labels(recognizer(denial))
                assert label in absent and not present, denial


def test_an_attribute_is_said_as_often_as_asked_and_never_when_not_known():
    known = {"pleural effusion": {"side": "left", "severity": "small"}}
    present, absent = ["pleural effusion", "atelectasis", "mass"], ["edema", "pneumothorax"]
    assert all("left" in text for text in drawn(present, absent, attributes=known, attribute_ratio=1))
    assert 70 < sum("left" in text for text in drawn(present, absent, attributes=known)) < 130
    for options in ({"attributes": known, "attribute_ratio": 0}, {}):
        for text in drawn(present, absent, **options):
            assert not {"left", "right", "both", "bilateral", "small"} & set(text.lower().rstrip(".").split()), text
    for text in drawn(["pleural effusion"], [], attributes={"pleural effusion": {"severity": "small"}}):
        assert "left" not in text and "right" not in text


def test_a_side_is_said_in_a_sentence_with_one_label_alone(recognizer):
    known = {"mass": {"side": "left"}}
    for text in drawn(["mass", "pneumothorax", "goiter"], ["edema", "nodule"], attributes=known):
        for sentence in text.split(". "):
            named = [entity.concept for entity in recognizer(sentence) if entity.kind in LABEL_KINDS]
            assert "left" not in sentence.lower() or named == ["mass"], text


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"effusion": {"side": "upper"}}, "side of 'pleural effusion' is 'upper'.*left"),
        ({"effusion": {"severity": "mild"}}, "severity of 'pleural effusion' is 'mild'.*small"),
        ({"effusion": {"size": "small"}}, r"keys \['size'\], expected 'side' and 'severity'"),
        ({"cardiomegaly": {"side": "left"}}, "side of 'cardiomegaly' is 'left', expected none"),
        ({"mass": {"side": "left"}}, "'mass', which is not among the present"),
        ({"efusion": {"side": "left"}}, "unknown label 'efusion'"),
    ],
)
def test_an_attribute_that_the_label_does_not_take_is_an_error(attributes, message):
    with pytest.raises(ValueError, match=message):
        sample_prompt(["effusion", "cardiomegaly"], [], np.random.default_rng(0), attributes=attributes)


def test_sampled_prompt_states_all_present_labels_and_only_absent_ones_as_absent(recognizer):
    generator = np.random.default_rng(0)
    for _ in range(500):
        number = int(generator.integers(0, 5))
        order = [LABELS[i] for i in generator.permutation(len(LABELS))[: number + 4]]
        present, absent = order[:number], order[number:]
        attributes = {}
        for label in set(present) & set(DESCRIBED):
            options = list(described(label))
            side, severity = options[generator.integers(len(options))]
            attributes[label] = {"side": side, "severity": severity}
        allowed = set(absent) - set(with_broader_labels(present))
        if not (present or allowed):
            continue
        text = sample_prompt(present, absent, generator, attributes=attributes)
        read_present, read_absent, uncertain = report_labels(recognizer(text))
        assert set(read_present) == set(with_broader_labels(present)), text
        assert set(read_absent) - {"no finding"} <= allowed, text
        assert not uncertain, text


def test_every_label_is_stated_in_every_form(recognizer):
    generator = np.random.default_rng(0)
    for label in LABELS:
        for _ in range(12):
            text = sample_prompt([label], [], generator)
            assert set(report_labels(recognizer(text))[0]) == set(with_broader_labels([label])), text
            text = sample_prompt([], [label], generator)
            present, absent, uncertain = report_labels(recognizer(text))
            assert label in absent and not present and not uncertain, text


def test_a_broader_label_is_not_named_beside_its_narrower_one(recognizer):
    for text in drawn(["pneumonia", "covid-19", "support device", "pacemaker"], [], number=100):
        named = [entity.concept for entity in recognizer(text) if entity.kind in LABEL_KINDS]
        assert sorted(named) == ["covid-19", "pacemaker"], text


def test_what_a_present_label_implies_is_never_denied():
    for text in drawn(["covid-19"], ["pneumonia", "covid-19", "edema"], negative_ratio=1.0):
        assert "no " in text.lower() and "edema" in text, text
        assert "lung infection" not in text and text.lower().count("pneumonia") <= 1, text
    assert not any("No" in text for text in drawn(["covid-19"], ["pneumonia"], negative_ratio=1.0))


def test_sampled_prompt_repeats_with_its_seed_and_varies_without():
    known = {"edema": {"severity": "mild"}}

    def texts(seed):
        return [
            sample_prompt(["edema", "mass"], ["nodule"], np.random.default_rng(seed + i), attributes=known)
            for i in range(20)
        ]

    assert texts(0) == texts(0)
    assert len(set(texts(0))) > 10


def test_labels_are_drawn_in_every_order_and_up_to_the_allowed_number():
    texts = drawn(["no finding"], ["edema", "mass", "nodule", "scoliosis"], number=300, negative_ratio=1.0)
    counts = [sum(word in text for word in ("edema", "mass", "nodule", "scoliosis")) for text in texts]
    assert set(counts) == {1, 2, 3}
    orders = {text.find("cardiomegaly") < text.find("goiter") for text in drawn(["cardiomegaly", "goiter"], [])}
    assert orders == {True, False}


def test_no_negatives_are_stated_when_none_are_allowed():
    texts = drawn(["edema"], ["nodule", "mass"], max_negatives=0)
    assert not any("nodule" in text or "mass" in text for text in texts)
    assert all("nodule" in text for text in drawn(["edema"], ["nodule"], negative_ratio=1.0))
    with pytest.raises(ValueError, match="max_negatives is 0"):
        drawn([], ["nodule"], max_negatives=0)


def test_no_finding_is_not_said_beside_a_finding_but_beside_a_device(recognizer):
    for text in drawn(["no finding", "edema"], []):
        assert report_labels(recognizer(text))[0] == ["edema"]
    for text in drawn(["no finding", "pacemaker"], []):
        assert set(report_labels(recognizer(text))[0]) == {"no finding", "pacemaker", "support device"}, text
        assert "Normal" not in text and "Unremarkable" not in text


@pytest.mark.parametrize(("present", "absent"), [([], []), ([], ["no finding"])])
def test_prompt_of_nothing_is_an_error(present, absent):
    with pytest.raises(ValueError, match="at least one present label"):
        sample_prompt(present, absent, np.random.default_rng(0))

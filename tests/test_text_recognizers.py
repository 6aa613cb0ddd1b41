"""Pipelines of spaCy and models of transformers in place of the lexicon: tiny ones, loaded from disk."""

import json

import pytest
import spacy
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForTokenClassification,
)

from MMCLIP.data.dataset import MMCLIPDataset
from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.text.build_tokenizer import build_tokenizer
from MMCLIP.text.entities import Entity, LexiconRecognizer, load_recognizer, parse_labels, report_labels
from MMCLIP.text.recognizers import SpacyRecognizer, TokenClassificationRecognizer


LABELS = ["O", "B-DISEASE", "I-DISEASE", "B-Anatomy", "I-Anatomy", "B-AGE"]
WORDS = {"effusion": 2, "pleural": 1, "gromblimosis": 1, "lung": 3, "lungs": 3, "old": 5}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A token-classification model that knows the label of each word piece by heart: no layer, one-hot embeddings."""
    folder = tmp_path_factory.mktemp("tagger")
    tokenizer = build_tokenizer(
        ["pleural effusion lung lungs old no small left right patient the in of year is there and base"]
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=32,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    model = BertForTokenClassification(config)
    embeddings = model.bert.embeddings
    with torch.no_grad():
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings, embeddings.word_embeddings):
            table.weight.zero_()
        embeddings.word_embeddings.weight[:, 0] = 1.0
        for word, label in WORDS.items():
            for token in tokenizer(word, add_special_tokens=False)["input_ids"]:
                embeddings.word_embeddings.weight[token] = torch.eye(8)[label]
        model.classifier.weight.copy_(torch.eye(len(LABELS), 8))
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tagger(model_folder):
    return load_recognizer(f"hf:{model_folder}", {"AGE": None})


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns(
        [
            {"label": "DISEASE", "pattern": [{"LOWER": "pleural"}, {"LOWER": "effusion"}]},
            {"label": "DISEASE", "pattern": [{"LOWER": "gromblimosis"}]},
            {"label": "CHEMICAL", "pattern": [{"LOWER": "barium"}]},
        ]
    )
    folder = tmp_path_factory.mktemp("pipeline") / "rules"
    pipeline.to_disk(folder)
    return folder


def test_model_says_where_vocabulary_says_what_and_the_rules_say_whether(tagger):
    text = "No pleural effusion in the left lung, and there is gromblimosis."
    assert tagger(text) == [
        Entity(3, 19, "pleural effusion", "finding", "absent", 0, 2),
        Entity(32, 36, "lung", "anatomy", "absent", 0, 2),
        Entity(51, 63, "gromblimosis", "disease", "present"),
    ]


def test_label_that_means_nothing_here_is_left_out_when_that_is_said(model_folder, tagger):
    assert [entity.concept for entity in tagger("old pleural effusion")] == ["pleural effusion"]
    with pytest.raises(ValueError, match="label 'AGE', whose meaning is not known.*one of finding, disease"):
        load_recognizer(f"hf:{model_folder}")


def test_meaning_of_a_label_may_be_given_with_an_assertion(model_folder):
    recognizer = TokenClassificationRecognizer(
        str(model_folder), {"AGE": "descriptor", "DISEASE": "finding:uncertain", "Anatomy": None}
    )
    assert recognizer("no old gromblimosis, lung") == [
        Entity(3, 6, "chronic", "descriptor", "absent", 0, 2),
        Entity(7, 19, "gromblimosis", "finding", "uncertain"),
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"AGE": None, "DRUG": "device"}, r"has no labels \['DRUG'\]; it has \['AGE', 'Anatomy', 'DISEASE'\]"),
        ({"AGE": "number"}, "the label 'AGE' shall mean 'number'"),
        ({"AGE": "finding:maybe"}, "shall mean 'finding:maybe'"),
        ({"AGE": None, "DISEASE": None, "Anatomy": None}, "none of its labels"),
    ],
)
def test_wrong_meanings_are_named(model_folder, labels, message):
    with pytest.raises(ValueError, match=message):
        load_recognizer(f"hf:{model_folder}", labels)


def test_word_in_pieces_is_one_entity(tagger):
    assert len(tagger.pipeline.tokenizer.tokenize("gromblimosis")) > 1
    assert [(entity.start, entity.end) for entity in tagger("the gromblimosis")] == [(4, 16)]


def test_text_longer_than_the_model_is_read_to_its_end(tagger):
    text = "the left base is there. " * 20 + "pleural effusion"
    assert [(entity.start, entity.concept) for entity in tagger(text)] == [(len(text) - 16, "pleural effusion")]


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "🫁🫁", "\x00"])
def test_text_without_words_has_no_entities(tagger, text):
    assert tagger(text) == []
    assert [len(found) for found in tagger.find([text, "lung", text])] == [0, 1, 0]


def test_model_that_counts_positions_from_its_padding_reads_long_texts_too(tmp_path):
    tokenizer = build_tokenizer(["the lung is clear"])
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=34,
        pad_token_id=1,
        id2label={0: "O", 1: "B-finding"},
        label2id={"O": 0, "B-finding": 1},
    )
    RobertaForTokenClassification(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recognizer = load_recognizer(f"hf:{tmp_path}")
    assert recognizer.pipeline.tokenizer.model_max_length == 32
    recognizer("the lung is clear " * 40)  # one position too many would be an index out of range
    assert recognizer.fingerprint == load_recognizer(f"hf:{tmp_path}").fingerprint


def test_slow_tokenizer_is_refused(model_folder, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ValueError, match="its tokenizer is slow"):
        load_recognizer(f"hf:{model_folder}", {"AGE": None})


def test_spacy_pipeline_from_a_folder_with_known_labels(pipeline_folder):
    recognizer = load_recognizer(f"spacy:{pipeline_folder}")
    found = recognizer("Barium swallow. Possible pleural effusion. No gromblimosis.")
    assert [(entity.concept, entity.kind, entity.assertion) for entity in found] == [
        ("pleural effusion", "finding", "uncertain"),
        ("gromblimosis", "disease", "absent"),
    ]


def test_negex_of_a_pipeline_is_believed(pipeline_folder):
    pytest.importorskip("negspacy.negation")  # registers the component
    pipeline = spacy.load(pipeline_folder)
    pipeline.add_pipe("sentencizer", first=True)
    pipeline.add_pipe("negex", last=True)
    text = "Patient denies pleural effusion. Possible gromblimosis."
    assert [entity.assertion for entity in SpacyRecognizer(pipeline)(text)] == ["absent", "uncertain"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpacyRecognizer(spacy.blank("en")), "finds no entities"),
        (lambda: load_recognizer("spacy:no_such_pipeline"), "There is no spaCy pipeline 'no_such_pipeline'"),
        (lambda: load_recognizer("scispacy"), "expected 'lexicon', 'spacy:PIPELINE'"),
        (lambda: load_recognizer("hf:"), "expected 'lexicon'"),
        (lambda: load_recognizer("hf:./no/such/folder"), "There is no token-classification model './no/such/folder'"),
        (lambda: load_recognizer("lexicon", {"A": "finding"}), "the recogniser 'lexicon' has its own"),
        (lambda: parse_labels("{"), "is no JSON"),
        (lambda: parse_labels('["finding"]'), "expected a map"),
    ],
)
def test_recogniser_that_cannot_be_had_is_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fingerprint_changes_with_weights_and_meanings(model_folder, tagger):
    assert TokenClassificationRecognizer(str(model_folder), {"AGE": None}).fingerprint == tagger.fingerprint
    assert TokenClassificationRecognizer(str(model_folder), {"AGE": "finding"}).fingerprint != tagger.fingerprint
    other = TokenClassificationRecognizer(str(model_folder), {"AGE": None})
    with torch.no_grad():
        other.pipeline.model.classifier.bias[1] = 0.5
    assert other.fingerprint != tagger.fingerprint


def test_fingerprint_of_a_pipeline_changes_with_its_rules(pipeline_folder):
    one, other = spacy.load(pipeline_folder), spacy.load(pipeline_folder)
    other.get_pipe("entity_ruler").add_patterns([{"label": "DISEASE", "pattern": "anthrax"}])
    assert SpacyRecognizer(one).fingerprint == SpacyRecognizer(pipeline_folder).fingerprint
    assert SpacyRecognizer(one).fingerprint != SpacyRecognizer(other).fingerprint


def test_concepts_beyond_the_vocabulary_are_no_labels(tagger):
    entities = tagger("gromblimosis and pleural effusion")
    assert [entity.concept for entity in entities] == ["gromblimosis", "pleural effusion"]
    assert report_labels(entities) == (["pleural effusion"], ["no finding"], [])


def test_dataset_takes_another_recogniser_for_reports_and_reads_its_own_prompts_by_the_lexicon(tagger):
    rows = phantom_dataset(4, size=32, seed=3, num_unpaired=2)
    dataset, lexicon = MMCLIPDataset(rows, recognizer=tagger), MMCLIPDataset(rows)
    for index, row in enumerate(rows):
        if row["report"] is None:
            assert dataset[index]["entities"] == LexiconRecognizer()(dataset[index]["text"])
        else:
            assert dataset[index]["entities"] == tagger(row["report"]) != lexicon[index]["entities"]


def test_labels_come_as_json():
    assert parse_labels(json.dumps({"A": "finding", "B": None})) == {"A": "finding", "B": None}
    assert parse_labels({"A": "finding"}) == {"A": "finding"}
    assert parse_labels("") == parse_labels(None) == {}

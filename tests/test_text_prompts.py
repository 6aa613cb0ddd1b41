import numpy as np
import pytest

from MMCLIP.text.entities import LexiconRecognizer, report_labels
from MMCLIP.text.prompts import negative_prompts, positive_prompts, sample_prompt
from MMCLIP.text.vocabulary import LABEL_KINDS, vocabulary, with_broader_labels


LABELS = [concept.name for concept in vocabulary().values() if concept.kind in LABEL_KINDS]


@pytest.fixture(scope="module")
def recognizer():
    return LexiconRecognizer()


def test_first_pair_is_the_plain_statement():
    assert positive_prompts("Effusion")[0] == "There is pleural effusion."
    assert negative_prompts("Effusion")[0] == "There is no pleural effusion."
    assert positive_prompts("hiatal hernia")[0] == "There is a hiatal hernia."
    assert positive_prompts("sternal wires")[1] == "Sternal wires are present."


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


def test_sampled_prompt_states_all_present_labels_and_only_absent_ones_as_absent(recognizer):
    generator = np.random.default_rng(0)
    for _ in range(300):
        number = int(generator.integers(0, 5))
        drawn = [LABELS[i] for i in generator.permutation(len(LABELS))[: number + 4]]
        present, absent = drawn[:number], drawn[number:]
        absent = [label for label in absent if label not in with_broader_labels(present)]
        if not absent:
            continue
        text = sample_prompt(present, absent, generator)
        read_present, read_absent, uncertain = report_labels(recognizer(text))
        assert set(read_present) == set(with_broader_labels(present)), text
        assert set(read_absent) - {"no finding"} <= set(absent), text
        assert not uncertain, text


def test_sampled_prompt_repeats_with_its_seed_and_varies_without():
    def texts(seed):
        return [sample_prompt(["edema", "mass"], ["nodule"], np.random.default_rng(seed + i)) for i in range(20)]

    assert texts(0) == texts(0)
    assert len(set(texts(0))) > 5


def test_no_negatives_are_stated_when_none_are_allowed():
    generator = np.random.default_rng(0)
    texts = [sample_prompt(["edema"], ["nodule", "mass"], generator, max_negatives=0) for _ in range(50)]
    assert not any("nodule" in text or "mass" in text for text in texts)
    always = [sample_prompt(["edema"], ["nodule"], generator, negative_ratio=1.0) for _ in range(50)]
    assert all("nodule" in text for text in always)


def test_no_finding_is_not_said_beside_a_finding(recognizer):
    generator = np.random.default_rng(0)
    for _ in range(30):
        assert report_labels(recognizer(sample_prompt(["no finding", "edema"], [], generator)))[0] == ["edema"]


@pytest.mark.parametrize(("present", "absent"), [([], []), ([], ["no finding"])])
def test_prompt_of_nothing_is_an_error(present, absent):
    with pytest.raises(ValueError, match="at least one present label"):
        sample_prompt(present, absent, np.random.default_rng(0))

import itertools
import re

import pytest

from MMCLIP.text.entities import LexiconRecognizer, report_labels
from MMCLIP.text.prompt_sets import POOLINGS, load_prompt_set, prompt_set, prompt_set_names
from MMCLIP.text.prompts import has_side, negative_prompts, positive_prompts, severities
from MMCLIP.text.vocabulary import LABEL_KINDS, vocabulary


LABELS = [concept.name for concept in vocabulary().values() if concept.kind in LABEL_KINDS]


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_every_named_set_has_a_source_a_pooling_and_a_negative_text_for_each_positive_or_none():
    assert len(prompt_set_names()) == len(set(prompt_set_names())) == 12
    for name in prompt_set_names():
        prompts = prompt_set(name)
        assert prompts.name == name and prompts.source and prompts.pooling in POOLINGS and prompts.prompts
        for positive, negative in prompts.prompts.values():
            assert positive and len(negative) in (0, len(positive))
            for side in (positive, negative):
                assert len(set(side)) == len(side) and all(text == " ".join(text.split()) for text in side)


def test_our_words_are_the_default_and_their_first_pair_is_a_set_of_its_own():
    for label in (*LABELS, "no finding"):
        assert prompt_set("mmclip").texts([label]) == [(tuple(positive_prompts(label)), tuple(negative_prompts(label)))]
    assert prompt_set("sentence").texts(["Effusion"]) == [
        (("There is pleural effusion.",), ("There is no pleural effusion.",))
    ]


def test_sides_and_severities_are_each_set_against_their_denial():
    positive, negative = prompt_set("mmclip-attributes").texts(["pneumothorax"])[0]
    number = (1 + 3 * has_side("pneumothorax")) * (1 + len(severities("pneumothorax")))
    assert len(positive) == number == 20
    place = positive.index("There is a small left pneumothorax.")
    assert negative[place] == "There is no small left pneumothorax."
    assert "There are large bilateral pneumothoraces." in positive
    assert prompt_set("mmclip-attributes").texts(["goiter"]) == prompt_set("sentence").texts(["goiter"])


def test_published_words_are_the_published_ones():
    assert prompt_set("chexzero").texts(["effusion", "no finding"]) == [
        (("Pleural Effusion",), ("no Pleural Effusion",)),
        (("No Finding",), ("no No Finding",)),
    ]
    assert prompt_set("cxr-clip").texts(["edema"]) == [(("Edema",), ("No Edema",))]
    assert prompt_set("chexzero").texts(["scoliosis"]) == [(("Scoliosis",), ("no Scoliosis",))]
    positive, negative = prompt_set("biovil-rsna").texts(["pneumonia"])[0]
    assert len(positive) == len(negative) == 4 and "No evidence of acute pneumonia" in negative
    assert prompt_set("kad").texts(["Pleural_Thickening", "mass"]) == [(("pleural thicken",), ()), (("lung mass",), ())]
    assert prompt_set("carzero").texts(["edema"]) == [(("There is edema",), ())]


def test_products_have_the_published_numbers_and_are_all_combinations():
    five = ["atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion"]
    for name, pooling in (("gloria-style", "max_score"), ("cxr-clip-5x200-style", "mean_score")):
        texts = prompt_set(name).texts(five)
        assert [len(positive) for positive, _ in texts] == [210, 15, 192, 18, 54]
        assert prompt_set(name).pooling == pooling
        assert "small pleural effusion on the left" in texts[4][0] and "pleural effusion on the left" in texts[4][0]
    pneumonia, covid = prompt_set("medclip-style").texts(["pneumonia", "covid-19"])
    assert (len(pneumonia[0]), len(covid[0])) == (6 * 4 * 13, 2 * 1 * 2 * 3)
    assert not any("pneumonia" in text for text in pneumonia[0])


def test_sets_that_name_their_labels_are_read_back_as_meant():
    recognizer = LexiconRecognizer()
    for name in ("mmclip-attributes", "gloria-style", "medklip-style"):
        prompts = prompt_set(name).prompts
        for label, (positive, negative) in prompts.items():
            if label == "no finding":
                continue
            for text in positive:
                assert label in report_labels(recognizer(text))[0], text
            for text in negative:
                present, absent, _ = report_labels(recognizer(text))
                assert label in absent and not present, text


def test_a_label_without_a_text_is_an_error_that_says_which_there_are():
    with pytest.raises(ValueError, match="'gloria-style' has no text for mass, nodule.*atelectasis, cardiomegaly"):
        prompt_set("gloria-style").texts(["edema", "mass", "nodule"])
    with pytest.raises(ValueError, match="no prompts 'chexero'.*mmclip, sentence.*chexzero"):
        prompt_set("chexero")


def test_a_file_of_ones_own_may_have_templates_names_labels_and_products(written):
    path = written("""
source: a colleague
pooling: max_score
names: [Effusion]
templates: {positive: ["{Name}!", "{A_phrase} {is} here"], negative: ["No {name}!", "no {phrase} here"]}
labels:
  Mass: {positive: [A big mass.]}
  edema: {product: [["", mild], [edema], [in the lungs]]}
""")
    prompts = prompt_set(str(path))
    assert (prompts.name, prompts.source, prompts.pooling) == ("mine", "a colleague", "max_score")
    assert prompts.texts(["mass", "edema"]) == [
        (("A big mass.",), ()),
        (("edema in the lungs", "mild edema in the lungs"), ()),
    ]
    positive, negative = prompts.texts(["sternal wires"])[0]
    assert (
        positive[0] == "Sternal Wires!" and "Sternal wires are here" in positive and negative[0] == "No sternal wires!"
    )
    effusion = prompts.texts(["pleural effusion"])[0]
    assert effusion[0][0] == "Effusion!" and effusion[1][0] == "No Effusion!"
    path.write_text("labels: {mass: {positive: [Other.]}}", encoding="utf-8")
    assert prompt_set(str(path)).texts(["mass"]) == [(("Other.",), ())]
    assert load_prompt_set(path).source == str(path)


def test_the_labels_that_a_file_names_and_data_lack_are_told_those_of_templates_and_published_sets_are_not(written):
    prompts = prompt_set(
        str(written("names: [Effusion]\ntemplates: {positive: ['{Name}']}\nlabels: {mass: {positive: [x]}}"))
    )
    assert prompts.unused(["edema", "mass"]) == ["pleural effusion"] and prompts.unused(prompts.listed) == []
    with pytest.raises(ValueError, match="mine.yaml: there are texts for pleural effusion, but no row"):
        prompts.check_used(["edema", "mass"])
    assert prompt_set("chexzero").unused([]) == prompt_set("gloria-style").unused([]) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: {efusion: {positive: [x]}}", "mine.yaml: labels: unknown label 'efusion'.*effusion"),
        ("names: [efusion]\ntemplates: {positive: [x]}", "names: unknown label 'efusion'"),
        ("labels: {mass: {positive: []}}", "labels: mass: positive: expected a list of texts, but found"),
        ("labels: {mass: {positive: [x, ' ']}}", "mass: positive: expected a text that is not empty, but found ' '"),
        ("labels: {mass: {positive: [x], negative: [no]}}", "mass: negative: expected a text.*False.*quotes"),
        ("labels: {mass: {positive: x}}", "mass: positive: expected a list of texts, but found 'x'"),
        ("labels: {mass: {positive: [x, y], negative: [z]}}", "mass: 2 positive and 1 negative texts"),
        ("labels: {mass: {negative: [z]}}", "mass: there are no `positive` texts"),
        ("labels: {mass: {positiv: [z]}}", r"mass: unknown keys \['positiv'\], expected positive, negative, product"),
        ("labels: {mass: [x]}", "mass: expected the keys positive.*but found"),
        ("labels: {mass: {positive: [x], product: [[y]]}}", "mass: `product` stands for `positive`"),
        ("labels: {mass: {product: [[y], []]}}", "mass: `product` must be a list of lists of words, none empty"),
        ("labels: {mass: {product: [['']]}}", "mass: product: expected a text that is not empty"),
        ("labels: {Effusion: {positive: [x]}, pleural effusion: {positive: [y]}}", "'Effusion' and 'pleural effusion'"),
        ("labels: [mass]", "`labels` must map labels to their texts, but is list"),
        ("templates: {positive: ['{phras}']}", r"templates: the gaps of '{phras}' cannot be filled.*{phrase}"),
        ("templates: {positive: ['{phrase']}", "templates: the gaps of '{phrase' cannot be filled"),
        ("pooling: mean\nlabels: {mass: {positive: [x]}}", "`pooling` is 'mean', expected one of mean_embedding"),
        ("template: {positive: [x]}", r"unknown keys \['template'\], expected name, source"),
        ("source: me", "there are no texts; give `labels`, `templates`, or both"),
        ("- mass", "expected the keys name.*holds list"),
        ("", "holds NoneType"),
        ("labels: {mass: [", "cannot be read as YAML"),
    ],
)
def test_a_mistake_in_a_file_is_an_error_that_says_where(written, text, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as caught:
        load_prompt_set(written(text))
    assert "mine.yaml" in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="There is no file .*none.yaml"):
        prompt_set(str(tmp_path / "none.yaml"))


def test_texts_of_a_set_are_told_apart_by_label():
    for name in prompt_set_names():
        for (first, one), (second, other) in itertools.combinations(prompt_set(name).prompts.items(), 2):
            assert not set(one[0]) & set(other[0]), (name, first, second)


def test_a_key_that_stands_twice_is_an_error_that_names_it(tmp_path):
    (tmp_path / "twice.yaml").write_text("labels:\n  edema: {positive: [x]}\n  edema: {positive: [y]}\n")
    with pytest.raises(ValueError, match="twice.yaml cannot be read.*the key 'edema' stands twice, again in line 3"):
        prompt_set(str(tmp_path / "twice.yaml"))
    (tmp_path / "merged.yaml").write_text(
        "labels:\n  edema: &shared {positive: [x]}\n  mass: {<<: *shared, positive: [y]}\n"
    )
    assert prompt_set(str(tmp_path / "merged.yaml")).prompts["mass"][0] == ("y",)

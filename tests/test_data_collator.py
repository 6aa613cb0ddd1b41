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
from MMCLIP.data.collator import MMCLIPCollator, group_id
from MMCLIP.text.entities import LexiconRecognizer, report_labels


# "effusion" is one piece, "pneumothorax" three, "cardiomegaly" two
PIECES = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] . , - no small left right pleural effusion pneu ##mo ##thorax cardio ##megaly the "
    "is there of and a seen ##s heart patient walked home today mass"
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
        "sample_seed": (0, 0, index),
        **fields,
    }


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


def test_entity_mask_marks_what_is_there_and_not_what_is_absent_or_where():
    batch = MMCLIPCollator(processor(), 1)([sample("Left effusion. No pneumothorax. Possible mass.")])
    assert pieces(batch["input_ids"][0][batch["entity_mask"][0]]) == ["effusion", "mass"]


def test_entity_mask_of_a_text_that_names_nothing_present_is_every_ordinary_token():
    batch = MMCLIPCollator(processor(), 1)([sample("No effusion."), sample("There is a small mass of the heart.")])
    assert pieces(batch["input_ids"][0][batch["entity_mask"][0]]) == ["no", "effusion", "."]


def test_entity_that_was_cut_off_is_left_alone_and_one_warning_is_given(caplog):
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


def test_mistakes_are_errors_when_the_collator_is_made():
    def fails(message, tokenizer=None, **options):
        with pytest.raises(ValueError, match=message):
            MMCLIPCollator(processor(tokenizer), **{"num_patches": 4, **options})

    fails("mlm_masking is 'words'", mlm_masking="words")
    fails("mlm_ratio is 0", mlm_ratio=0)
    fails("num_patches is 0", num_patches=0)
    fails("prompt_labels: unknown label 'masss'", prompt_labels=("masss",))
    fails("give max_length", tokenizer=bert_tokenizer(max_length=int(1e30)))
    fails("slow tokenizer", tokenizer=SimpleNamespace(is_fast=False))
    without_mask = bert_tokenizer()
    without_mask.mask_token = None
    fails("no mask token", tokenizer=without_mask)

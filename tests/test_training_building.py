"""What is checked and built before the first step: rows, tokenizer, towers, prompts, shuffled pairs."""

import csv

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from MMCLIP import MMCLIPForPreTraining, MMCLIPProcessor
from MMCLIP.data.phantom import phantom_dataset
from MMCLIP.data.readers import read_csv_manifest
from MMCLIP.training.arguments import DataArguments, ModelArguments
from MMCLIP.training.building import (
    build_datasets,
    build_model_and_processor,
    build_rows,
    label_counts,
    shuffle_images,
)


TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {"model_type": "vit", "num_channels": 1, "image_size": 32, "patch_size": 8, **TOWER}
TEXT = {"model_type": "bert", "max_position_embeddings": 64, **TOWER}
HEADS = {"projection_dim": 16, "decoder_hidden_size": 16, "decoder_num_layers": 1, "decoder_num_heads": 2}


def model_arguments(**fields) -> ModelArguments:
    return ModelArguments(**{"vision_config": VISION, "text_config": TEXT, **HEADS, **fields})


@pytest.fixture
def manifest(tmp_path):
    """Writes a manifest of (file, text, labels, split) and an image for each file but those named `missing...`."""

    def write(*rows, name="manifest.csv"):
        for file, *_ in rows:
            if file and not file.startswith("missing"):
                grey = (sum(file.encode()) % 200) + 20  # another grey in every file
                Image.fromarray(np.full((8, 8), grey, dtype=np.uint8)).save(tmp_path / file)
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "text", "labels", "split"])
            writer.writerows(rows)
        return str(path)

    return write


GOOD = ("a.png", "There is a left pleural effusion.", "", "train")


# ---------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("missing.png", "No pneumothorax.", "", "train"), r"manifest\.csv: .*line 3.*missing\.png"),
        (("b.png", "  ", "", "train"), r"manifest\.csv.*neither text nor labels.*line 3"),
        (("b.png", "", "plural efusion", "train"), r"manifest\.csv, line 3.*plural efusion"),
        (("", "", "nodule", "train"), r"manifest\.csv, line 3.*neither an image nor a text"),
    ],
    ids=["missing image", "empty report without labels", "unknown label", "neither image nor text"],
)
def test_a_bad_row_is_an_error_that_names_it_before_anything_is_trained(manifest, row, message):
    path = manifest(GOOD, row)
    with pytest.raises(ValueError, match=message):
        build_rows(DataArguments(train_manifest=[path]))


def test_rows_that_say_nothing_can_be_left_out_by_asking_for_it(manifest):
    path = manifest(GOOD, ("b.png", "", "", "train"))
    rows, _ = build_rows(DataArguments(train_manifest=[path], drop_unlabelled=True))
    assert len(rows) == 1


def test_rows_without_an_image_or_without_a_report_can_be_left_out(manifest):
    path = manifest(GOOD, ("b.png", "", "nodule", "train"), ("", "Clear lungs.", "", "train"))
    assert len(build_rows(DataArguments(train_manifest=[path]))[0]) == 3
    rows, _ = build_rows(DataArguments(train_manifest=[path], paired_only=True))
    assert rows["report"] == build_rows(DataArguments(train_manifest=[manifest(GOOD)]))[0]["report"]
    path = manifest(("b.png", "", "nodule", "train"))
    with pytest.raises(ValueError, match="`paired_only`: no row to train on has both"):
        build_rows(DataArguments(train_manifest=[path], paired_only=True))


def test_each_manifest_gives_its_split_and_phantoms_come_on_top(manifest):
    path = manifest(GOOD, ("b.png", "", "nodule", "val"), ("c.png", "Clear lungs.", "", "test"))
    data = DataArguments(
        train_manifest=[path],
        validation_manifest=[path],
        num_phantoms=3,
        num_unpaired_phantoms=1,
        num_validation_phantoms=2,
        phantom_size=32,
    )
    train, validation = build_rows(data)
    assert train["split"] == ["train"] * 4 and validation["split"] == ["val"] * 3
    assert train["report"][0] == GOOD[1] and [report is None for report in train["report"]] == [False] * 3 + [True]
    assert set(train["row_id"]).isdisjoint(validation["row_id"])


def test_no_validation_data_gives_no_validation_rows():
    assert build_rows(DataArguments(num_phantoms=2, phantom_size=32))[1] is None


def test_the_same_row_to_train_and_to_validate_on_is_an_error(manifest):
    path = manifest(GOOD)
    with pytest.raises(ValueError, match="a.png.*twice"):
        build_rows(DataArguments(train_manifest=[path], validation_manifest=[path], validation_split="train"))


# -------------------------------------------------------------------------------------------------- shuffled pairs


def pixels(rows) -> list:
    return [None if image is None else image["bytes"] or image["path"] for image in rows["image"]]


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_gives_every_text_the_image_of_another_row_and_every_image_one_text(seed):
    rows = phantom_dataset(12, size=32, num_unpaired=4)
    shuffled = shuffle_images(rows, seed)
    before, after = pixels(rows), pixels(shuffled)
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert sorted(before) == sorted(after)
    for column in ("row_id", "report", "present", "absent", "patient_id", "split"):
        assert shuffled[column] == rows[column], column
    assert pixels(shuffle_images(rows, seed)) == after
    assert pixels(shuffle_images(rows, seed + 1)) != after


def test_shuffling_leaves_text_only_rows_without_an_image(manifest):
    texts = [(f"{name}.png", f"Report {name}.", "", "train") for name in "abcd"]
    rows = read_csv_manifest(manifest(*texts, ("", "Text alone.", "", "train")))
    shuffled = shuffle_images(rows, 0)
    assert shuffled[-1]["image"] is None and shuffled["report"] == rows["report"]
    assert sorted(pixels(shuffled)[:4]) == sorted(pixels(rows)[:4])


def test_shuffle_pairs_shuffles_what_is_trained_on_and_not_what_is_validated_on():
    shape = {"num_phantoms": 10, "num_validation_phantoms": 5, "phantom_size": 32}
    train, validation = build_rows(DataArguments(**shape))
    shuffled, same = build_rows(DataArguments(**shape, shuffle_pairs=True))
    assert shuffled["report"] == train["report"]
    assert all(old != new for old, new in zip(pixels(train), pixels(shuffled), strict=True))
    assert pixels(same) == pixels(validation)


# ------------------------------------------------------------------------------------------------ model and tokenizer


def test_a_new_text_tower_holds_the_tokenizer_and_the_texts_fit_its_positions():
    model, processor = build_model_and_processor(model_arguments(), DataArguments(num_phantoms=1))
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert processor.tokenizer.model_max_length == 64
    assert tuple(processor(images=np.zeros((50, 40), np.uint8))["pixel_values"].shape) == (1, 1, 32, 32)
    _, processor = build_model_and_processor(model_arguments(), DataArguments(num_phantoms=1, max_length=20))
    assert processor.tokenizer.model_max_length == 20
    assert processor(text="no " * 100)["input_ids"].shape == (1, 20)
    with pytest.raises(ValueError, match="`max_length` is 65, but the text tower takes 64"):
        build_model_and_processor(model_arguments(), DataArguments(num_phantoms=1, max_length=65))


def test_a_tokenizer_that_the_text_tower_cannot_hold_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, more than the text tower's vocab_size of 50"):
        build_model_and_processor(
            model_arguments(text_config={**TEXT, "vocab_size": 50}), DataArguments(num_phantoms=1)
        )


def test_a_tokenizer_that_pads_with_another_id_than_the_text_tower_is_an_error():
    with pytest.raises(ValueError, match="pads with id 0, the text tower with pad_token_id 3"):
        build_model_and_processor(
            model_arguments(text_config={**TEXT, "pad_token_id": 3}), DataArguments(num_phantoms=1)
        )


def test_a_pretrained_text_tower_brings_its_tokenizer_and_another_one_must_fit_it(tmp_path):
    pretrained = MMCLIPForPreTraining(tiny_config(vocab_size=len(MMCLIPProcessor().tokenizer))).text_model
    pretrained.save_pretrained(tmp_path / "tower")
    MMCLIPProcessor().tokenizer.save_pretrained(tmp_path / "tower")
    arguments = model_arguments(text_config=None, text_model_name_or_path=str(tmp_path / "tower"))
    model, processor = build_model_and_processor(arguments, DataArguments(num_phantoms=1))
    weight = model.text_model.embeddings.word_embeddings.weight
    assert weight.equal(pretrained.embeddings.word_embeddings.weight)
    assert processor.tokenizer.model_max_length == 64

    tokenizer = MMCLIPProcessor().tokenizer
    tokenizer.add_tokens(["anotherword"])
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="more than the text tower's vocab_size"):
        build_model_and_processor(
            arguments, DataArguments(num_phantoms=1, tokenizer_name_or_path=str(tmp_path / "larger"))
        )


def test_a_checkpoint_of_ours_goes_on_with_its_own_weights_and_processor(tmp_path):
    data = DataArguments(num_phantoms=1, max_length=30)
    model, processor = build_model_and_processor(model_arguments(), data)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = build_model_and_processor(ModelArguments(model_name_or_path=str(tmp_path)), data)
    assert all(value.equal(model.state_dict()[name]) for name, value in again.state_dict().items())
    assert same.tokenizer.model_max_length == 30

    checkpoint = ModelArguments(model_name_or_path=str(tmp_path))
    _, shorter = build_model_and_processor(checkpoint, DataArguments(num_phantoms=1, max_length=12))
    assert shorter.tokenizer.model_max_length == 12
    with pytest.raises(ValueError, match="brings its own tokenizer"):
        build_model_and_processor(checkpoint, DataArguments(num_phantoms=1, tokenizer_name_or_path=str(tmp_path)))


# ---------------------------------------------------------------------------------------------- dataset and collator


def built(rows, model_fields=None, **data):
    data = DataArguments(num_phantoms=1, **data)
    model, processor = build_model_and_processor(model_arguments(**(model_fields or {})), data)
    return build_datasets(rows, data, model, processor, seed=7)


@pytest.fixture
def labelled(manifest):
    return read_csv_manifest(
        manifest(
            ("a.png", "There is a left pleural effusion. No pneumothorax.", "", "train"),
            ("b.png", "No pleural effusion.", "", "train"),
            ("c.png", "", "nodule", "train"),
        )
    )


def test_label_counts_are_rows_that_state_a_label_present_and_absent(labelled):
    dataset, _ = built(labelled)
    counts = label_counts(dataset)
    assert counts["pleural effusion"] == (1, 1)
    assert counts["pneumothorax"] == (0, 1)
    assert counts["nodule"] == (1, 0)


def test_all_prompt_labels_are_those_stated_both_ways(labelled):
    _, collator = built(labelled, prompt_labels=["all"])
    assert collator.prompt_labels == ("pleural effusion",)


def test_given_prompt_labels_are_kept_by_their_canonical_names(labelled):
    _, collator = built(labelled, prompt_labels=["Nodule", "Effusion"])
    assert collator.prompt_labels == ("nodule", "pleural effusion")


def test_a_prompt_label_that_no_row_mentions_or_nobody_knows_is_an_error(labelled):
    with pytest.raises(ValueError, match="`prompt_labels`: no training row says anything about fracture"):
        built(labelled, prompt_labels=["nodule", "fracture"])
    with pytest.raises(ValueError, match="prompt_labels.*nodul"):
        built(labelled, prompt_labels=["nodul"])


@pytest.mark.parametrize(("prompt_weight", "local_weight", "wanted"), [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_prompts_are_made_when_a_loss_reads_them(labelled, prompt_weight, local_weight, wanted):
    fields = {"prompt_weight": prompt_weight, "local_weight": local_weight}
    _, collator = built(labelled, fields, prompt_labels=["all"])
    assert len(collator.prompt_labels) == wanted


@pytest.mark.parametrize(("side_weight", "wanted"), [(0, ()), (1, ("pleural effusion",))])
def test_side_prompts_are_made_when_their_loss_reads_them(labelled, side_weight, wanted):
    _, collator = built(labelled, {"side_weight": side_weight}, prompt_labels=["all"], prompt_sides=True)
    assert collator.side_labels == wanted


def test_what_the_arguments_say_reaches_augmentation_and_collator(labelled):
    dataset, collator = built(
        labelled, max_rotation=1.5, max_translation=0.0, noise_std=0.0, mlm_masking="random", mlm_ratio=0.25
    )
    assert dataset.seed == 7
    assert collator.augmentation.max_rotation == 1.5 and collator.augmentation.noise_std == 0.0
    assert (collator.augmentation.black, collator.augmentation.white) == (-2, 2), "as the image processor makes them"
    assert collator.mlm_masking == "random" and collator.mlm_ratio == 0.25
    assert collator.num_patches == 16 and collator.max_length == 64


def test_a_table_whose_image_column_has_another_name_is_told(tmp_path, caplog):
    table = tmp_path / "manifest.csv"
    table.write_text("filename,text,split\na.png,Small left effusion.,train\n")
    build_rows(DataArguments(train_manifest=[str(table)]))
    assert "No row to train on has an image" in caplog.text

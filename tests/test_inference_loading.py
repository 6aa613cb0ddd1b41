import json
import logging

import pytest
import torch
from conftest import save_tiny, tiny_config
from MMCLIP.modeling_mmclip import MMCLIPForImageClassification, MMCLIPForPreTraining
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from MMCLIP.inference.loading import load_model


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model")


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_gives_a_model_in_eval_mode_and_its_processor_without_running_its_code(folder):
    for path in folder.glob("*.py"):
        path.write_text("raise RuntimeError('code of the folder was run')")
    model, processor = load_model(folder, device="cpu")
    assert not model.training and type(model).__module__ == "MMCLIP.modeling_mmclip"
    assert model.processor is processor and processor.image_processor.size["height"] == 32
    assert model.encode(texts="No pneumothorax.")[1].shape == (1, 16)


def test_code_for_the_tokenizer_is_refused_and_nobody_is_asked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the code"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    path.write_text(json.dumps(config | {"tokenizer_class": "Own"}))
    (folder / "own.py").write_text("raise RuntimeError('code of the folder was run')")
    with pytest.raises(ValueError, match="custom code"):
        load_model(folder, device="cpu")


def test_a_pretraining_checkpoint_is_loaded_without_a_word(folder, caplog, monkeypatch):
    monkeypatch.setattr(hf_logging.get_logger("transformers"), "propagate", True)
    pretraining = MMCLIPForPreTraining(tiny_config(vocab_size=6144))
    pretraining.save_pretrained(folder)
    model, _ = load_model(folder, device="cpu")
    assert torch.equal(model.visual_projection.weight, pretraining.visual_projection.weight)
    assert "no place" not in caplog.text


def test_missing_and_changed_weights_are_named(folder):
    change_weights(folder, lambda weights: weights.pop("visual_projection.weight"))
    with pytest.raises(ValueError, match="1 weights are missing or of another size, as visual_projection.weight"):
        load_model(folder)
    other = save_tiny(folder.parent / "other")
    change_weights(other, lambda weights: weights.update({"logit_scale": torch.ones(3)}))
    with pytest.raises(ValueError, match="another size, as logit_scale"):
        load_model(other)


def test_extra_weights_are_named_in_a_warning(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("MMCLIP.evaluation.checkpoints"), "propagate", True)
    change_weights(folder, lambda weights: weights.update({"fourth_tower.bias": torch.ones(3)}))
    load_model(folder)
    assert "1 weights have no place in MMCLIP and are left out, as fourth_tower.bias" in caplog.text


def test_a_classifier_is_refused_as_it_has_no_text_tower(folder):
    MMCLIPForImageClassification(tiny_config(num_labels=2)).save_pretrained(folder)
    with pytest.raises(ValueError, match="a fine-tuned classifier, for example, has no text tower"):
        load_model(folder)


def test_what_is_no_model_says_why(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it was read before conftest could set it
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model: .*empty has no config.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a folder, which has no revision 'v1'"):
        load_model(folder, revision="v1")
    with pytest.raises(ValueError, match="device: nonsense cannot be used"):
        load_model(folder, device="nonsense")
    with pytest.raises(ValueError, match=r"model: nobody/nothing \(there is no such folder here.*\) cannot be loaded"):
        load_model("nobody/nothing")
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be loaded: Error while deserializing header"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ValueError, match="holds a model of the type 'bert', expected 'mmclip'"):
        load_model(folder)

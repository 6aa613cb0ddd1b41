"""A saved folder, loaded by a process that has never heard of MMCLIP."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_config

from MMCLIP import MMCLIPForImageClassification, MMCLIPForPreTraining, MMCLIPImageProcessor, MMCLIPProcessor


TEXTS = ["There is a large left pleural effusion.", "No pneumothorax."]

CLEAN_PROCESS = """
import json, sys
import numpy as np
import torch
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    AutoModelForPreTraining, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer, pipeline)

try:
    import MMCLIP
    raise SystemExit("MMCLIP must not be importable here")
except ModuleNotFoundError:
    pass
folder, classifier_folder = sys.argv[1:3]
image = np.load(sys.argv[3])
texts = json.loads(sys.argv[4])
trust = {"trust_remote_code": True}
torch.set_num_threads(1)

config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
try:
    image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
except ImportError:  # transformers 5.17 without torchvision
    image_processor = processor.image_processor
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
model = AutoModel.from_pretrained(folder, **trust).eval()
inputs = processor(images=[image], text=texts)
assert torch.equal(image_processor([image], return_tensors="pt")["pixel_values"], inputs["pixel_values"])
assert tokenizer(texts, padding=True)["input_ids"] == inputs["input_ids"].tolist()
result = {}
with torch.no_grad():
    result["logits"] = model(**inputs).logits_per_image.tolist()
    for auto_class in (AutoModelForZeroShotImageClassification, AutoModelForPreTraining):
        other = auto_class.from_pretrained(folder, **trust).eval()
        result[auto_class.__name__] = other(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"].expand(2, -1, -1, -1)).logits_per_image[:1].tolist()
    classifier = AutoModelForImageClassification.from_pretrained(classifier_folder, **trust).eval()
    result["classes"] = classifier(inputs["pixel_values"]).logits.tolist()
    result["encoded"] = model.encode(image, texts)[1].tolist()
pipe = pipeline(task="zero-shot-image-classification", model=folder, **trust)
scores = pipe(Image.fromarray(image), candidate_labels=texts, hypothesis_template="{}")
result["pipeline"] = {score["label"]: score["score"] for score in scores}
result["classes of modules"] = [type(model).__module__.split(".")[0], type(config).__name__]
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    processor = MMCLIPProcessor(MMCLIPImageProcessor(size={"height": 32, "width": 32}))
    processor.tokenizer.model_max_length = 64
    torch.manual_seed(0)
    model = MMCLIPForPreTraining(tiny_config(vocab_size=len(processor.tokenizer), vision_stem="convolution")).eval()
    classifier = MMCLIPForImageClassification(tiny_config(num_labels=3)).eval()
    for name, each in (("model", model), ("classifier", classifier)):
        each.save_pretrained(folder / name)
    processor.save_pretrained(folder / "model")
    image = np.random.default_rng(0).integers(0, 256, (40, 28), dtype=np.uint8)
    np.save(folder / "image.npy", image)
    return folder, model, classifier, processor, image


def clean_environment(home) -> dict:
    """No package path, no caches: what a new user's machine would have."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    return kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_a_process_without_mmclip_loads_the_folder_through_every_auto_class_and_gives_the_same_numbers(saved, tmp_path):
    folder, model, classifier, processor, image = saved
    # -P and another folder: the checkout is not importable; site-packages may hold an editable install, so block it
    blocker = "import sys; sys.modules['MMCLIP'] = None\n"
    command = [sys.executable, "-P", "-c", blocker + CLEAN_PROCESS]
    arguments = [str(folder / "model"), str(folder / "classifier"), str(folder / "image.npy"), json.dumps(TEXTS)]
    run = subprocess.run(
        command + arguments, cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.split("RESULT")[-1])

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs = processor(images=[image], text=TEXTS)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        logits = (model.similarity_scale() * features @ texts.T).tolist()
        classes = classifier(inputs["pixel_values"]).logits.tolist()
    assert result["logits"] == logits  # to the last bit
    with torch.no_grad():
        both = inputs["pixel_values"].expand(2, -1, -1, -1)
        pair = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=both)
    assert result["AutoModelForPreTraining"] == pair.logits_per_image[:1].tolist()
    assert result["AutoModelForZeroShotImageClassification"] == pair.logits_per_image[:1].tolist()
    assert result["encoded"] == texts.tolist()
    assert result["classes"] == classes
    assert result["classes of modules"] == ["transformers_modules", "MMCLIPConfig"]
    torch.set_num_threads(num_threads)
    expected = torch.tensor(logits[0]).softmax(dim=0).tolist()
    for text, probability in zip(TEXTS, expected, strict=True):
        assert result["pipeline"][text] == pytest.approx(probability, abs=1e-5)


def test_encode_of_a_loaded_model_uses_the_saved_processor_and_asks_nothing(saved):
    folder, model, _, _, image = saved
    loaded = MMCLIPForPreTraining.from_pretrained(folder / "model")
    image_features, text_features = loaded.encode(image, TEXTS)
    assert loaded.processor.image_processor.size["height"] == 32 and loaded.processor.tokenizer.model_max_length == 64
    assert image_features.shape == (1, 16) and text_features.shape == (2, 16)


def test_the_folder_holds_code_and_safetensors_only(saved):
    names = {path.name for path in (saved[0] / "model").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
        "configuration_mmclip.py", "modeling_mmclip.py", "image_processing_mmclip.py", "processing_mmclip.py",
        "pipeline_mmclip.py",
    }  # fmt: skip

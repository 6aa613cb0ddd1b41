"""The recipes of the README for other people's tools, run from its text: they give what MMCLIP itself gives."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_processor
from PIL import Image

from MMCLIP import MMCLIPForPreTraining, MMCLIPModel
from MMCLIP.data.phantom import make_phantom


README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
TITLE = "## With other people's tools\n"
BEFORE = """
import torch
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("outputs/demo/checkpoint", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("outputs/demo/checkpoint", trust_remote_code=True)
"""  # what the page did further up


def recipes() -> dict[str, str]:
    """The code of each recipe, by the library that it imports first."""
    section = README[README.index(TITLE) + len(TITLE) :].split("\n## ")[0]
    code = re.findall(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    return {re.search(r"^(?:from|import) (\w+)", block, flags=re.MULTILINE).group(1): block for block in code}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Runs the README up to and with the recipe of a library, where an MMCLIP that was not trained lies ready."""
    import datasets

    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        torch.manual_seed(0)
        processor = tiny_processor()
        checkpoint = MMCLIPForPreTraining(tiny_config(vocab_size=len(processor.tokenizer)))
        for saved in (checkpoint, processor):
            saved.save_pretrained("outputs/demo/checkpoint")
        Image.fromarray(make_phantom(0, 0, size=100).image).save("xray.png")
        names, waiting = {}, [("before", BEFORE), *recipes().items()]

        def run(library: str) -> dict:
            while library in dict(waiting):
                exec(compile(waiting.pop(0)[1], "README.md", "exec"), names)
            return names

        yield run


def test_there_is_a_recipe_for_each_library():
    assert list(recipes()) == ["sentence_transformers", "faiss", "sklearn", "peft"]


def test_sentence_transformers_gives_the_embeddings_of_encode(recipe):
    names = recipe("sentence_transformers")
    image_features, text_features = names["model"].encode("xray.png", names["reports"])
    np.testing.assert_allclose(names["encoder"].encode([{"image": "xray.png"}]), image_features, atol=1e-6)
    np.testing.assert_allclose(names["encoder"].encode(names["reports"]), text_features, atol=1e-6)
    cosines = (image_features @ text_features.T)[0]
    assert [hit["corpus_id"] for hit in names["hits"]] == cosines.argsort(descending=True)[:2].tolist()
    assert [hit["score"] for hit in names["hits"]] == pytest.approx(
        cosines.sort(descending=True).values[:2].tolist(), abs=1e-6
    )


def test_sentence_transformers_reads_16_bit_and_cuts_long_texts_as_encode_does(recipe):
    names = recipe("sentence_transformers")
    deep = np.asarray(Image.open("xray.png")).astype(np.uint16) * 200
    Image.fromarray(deep).save("deep.png")
    long = "effusion " * 100
    image_features, text_features = names["model"].encode("deep.png", [long])
    Path("film.dcm").write_bytes(Path("deep.png").read_bytes())  # the content decides, but only of what is an image
    for name in ("deep.png", "film.dcm"):
        np.testing.assert_allclose(names["encoder"].encode([{"image": name}]), image_features, atol=1e-6)
    np.testing.assert_allclose(names["encoder"].encode([long]), text_features, atol=1e-6)


def test_faiss_finds_the_reports_of_the_highest_cosines(recipe):
    names = recipe("faiss")
    cosines = names["phantom_features"] @ names["report_features"].T
    expected = cosines.topk(5).values
    np.testing.assert_allclose(names["cosines"], expected, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(cosines.numpy(), names["nearest"], axis=1), expected, atol=1e-5)


def test_scikit_learn_finds_what_embeddings_say_of_a_finding_in_patients_that_it_has_not_seen(recipe):
    names = recipe("sklearn")
    assert len(names["aurocs"]) == 5 and len(set(names["phantoms"]["patient_id"])) == 100
    draws = np.random.default_rng(0).normal(size=(100, 16))
    for signal, low, high in ((2.0, 0.9, 1.0), (0.0, 0.2, 0.75)):
        features = draws + signal * np.array(names["has_effusion"])[:, None]
        again = {**names, "phantom_features": features}
        exec(recipes()["sklearn"], again)
        assert low < again["aurocs"].mean() <= high
    one_patient_per_label = {**names, "phantoms": {**names["phantoms"][:], "patient_id": names["has_effusion"]}}
    with pytest.raises(ValueError):  # no split keeps both labels on both sides, as it would if it cut patients apart
        exec(recipes()["sklearn"], one_patient_per_label)


def test_adapters_are_saved_alone_and_change_a_model_as_they_changed_the_first(recipe):
    names = recipe("peft")
    untouched, adapted, loaded = (
        names["model"].encode("xray.png", ["There is no pneumothorax."]),
        names["adapted"].encode("xray.png", ["There is no pneumothorax."]),
        (names["image_features"], names["text_features"]),
    )
    merged = MMCLIPModel.from_pretrained("outputs/merged").encode("xray.png", ["There is no pneumothorax."])
    for before, trained, again, whole in zip(untouched, adapted, loaded, merged, strict=True):
        assert (before - trained).abs().max() > 1e-5
        torch.testing.assert_close(again, trained, atol=0, rtol=0)
        torch.testing.assert_close(whole, trained, atol=1e-5, rtol=0)
    weights = Path("outputs/adapter/adapter_model.safetensors").stat().st_size
    assert weights < Path("outputs/demo/checkpoint/model.safetensors").stat().st_size / 4
    assert not Path("outputs/adapter/model.safetensors").exists()
    trained = [name for name, parameter in names["adapted"].named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    for tower in ("vision_model", "text_model", "visual_projection", "text_projection"):
        assert any(tower in name for name in trained)


def test_adapters_of_a_model_in_pretraining_are_saved_and_loaded_with_its_losses(recipe, batch, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base = MMCLIPForPreTraining(tiny_config())
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # in the first step only one of the two factors gets a gradient
        loss = adapted(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.eval()(**batch)
    assert expected.loss < loss

    plain = MMCLIPForPreTraining.from_pretrained(tmp_path / "base")
    assert plain.eval()(**batch).loss > expected.loss
    found = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(**batch)
    for name, value in expected.loss_info.items():
        torch.testing.assert_close(found.loss_info[name], value)


def test_a_folder_of_adapters_loads_with_its_model_by_transformers_alone(recipe):
    names = recipe("peft")
    expected = names["adapted"].encode("xray.png", ["There is no pneumothorax."])
    found = MMCLIPModel.from_pretrained("outputs/adapter").encode("xray.png", ["There is no pneumothorax."])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_sentence_transformers_works_without_torchvision_and_without_this_package(recipe, tmp_path):
    recipe("sentence_transformers")
    program = """
import sys
sys.modules["torchvision"] = sys.modules["MMCLIP"] = None
from sentence_transformers import SentenceTransformer
encoder = SentenceTransformer("outputs/demo/checkpoint", trust_remote_code=True)
print(encoder.encode([{"image": "xray.png"}]).shape, encoder.encode(["No pneumothorax."]).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[0] == "(1, 16) (1, 16)"

import io
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_processor
from MMCLIP.modeling_mmclip import MMCLIPModel
from MMCLIP.processing_mmclip import MMCLIPProcessor
from PIL import Image
from safetensors.torch import load_file

from MMCLIP.data.manifest import make_row, rows_to_dataset
from MMCLIP.evaluation import embeddings
from MMCLIP.evaluation.embeddings import (
    EmbeddingCache,
    image_features,
    model_fingerprint,
    rows_fingerprint,
    text_features,
)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 32), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def make_rows(*seeds: int, names: str = "abcdef"):
    pairs = zip(names, seeds, strict=False)
    return rows_to_dataset(make_row(name, png(seed), source="s", present=["edema"]) for name, seed in pairs)


def make_model(seed: int = 0):
    processor = tiny_processor()
    torch.manual_seed(seed)
    model = MMCLIPModel(tiny_config(vocab_size=len(processor.tokenizer))).eval()
    model.processor = processor
    return model, processor


@pytest.fixture
def real():
    return make_model()


def count_passes(model, monkeypatch) -> list[int]:
    """The batch sizes that go through the vision tower from now on."""
    seen, encode = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: (seen.append(len(pixels)), encode(pixels))[1])
    return seen


def test_features_are_those_of_the_model_whatever_the_batch_size(real):
    model, processor = real
    rows = make_rows(1, 2, 3)
    features = image_features(model, processor, rows, batch_size=2)
    images = [Image.open(io.BytesIO(png(seed))) for seed in (1, 2, 3)]
    expected, _ = model.encode(images=images)
    torch.testing.assert_close(features.embeds, expected)
    with torch.no_grad():
        projected = torch.nn.functional.normalize(model.visual_projection(features.pooled), dim=-1)
    torch.testing.assert_close(features.embeds, projected)


def test_a_second_pass_takes_the_cached_features(real, monkeypatch, tmp_path):
    model, processor = real
    seen, rows = count_passes(model, monkeypatch), make_rows(1, 2, 3)
    first = image_features(model, processor, rows, cache=EmbeddingCache(tmp_path))
    assert seen == [3]
    again = image_features(model, processor, make_rows(1, 2, 3), cache=EmbeddingCache(tmp_path))
    assert seen == [3] and torch.equal(first.embeds, again.embeds) and torch.equal(first.pooled, again.pooled)
    memory = EmbeddingCache(None)
    image_features(model, processor, rows, cache=memory)
    image_features(model, processor, rows, cache=memory)
    assert seen == [3, 3]


def test_only_pictures_that_are_new_are_embedded_and_all_come_in_order(real, monkeypatch, tmp_path):
    model, processor = real
    seen = count_passes(model, monkeypatch)
    image_features(model, processor, make_rows(1, 2), cache=EmbeddingCache(tmp_path))
    rows = make_rows(3, 2, 3, 1)
    features = image_features(model, processor, rows, cache=EmbeddingCache(tmp_path))
    assert seen == [2, 1]
    expected = image_features(model, processor, rows)
    torch.testing.assert_close(features.embeds, expected.embeds)
    torch.testing.assert_close(features.pooled, expected.pooled)
    assert torch.equal(features.embeds[0], features.embeds[2])


@pytest.mark.parametrize("change", ["picture", "order", "name"])
def test_the_fingerprint_of_rows_tells_pictures_order_and_names(change):
    other = {"picture": make_rows(1, 3), "order": make_rows(2, 1), "name": make_rows(1, 2, names="xy")}[change]
    assert rows_fingerprint(other) != rows_fingerprint(make_rows(1, 2)) == rows_fingerprint(make_rows(1, 2))
    assert rows_fingerprint(other, "a") != rows_fingerprint(other, "b")


def test_a_file_whose_bytes_changed_is_embedded_anew(real, monkeypatch, tmp_path):
    model, processor = real
    seen, cache, path = count_passes(model, monkeypatch), EmbeddingCache(tmp_path / "cache"), tmp_path / "a.png"
    rows = rows_to_dataset([make_row("a", str(path), source="s", present=["edema"])])
    for content in (png(1), png(2), png(1)):
        path.write_bytes(content)
        image_features(model, processor, rows, cache=cache)
    assert seen == [1, 1]


@pytest.mark.parametrize("part", ["weight", "config", "image size", "tokenizer"])
def test_a_model_that_differs_in_anything_has_another_fingerprint(real, part):
    model, processor = real
    before = model_fingerprint(model, processor)
    assert before == model_fingerprint(*make_model())
    if part == "weight":
        with torch.no_grad():
            model.text_projection.weight[0, 0] += 1e-4
    elif part == "config":
        model.config.image_pooling = "max"
    elif part == "image size":
        processor.image_processor.do_pad = False
    else:
        processor.tokenizer.add_tokens(["covidoma"])
    assert model_fingerprint(model, processor) != before


def test_a_saved_and_loaded_model_has_the_same_fingerprint(real, tmp_path):
    model, processor = real
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = MMCLIPModel.from_pretrained(tmp_path), MMCLIPProcessor.from_pretrained(tmp_path)
    assert model_fingerprint(*loaded) == model_fingerprint(model, processor)


def test_a_cache_is_not_reused_for_another_model(real, tmp_path):
    rows, cache = make_rows(1, 2), EmbeddingCache(tmp_path)
    first = image_features(*real, rows, cache=cache)
    other = image_features(*make_model(seed=1), rows, cache=cache)
    assert not torch.allclose(first.embeds, other.embeds)
    assert len(list(tmp_path.glob("images-*.safetensors"))) == 2


def test_a_renamed_cache_file_is_an_error(real, tmp_path):
    rows, (other, _) = make_rows(1, 2), make_model(seed=1)
    image_features(*real, rows, cache=EmbeddingCache(tmp_path))
    file = next(tmp_path.glob("images-*.safetensors"))
    ours, theirs = (model_fingerprint(model, real[1]) for model in (real[0], other))
    shutil.copy(file, tmp_path / file.name.replace(ours, theirs))
    with pytest.raises(ValueError, match="renamed or copied; delete it"):
        image_features(other, real[1], rows, cache=EmbeddingCache(tmp_path))


def test_a_cut_cache_file_is_an_error_that_names_it(real, tmp_path):
    rows = make_rows(1, 2)
    image_features(*real, rows, cache=EmbeddingCache(tmp_path))
    file = next(tmp_path.glob("images-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file.name}.*Delete the file"):
        image_features(*real, rows, cache=EmbeddingCache(tmp_path))


def test_texts_keep_their_order_and_each_is_encoded_once(real, monkeypatch, tmp_path):
    model, processor = real
    seen, encode = [], model.get_text_features
    monkeypatch.setattr(
        model,
        "get_text_features",
        lambda input_ids, **kwargs: (seen.append(len(input_ids)), encode(input_ids, **kwargs))[1],
    )
    texts = ["There is a mass.", "No edema.", "There is a mass.", "Normal."]
    embeds = text_features(model, processor, texts, cache=EmbeddingCache(tmp_path))
    assert seen == [3] and torch.equal(embeds[0], embeds[2])
    torch.testing.assert_close(embeds, torch.cat([model.encode(texts=text)[1] for text in texts]), atol=1e-5, rtol=1e-4)
    seen.clear()
    again = text_features(model, processor, texts[::-1], cache=EmbeddingCache(tmp_path))
    assert seen == [] and torch.equal(again, embeds.flip(0))


def test_a_cache_holds_no_text_and_no_row_id(real, tmp_path):
    cache = EmbeddingCache(tmp_path)
    image_features(*real, make_rows(1, names=["patient-seventeen"]), cache=cache)
    text_features(*real, ["There is a mass."], cache=cache)
    for file in tmp_path.iterdir():
        assert b"seventeen" not in file.read_bytes() and b"mass" not in file.read_bytes()
        assert all(tensor.dtype == torch.float32 for key, tensor in load_file(file).items() if key != "keys")


def test_no_image_is_an_error(real):
    with pytest.raises(ValueError, match="no image to embed"):
        image_features(*real, make_rows())


def test_embeddings_that_are_not_finite_are_an_error_that_counts_them(real):
    model, processor = real
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="2 of 2 images hold NaN"):
        image_features(model, processor, make_rows(1, 2))


def test_a_held_model_is_hashed_once_and_another_is_not_taken_for_it(real, monkeypatch):
    seen, cache, rows = [], EmbeddingCache(), make_rows(1, 2)
    monkeypatch.setattr(
        embeddings, "model_fingerprint", lambda *which: (seen.append(which), model_fingerprint(*which))[1]
    )
    assert cache.hold(*real) == model_fingerprint(*real)
    first = image_features(*real, rows, cache=cache)
    text_features(*real, ["There is a mass."], cache=cache)
    assert len(seen) == 1
    other = image_features(*make_model(seed=1), rows, cache=cache)
    assert len(seen) == 2 and not torch.allclose(first.embeds, other.embeds)

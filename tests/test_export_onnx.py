"""The ONNX files say what torch says, a wrong one is never left behind, and they work where torch is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import save_tiny, tiny_config
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_modeling_mmclip import TOWERS
from tokenizers import Tokenizer

from MMCLIP import MMCLIPForPreTraining, MMCLIPImageProcessor, MMCLIPModel, MMCLIPProcessor
from MMCLIP.data.phantom import make_phantom, phantom_dataset
from MMCLIP.evaluation.checkpoints import load_checkpoint
from MMCLIP.evaluation.zero_shot import evaluate_zero_shot
from MMCLIP.export import onnx_encoders
from MMCLIP.export.int8 import OnnxEncoders, measure_int8, needs_calibration, quantize_encoders
from MMCLIP.export.onnx_encoders import FILES, INT8_FILES, export_encoders, open_session
from MMCLIP.export.onnx_graphs import drop_zero_masks, widen_aliased_layers


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(image_size: int = 32, model_class=MMCLIPModel, **fields):
    torch.manual_seed(0)
    processor = MMCLIPProcessor(MMCLIPImageProcessor(size=image_size))
    processor.tokenizer.model_max_length = 64
    return model_class(tiny_config(len(processor.tokenizer), image_size, **fields)).eval(), processor


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a checkpoint and that of its export by the script, with int8."""
    checkpoint, folder = (tmp_path_factory.mktemp(name) for name in ("checkpoint", "onnx"))
    save_tiny(checkpoint)
    script = example("export_onnx")
    options = ["--int8", "--phantoms", "40", "--phantom_size", "32", "--num_bootstrap", "20"]
    script.main(["--model", str(checkpoint), "--output_dir", str(folder), *options])
    return checkpoint, folder


# ------------------------------------------------------------------------------------------------------------- exported


@pytest.mark.parametrize("batch_size, num_tokens", [(1, 1), (3, 17), (5, 64)])
def test_any_number_of_images_and_texts_of_any_length_give_what_torch_gives(exported, batch_size, num_tokens):
    checkpoint, folder = exported
    model, _ = load_checkpoint(checkpoint, "cpu")
    pixels = torch.randn(batch_size, 1, 32, 32)
    ids = torch.randint(5, 100, (batch_size, num_tokens))
    mask = torch.ones_like(ids)
    mask[0, num_tokens // 2 + 1 :] = 0
    with torch.no_grad():
        output = model(ids, pixels, mask)
        patches = model.project_image(model.encode_image(pixels)[1])
    run = {part: open_session(folder / name).run for part, name in FILES.items()}
    image_embeds, patch_embeds = run["image"](None, {"pixel_values": pixels.numpy()})
    (text_embeds,) = run["text"](None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    for found, expected in (
        (image_embeds, output.image_embeds), (text_embeds, output.text_embeds), (patch_embeds, patches),
    ):  # fmt: skip
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_the_embeddings_of_patches_make_the_heat_map_of_a_sentence(exported):
    checkpoint, folder = exported
    model, processor = load_checkpoint(checkpoint, "cpu")
    inputs = processor(images=make_phantom(0, 0, size=32).image, text="There is a pleural effusion.")
    with torch.no_grad():
        expected = model.get_text_to_patch_attention(**inputs)[0]
    encoders = OnnxEncoders(folder, model.config)
    text = encoders.get_text_features(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).pooler_output
    patches = encoders.encode_image(inputs["pixel_values"])[1]
    found = (encoders.similarity_scale() * patches[0] @ text[0]).softmax(dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_files_say_how_to_make_their_inputs_and_what_scale_the_logits_have(exported):
    checkpoint, folder = exported
    model, processor = load_checkpoint(checkpoint, "cpu")
    for part, name in {**FILES}.items():
        said = open_session(folder / name).get_modelmeta().custom_metadata_map
        assert said["mmclip_part"] == part and said["vision_tower"] == "vit" and said["text_tower"] == "bert"
        assert float(said["similarity_scale"]) == pytest.approx(model.similarity_scale().item())
        assert (said["image_size"], said["projection_dim"], said["max_tokens"]) == ("32", "16", "64")
        assert (float(said["image_mean"]), float(said["image_std"])) == (0.5, 0.25)
        assert int(said["patch_grid"]) ** 2 == model.num_patches


def test_the_script_writes_what_it_checked_and_what_int8_loses(exported):
    written = json.loads((exported[1] / "export.json").read_text())
    assert set(written["largest_difference"]) == {"image", "text"}
    assert all(0 <= difference <= 1e-4 for difference in written["largest_difference"].values())
    found = written["int8"]
    assert found["method"] == {"image": "dynamic", "text": "dynamic"} and found["num_images"] == 40
    assert found["loss"]["difference"] == pytest.approx(found["float32"] - found["int8"])
    assert found["loss"]["ci"][0] <= found["loss"]["difference"] <= found["loss"]["ci"][1]
    assert found["largest_change"] > 0, "8 bit change something"
    for name in FILES.values():
        assert found["bytes"][name] == (exported[1] / name).stat().st_size
    assert written["metadata"]["image_size"] == 32 and "--int8" not in written["model"]


def test_what_is_measured_of_float32_is_what_torch_scores(exported):
    checkpoint, folder = exported
    model, processor = load_checkpoint(checkpoint, "cpu")
    rows = phantom_dataset(40, size=32, split="test")
    _, expected = evaluate_zero_shot(model, processor, rows, num_bootstrap=0)
    _, found = evaluate_zero_shot(OnnxEncoders(folder, model.config), processor, rows, num_bootstrap=0)
    np.testing.assert_allclose(found.margins, expected.margins, atol=1e-4)
    measured = measure_int8(folder, model.config, processor, rows, num_bootstrap=0)
    results, _ = evaluate_zero_shot(model, processor, rows, num_bootstrap=0)
    assert measured["float32"] == pytest.approx(results["zero_shot"]["macro_auroc"], abs=1e-3)


def test_int8_files_hold_bytes_for_weights_and_the_metadata_of_the_others(exported):
    for part, name in INT8_FILES.items():
        model = onnx.load(exported[1] / name)
        said = {entry.key: entry.value for entry in model.metadata_props}
        assert said["weights"] == "int8 dynamic" and said["mmclip_part"] == part
        kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2 and tensor.dims[0] > 8}
        assert TensorProto.INT8 in kinds
        products = [node.op_type for node in model.graph.node]
        assert "MatMulInteger" in products


def test_an_export_takes_the_int8_files_of_an_earlier_one_away(exported, tmp_path, monkeypatch):
    checkpoint, _ = exported
    monkeypatch.setattr(onnx_encoders, "write_encoder", lambda model, part, metadata, path: path.write_bytes(b""))
    monkeypatch.setattr(onnx_encoders, "largest_difference", lambda *arguments: 0.0)
    for name in INT8_FILES.values():
        (tmp_path / name).write_bytes(b"of other weights")
    export_encoders(*load_checkpoint(checkpoint, "cpu"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES.values(), "tokenizer.json"])


# -------------------------------------------------------------------------------------------------------- without torch


def test_the_example_says_what_the_model_says_in_a_process_that_has_no_torch(exported, tmp_path):
    checkpoint, folder = exported
    sentences = ["There is a pleural effusion.", "Normal chest radiograph.", "No pneumothorax."]
    Image.fromarray(make_phantom(0, 0, size=100).image[:, :77]).save(tmp_path / "xray.png")
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    command = [sys.executable, str(EXAMPLES / "onnx_inference.py"), str(folder), "xray.png", *sentences]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = {line[7:]: float(line[:5]) for line in done.stdout.splitlines()}

    model, processor = load_checkpoint(checkpoint, "cpu")
    with torch.no_grad():
        logits = model(**processor(images=tmp_path / "xray.png", text=sentences)).logits_per_image
    for sentence, share in zip(sentences, logits.softmax(dim=-1)[0].tolist(), strict=True):
        assert shown[sentence] == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(32, 32), (50, 41), (700, 903), (20, 9), (1000, 3)])
def test_the_example_makes_the_pixel_values_of_our_processor(mode, size, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)[: 2 if mode == "L" else 3], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "xray.png")
    for do_pad in (True, False):
        image_processor = MMCLIPImageProcessor(size=32, do_pad=do_pad, image_mean=[0.45], image_std=[0.3])
        about = {"image_size": "32", "do_pad": str(int(do_pad)), "resample": "3", "rescale_factor": str(1 / 255)}
        about |= {"image_mean": "0.45", "image_std": "0.3"}
        found = example("onnx_inference").prepare(Image.open(tmp_path / "xray.png"), about)
        expected = image_processor(tmp_path / "xray.png")["pixel_values"]
        np.testing.assert_array_equal(found, expected)


def test_the_example_turns_a_film_upright_as_our_processor_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    Image.fromarray(pixels).save(tmp_path / "xray.png", exif=turned)
    about = {"image_size": "32", "do_pad": "1", "resample": "3", "rescale_factor": str(1 / 255)}
    about |= {"image_mean": "0.45", "image_std": "0.3"}
    found = example("onnx_inference").prepare(Image.open(tmp_path / "xray.png"), about)
    processor = MMCLIPImageProcessor(size=32, image_mean=[0.45], image_std=[0.3])
    np.testing.assert_array_equal(found, processor(tmp_path / "xray.png")["pixel_values"])


def test_the_example_refuses_what_it_would_read_wrongly():
    with pytest.raises(SystemExit, match="8 bit, got the mode I;16"):
        example("onnx_inference").prepare(Image.new("I;16", (4, 4)), {})


def test_the_tokenizer_beside_the_files_cuts_and_pads_as_our_processor_does(exported):
    checkpoint, folder = exported
    _, processor = load_checkpoint(checkpoint, "cpu")
    texts = ["No pneumothorax.", "There is a small left pleural effusion.", "effusion " * 200]
    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    expected = processor(text=texts)
    assert [one.ids for one in encoded] == expected["input_ids"].tolist()
    assert [one.attention_mask for one in encoded] == expected["attention_mask"].tolist()
    assert expected["input_ids"].shape[1] == 64


# -------------------------------------------------------------------------------------------------------------- refused


def break_a_weight(value: float):
    def change(proto):
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("visual_projection.weight"))
        array = numpy_helper.to_array(tensor).copy()
        array[0, 0] += value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_a_file_that_differs_from_torch_is_refused_and_not_left_behind(value, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_encoders, "widen_aliased_layers", break_a_weight(value))
    with pytest.raises(ValueError, match="image encoder in ONNX differs by .* at most 0.0001"):
        export_encoders(*tiny(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tower_that_cannot_be_exported_is_named(tmp_path, monkeypatch):
    model, processor = tiny()

    def forward(self, pixel_values):
        pooled, patches, _ = self.model.encode_image(pixel_values)
        return (pooled if pixel_values.sum() > 0 else -pooled), patches  # a way that depends on the values

    monkeypatch.setattr(onnx_encoders._ImageEncoder, "forward", forward)
    with pytest.raises(ValueError, match="cannot take a tower of the type 'vit' as the image encoder"):
        export_encoders(model, processor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_saved_model_keeps_its_tokenizer(exported):
    checkpoint, _ = exported
    before = (checkpoint / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="holds a saved model, whose tokenizer.json"):
        export_encoders(*load_checkpoint(checkpoint, "cpu"), checkpoint)
    assert (checkpoint / "tokenizer.json").read_bytes() == before


def test_a_processor_of_another_model_is_refused(tmp_path):
    model, processor = tiny()
    for options, message in (({"size": 64}, "64 x 64 pixels, but the vision tower"), ({"do_rescale": False}, "off")):
        processor.image_processor = MMCLIPImageProcessor(**{"size": 32, **options})
        with pytest.raises(ValueError, match=message):
            export_encoders(model, processor, tmp_path / "out")


def test_a_tokenizer_without_its_file_and_a_tower_too_large_are_refused(tmp_path, monkeypatch):
    model, processor = tiny()
    monkeypatch.setattr(onnx_encoders, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="image encoder has .* GiB of weights"):
        export_encoders(model, processor, tmp_path)

    class Slow:
        model_max_length = 64

    with pytest.raises(ValueError, match="Slow has no `tokenizer.json`"):
        onnx_encoders._save_tokenizer(Slow(), 64, tmp_path / "tokenizer.json")


def test_without_onnxscript_the_export_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="needs the package onnxscript: pip install"):
        export_encoders(*tiny(), tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--phantoms", "5"], "--phantoms says what --int8 is measured on"),
        (["--int8", "--split", "test"], "--split is for --manifest"),
        (["--int8", "--manifest", "m.csv", "--phantom_size", "64"], "--phantom_size is for phantoms"),
        (["--int8", "--phantoms", "0"], "--phantoms must be 1 or more, got 0"),
        (["--int8", "--manifest", "m.csv", "--calibration_split", "val"], "must be another split than --split"),
        (
            ["--int8", "--manifest", "m", "--split", "a", "--calibration_split", "a"],
            "must be another split than --split",
        ),
    ],
)
def test_options_that_would_do_nothing_are_errors(options, message, capsys):
    with pytest.raises(SystemExit):
        example("export_onnx").parse_arguments(["--model", "m", "--output_dir", "o", *options])
    assert message in capsys.readouterr().err


def test_a_convolutional_tower_takes_its_ranges_from_another_split_of_the_manifest(tmp_path):
    script, processor = example("export_onnx"), MMCLIPProcessor(MMCLIPImageProcessor(size=32))
    lines = ["file,labels,patient_id,split"]
    for number in range(14):
        Image.new("L", (40, 50), 10 * number).save(tmp_path / f"{number}.png")
        label, split = ("cardiomegaly", "no finding")[number % 2], "train" if number < 12 else "test"
        lines.append(f"{number}.png,{label},p{number},{split}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    options = ["--model", "m", "--output_dir", "o", "--int8", "--manifest", str(tmp_path / "manifest.csv")]
    args = script.parse_arguments([*options, "--split", "test"])
    rows, data = script.read_rows(args)
    assert len(rows) == 2 and data.endswith("manifest.csv, split test, 2 rows")
    with pytest.raises(ValueError, match="--calibration_split train"):
        script.calibration_batches(args, processor)
    args = script.parse_arguments([*options, "--split", "test", "--calibration_split", "train"])
    batches = list(script.calibration_batches(args, processor))
    assert [batch.shape for batch in batches] == [(10, 1, 32, 32), (2, 1, 32, 32)]
    np.testing.assert_array_equal(batches[0][:1], processor(images=tmp_path / "0.png")["pixel_values"])


# ----------------------------------------------------------------------------------------------- left as it was, towers


@pytest.mark.parametrize("text_pooling", ["cls", "max"])
def test_a_model_in_training_and_half_precision_is_exported_in_float32_and_left_as_it_was(tmp_path, text_pooling):
    model, processor = tiny(model_class=MMCLIPForPreTraining, text_pooling=text_pooling, image_pooling="max")
    model = model.to(torch.bfloat16).train()
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    attention = model.vision_model.config._attn_implementation
    differences = export_encoders(model, processor, tmp_path)
    assert max(differences.values()) < 1e-5
    assert model.training and model.dtype == torch.bfloat16
    assert model.vision_model.config._attn_implementation == attention
    assert all(torch.equal(before[name], parameter) for name, parameter in model.state_dict().items())
    onnx.checker.check_model(tmp_path / "image_encoder.onnx", full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TOWERS)
def test_every_kind_of_tower_is_exported(model_type, tmp_path):
    fields = {"model_type": model_type, "num_channels": 1, **TOWERS[model_type]}
    assert max(export_encoders(*tiny(64, vision_config=fields), tmp_path).values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "mpnet", "electra", "deberta-v2"])
def test_every_kind_of_text_tower_is_exported(model_type, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    if model_type == "distilbert":
        shape = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    # those of RoBERTa begin behind the padding id, and this model is for 64 tokens
    fields = {"model_type": model_type, "vocab_size": 6144, "max_position_embeddings": 70, **shape}
    assert max(export_encoders(*tiny(text_config=fields), tmp_path).values()) < 1e-5


@pytest.mark.slow
def test_a_convolutional_tower_is_quantised_on_calibration_images(tmp_path):
    model, processor = tiny(64, vision_config={"model_type": "resnet", "num_channels": 1, **TOWERS["resnet"]})
    export_encoders(model, processor, tmp_path)
    assert needs_calibration(tmp_path)
    with pytest.raises(ValueError, match="calibration images, but none were given"):
        quantize_encoders(tmp_path)
    assert not list(tmp_path.glob("*_int8.onnx"))
    pixels = processor(images=[make_phantom(0, index, size=64).image for index in range(8)])["pixel_values"].numpy()
    assert quantize_encoders(tmp_path, [pixels]) == {"image": "static", "text": "dynamic"}
    found = OnnxEncoders(tmp_path, model.config, INT8_FILES).encode_image(torch.from_numpy(pixels))[0]
    with torch.no_grad():
        expected = model.get_image_features(torch.from_numpy(pixels)).pooler_output
    assert 0.98 < (found * expected).sum(dim=-1).min() < 1
    size = {name: (tmp_path / name).stat().st_size for name in ("image_encoder.onnx", "image_encoder_int8.onnx")}
    assert size["image_encoder_int8.onnx"] != size["image_encoder.onnx"]


# --------------------------------------------------------------------------------------------------------- wider layers


def two_products(width: int, activation: str = "Gelu", twice: bool = False):
    """x (n, 8) -> product, bias, activation, product -> y (n, 4), in ONNX."""
    draws = np.random.default_rng(0)
    arrays = {"first": draws.normal(size=(8, width)), "bias": draws.normal(size=width)}
    arrays["second"] = draws.normal(size=(width, 4)) / width
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Add", ["bias", "a"], ["b"]),
        helper.make_node(activation, ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "second"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])]
    if twice:  # the first weights serve another output as well
        nodes.append(helper.make_node("MatMul", ["x", "first"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", width]))
    weights = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])]
    graph = helper.make_graph(nodes, "two", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def outputs_of(model) -> list[np.ndarray]:
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})


@pytest.mark.parametrize("activation", ["Gelu", "Relu"])
def test_a_layer_as_wide_as_pages_of_memory_gets_wider_and_says_the_same(activation):
    model = two_products(2048, activation)
    before = outputs_of(model)
    assert widen_aliased_layers(model) == 1
    assert {tuple(tensor.dims) for tensor in model.graph.initializer} == {(8, 2064), (2064,), (2064, 4)}
    np.testing.assert_allclose(outputs_of(model)[0], before[0], atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [two_products(1000), two_products(1024, twice=True), two_products(1024, "Sigmoid")],
    ids=["width", "uses", "activation"],
)
def test_layers_of_other_widths_or_uses_stay_as_they_are(model):
    before = model.SerializeToString()
    assert widen_aliased_layers(model) == 0 and model.SerializeToString() == before


# ----------------------------------------------------------------------------------------------------------- zero masks


def masked_scores(allowed: list[bool]):
    """x (n, 3) plus a mask, 0 where `allowed` and -9 elsewhere -> y (n, 3), in ONNX."""
    arrays = {"allowed": np.array([allowed]), "zero": np.float32(0), "low": np.float32(-9), "rows": np.array([1, 3])}
    nodes = [
        helper.make_node("Expand", ["allowed", "rows"], ["a"]),
        helper.make_node("Where", ["a", "zero", "low"], ["mask"]),
        helper.make_node("Add", ["x", "mask"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    graph = helper.make_graph(nodes, "masked", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("allowed, left", [([True] * 3, ["Relu"]), ([True, False, True], None)])
def test_a_mask_goes_only_where_it_adds_nothing(allowed, left):
    model = masked_scores(allowed)
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    assert drop_zero_masks(model) == (left is not None)
    assert [node.op_type for node in model.graph.node] == (left or ["Expand", "Where", "Add", "Relu"])
    assert len(model.graph.initializer) == (0 if left else 4), "onnxruntime warns of weights that nobody reads"
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_array_equal(found, before)
    np.testing.assert_array_equal(found, x * np.array(allowed))


def test_an_image_encoder_adds_no_mask_and_a_text_encoder_does(exported):
    kinds = {part: {node.op_type for node in onnx.load(exported[1] / name).graph.node} for part, name in FILES.items()}
    assert "Where" not in kinds["image"] and "Where" in kinds["text"]

"""The encoders in ONNX against torch on the CPU, one by one: python benchmarks/onnx_encoders.py --json FILE

ViT-B/16 and BERT-base, ViT-S/16 and a BERT of six layers, untrained: `get_image_features` and `get_text_features` in
float32 (SDPA, inference mode) beside the files of `MMCLIP/export` in onnxruntime, with as many threads each, all in
turns. Beside them int8, torch in bfloat16, the float32 file without the changes of `onnx_graphs.py`, and a batch of 8.
The ONNX image encoder gives the embeddings of patches too, torch does not. `--quick` only shows that it runs.

(The name of this file is not onnx.py: that would stand in the way of the package.)
"""

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import transformers
from benchmark_tools import add_processor_time, argument_parser, in_turns, machine, write_results

from MMCLIP import MMCLIPConfig, MMCLIPImageProcessor, MMCLIPModel, MMCLIPProcessor
from MMCLIP.export import onnx_encoders
from MMCLIP.export.int8 import quantize_products
from MMCLIP.export.onnx_encoders import (
    TOLERANCE,
    encoder_metadata,
    exportable,
    largest_difference,
    open_session,
    quiet,
    write_encoder,
)


TOWERS = {
    "b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "s": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
}
TEXT_LAYERS = {"b": 12, "s": 6}
TINY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 128}
NUM_TOKENS = 32  # of the text, about two sentences
NAMES = {"b": {"image": "ViT-B/16", "text": "BERT-base"}, "s": {"image": "ViT-S/16", "text": "six layers of BERT"}}
VARIANTS = {
    "onnx": "ONNX",
    "onnx_8": "ONNX, batch of 8 against the same in torch",
    "onnx_plain": "ONNX as exported",
    "int8": "ONNX int8",
    "bfloat16": "torch in bfloat16",
}


def measures() -> dict[str, tuple]:
    found = {}
    for size, names in NAMES.items():
        for part, name in names.items():
            for variant, what in VARIANTS.items():
                if part == "image" or variant in ("onnx", "int8"):
                    target = (">=", 1.2) if (part, variant) == ("image", "onnx") else ()
                    key = f"{part}_{size}_{variant}_speedup"
                    found[key] = (f"{name}, {what}, times as fast as torch in float32", *target)
            found[f"{part}_{size}_rate"] = (f"{name}, ONNX, {part}s a second, one at a time",)
            found[f"{part}_{size}_rate_torch"] = (f"{name}, torch, {part}s a second, one at a time",)
    return found


def make_model(part: str, tower: dict, num_text_layers: int, image_size: int) -> tuple[MMCLIPModel, MMCLIPProcessor]:
    """An MMCLIP whose `part` is measured; the other tower is tiny, to save memory."""
    vision, text = (tower, TINY) if part == "image" else (TINY, {**tower, "num_hidden_layers": num_text_layers})
    config = MMCLIPConfig(
        vision_config={"model_type": "vit", "num_channels": 1, "image_size": image_size, "patch_size": 16, **vision},
        text_config={"model_type": "bert", "vocab_size": 6144, **text},
    )
    return MMCLIPModel(config).eval(), MMCLIPProcessor(MMCLIPImageProcessor(size=image_size))


def measure(
    part: str, tower: dict, num_text_layers: int, image_size: int, num_rounds: int, num_threads: int, clock: Callable
) -> dict[str, float]:
    """Seconds of one run, by variant and for `torch`; `torch_8` and `onnx_8` of eight images."""
    model, processor = make_model(part, tower, num_text_layers, image_size)
    if part == "image":
        batch = torch.randn(8, 1, image_size, image_size)
        inputs = {1: {"pixel_values": batch[:1]}, 8: {"pixel_values": batch}}
        encode = "get_image_features"
    else:
        ids = torch.randint(5, 6000, (1, NUM_TOKENS))
        inputs = {1: {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
        encode = "get_text_features"
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.onnx") for name in ("onnx", "int8", "onnx_plain")}
        copied, metadata = exportable(model), encoder_metadata(model, processor)
        write_encoder(copied, part, metadata, files["onnx"])
        difference = largest_difference(model, processor, files["onnx"], part)
        assert difference <= TOLERANCE, difference
        with quiet():
            quantize_products(files["onnx"], files["int8"])
        if part == "image":
            with mock.patch.multiple(onnx_encoders, widen_aliased_layers=mock.DEFAULT, drop_zero_masks=mock.DEFAULT):
                write_encoder(copied, part, metadata, files["onnx_plain"])
        del copied
        sessions = {name: open_session(path, num_threads) for name, path in files.items() if path.exists()}
    arrays = {number: {name: tensor.numpy() for name, tensor in given.items()} for number, given in inputs.items()}
    functions = {"torch": lambda: getattr(model, encode)(**inputs[1])}
    functions |= {name: lambda session=session: session.run(None, arrays[1]) for name, session in sessions.items()}
    if part == "image":
        half = make_model(part, tower, num_text_layers, image_size)[0].to(torch.bfloat16)
        half_inputs = {"pixel_values": inputs[1]["pixel_values"].to(torch.bfloat16)}
        functions["bfloat16"] = lambda: half.get_image_features(**half_inputs)
        functions["torch_8"] = lambda: model.get_image_features(**inputs[8])
        functions["onnx_8"] = lambda: sessions["onnx"].run(None, arrays[8])
    with torch.inference_mode():
        return in_turns(num_rounds, clock, **functions)


def main():
    parser = argument_parser(__doc__.partition(":")[0])
    add_processor_time(parser)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    if arguments.quick:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    results, details = {}, {}
    for size, tower in list(TOWERS.items())[: 1 if arguments.quick else None]:
        for part in ("image", "text"):
            shape = (TINY, 1, 32, 1) if arguments.quick else (tower, TEXT_LAYERS[size], 224, 15)
            seconds = measure(part, *shape, torch.get_num_threads(), clock)
            gc.collect()
            details[f"{part}_{size}"] = seconds
            for variant in VARIANTS:
                if variant in seconds:
                    reference = seconds["torch_8" if variant == "onnx_8" else "torch"]
                    results[f"{part}_{size}_{variant}_speedup"] = reference / seconds[variant]
            results[f"{part}_{size}_rate"] = 1 / seconds["onnx"]
            results[f"{part}_{size}_rate_torch"] = 1 / seconds["torch"]
    about = {
        **machine(str(torch.get_num_threads()), ("torch", "transformers", "onnxruntime", "onnxscript", "onnx")),
        "clock": clock.__name__,
        "num_tokens": NUM_TOKENS,
        "quick": arguments.quick,
    }
    write_results(measures(), results, about, arguments.json, {"seconds": details})


if __name__ == "__main__":
    main()

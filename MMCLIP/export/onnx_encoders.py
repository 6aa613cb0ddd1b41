"""The image and the text encoder of an MMCLIP as ONNX files: pictures and sentences to embeddings, without torch.

`image_encoder.onnx` takes `pixel_values` (B, 1, S, S) float32 and gives `image_embeds` (B, D) and `patch_embeds`
(B, N, D); `text_encoder.onnx` takes `input_ids` and `attention_mask` (B, T) int64 and gives `text_embeds` (B, D). All
embeddings are float32 and L2-normalised; B is any number, T at most `max_tokens`. The metadata of both files say how to
make the inputs and what to make of the outputs, see [`encoder_metadata`]; `tokenizer.json` beside them cuts and pads.
"""

import copy
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..configuration_mmclip import max_text_length
from ..data.phantom import make_phantom
from .onnx_graphs import drop_zero_masks, widen_aliased_layers


OPSET = 20  # the first with Gelu; onnxruntime reads it since 1.17
TOLERANCE = 1e-4  # between torch and ONNX, of values of a vector of length 1
NUM_CHECKS = 50  # images, and texts
CHECK_BATCHES = (1, 2, 3, 5, 8, 13, 18)  # together NUM_CHECKS
LONGEST = 4096  # tokens of a text, where neither tokenizer nor tower has a limit
MAX_BYTES = 2**31 - 2**20  # protobuf holds no more in one file
FILES = {"image": "image_encoder.onnx", "text": "text_encoder.onnx"}
INT8_FILES = {"image": "image_encoder_int8.onnx", "text": "text_encoder_int8.onnx"}  # made of them by int8.py
OUTPUTS = {"image": ("image_embeds", "patch_embeds"), "text": ("text_embeds",)}
PACKAGES = 'pip install "mmclip[onnx]", or: pip install onnx onnxscript onnxruntime'


class _ImageEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        pooled, patch_tokens, _ = self.model.encode_image(pixel_values)
        return self.model.project_image(pooled), self.model.project_image(patch_tokens)


class _TextEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.model.project_text(self.model.encode_text(input_ids, attention_mask)[0]),)


ENCODERS = {"image": _ImageEncoder, "text": _TextEncoder}


def export_encoders(model, processor, folder: str | os.PathLike) -> dict[str, float]:
    """Write `image_encoder.onnx`, `text_encoder.onnx` and `tokenizer.json` to `folder`, checked against `model`.

    `model` is an MMCLIPModel or an MMCLIPForPreTraining of any precision, on any device; it is left as it was, and
    exported in float32. Each file is written only after [`largest_difference`] over 50 images and 50 texts was within
    1e-4; these differences are returned, `{"image": ..., "text": ...}`. Raises `ValueError` for a tower that the
    exporter cannot take, one that differs, one of more than 2 GiB, a tokenizer without a `tokenizer.json`, and a
    `folder` that holds a saved model.
    """
    _require_packages()
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds a saved model, whose tokenizer.json the export would replace. Give another folder, such "
            f"as {folder / 'onnx'}."
        )
    model = exportable(model)
    metadata = encoder_metadata(model, processor)
    folder.mkdir(parents=True, exist_ok=True)
    differences = {}
    # beside the place of the files, so that they are moved there at once or not at all
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        _save_tokenizer(processor.tokenizer, metadata["max_tokens"], Path(draft, "tokenizer.json"))
        for part in FILES:
            write_encoder(model, part, metadata, Path(draft, FILES[part]))
            differences[part] = largest_difference(model, processor, Path(draft, FILES[part]), part)
            if not differences[part] <= TOLERANCE:  # also True for NaN
                raise ValueError(
                    f"The {part} encoder in ONNX differs by {differences[part]:.2g} from torch on {NUM_CHECKS} inputs, "
                    f"but at most {TOLERANCE} is allowed. Nothing was written. {_tower_name(model, part)} is not "
                    "exported rightly by this torch and onnxscript; try other versions."
                )
        for name in (*FILES.values(), "tokenizer.json"):
            os.replace(Path(draft, name), folder / name)
    for name in INT8_FILES.values():  # of an earlier export
        (folder / name).unlink(missing_ok=True)
    return differences


def exportable(model):
    """A copy of `model` to export: on the CPU, in float32, without dropout, its attention in plain operations."""
    model = copy.deepcopy(model).cpu().float().eval()
    model.set_attn_implementation("eager")  # SDPA would add nodes that look for NaN
    return model


def encoder_metadata(model, processor) -> dict[str, str | int | float]:
    """What a user of the files needs to know, as it stands in their `metadata_props` (there all as strings).

    A picture is made grey, fitted into `image_size` with black around (`do_pad` 1; else stretched), by the filter of
    Pillow with the number `resample`; its values 0 to 255 are times `rescale_factor`, minus `image_mean`, over
    `image_std`. The logits of image and text are `similarity_scale` times the product of their embeddings.
    `patch_grid` is how many patches lie side by side, in reading order.
    """
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    size = (image_processor.size["height"], image_processor.size["width"])
    if size != (model.image_size, model.image_size):
        raise ValueError(
            f"The image processor makes images of {size[0]} x {size[1]} pixels, but the vision tower takes "
            f"{model.image_size} x {model.image_size}. Give the processor that was saved with the model."
        )
    if not (image_processor.do_resize and image_processor.do_rescale and image_processor.do_normalize):
        raise ValueError(
            "The image processor has `do_resize`, `do_rescale` or `do_normalize` switched off, which the metadata of "
            "the ONNX files cannot say. Switch them on, as in the processor that was saved with the model."
        )
    return {
        "mmclip_format": 1,
        "vision_tower": model.config.vision_config.model_type,
        "text_tower": model.config.text_config.model_type,
        "projection_dim": model.config.projection_dim,
        "similarity_scale": model.similarity_scale().item(),
        "image_size": model.image_size,
        "patch_grid": model.image_size // model.patch_size,
        "do_pad": int(image_processor.do_pad),
        "resample": int(image_processor.resample),
        "rescale_factor": float(image_processor.rescale_factor),
        "image_mean": float(np.ravel(image_processor.image_mean)[0]),
        "image_std": float(np.ravel(image_processor.image_std)[0]),
        "max_tokens": _max_tokens(tokenizer, model.config.text_config),
    }


def largest_difference(model, processor, path: str | os.PathLike, part: str) -> float:
    """Largest absolute difference of any output value between `model` and the ONNX file of its `part`, on the CPU.

    Over 50 phantoms or 50 texts, from one token to the most that the tower takes, in batches of 1 to 18. `model` is
    in float32 and in eval mode.
    """
    session, largest = open_session(path), 0.0
    for inputs in check_inputs(processor, part, model.config):
        with torch.no_grad():
            expected = ENCODERS[part](model)(**inputs)
        found = session.run(list(OUTPUTS[part]), {name: tensor.numpy() for name, tensor in inputs.items()})
        for one, other in zip(expected, found, strict=True):
            if tuple(one.shape) != other.shape:
                raise ValueError(
                    f"The {part} encoder in ONNX gives an output of {other.shape} where torch gives {tuple(one.shape)}."
                )
            difference = np.abs(one.numpy() - other).max().item()
            largest = max(largest, difference) if difference == difference else float("nan")
    return largest


def check_inputs(processor, part: str, config) -> Iterator[dict[str, Tensor]]:
    """Batches with together 50 inputs of the encoder `part`: phantoms, or their reports cut to all lengths."""
    size = processor.image_processor.size["height"]
    ends = list(itertools.accumulate(CHECK_BATCHES))
    phantoms = [make_phantom(seed=0, index=index, size=max(min(size, 128), 16)) for index in range(NUM_CHECKS)]
    if part == "image":
        for start, end in zip([0, *ends], ends, strict=False):
            yield dict(processor(images=[phantom.image for phantom in phantoms[start:end]]))
        return
    tokenizer = processor.tokenizer
    most = _max_tokens(tokenizer, config.text_config)
    words = " ".join(phantom.report for phantom in phantoms)
    ids = tokenizer(words, verbose=False)["input_ids"]
    ids *= -(-2 * most // len(ids))
    for start, end in zip([0, *ends], ends, strict=False):
        lengths = [1 + number * (most - 1) // (NUM_CHECKS - 1) for number in range(start, end)]
        yield dict(tokenizer.pad({"input_ids": [ids[length : 2 * length] for length in lengths]}, return_tensors="pt"))


def _max_tokens(tokenizer, text_config) -> int:
    return int(min(tokenizer.model_max_length, max_text_length(text_config) or LONGEST, LONGEST))


def open_session(path: str | os.PathLike, num_threads: int = 0):
    """An onnxruntime session of the file on the CPU; 0 threads are as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def write_encoder(model, part: str, metadata: dict, path: Path) -> None:
    """The file of one encoder of an [`exportable`] model, not checked yet."""
    num_bytes = 4 * sum(parameter.numel() for parameter in ENCODERS[part](_tower_of(model, part)).parameters())
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"The {part} encoder has {num_bytes / 2**30:.1f} GiB of weights, but one ONNX file holds at most 2 GiB. "
            "Export a smaller tower."
        )
    batch = torch.export.Dim("batch", min=1)
    if part == "image":
        # two images: what is exported from one would take one alone
        pixels = torch.zeros(2, model.config.vision_config.num_channels, model.image_size, model.image_size)
        inputs, shapes = {"pixel_values": pixels}, {"pixel_values": {0: batch}}
    else:
        length = torch.export.Dim("length", min=1, max=metadata["max_tokens"])
        ids = torch.full((2, min(7, metadata["max_tokens"])), 5)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        shapes = {name: {0: batch, 1: length} for name in inputs}
    encoder = ENCODERS[part](model).eval()
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                encoder,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=list(OUTPUTS[part]),
                dynamic_shapes=tuple(shapes.values()),
                opset_version=OPSET,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"The exporter of torch {torch.__version__} cannot take {_tower_name(model, part)} as the {part} encoder: "
            f"{reason} Nothing was written."
        ) from error
    proto = program.model_proto
    drop_zero_masks(proto)
    widen_aliased_layers(proto)
    for name, value in {"mmclip_part": part, **metadata}.items():
        proto.metadata_props.add(key=name, value=str(value))
    path.write_bytes(proto.SerializeToString())


def _save_tokenizer(tokenizer, max_tokens: int, path: Path) -> None:
    """`tokenizer.json` that the package tokenizers reads, which cuts and pads a batch as our processor does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no `tokenizer.json`, without which nothing but transformers can make the "
            "inputs of the text encoder. Load the fast tokenizer of the same model."
        )
    backend = copy.deepcopy(backend)
    backend.enable_truncation(max_tokens, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    backend.save(str(path))


def _tower_of(model, part: str):
    return model.vision_model if part == "image" else model.text_model


def _tower_name(model, part: str) -> str:
    config = model.config.vision_config if part == "image" else model.config.text_config
    return f"a tower of the type {config.model_type!r}"


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"The export to ONNX needs the package {error.name}: {PACKAGES}.") from error


@contextmanager
def quiet():
    """Without what exporter and quantisation say of torchvision, of their own plans and of names of dimensions."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

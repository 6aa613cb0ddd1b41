"""The ONNX encoders with weights of 8 bit: a quarter of the size, and faster on CPUs with VNNI or its like.

Products of matrices, of which transformers consist, are quantised dynamically: weights once, for each output channel,
activations anew in each run. Convolutions would be slower so (RESULTS.md): a tower that mostly consists of them, such
as a ResNet, is quantised statically, its activations by the range that they had on calibration images. What it costs
is measured, not guessed: [`measure_int8`].
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..evaluation.bootstrap import compare_models
from ..evaluation.zero_shot import evaluate_zero_shot, patient_names, scored_rows
from ..text.prompt_sets import PromptSet
from .onnx_encoders import FILES, INT8_FILES, OUTPUTS, open_session, quiet


def quantize_encoders(folder: str | os.PathLike, calibration: Iterable[np.ndarray] | None = None) -> dict[str, str]:
    """Write the `_int8.onnx` of both encoders in `folder`; returns how, `{"image": "static", "text": "dynamic"}`.

    `calibration` are batches of `pixel_values` (B, 1, S, S), read only for a tower that [`needs_calibration`]; without
    them that is a `ValueError`.
    """
    folder, methods = Path(folder), {}
    with tempfile.TemporaryDirectory(dir=folder) as draft, quiet():
        for part, name in FILES.items():
            is_static = part == "image" and needs_calibration(folder)
            written = Path(draft, INT8_FILES[part])
            if is_static:
                _quantize_convolutions(folder / name, written, calibration)
            else:
                quantize_products(folder / name, written)
            methods[part] = "static" if is_static else "dynamic"
            _copy_metadata(folder / name, written, f"int8 {methods[part]}")
        for name in INT8_FILES.values():
            os.replace(Path(draft, name), folder / name)
    return methods


def needs_calibration(folder: str | os.PathLike) -> bool:
    """Whether most weights of the image encoder in `folder` are those of convolutions."""
    import onnx

    graph = onnx.load(Path(folder, FILES["image"])).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    in_convolutions = sum(sizes.get(node.input[1], 0) for node in graph.node if node.op_type == "Conv")
    return 2 * in_convolutions > sum(sizes.values())


def quantize_products(source: Path, target: Path) -> None:
    """`source` with the weights of its matrix products in 8 bit; needs no data."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # only products with weights; that into the shared space (Gemm) and the patch embedding (Conv) are cheap as they are
    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"])


def _quantize_convolutions(source: Path, target: Path, calibration: Iterable[np.ndarray] | None) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(calibration or ())
            self.num_read = 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            self.num_read += batch is not None
            return None if batch is None else {"pixel_values": batch}

    batches = Batches()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        prepared = Path(folder, source.name)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)  # batch norms are already part of convolutions
        try:
            quantize_static(
                prepared,
                target,
                batches,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except ValueError as error:
            if batches.num_read:
                raise
            raise ValueError(
                "This vision tower consists of convolutions, whose 8-bit form is made from the activations on "
                "calibration images, but none were given. Pass some tens of images of the kind that will be scored."
            ) from error


def _copy_metadata(source: Path, target: Path, weights: str) -> None:
    import onnx

    model = onnx.load(target)
    kept = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {**kept, "weights": weights})
    onnx.save(model, target)


class OnnxEncoders(nn.Module):
    """The encoders of `folder` in the place of an MMCLIPModel, for our evaluation: `evaluate_zero_shot(this, ...)`.

    `files` are `FILES` or `INT8_FILES`, `config` is that of the model. Runs on the CPU with `num_threads` threads, 0
    for as many as there are cores.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder: str | os.PathLike, config, files=FILES, num_threads: int = 0):
        super().__init__()
        self.config = config
        self.sessions = {part: open_session(Path(folder, name), num_threads) for part, name in files.items()}
        self.metadata = self.sessions["image"].get_modelmeta().custom_metadata_map

    def similarity_scale(self) -> Tensor:
        return torch.tensor(float(self.metadata["similarity_scale"]))

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, None]:
        """`image_embeds` and `patch_embeds`, which [`OnnxEncoders.project_image`] leaves as they are."""
        embeds, patches = self._run("image", {"pixel_values": pixel_values})
        return embeds, patches, None

    def project_image(self, embeds: Tensor) -> Tensor:
        return embeds

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        (embeds,) = self._run("text", {"input_ids": input_ids, "attention_mask": attention_mask})
        return BaseModelOutputWithPooling(pooler_output=embeds)

    def _run(self, part: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        found = self.sessions[part].run(list(OUTPUTS[part]), {name: tensor.numpy() for name, tensor in inputs.items()})
        return [torch.from_numpy(array) for array in found]


def measure_int8(
    folder: str | os.PathLike,
    config,
    processor,
    rows: datasets.Dataset,
    labels: Sequence[str] | None = None,
    *,
    fully_labelled: Sequence[str] = (),
    unlisted_is_absent: bool | None = None,
    prompts: str | PromptSet = "mmclip",
    batch_size: int = 64,
    num_bootstrap: int = 1000,
) -> dict:
    """Zero-shot AUROC of the float32 and of the int8 encoders of `folder` on the same `rows`, and what int8 loses.

    `{"float32": macro AUROC, "int8": ..., "loss": {"difference", "ci", "p_value"}, "per_class": {label: difference},
    "largest_change": of P(present), "bytes": {file: size}, "num_images", "num_patients"}`; intervals are 95 % over
    patients. Options are those of `evaluate_zero_shot`.
    """
    options = {
        "fully_labelled": fully_labelled,
        "unlisted_is_absent": unlisted_is_absent,
        "prompts": prompts,
        "batch_size": batch_size,
        "num_bootstrap": 0,
    }
    results, predictions = {}, {}
    for name, files in (("float32", FILES), ("int8", INT8_FILES)):
        encoders = OnnxEncoders(folder, config, files)
        found, predictions[name] = evaluate_zero_shot(encoders, processor, rows, labels, progress=name, **options)
        results[name] = found["zero_shot"]
    first, second = predictions["float32"], predictions["int8"]
    patients = patient_names(scored_rows(rows, labels)[0])
    change = compare_models(first.targets, first.margins, second.margins, first.labels, patients, num_bootstrap)
    return {
        **{name: result["macro_auroc"] for name, result in results.items()},
        "loss": change["macro_auroc"],
        "per_class": {label: values["auroc"]["difference"] for label, values in change["per_class"].items()},
        "largest_change": float(np.abs(first.scores - second.scores).max()),
        "bytes": {name: Path(folder, name).stat().st_size for name in (*FILES.values(), *INT8_FILES.values())},
        "num_images": results["int8"]["num_images"],
        "num_patients": results["int8"]["num_patients"],
    }

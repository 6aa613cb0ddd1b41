"""One pass of a data set through the towers, kept for all evaluations: zero-shot, linear probe and retrieval share it.

A cache holds what one model made of one data set. Its files are named by hashes of both (weights, configs, code,
tokenizer; row ids and the bytes of the images), so a changed model or picture is never served an old embedding.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..modeling_mmclip import evaluating


# the type of the weights is read from the weights
_ABOUT_THE_FILE = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version"}


class ImageFeatures(NamedTuple):
    """What the vision tower makes of images, float32 on the CPU, in their order.

    `embeds` (n, D) are projected and L2-normalised, for comparison with texts; `pooled` (n, H) are the tower's images
    before projection, which a linear probe reads.
    """

    embeds: Tensor
    pooled: Tensor


class EmbeddingCache:
    """Embeddings by model and data, in the memory of this process and, where `folder` is given, in files there.

    Files are safetensors of float32, `images-MODEL-DATA` and `texts-MODEL-DATA`, and may be deleted at any time. A
    file that cannot be read, or whose header names another model or other data than its name, is a `ValueError`.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = None if folder is None else Path(folder)
        self._memory: dict[str, dict[str, Tensor]] = {}

    def get(self, kind: str, model: str, data: str) -> dict[str, Tensor] | None:
        name = f"{kind}-{model}-{data}"
        if name not in self._memory and self.folder is not None:
            path = self.folder / f"{name}.safetensors"
            if path.is_file():
                self._memory[name] = self._read(path, model, data)
        return self._memory.get(name)

    def put(self, kind: str, model: str, data: str, tensors: dict[str, Tensor]) -> None:
        name = f"{kind}-{model}-{data}"
        self._memory[name] = tensors
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"{name}.{os.getpid()}.part"
            save_file(tensors, part, metadata={"model": model, "data": data})
            os.replace(part, self.folder / f"{name}.safetensors")  # never half a file under the final name

    @staticmethod
    def _read(path: Path, model: str, data: str) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: the cached embeddings cannot be read ({error}). Delete the file.") from error
        if (found.get("model"), found.get("data")) != (model, data):
            raise ValueError(
                f"{path}: expected embeddings of model {model} and data {data}, but the file says it holds those of "
                f"model {found.get('model')} and data {found.get('data')}. It was renamed or copied; delete it."
            )
        return tensors


def _digest(parts: Iterator) -> str:
    digest = hashlib.blake2b(digest_size=10)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts read alike
        digest.update(part)
    return digest.hexdigest()


def model_fingerprint(model, processor) -> str:
    """20 hex digits of what decides an embedding: weights, config, image processor, tokenizer and their code."""
    return _digest(_model_parts(model, processor))


def _model_parts(model, processor) -> Iterator[str | bytes]:
    yield _settings(model.config.to_dict())
    for name, tensor in sorted(model.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    for part in (model, processor, processor.image_processor):
        file = getattr(sys.modules.get(type(part).__module__), "__file__", None)
        if file is not None:
            yield Path(file).read_bytes()
    yield _settings(processor.image_processor.to_dict())
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield _settings(tokenizer.get_vocab())
    else:  # without padding and truncation, which stand as the last call left them
        yield _settings({**json.loads(backend.to_str()), "padding": None, "truncation": None})
    yield f"{tokenizer.model_max_length} {tokenizer.padding_side} {tokenizer.truncation_side}"


def _settings(values: dict) -> str:
    """`values` as JSON, without what saving and loading a model adds to its configs."""

    def kept(value):
        if isinstance(value, dict):
            return {key: kept(entry) for key, entry in value.items() if key not in _ABOUT_THE_FILE}
        return value

    return json.dumps(kept(values), sort_keys=True, default=str)


def rows_fingerprint(rows: datasets.Dataset) -> str:
    """20 hex digits of the ids and images of `rows`, in their order; files are read, as their names say little."""
    return _digest(_row_parts(rows))


def _row_parts(rows: datasets.Dataset) -> Iterator[str | bytes]:
    for row in rows.select_columns(["row_id", "image"]):
        image = row["image"]
        yield row["row_id"]
        if image is None:
            yield b""
        elif image["bytes"] is not None:
            yield image["bytes"]
        else:
            yield Path(image["path"]).read_bytes()


class _Images(Dataset):
    """Image sources (rows of a manifest, or a list of anything the processor reads) -> (C, H, W) `pixel_values`."""

    def __init__(self, processor, images: Sequence | datasets.Dataset):
        self.processor = processor
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image, where = self.images[index], f"Image {index}"
        if isinstance(self.images, datasets.Dataset):
            image, where = image["image"], f"Row {image['row_id']!r}"
        try:
            pixel_values = self.processor.image_processor([image], return_tensors="pt")["pixel_values"]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return pixel_values[0]


def pixel_value_batches(
    processor, images: Sequence | datasets.Dataset, batch_size: int, num_workers: int = 0, progress: str = ""
) -> Iterator[Tensor]:
    """Batches (B, C, H, W) of `images` in order; `progress` names a progress bar, "" shows none."""
    if isinstance(images, datasets.Dataset):
        images = images.select_columns(["row_id", "image"])  # masks and reports would be read for nothing
    loader = DataLoader(_Images(processor, images), batch_size=batch_size, num_workers=num_workers)
    yield from tqdm(loader, desc=progress, unit="batch", disable=not progress)


def image_features(
    model,
    processor,
    images: Sequence | datasets.Dataset,
    *,
    cache: EmbeddingCache | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: str = "",
) -> ImageFeatures:
    """Both forms of `images`, rows of a manifest that all have one, or a list of anything the processor reads.

    The model stays in the mode it was in. Only rows are cached. Raises `ValueError` when there is no image, for one
    that cannot be read, naming its row, and for embeddings that are not finite.
    """
    if len(images) == 0:
        raise ValueError("There is no image to embed. Check the split and the filters of the rows.")
    keys = None
    if cache is not None and isinstance(images, datasets.Dataset):
        keys = "images", model_fingerprint(model, processor), rows_fingerprint(images)
        if (stored := cache.get(*keys)) is not None:
            return ImageFeatures(stored["embeds"], stored["pooled"])
    embeds, pooled = [], []
    with evaluating(model):
        for pixel_values in pixel_value_batches(processor, images, batch_size, num_workers, progress):
            batch = model.encode_image(pixel_values.to(device=model.device, dtype=model.dtype))[0]
            pooled.append(batch.float().cpu())
            embeds.append(model.project_image(batch).float().cpu())
    features = ImageFeatures(torch.cat(embeds), torch.cat(pooled))
    bad = (~features.embeds.isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise ValueError(
            f"The embeddings of {len(bad)} of {len(images)} images hold NaN or infinity, the first is image "
            f"{int(bad[0])}. Look for diverged weights or a half-precision overflow."
        )
    if keys is not None:
        cache.put(*keys, features._asdict())
    return features


def text_features(
    model, processor, texts: Sequence[str], *, cache: EmbeddingCache | None = None, batch_size: int = 256
) -> Tensor:
    """Projected, L2-normalised embeddings (n, D) of `texts`, float32 on the CPU; each distinct text is encoded once."""
    # texts of like length together, or padding would be most of a batch
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    index = {text: number for number, text in enumerate(distinct)}
    order = torch.tensor([index[text] for text in texts], dtype=torch.long)
    keys = None
    if cache is not None:
        keys = "texts", model_fingerprint(model, processor), _digest(iter(distinct))
        if (stored := cache.get(*keys)) is not None:
            return stored["embeds"][order]
    embeds = [torch.empty(0, model.config.projection_dim)]
    with evaluating(model):
        for start in range(0, len(distinct), batch_size):
            tokens = processor(text=distinct[start : start + batch_size], return_tensors="pt").to(model.device)
            output = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            embeds.append(output.pooler_output.float().cpu())
    embeds = torch.cat(embeds)
    if keys is not None:
        cache.put(*keys, {"embeds": embeds})
    return embeds[order]

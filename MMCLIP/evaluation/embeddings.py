"""One pass of a data set through the towers, kept for all evaluations: zero-shot, linear probe and retrieval share it.

A cache holds what a model made of images and texts, under hashes of both: of its weights, configs, code and tokenizer,
and of the bytes of a picture or a text. So a changed model or picture is never served an old embedding, and a data set
that shares pictures with another does not embed them again.
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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


# what decides no embedding; the type of the weights is read from the weights
_ABOUT_THE_FILE = {
    "_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "training_sources",
    "transformers_version",
}  # fmt: skip


class ImageFeatures(NamedTuple):
    """What the vision tower makes of images, float32 on the CPU, in their order.

    `embeds` (n, D) are projected and L2-normalised, for comparison with texts; `pooled` (n, H) are the tower's images
    before projection, which a linear probe reads.
    """

    embeds: Tensor
    pooled: Tensor


class EmbeddingCache:
    """Embeddings by model and content, in the memory of this process and, where `folder` is given, in files there.

    A file, `images-MODEL-...` or `texts-MODEL-...`, is safetensors of float32 with a hash of each image or text; it
    holds neither names nor texts, and may be deleted at any time. A file that cannot be read, or whose header names
    another model than its name, is a `ValueError`.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = None if folder is None else Path(folder)
        self._model, self._fingerprint = (None, None), ""
        self._numbers: dict[str, dict[bytes, int]] = {}  # kind and model -> hash -> its row in the tensors
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def hold(self, model, processor) -> str:
        """The fingerprint of a model whose weights and processor stay as they are from now on; it is not taken anew."""
        self._model, self._fingerprint = (model, processor), model_fingerprint(model, processor)
        return self._fingerprint

    def fingerprint(self, model, processor) -> str:
        """Of the model that is held as it was then, of any other as it is now."""
        if self._model[0] is model and self._model[1] is processor:
            return self._fingerprint
        return model_fingerprint(model, processor)

    def fill(
        self, kind: str, model: str, keys: Sequence[bytes], encode: Callable[[list[int]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors of `keys`, in their order. `encode` makes those of the given positions that nobody has made."""
        name = f"{kind}-{model}"
        if name not in self._numbers:
            self._numbers[name], self._tensors[name] = {}, {}
            for path in sorted(self.folder.glob(f"{name}-*.safetensors")) if self.folder is not None else ():
                self._add(name, *self._read(path, model))
        missing: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key not in self._numbers[name]:
                missing.setdefault(key, position)
        if missing:
            made = encode(list(missing.values()))
            self._add(name, list(missing), made)
            if self.folder is not None:
                self._write(name, model, list(missing), made)
        order = torch.tensor([self._numbers[name][key] for key in keys], dtype=torch.long)
        return {part: tensor[order] for part, tensor in self._tensors[name].items()}

    def _add(self, name: str, keys: Sequence[bytes], tensors: dict[str, Tensor]) -> None:
        numbers, there = self._numbers[name], self._tensors[name]
        start = len(next(iter(there.values()))) if there else 0
        numbers.update((key, start + number) for number, key in enumerate(keys))
        for part, tensor in tensors.items():
            there[part] = torch.cat([there[part], tensor]) if part in there else tensor

    def _write(self, name: str, model: str, keys: list[bytes], tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}-{_digest(iter(keys)).hex()}.safetensors"
        part = path.with_suffix(f".{os.getpid()}.part")
        hashes = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
        save_file({"keys": hashes, **tensors}, part, metadata={"model": model})
        os.replace(part, path)  # never half a file under the final name

    @staticmethod
    def _read(path: Path, model: str) -> tuple[list[bytes], dict[str, Tensor]]:
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("model")
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: the cached embeddings cannot be read ({error}). Delete the file.") from error
        if found != model:
            raise ValueError(
                f"{path}: expected embeddings of the model {model}, but the file says it holds those of {found}. It "
                "was renamed or copied; delete it."
            )
        return [bytes(key) for key in tensors.pop("keys").numpy()], tensors


def _digest(parts: Iterator[str | bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=10)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts read alike
        digest.update(part)
    return digest.digest()


def model_fingerprint(model, processor, with_code: bool = True) -> str:
    """20 hex digits of what decides an embedding: weights, config, image processor, tokenizer and their code.

    Without the code it stays the same from one version of this package to the next.
    """
    return _digest(_model_parts(model, processor, with_code)).hex()


def _model_parts(model, processor, with_code: bool) -> Iterator[str | bytes]:
    yield _settings(model.config.to_dict())
    for name, tensor in sorted(model.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    for part in (model, processor, processor.image_processor) if with_code else ():
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


def rows_fingerprint(rows: datasets.Dataset, *more: str | bytes) -> str:
    """20 hex digits of the ids and images of `rows`, in their order, and of what else is given.

    Files are read, as their names say little.
    """
    pairs = zip(rows["row_id"], _image_keys(rows), strict=True)
    return _digest(itertools.chain(*pairs, more)).hex()


def _image_keys(rows: datasets.Dataset) -> list[bytes]:
    """A hash of the bytes of each image, as they are stored."""
    keys = []
    for row in rows.select_columns("image"):
        image = row["image"] or {"bytes": b""}
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        keys.append(_digest(iter([content])))
    return keys


class ImageDataset(Dataset):
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
    loader = DataLoader(ImageDataset(processor, images), batch_size=batch_size, num_workers=num_workers)
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

    def encode(positions: Sequence[int]) -> dict[str, Tensor]:
        some = images.select(positions) if isinstance(images, datasets.Dataset) else images
        embeds, pooled = [], []
        with evaluating(model):
            for pixel_values in pixel_value_batches(processor, some, batch_size, num_workers, progress):
                batch = model.encode_image(pixel_values.to(device=model.device, dtype=model.dtype))[0]
                pooled.append(batch.float().cpu())
                embeds.append(model.project_image(batch).float().cpu())
        features = {"embeds": torch.cat(embeds), "pooled": torch.cat(pooled)}
        bad = (~features["embeds"].isfinite()).any(dim=1).nonzero()
        if len(bad):
            raise ValueError(
                f"The embeddings of {len(bad)} of {len(images)} images hold NaN or infinity, the first is image "
                f"{positions[int(bad[0])]}. Look for diverged weights or a half-precision overflow."
            )
        return features

    if cache is None or not isinstance(images, datasets.Dataset):
        return ImageFeatures(**encode(range(len(images))))
    return ImageFeatures(**cache.fill("images", cache.fingerprint(model, processor), _image_keys(images), encode))


def text_features(
    model, processor, texts: Sequence[str], *, cache: EmbeddingCache | None = None, batch_size: int = 256
) -> Tensor:
    """Projected, L2-normalised embeddings (n, D) of `texts`, float32 on the CPU; each distinct text is encoded once."""
    if isinstance(texts, str):
        raise ValueError(f"`texts` must be a list of texts, but is the text {texts!r}. Write [text].")
    # texts of like length together, or padding would be most of a batch
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    if not distinct:
        return torch.empty(0, model.config.projection_dim)

    def encode(positions: Sequence[int]) -> dict[str, Tensor]:
        some, embeds = [distinct[position] for position in positions], []
        with evaluating(model):
            for start in range(0, len(some), batch_size):
                tokens = processor(text=some[start : start + batch_size], return_tensors="pt").to(model.device)
                output = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
                embeds.append(output.pooler_output.float().cpu())
        return {"embeds": torch.cat(embeds)}

    if cache is None:
        embeds = encode(range(len(distinct)))["embeds"]
    else:
        keys = [_digest(iter([text])) for text in distinct]
        embeds = cache.fill("texts", cache.fingerprint(model, processor), keys, encode)["embeds"]
    index = {text: number for number, text in enumerate(distinct)}
    return embeds[[index[text] for text in texts]]

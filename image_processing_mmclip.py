"""Any chest X-ray -> `pixel_values`: one channel, padded to a square so that no part of the chest is lost, normalised.

`load_grayscale` is the one place where a picture is read; training, inference and heat maps all go through it. Nothing
here needs torchvision.
"""

import io
import math
import os
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling


# what a saved configuration adds beside the options below
BOOKKEEPING_KEYS = {"auto_map", "image_processor_type", "processor_class"}
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as PIL's conversion to mode "L"


def load_grayscale(image: Any, where: str = "") -> Image.Image:
    """Reads one picture as PIL mode "L" (8 bit, 0 black): file path, encoded bytes, PIL image, numpy array or tensor.

    - Files and encoded bytes: whatever Pillow decodes, first frame, turned upright by its EXIF tag. A dict with `bytes`
      or `path`, as `datasets.Image(decode=False)` yields, is read too.
    - PIL images of any mode. Transparent pixels lie over black. Colours become luma (ITU-R 601).
    - Arrays and tensors: (height, width), (height, width, channels) or (channels, height, width) with 1 (grey),
      2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels. Where both ends could be channels, tensors are channels-first and
      arrays channels-last.
    - Grey levels: booleans are 0 and 255; 8-bit values stay. Deeper integers (16-bit PNG, modes "I;16", "I") stay if
      all lie in [0, 255]; otherwise the range actually used is stretched, minimum to 0 and maximum to 255. Floats in
      [0, 1] are times 255, floats in [0, 255] stay, other ranges are stretched. A constant image outside becomes black.

    `where` names the picture in error messages (a path names itself). Raises `ValueError` for a missing or unreadable
    file, zero area, NaN or infinity, and shapes or types that are no picture.
    """
    image = _read(image, where)
    if image.mode == "F":
        image = Image.fromarray(np.rint(np.asarray(image)).astype(np.uint8))
    return image


def _read(image: Any, where: str = "") -> Image.Image:
    """`load_grayscale` without its rounding: mode "L", or mode "F" within [0, 255] for sources deeper than 8 bit."""
    if isinstance(image, dict):
        if image.get("bytes") is None and image.get("path") is None:
            raise ValueError(f"{_at(where)}expected a dict with `bytes` or `path`, got the keys {sorted(image)}.")
        where = where or str(image.get("path") or "")
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, (str, os.PathLike)):
        where = f"{where}: {image}" if where and str(image) not in where else str(image)
        image = _decode(Path(image), where)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        image = _decode(io.BytesIO(image), where)
    if isinstance(image, Image.Image):
        return _gray_from_pil(image, where)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        array = (image.float() if image.is_floating_point() else image).numpy()
        return _gray_from_array(array, where, channels_first=True)
    if isinstance(image, np.ndarray):
        return _gray_from_array(image, where, channels_first=False)
    raise ValueError(
        f"{_at(where)}expected a path, bytes, PIL image, numpy array or torch tensor, got {type(image).__name__}."
    )


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _decode(source: Path | io.BytesIO, where: str) -> Image.Image:
    """Opens and fully decodes a file, so that a truncated one is found here and the file handle is closed."""
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"{where}: there is no such image file; check the path (URLs must be downloaded first).")
    try:
        with Image.open(source) as image:
            image.load()
            return image
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise ValueError(
            f"{_at(where)}expected an image file that Pillow {Image.__version__} can decode, but {error}. "
            "Replace the file, or convert it to PNG."
        ) from error


def _gray_from_pil(image: Image.Image, where: str) -> Image.Image:
    if image.width == 0 or image.height == 0:
        raise ValueError(f"{_at(where)}expected an image with some area, got {image.width} x {image.height} pixels.")
    if image.mode == "L" and image.format is None and "transparency" not in image.info:
        return image  # the way of training: already grey, already in memory
    try:
        if image.format is not None:
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            return _gray_from_array(np.asarray(image), where, channels_first=False)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if image.mode == "LAB":
            image = image.getchannel("L")
        elif image.mode not in ("1", "L", "LA", "RGB", "YCbCr"):
            image = image.convert("RGBA" if alpha is not None else "RGB").convert("RGB")
        image = image.convert("L")
    except (OSError, SyntaxError) as error:  # PIL decodes lazily: an opened image can still be truncated
        raise ValueError(f"{_at(where)}expected a complete image, but {error}. Replace the file.") from error
    if alpha is not None and alpha.getextrema() != (255, 255):
        image = ImageChops.multiply(image, alpha)
    return image


def _gray_from_array(array: np.ndarray, where: str, channels_first: bool) -> Image.Image:
    shape = array.shape
    if array.ndim == 3:
        candidates = [axis for axis in ((0, 2) if channels_first else (2, 0)) if 1 <= shape[axis] <= 4]
        if not candidates:
            raise ValueError(
                f"{_at(where)}expected (height, width), or 1 to 4 channels first or last, got shape {shape}. "
                "A stack of grey images must be a list, or (batch, 1, height, width)."
            )
        array = np.moveaxis(array, candidates[0], -1)
    elif array.ndim == 2:
        array = array[..., None]
    else:
        raise ValueError(f"{_at(where)}expected an image of 2 or 3 dimensions, got shape {shape}.")
    if array.size == 0:
        raise ValueError(f"{_at(where)}expected an image with some area, got shape {shape}.")
    if array.dtype.kind not in "buif":
        raise ValueError(f"{_at(where)}expected boolean, integer or real pixels, got the type {array.dtype}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"{_at(where)}expected finite pixels, got {count} NaN or infinite of {array.size}.")

    if array.dtype == np.uint8 and array.shape[-1] == 1:
        return Image.fromarray(np.ascontiguousarray(array[..., 0]))
    num_colors = 1 if array.shape[-1] <= 2 else 3
    gray = _to_byte_range(array[..., :num_colors])
    gray = gray[..., 0] if num_colors == 1 else gray @ GRAY_WEIGHTS
    if array.shape[-1] in (2, 4):
        gray = gray * _alpha_fraction(array[..., -1], where)
    if array.dtype == np.uint8:
        return Image.fromarray(np.rint(gray).astype(np.uint8))
    return Image.fromarray(np.clip(gray, 0, 255).astype(np.float32))


def _to_byte_range(array: np.ndarray) -> np.ndarray:
    """float32 in [0, 255] by the rule of grey levels in `load_grayscale`."""
    if array.dtype == np.bool_:
        return array.astype(np.float32) * 255
    if array.dtype == np.uint8:
        return array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return array.astype(np.float32) * 255
    if low >= 0 and high <= 255:
        return array.astype(np.float32)
    # halves, so that the range of a float64 array cannot overflow
    span = high / 2 - low / 2
    return ((array.astype(np.float64) / 2 - low / 2) * (255 / span if span > 0 else 0.0)).astype(np.float32)


def _alpha_fraction(alpha: np.ndarray, where: str) -> np.ndarray:
    """Opacity in [0, 1]: integers by the range of their type, floats as they are."""
    if alpha.dtype.kind in "ui":
        return alpha.astype(np.float32) / np.iinfo(alpha.dtype).max
    if alpha.min() < 0 or alpha.max() > 1:
        raise ValueError(f"{_at(where)}expected alpha in [0, 1], got {alpha.min():g} to {alpha.max():g}.")
    return alpha.astype(np.float32)


class MMCLIPImageProcessorKwargs(TypedDict, total=False):
    """The options of `MMCLIPImageProcessor`, at construction or for one call."""

    do_resize: bool
    do_pad: bool
    size: dict[str, int] | int
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float]
    image_std: float | list[float]
    return_tensors: str | None


class MMCLIPImageProcessor(PilBackend):
    r"""
    Turns X-rays of any kind (see `load_grayscale`) into `pixel_values` (B, 1, height, width), float32.

    do_resize (`bool`, *optional*, defaults to `True`):
        Whether to bring each image to `size`. If not, all images of a call must have one size already.
    do_pad (`bool`, *optional*, defaults to `True`):
        Whether resizing keeps the shape of the chest: the image is fitted into `size` and centred, black around. If
        not, it is stretched to `size`. Without `do_resize` nothing is padded.
    size (`dict` or `int`, *optional*, defaults to 224 x 224):
        `{"height": ..., "width": ...}`, or the side of a square. An image that has this size is not resampled.
    resample (`int`, *optional*, defaults to bicubic):
        PIL filter; all of them average when they shrink. Large images are first reduced by box averages.
    do_rescale, rescale_factor (*optional*, default to `True` and 1 / 255):
        Grey levels times the factor.
    do_normalize, image_mean, image_std (*optional*, default to `True`, [0.5] and [0.25]):
        Then (value - mean) / std, one number each: black is -2, white 2.
    """

    valid_kwargs = MMCLIPImageProcessorKwargs
    model_input_names = ["pixel_values"]
    do_resize = True
    do_pad = True
    size = {"height": 224, "width": 224}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5]
    image_std = [0.25]

    def __init__(self, **kwargs):
        self._refuse_unknown(set(kwargs) - BOOKKEEPING_KEYS)
        super().__init__(**kwargs)
        self._check_options({name: getattr(self, name) for name in MMCLIPImageProcessorKwargs.__annotations__})

    def _refuse_unknown(self, names: set[str]) -> None:
        unknown = sorted(names - set(MMCLIPImageProcessorKwargs.__annotations__))
        if unknown:
            known = ", ".join(MMCLIPImageProcessorKwargs.__annotations__)
            raise TypeError(f"{type(self).__name__} knows no {', '.join(unknown)}; its options are {known}.")

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs, default_to_square=True)
        return {name: kwargs[name] for name in MMCLIPImageProcessorKwargs.__annotations__ if name in kwargs}

    def _check_options(self, options: dict[str, Any]) -> None:
        size = options["size"]
        if not (size.height and size.width and size.height > 0 and size.width > 0):
            raise ValueError(f"`size` must be a positive side or have a positive `height` and `width`, got {size}.")
        for name in ("image_mean", "image_std"):
            if np.size(options[name]) != 1:
                raise ValueError(f"`{name}` must be one number, as there is one channel, got {options[name]}.")
        if np.ravel(options["image_std"])[0] == 0:
            raise ValueError("`image_std` must not be 0.")

    def preprocess(self, images: Any, **kwargs) -> BatchFeature:
        """One image, or a list (nested lists are flattened; a 4-dimensional array is a batch), to `pixel_values`.

        Options given here hold for this call. `return_tensors` None gives one numpy array, "pt" a tensor. Errors name
        the file, or the index of the image in the call.
        """
        self._refuse_unknown(set(kwargs))
        options = {name: getattr(self, name) for name in MMCLIPImageProcessorKwargs.__annotations__}
        if kwargs:
            given = {name: value for name, value in kwargs.items() if value is not None}
            options.update(self._standardize_kwargs(**{**options, **given}))
            self._check_options(options)
        images = self._flatten(images)
        if not images:
            raise ValueError("expected at least one image, got an empty list.")
        target = (options["size"].height, options["size"].width)

        pictures = []
        for index, image in enumerate(images):
            picture = _read(image, f"image {index}" if len(images) > 1 else "")
            if options["do_resize"]:
                picture = _fit(picture, target, options["do_pad"], options["resample"])
            elif pictures and picture.size != pictures[0].size:
                raise ValueError(
                    f"image {index}: expected {pictures[0].size} (width, height) as image 0, got {picture.size}. "
                    "Images of several sizes need `do_resize=True`."
                )
            pictures.append(picture)

        scale = options["rescale_factor"] if options["do_rescale"] else 1.0
        shift = 0.0
        if options["do_normalize"]:
            mean, std = float(np.ravel(options["image_mean"])[0]), float(np.ravel(options["image_std"])[0])
            scale, shift = scale / std, mean / std
        # bytes are stacked as bytes: rescaling and normalising is one step over the batch
        stacked = np.stack([np.asarray(picture) for picture in pictures])  # (B, height, width)
        pixel_values = np.multiply(stacked, np.float32(scale), dtype=np.float32)
        pixel_values -= np.float32(shift)
        return BatchFeature({"pixel_values": pixel_values[:, None]}, tensor_type=options["return_tensors"])

    def _flatten(self, images: Any) -> list[Any]:
        if isinstance(images, (list, tuple)):
            return [image for nested in images for image in self._flatten(nested)]
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            return list(images)
        return [images]

    def resize_heatmap(self, attention: Any, original_size: tuple[int, int]) -> np.ndarray:
        """Lays a map over the patches back on the image it came from: (height, width) float32.

        `attention` is (N,), row by row over a square grid, or (rows, columns), array or tensor; `original_size` is
        (height, width) of the image before processing. The padding is cut off and the rest is interpolated linearly,
        so values stay within their range; they are not rescaled.
        """
        if isinstance(attention, torch.Tensor):
            attention = attention.detach().cpu().float().numpy()
        grid = np.asarray(attention, dtype=np.float32)
        if grid.ndim == 1:
            side = math.isqrt(len(grid))
            if side * side != len(grid):
                raise ValueError(f"expected a square number of patches, or a (rows, columns) map, got {len(grid)}.")
            grid = grid.reshape(side, side)
        if grid.ndim != 2 or grid.size == 0:
            raise ValueError(f"expected attention of shape (N,) or (rows, columns), got {grid.shape}.")
        height, width = original_size
        box = (0.0, 0.0, float(grid.shape[1]), float(grid.shape[0]))
        if self.do_resize and self.do_pad:
            target = (self.size["height"], self.size["width"])  # a dict when a user has set it
            top, left, new_height, new_width = _fitted_box((height, width), target)
            rows, columns = grid.shape[0] / target[0], grid.shape[1] / target[1]  # grid cells per pixel of `size`
            box = (left * columns, top * rows, (left + new_width) * columns, (top + new_height) * rows)
        resized = Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR, box=box)
        return np.array(resized)


def _fitted_box(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where an image of `original` (height, width) lies in `target`: top, left, height, width in pixels."""
    factor = min(target[0] / original[0], target[1] / original[1])
    height = min(max(round(original[0] * factor), 1), target[0])
    width = min(max(round(original[1] * factor), 1), target[1])
    return (target[0] - height) // 2, (target[1] - width) // 2, height, width


def _fit(picture: Image.Image, target: tuple[int, int], do_pad: bool, resample: int) -> Image.Image:
    """`picture` at `target` (height, width): fitted and centred on black, or stretched without `do_pad`."""
    if (picture.height, picture.width) == target:
        return picture
    top, left, height, width = (0, 0, *target)
    if do_pad:
        top, left, height, width = _fitted_box((picture.height, picture.width), target)
    if (picture.height, picture.width) != (height, width):
        picture = picture.resize((width, height), resample, reducing_gap=3.0)
    if picture.mode == "F":  # bicubic overshoots at edges; mode "L" is clipped by PIL
        picture = Image.fromarray(np.clip(np.asarray(picture), 0, 255))
    if (height, width) == target:
        return picture
    canvas = Image.new(picture.mode, (target[1], target[0]), 0)
    canvas.paste(picture, (left, top))
    return canvas


MMCLIPImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["MMCLIPImageProcessor", "load_grayscale"]

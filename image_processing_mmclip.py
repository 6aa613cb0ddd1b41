"""Any chest X-ray -> `pixel_values`: one channel, padded to a square so that no part of the chest is lost, normalised.

`load_grayscale` is the one place where a picture is read; training, inference and heat maps all go through it.
`load_shrunk` is the same for smaller copies. Nothing here needs torchvision, and only DICOM needs pydicom.
"""

import io
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np
import torch
from PIL import Image, ImageChops, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling


# what a saved configuration adds beside the options below
BOOKKEEPING_KEYS = {"auto_map", "image_processor_type", "processor_class"}
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as PIL's conversion to mode "L"
# A file that announces more pixels is refused before it is decoded: two small bytes in a header can ask for gigabytes.
# The largest films are digitised at about 7000 x 8600. Set it on this module to read larger ones.
MAX_PIXELS = 2**26
# The smaller, the faster and softer; at 1.4 a film 2544 wide is decoded at 1/8 for 224 pixels. See `load_shrunk`.
JPEG_MARGIN = 1.4
Shrink = Callable[[tuple[int, int]], tuple[int, int]]
HEAD_SIZE = 1024  # bytes that tell what a file is
# No others of Pillow's: EPS is a program, and among the rare ones are decoders in Python that small files keep busy.
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
_MODULE = __name__.rpartition(".")[2]
ORIENTATION_TAG = 0x0112
UPRIGHT_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DICOM_PACKAGES = "'pydicom>=3' pylibjpeg pylibjpeg-openjpeg pyjpegls imagecodecs"  # permissive licences only
DEFLATED, RLE, BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.2"
BASELINE_JPEG, EXTENDED_JPEG = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
# not gdcm: one wrong byte in a file can make it end the whole process
DECODER_PLUGINS = ("pydicom", "pyjpegls", "pylibjpeg", "pillow")
MAX_PIXEL_ASPECT = 10.0


def load_grayscale(image: Any, where: str = "") -> Image.Image:
    """Reads one picture as PIL mode "L" (8 bit, 0 black): path, encoded bytes, PIL image, array, tensor or DICOM.

    - Files and encoded bytes of `IMAGE_FORMATS`: first frame or page, turned upright by its EXIF tag. The content
      decides, not the name. A dict with `bytes` or `path`, as `datasets.Image(decode=False)` yields, is read too. No
      more than `MAX_PIXELS` pixels.
    - DICOM: path, bytes or `pydicom.Dataset` of one frame. Stored values go through the modality LUT (or rescale
      slope and intercept), then the first item of the VOI LUT sequence, else the first window; MONOCHROME1 is then
      inverted. (PresentationLUTShape is left aside: in an image it only repeats this.) The full range that a window
      or VOI LUT can give becomes 0 to 255; without either, 8-bit stored values stay, and others are stretched over
      the range in use. Padding (PixelPaddingValue) is black and counts for no range. Pixels that are not square are
      resampled to squares, along the side where they are longer. Colours follow the rules below.
    - PIL images of any mode. Transparent pixels lie over black. Colours become luma (ITU-R 601).
    - Arrays and tensors: (height, width), (height, width, channels) or (channels, height, width) with 1 (grey),
      2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels. Where both ends could be channels, tensors are channels-first and
      arrays channels-last.
    - Grey levels: booleans are 0 and 255; 8-bit values stay. Deeper integers (16-bit PNG, modes "I;16", "I") stay if
      all lie in [0, 255]; otherwise the range actually used is stretched, minimum to 0 and maximum to 255. Floats in
      [0, 1] are times 255, floats in [0, 255] stay, other ranges are stretched. A constant image outside becomes black.

    `where` names the picture in error messages (a path names itself). Raises `ValueError` for a missing or unreadable
    file, zero area, too many pixels, NaN or infinity, and shapes or types that are no picture; `ImportError` for
    DICOM without pydicom.
    """
    return _to_eight_bit(load_unrounded(image, where))


def load_unrounded(image: Any, where: str = "") -> Image.Image:
    """`load_grayscale` before it rounds: mode "L", or mode "F" within [0, 255] for sources deeper than 8 bit."""
    return _read(image, where)[0]


def load_shrunk(
    image: Any, shorter_side: int | None = None, where: str = "", *, longer_side: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """`load_grayscale` with one side at the given number of pixels: mode "L", and (width, height) before.

    The aspect ratio is kept and nothing is enlarged. (width, height) is that of the picture upright and with square
    pixels. JPEG files are decoded at 1/2, 1/4 or 1/8 where that leaves `JPEG_MARGIN` times the pixels wanted: two to
    eight times as fast, and half a grey level from shrinking the whole picture (mean absolute difference). Values are
    rounded to 8 bit at the end only.
    """
    if (shorter_side is None) == (longer_side is None):
        raise ValueError(f"expected one of `shorter_side` and `longer_side`, got {shorter_side} and {longer_side}.")
    side, measure = (longer_side, max) if shorter_side is None else (shorter_side, min)
    if isinstance(side, bool) or not isinstance(side, (int, np.integer)) or side < 1:
        name = "longer_side" if shorter_side is None else "shorter_side"
        raise ValueError(f"`{name}` must be a positive number of pixels, got {side!r}.")

    def shrink(size: tuple[int, int]) -> tuple[int, int]:
        factor = min(side / measure(size), 1.0)
        return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)

    picture, size = _read(image, where, shrink)
    return _to_eight_bit(_resize(picture, shrink(picture.size), Image.Resampling.BICUBIC)), size


def _to_eight_bit(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        return Image.fromarray(np.rint(np.asarray(picture)).astype(np.uint8))
    return picture


def _resize(picture: Image.Image, size: tuple[int, int], resample: int, box: tuple | None = None) -> Image.Image:
    """`picture` (mode "L" or "F"), or its part in `box`, at `size` (width, height), within [0, 255]."""
    if picture.size == size:
        return picture
    picture = picture.resize(size, resample, box=box, reducing_gap=3.0)
    if picture.mode == "F":  # bicubic overshoots at edges; mode "L" is clipped by PIL
        picture = Image.fromarray(np.clip(np.asarray(picture), 0, 255))
    return picture


def _read(image: Any, where: str = "", shrink: Shrink | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, and (width, height) of the original: `load_grayscale` without its rounding.

    Mode "L", or mode "F" within [0, 255] for sources deeper than 8 bit. With `shrink` (size -> size wanted), files that
    are cheap to decode small come at that size; others come whole.
    """
    try:
        if isinstance(image, dict):
            if image.get("bytes") is None and image.get("path") is None:
                raise ValueError(f"expected a dict with `bytes` or `path`, got the keys {sorted(map(str, image))}.")
            where = where or str(image.get("path") or "")
            image = image["bytes"] if image.get("bytes") is not None else image["path"]
        if isinstance(image, (str, os.PathLike)):
            where = f"{where}: {image}" if where and str(image) not in where else str(image)
            with _open_file(Path(image)) as file:
                return _decode(file, shrink)
        if isinstance(image, (bytes, bytearray, memoryview)):
            return _decode(io.BytesIO(image), shrink)
        if isinstance(image, Image.Image):
            picture = _gray_from_pil(image)
        elif isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            array = (image.float() if image.is_floating_point() else image).numpy()
            picture = _gray_from_array(array, channels_first=True)
        elif isinstance(image, np.ndarray):
            picture = _gray_from_array(image, channels_first=False)
        elif _is_dicom_dataset(image):
            picture = _gray_from_dicom(image)
        else:
            raise ValueError(
                "expected a path, bytes, PIL image, numpy array, torch tensor or pydicom Dataset, "
                f"got {type(image).__name__}."
            )
    except (ValueError, ImportError) as error:
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(f"{where}: {error}" if where else str(error)) from error.__cause__
    return picture, picture.size


class _Refused(ValueError):
    """What this file found wrong itself, so that the message already says what to do."""


def _one_line(text: Any, length: int = 200) -> str:
    """What a damaged file brings into a message, for a log or a table."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text)[:2000])
    return " ".join(line.split())[:length]


@contextmanager
def _explained(expected: str) -> Iterator[None]:
    """Damaged files make decoders raise nearly anything: here it becomes a `ValueError`."""
    try:
        yield
    except (_Refused, ImportError):
        raise
    except Exception as error:
        told = _one_line(error).rstrip(".") or type(error).__name__
        raise _Refused(f"expected {expected}, but {told}. Replace the file, or convert it to PNG.") from error


def _open_file(path: Path) -> BinaryIO:
    try:
        if path.is_file():
            return path.open("rb")
    except OSError as error:
        raise ValueError(f"expected a file that can be opened, but {error.strerror}.") from error
    raise ValueError("there is no such image file; check the path (URLs must be downloaded first).")


def _decode(file: BinaryIO, shrink: Shrink | None) -> tuple[Image.Image, tuple[int, int]]:
    """Decodes the whole file, so that a truncated one is found here and the file may be closed. Returns as `_read`."""
    with _explained("a file that can be read"):
        head = file.read(HEAD_SIZE)
        file.seek(0)
    if _looks_like_dicom(head):
        picture = _gray_from_dicom(_parse_dicom(file, head))
        return picture, picture.size
    with _explained(f"an image file that Pillow {Image.__version__} can decode"):
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            raise _Refused(
                f"expected at most {MAX_PIXELS} pixels, but {error} If the size is true, shrink the file, or raise "
                f"PIL.Image.MAX_IMAGE_PIXELS and MAX_PIXELS of the module {_MODULE}."
            ) from error
        except UnidentifiedImageError as error:
            raise _Refused(f"expected an image file, but {_content(head)}. Replace the file.") from error
        with image:
            _check_area(*image.size)
            small = _decode_small(image, shrink) if shrink else None
            if small is not None:
                return small
            picture = _gray_from_pil(image)
    return picture, picture.size


def _decode_small(image: Image.Image, shrink: Shrink) -> tuple[Image.Image, tuple[int, int]] | None:
    """A grey or colour JPEG at the size wanted, and its own size; None for what must be decoded whole."""
    size = image.size
    target = shrink(size)
    wanted = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and target != size
    if not wanted or image.getexif().get(ORIENTATION_TAG, 1) in UPRIGHT_TURNS:
        return None
    drafted = image.draft("L", tuple(math.ceil(JPEG_MARGIN * side) for side in target))
    image.load()
    return _resize(image, target, Image.Resampling.BICUBIC, box=drafted[1] if drafted else None), size


def _content(head: bytes) -> str:
    """What a file that is no image is, from its first bytes and without quoting them."""
    if not head:
        return "the file is empty"
    if not head.strip(b"\0"):
        return "the file begins with zero bytes only"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "the file is a web page or XML (a download that failed?)"
    for name in IMAGE_FORMATS:
        if name in Image.OPEN and Image.OPEN[name][1](head[:16]):
            return f"the header of this {name} file is damaged"
    return f"the file is none of {', '.join(IMAGE_FORMATS)} and DICOM"


def _check_area(width: int, height: int) -> None:
    if width <= 0 or height <= 0:
        raise _Refused(f"expected an image with some area, got {width} x {height} pixels.")
    if width * height > MAX_PIXELS:
        raise _Refused(
            f"expected at most {MAX_PIXELS} pixels, got {width} x {height}. If the size is true, shrink the file or "
            f"set MAX_PIXELS of the module {_MODULE}."
        )


def _gray_from_pil(image: Image.Image) -> Image.Image:
    if image.width == 0 or image.height == 0:
        raise _Refused(f"expected an image with some area, got {image.width} x {image.height} pixels.")
    if image.mode == "L" and image.format is None and "transparency" not in image.info:
        return image  # the way of training: already grey, already in memory
    with _explained("a complete image"):
        image.load()  # PIL decodes lazily, and some formats turn the image while they do
        orientation = image.getexif().get(ORIENTATION_TAG, 1) if image.format is not None else 1
        deep = np.asarray(image) if image.mode in ("I", "F") or image.mode.startswith("I;") else None
        gray = _luma(image) if deep is None else None
    if deep is not None:
        gray = _gray_from_array(deep, channels_first=False)
    return gray.transpose(UPRIGHT_TURNS[orientation]) if orientation in UPRIGHT_TURNS else gray


def _luma(image: Image.Image) -> Image.Image:
    """Mode "L" of an image of 8 bit or less per channel, over black."""
    if image.mode == "L" and not image.has_transparency_data:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode == "LAB":
        image = image.getchannel("L")
    elif image.mode not in ("1", "L", "LA", "RGB", "YCbCr"):
        image = image.convert("RGBA" if alpha is not None else "RGB").convert("RGB")
    image = image.convert("L")
    if alpha is not None and alpha.getextrema() != (255, 255):
        image = ImageChops.multiply(image, alpha)
    return image


def _gray_from_array(array: np.ndarray, channels_first: bool) -> Image.Image:
    shape = array.shape
    if array.ndim == 3:
        candidates = [axis for axis in ((0, 2) if channels_first else (2, 0)) if 1 <= shape[axis] <= 4]
        if not candidates:
            raise _Refused(
                f"expected (height, width), or 1 to 4 channels first or last, got shape {shape}. "
                "A stack of grey images must be a list, or (batch, 1, height, width)."
            )
        array = np.moveaxis(array, candidates[0], -1)
    elif array.ndim == 2:
        array = array[..., None]
    else:
        raise _Refused(f"expected an image of 2 or 3 dimensions, got shape {shape}.")
    if array.size == 0:
        raise _Refused(f"expected an image with some area, got shape {shape}.")
    if array.dtype.kind not in "buif":
        raise _Refused(f"expected boolean, integer or real pixels, got the type {array.dtype}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise _Refused(f"expected finite pixels, got {count} NaN or infinite of {array.size}.")

    if array.dtype == np.uint8 and array.shape[-1] == 1:
        return Image.fromarray(np.ascontiguousarray(array[..., 0]))
    num_colors = 1 if array.shape[-1] <= 2 else 3
    gray = _to_byte_range(array[..., :num_colors])
    gray = gray[..., 0] if num_colors == 1 else gray @ GRAY_WEIGHTS
    if array.shape[-1] in (2, 4):
        gray = gray * _alpha_fraction(array[..., -1])
    if array.dtype == np.uint8:
        return Image.fromarray(np.rint(gray).astype(np.uint8))
    return Image.fromarray(np.clip(gray, 0, 255, out=gray))


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
    return _stretched(array, low, high)


def _stretched(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32: `low` becomes 0 and `high` 255; all 0 where they are equal."""
    if array.dtype.kind in "ui" and array.dtype.itemsize <= 2:  # (value - low) * 255 has less than 24 bits: exact
        gray = array.astype(np.float32)
        gray -= np.float32(low)
        gray *= np.float32(255)
        gray /= np.float32(max(high - low, 1))
        return gray
    # halves, so that the range of a float64 array cannot overflow
    span = high / 2 - low / 2
    return ((array.astype(np.float64) / 2 - low / 2) * (255 / span if span > 0 else 0.0)).astype(np.float32)


def _alpha_fraction(alpha: np.ndarray) -> np.ndarray:
    """Opacity in [0, 1]: integers by the range of their type, floats as they are."""
    if alpha.dtype.kind in "ui":
        return alpha.astype(np.float32) / np.iinfo(alpha.dtype).max
    if alpha.min() < 0 or alpha.max() > 1:
        raise _Refused(f"expected alpha in [0, 1], got {alpha.min():g} to {alpha.max():g}.")
    return alpha.astype(np.float32)


# --------------------------------------------------------------------------------------------------------------- DICOM


def _looks_like_dicom(head: bytes) -> bool:
    """The magic word behind the preamble; or, without a preamble, a first element such as DICOM files begin with."""
    if head[128:132] == b"DICM":
        return True
    for order in ("little", "big"):
        group, element = (int.from_bytes(head[at : at + 2], order) for at in (0, 2))
        if group in (0x0002, 0x0008) and element < 0x0100 and head[4:6] in (b"UL", b"CS", b"UI", b"OB", b"DA", b"SH"):
            return True
    # without a type: group length, character set, image type, class or instance, of a plausible length
    element, length = int.from_bytes(head[2:4], "little"), int.from_bytes(head[4:8], "little")
    known = head[:2] == b"\x08\x00" and element in (0x0000, 0x0001, 0x0005, 0x0008, 0x0016, 0x0018)
    return known and length in range(2, 256, 2)


def _is_dicom_dataset(image: Any) -> bool:
    pydicom = sys.modules.get("pydicom")  # whoever holds a Dataset has imported it
    return pydicom is not None and isinstance(image, pydicom.Dataset)


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels  # since version 3

        return pydicom
    except ImportError as error:
        raise ImportError(f"this is DICOM, which needs pydicom 3: pip install {DICOM_PACKAGES}") from error


def _parse_dicom(file: BinaryIO, head: bytes) -> Any:
    """The `pydicom.Dataset` of an opened file."""
    pydicom = _pydicom()
    with _explained("a whole DICOM file"):
        if DEFLATED.encode() in head:
            _check_inflated(file, 144 + int.from_bytes(head[140:144], "little"))
        dataset = pydicom.dcmread(file, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:  # no header: the encoding is what pydicom found
            implicit, little = dataset.original_encoding
            syntax = "ImplicitVRLittleEndian" if implicit else f"ExplicitVR{'Little' if little else 'Big'}Endian"
            dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    return dataset


def _check_inflated(file: BinaryIO, start: int) -> None:
    """Pydicom inflates deflated DICOM at once, and 1 MB can become 1 GB: refuses more than the largest image needs."""
    limit, inflated = 4 * MAX_PIXELS, 0
    file.seek(start)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    while not stream.eof and (chunk := stream.unconsumed_tail or file.read(2**16)):
        inflated += len(stream.decompress(chunk, 2**20))
        if inflated > limit:
            raise _Refused(f"expected a DICOM image, but its content inflates to more than {limit} bytes.")
    file.seek(0)


def _gray_from_dicom(dataset: Any) -> Image.Image:
    """Modality LUT, VOI LUT or window, inversion, [0, 255], square pixels, in this order; see `load_grayscale`."""
    with _explained("a DICOM image"):
        pixels = _dicom_pixels(dataset)
        if pixels.ndim == 3:
            return _with_square_pixels(_gray_from_array(pixels, channels_first=False), dataset)
        padding = _padding(pixels, dataset)
        levels = _presented(pixels, padding, dataset)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            levels = 255 - levels
        if padding is not None:
            levels = np.where(padding, levels.dtype.type(0), levels)
        return _with_square_pixels(Image.fromarray(levels), dataset)


def _dicom_pixels(dataset: Any) -> np.ndarray:
    """The stored values (height, width), or colours as RGB (height, width, 3)."""
    from_pydicom = _pydicom().pixels
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = _one_line(getattr(dataset.get("SOPClassUID"), "name", "") or "unknown kind", 64)
        raise _Refused(f"expected a DICOM image, got an object without pixel data ({kind}). Leave it out.")
    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    missing = [name for name in _needed_elements(dataset) if dataset.get(name) is None]
    if missing or syntax is None:
        name = missing[0] if missing else "TransferSyntaxUID in its file_meta"
        raise _Refused(f"expected a DICOM image, but it has no {name}. Add it, or replace the file.")
    size = (int(dataset.Columns), int(dataset.Rows))
    _check_area(*size)
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    if num_frames > 1:
        raise _Refused(
            f"expected a DICOM image of one frame, got {num_frames}. Choose one, `pixel_array[index]`, "
            "and pass it as an array or save it as a file of its own."
        )
    if syntax in LOSSLESS_JPEG or syntax == EXTENDED_JPEG and dataset.BitsStored > 8:
        pixels = _deep_jpeg_pixels(dataset, _checked_frame(dataset, size))
    elif syntax.is_encapsulated:
        plugin = _decoder_plugin(syntax)
        if syntax != RLE:  # which has no header of its own
            _checked_frame(dataset, size)
        pixels = from_pydicom.pixel_array(dataset, decoding_plugin=plugin)
    else:
        high, stored = dataset.get("HighBit"), dataset.get("BitsStored")
        if "PixelData" in dataset and high is not None and high != stored - 1:
            raise _Refused(f"expected HighBit {stored - 1} for BitsStored {stored}, got {high}. Convert the file.")
        pixels = from_pydicom.pixel_array(dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = from_pydicom.apply_color_lut(pixels, dataset)
    return pixels != 0 if dataset.BitsAllocated == 1 else pixels


def _needed_elements(dataset: Any) -> list[str]:
    names = ["Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"]
    return [*names, "BitsStored", "PixelRepresentation"] if "PixelData" in dataset else names


def _decoder_plugin(syntax: Any) -> str:
    """The decoder of pydicom for compressed pixels. Only one is tried: where it refuses, no other shall guess."""
    try:
        available = _pydicom().pixels.get_decoder(syntax).available_plugins
    except NotImplementedError as error:
        raise _Refused(f"expected a DICOM image, got the transfer syntax {syntax.name}. Convert it to PNG.") from error
    if syntax in (BASELINE_JPEG, EXTENDED_JPEG):  # pylibjpeg may bring a second decoder for these
        return "pillow"
    for name in DECODER_PLUGINS:
        if name in available:
            return name
    raise _no_decoder(syntax)


def _no_decoder(syntax: Any) -> ValueError:
    return _Refused(
        f"expected a decoder for the DICOM transfer syntax {syntax.name}, but none is installed: "
        f"pip install {DICOM_PACKAGES}"
    )


def _deep_jpeg_pixels(dataset: Any, frame: bytes) -> np.ndarray:
    """Stored values of lossless and of 12-bit JPEG, for which pydicom has no decoder that is free and safe."""
    try:
        from imagecodecs import jpeg8_decode
    except ImportError as error:
        raise _no_decoder(dataset.file_meta.TransferSyntaxUID) from error
    if dataset.PhotometricInterpretation.startswith("YBR"):
        raise _Refused("expected grey or RGB pixels in lossless or 12-bit JPEG, got YBR. Convert the file to PNG.")
    pixels, bits = jpeg8_decode(frame), int(dataset.BitsStored)
    if dataset.PixelRepresentation == 1:  # two's complement of as many bits as are stored
        sign = 1 << (bits - 1)
        return (((pixels.astype(np.int32) & (2 * sign - 1)) ^ sign) - sign).astype(np.int16)
    return pixels & ((1 << bits) - 1)


def _checked_frame(dataset: Any, size: tuple[int, int]) -> bytes:
    """The compressed pixels. Refuses what differs from the DICOM header: decoders trust either, some to the death."""
    frame = _pydicom().encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    expected = (*size, int(dataset.SamplesPerPixel))
    headers = list(_frame_headers(frame))
    if not headers:
        raise _Refused(
            "expected compressed pixels that begin with a JPEG or JPEG 2000 header (not that of a JP2 file), got none. "
            "Convert the file."
        )
    for width, height, samples, bits in headers:
        if (width, height, samples) != expected or bits > dataset.BitsAllocated:
            raise _Refused(
                "expected compressed pixels of {} x {} with {} samples".format(*expected)
                + f" of up to {dataset.BitsAllocated} bits, got {width} x {height} with {samples} of {bits} bits. "
                "Replace the file."
            )
    if frame[:2] == b"\xff\xd8" and b"\xff\xd9" not in frame[-16:]:  # decoders would fill up with grey
        raise _Refused("expected complete compressed pixels, but they are truncated. Replace the file.")
    return frame


def _frame_headers(frame: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(width, height, samples, bits per sample) of each header in the JPEG, JPEG-LS or JPEG 2000 stream of an image."""

    def number(at: int, length: int) -> int:
        return int.from_bytes(frame[at : at + length], "big")

    if frame[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000; wrapped in a JP2 file, openjpeg can read on for ever
        right, bottom, left, top = (number(at, 4) for at in (8, 12, 16, 20))
        yield right - left, bottom - top, number(40, 2), (frame[42] & 0x7F) + 1
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 22 <= len(frame):  # JPEG: markers with lengths
        marker = frame[at + 1]
        if marker == 0xE8 and frame[at + 4 : at + 10] == b"SPIFF\0":
            yield number(at + 18, 4), number(at + 14, 4), frame[at + 13], frame[at + 23]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            yield number(at + 7, 2), number(at + 5, 2), frame[at + 9], frame[at + 4]
        elif marker == 0xDA:  # the pixels
            return
        at += 1 if marker == 0xFF else 2 + number(at + 2, 2)


def _padding(pixels: np.ndarray, dataset: Any) -> np.ndarray | None:
    """True where a pixel only fills the rectangle, (height, width); None where there is no such pixel."""
    first = _first_number(dataset, "PixelPaddingValue")
    if first is None or pixels.dtype.kind not in "ui":
        return None
    last = _first_number(dataset, "PixelPaddingRangeLimit")
    ends = np.array([first, first if last is None else last]).astype(np.int64)
    low, high = sorted(ends.astype(pixels.dtype))  # wraps round: some write -2000 as 63536
    padding = (pixels >= low) & (pixels <= high)
    return padding if padding.any() else None


def _presented(pixels: np.ndarray, padding: np.ndarray | None, dataset: Any) -> np.ndarray:
    """Stored values (height, width) -> levels in [0, 255] before inversion, uint8 or float32. No care for padding."""
    modality, voi = _modality(dataset), _voi(dataset)
    if modality is None and voi is None:
        if pixels.dtype == np.bool_:
            return pixels.astype(np.uint8) * np.uint8(255)
        if pixels.dtype == np.uint8 and dataset.BitsStored == 8:
            return pixels
    # each possible value once, instead of each pixel
    few = pixels.dtype.kind in "ui" and pixels.dtype.itemsize <= 2 and (modality is not None or voi is not None)
    low = int(pixels.min()) if few else 0
    values = np.arange(low, int(pixels.max()) + 1, dtype=np.float64) if few else pixels
    if modality is not None:
        values = modality(values.astype(np.float64))
    if not np.isfinite(values).all():
        raise _Refused("expected finite pixels, got NaN or infinity. Replace the file, or correct its RescaleSlope.")
    if voi is not None:
        values = (voi(values.astype(np.float64)) * 255).astype(np.float32)
    if few:
        values = values[pixels.astype(np.int32) - low]
    if voi is not None:
        return values
    used = values if padding is None else values[~padding]
    return _stretched(values, float(used.min()), float(used.max())) if used.size else np.zeros(values.shape, np.uint8)


def _modality(dataset: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """Stored values -> values of the modality; None where they are the same."""
    table = _table(dataset, "ModalityLUTSequence")
    if table is not None:
        return table[0]
    slope, intercept = (_first_number(dataset, name) for name in ("RescaleSlope", "RescaleIntercept"))
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    if slope == 0:
        raise _Refused("expected a RescaleSlope other than 0 in the DICOM file. Correct or delete it.")
    return None if (slope, intercept) == (1, 0) else lambda values: values * slope + intercept


def _voi(dataset: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """Values of the modality -> fractions of white in [0, 1], by VOI LUT or else window; None without either."""
    table = _table(dataset, "VOILUTSequence")
    if table is not None:
        apply, low, high = table
        return lambda values: (apply(values) - low) / max(high - low, 1)
    center, width = (_first_number(dataset, name) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise _Refused(f"expected the VOILUTFunction LINEAR, LINEAR_EXACT or SIGMOID, got {_one_line(function, 20)}.")
    if width < 1 if function == "LINEAR" else width <= 0:
        raise _Refused(f"expected a WindowWidth of 1 or more, got {width:g}. Correct or delete the DICOM window.")
    if function == "SIGMOID":
        return lambda values: 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":  # by the standard it reaches from one pixel value to another, both included
        center, width = center - 0.5, width - 1
    if width == 0:
        return lambda values: values > center
    return lambda values: np.clip((values - center) / width + 0.5, 0, 1)


def _first_number(dataset: Any, name: str) -> float | None:
    value = dataset.get(name)
    if value is None or np.size(value) == 0 or value == "":
        return None
    number = float(np.ravel(np.asarray(value, dtype=np.float64))[0])
    if not math.isfinite(number):
        raise _Refused(f"expected a finite {name} in the DICOM file, got {number}. Correct or delete it.")
    return number


def _table(dataset: Any, name: str) -> tuple[Callable[[np.ndarray], np.ndarray], float, float] | None:
    """The first lookup table of a sequence, and its lowest and highest entry; None where there is none."""
    item = dataset[name][0] if dataset.get(name) else {}
    if item.get("LUTDescriptor") is None or item.get("LUTData") is None:
        return None
    count, first = int(item.LUTDescriptor[0]) or 2**16, int(item.LUTDescriptor[1])
    data = item.LUTData  # bytes of 16-bit words, or the words
    order = "<"
    if isinstance(data, bytes):
        order = ">" if dataset.file_meta.TransferSyntaxUID == BIG_ENDIAN else "<"
    else:
        data = (np.ravel(data).astype(np.int64) & 0xFFFF).astype("<u2").tobytes()
    if len(data) < count:
        raise _Refused(f"expected {count} entries in the {name} of the DICOM file, got {len(data)} bytes.")
    entries = np.frombuffer(data, order + "u2" if len(data) >= 2 * count else "u1", count).astype(np.float64)

    def apply(values: np.ndarray) -> np.ndarray:
        return entries[np.clip(np.rint(values - first), 0, count - 1).astype(np.int64)]

    return apply, float(entries.min()), float(entries.max())


def _with_square_pixels(picture: Image.Image, dataset: Any) -> Image.Image:
    """`picture` resampled where pixels are taller than wide or the other way, along their longer side."""
    for name in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        value = dataset.get(name)
        if value is None or np.size(value) == 0:
            continue
        tall, wide = (float(number) for number in value)  # of one pixel, vertical first
        aspect = tall / wide if tall > 0 and wide > 0 else 0.0
        if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
            raise _Refused(f"expected a {name} of pixels nearly square, got {tall:g} x {wide:g}. Correct or delete it.")
        width, height = picture.size
        size = (width, round(height * aspect)) if aspect > 1 else (round(width / aspect), height)
        _check_area(*size)
        return _resize(picture, size, Image.Resampling.BICUBIC)
    return picture


# -------------------------------------------------------------------------------------------------------- the processor


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
            picture = _read(image, f"image {index}" if len(images) > 1 else "")[0]
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

    def resize_heatmap(self, attention: Any, original_size: tuple[int, int], smooth: bool = True) -> np.ndarray:
        """Lays a map over the patches back on the image it came from: (height, width) float32.

        `attention` is (N,), row by row over a square grid, or (rows, columns), array or tensor; `original_size` is
        (height, width) of the image before processing. With `smooth` each patch is averaged with its neighbours first,
        weighted 1, 2, 1 both ways: one patch alone often holds most of the attention to a lesion that covers several,
        its border. The padding is cut off before, and the rest is interpolated linearly, so values stay within their
        range; they are not rescaled.
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
        if self.do_resize and grid.shape[0] * self.size["width"] != grid.shape[1] * self.size["height"]:
            raise ValueError(
                f"expected square patches of {self.size['height']} x {self.size['width']} pixels, but a map of "
                f"{grid.shape[0]} x {grid.shape[1]} has none. Of a batch of maps, (B, N), give one: `attention[0]`."
            )
        height, width = original_size
        box = (0.0, 0.0, float(grid.shape[1]), float(grid.shape[0]))
        if self.do_resize and self.do_pad:
            target = (self.size["height"], self.size["width"])  # a dict when a user has set it
            top, left, new_height, new_width = _fitted_box((height, width), target)
            rows, columns = grid.shape[0] / target[0], grid.shape[1] / target[1]  # grid cells per pixel of `size`
            box = (left * columns, top * rows, (left + new_width) * columns, (top + new_height) * rows)
        # patches that lie in the padding have no part in the map
        first_column, first_row = (math.floor(start + 1e-6) for start in box[:2])
        grid = grid[first_row : math.ceil(box[3] - 1e-6), first_column : math.ceil(box[2] - 1e-6)]
        box = (box[0] - first_column, box[1] - first_row, box[2] - first_column, box[3] - first_row)
        if smooth:
            grid = _smoothed(grid)
        resized = Image.fromarray(np.ascontiguousarray(grid))
        return np.array(resized.resize((width, height), Image.Resampling.BILINEAR, box=box))


def _smoothed(grid: np.ndarray) -> np.ndarray:
    """(rows, columns), each value averaged with its neighbours, 1, 2, 1 both ways, and at the border with itself."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (1, 1)
        padded = np.moveaxis(np.pad(grid, padding, mode="edge"), axis, 0)
        grid = np.moveaxis((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4, 0, axis)
    return grid


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
    picture = _resize(picture, (width, height), resample)
    if (height, width) == target:
        return picture
    canvas = Image.new(picture.mode, (target[1], target[0]), 0)
    canvas.paste(picture, (left, top))
    return canvas


MMCLIPImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["MMCLIPImageProcessor", "load_grayscale"]

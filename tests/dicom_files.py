"""DICOM files made from an array, in every transfer syntax that `load_grayscale` reads."""

import io

import numpy as np
import pydicom
from imagecodecs import jpeg8_encode
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate


LOSSLESS_SYNTAXES = {
    "implicit": uid.ImplicitVRLittleEndian,
    "explicit": uid.ExplicitVRLittleEndian,
    "big endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "RLE": uid.RLELossless,
    "JPEG lossless": uid.JPEGLossless,
    "JPEG lossless SV1": uid.JPEGLosslessSV1,
    "JPEG-LS": uid.JPEGLSLossless,
    "JPEG 2000 lossless": uid.JPEG2000Lossless,
}
LOSSY_SYNTAXES = {
    "JPEG baseline": uid.JPEGBaseline8Bit,
    "JPEG extended": uid.JPEGExtended12Bit,
    "JPEG-LS near": uid.JPEGLSNearLossless,
    "JPEG 2000": uid.JPEG2000,
}


def make_dicom(pixels, syntax=uid.ExplicitVRLittleEndian, bits=None, **elements) -> pydicom.Dataset:
    """A radiograph of `pixels`, (height, width[, 3]), with `bits` stored; an element that is None is left out."""
    bits = bits or 8 * pixels.dtype.itemsize
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    dataset.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * pixels.dtype.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if syntax in (uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless):
        dataset.compress(syntax, pixels, generate_instance_uid=False)
    elif syntax == uid.JPEGLSNearLossless:
        dataset.compress(syntax, pixels, jls_error=2, generate_instance_uid=False)
    elif syntax == uid.JPEG2000:
        dataset.compress(syntax, pixels, j2k_psnr=[70], generate_instance_uid=False)
    elif syntax == uid.JPEGBaseline8Bit:
        dataset.PixelData = encapsulate([jpeg(pixels)])
    elif syntax == uid.JPEGExtended12Bit:
        dataset.PixelData = encapsulate([jpeg8_encode(pixels, level=95, bitspersample=bits)])
    elif syntax.is_encapsulated:  # lossless JPEG keeps the two's complement of a signed value
        stored = pixels.view(f"u{pixels.dtype.itemsize}") & ((1 << bits) - 1)
        dataset.PixelData = encapsulate([jpeg8_encode(stored, lossless=True, bitspersample=bits)])
    else:
        order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        dataset.PixelData += b"\0" * (len(dataset.PixelData) % 2)
    if syntax.is_encapsulated or pixels.dtype.itemsize == 1:
        dataset["PixelData"].VR = "OB"
    for name, value in elements.items():
        if value is not None:
            setattr(dataset, name, value)
        elif name in dataset:
            delattr(dataset, name)
    return dataset


def jpeg(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def file_bytes(dataset: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def bare_bytes(dataset: pydicom.Dataset, little_endian: bool = True, implicit_vr: bool = True) -> bytes:
    """The file without preamble and header, as old archives keep it."""
    buffer = io.BytesIO()
    meta, dataset.file_meta = dataset.file_meta, pydicom.dataset.FileMetaDataset()
    dataset.save_as(buffer, implicit_vr=implicit_vr, little_endian=little_endian)
    dataset.file_meta = meta
    return buffer.getvalue()


def table(first: int, entries, bits: int, packed: bool = False) -> pydicom.Sequence:
    """A LUT sequence of one item; 8-bit entries `packed` as bytes, else one word each."""
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    if packed:
        item.add_new("LUTData", "OW", np.asarray(entries, np.uint8).tobytes())
    else:
        item.add_new("LUTData", "US", [int(entry) for entry in entries])
    return pydicom.Sequence([item])

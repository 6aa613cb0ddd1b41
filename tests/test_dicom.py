"""DICOM in `load_grayscale`: values by hand, every transfer syntax, pydicom's own files, and what must be refused."""

import ast
import copy
import io
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import LOSSLESS_SYNTAXES, LOSSY_SYNTAXES, bare_bytes, file_bytes, make_dicom, table
from MMCLIP.image_processing_mmclip import MMCLIPImageProcessor, load_grayscale, load_shrunk
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

from MMCLIP import image_processing_mmclip


BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
ORIGINALS = Path(__file__).resolve().parents[2] / "shared" / "data" / "originals"
needs_originals = pytest.mark.skipif(not ORIGINALS.is_dir(), reason="../shared/data/originals is not here")
BONE = np.add.outer(np.arange(48), np.arange(64)) * 37 % 4096  # 48 x 64, a ramp of 0 to 4070


def levels(dataset) -> list:
    """Grey levels of a Dataset, the same whether it comes as an object or as the bytes of its file."""
    before = copy.deepcopy(dataset)
    pixels = np.asarray(load_grayscale(dataset))
    assert dataset == before, "reading changed the dataset"
    assert np.array_equal(pixels, load_grayscale(file_bytes(dataset)))
    assert pixels.dtype == np.uint8 and pixels.ndim == 2
    return pixels.tolist()


def row(*values, kind="u2") -> np.ndarray:
    return np.array([values], kind)


# ------------------------------------------------------------------------------------------------------ values by hand


def test_eight_bit_values_without_a_window_stay_as_they_are():
    assert levels(make_dicom(row(3, 100, 200, 7, kind="u1"))) == [[3, 100, 200, 7]]


def test_other_values_without_a_window_are_stretched_over_the_range_in_use():
    assert levels(make_dicom(row(100, 200, 300, 500), bits=12)) == [[0, 64, 128, 255]]  # (value - 100) / 400 * 255
    assert levels(make_dicom(row(-200, -100, 0, 200, kind="i2"))) == [[0, 64, 128, 255]]
    assert levels(make_dicom(row(0, 3, 15, 12, kind="u1"), bits=4)) == [[0, 51, 255, 204]]
    assert levels(make_dicom(row(0, 1, 2, 5))) == [[0, 51, 102, 255]]  # a deep image is not black for being faint
    assert levels(make_dicom(row(9, 9))) == [[0, 0]]


def test_monochrome1_is_inverted():
    assert levels(make_dicom(row(0, 10, 255, 100, kind="u1"), PhotometricInterpretation="MONOCHROME1")) == [
        [255, 245, 0, 155]
    ]
    stretched = make_dicom(row(100, 200, 300, 500), bits=12, PhotometricInterpretation="MONOCHROME1")
    assert levels(stretched) == [[255, 191, 128, 0]]


@pytest.mark.parametrize("shape", ["IDENTITY", "INVERSE"])
def test_the_presentation_lut_shape_does_not_invert_a_second_time(shape):
    pixels = row(0, 255, kind="u1")
    assert levels(make_dicom(pixels, PresentationLUTShape=shape)) == [[0, 255]]
    inverted = make_dicom(pixels, PresentationLUTShape=shape, PhotometricInterpretation="MONOCHROME1")
    assert levels(inverted) == [[255, 0]]


def test_a_linear_window_reaches_from_its_first_value_to_its_last():
    pixels = row(0, 1000, 1200, 1999, 2000, 4095)
    # from c - 0.5 - (w - 1) / 2 = 1000 to c - 0.5 + (w - 1) / 2 = 2000
    assert levels(make_dicom(pixels, bits=12, WindowCenter=1500.5, WindowWidth=1001)) == [[0, 0, 51, 255, 255, 255]]
    assert levels(make_dicom(row(6, 7, 8), WindowCenter=7.5, WindowWidth=1)) == [[0, 0, 255]]


def test_exact_and_sigmoid_windows():
    exact = make_dicom(row(900, 1000, 1200, 2100), WindowCenter=1500, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")
    assert levels(exact) == [[0, 0, 51, 255]]
    sigmoid = make_dicom(row(0, 1000, 1500, 2000), WindowCenter=1500, WindowWidth=1000, VOILUTFunction="SIGMOID")
    # 255 / (1 + exp(-4 (x - 1500) / 1000)): exp(6), exp(2), 1, exp(-2)
    assert levels(sigmoid) == [[1, 30, 128, 225]]


def test_of_several_windows_the_first_is_used():
    one = make_dicom(row(0, 100, 200, 400), WindowCenter=100.5, WindowWidth=201)
    several = make_dicom(row(0, 100, 200, 400), WindowCenter=[100.5, 300], WindowWidth=[201, 10])
    assert levels(several) == levels(one) == [[0, 128, 255, 255]]


def test_the_rescale_comes_before_the_window_and_the_window_before_the_inversion():
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 50.5, "WindowWidth": 101}
    pixels = row(0, 50, 60, 100, 300)  # -100, 0, 20, 100, 500
    assert levels(make_dicom(pixels, **rescale)) == [[0, 0, 51, 255, 255]]
    assert levels(make_dicom(pixels, PhotometricInterpretation="MONOCHROME1", **rescale)) == [[255, 255, 204, 0, 0]]


def test_a_falling_rescale_turns_the_image_over():
    assert levels(make_dicom(row(0, 20, 100), RescaleSlope=-1, RescaleIntercept=0)) == [[255, 204, 0]]


def test_a_modality_table_is_used_instead_of_the_rescale_and_ends_in_its_last_entries():
    tables = {"ModalityLUTSequence": table(10, [100, 0, 40, 20], 16), "RescaleSlope": 9, "RescaleIntercept": 9}
    assert levels(make_dicom(row(0, 10, 11, 12, 13, 99), **tables)) == [[255, 255, 0, 102, 51, 51]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_voi_table_is_used_instead_of_the_window(packed):
    options = {"VOILUTSequence": table(10, [0, 20, 40, 100], 8, packed), "WindowCenter": 12, "WindowWidth": 1}
    assert levels(make_dicom(row(0, 10, 11, 12, 13, 99), **options)) == [[0, 0, 51, 102, 255, 255]]


def test_a_voi_table_may_have_sixteen_bits_and_begin_below_zero():
    options = {"VOILUTSequence": table(-2, [1000, 2000, 3000, 5000], 12)}
    assert levels(make_dicom(row(-9, -2, -1, 0, 1, 9, kind="i2"), **options)) == [[0, 0, 64, 128, 255, 255]]


def test_a_table_may_have_more_entries_than_a_signed_number_can_count():
    item = table(-2, np.arange(50000), 16)[0]
    assert item["LUTDescriptor"].VR == "SS"
    tables = {"VOILUTSequence": pydicom.Sequence([item])}
    assert levels(make_dicom(row(-9, -2, 9998, 32767, kind="i2"), **tables)) == [[0, 0, 51, 167]]  # of 49999


def test_a_big_endian_table_is_read_in_its_own_order():
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [3, 0, 16])
    item.add_new("LUTData", "OW", np.array([0, 300, 1000], ">u2").tobytes())
    dataset = make_dicom(row(0, 1, 2), uid.ExplicitVRBigEndian, VOILUTSequence=pydicom.Sequence([item]))
    assert levels(dataset) == [[0, 76, 255]]  # 76.5 to even


def test_padding_is_black_and_does_not_stretch_the_range():
    assert levels(make_dicom(row(-2000, 0, 40, 100, kind="i2"), PixelPaddingValue=-2000)) == [[0, 0, 102, 255]]
    # unpadded, the same values would lie between 243 and 255
    assert levels(make_dicom(row(-2000, 0, 40, 100, kind="i2"))) == [[0, 243, 248, 255]]
    assert levels(make_dicom(row(9, 9), PixelPaddingValue=9)) == [[0, 0]]


def test_padding_of_monochrome1_is_black_too():
    dataset = make_dicom(row(0, 100, 150, 300), PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0)
    assert levels(dataset) == [[0, 255, 191, 0]]
    windowed = make_dicom(row(0, 100, 300), WindowCenter=200.5, WindowWidth=201, PixelPaddingValue=0)
    windowed.PhotometricInterpretation = "MONOCHROME1"
    assert levels(windowed) == [[0, 255, 0]]


def test_padding_may_be_a_range_and_a_negative_value_written_without_its_sign():
    dataset = make_dicom(
        row(-2000, -1500, -1000, 0, 100, kind="i2"), PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1000
    )
    assert levels(dataset) == [[0, 0, 0, 0, 255]]
    unsigned = make_dicom(row(-2000, 0, 40, 100, kind="i2"))
    unsigned.add_new("PixelPaddingValue", "US", 63536)  # 65536 - 2000
    assert levels(unsigned) == [[0, 0, 102, 255]]


@pytest.mark.parametrize("name", ["explicit", "RLE", "JPEG lossless SV1"])
def test_bits_above_those_stored_are_ignored(name):
    syntax = LOSSLESS_SYNTAXES[name]
    clean = make_dicom(row(0, 1000, 2000, 4000), syntax, bits=12)
    twelve = {"BitsStored": 12, "HighBit": 11}
    overlaid = make_dicom(row(0, 1000 | 0x8000, 2000 | 0x3000, 4000), syntax, **twelve)
    assert levels(overlaid) == levels(clean) == [[0, 64, 128, 255]]
    assert levels(make_dicom(row(0xFFF, 0, 1, kind="i2"), syntax, **twelve)) == [[0, 128, 255]]  # -1, 0, 1


def test_one_bit_pixels_are_black_and_white():
    dataset = make_dicom(np.zeros((2, 8), np.uint8), bits=1)
    dataset.BitsAllocated, dataset.PixelData = 1, bytes([0b00000001, 0b11110000])
    assert levels(dataset) == [[255, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 255, 255, 255, 255]]


def test_float_pixels_are_stretched_and_must_be_finite():
    dataset = make_dicom(row(0), BitsStored=None, HighBit=None, PixelRepresentation=None, PixelData=None)
    dataset.Columns, dataset.BitsAllocated = 3, 32
    dataset.FloatPixelData = np.array([-1, 0, 1], "<f4").tobytes()
    assert levels(dataset) == [[0, 128, 255]]
    dataset.FloatPixelData = np.array([-1, np.nan, 1], "<f4").tobytes()
    with pytest.raises(ValueError, match="finite"):
        load_grayscale(dataset)


def test_colours_become_luma_from_rgb_ybr_and_palette():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert levels(make_dicom(colours)) == [[76, 150, 29, 255]]
    planes = np.moveaxis(colours, -1, 0)
    planar = make_dicom(colours, PlanarConfiguration=1, PixelData=planes.tobytes())
    assert levels(planar) == [[76, 150, 29, 255]]
    ybr = np.asarray(Image.fromarray(colours).convert("YCbCr"))
    dataset = make_dicom(ybr, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_allclose(levels(dataset), [[76, 150, 29, 255]], atol=1)

    palette = make_dicom(row(0, 1, 2, 3, kind="u1"), PhotometricInterpretation="PALETTE COLOR")
    for index, name in enumerate(("Red", "Green", "Blue")):
        palette.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [4, 0, 8])
        palette.add_new(f"{name}PaletteColorLookupTableData", "OW", colours[0, :, index].tobytes())
    assert levels(palette) == [[76, 150, 29, 255]]


@pytest.mark.parametrize(
    ("element", "size"),
    [
        ({"PixelSpacing": [0.1, 0.1]}, (6, 4)),
        ({"PixelSpacing": [0.2, 0.1]}, (6, 8)),  # rows lie twice as far apart as columns
        ({"ImagerPixelSpacing": [0.1, 0.2]}, (12, 4)),
        ({"NominalScannedPixelSpacing": [0.3, 0.1]}, (6, 12)),
        ({"PixelAspectRatio": [2, 1], "PixelSpacing": [0.1, 0.1]}, (6, 8)),
    ],
)
def test_pixels_that_are_not_square_are_resampled_to_squares(element, size):
    pixels = np.zeros((4, 6), np.uint8)
    pixels[:, 3:] = 200
    dataset = make_dicom(pixels, **element)
    picture = load_grayscale(dataset)
    assert picture.size == size
    middle = np.asarray(picture)[size[1] // 2]
    assert middle[0] == 0 and middle[-1] == 200 and abs(int((middle > 100).sum()) - size[0] // 2) <= 1
    shrunk, before = load_shrunk(dataset, 2)
    assert before == size and min(shrunk.size) == 2


def test_a_dataset_and_its_file_reach_the_model_with_all_their_bits(tmp_path):
    pixels = np.array([[0, 1], [500, 1000]], np.uint16)
    dataset = make_dicom(pixels, bits=12)
    (tmp_path / "film.png").write_bytes(file_bytes(dataset))  # the content decides, not the name
    expected = (pixels / 1000 - 0.5) / 0.25
    for image in (dataset, tmp_path / "film.png", str(tmp_path / "film.png"), file_bytes(dataset)):
        pixel_values = MMCLIPImageProcessor(size=2)(image).pixel_values
        np.testing.assert_allclose(pixel_values[0, 0], expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- transfer syntaxes

DEPTHS = {
    "8 bit": (BONE // 16, "u1", 8),
    "12 of 16 bit": (BONE, "u2", 12),
    "16 bit": (BONE * 15, "u2", 16),
    "signed 12 of 16 bit": (BONE - 2048, "i2", 12),
    "signed 16 bit": (BONE * 15 - 30000, "i2", 16),
}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", LOSSLESS_SYNTAXES)
def test_each_lossless_syntax_gives_every_stored_value_back(name, depth):
    values, kind, bits = DEPTHS[depth]
    window = {"WindowCenter": float(values.mean()), "WindowWidth": float(np.ptp(values) // 2)}
    for element in ({}, window):
        plain = np.asarray(load_grayscale(make_dicom(values.astype(kind), bits=bits, **element)))
        dataset = make_dicom(values.astype(kind), LOSSLESS_SYNTAXES[name], bits, **element)
        assert np.array_equal(levels(dataset), plain)
        assert np.ptp(plain) == 255 if element or bits > 8 else plain.tolist() == values.tolist()


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("JPEG baseline", "8 bit"),
        ("JPEG extended", "12 of 16 bit"),
        ("JPEG-LS near", "8 bit"),
        ("JPEG-LS near", "12 of 16 bit"),
        ("JPEG 2000", "8 bit"),
        ("JPEG 2000", "12 of 16 bit"),
        ("JPEG 2000", "signed 12 of 16 bit"),
    ],
)
def test_each_lossy_syntax_comes_near_the_stored_values(name, depth):
    smooth = np.add.outer(np.arange(48) ** 1.5, np.arange(64) ** 1.5)
    offset = -2048 if depth.startswith("signed") else 0
    _, kind, bits = DEPTHS[depth]
    values = (smooth / smooth.max() * (2**bits - 1) + offset).astype(kind)
    window = {"WindowCenter": 2 ** (bits - 1) + offset, "WindowWidth": 2**bits}
    plain = np.asarray(load_grayscale(make_dicom(values, bits=bits, **window)))
    read = np.asarray(levels(make_dicom(values, LOSSY_SYNTAXES[name], bits, **window)))
    difference = np.abs(read - plain.astype(int))
    assert difference.max() <= 4 and difference.mean() < 1.5


@pytest.mark.parametrize("name", [*LOSSLESS_SYNTAXES, "JPEG-LS near", "JPEG 2000"])
def test_colours_are_read_from_each_syntax(name):
    pixels = np.stack([BONE // 16, BONE // 32, 255 - BONE // 16], axis=-1).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L")).astype(int)
    read = levels(make_dicom(pixels, {**LOSSLESS_SYNTAXES, **LOSSY_SYNTAXES}[name]))
    assert np.abs(read - expected).max() <= (1 if name in LOSSLESS_SYNTAXES else 4)


@pytest.mark.parametrize(
    ("implicit_vr", "little_endian"), [(True, True), (False, True), (False, False)], ids=["implicit", "little", "big"]
)
def test_a_file_without_preamble_and_header_is_read(implicit_vr, little_endian):
    syntax = uid.ExplicitVRLittleEndian if little_endian else uid.ExplicitVRBigEndian
    dataset = make_dicom(row(0, 100, 200, 1000), syntax, SpecificCharacterSet="ISO_IR 100")
    bare = bare_bytes(dataset, little_endian, implicit_vr)
    assert np.asarray(load_grayscale(bare)).tolist() == [[0, 26, 51, 255]]


def test_a_file_that_says_one_frame_is_one_image():
    dataset = make_dicom(row(0, 9, kind="u1"), NumberOfFrames=1)
    assert levels(dataset) == [[0, 9]]
    fragmented = make_dicom((BONE // 16).astype(np.uint8), uid.JPEGBaseline8Bit)
    whole = levels(fragmented)
    frame = get_frame(fragmented.PixelData, 0, number_of_frames=1)
    fragmented.PixelData = encapsulate([frame], fragments_per_frame=3)
    assert levels(fragmented) == whole


# ------------------------------------------------------------------------------------------------ pydicom's own files


def bundled_files() -> list[Path]:
    files = [path for path in sorted(BUNDLED.rglob("*")) if path.is_file()]
    assert len(files) > 100
    return files


def is_read(path: Path) -> bool:
    try:
        load_grayscale(path)
        return True
    except ValueError:
        return False


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_file_that_comes_with_pydicom_is_read_or_refused_with_a_reason():
    num_read = 0
    for path in bundled_files():
        start = time.perf_counter()
        try:
            picture = load_grayscale(path)
            assert picture.mode == "L" and min(picture.size) > 0
            num_read += 1
        except ValueError as error:
            assert str(error).startswith(f"{path}: expected "), error
            assert str(error).endswith(".") and len(str(error)) < 500
        assert time.perf_counter() - start < 2, path
    assert num_read >= 70


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test-SR.dcm", r"without pixel data \(Comprehensive SR Storage\)"),
        ("rtplan.dcm", r"without pixel data \(RT Plan Storage\)"),
        ("waveform_ecg.dcm", r"without pixel data \(12-lead ECG Waveform Storage\)"),
        ("dicomdirtests/DICOMDIR", "without pixel data"),
        ("SC_rgb_rle_2frame.dcm", "one frame, got 2"),
        ("rtdose.dcm", "one frame, got 15"),
        ("MR_truncated.dcm", "8130 vs 8192 bytes"),
        ("meta_missing_tsyntax.dcm", "it has no Rows"),
        ("GDCMJ2K_TextGBR.dcm", "JP2"),
        ("JPEG2000-embedded-sequence-delimiter.dcm", "256 x 1024"),
        ("README.txt", "none of PNG.* and DICOM"),
    ],
)
def test_files_of_pydicom_that_are_no_single_whole_image_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        load_grayscale(BUNDLED / name)


def test_one_image_in_several_syntaxes_of_pydicom_reads_the_same():
    plain = np.asarray(load_grayscale(BUNDLED / "MR_small.dcm"))
    for kind in ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless"):
        assert np.array_equal(load_grayscale(BUNDLED / f"MR_small_{kind}.dcm"), plain), kind
    colour = np.asarray(load_grayscale(BUNDLED / "SC_rgb_rle.dcm"))
    for kind in ("jpeg_gdcm", "rle_16bit", "rle_32bit"):  # lossless JPEG; deeper copies
        assert np.array_equal(load_grayscale(BUNDLED / f"SC_rgb_{kind}.dcm"), colour), kind
    for kind in ("jpeg_dcmtk", "jpeg_lossy_gdcm", "gdcm_KY", "dcmtk_+eb+cr", "jls_lossy_line", "jls_lossy_sample"):
        difference = np.asarray(load_grayscale(BUNDLED / f"SC_rgb_{kind}.dcm")).astype(int) - colour
        assert np.abs(difference).mean() < 2, kind
    twelve_bit = [np.asarray(load_grayscale(BUNDLED / name)) for name in ("JPGExtended.dcm", "JPEG-lossy.dcm")]
    assert np.array_equal(*twelve_bit) and np.ptp(twelve_bit[0]) == 255


def window_range(dataset) -> tuple[float, float]:
    """What pydicom makes of black and white in a window: the range of the stored bits, rescaled."""
    bits = dataset.BitsStored
    stored = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if dataset.PixelRepresentation else [0, 2**bits - 1])
    if dataset.get("ModalityLUTSequence"):
        return 0, 2 ** dataset.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    low, high = stored * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    return low, high


def pydicom_levels(dataset) -> np.ndarray:
    """The image as pydicom computes it, scaled to [0, 255] as `load_grayscale` says."""
    stored = pixel_array(dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if stored.ndim == 3:
        low, high = (0, 255) if stored.dtype == np.uint8 else (stored.min(), stored.max())
        colours = np.rint((stored.astype(float) - low) / (high - low) * 255).astype(np.uint8)
        return np.asarray(Image.fromarray(colours).convert("L")).astype(float)
    values = apply_voi_lut(apply_modality_lut(stored, dataset), dataset).astype(float)
    if dataset.get("VOILUTSequence"):
        entries = np.asarray(dataset.VOILUTSequence[0].LUTData)
        low, high = entries.min(), entries.max()
    elif "WindowWidth" in dataset:
        low, high = window_range(dataset)
    elif dataset.BitsAllocated == 1:
        low, high = 0, 1
    elif stored.dtype == np.uint8 and "RescaleSlope" not in dataset:
        low, high = 0, 255
    else:
        low, high = values.min(), values.max()
    fractions = (values - low) / (high - low)
    return 255 * (1 - fractions if dataset.PhotometricInterpretation == "MONOCHROME1" else fractions)


def comparable_files() -> list[str]:
    """Those that we read and pydicom can decode without gdcm, which lossless and 12-bit JPEG would need."""
    without_decoder = ("JPGExtended.dcm", "JPEG-lossy.dcm", "SC_rgb_jpeg_gdcm.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            path.relative_to(BUNDLED).as_posix()
            for path in bundled_files()
            if path.name not in without_decoder and is_read(path)
        ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_files_of_pydicom_read_as_pydicom_computes_them():
    names = comparable_files()
    assert len(names) >= 70
    windowed = 0
    for name in names:
        dataset = pydicom.dcmread(BUNDLED / name, force=True)
        for element in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing", "PixelPaddingValue"):
            if element in dataset:
                delattr(dataset, element)  # pydicom neither resamples nor knows padding
        windowed += "WindowWidth" in dataset
        difference = np.abs(np.asarray(load_grayscale(dataset)) - pydicom_levels(dataset))
        assert difference.max() <= 1.01 if dataset.SamplesPerPixel == 3 else difference.max() <= 0.501, name
    assert windowed >= 25


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_and_windows_give_what_pydicom_gives(seed):
    """Half a grey level is the rounding to 8 bit."""
    random = np.random.default_rng(seed)
    signed = bool(random.integers(2))
    bits = int(random.integers(9, 15))  # with 16, the table look-up of pydicom can overflow
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    pixels = random.integers(low, high, (24, 20)).astype("i2" if signed else "u2")
    elements = {"PhotometricInterpretation": random.choice(["MONOCHROME1", "MONOCHROME2"])}
    if random.random() < 0.5:
        # floats go into a VOI table with pydicom cutting what we round: whole slopes only
        elements.update(RescaleSlope=int(random.integers(1, 4)), RescaleIntercept=int(random.integers(-500, 500)))
    if random.random() < 0.4:
        first = int(random.integers(-100, 100)) if signed else int(random.integers(0, 200))
        elements["VOILUTSequence"] = table(first, random.integers(0, 4096, int(random.integers(50, 900))), 12)
    elif random.random() < 0.8:
        elements.update(
            WindowCenter=float(random.integers(low, high)), WindowWidth=float(random.integers(2, high - low))
        )
        elements["VOILUTFunction"] = random.choice(["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    dataset = make_dicom(pixels, bits=bits, **elements)
    np.testing.assert_allclose(levels(dataset), pydicom_levels(dataset), atol=0.501)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_an_object_that_is_no_image_is_refused_by_its_kind():
    pdf = make_dicom(row(0), PixelData=None, SOPClassUID=uid.EncapsulatedPDFStorage)
    pdf.EncapsulatedDocument = b"%PDF-1.4"
    with pytest.raises(ValueError, match=r"without pixel data \(Encapsulated PDF Storage\)"):
        load_grayscale(pdf)
    with pytest.raises(ValueError, match=r"image 1: .*without pixel data"):
        MMCLIPImageProcessor()([make_dicom(row(0, 1)), pdf])


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"NumberOfFrames": 2, "PixelData": b"\0" * 8}, "one frame, got 2"),
        ({"Rows": 65535, "Columns": 65535}, "at most 67108864 pixels, got 65535 x 65535"),
        ({"Rows": 0}, "some area"),
        ({"Columns": None}, "it has no Columns"),
        ({"PhotometricInterpretation": None}, "it has no PhotometricInterpretation"),
        ({"BitsStored": None}, "it has no BitsStored"),
        ({"HighBit": 11}, "HighBit 15 for BitsStored 16, got 11"),
        ({"PixelData": b"\0\0"}, "less than expected"),
        ({"WindowCenter": 1, "WindowWidth": 0}, "WindowWidth of 1 or more, got 0"),
        ({"WindowCenter": 1, "WindowWidth": 2, "VOILUTFunction": "CURVED"}, "got CURVED"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "RescaleSlope other than 0"),
        ({"PixelSpacing": [0.1, 9]}, "PixelSpacing of pixels nearly square, got 0.1 x 9"),
        ({"PixelAspectRatio": [0, 1]}, "PixelAspectRatio"),
        ({"VOILUTSequence": table(0, [1, 2], 8, packed=True)}, "4 entries in the VOILUTSequence .* got 2 bytes"),
    ],
)
def test_a_header_that_cannot_be_followed_is_refused_and_says_which_element(elements, reason):
    dataset = make_dicom(row(0, 1), **elements)
    if "VOILUTSequence" in elements:
        dataset.VOILUTSequence[0].LUTDescriptor = [4, 0, 8]
    with pytest.raises(ValueError, match=f"^expected .*{reason}"):
        load_grayscale(dataset)


def test_a_dataset_without_a_transfer_syntax_is_refused():
    dataset = make_dicom(row(0, 1))
    del dataset.file_meta.TransferSyntaxUID
    with pytest.raises(ValueError, match="no TransferSyntaxUID in its file_meta"):
        load_grayscale(dataset)
    del dataset.file_meta
    with pytest.raises(ValueError, match="no TransferSyntaxUID in its file_meta"):
        load_grayscale(dataset)


@pytest.mark.parametrize("syntax", [uid.MPEG2MPML, uid.ExplicitVRLittleEndian + ".9.9", uid.UID("1.2.3")])
def test_a_syntax_that_holds_no_single_image_is_refused(syntax):
    dataset = make_dicom((BONE // 16).astype(np.uint8), uid.JPEGBaseline8Bit)
    dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
    with pytest.raises(ValueError, match="^expected a DICOM image"):
        load_grayscale(dataset)


@pytest.mark.parametrize("name", ["JPEG baseline", "JPEG lossless SV1", "JPEG-LS", "JPEG 2000 lossless"])
def test_compressed_pixels_that_differ_from_the_header_or_end_early_are_refused(name):
    pixels = (BONE // 16).astype(np.uint8)
    dataset = make_dicom(pixels, {**LOSSLESS_SYNTAXES, **LOSSY_SYNTAXES}[name])
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    for element in ({"Rows": 50}, {"Columns": 32}, {"SamplesPerPixel": 3}):
        changed = copy.deepcopy(dataset)
        for key, value in element.items():
            setattr(changed, key, value)
        with pytest.raises(ValueError, match="expected compressed pixels of .* got 64 x 48 with 1"):
            load_grayscale(changed)
    for cut in (len(frame) // 2, 30, 3):
        dataset.PixelData = encapsulate([frame[:cut]])
        with pytest.raises(ValueError, match="^expected "):
            load_grayscale(dataset)


def test_a_deflated_file_that_inflates_without_end_is_refused_early(monkeypatch):
    dataset = make_dicom(np.zeros((8, 8), np.uint8), uid.DeflatedExplicitVRLittleEndian)
    assert levels(dataset) == [[0] * 8] * 8
    dataset.add_new((0x0009, 0x0010), "LO", "PRIVATE")
    dataset.add_new((0x0009, 0x1010), "OB", bytes(20_000_000))
    bomb = file_bytes(dataset)
    assert len(bomb) < 50_000
    load_grayscale(bomb)
    monkeypatch.setattr(image_processing_mmclip, "MAX_PIXELS", 10_000)
    monkeypatch.setattr(pydicom, "dcmread", lambda *args, **kwargs: pytest.fail("inflated"))
    with pytest.raises(ValueError, match="inflates to more than 40000 bytes"):
        load_grayscale(bomb)


def test_without_pydicom_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "film.dcm").write_bytes(file_bytes(make_dicom(row(0, 1))))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"film.dcm: .*pip install 'pydicom>=3'"):
        load_grayscale(tmp_path / "film.dcm")


def test_the_error_names_the_packages_of_the_extra():
    setup = Path(__file__).resolve().parents[1] / "setup.py"
    if not setup.is_file():
        pytest.skip("not a checkout")
    lists = {
        node.targets[0].id: node.value for node in ast.parse(setup.read_text()).body if isinstance(node, ast.Assign)
    }
    in_extra = [re.match(r"[\w-]+", text).group() for text in ast.literal_eval(lists["DICOM"])]
    named = re.findall(r"[a-z][\w-]+", image_processing_mmclip.DICOM_PACKAGES)
    assert sorted(in_extra) == sorted(named)


def test_without_a_decoder_the_error_names_the_syntax_and_what_to_install(monkeypatch):
    pixels = (BONE // 16).astype(np.uint8)
    for name in ("JPEG-LS", "JPEG 2000 lossless"):
        dataset = make_dicom(pixels, LOSSLESS_SYNTAXES[name])
        decoder = pydicom.pixels.get_decoder(LOSSLESS_SYNTAXES[name])
        with monkeypatch.context() as patched:
            patched.setattr(decoder, "_available", {})
            with pytest.raises(
                ValueError, match=f"{name.split(' lossless')[0]}.*none is installed: pip install .*pyjpegls"
            ):
                load_grayscale(dataset)
    dataset = make_dicom(pixels, uid.JPEGLosslessSV1)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ValueError, match="JPEG Lossless.*none is installed: pip install .*imagecodecs"):
        load_grayscale(dataset)


def test_a_damaged_dicom_file_is_refused_by_name(tmp_path):
    whole = file_bytes(make_dicom(BONE.astype(np.uint16), bits=12))
    for kept in (140, 200, len(whole) // 2, len(whole) - 2):
        (tmp_path / "cut.dcm").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="cut.dcm: expected "):
            load_grayscale(tmp_path / "cut.dcm")


# ----------------------------------------------------------------------------------------------------- real radiographs


@needs_originals
def test_a_real_dicom_film_and_its_monochrome1_twin_are_inverse_to_each_other():
    plain = np.asarray(load_grayscale(ORIGINALS / "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"))
    inverted = np.asarray(load_grayscale(ORIGINALS / "Fake_MONOHR1.dcm"))
    assert plain.shape == inverted.shape == (1024, 1024)
    assert np.array_equal(plain.astype(int) + inverted, np.full(plain.shape, 255))
    assert np.ptp(plain) > 200 and plain.std() > 30


@needs_originals
def test_a_real_jpeg_dicom_equals_its_jpeg_stream():
    path = ORIGINALS / "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"
    frame = get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1)
    assert np.array_equal(load_grayscale(path), Image.open(io.BytesIO(frame)))
    shrunk, size = load_shrunk(path, 224)
    assert size == (1024, 1024) and shrunk.size == (224, 224) and shrunk.mode == "L"

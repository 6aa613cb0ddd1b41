import csv
import io
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from MMCLIP.image_processing_mmclip import MMCLIPImageProcessor, load_grayscale, load_shrunk
from PIL import Image, ImageFile

from MMCLIP import image_processing_mmclip


ORIGINALS = Path(__file__).resolve().parents[2] / "shared" / "data" / "originals"
needs_originals = pytest.mark.skipif(not ORIGINALS.is_dir(), reason="../shared/data/originals is not here")
GRADIENT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4  # 0, 4, ... 252


@pytest.fixture
def processor():
    return MMCLIPImageProcessor(size=8)


def levels(image, **kwargs):
    """The grey levels that `load_grayscale` reads."""
    return np.asarray(load_grayscale(image, **kwargs))


def test_black_is_minus_two_and_white_is_two(processor):
    image = np.array([[0, 255]] * 2, dtype=np.uint8)
    pixel_values = processor(image, size=2).pixel_values
    assert pixel_values.shape == (1, 1, 2, 2) and pixel_values.dtype == np.float32
    np.testing.assert_allclose(pixel_values[0, 0], [[-2, 2], [-2, 2]], atol=1e-6)


def test_a_wide_image_is_centred_between_black_bars(processor):
    pixel_values = processor(np.full((8, 16), 255, np.uint8)).pixel_values[0, 0]
    np.testing.assert_allclose(pixel_values[2:6], 2, atol=1e-6)
    np.testing.assert_allclose(pixel_values[[0, 1, 6, 7]], -2, atol=1e-6)


def test_without_padding_the_image_is_stretched(processor):
    assert (processor(np.full((8, 16), 255, np.uint8), do_pad=False).pixel_values > 1.99).all()


def test_an_image_of_the_target_size_keeps_every_pixel_and_is_not_resampled(processor, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **kwargs: pytest.fail("resampled"))
    pixel_values = processor(Image.fromarray(GRADIENT)).pixel_values[0, 0]
    np.testing.assert_allclose(pixel_values, (GRADIENT / 255 - 0.5) / 0.25, atol=1e-6)


def test_a_batch_equals_its_images_one_by_one(processor):
    images = [Image.fromarray(GRADIENT), GRADIENT.T.copy(), np.full((3, 5), 9, np.uint8), GRADIENT / 255]
    together = processor(images, return_tensors="pt").pixel_values
    alone = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])
    assert together.shape == (4, 1, 8, 8) and together.dtype == torch.float32
    assert torch.equal(together, alone)


def test_shrinking_averages_instead_of_picking_pixels(processor):
    checkerboard = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    np.testing.assert_allclose(processor(checkerboard).pixel_values, 0, atol=0.02)  # mid grey


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "HSV", "LAB", "RGBX"])
def test_each_pil_mode_reads_the_same_gray_levels(mode):
    gray = Image.fromarray(GRADIENT)
    if mode == "I;16":
        image = Image.fromarray(GRADIENT.astype(np.uint16))
    elif mode == "LAB":
        image = Image.merge("LAB", [gray, Image.new("L", (8, 8), 128), Image.new("L", (8, 8), 128)])
    elif mode == "HSV":
        image = gray.convert("RGB").convert("HSV")
    else:
        image = gray.convert(mode)
    assert image.mode == mode
    np.testing.assert_allclose(levels(image), GRADIENT, atol=1)


def test_palette_and_one_bit_images_are_read_by_their_colours():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 200, 200, 10, 10, 10])
    palette.putpixel((1, 0), 1)
    assert levels(palette).tolist() == [[200, 10]]
    assert levels(Image.fromarray(np.array([[True, False]]))).tolist() == [[255, 0]]


def test_transparent_pixels_are_black_and_half_transparent_ones_half_as_bright():
    pixels = np.full((1, 3, 4), 200, np.uint8)
    pixels[0, :, 3] = [255, 0, 128]
    assert levels(Image.fromarray(pixels, "RGBA")).tolist() == [[200, 0, 100]]
    assert levels(pixels).tolist() == [[200, 0, 100]]
    assert levels(pixels[..., 2:]).tolist() == [[200, 0, 100]]  # grey and alpha
    assert levels(Image.fromarray(pixels[..., 2:], "LA")).tolist() == [[200, 0, 100]]


def test_a_palette_with_a_transparent_colour_shows_black_there():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 200, 200, 90, 90, 90])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    assert levels(image).tolist() == [[200, 0]]


def test_colours_become_luma():
    red_green_blue = np.eye(3, dtype=np.uint8)[None] * 255
    assert levels(red_green_blue).tolist() == [[76, 150, 29]]
    assert levels(Image.fromarray(red_green_blue)).tolist() == [[76, 150, 29]]


def test_sixteen_bit_pixels_are_stretched_over_the_range_they_use(tmp_path):
    pixels = np.array([[1000, 2000], [3000, 5000]], dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    expected = [[0, 64], [128, 255]]  # (value - 1000) / 4000 * 255
    assert levels(tmp_path / "deep.png").tolist() == expected
    assert levels(pixels).tolist() == expected
    assert levels(pixels.astype(np.int64) - 3000).tolist() == expected
    assert levels(pixels.astype(np.float64)).tolist() == expected
    assert levels(torch.from_numpy(pixels.astype(np.int32))).tolist() == expected


def test_deep_pixels_reach_the_model_without_being_rounded_to_eight_bit():
    pixels = np.array([[0, 1], [500, 1000]], dtype=np.uint16)
    pixel_values = MMCLIPImageProcessor(size=2)(pixels).pixel_values[0, 0]
    np.testing.assert_allclose(pixel_values, (pixels / 1000 - 0.5) / 0.25, atol=1e-6)


def test_deep_pixels_stay_between_black_and_white_when_resampled(processor):
    pixels = np.zeros((40, 40), np.float32)
    pixels[:, 20:] = 1  # bicubic overshoots at this edge
    pixel_values = processor(pixels, size=16).pixel_values
    assert pixel_values.min() >= -2 and pixel_values.max() <= 2


def test_floats_are_taken_as_fractions_as_gray_levels_or_are_stretched():
    assert levels(np.array([[0.0, 1.0, 0.5]])).tolist() == [[0, 255, 128]]
    assert levels(np.array([[0.0, 100.0, 255.0]])).tolist() == [[0, 100, 255]]
    assert levels(np.array([[-1.0, 0.0, 1.0]])).tolist() == [[0, 128, 255]]
    assert levels(np.array([[-1e308, 1e308]])).tolist() == [[0, 255]]
    assert levels(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)).tolist() == [[0, 255]]


def test_a_constant_image_out_of_range_is_black():
    assert levels(np.full((2, 2), 4000, np.uint16)).tolist() == [[0, 0], [0, 0]]


def test_booleans_are_black_and_white():
    assert levels(np.array([[False, True]])).tolist() == [[0, 255]]


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_channels_may_come_first_or_last(make):
    first = np.stack([GRADIENT] * 3)
    assert np.array_equal(levels(make(first)), GRADIENT)
    assert np.array_equal(levels(make(np.moveaxis(first, 0, -1).copy())), GRADIENT)
    assert np.array_equal(levels(make(GRADIENT[None])), GRADIENT)
    assert np.array_equal(levels(make(GRADIENT[..., None])), GRADIENT)


def test_where_both_ends_could_be_channels_tensors_are_first_and_arrays_last():
    pixels = np.arange(18, dtype=np.uint8).reshape(3, 2, 3)
    assert levels(pixels).shape == (3, 2)
    assert levels(torch.from_numpy(pixels)).shape == (2, 3)


def test_path_string_bytes_and_dataset_dict_read_the_same_file(tmp_path):
    path = tmp_path / "film.png"
    Image.fromarray(GRADIENT).save(path)
    sources = [path, str(path), path.read_bytes(), {"path": str(path), "bytes": None}]
    sources.append({"path": None, "bytes": path.read_bytes()})
    for source in sources:
        assert np.array_equal(levels(source), GRADIENT)


def test_a_picture_taken_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turn 90 degrees clockwise to view
    Image.fromarray(GRADIENT).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(levels(tmp_path / "phone.png"), np.rot90(GRADIENT, -1))


def test_nested_lists_are_flattened_and_four_dimensions_are_a_batch(processor):
    assert processor([[GRADIENT, GRADIENT], [GRADIENT]]).pixel_values.shape == (3, 1, 8, 8)
    assert processor(torch.zeros(5, 1, 9, 9)).pixel_values.shape == (5, 1, 8, 8)


def test_bad_images_are_refused_by_name(processor, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(whole, "png")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:1500])
    bad = {
        "missing.png.*no such image file": tmp_path / "missing.png",
        "text.png": tmp_path / "text.png",
        "cut.png": tmp_path / "cut.png",
        "some area": np.zeros((0, 5), np.uint8),
        "2 NaN or infinite of 4": np.array([[np.nan, np.inf], [0, 1]]),
        "shape \\(2, 2, 2, 2, 2\\)": np.zeros((2,) * 5),
        "stack of grey images": np.zeros((9, 8, 8)),
        "complex": np.zeros((2, 2), complex),
        "got NoneType": None,
        "`bytes` or `path`": {"file": "x"},
    }
    for message, image in bad.items():
        with pytest.raises(ValueError, match=message):
            load_grayscale(image)
        with pytest.raises(ValueError, match=f"image 1: .*{message}"):
            processor([GRADIENT, image])
    with pytest.raises(ValueError, match="row 7: .*NaN"):
        load_grayscale(np.array([[np.nan]]), where="row 7")
    with pytest.raises(ValueError, match="at least one image"):
        processor([])


def test_images_of_several_sizes_need_resizing(processor):
    same = processor([GRADIENT, GRADIENT], do_resize=False).pixel_values
    assert same.shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="image 1: .*do_resize"):
        processor([GRADIENT, GRADIENT[:4]], do_resize=False)


@pytest.mark.parametrize(
    "option",
    [
        {"do_resize": False},
        {"do_pad": False},
        {"size": {"height": 4, "width": 8}},
        {"resample": 0},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"image_mean": 0.4},
        {"image_std": [0.5]},
    ],
)
def test_each_option_changes_the_result_at_construction_and_in_a_call(option, processor):
    image = np.random.default_rng(0).integers(0, 255, (10, 13), dtype=np.uint8)
    usual = processor(image).pixel_values
    in_call = processor(image, **option).pixel_values
    constructed = MMCLIPImageProcessor(**{"size": 8, **option})(image).pixel_values
    assert np.array_equal(in_call, constructed)
    assert in_call.shape != usual.shape or not np.allclose(in_call, usual)


def test_unknown_and_impossible_options_are_refused(processor):
    with pytest.raises(TypeError, match="image_maen"):
        MMCLIPImageProcessor(image_maen=0.5)
    with pytest.raises(TypeError, match="sise"):
        processor(GRADIENT, sise=4)
    for options in ({"size": 0}, {"image_mean": [0.5, 0.5, 0.5]}, {"image_std": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MMCLIPImageProcessor(**options)
        with pytest.raises(ValueError, match=next(iter(options))):
            processor(GRADIENT, **options)


def test_saved_options_come_back(tmp_path):
    MMCLIPImageProcessor(size=96, image_mean=0.3).save_pretrained(tmp_path)
    loaded = MMCLIPImageProcessor.from_pretrained(tmp_path)
    assert (loaded.size.height, loaded.size.width, loaded.image_mean) == (96, 96, 0.3)


def test_a_heatmap_lands_where_its_patch_came_from(processor):
    image = np.zeros((20, 40), np.uint8)
    image[12:17, 32:37] = 255
    patches = processor(image).pixel_values[0, 0].reshape(4, 2, 4, 2).mean(axis=(1, 3))  # 4 x 4 patches of 2 pixels
    heatmap = processor.resize_heatmap(torch.from_numpy(patches.ravel()), (20, 40))
    assert heatmap.shape == (20, 40) and heatmap.dtype == np.float32
    row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
    assert 10 <= row < 20 and 30 <= column < 40  # the quarter that the patch covers
    np.testing.assert_allclose(processor.resize_heatmap(np.ones((4, 4)), (33, 7)), 1)


def test_a_heatmap_is_interpolated_between_patch_centres():
    heatmap = MMCLIPImageProcessor(size=4).resize_heatmap([0.0, 1.0, 0.0, 1.0], (4, 4), smooth=False)
    np.testing.assert_allclose(heatmap, [[0, 0.25, 0.75, 1]] * 4, atol=1e-6)


def test_a_patch_of_a_heatmap_is_averaged_with_its_neighbours():
    grid = np.zeros((4, 4))
    grid[1, 1], grid[3, 3] = 16, 16
    heatmap = MMCLIPImageProcessor(size=4).resize_heatmap(grid, (4, 4))
    np.testing.assert_allclose(heatmap, [[1, 2, 1, 0], [2, 4, 2, 0], [1, 2, 2, 3], [0, 0, 3, 9]])


def test_a_heatmap_of_a_padded_image_leaves_the_bars_out():
    grid = np.zeros((4, 4))
    grid[[0, 3]] = 9  # rows that lie in the black bars of an 8 x 16 image
    grid[1:3] = [0, 0, 1, 1]
    heatmap = MMCLIPImageProcessor(size=8).resize_heatmap(grid, (8, 16))
    np.testing.assert_allclose(heatmap[:, [0, 6, 9, 15]], [[0, 0.3125, 0.6875, 1]] * 8)
    unpadded = MMCLIPImageProcessor(size=8, do_pad=False)
    assert unpadded.resize_heatmap(grid, (8, 16), smooth=False)[0, 0] == 9
    assert unpadded.resize_heatmap(grid, (8, 16))[0, 0] == 0.75 * 9


def test_heatmaps_of_impossible_shape_are_refused(processor):
    for attention in (np.ones(5), np.ones((2, 2, 2)), np.ones(0)):
        with pytest.raises(ValueError, match="expected"):
            processor.resize_heatmap(attention, (4, 4))


def test_a_batch_of_maps_is_not_taken_for_one_map_of_as_many_rows(processor):
    for batch in (np.ones((1, 16)), np.ones((3, 16))):
        with pytest.raises(ValueError, match=r"`attention\[0\]`"):
            processor.resize_heatmap(batch, (4, 4))
    wide = MMCLIPImageProcessor(size={"height": 4, "width": 8})
    np.testing.assert_allclose(wide.resize_heatmap(np.ones((2, 4)), (4, 4)), 1)


# ------------------------------------------------------------------------------------------------------- files as found


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def gray_png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """A PNG by hand, 8 bit grey, with `chunks` before its compressed `pixels`."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM"])
def test_lossless_files_of_every_format_keep_every_level(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(levels(saved(Image.fromarray(GRADIENT), format, **options)), GRADIENT)


def test_a_cmyk_jpeg_shows_black_as_black():
    inks = Image.fromarray(np.repeat(GRADIENT, 8, axis=1)).convert("RGB").convert("CMYK")
    data = saved(inks, "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    np.testing.assert_allclose(levels(data), np.repeat(GRADIENT, 8, axis=1), atol=3)


def test_palette_one_bit_and_alpha_files_are_read_by_what_they_show():
    palette = Image.new("P", (3, 1))
    palette.putpalette([200, 200, 200, 10, 10, 10, 99, 99, 99])
    palette.putdata([0, 1, 2])
    bits = Image.fromarray(np.array([[True, False, True]]))
    clear = np.array([[[200, 255], [200, 0], [200, 128]]], np.uint8)
    for format in ("PNG", "TIFF", "GIF", "BMP"):
        assert levels(saved(palette, format)).tolist() == [[200, 10, 99]]
        assert levels(saved(bits, format)).tolist() == [[255, 0, 255]]
    assert levels(saved(palette, "PNG", transparency=2)).tolist() == [[200, 10, 0]]
    assert levels(saved(bits, "TIFF", compression="group4")).tolist() == [[255, 0, 255]]
    for format in ("PNG", "TIFF"):
        assert levels(saved(Image.fromarray(clear), format)).tolist() == [[200, 0, 100]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_files_are_stretched_over_the_range_they_use(format):
    pixels = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    data = saved(Image.fromarray(pixels), format)
    assert levels(data).tolist() == [[0, 64], [128, 255]]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_an_animation_or_several_pages_the_first_is_read(format):
    first, second = Image.new("L", (16, 16), 200), Image.new("L", (16, 16), 50)
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(first, format, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert levels(data).tolist() == [[200] * 16] * 16


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_each_exif_turn_is_undone_in_every_format_and_when_shrinking(format, turn):
    """The tag says where the first row and column lie; the numbers are those of its definition."""
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 240, 160, 80
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[turn]
    exif = Image.Exif()
    exif[274] = turn
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
    np.testing.assert_allclose(levels(data), upright, atol=2)
    shrunk, size = load_shrunk(data, 8)
    assert size == (32, 16) and shrunk.size == (16, 8)
    corners = np.asarray(shrunk)[[1, 1, 6, 6], [2, 13, 2, 13]]
    np.testing.assert_allclose(corners, [240, 160, 80, 0], atol=8)


def test_the_content_decides_and_not_the_name(tmp_path):
    for name, kind in (("a.jpg", "PNG"), ("a.png", "JPEG"), ("a.dcm", "TIFF"), ("a", "BMP"), ("a.txt", "GIF")):
        (tmp_path / name).write_bytes(saved(Image.new("L", (9, 7), 200), kind))
        assert levels(tmp_path / name).tolist() == [[200] * 9] * 7


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "progressive JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000"])
def test_a_file_that_ends_early_is_refused_whole_and_when_shrinking(kind, kept, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    options = {"progressive": True} if kind.startswith("progressive") else {}
    data = saved(Image.fromarray(pixels), kind.split(" ")[-1], **options)
    end = len(data) - 16 if kind in ("PNG", "TIFF") else len(data)  # what follows the pixels may be missing
    (tmp_path / "cut.jpg").write_bytes(data[: int(end * kept)])
    for read in (load_grayscale, lambda path: load_shrunk(path, 8)):
        with pytest.raises(ValueError, match=r"cut.jpg: expected .*[.]$"):
            read(tmp_path / "cut.jpg")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (bytes(5000), "zero bytes only"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page or XML"),
        (b"\xef\xbb\xbf\r\n<HTML>", "a web page or XML"),
        (b"<?xml version='1.0'?><Error/>", "a web page or XML"),
        (gray_png(8, 8).replace(b"IHDR", b"IHDX"), "the header of this PNG file is damaged"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "the header of this JPEG file is damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG, JPEG"),
        (b"%PDF-1.7", "none of PNG, JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "none of PNG, JPEG"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_a_file_that_is_no_image_is_refused_by_what_it_is(content, reason, tmp_path):
    (tmp_path / "film.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"film.png: expected .*{reason}") as caught:
        load_grayscale(tmp_path / "film.png")
    assert str(caught.value).count("expected") == 1


def test_a_folder_and_an_address_are_refused(tmp_path):
    for path in (tmp_path, "https://example.org/film.png", "\0"):
        with pytest.raises(ValueError, match="no such image file"):
            load_grayscale(path)


@pytest.mark.parametrize("side", [65535, 20000, 9000])
def test_a_header_that_announces_too_many_pixels_is_refused_before_they_are_decoded(side, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *args: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="expected at most 67108864 pixels"):
            load_grayscale(gray_png(side, side))


def test_the_limit_of_pixels_can_be_raised(monkeypatch):
    monkeypatch.setattr(image_processing_mmclip, "MAX_PIXELS", 35)
    data = saved(Image.new("L", (6, 6), 9), "PNG")
    with pytest.raises(ValueError, match="at most 35 pixels, got 6 x 6.*MAX_PIXELS of the module image_proc"):
        load_grayscale(data)
    monkeypatch.setattr(image_processing_mmclip, "MAX_PIXELS", 36)
    assert levels(data).shape == (6, 6)


def test_data_that_inflates_without_end_is_not_inflated():
    bomb = zlib.compress(bytes(200_000_000))
    rows = (b"\0" + bytes([7] * 8)) * 8
    start = time.process_time()
    for chunk in (b"zTXt", b"iCCP"):
        with pytest.raises(ValueError, match="too large"):
            load_grayscale(gray_png(8, 8, png_chunk(chunk, b"name\0\0" + bomb), pixels=rows))
    million = png_chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(1_000_000)))
    with pytest.raises(ValueError, match="[Tt]oo much memory"):
        load_grayscale(gray_png(8, 8, *[million] * 100, pixels=rows))
    assert levels(gray_png(8, 8, pixels=rows + bytes(50_000_000))).tolist() == [[7] * 8] * 8  # pixels beyond the last
    assert time.process_time() - start < 2


# ---------------------------------------------------------------------------------------------------------- load_shrunk


@pytest.mark.parametrize(
    ("size", "shorter_side", "expected"),
    [((40, 20), 10, (20, 10)), ((20, 41), 10, (10, 20)), ((30, 30), 30, (30, 30)), ((8, 30), 10, (8, 30))],
)
def test_shrinking_brings_the_shorter_side_to_its_length_and_enlarges_nothing(size, shorter_side, expected):
    shrunk, before = load_shrunk(Image.new("L", size, 77), shorter_side)
    assert before == size and shrunk.size == expected and shrunk.mode == "L"
    assert np.unique(shrunk).tolist() == [77]


def test_the_longer_side_can_be_given_instead_and_then_the_processor_of_that_size_only_pads():
    film = np.random.default_rng(0).integers(0, 256, (611, 509), dtype=np.uint8)
    for picture in (film, saved(Image.fromarray(film), "JPEG")):
        shrunk, before = load_shrunk(picture, longer_side=64)
        assert before == (509, 611) and shrunk.size == (53, 64)
        pixel_values = MMCLIPImageProcessor(size=64)(shrunk, return_tensors="np")["pixel_values"][0, 0]
        assert np.array_equal(np.rint(pixel_values * 63.75 + 127.5)[:, 5:58], np.asarray(shrunk))
    assert load_shrunk(film, longer_side=700)[0].size == (509, 611)


def test_a_line_of_pixels_does_not_vanish():
    assert load_shrunk(np.full((1, 500), 9, np.uint8), 1)[0].size == (500, 1)
    assert load_shrunk(np.full((3, 2000), 9, np.uint8), 1)[0].size == (667, 1)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(500, 400), (333, 517), (1017, 801)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_shrunk_while_it_is_decoded_is_within_a_grey_level_of_the_whole_one(mode, size, progressive):
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (size[1] // 32, size[0] // 32, 3), dtype=np.uint8)
    film = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    data = saved(film, "JPEG", quality=92, progressive=progressive)
    shrunk, before = load_shrunk(data, 56)
    assert before == size and min(shrunk.size) == 56
    whole = load_grayscale(data).resize(shrunk.size, Image.Resampling.BICUBIC)
    difference = np.asarray(shrunk).astype(int) - np.asarray(whole)
    assert np.abs(difference).mean() < 1 and abs(difference.mean()) < 0.3


def test_a_jpeg_is_decoded_at_the_smallest_scale_that_leaves_a_margin(monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    data = saved(Image.new("L", (640, 720), 77), "JPEG")
    for shorter_side, scale in (
        (57, 8),
        (58, 4),
        (114, 4),
        (115, 2),
        (228, 2),
        (229, 1),
        (640, 1),
    ):  # 640 / 1.4 / scale
        decoded.clear()
        assert min(load_shrunk(data, shorter_side)[0].size) == shorter_side
        assert decoded[0] == (640 // scale, 720 // scale)


def test_deep_pixels_are_rounded_once_after_shrinking():
    pixels = np.zeros((40, 40), np.uint16)
    pixels[:, 20:] = 1000  # levels 0 and 255, half of each where they meet
    shrunk = np.asarray(load_shrunk(saved(Image.fromarray(pixels), "PNG"), 20)[0])
    assert shrunk.dtype == np.uint8 and shrunk[:, 0].max() == 0 and shrunk[:, -1].min() == 255


@pytest.mark.parametrize("side", [0, -3, 1.5, True, "224"])
@pytest.mark.parametrize("name", ["shorter_side", "longer_side"])
def test_a_side_that_is_no_number_of_pixels_is_refused(name, side):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive number of pixels"):
        load_shrunk(GRADIENT, **{name: side})


@pytest.mark.parametrize("sides", [{}, {"shorter_side": 4, "longer_side": 4}])
def test_exactly_one_side_must_be_given(sides):
    with pytest.raises(ValueError, match="one of `shorter_side` and `longer_side`"):
        load_shrunk(GRADIENT, **sides)


# ------------------------------------------------------------------------------------------------------- real originals


@needs_originals
def test_every_original_file_is_read_as_its_table_says():
    with (ORIGINALS / "manifest.csv").open(encoding="utf-8", newline="") as file:
        facts = {row["file"]: row for row in csv.DictReader(file)}
    assert len(facts) == 27 and set(facts) == {path.name for path in ORIGINALS.iterdir()} - {"manifest.csv"}
    for name, fact in facts.items():
        shrunk, size = load_shrunk(ORIGINALS / name, 128)
        assert size == (int(fact["width"]), int(fact["height"])), name
        assert shrunk.mode == "L" and min(shrunk.size) == min(128, *size), name
        pixels = np.asarray(shrunk)
        assert pixels.std() > 20 and 30 < pixels.mean() < 225, name  # an X-ray, not a black or white field
        if int(fact["width"]) * int(fact["height"]) < 3_000_000:
            whole = load_grayscale(ORIGINALS / name)
            assert whole.size == size and whole.mode == "L", name
            resized = np.asarray(whole.resize(shrunk.size, Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(resized - pixels).mean() < 1, name


@needs_originals
def test_really_transparent_and_sixteen_bit_colour_originals_keep_their_contrast():
    for name in ("pneumocystis-pneumonia-2-PA.png", "23E99E2E-447C-46E5-8EB2-D35D12473C39.png"):
        pixels = levels(ORIGINALS / name)
        assert pixels.min() < 30 and pixels.max() > 200 and 40 < pixels.mean() < 200

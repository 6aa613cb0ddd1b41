import io
from pathlib import Path

import numpy as np
import pytest
import torch
from MMCLIP.image_processing_mmclip import MMCLIPImageProcessor, load_grayscale
from PIL import Image


ORIGINALS = Path(__file__).resolve().parents[2] / "shared" / "data" / "originals"
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
    heatmap = MMCLIPImageProcessor(size=4).resize_heatmap([0.0, 1.0, 0.0, 1.0], (4, 4))
    np.testing.assert_allclose(heatmap, [[0, 0.25, 0.75, 1]] * 4, atol=1e-6)


def test_a_heatmap_of_a_padded_image_leaves_the_bars_out():
    grid = np.zeros((4, 4))
    grid[[0, 3]] = 9  # rows that lie in the black bars of an 8 x 16 image
    grid[1:3] = [0, 0, 1, 1]
    heatmap = MMCLIPImageProcessor(size=8).resize_heatmap(grid, (8, 16))
    assert heatmap[4, 0] < 1 and heatmap[3:5, 12:].min() > heatmap[3:5, :4].max()
    unpadded = MMCLIPImageProcessor(size=8, do_pad=False).resize_heatmap(grid, (8, 16))
    assert unpadded[0, 0] == 9


def test_heatmaps_of_impossible_shape_are_refused(processor):
    for attention in (np.ones(5), np.ones((2, 2, 2)), np.ones(0)):
        with pytest.raises(ValueError, match="expected"):
            processor.resize_heatmap(attention, (4, 4))


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="../shared/data/originals is not beside this checkout")
def test_original_files_of_many_formats_are_read():
    files = [path for path in sorted(ORIGINALS.iterdir()) if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    assert len(files) > 20
    small = [path for path in files if path.stat().st_size < 200_000]
    pixel_values = MMCLIPImageProcessor()(small).pixel_values
    assert pixel_values.shape == (len(small), 1, 224, 224)
    assert (pixel_values.std(axis=(1, 2, 3)) > 0.2).all()  # an X-ray, not a black or white field


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="../shared/data/originals is not beside this checkout")
def test_really_transparent_and_sixteen_bit_colour_originals_keep_their_contrast():
    for name in ("pneumocystis-pneumonia-2-PA.png", "23E99E2E-447C-46E5-8EB2-D35D12473C39.png"):
        pixels = levels(ORIGINALS / name)
        assert pixels.min() < 30 and pixels.max() > 200 and 40 < pixels.mean() < 200

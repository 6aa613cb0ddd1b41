import numpy as np
import pytest
from PIL import Image

from MMCLIP.data.augmentation import RadiographAugmentation


OFF = {"max_rotation": 0, "max_translation": 0, "max_scaling": 0, "max_contrast": 0, "noise_std": 0}


@pytest.fixture
def image():
    """A bright disc on the left of a dark field, with a smooth background."""
    y, x = np.mgrid[:96, :64]
    pixels = 60 + x // 2 + np.where((x - 16) ** 2 + (y - 48) ** 2 < 64, 100, 0)
    return Image.fromarray(pixels.astype(np.uint8))


def apply(image, seed=0, **options):
    return np.asarray(RadiographAugmentation(**{**OFF, **options})(image, np.random.default_rng(seed)))


def test_everything_off_gives_the_same_pixels(image):
    assert (apply(image) == np.asarray(image)).all()


@pytest.mark.parametrize(
    "option",
    [{"max_rotation": 5}, {"max_translation": 0.05}, {"max_scaling": 0.1}, {"max_contrast": 0.2}, {"noise_std": 5}],
)
def test_every_option_alone_changes_something_and_keeps_size_and_mode(image, option):
    changed = apply(image, **option)
    assert changed.shape == (96, 64) and changed.dtype == np.uint8
    assert (changed != np.asarray(image)).mean() > 0.1


def test_same_generator_state_gives_the_same_picture(image):
    augment = RadiographAugmentation()
    one, same, other = (np.asarray(augment(image, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


def test_switching_noise_off_leaves_the_move_as_it_was(image):
    moved = apply(image, max_rotation=5, max_translation=0.05)
    noisy = apply(image, max_rotation=5, max_translation=0.05, noise_std=1)
    assert abs(noisy.astype(int) - moved).max() < 10


def test_left_stays_left_and_nothing_leaves_the_frame(image):
    whole = (np.asarray(image) > 150).sum()
    for seed in range(50):
        disc = apply(image, seed, max_rotation=5, max_translation=0.03, max_scaling=0.05) > 150
        assert np.flatnonzero(disc.any(axis=0)).max() < 32
        assert 0.7 * whole < disc.sum() < 1.3 * whole


def test_rotation_turns_about_the_centre():
    pixels = np.zeros((65, 65), dtype=np.uint8)
    pixels[30:35, 30:35] = 255
    for seed in range(5):
        assert apply(Image.fromarray(pixels), seed, max_rotation=15)[32, 32] > 250


def test_translation_reaches_its_limit_and_no_further():
    pixels = np.zeros((100, 100), dtype=np.uint8)
    pixels[50, 50] = 255
    rows = []
    for seed in range(200):
        moved = apply(Image.fromarray(pixels), seed, max_translation=0.1).astype(float)
        rows.append((moved.sum(axis=1) * np.arange(100)).sum() / moved.sum() - 50)
    assert 8 < max(rows) <= 10.6 and -10.6 <= min(rows) < -8


def test_contrast_keeps_the_order_of_grey_levels():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(4, axis=0))
    for seed in range(20):
        assert (np.diff(apply(ramp, seed, max_contrast=0.3)[0].astype(int)) >= 0).all()


def test_array_is_taken_as_an_image_is(image):
    augment = RadiographAugmentation()
    from_array = augment(np.asarray(image), np.random.default_rng(0))
    assert (np.asarray(from_array) == np.asarray(augment(image, np.random.default_rng(0)))).all()


@pytest.mark.parametrize("option", [{"max_rotation": 90}, {"noise_std": -1}, {"max_contrast": 1.5}])
def test_value_that_would_make_reports_untrue_is_an_error(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        RadiographAugmentation(**option)


def test_colour_image_is_an_error():
    with pytest.raises(ValueError, match="mode 'RGB', expected 'L'"):
        RadiographAugmentation()(Image.new("RGB", (4, 4)), np.random.default_rng(0))

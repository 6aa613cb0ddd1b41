import numpy as np
import pytest
import torch

from MMCLIP.data.augmentation import DRAWS, RadiographAugmentation


OFF = {"max_rotation": 0, "max_translation": 0, "max_scaling": 0, "max_contrast": 0, "noise_std": 0}
OPTIONS = [
    {"max_rotation": 5},
    {"max_translation": 0.05},
    {"max_scaling": 0.1},
    {"max_contrast": 0.2},
    {"noise_std": 5},
]


def draws(num_rows=1, **values):
    """Draws that change nothing but what is named; 1 is the most that an option allows, 0 the least."""
    numbers = torch.full((num_rows, len(DRAWS)), 0.5)
    for name, value in values.items():
        numbers[:, DRAWS.index(name)] = value
    return numbers


def random_draws(num_rows, seed=0):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([RadiographAugmentation.draw(generator) for _ in range(num_rows)]))


def dot(row, column, height=101, width=101):
    """A white dot of 3 x 3 pixels on black, in units of `pixel_values`."""
    pixels = torch.full((1, 1, height, width), -2.0)
    pixels[..., row - 1 : row + 2, column - 1 : column + 2] = 2.0
    return pixels


def place_of(pixels):
    """(row, column) of the centre of what is not black."""
    light = pixels[0, 0].double() + 2
    row = (light.sum(dim=1) * torch.arange(light.shape[0])).sum() / light.sum()
    column = (light.sum(dim=0) * torch.arange(light.shape[1])).sum() / light.sum()
    return row.item(), column.item()


@pytest.fixture
def images():
    """16 different smooth images, as a processor makes them, not square."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(16, 1, 6, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (48, 40), mode="bilinear") * 4 - 2


def test_everything_off_gives_the_same_pixels_to_the_bit(images):
    augmentation = RadiographAugmentation(**OFF)
    assert augmentation.is_off and not RadiographAugmentation().is_off
    assert augmentation(images, random_draws(16)) is images


def test_draws_in_the_middle_change_nothing(images):
    changed = RadiographAugmentation()(images, draws(16, noise_share=0))
    torch.testing.assert_close(changed, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_alone_changes_each_image_and_keeps_shape_type_and_range(images, option):
    before = images.clone()
    changed = RadiographAugmentation(**{**OFF, **option})(images, random_draws(16))
    assert changed.shape == images.shape and changed.dtype == torch.float32
    assert -2 <= changed.min() and changed.max() <= 2
    assert ((changed - images).abs() > 1e-3).flatten(1).float().mean(dim=1).min() > 0.3
    assert torch.equal(images, before), "the batch that was given is not written to"


def test_rotation_turns_the_right_side_down_by_the_angle():
    augmentation = RadiographAugmentation(**{**OFF, "max_rotation": 15})
    # 40 pixels to the right of the centre (50, 50): cos 15 = 0.9659, sin 15 = 0.2588
    row, column = place_of(augmentation(dot(50, 90), draws(rotation=1)))
    assert row == pytest.approx(50 + 40 * 0.2588, abs=0.1) and column == pytest.approx(50 + 40 * 0.9659, abs=0.1)
    row, column = place_of(augmentation(dot(50, 90), draws(rotation=0)))
    assert row == pytest.approx(50 - 40 * 0.2588, abs=0.1)


def test_rotation_keeps_distances_also_where_the_image_is_not_square():
    augmentation = RadiographAugmentation(**{**OFF, "max_rotation": 15})
    row, column = place_of(augmentation(dot(50, 60, height=101, width=81), draws(rotation=1)))  # the centre is (50, 40)
    assert row == pytest.approx(50 + 20 * 0.2588, abs=0.1) and column == pytest.approx(40 + 20 * 0.9659, abs=0.1)


def test_translation_is_a_share_of_width_and_of_height():
    augmentation = RadiographAugmentation(**{**OFF, "max_translation": 0.1})
    moved = augmentation(dot(50, 40, height=100, width=80), draws(shift_x=1, shift_y=0.25))
    assert place_of(moved) == pytest.approx((50 - 5, 40 + 8), abs=1e-3)


def test_scaling_multiplies_distances_from_the_centre():
    augmentation = RadiographAugmentation(**{**OFF, "max_scaling": 0.2})
    for draw, factor in ((1, 1.2), (0, 0.8)):
        row, column = place_of(augmentation(dot(50, 80), draws(scaling=draw)))
        assert row == pytest.approx(50, abs=0.01) and column == pytest.approx(50 + 30 * factor, abs=0.05)


def test_what_comes_into_the_frame_is_black():
    white = torch.full((1, 1, 100, 100), 2.0)
    moved = RadiographAugmentation(**{**OFF, "max_translation": 0.1})(white, draws(shift_x=1))
    assert (moved[..., :9] == -2).all() and (moved[..., 11:] == 2).all()


@pytest.mark.parametrize(
    ("drawn", "level"),
    [
        ({"contrast": 1}, 0.2),  # 0.5 + (0.25 - 0.5) * 1.2
        ({"contrast": 0}, 0.3),  # 0.5 + (0.25 - 0.5) * 0.8
        ({"brightness": 1}, 0.3),  # 0.25 + 0.2 / 4
        ({"gamma": 1}, 0.25**1.2214),  # exp(0.2) = 1.2214
        ({"gamma": 0}, 0.25**0.8187),  # exp(-0.2) = 0.8187
    ],
)
def test_contrast_brightness_and_gamma_of_one_grey_level(drawn, level):
    pixels = torch.full((1, 1, 4, 4), 0.25 * 4 - 2)
    changed = RadiographAugmentation(**{**OFF, "max_contrast": 0.2})(pixels, draws(**drawn))
    torch.testing.assert_close(changed, torch.full_like(pixels, level * 4 - 2), rtol=0, atol=1e-4)


def test_black_and_white_of_another_processor_change_the_same_levels():
    grey = torch.full((1, 1, 4, 4), 0.25)
    augmentation = RadiographAugmentation(**{**OFF, "max_contrast": 0.2}, black=0.0, white=1.0)
    torch.testing.assert_close(augmentation(grey, draws(contrast=1)), torch.full_like(grey, 0.2))


def test_contrast_keeps_the_order_of_grey_levels():
    ramp = torch.linspace(-2, 2, 256).expand(20, 1, 4, 256)
    changed = RadiographAugmentation(**{**OFF, "max_contrast": 0.9})(ramp, random_draws(20))
    assert (changed.diff(dim=-1) >= 0).all() and -2 <= changed.min() and changed.max() <= 2


def test_a_rounding_below_black_is_black_and_not_nan():
    pixels = torch.full((1, 1, 4, 4), -2.0001)
    changed = RadiographAugmentation(**{**OFF, "max_contrast": 0.2})(pixels, draws(gamma=0.1))
    assert (changed == -2).all()


def test_noise_has_the_drawn_size_and_no_pattern_that_returns():
    grey = torch.zeros(2, 1, 200, 200)
    numbers = draws(2, noise_share=0.5)
    numbers[1, DRAWS.index("noise_start")] = 0.1
    noise = RadiographAugmentation(**{**OFF, "noise_std": 10})(grey, numbers)
    assert (noise / 4 * 255).std(dim=(1, 2, 3)).tolist() == pytest.approx([5, 5], rel=0.02)  # half of 10 levels
    assert noise.mean().abs() < 1e-3
    pairs = torch.corrcoef(torch.stack([noise[0].flatten(), noise[1].flatten(), noise[0].roll(1, -1).flatten()]))
    assert pairs.fill_diagonal_(0).abs().max() < 0.02


def test_left_stays_left_over_500_draws():
    marker = dot(20, 15).expand(500, -1, -1, -1)
    changed = RadiographAugmentation(noise_std=0)(marker, random_draws(500))
    brightest = changed[:, 0].amax(dim=1).argmax(dim=1)  # column
    assert changed.flatten(1).amax(dim=1).min() > 0, "the marker is there"
    assert brightest.max() < 30


def test_at_the_defaults_the_middle_of_a_side_leaves_the_frame_by_6_percent_at_most():
    augmentation = RadiographAugmentation(max_contrast=0, noise_std=0)
    extremes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    numbers = torch.cat([draws(16), random_draws(500)])
    numbers[:16, :4] = extremes
    for row, column in ((50, 7), (50, 93), (7, 50), (93, 50)):  # 6 of 101 pixels are between the dot and the rim
        changed = augmentation(dot(row, column).expand(516, -1, -1, -1), numbers)
        light = (changed + 2).sum(dim=(1, 2, 3))
        assert light.min() > 0.89 * 36, "9 pixels of 4, at a scale of 0.95 squared = 0.9025"


def test_rows_are_changed_alone_whatever_their_company(images):
    numbers, order = random_draws(16), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    augmentation = RadiographAugmentation()
    together = augmentation(images, numbers)
    assert torch.equal(together, augmentation(images, numbers)), "the same draws, the same result"
    torch.testing.assert_close(augmentation(images[order], numbers[order]), together[order], rtol=0, atol=1e-5)
    assert torch.equal(augmentation(images[:3], numbers[:3]), together[:3])
    same_image = augmentation(images[:1].expand(16, -1, -1, -1), numbers)
    assert len({image.numpy().tobytes() for image in same_image}) == 16


def test_global_random_state_is_neither_used_nor_changed(images):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = RadiographAugmentation()(images, random_draws(16))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(RadiographAugmentation()(images, random_draws(16)), first)


def test_half_precision_gives_the_same_to_its_precision(images):
    numbers = random_draws(16)
    half = RadiographAugmentation()(images.bfloat16(), numbers)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), RadiographAugmentation()(images, numbers), rtol=0, atol=0.02)
    # draws that were rounded too, up to 1, still find noise
    assert RadiographAugmentation()(images.bfloat16(), draws(16, noise_start=1).bfloat16()).isfinite().all()


def test_a_row_without_an_image_stays_zero(images):
    shown = torch.arange(16) % 3 > 0
    changed = RadiographAugmentation()(images * shown[:, None, None, None], random_draws(16), shown)
    assert changed[~shown].abs().max() == 0
    assert torch.equal(changed[shown], RadiographAugmentation()(images, random_draws(16))[shown])


@pytest.mark.parametrize("option", [{"max_rotation": 90}, {"noise_std": -1}, {"max_contrast": 1.5}])
def test_value_that_would_make_reports_untrue_is_an_error(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        RadiographAugmentation(**option)


def test_other_shapes_and_a_negative_of_an_image_are_errors(images):
    with pytest.raises(ValueError, match=r"draws \(B, 9\), got \(16, 1, 48, 40\) and \(4, 9\)"):
        RadiographAugmentation()(images, random_draws(4))
    with pytest.raises(ValueError, match=r"got \(16, 3, 48, 40\)"):
        RadiographAugmentation()(images.expand(-1, 3, -1, -1), random_draws(16))
    with pytest.raises(ValueError, match="black is 2 and white is -2"):
        RadiographAugmentation(black=2, white=-2)

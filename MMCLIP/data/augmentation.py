"""Changes to radiographs that leave their reports true: no flip, no crop that could take a side of the chest away."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# What is drawn for each row, evenly from [0, 1). All but the last two stand for [-1, 1): 0.5 changes nothing.
DRAWS = ("rotation", "shift_x", "shift_y", "scaling", "contrast", "brightness", "gamma", "noise_share", "noise_start")
NUM_NOISE_STARTS = 2**20
ROWS_AT_ONCE = 8  # on a CPU: what fits its cache takes half the time of a whole batch


class RadiographAugmentation:
    """Small affine move in one resampling, then gamma, contrast and brightness, then noise: on a batch, on any device.

    Every parameter is a half-width: a value is drawn evenly from [-max, max] for each row; 0 leaves images as they are.
    At the defaults the middle of a side moves out of the frame by 6 % at most, so lungs and markers stay.

    Args:
        max_rotation: Degrees about the centre.
        max_translation: Share of width and of height.
        max_scaling: Share of the size; 0.05 draws a factor from 0.95 to 1.05.
        max_contrast: Contrast about mid-grey by a factor 1 +- c, brightness by +- c / 4 of the range,
            gamma by exp(+- c).
        noise_std: Standard deviation of Gaussian noise in grey levels of 255; its size is drawn from 0 to this.
        black, white: `pixel_values` of these two; the defaults are those of `MMCLIPImageProcessor`.
    """

    def __init__(
        self,
        max_rotation: float = 5.0,
        max_translation: float = 0.03,
        max_scaling: float = 0.05,
        max_contrast: float = 0.2,
        noise_std: float = 4.0,
        black: float = -2.0,
        white: float = 2.0,
    ):
        limits = {
            "max_rotation": (max_rotation, 15.0),  # a rotated chest still shows which side is which
            "max_translation": (max_translation, 0.1),
            "max_scaling": (max_scaling, 0.2),
            "max_contrast": (max_contrast, 0.9),
            "noise_std": (noise_std, 255.0),
        }
        for name, (value, limit) in limits.items():
            if not 0 <= value <= limit:
                raise ValueError(f"{name} is {value}, expected 0 to {limit}: more would make reports untrue.")
        if not black < white:
            raise ValueError(f"black is {black} and white is {white}; expected black below white.")
        self.max_rotation = max_rotation
        self.max_translation = max_translation
        self.max_scaling = max_scaling
        self.max_contrast = max_contrast
        self.noise_std = noise_std
        self.black = black
        self.white = white

    @property
    def is_off(self) -> bool:
        return not (self._moves or self.max_contrast or self.noise_std)

    @property
    def _moves(self) -> bool:
        return bool(self.max_rotation or self.max_translation or self.max_scaling)

    @staticmethod
    def draw(generator: np.random.Generator) -> np.ndarray:
        """The numbers of one row, (9,) float32 in [0, 1), as many whatever is switched off."""
        return generator.random(len(DRAWS), dtype=np.float32)

    def __call__(self, pixel_values: Tensor, draws: Tensor, has_image: Tensor | None = None) -> Tensor:
        """`pixel_values` (B, 1, height, width), changed; same type and device, what comes into the frame is black.

        `draws` (B, 9) decide everything, each row's its own image, on one kind of device to the last bit. Where
        `has_image` (B,) is False the row becomes 0, as the collator makes it.
        """
        if self.is_off:
            return pixel_values
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 1 or draws.shape != (len(pixel_values), len(DRAWS)):
            raise ValueError(
                f"expected pixel_values (B, 1, height, width) and draws (B, {len(DRAWS)}), "
                f"got {tuple(pixel_values.shape)} and {tuple(draws.shape)}."
            )
        if has_image is None:
            has_image = pixel_values.new_ones(len(pixel_values), dtype=torch.bool)
        num_rows = ROWS_AT_ONCE if pixel_values.device.type == "cpu" else len(pixel_values)
        parts = zip(*(tensor.split(num_rows) for tensor in (pixel_values, draws, has_image)), strict=True)
        return torch.cat([self._change(*part) for part in parts])

    def _change(self, pixel_values: Tensor, draws: Tensor, has_image: Tensor) -> Tensor:
        drawn = dict(zip(DRAWS, draws.float()[:, :, None, None, None].unbind(1), strict=True))  # (B, 1, 1, 1) each
        share, start = drawn.pop("noise_share"), drawn.pop("noise_start")
        drawn = {name: 2 * number - 1 for name, number in drawn.items()}
        level = torch.sub(pixel_values.float(), self.black).mul_(1 / (self.white - self.black))  # black 0, white 1
        if self._moves:
            level = F.grid_sample(level, self._origins(level, drawn), align_corners=False)
        if self.max_contrast:
            factor = 1 + self.max_contrast * drawn["contrast"]
            shift = 0.5 - 0.5 * factor + self.max_contrast / 4 * drawn["brightness"]
            level = level.clamp_(0, 1).pow_((self.max_contrast * drawn["gamma"]).exp()).mul_(factor).add_(shift)
        if self.noise_std:
            num_pixels = level[0].numel()
            starts = (NUM_NOISE_STARTS * start).long().flatten()
            noise = _noise(num_pixels, level.device).unfold(0, num_pixels, 1)[starts]  # (B, height * width)
            level.addcmul_(noise.view_as(level), self.noise_std / 255 * share)
        if self.max_contrast or self.noise_std:
            level.clamp_(0, 1)
        shown = has_image[:, None, None, None]
        return level.mul_(shown * (self.white - self.black)).add_(shown * self.black).to(pixel_values.dtype)

    def _origins(self, level: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """(B, height, width, 2): where each pixel comes from, as (x, y) in halves of width and height from the centre.

        The centre of the image, shifted, stays the centre. Positive rotation is clockwise.
        """
        height, width = level.shape[-2:]
        angle = math.radians(self.max_rotation) * drawn["rotation"][:, 0]
        factor = 1 / (1 + self.max_scaling * drawn["scaling"][:, 0])
        cos, sin = factor * angle.cos(), factor * angle.sin()  # (B, 1, 1)
        x = torch.arange(width, device=level.device) - (width - 1) / 2  # pixels from the centre
        y = torch.arange(height, device=level.device) - (height - 1) / 2
        x = x - self.max_translation * width * drawn["shift_x"][:, 0]  # (B, 1, width)
        y = (y - self.max_translation * height * drawn["shift_y"][:, 0]).mT  # (B, height, 1)
        # written in place: `affine_grid` takes ten times as long on a CPU
        origins = level.new_empty(len(level), height, width, 2)
        torch.add(2 / width * cos * x, 2 / width * sin * y, out=origins[..., 0])
        torch.add(-2 / height * sin * x, 2 / height * cos * y, out=origins[..., 1])
        return origins


@functools.lru_cache(maxsize=4)
def _noise(num_pixels: int, device: torch.device) -> Tensor:
    """Gaussian noise, always the same, long enough to begin an image's share of it at any of the starts.

    A random window of it costs a tenth of new numbers, and it is the same on every device and in any company of rows.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_NOISE_STARTS + num_pixels, generator=generator).to(device)

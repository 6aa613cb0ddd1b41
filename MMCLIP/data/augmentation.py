"""Changes to a radiograph that leave its report true: no flip, no crop that could take a side of the chest away."""

import math

import numpy as np
from PIL import Image


class RadiographAugmentation:
    """Small affine move in one resampling, contrast and gamma through one table, then noise.

    Every parameter is a half-width: a value is drawn evenly from [-max, max] each time; 0 leaves the image as it is.
    At the defaults no more than about 6 % of a side leaves the frame, so lungs and markers stay.

    Args:
        max_rotation: Degrees about the centre.
        max_translation: Share of width and of height.
        max_scaling: Share of the size; 0.05 draws a factor from 0.95 to 1.05.
        max_contrast: Contrast about mid-grey by a factor 1 +- c, brightness by +- c / 4 of the range,
            gamma by exp(+- c).
        noise_std: Standard deviation of Gaussian noise in grey levels of 255; its size is drawn from 0 to this.
    """

    def __init__(
        self,
        max_rotation: float = 5.0,
        max_translation: float = 0.03,
        max_scaling: float = 0.05,
        max_contrast: float = 0.2,
        noise_std: float = 4.0,
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
        self.max_rotation = max_rotation
        self.max_translation = max_translation
        self.max_scaling = max_scaling
        self.max_contrast = max_contrast
        self.noise_std = noise_std

    def __call__(self, image: Image.Image | np.ndarray, generator: np.random.Generator) -> Image.Image:
        """`image`, PIL mode "L" or (height, width) uint8, changed; same size, mode "L". Outside the frame is black.

        The same state of `generator` gives the same picture, and as many numbers are drawn whatever is switched off.
        """
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if image.mode != "L":
            raise ValueError(f"The image has mode {image.mode!r}, expected 'L'; read it with `load_grayscale`.")
        rotation, shift_x, shift_y, scaling, contrast, brightness, gamma = generator.uniform(-1.0, 1.0, 7)
        noise_share = generator.random()
        if self.max_rotation or self.max_translation or self.max_scaling:
            image = self._move(image, rotation, shift_x, shift_y, scaling)
        if not (self.max_contrast or self.noise_std):
            return image
        level = np.linspace(0.0, 1.0, 256) ** math.exp(self.max_contrast * gamma)
        level = (level - 0.5) * (1 + self.max_contrast * contrast) + 0.5 + self.max_contrast / 4 * brightness
        table = np.float32(255) * level.clip(0, 1).astype(np.float32)
        if not self.noise_std:
            return Image.fromarray(np.rint(table).astype(np.uint8)[np.asarray(image)])
        pixels = generator.standard_normal(image.size[::-1], dtype=np.float32)
        pixels *= np.float32(self.noise_std * noise_share)
        pixels += table[np.asarray(image)]
        np.rint(pixels, out=pixels)
        return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))

    def _move(self, image: Image.Image, rotation: float, shift_x: float, shift_y: float, scaling: float) -> Image.Image:
        width, height = image.size
        angle = math.radians(self.max_rotation * rotation)
        factor = 1 / (1 + self.max_scaling * scaling)
        cos, sin = factor * math.cos(angle), factor * math.sin(angle)
        centre_x, centre_y = width / 2, height / 2
        # PIL asks for the way back: output (x, y) -> input; the centre, shifted, stays the centre
        to_x = centre_x + self.max_translation * shift_x * width
        to_y = centre_y + self.max_translation * shift_y * height
        matrix = (cos, sin, centre_x - cos * to_x - sin * to_y, -sin, cos, centre_y + sin * to_x - cos * to_y)
        return image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=0)

"""Synthetic shifts: images made worse in six ways, with five strengths each, as ImageNet-C does (Hendrycks 2019).

A strength has the same effect on images of every size. Lengths are shares of the shorter side. Noise and JPEG are
computed on a grid of 224 pixels and scaled to the image: the grains of noise and the blocks of JPEG keep their size
relative to the image. For a smaller image the grid is the geometric mean of 224 and its own size, which makes noise and
JPEG weaker, but does not average them away. Random draws depend on the pixels of the image, the shift and the seed:
they are the same in every process, and a larger strength uses the same draws.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # Pillow is imported here for annotations only, so that --help does not load it
    from PIL import Image

SIDE = 224  # shorter side in pixels of the images for which AMOUNTS are defined
GREY = (128, 128, 128)
# The amount of each shift for the strengths 1 to 5.
AMOUNTS: dict[str, tuple[float, ...]] = {
    "blur": (1, 2, 4, 7, 11),  # standard deviation of the Gaussian, in pixels of an image of 224 pixels
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, where white is 1
    "jpeg": (25, 18, 15, 10, 7),  # quality of the JPEG file
    "hue": (0.05, 0.1, 0.2, 0.3, 0.5),  # share of the colour wheel, in either direction
    "rotation": (10, 20, 40, 60, 90),  # degrees, in either direction
    "occlusion": (0.05, 0.1, 0.2, 0.35, 0.5),  # share of the area that a grey rectangle covers
}
SHIFTS = tuple(AMOUNTS)
STRENGTHS = range(1, 6)


@dataclasses.dataclass(frozen=True)
class Shift:
    """A synthetic shift of one strength; called with an image, it returns the shifted image.

    Attributes:
        name: one of ``SHIFTS``.
        strength: from 1 to 5.
        seed: the seed of random draws.
        amount: the value of the strength in ``AMOUNTS``. It is a field so that ``repr``, which identifies stored
            features, contains it.
    """

    name: str
    strength: int
    seed: int = 0
    amount: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Raise ValueError if the shift or the strength is unknown."""
        if self.name not in AMOUNTS:
            raise ValueError(f"shift must be one of {', '.join(SHIFTS)}, got {self.name!r}")
        if self.strength not in STRENGTHS:
            raise ValueError(f"strength of a shift must be from 1 to 5, got {self.strength}")
        object.__setattr__(self, "amount", AMOUNTS[self.name][self.strength - 1])

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the shifted image, of the same size; ``image`` must be RGB."""
        return _FUNCTIONS[self.name](image, self.amount, self._generator(image))

    def _generator(self, image: Image.Image) -> np.random.Generator:
        """Return a random number generator for a synthetic shift, which the image and the seed determine."""
        content = hashlib.sha256(f"{self.name} {self.seed} {image.size}".encode() + image.tobytes()).digest()
        return np.random.default_rng(int.from_bytes(content[:16], "little"))


def _blur(image: Image.Image, amount: float, _: np.random.Generator) -> Image.Image:
    """Blur an image by a Gaussian, as a synthetic shift."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(amount * min(image.size) / SIDE))


def _noise(image: Image.Image, amount: float, generator: np.random.Generator) -> Image.Image:
    """Add Gaussian noise to an image, as a synthetic shift."""
    width, height = _grid_of_noise(image.size)
    noise = amount * 255 * generator.standard_normal((height, width, 3), np.float32)
    return _add_resized(image, noise)


def _jpeg(image: Image.Image, amount: float, _: np.random.Generator) -> Image.Image:
    """Add the error of a JPEG compression to an image, as a synthetic shift."""
    from PIL import Image

    from ..models.images import compressed

    clean = image.resize(_grid_of_noise(image.size), Image.Resampling.BICUBIC)
    return _add_resized(image, np.asarray(compressed(clean, int(amount)), np.float32) - np.asarray(clean, np.float32))


def _hue(image: Image.Image, amount: float, generator: np.random.Generator) -> Image.Image:
    """Rotate the hues of an image, to either side, as a synthetic shift."""
    from PIL import Image

    pixels = np.array(image.convert("HSV"))
    pixels[..., 0] += np.uint8(round(256 * _either_way(amount, generator)) % 256)  # uint8 wraps around, as hues do
    return Image.frombytes("HSV", image.size, pixels.tobytes()).convert("RGB")


def _rotation(image: Image.Image, amount: float, generator: np.random.Generator) -> Image.Image:
    """Rotate an image, to either side, as a synthetic shift; new corners get the median colour of the border."""
    from PIL import Image

    pixels = np.asarray(image, np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    corners = tuple(round(float(value)) for value in np.median(border, axis=0))
    return image.rotate(_either_way(amount, generator), Image.Resampling.BICUBIC, fillcolor=corners)


def _occlusion(image: Image.Image, amount: float, generator: np.random.Generator) -> Image.Image:
    """Cover a rectangle of an image by grey, as a synthetic shift."""
    # The position is drawn relative to the free space, so that a larger rectangle (a higher strength with the same
    # random numbers) covers all that a smaller one covers.
    box = []
    for side in image.size:
        length = max(1, round(math.sqrt(amount) * side))
        start = round(generator.random() * (side - length))
        box.append((start, start + length))
    (left, right), (top, bottom) = box
    shifted = image.copy()
    shifted.paste(GREY, (left, top, right, bottom))
    return shifted


_FUNCTIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "hue": _hue,
    "rotation": _rotation,
    "occlusion": _occlusion,
}


def _either_way(amount: float, generator: np.random.Generator) -> float:
    """Return the strength of a synthetic shift with a random sign."""
    return amount if generator.random() < 0.5 else -amount


def _grid_of_noise(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the grid on which the shifts "noise" and "jpeg" are computed, for an image of ``size``."""
    shorter = min(size)
    scale = SIDE / shorter if shorter > SIDE else math.sqrt(SIDE / shorter)
    width, height = (max(1, round(scale * side)) for side in size)
    return width, height


def _add_resized(image: Image.Image, change: np.ndarray) -> Image.Image:
    """Add the change [H, W, 3] of a synthetic shift, such as noise on a coarser grid, to an image."""
    from PIL import Image

    planes = [
        Image.fromarray(np.ascontiguousarray(change[..., channel])).resize(image.size, Image.Resampling.BOX)
        for channel in range(3)
    ]
    pixels = np.asarray(image, np.float32) + np.stack([np.asarray(plane) for plane in planes], -1)
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))

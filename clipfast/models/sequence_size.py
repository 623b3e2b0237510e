"""The size of an image for a sequence of patches, and its preprocessing: NaFlex keeps the aspect ratio of an image."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .images import INTERPOLATIONS, to_rgb

if TYPE_CHECKING:
    from PIL import Image

# The factor by which an image is resized is found by bisection between these bounds, up to this difference. The numbers
# are those of timm and transformers: with others, one image in some hundreds would have another size than there.
SMALLEST, LARGEST, DIFFERENCE = 1e-6, 100.0, 1e-5


def size_for_sequence(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Return the height and width to which an image is resized, so that it has at most ``max_patches`` patches.

    The size is the largest one with the image's aspect ratio, and both sides are rounded up to whole patches. A small
    image is enlarged. The sizes are equal to those of timm, and of transformers for SigLIP 2.

    Raises:
        ValueError: a number is less than 1.
    """
    if min(height, width, patch_size, max_patches) < 1:
        raise ValueError(
            f"an image of {height} x {width} pixels cannot be cut into 1 to {max_patches} patches of {patch_size} x "
            f"{patch_size}"
        )

    def grid(factor: float) -> tuple[int, int]:
        """Return the rows and columns of patches of the image if it is resized by ``factor``."""
        return math.ceil(height * factor / patch_size), math.ceil(width * factor / patch_size)

    low, high = SMALLEST, LARGEST
    while high - low >= DIFFERENCE:
        factor = (low + high) / 2
        if math.prod(grid(factor)) <= max_patches:
            low = factor
        else:
            high = factor
    rows, columns = grid(low)
    return rows * patch_size, columns * patch_size


@dataclasses.dataclass(frozen=True)
class ToSequence:
    """The preprocessing of images for a NaFlex tower in evaluation: an image is resized to a sequence of patches.

    Attributes:
        patch_size: the side of a patch in pixels.
        max_patches: the largest number of patches.
        interpolation: "bicubic" or "bilinear"; "random" is bicubic.
        normalize: the mean and the standard deviation of each channel, if images become normalised floats; None if
            they stay bytes.

    Raises:
        ValueError: a number is less than 1, or the interpolation is unknown.
    """

    patch_size: int
    max_patches: int
    interpolation: str = "bicubic"
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        """Refuse a patch size or a number of patches below 1, and an unknown interpolation."""
        size_for_sequence(1, 1, self.patch_size, self.max_patches)
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the resized image: [3, H, W], whose sides are multiples of the patch size."""
        from PIL import Image

        filters = Image.Resampling
        height, width = size_for_sequence(image.height, image.width, self.patch_size, self.max_patches)
        resampling = filters.BILINEAR if self.interpolation == "bilinear" else filters.BICUBIC
        pixels = pixels_of(to_rgb(image).resize((width, height), resampling))
        if self.normalize is None:
            return pixels
        mean, std = (torch.tensor(values)[:, None, None] for values in self.normalize)
        return (pixels / 255 - mean) / std


def pixels_of(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image, uint8 [3, H, W]. The colours of a pixel are neighbours in memory.

    So the patches of the image are cut out by copying rows of each patch, not single bytes.
    """
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

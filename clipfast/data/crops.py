"""Random crops of training images; JPEG files are decoded at the lowest resolution that the crop allows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..models.images import DEFAULT_RATIO, MAX_PIXELS, open_image, opened, to_rgb

if TYPE_CHECKING:
    from PIL import Image

UPRIGHT = 1  # the EXIF orientation of an upright image
ORIENTATION = 0x0112  # the EXIF tag of the orientation
Box = tuple[float, float, float, float]


class WholeImages:
    """Decodes the bytes of an image in full, and turns the image into a tensor by a transform."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], max_pixels: int = MAX_PIXELS) -> None:
        self.transform, self.max_pixels = transform, max_pixels

    def __call__(self, data: bytes) -> Tensor:
        """Return the transform of the decoded image.

        Raises:
            ImageError: the image cannot be used.
        """
        return self.transform(open_image(data, max_pixels=self.max_pixels))


class CroppedImages:
    """Turns the bytes of an image into a random crop of it, resized by bicubic interpolation: uint8, [3, size, size].

    A JPEG file can be decoded at a half, a quarter or an eighth of its size, which costs less than to decode it whole
    and to shrink it then. The coarsest size is taken at which the crop still has at least ``oversampling`` times as
    many pixels a side as the result. With ``oversampling=1``, the crop of a photograph differs from a crop of the fully
    decoded file by about as much as JPEG compression changes the photograph (in the tests, more than 35 dB of signal to
    noise); sharp edges, as in drawings and letters, differ more. With ``inf``, files are decoded at full size.

    Args:
        image_size: side of the result in pixels.
        scale: smallest and largest share of the area that a crop keeps.
        augment: transforms of torchvision for PIL images, applied after the crop.
        oversampling: least ratio of the crop's decoded size to ``image_size``, as described above.
        ratio: smallest and largest ratio of a crop's width to its height.
        max_pixels: images with more pixels are refused.
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.9, 1.0),
        augment: Sequence[nn.Module] = (),
        oversampling: float = 1.0,
        ratio: tuple[float, float] = DEFAULT_RATIO,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.image_size, self.scale, self.augment = image_size, tuple(scale), list(augment)
        self.oversampling, self.ratio, self.max_pixels = oversampling, tuple(ratio), max_pixels

    def __call__(self, data: bytes) -> Tensor:
        """Return a random crop of the image, drawn with torch's generator.

        Raises:
            ImageError: the image cannot be used.
        """
        return self.resized(*self.decoded(data))

    def decoded(self, data: bytes) -> tuple[Image.Image, Box]:
        """Decode the image at the resolution that a random crop needs; return the image, and the crop in its pixels.

        Raises:
            ImageError: the image cannot be used.
        """
        with opened(io.BytesIO(data), self.max_pixels) as image:
            if image.format != "JPEG" or image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
                image = open_image(data, max_pixels=self.max_pixels)
                return image, self.box(*image.size)
            box = self.box(*image.size)
            shortest = min(box[2] - box[0], box[3] - box[1])
            reduction = max(shortest / (self.image_size * self.oversampling), 1)
            whole = image.size
            image.draft("RGB", (int(-(-whole[0] // reduction)), int(-(-whole[1] // reduction))))
            image.load()
            factors = (image.width / whole[0], image.height / whole[1])
            x0, y0, x1, y1 = (edge * factors[i % 2] for i, edge in enumerate(box))
            return to_rgb(image), (x0, y0, min(x1, image.width), min(y1, image.height))

    def resized(self, image: Image.Image, box: Box) -> Tensor:
        """Return a crop of a decoded training image, resized and augmented."""
        from PIL import Image

        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box)
        for transform in self.augment:
            image = transform(image)
        # Pillow can store each row as all reds, then all greens, then all blues: then whole rows are copied, not single
        # bytes
        rows = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8).reshape(image.height, 3, image.width)
        return torch.from_numpy(rows.transpose(1, 0, 2).copy())

    def box(self, width: int, height: int) -> Box:
        """Draw a random crop of an image of this size; return its edges: left, top, right, bottom."""
        from torchvision.transforms import RandomResizedCrop

        sized = torch.empty(3, height, width, device="meta")
        top, left, rows, columns = RandomResizedCrop.get_params(sized, list(self.scale), list(self.ratio))
        return left, top, left + columns, top + rows

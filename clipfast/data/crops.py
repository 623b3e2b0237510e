"""Random crops of training images; JPEG files are decoded at the lowest resolution that the crop allows."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.images import DEFAULT_RATIO, MAX_PIXELS, open_image, opened, to_rgb
from ..models.sequence_size import pixels_of, size_for_sequence

if TYPE_CHECKING:
    from PIL import Image

UPRIGHT = 1  # the EXIF orientation of an upright image
ORIENTATION = 0x0112  # the EXIF tag of the orientation
Box = tuple[float, float, float, float]
Size = tuple[int, int]
ATTEMPTS = 10  # random crops that are tried; if none fits into the image, the largest allowed crop is taken


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

    def decoded(self, data: bytes) -> tuple[Image.Image, Box, Size]:
        """Decode the image at the resolution that a random crop needs.

        Returns:
            The image, the crop in its pixels, and the height and width of the result.

        Raises:
            ImageError: the image cannot be used.
        """
        with opened(io.BytesIO(data), self.max_pixels) as image:
            if image.format != "JPEG" or image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
                image = open_image(data, max_pixels=self.max_pixels)
                box = self.box(*image.size)
                return image, box, self.size(box)
            box = self.box(*image.size)
            height, width = size = self.size(box)
            least = min((box[2] - box[0]) / width, (box[3] - box[1]) / height)
            reduction = max(least / self.oversampling, 1)
            whole = image.size
            image.draft("RGB", (int(-(-whole[0] // reduction)), int(-(-whole[1] // reduction))))
            image.load()
            factors = (image.width / whole[0], image.height / whole[1])
            x0, y0, x1, y1 = (edge * factors[i % 2] for i, edge in enumerate(box))
            return to_rgb(image), (x0, y0, min(x1, image.width), min(y1, image.height)), size

    def resized(self, image: Image.Image, box: Box, size: Size) -> Tensor:
        """Return a crop of a decoded training image, resized and augmented."""
        from PIL import Image

        image = image.resize(size[::-1], Image.Resampling.BICUBIC, box)
        for transform in self.augment:
            image = transform(image)
        return self.pixels(image)

    @staticmethod
    def pixels(image: Image.Image) -> Tensor:
        """Return the pixels of a cropped image as they are in a training batch."""
        # Pillow can give each row as all reds, then all greens, then all blues. So NumPy copies rows, not single bytes.
        rows = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8).reshape(image.height, 3, image.width)
        return torch.from_numpy(rows.transpose(1, 0, 2).copy())

    def box(self, width: int, height: int) -> Box:
        """Draw a random crop of an image of this size; return its edges: left, top, right, bottom."""
        from torchvision.transforms import RandomResizedCrop

        sized = torch.empty(3, height, width, device="meta")
        top, left, rows, columns = RandomResizedCrop.get_params(sized, list(self.scale), list(self.ratio))
        return left, top, left + columns, top + rows

    def size(self, box: Box) -> Size:  # noqa: ARG002
        """Return the height and width to which a crop is resized."""
        return self.image_size, self.image_size


class CroppedToSequence(CroppedImages):
    """Turns the bytes of an image into a random crop for a NaFlex tower: uint8, [3, H, W], a sequence of patches.

    The crop is resized with its own aspect ratio to at most ``max_patches`` patches. As in timm, ``ratio`` is the range
    of the crop's aspect ratio relative to that of the image.

    Args:
        patch_size: the side of a patch in pixels.
        max_patches: the largest number of patches.
        **options: ``scale``, ``augment``, ``oversampling``, ``ratio`` and ``max_pixels`` of :class:`CroppedImages`.
    """

    def __init__(self, patch_size: int, max_patches: int, **options: Any) -> None:
        super().__init__(patch_size * math.isqrt(max_patches), **options)
        self.patch_size, self.max_patches = patch_size, max_patches

    def box(self, width: int, height: int) -> Box:
        """Draw a random crop of an image of this size, as timm does; return its edges: left, top, right, bottom."""
        aspect = width / height
        for _ in range(ATTEMPTS):
            area = width * height * _uniform(*self.scale)
            drawn = aspect * math.exp(_uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            rows, columns = round(math.sqrt(area / drawn)), round(math.sqrt(area * drawn))
            if 0 < columns <= width and 0 < rows <= height:
                top, left = (int(torch.randint(room + 1, ())) for room in (height - rows, width - columns))
                return left, top, left + columns, top + rows
        nearest = aspect * min(max(1.0, self.ratio[0]), self.ratio[1])
        rows, columns = min(height, max(1, round(width / nearest))), min(width, max(1, round(height * nearest)))
        top, left = (height - rows) // 2, (width - columns) // 2
        return left, top, left + columns, top + rows

    def size(self, box: Box) -> Size:
        """Return the height and width to which a crop is resized, so that it has at most ``max_patches`` patches."""
        return size_for_sequence(int(box[3] - box[1]), int(box[2] - box[0]), self.patch_size, self.max_patches)

    pixels = staticmethod(pixels_of)


def _uniform(low: float, high: float) -> float:
    """Draw a number between two bounds for a random crop, with torch's generator."""
    return low + (high - low) * float(torch.rand(()))

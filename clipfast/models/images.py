"""Decodes untrusted image files, and transforms images into the input of a model.

Only formats that occur in image-text data are decoded, and only if the size in the header is acceptable. A file that
cannot be decoded completely is refused with an :class:`ImageError`; a partial image is never returned.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..io.files import open_regular
from ..kernels.reference import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:  # functions import Pillow where they use it, so that the models can be imported without it
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 89_478_485  # Pillow's own limit of pixels: a quarter of a gigabyte as RGB
MAX_ASPECT = 200
# OpenCLIP's names of interpolations and resize modes; the first of each is the default.
INTERPOLATIONS = ("bicubic", "bilinear", "random")
RESIZE_MODES = ("shortest", "longest", "squash")
DEFAULT_RATIO = (3 / 4, 4 / 3)
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I")


class SampleError(ValueError):
    """A sample that cannot be used: the message is the reason, and ``kind`` is the reason in two words, for counts."""

    def __init__(self, message: str, kind: str = "unusable sample") -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (str(self), self.kind)


class ImageError(SampleError):
    """An image that cannot be used."""


def open_image(source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image to RGB.

    Args:
        source: a path, or the file's bytes.
        max_pixels: images with more pixels are refused before they are decoded.

    Returns:
        The first frame, turned upright by its EXIF orientation.

    Raises:
        ImageError: the file is not an image, has another format, is truncated, or is too large or too long.
    """
    from PIL import ImageOps

    with opened(io.BytesIO(source) if isinstance(source, bytes) else Path(source), max_pixels) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def opened(source: io.BytesIO | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image and check its header; within the context, every error of the decoder becomes an ImageError.

    Raises:
        ImageError: as :func:`open_image`.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, io.BytesIO) and not source.getbuffer().nbytes:
        raise ImageError("the image has no bytes", "empty image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_regular(source) if isinstance(source, Path) else source as file:
                image = Image.open(file, formats=FORMATS)
                _check_size(image, max_pixels)
                yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image in one of the formats {', '.join(FORMATS)}", "not an image") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"image is refused by its size: {error}", "huge image") from error
    except Exception as error:  # on broken files, decoders raise anything, even struct.error and SyntaxError
        raise ImageError(f"image cannot be decoded: {error}", "broken image") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Refuse an image whose header has an unacceptable size, before it is decoded."""
    size = f"{image.width}x{image.height}"
    if image.width * image.height > max_pixels:
        raise ImageError(f"image has {size} pixels, more than the limit of {max_pixels}", "huge image")
    if max(image.size) > MAX_ASPECT * min(image.size):
        # Scaling the shorter side to the model's size would make the longer one so long that the image needs gigabytes.
        raise ImageError(f"image has {size} pixels, its sides differ more than {MAX_ASPECT} times", "huge image")


def compressed(image: Image.Image, quality: int) -> Image.Image:
    """Return an image in RGB with the artefacts of JPEG compression at ``quality``."""
    from PIL import Image

    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=quality)
    return Image.open(stream, formats=("JPEG",)).convert("RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; an RGB image is returned itself. Transparency is dropped, as in OpenCLIP.

    16-bit pixels are scaled to 8 bits; Pillow would clip them.
    """
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(np.clip(grey.round(), 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def augmentation(affine: float, color_jitter: float, hue: float, gray_prob: float) -> list[nn.Module]:
    """Return training augmentations for PIL images; an argument of 0 leaves one out.

    Args:
        affine: an image is scaled by up to this share, shifted by up to half of this share, and rotated by up to 100
            times this number of degrees; uncovered pixels are white.
        color_jitter: the largest relative change of brightness, contrast and saturation.
        hue: the largest shift of the hue, as a share of the colour wheel.
        gray_prob: the probability that an image becomes grey.
    """
    from torchvision.transforms import v2

    steps: list[nn.Module] = []
    if affine:
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(
            v2.RandomAffine(100 * affine, (affine / 2,) * 2, (1 - affine, 1 + affine), interpolation=bilinear, fill=255)
        )
    if color_jitter or hue:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter, hue))
    if gray_prob:
        steps.append(v2.RandomGrayscale(gray_prob))
    return steps


def make_transform(
    image_size: int,
    *,
    train: bool = False,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] | None = None,
    augment: Sequence[nn.Module] = (),
    uint8: bool = False,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
) -> Callable[[Image.Image], Tensor]:
    """Return the preprocessing of images for a model.

    Args:
        image_size: side of the square result, in pixels.
        train: take a random crop and resize it, bicubically; otherwise images are resized as ``resize_mode`` says.
        scale: the smallest and largest share of the area that a random crop keeps; with (1, 1) and no ``ratio`` there
            is no random crop.
        ratio: smallest and largest width of a random crop over its height; default: 3/4 to 4/3.
        augment: torchvision transforms for PIL images, applied after the crop in training only.
        uint8: return bytes, for models that normalise them on the device (a quarter of the traffic); otherwise floats
            normalised with ``mean`` and ``std``, as other packages expect.
        mean, std: the mean and standard deviation of each channel, for floats only.
        interpolation: "bicubic" or "bilinear"; "random" is bicubic.
        resize_mode: "shortest" resizes the shorter side and crops the centre, "longest" resizes the longer side and
            pads with black, "squash" resizes both sides.

    Returns:
        A function that turns a PIL image into a tensor [3, image_size, image_size].

    Raises:
        ValueError: the interpolation or the resize mode is unknown.
    """
    from PIL import Image
    from torchvision.transforms import v2

    for name, value, known in (
        ("interpolation", interpolation, INTERPOLATIONS),
        ("resize_mode", resize_mode, RESIZE_MODES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if train and (ratio is not None or tuple(scale) != (1.0, 1.0)):
        bicubic = v2.InterpolationMode.BICUBIC
        sized: list[nn.Module] = [
            v2.RandomResizedCrop(image_size, scale=scale, ratio=ratio or DEFAULT_RATIO, interpolation=bicubic)
        ]
    else:
        sized = _resizing(image_size, interpolation, resize_mode)
    steps = [v2.Lambda(to_rgb, Image.Image), *sized, *(augment if train else ()), v2.PILToTensor()]
    if not uint8:
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    transform = v2.Compose(steps)
    transform.register_forward_pre_hook(_check_picture)  # torchvision returns what it does not know as it is
    return transform


def _check_picture(_: nn.Module, inputs: tuple[object, ...]) -> None:
    """Raise a TypeError if the input of the preprocessing is neither a PIL image nor a tensor."""
    from PIL import Image

    if not isinstance(inputs[0], Image.Image | Tensor):
        raise TypeError(f"the preprocessing takes a PIL image, got {type(inputs[0]).__name__}")


def _resizing(image_size: int, interpolation: str, resize_mode: str) -> list[nn.Module]:
    """Return the deterministic transforms that resize and crop, or pad, PIL images to a square for a model."""
    from PIL import Image
    from torchvision.transforms import v2

    mode = v2.InterpolationMode.BILINEAR if interpolation == "bilinear" else v2.InterpolationMode.BICUBIC
    if resize_mode == "squash":
        return [v2.Resize((image_size, image_size), interpolation=mode)]
    if resize_mode == "shortest":
        return [v2.Resize(image_size, interpolation=mode), v2.CenterCrop(image_size)]
    longer = functools.partial(_resize_longer_side, image_size, mode)
    return [v2.Lambda(longer, Image.Image), v2.CenterCrop(image_size)]  # CenterCrop pads an image that is smaller


def _resize_longer_side(image_size: int, mode: Any, image: Image.Image) -> Image.Image:
    """Resize an image for a model: its longer side becomes ``image_size`` pixels, and its aspect ratio stays."""
    from torchvision.transforms.v2 import functional

    size = [max(1, round(side * image_size / max(image.size))) for side in (image.height, image.width)]
    resized: Image.Image = functional.resize(image, size, interpolation=mode)
    return resized

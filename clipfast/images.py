"""Opening images that nobody has checked, and bringing them to the model's size.

Files are decoded only in formats that occur in image-text data, with a limit on pixels that is checked on the header;
whatever cannot be decoded whole is refused with an :class:`ImageError`, never shown half.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from .kernels.reference import CLIP_MEAN, CLIP_STD

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte as RGB
MAX_ASPECT = 200
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I")


class ImageError(ValueError):
    """A file that is not an image that can be used; the message says why."""


def open_image(source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image to RGB.

    Args:
        source: a path, or the file's bytes.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        The first frame, upright (EXIF orientation applied).

    Raises:
        ImageError: not an image, an unexpected format, truncated, too large, or too long.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(stream, formats=FORMATS)
            _check_size(image, max_pixels)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders of broken files raise anything, struct.error and SyntaxError among it
        raise ImageError(f"image cannot be decoded: {error}") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    size = f"{image.width}x{image.height}"
    if image.width * image.height > max_pixels:
        raise ImageError(f"image has {size} pixels, more than the limit of {max_pixels}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        # scaled by its shorter side, it would be as large as a bomb
        raise ImageError(f"image has {size} pixels, its sides differ more than {MAX_ASPECT} times")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode: palette, grey, CMYK, 16 bits (scaled, where Pillow would clip).

    Transparency is dropped, as in OpenCLIP.
    """
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(np.clip(grey.round(), 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def augmentation(affine: float, color_jitter: float, hue: float, gray_prob: float) -> list[nn.Module]:
    """Training augmentations for PIL images; 0 leaves one out.

    Args:
        affine: share by which an image is scaled and shifted at most, and a hundredth of the degrees it is turned by;
            white comes in.
        color_jitter: share by which brightness, contrast and saturation change at most.
        hue: share of the colour wheel by which colours turn at most.
        gray_prob: probability of losing the colour.
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


def image_transform(
    image_size: int,
    *,
    train: bool = False,
    scale: tuple[float, float] = (0.9, 1.0),
    augment: Sequence[nn.Module] = (),
    uint8: bool = False,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Callable[[Image.Image], Tensor]:
    """Preprocessing from a decoded image to the model's input.

    Args:
        image_size: side of the square result, in pixels.
        train: random crop of ``scale`` of the area, resized; otherwise the shorter side is resized and the centre
            taken.
        scale: least and largest share of the area that a training crop keeps; with (1, 1) it is as in evaluation.
        augment: torchvision transforms for PIL images, applied after the crop, in training only.
        uint8: return bytes, for models that normalise them on the device (a quarter of the traffic); otherwise floats
            normalised with ``mean`` and ``std``, as other packages expect.

    Returns:
        A function from a PIL image to a tensor [3, image_size, image_size]. Resampling is bicubic.
    """
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    if train and tuple(scale) != (1.0, 1.0):
        sized: list[nn.Module] = [v2.RandomResizedCrop(image_size, scale=scale, interpolation=bicubic)]
    else:
        sized = [v2.Resize(image_size, interpolation=bicubic), v2.CenterCrop(image_size)]
    steps = [v2.Lambda(to_rgb, Image.Image), *sized, *(augment if train else ()), v2.PILToTensor()]
    if not uint8:
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    return v2.Compose(steps)

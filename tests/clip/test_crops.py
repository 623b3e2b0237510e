"""Random crops: JPEG files that are decoded coarsely give almost the same as those that are decoded whole."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.data import CroppedImages
from clipfast.images import ImageError, make_transform, open_image


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blurred noise of all scales, whose spectrum falls off like that of photographs."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) / math.sqrt(cells)
    total -= total.min()
    return Image.fromarray((255 * total / total.max()).astype(np.uint8))


def encoded(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


def crop(data: bytes, size: int, seed: int, **options: object) -> torch.Tensor:
    torch.manual_seed(seed)
    return CroppedImages(size, **options)(data)


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal to noise ratio."""
    noise = (a.float() - b.float()).square().mean().item()
    return 10 * math.log10(255**2 / noise) if noise else math.inf


@pytest.mark.parametrize(("width", "height"), [(512, 512), (640, 427), (333, 501), (1023, 767)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.2, 0.5)])
def test_coarse_decoding_is_almost_the_whole(width, height, scale):
    data = encoded(photograph(width, height))
    for seed in range(4):
        coarse, whole = (crop(data, 96, seed, scale=scale, oversampling=n) for n in (1, math.inf))
        assert coarse.shape == (3, 96, 96)
        assert coarse.dtype == torch.uint8
        assert decibels(coarse, whole) > 35
        torch.manual_seed(seed)
        theirs = make_transform(96, train=True, scale=scale, uint8=True)(open_image(data))
        assert decibels(whole, theirs) > 45  # torchvision cuts the crop out before it resizes


def test_images_are_decoded_no_coarser_than_the_crop_needs(monkeypatch):
    data, found = encoded(photograph(800, 800)), []
    resize = Image.Image.resize

    def spy(image, size, resample, box):
        found.append((image.width, min(box[2] - box[0], box[3] - box[1])))
        return resize(image, size, resample, box)

    monkeypatch.setattr(Image.Image, "resize", spy)
    for scale in ((0.005, 0.01), (0.02, 0.05), (0.1, 0.3), (0.9, 1.0)):
        for seed in range(5):
            crop(data, 64, seed, scale=scale)
    assert all(side >= 63 or width == 800 for width, side in found)  # a crop begins and ends within a pixel
    assert {width for width, _ in found} == {100, 200, 400, 800}


def test_orientation_is_applied():
    upright = photograph(300, 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert decibels(crop(turned, 64, 1), crop(encoded(upright), 64, 1)) > 30


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_modes(mode):
    data = encoded(photograph(256, 256).convert(mode))
    coarse, whole = (crop(data, 64, 3, oversampling=n) for n in (1, math.inf))
    assert coarse.shape == (3, 64, 64)
    assert decibels(coarse, whole) > 30


def test_broken_files():
    data = encoded(photograph(256, 256))
    for content, kind in ((data[: len(data) // 2], "broken image"), (b"", "empty image"), (b"x" * 99, "not an image")):
        with pytest.raises(ImageError) as refused:
            CroppedImages(64)(content)
        assert refused.value.kind == kind

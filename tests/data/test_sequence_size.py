"""NaFlex images: sizes for a sequence of patches and preprocessing, compared with timm's; crops of JPEG files."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast import open_image
from clipfast.data import CroppedToSequence
from clipfast.models.aug_cfg import training_options
from clipfast.models.sequence_size import ToSequence, size_for_sequence

from ..models.test_images import decibels, encoded, exif_of, jpeg, photograph

timm_data = pytest.importorskip("timm.data")
transforms = pytest.importorskip("timm.data.naflex_transforms")


def sizes(largest: int) -> list[tuple[int, int]]:
    """Return the heights and widths of 200 images, from tiny to large, and some of them long."""
    rng = random.Random(0)
    sides = (round(math.exp(rng.uniform(0, math.log(largest)))) for _ in range(2 * 197))
    return [*zip(sides, sides, strict=True), (1, 1), (7, 1400), (1400, 7)]


def test_sizes_are_those_of_timm():
    for height, width in sizes(8000):
        for patch_size in (14, 16, 32):
            for budget in (1, 7, 128, 256, 576, 784, 1024):
                found = size_for_sequence(height, width, patch_size, budget)
                assert found == transforms.get_image_size_for_seq((height, width), patch_size, budget)[1]
                assert math.prod(found) <= budget * patch_size**2
    with pytest.raises(ValueError, match="5 x 0 pixels cannot be cut into 1 to 9 patches"):
        size_for_sequence(5, 0, 16, 9)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("budget", [1, 9, 64])
def test_pixels_are_those_of_timm(budget, interpolation):
    theirs = timm_data.create_transform(
        (3, 8, 8), is_training=False, naflex=True, max_seq_len=budget, patch_size=8, interpolation=interpolation,
        mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    ours = ToSequence(8, budget, interpolation)
    rng = np.random.default_rng(0)
    for height, width in sizes(500):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        assert torch.equal(ours(image).float().div(255), theirs(image)), (height, width)
    alpha = photograph(30, 20).convert("RGBA")
    assert torch.equal(ours(alpha), ours(alpha.convert("RGB")))


def timm_crop(image: Image.Image, seed: int, patch_size: int, budget: int, **options: object):
    """Return the crop that timm draws in training with the numbers of torch's generator, its size, and its pixels."""
    crop = transforms.RandomResizedCropToSequence(patch_size, budget, **options)
    torch.manual_seed(seed)
    (top, left, rows, columns), size, _ = crop.get_params(
        image, crop.scale, crop.ratio, crop.attempts, patch_size, patch_size, budget
    )
    cut = image.crop((left, top, left + columns, top + rows))
    return (left, top, left + columns, top + rows), size, cut.resize(size[::-1], Image.Resampling.BICUBIC)


@pytest.fixture
def torch_numbers(monkeypatch):
    """Let timm draw its random numbers from torch's generator."""
    monkeypatch.setattr(random, "uniform", lambda low, high: low + (high - low) * float(torch.rand(())))
    monkeypatch.setattr(random, "randint", lambda low, high: low + int(torch.randint(high - low + 1, ())))


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.5, 2.0), (0.3, 0.5)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.1, 0.5)])
def test_crops_are_those_of_timm(scale, ratio, torch_numbers):
    rng = random.Random(1)
    for seed in range(100):
        width, height = rng.randrange(1, 900), rng.randrange(1, 900)
        ours = CroppedToSequence(16, 64, scale=scale, ratio=ratio)
        box, size, _ = timm_crop(Image.new("L", (width, height)), seed, 16, 64, scale=scale, ratio=ratio)
        torch.manual_seed(seed)
        assert ours.box(width, height) == box
        assert ours.size(box) == size


@pytest.mark.parametrize(("width", "height"), [(640, 427), (333, 501), (1023, 767), (50, 40)])
@pytest.mark.parametrize("budget", [16, 200])
def test_pixels_of_crops_are_nearly_those_of_timm(width, height, budget, torch_numbers):
    # clipfast decodes the file at a fraction of its size, and resizes a crop's edges with pixels beyond them; timm
    # does neither, so that pixels are near, not equal.
    data = jpeg(photograph(width, height))
    for seed in range(2):
        _, size, theirs = timm_crop(open_image(data), seed, 8, budget, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3))
        expected = torch.frombuffer(bytearray(theirs.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1)
        for oversampling, least in ((1, 33), (math.inf, 50)):
            torch.manual_seed(seed)
            found = CroppedToSequence(8, budget, scale=(0.4, 1.0), oversampling=oversampling)(data)
            assert (found.shape, found.dtype) == (expected.shape, torch.uint8)
            assert decibels(found, expected) > least


def test_files_are_decoded_as_coarsely_as_the_crop_allows():
    data = jpeg(photograph(1600, 800))
    for budget, reduction in ((50, 8), (400, 4), (5000, 2), (20000, 1)):
        image, _, size = CroppedToSequence(8, budget, scale=(1.0, 1.0)).decoded(data)
        assert image.width == 1600 // reduction >= size[1]
    turned = jpeg(photograph(400, 800), exif=exif_of(6))
    assert CroppedToSequence(8, 50)(turned).shape[2] > CroppedToSequence(8, 50)(turned).shape[1]
    assert CroppedToSequence(8, 8)(encoded(photograph(30, 60))).shape == (3, 32, 16)


def test_a_coarse_file_has_the_size_of_a_whole_one():
    data = jpeg(Image.new("L", (1001, 667)))  # decoded at an eighth of its size, 126 x 84, the image has another aspect
    for seed in range(100):
        shapes = []
        for oversampling in (1, math.inf):
            torch.manual_seed(seed)
            shapes.append(CroppedToSequence(8, 100, scale=(0.5, 1.0), oversampling=oversampling)(data).shape)
        assert shapes[0] == shapes[1]


def test_augmentations_of_aug_cfg():
    options = training_options(
        {"use_timm": True, "naflex": True, "scale": (0.4, 1.0), "color_jitter": 0.3}, naflex=True
    )
    assert (options["scale"], options["ratio"]) == ((0.4, 1.0), (3 / 4, 4 / 3))
    (jitter,) = options["augment"]  # colours of all images are changed, as in timm
    assert (jitter.brightness, jitter.saturation, jitter.hue) == ((0.7, 1.3), (0.7, 1.3), None)
    assert training_options({"use_timm": True, "color_jitter": (0.1, 0.1, 0.1, 0.2)}, naflex=True)["augment"]
    for key, message in (("gray_scale_prob", "OpenCLIP ignores gray_scale_prob"), ("re_prob", "which OpenCLIP leaves")):
        with pytest.raises(ValueError, match=message):
            training_options({"use_timm": True, key: 0.2}, naflex=True)

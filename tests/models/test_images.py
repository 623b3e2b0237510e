"""Test that image files from anywhere are decoded or refused with the reason, and that transforms are OpenCLIP's."""

import contextlib
import io
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast import ImageError, create_model_and_transforms, image_transform, open_image
from clipfast.data import CroppedImages
from clipfast.kernels.reference import CLIP_MEAN, CLIP_STD
from clipfast.models.images import make_transform


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Return an image as a file for the preprocessing."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(image: Image.Image, **options: object) -> bytes:
    """Return an image as a JPEG file for the preprocessing."""
    return encoded(image, "JPEG", quality=90, **options)


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    """Return a picture to preprocess in which every pixel says where it is."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).round().astype(np.uint8))


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return blurred noise of all scales to preprocess, whose spectrum falls off like that of photographs."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) / math.sqrt(cells)
    total -= total.min()
    return Image.fromarray((255 * total / total.max()).astype(np.uint8))


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal to noise ratio of two preprocessed images."""
    noise = (a.float() - b.float()).square().mean().item()
    return 10 * math.log10(255**2 / noise) if noise else math.inf


def exif_of(orientation: int) -> Image.Exif:
    """Return the EXIF data of an image with this orientation, which the preprocessing undoes."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def black(width: int, height: int) -> bytes:
    """Return a PNG of few bytes and any size: a decompression bomb, which the preprocessing refuses."""
    return encoded(Image.new("1", (width, height)), compress_level=1)


def damaged(content: bytes) -> bytes:
    """Return an image file with other bytes in the middle, which the preprocessing may meet."""
    middle = len(content) // 2
    return content[:middle] + b"\xff" * 20 + content[middle + 20 :]


def test_formats_and_modes():
    exact = np.asarray(gradient()).astype(int)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        image = open_image(encoded(gradient(), kind))
        assert (image.mode, image.size) == ("RGB", (40, 30))
    assert open_image(encoded(gradient().convert("P"))).mode == "RGB"
    cmyk = np.asarray(open_image(encoded(gradient().convert("CMYK"), "JPEG", quality=95))).astype(int)
    assert abs(cmyk - exact).mean() < 5
    grey = np.asarray(open_image(encoded(gradient().convert("L"))))
    assert (grey[..., 0] == grey[..., 2]).all()
    assert image_transform(32, False)(gradient().convert("LA")).shape == (3, 32, 32)
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)  # 16 bits are scaled to 8
    assert abs(np.asarray(open_image(encoded(Image.fromarray(ramp))))[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(content).getpixel((4, 4)) == (255, 0, 0)  # the first frame of an animation
    upright = open_image(encoded(gradient(), "PNG", exif=exif_of(6)))  # the camera was held sideways
    assert np.array_equal(np.asarray(upright), np.asarray(gradient().transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image at all", "not an image in one of the formats JPEG, PNG"),
        (b"", "the image has no bytes"),
        ("nothing.png", "No such file"),
        (encoded(gradient(400, 300))[:1000], "cannot be decoded: .*truncated"),
        (encoded(gradient(400, 300), "JPEG")[:3000], "cannot be decoded: image file is truncated"),
        (encoded(gradient(), "TIFF"), "not an image in one of the formats"),
        (lambda: black(20000, 20000), "20000x20000 pixels, more than the limit|exceeds limit"),
        (lambda: black(9500, 9500), "9500x9500 pixels, more than the limit of 89478485"),
        (black(1, 65000), "1x65000 pixels, its sides differ more than 200 times"),
        (damaged(encoded(gradient(400, 300))), "cannot be decoded"),
    ],
    ids=["text", "empty", "missing", "cut png", "cut jpeg", "tiff", "bomb", "large", "long", "broken"],
)
def test_refused(content, message):
    content = content() if callable(content) else content  # decompression bombs take seconds to make
    with pytest.raises(ImageError, match=message):
        open_image(content)
    if isinstance(content, bytes):
        with pytest.raises(ImageError):
            CroppedImages(16)(content)
    with pytest.raises(ImageError, match="40x30 pixels, more than the limit of 1000"):
        open_image(encoded(gradient()), max_pixels=1000)


def test_broken_files_raise_nothing_else():
    # Decoders raise errors of many classes on broken files, and a data worker must not die of one.
    rng = np.random.default_rng(0)
    exif = exif_of(6)
    exif[0x010F] = "maker"
    for kind in ("JPEG", "WEBP", "PNG"):
        content = np.frombuffer(encoded(gradient(), kind, exif=exif), np.uint8)
        for _ in range(1000):
            broken = content.copy()
            places = rng.integers(0, len(content), 3)
            broken[places] = rng.integers(0, 256, 3)
            with contextlib.suppress(ImageError):
                assert open_image(broken.tobytes()).mode == "RGB"


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_resizing_is_that_of_open_clip(mode, interpolation):
    open_clip = pytest.importorskip("open_clip")
    options = {"resize_mode": mode, "interpolation": interpolation}
    theirs, ours = open_clip.image_transform(32, is_train=False, **options), image_transform(32, False, **options)
    for size in ((90, 60), (33, 71), (32, 32), (1, 40), (500, 17)):
        image = gradient(*size)
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-6, atol=1e-6)
        assert torch.equal(pickle.loads(pickle.dumps(ours))(image), ours(image))
    # OpenCLIP's result for so wide an image has another shape.
    assert image_transform(32, False, resize_mode="longest")(gradient(500, 3)).shape == (3, 32, 32)
    for wrong in ({"resize_mode": "stretch"}, {"interpolation": "nearest"}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
            image_transform(32, False, **wrong)


def test_training_and_evaluation():
    _, train, evaluate = create_model_and_transforms("ViT-T-8-32", uint8=True)
    image = gradient()
    assert train(image).shape == evaluate(image).shape == (3, 32, 32)
    assert not torch.equal(train(image), train(image))
    assert torch.equal(evaluate(image), evaluate(image))
    assert torch.equal(make_transform(32, train=True, scale=(1.0, 1.0), uint8=True)(image), evaluate(image))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close((evaluate(image) / 255 - mean) / std, image_transform(32, False)(image))
    for other in ("a.png", np.zeros((40, 40, 3), np.uint8), None):
        with pytest.raises(TypeError, match=f"takes a PIL image, got {type(other).__name__}"):
            evaluate(other)


@pytest.mark.parametrize("aug_cfg", [None, {"scale": (0.2, 0.6)}, {"scale": (1.0, 1.0)}])
def test_crops_of_aug_cfg_are_those_of_open_clip(aug_cfg):
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.image_transform(32, is_train=True, aug_cfg=aug_cfg)
    ours = create_model_and_transforms("ViT-T-8-32", aug_cfg=aug_cfg)[1]
    typed = create_model_and_transforms("ViT-T-8-32", aug_cfg=open_clip.AugmentationCfg(**aug_cfg or {}))[1]
    for seed in range(3):
        images = []
        for transform in (ours, typed, theirs):
            torch.manual_seed(seed)
            images.append(transform(gradient(90, 60)))
        assert torch.equal(images[0], images[1])
        torch.testing.assert_close(images[0], images[2], rtol=1e-6, atol=1e-6)


def train_transform(**aug_cfg):
    """Return a model's preprocessing for training, whose crop of a square image is by default the whole image."""
    return create_model_and_transforms("ViT-T-8-32", aug_cfg={"scale": (1.0, 1.0), **aug_cfg}, uint8=True)[1]


def test_ratio_jitter_and_grey_of_aug_cfg():
    torch.manual_seed(0)
    crop = train_transform(scale=(0.3, 0.3), ratio=(1.0, 1.0))(gradient(90, 60)).float()
    across, down = (crop[0, 0, -1] - crop[0, 0, 0]), (crop[1, -1, 0] - crop[1, 0, 0])
    # a square crop covers the same number of pixels in both directions
    assert across / (255 / 90) == pytest.approx(down / (255 / 60), abs=2)
    image, jitter = gradient(60, 60), {"color_jitter": (0.5, 0.5, 0.5, 0.1)}
    plain = train_transform()(image)
    assert torch.equal(train_transform(**jitter, color_jitter_prob=0.0)(image), plain)
    grey = train_transform(gray_scale_prob=1.0)(image)
    assert torch.equal(grey[0], grey[1])
    assert not torch.equal(plain[0], plain[1])
    for aug_cfg in ({"color_jitter_prob": 0.3, **jitter}, {"gray_scale_prob": 0.3}):
        transform = train_transform(**aug_cfg)
        changed = sum(not torch.equal(transform(image), plain) for _ in range(200))
        assert 35 < changed < 85  # the number has mean 60 and standard deviation 6.5


@pytest.mark.parametrize(
    ("aug_cfg", "message"),
    [
        ({"scales": (1, 1)}, r"unknown settings \['scales'\]; known: scale, ratio, color_jitter"),
        ({"use_timm": True}, "use_timm=True, which OpenCLIP leaves to timm"),
        ({"scale": 0.5}, "scale must be a range of two positive numbers, got 0.5"),
        ({"color_jitter": (0.1, 0.1, 0.1, 0.1)}, "needs both color_jitter and color_jitter_prob"),
        ({"color_jitter": 0.4, "color_jitter_prob": 0.8}, "color_jitter must be four numbers .*, got 0.4"),
        (3, "aug_cfg must be a dict of settings or OpenCLIP's AugmentationCfg, got 3"),
    ],
)
def test_wrong_settings_of_aug_cfg(aug_cfg, message):
    with pytest.raises(ValueError, match=message):
        create_model_and_transforms("ViT-T-8-32", aug_cfg=aug_cfg)


def crop(data: bytes, size: int, seed: int, **options: object) -> torch.Tensor:
    """Return the random crop of an image file that the preprocessing draws for a seed."""
    torch.manual_seed(seed)
    return CroppedImages(size, **options)(data)


@pytest.mark.parametrize(("width", "height"), [(640, 427), (333, 501), (1023, 767)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.2, 0.5)])
def test_coarse_decoding_is_almost_the_whole(width, height, scale):
    data = jpeg(photograph(width, height))
    for seed in range(2):
        coarse, whole = (crop(data, 96, seed, scale=scale, oversampling=n) for n in (1, math.inf))
        assert (coarse.shape, coarse.dtype) == ((3, 96, 96), torch.uint8)
        assert decibels(coarse, whole) > 35
        torch.manual_seed(seed)
        theirs = make_transform(96, train=True, scale=scale, uint8=True)(open_image(data))
        assert decibels(whole, theirs) > 45  # not equal, since torchvision cuts the crop out before it resizes


def test_crops_of_turned_grey_and_cmyk_files():
    upright = photograph(300, 200)
    turned = jpeg(upright.transpose(Image.Transpose.ROTATE_90), exif=exif_of(6))
    assert decibels(crop(turned, 64, 1), crop(jpeg(upright), 64, 1)) > 30
    for mode in ("L", "CMYK"):
        coarse, whole = (crop(jpeg(upright.convert(mode)), 64, 3, oversampling=n) for n in (1, math.inf))
        assert coarse.shape == (3, 64, 64)
        assert decibels(coarse, whole) > 30

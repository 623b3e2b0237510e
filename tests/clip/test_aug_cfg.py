"""``aug_cfg`` has OpenCLIP's meaning."""

import pickle

import pytest
import torch
from PIL import Image

from clipfast import create_model_and_transforms, image_transform
from clipfast.aug_cfg import training_options


def picture(width: int = 90, height: int = 60) -> Image.Image:
    """An image with colours that differ everywhere."""
    x = torch.linspace(0, 255, width).expand(height, width)
    y = torch.linspace(255, 0, height)[:, None].expand(height, width)
    return Image.fromarray(torch.stack([x, y, (x + y) / 2], -1).byte().numpy())


@pytest.mark.parametrize("aug_cfg", [None, {}, {"scale": (0.2, 0.6)}, {"scale": (1.0, 1.0)}])
def test_crops_are_those_of_open_clip(aug_cfg):
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.image_transform(32, is_train=True, aug_cfg=aug_cfg)
    _, ours, _ = create_model_and_transforms("ViT-T-8-32", aug_cfg=aug_cfg)
    typed = create_model_and_transforms("ViT-T-8-32", aug_cfg=open_clip.AugmentationCfg(**aug_cfg or {}))[1]
    for seed in range(5):
        images = []
        for transform in (ours, typed, theirs):
            torch.manual_seed(seed)
            images.append(transform(picture()))
        assert torch.equal(images[0], images[1])
        torch.testing.assert_close(images[0], images[2], rtol=1e-6, atol=1e-6)


def test_ratio_of_crops():
    train = train_transform(scale=(0.3, 0.3), ratio=(1.0, 1.0))
    for _ in range(10):
        crop = train(picture()).float()
        across, down = (crop[0, 0, -1] - crop[0, 0, 0]), (crop[1, 0, 0] - crop[1, -1, 0])
        # a square crop covers the same number of pixels in both directions
        assert across / (255 / 90) == pytest.approx(down / (255 / 60), abs=2)


def train_transform(**aug_cfg):
    """The preprocessing for training, without a crop of a square image."""
    return create_model_and_transforms("ViT-T-8-32", aug_cfg={"scale": (1.0, 1.0), **aug_cfg}, uint8=True)[1]


def test_jitter_and_grey():
    image = picture(60, 60)
    plain, jitter = train_transform()(image), (0.5, 0.5, 0.5, 0.1)
    assert not torch.equal(train_transform(color_jitter=jitter, color_jitter_prob=1.0)(image), plain)
    assert torch.equal(train_transform(color_jitter=jitter, color_jitter_prob=0.0)(image), plain)
    grey = train_transform(gray_scale_prob=1.0)(image)
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[1], grey[2])
    assert not torch.equal(plain[0], plain[1])


@pytest.mark.parametrize("setting", ["color_jitter_prob", "gray_scale_prob"])
def test_share_of_images(setting):
    torch.manual_seed(0)
    jitter = {"color_jitter": (0.5, 0.5, 0.5, 0.1)} if setting == "color_jitter_prob" else {}
    transform, image = train_transform(**{setting: 0.3}, **jitter), picture(60, 60)
    plain = train_transform()(image)
    changed = sum(not torch.equal(transform(image), plain) for _ in range(200))
    assert 35 < changed < 85  # 60 with a standard deviation of 6.5


@pytest.mark.parametrize(
    ("aug_cfg", "message"),
    [
        ({"scales": (1, 1)}, r"aug_cfg has unknown settings \['scales'\]; known: scale, ratio, color_jitter"),
        ({"use_timm": True}, "aug_cfg has use_timm=True, which OpenCLIP leaves to timm"),
        ({"re_prob": 0.3}, "aug_cfg has re_prob=0.3, which OpenCLIP leaves to timm"),
        ({"scale": 0.5}, "aug_cfg: scale must be a range of two positive numbers, got 0.5"),
        ({"scale": (1.0, 0.5)}, r"aug_cfg: scale must be a range of two positive numbers, got \(1.0, 0.5\)"),
        ({"color_jitter": (0.1, 0.1, 0.1, 0.1)}, "aug_cfg needs both color_jitter and color_jitter_prob"),
        ({"color_jitter": 0.4, "color_jitter_prob": 0.8}, "color_jitter must be four numbers .*, got 0.4"),
        ({"gray_scale_prob": 1.5}, "gray_scale_prob must be a number from 0 to 1, got 1.5"),
        (3, "aug_cfg must be a dict of settings or OpenCLIP's AugmentationCfg, got 3"),
    ],
)
def test_wrong_settings(aug_cfg, message):
    with pytest.raises(ValueError, match=message):
        create_model_and_transforms("ViT-T-8-32", aug_cfg=aug_cfg)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(90, 60), (33, 71), (32, 32), (1, 40), (500, 3)])
def test_resizing_is_that_of_open_clip(size, mode, interpolation):
    open_clip = pytest.importorskip("open_clip")
    options = {"resize_mode": mode, "interpolation": interpolation}
    if mode == "longest" and size == (500, 3):
        size = (500, 17)  # OpenCLIP's makes a side of no pixels
    theirs = open_clip.image_transform(32, is_train=False, **options)(picture(*size))
    ours = image_transform(32, is_train=False, **options)
    torch.testing.assert_close(ours(picture(*size)), theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(picture(*size)), ours(picture(*size)))


def test_wrong_resizing():
    with pytest.raises(ValueError, match="resize_mode must be one of shortest, longest, squash, got 'stretch'"):
        image_transform(32, False, resize_mode="stretch")
    with pytest.raises(ValueError, match="interpolation must be one of bicubic, bilinear, random, got 'nearest'"):
        image_transform(32, False, interpolation="nearest")
    assert image_transform(32, False, resize_mode="longest")(picture(500, 3)).shape == (3, 32, 32)
    assert training_options(None)["scale"] == (0.9, 1.0)

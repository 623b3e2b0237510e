"""OpenCLIP's ``image_transform``, and its configuration of training augmentations (``aug_cfg``)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..kernels.reference import CLIP_MEAN, CLIP_STD
from .images import DEFAULT_RATIO, make_transform

_KNOWN = ("scale", "ratio", "color_jitter", "color_jitter_prob", "gray_scale_prob")
# OpenCLIP passes these settings on to timm, and so clipfast refuses them, except for ``use_timm`` and ``naflex`` if the
# image tower is NaFlex.
_TIMM_ONLY = ("re_prob", "re_count", "use_timm", "naflex")


def image_transform(
    image_size: int | tuple[int, int],
    is_train: bool,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    resize_mode: str | None = None,
    interpolation: str | None = None,
    fill_color: int = 0,
    aug_cfg: Mapping[str, Any] | object | None = None,
    *,
    uint8: bool = False,
) -> Callable[..., Tensor]:
    """Return the preprocessing of images for a model, as ``open_clip.image_transform`` does.

    Args:
        image_size: side of the square result, in pixels.
        is_train: take a random crop and resize it, bicubically; otherwise images are resized as ``resize_mode`` says.
        mean, std: the mean and standard deviation of each channel, or one number for all; default: OpenAI's.
        resize_mode: "shortest" (the default) resizes the shorter side and crops the centre, "longest" resizes the
            longer side and pads with black, "squash" resizes both sides; in evaluation only.
        interpolation: "bicubic" (the default) or "bilinear", in evaluation only; "random" is bicubic.
        fill_color: must be 0.
        aug_cfg: augmentations in training (:func:`training_options`).
        uint8: return bytes, for models that normalise them on the device (a quarter of the traffic).

    Returns:
        A function that turns a PIL image into a tensor [3, image_size, image_size].

    Raises:
        ValueError: the result would not be square, ``fill_color`` is not 0, or another value is unknown.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width:
        raise ValueError(f"image_transform: image_size must be a square, got {height} x {width}")
    if fill_color != 0:
        raise ValueError(f"image_transform: fill_color must be 0, which is black, got {fill_color}")
    means, stds = (
        (given,) * 3 if isinstance(given, int | float) else given or default
        for given, default in ((mean, CLIP_MEAN), (std, CLIP_STD))
    )
    training = training_options(aug_cfg) if is_train else {}
    return make_transform(
        height, train=is_train, uint8=uint8, mean=means, std=stds, interpolation=interpolation or "bicubic",
        resize_mode=resize_mode or "shortest", **training,
    )  # fmt: skip


def training_options(aug_cfg: Mapping[str, Any] | object | None, *, naflex: bool = False) -> dict[str, Any]:
    """Translate OpenCLIP's ``aug_cfg`` into arguments of :func:`clipfast.models.images.make_transform`.

    Args:
        aug_cfg: settings by name, or OpenCLIP's ``AugmentationCfg``. ``scale`` and ``ratio`` are ranges of the random
            crop's share of the area and of its width over its height. ``color_jitter`` (brightness, contrast,
            saturation and hue) changes the share ``color_jitter_prob`` of images, and ``gray_scale_prob`` of them lose
            their colour. None is OpenCLIP's default: crops of 0.9 to 1 of the area.
        naflex: the images are for a NaFlex tower, whose augmentations OpenCLIP leaves to timm: ``use_timm`` and
            ``naflex`` may be set. With ``use_timm``, ``color_jitter`` (one number, or three or four) changes all
            images.

    Raises:
        ValueError: a setting is unknown, has an invalid value, or is one that OpenCLIP passes on to timm.
    """
    raw: Any = aug_cfg or {}
    if dataclasses.is_dataclass(raw) and not isinstance(raw, type):
        raw = dataclasses.asdict(raw)
    if not isinstance(raw, Mapping):
        raise ValueError(f"aug_cfg must be a dict of settings or OpenCLIP's AugmentationCfg, got {aug_cfg!r}")
    unknown = set(raw) - {*_KNOWN, *_TIMM_ONLY}
    if unknown:
        raise ValueError(f"aug_cfg has unknown settings {sorted(unknown)}; known: {', '.join(_KNOWN)}")
    given = {key: value for key, value in raw.items() if value is not None and value is not False}
    uses_timm = naflex and given.pop("use_timm", False)
    if naflex:
        given.pop("naflex", None)
    for key in _TIMM_ONLY:
        if key in given:
            raise ValueError(
                f"aug_cfg has {key}={given[key]!r}, which OpenCLIP leaves to timm: make the transform with "
                "timm.data.create_transform instead, or leave it out"
            )
    scale, ratio = (
        _numbers(key, given.get(key, default), 2) for key, default in (("scale", (0.9, 1.0)), ("ratio", DEFAULT_RATIO))
    )
    return {"scale": scale, "ratio": ratio, "augment": _timm_augment(given) if uses_timm else _augment(given)}


def _augment(given: Mapping[str, Any]) -> list[Any]:
    """Return torchvision's transforms for an ``aug_cfg`` without ``use_timm``: random colour jitter and greyscale."""
    from torchvision.transforms import v2

    steps: list[Any] = []
    if "color_jitter" in given or "color_jitter_prob" in given:
        if not {"color_jitter", "color_jitter_prob"} <= set(given):
            raise ValueError("aug_cfg needs both color_jitter and color_jitter_prob, or neither of them")
        jitter = v2.ColorJitter(*_numbers("color_jitter", given["color_jitter"], 4))
        steps.append(v2.RandomApply([jitter], _probability("color_jitter_prob", given)))
    if "gray_scale_prob" in given:
        steps.append(v2.RandomGrayscale(_probability("gray_scale_prob", given)))
    return steps


def _timm_augment(given: Mapping[str, Any]) -> list[Any]:
    """Return torchvision's transforms for an ``aug_cfg`` with ``use_timm``: the colour jitter that timm would apply."""
    from torchvision.transforms import v2

    for key in ("color_jitter_prob", "gray_scale_prob"):
        if key in given:
            raise ValueError(f"aug_cfg: OpenCLIP ignores {key} if use_timm is set: leave one of them out")
    if "color_jitter" not in given:
        return []
    value = given["color_jitter"]
    if isinstance(value, int | float):
        value = (value,) * 3
    count = 3 if isinstance(value, Sequence) and len(value) == 3 else 4
    return [v2.ColorJitter(*_numbers("color_jitter", value, count))]


def _numbers(key: str, value: Any, count: int) -> tuple[float, ...]:
    """Return ``count`` numbers of a setting of OpenCLIP's ``aug_cfg``; refuse other values."""
    is_right = isinstance(value, Sequence) and len(value) == count and all(isinstance(x, int | float) for x in value)
    if not is_right or (count == 2 and not 0 < value[0] <= value[1]):
        what = (
            "a range of two positive numbers" if count == 2 else "four numbers (brightness, contrast, saturation, hue)"
        )
        raise ValueError(f"aug_cfg: {key} must be {what}, got {value!r}")
    return tuple(value)


def _probability(key: str, given: Mapping[str, Any]) -> float:
    """Return the probability that a setting of OpenCLIP's ``aug_cfg`` has; refuse other values."""
    value = given[key]
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"aug_cfg: {key} must be a number from 0 to 1, got {value!r}")
    return float(value)

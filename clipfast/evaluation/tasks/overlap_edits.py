"""How many near duplicates would be found: edited copies of test images, as if they were in the training data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...images import compressed
from ..encoder import Encoder
from ..features import LabelledFeatures
from ..labelled import LabelledSet
from ..neighbours import nearest
from .overlap_pairs import Pairs

if TYPE_CHECKING:
    from PIL import Image


def half_size(image: Image.Image) -> Image.Image:
    """Return an image with half as many pixels in each direction."""
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)))


def crop(image: Image.Image) -> Image.Image:
    """Return an image without a thirty-second of its width and height at each side, which is at least one pixel."""
    x, y = (max(1, side // 32) if side > 2 else 0 for side in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


def brighter(image: Image.Image) -> Image.Image:
    """Return an image with each value a fifth larger."""
    from PIL import ImageEnhance

    return ImageEnhance.Brightness(image).enhance(1.2)


def darker(image: Image.Image) -> Image.Image:
    """Return an image with each value a fifth smaller."""
    from PIL import ImageEnhance

    return ImageEnhance.Brightness(image).enhance(0.8)


def mirror(image: Image.Image) -> Image.Image:
    """Return an image with left and right exchanged."""
    from PIL import ImageOps

    return ImageOps.mirror(image)


def grey(image: Image.Image) -> Image.Image:
    """Return an image without its colours."""
    return image.convert("L").convert("RGB")


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg 75": functools.partial(compressed, quality=75), "half size": half_size, "darker": darker,
    "brighter": brighter, "crop 1/32": crop, "mirror": mirror, "grey": grey,
}  # fmt: skip


def planted(
    detector: Encoder,
    images: LabelledSet,
    test: LabelledFeatures,
    pairs: Pairs,
    thresholds: Sequence[float],
    count: int,
) -> list[dict[str, Any]]:
    """Return how many of some test images would be found if the training data had edited copies of them.

    The images are drawn by a fixed seed.

    Args:
        detector: the encoder of the features.
        images: the test set.
        test: its features.
        pairs: of test images and training images as they are.
        thresholds: similarities from which on an image is a near duplicate.
        count: how many images; at most all.

    Returns:
        For each threshold and edit the share that is found ("recall"), and the share of planted ones among all images
        that are marked then ("precision"): an image that is marked for another reason counts as wrong, be it a near
        duplicate or not.
    """
    drawn = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))[:count].sort().values
    originals = test.features[drawn].to(detector.device)
    edited = _edited(detector, images.only([test.numbers[place] for place in drawn.tolist()]))
    rows = []
    for name, features in edited.items():
        similarity = torch.maximum(pairs.similarity, nearest(test.features, features.cpu())[0][:, 0])
        similarity[drawn] = (originals * features).sum(1).cpu()
        for threshold in thresholds:
            found, marked = int((similarity[drawn] >= threshold).sum()), int((similarity >= threshold).sum())
            shares = {"recall": found / len(drawn), "precision": found / marked if marked else None}
            rows.append({"threshold": threshold, "edit": name, "images": len(drawn), **shares})
    return rows


def _edited(detector: Encoder, images: LabelledSet, batch_size: int = 256) -> dict[str, torch.Tensor]:
    """Return the features of each image after each of the edits."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in EDITS}
    originals: list[Image.Image] = []

    def encode() -> None:
        for name, edit in EDITS.items():
            found[name].append(detector.images(torch.stack([detector.transform(edit(image)) for image in originals])))
        originals.clear()

    for item in images:
        originals.append(item.image)
        if len(originals) == batch_size:
            encode()
    if originals:
        encode()
    return {name: torch.cat(features) for name, features in found.items()}

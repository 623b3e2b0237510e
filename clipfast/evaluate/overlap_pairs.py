"""Near duplicates of training images in a test set, and accuracy without them (Radford et al. 2021, section 5)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ..models.images import compressed
from .encoder import Encoder, PreparedEncoder
from .features import LabelledFeatures, encode_set
from .intervals import wilson
from .labelled import LabelledSet
from .neighbours import nearest
from .significance import binomial_tail, clopper_pearson

LEVEL = 0.995  # confidence level of the interval of the accuracy on near duplicates, as in Radford et al. 2021
THRESHOLDS = (0.9, 0.95, 0.97, 0.98, 0.99, 1.0)  # thresholds of similarity that are reported besides the chosen one


@dataclasses.dataclass
class Pairs:
    """For each test image, the training image that is most similar to it.

    Attributes:
        similarity: [N], the similarity of each pair, at most 1; 1 for equal pixels.
        places: [N], the position of the training image of each pair.
        same: [N], True where all pixels are equal.
    """

    similarity: Tensor
    places: Tensor
    same: Tensor

    def overlap(self, threshold: float) -> Tensor:
        """Return a mask [N] of the test images that are near duplicates of a training image."""
        return self.similarity >= threshold


def pair(
    test: LabelledFeatures,
    train: LabelledFeatures,
    device: str | torch.device = "cpu",
    progress: Callable[[list[Tensor]], Iterable[Tensor]] = iter,
) -> Pairs:
    """Find the most similar training image for each test image, which may be a near duplicate of it.

    Args:
        test, train: the sets, with features of unit length from the same encoder.
        device: the device that computes the similarities.
        progress: as :func:`~clipfast.evaluate.neighbours.nearest` takes it.

    Raises:
        ValueError: a feature is not finite.
    """
    scores, places = (
        found[:, 0].cpu() for found in nearest(test.features, train.features, device=device, progress=progress)
    )
    first: dict[bytes, int] = {}
    for place, digest in enumerate(train.digests):
        first.setdefault(digest, place)
    same = torch.tensor([digest in first for digest in test.digests])
    equal = torch.tensor([first.get(digest, 0) for digest in test.digests])
    return Pairs(scores.float().clamp(max=1.0).where(~same, torch.tensor(1.0)), places.where(~same, equal), same)


def contamination(right: Tensor, overlap: Tensor) -> dict[str, Any]:
    """Return accuracy on all test images, on near duplicates ("overlap") and the others ("clean"), and the difference.

    Args:
        right: [N], True for test images that are classified correctly.
        overlap: [N], True for near duplicates.

    Returns:
        "metrics", "intervals" and the number of "images". The p-value is that of a one-tailed binomial test: the
        probability of at least as many right near duplicates if these were as easy as the other images. Figures of a
        subset without images are None.
    """
    metrics: dict[str, float | None] = {"overlap": overlap.double().mean().item()}
    intervals: dict[str, tuple[float, float] | None] = {"overlap": wilson(int(overlap.sum()), len(right))}
    counts, parts = {}, {"all": right, "overlap": right[overlap], "clean": right[~overlap]}
    for name, part in parts.items():
        hits, count = int(part.sum()), len(part)
        key = "acc1" if name == "all" else f"acc1_{name}"
        counts[name], metrics[key], intervals[key] = count, None, None
        if count:
            metrics[key] = hits / count
            intervals[key] = clopper_pearson(hits, count, LEVEL) if name == "overlap" else wilson(hits, count)
    clean = metrics["acc1_clean"]
    metrics["acc1_all_minus_clean"] = None if clean is None else int(right.sum()) / len(right) - clean
    metrics["p_value"] = None
    if clean is not None and counts["overlap"]:
        metrics["p_value"] = binomial_tail(int(parts["overlap"].sum()), counts["overlap"], clean)
    return {"metrics": metrics, "intervals": intervals, "images": counts}


def half_size(image: Image.Image) -> Image.Image:
    """Halve the width and height of an image, as an edited copy that the duplicate detector should find."""
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)))


def crop(image: Image.Image) -> Image.Image:
    """Crop 1/32 of an image, at least a pixel, at each side, as an edited copy that the detector should find."""
    x, y = (max(1, side // 32) if side > 2 else 0 for side in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Multiply all pixel values of an image by a factor, as an edited copy that the duplicate detector should find."""
    return ImageEnhance.Brightness(image).enhance(factor)


def grey(image: Image.Image) -> Image.Image:
    """Remove the colours of an image, as an edited copy that the duplicate detector should find."""
    return image.convert("L").convert("RGB")


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg 75": functools.partial(compressed, quality=75), "half size": half_size,
    "darker": functools.partial(brightness, factor=0.8), "brighter": functools.partial(brightness, factor=1.2),
    "crop 1/32": crop, "mirror": ImageOps.mirror, "grey": grey,
}  # fmt: skip


def planted(
    detector: Encoder, images: LabelledSet, test: LabelledFeatures, pairs: Pairs, thresholds: Sequence[float],
    count: int, workers: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Test the duplicate detector: how many test images would it find if the training data had edited copies of them?

    The images are drawn with a fixed seed.

    Args:
        detector: the encoder that computed the features.
        images: the test set.
        test: the features of the test set.
        pairs: the most similar training image of each test image.
        thresholds: an image is a near duplicate if its similarity is at least the threshold.
        count: the number of images to draw; at most all are drawn.
        workers: the number of processes that read and edit images.

    Returns:
        For each threshold and edit, "recall" is the share of the drawn images that are found, and "precision" is the
        share of the drawn images among all images that are found. Any other image that is found counts as wrong, even
        a true near duplicate.
    """
    drawn = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))[:count].sort().values
    part = images.only([test.numbers[place] for place in drawn.tolist()])
    encoders = [PreparedEncoder.of(detector, edit) for edit in EDITS.values()]
    # The batch is small, since it holds all edited copies of its images at once.
    edited = encode_set(encoders, part, batch_size=32, workers=workers)
    originals, rows = test.features[drawn].to(detector.device), []
    for name, found in zip(EDITS, edited, strict=True):
        similarity = torch.maximum(pairs.similarity, nearest(test.features, found.features)[0][:, 0])
        similarity[drawn] = (originals * found.features.to(detector.device)).sum(1).cpu()
        for threshold in thresholds:
            hits, marked = int((similarity[drawn] >= threshold).sum()), int((similarity >= threshold).sum())
            shares = {"recall": hits / len(drawn), "precision": hits / marked if marked else None}
            rows.append({"threshold": threshold, "edit": name, "images": len(drawn), **shares})
    return rows

"""Near duplicates of training images in a test set, and accuracy without them (Radford et al. 2021, section 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..features import LabelledFeatures
from ..intervals import wilson
from ..neighbours import nearest
from ..significance import binomial_tail, clopper_pearson

LEVEL = 0.995  # of the interval of the accuracy on near duplicates, as in the paper
THRESHOLDS = (0.9, 0.95, 0.97, 0.98, 0.99, 1.0)  # that are shown beside the chosen one


@dataclasses.dataclass
class Pairs:
    """The training image that is most similar to each test image.

    Attributes:
        similarity: [N], at most 1; 1 for equal pixels.
        places: [N], of the training images.
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
    """Return the pairs of two sets. An image with the same pixels is the most similar one, the first if there are more.

    Args:
        test, train: the sets, with features of unit length by the same encoder.
        device: computes the similarities.
        progress: as :func:`~clipfast.evaluation.neighbours.nearest` takes it.

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
    """Return accuracy on all images, the near duplicates ("overlap") and the others ("clean"), and the difference.

    Args:
        right: [N], True for test images whose class is right.
        overlap: [N], True for near duplicates.

    Returns:
        "metrics", "intervals" and the number of "images". The p-value is the probability of as many right near
        duplicates, or more, if they were as easy as the others: a one-tailed binomial test. What a subset without
        images would say is None.
    """
    counts = {"all": len(right), "overlap": int(overlap.sum()), "clean": int((~overlap).sum())}
    hits = {"all": int(right.sum()), "overlap": int(right[overlap].sum()), "clean": int(right[~overlap].sum())}
    acc1 = {name: hits[name] / counts[name] if counts[name] else None for name in counts}
    within = {name: wilson(hits[name], counts[name]) if counts[name] else None for name in ("all", "clean")}
    exact = clopper_pearson(hits["overlap"], counts["overlap"], LEVEL) if counts["overlap"] else None
    clean = acc1["clean"]
    tail = None if clean is None or exact is None else binomial_tail(hits["overlap"], counts["overlap"], clean)
    return {
        "metrics": {
            "overlap": counts["overlap"] / counts["all"],
            "acc1": acc1["all"],
            "acc1_overlap": acc1["overlap"],
            "acc1_clean": clean,
            "acc1_all_minus_clean": None if clean is None else hits["all"] / counts["all"] - clean,
            "p_value": tail,
        },
        "intervals": {
            "overlap": wilson(counts["overlap"], counts["all"]),
            "acc1": within["all"],
            "acc1_overlap": exact,
            "acc1_clean": within["clean"],
        },
        "images": counts,
    }

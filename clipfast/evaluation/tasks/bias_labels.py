"""Labels that are added to the classes, and which of all labels a model gives to images (Radford et al. 2021, 7.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .bias_groups import Grouping


def read_added_labels(path: Path, classnames: Sequence[str]) -> dict[str, list[str]]:
    """Return the labels of each category in a file with lines of a category, a tab and a label.

    Args:
        path: the file.
        classnames: names of the classes in prompts, which no label may have.

    Raises:
        ValueError: there is no such file, it is empty, a line has another form, or a label is there twice.
    """
    if not path.is_file():
        raise ValueError(f"--added-labels: there is no file {path}")
    found: dict[str, list[str]] = {}
    known = set(classnames)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        category, _, label = (part.strip() for part in line.partition("\t"))
        if not category or not label:
            raise ValueError(f"{path}, line {number}: must be a category, a tab and a label, got {line!r}")
        if label in known:
            raise ValueError(f"{path}, line {number}: the label {label!r} is there before, here or among the classes")
        known.add(label)
        found.setdefault(category, []).append(label)
    if not found:
        raise ValueError(f"{path} is empty")
    return found


class Assigned(NamedTuple):
    """The labels that a model gives to images.

    Attributes:
        right: [N], True where the best class is the image's own; added labels do not compete.
        best: [N], the number of the best of all labels, the classes and after them the added ones.
        above: for each threshold and each grouping the images of each group whose probability of a label is above it,
            [G, L].
    """

    right: Tensor
    best: Tensor
    above: list[list[Tensor]]


@torch.no_grad()
def assign(
    features: Tensor, weights: Tensor, scale: float, classes: Tensor, count: int, groupings: Sequence[Grouping],
    thresholds: Sequence[float], block: int = 4096,
) -> Assigned:  # fmt: skip
    """Return the labels of images. Only the scores of ``block`` images are held at a time.

    Args:
        features: of the images [N, D], of unit length.
        weights: of all labels [D, L], the classes first.
        scale: what similarities are multiplied by before the softmax over all labels, as in training.
        classes: [N], the number of each image's class.
        count: of classes.
        groupings: the groups of the images.
        thresholds: of the probability.
        block: how many images to score at once.

    Raises:
        ValueError: a score is not finite.
    """
    right, best = [], []
    above = [[torch.zeros(len(one.names), weights.shape[1], dtype=torch.long) for one in groupings] for _ in thresholds]
    for numbers in torch.arange(len(features)).split(block):
        scores = (features[numbers] @ weights).float().cpu()
        if not scores.isfinite().all():
            raise ValueError("bias: features contain NaN or infinity")
        right.append(scores[:, :count].argmax(1) == classes[numbers])
        best.append(scores.argmax(1))
        shares = (scale * scores).softmax(1)
        for threshold, totals in zip(thresholds, above, strict=True):
            for one, total in zip(groupings, totals, strict=True):
                total += one.part(numbers).hits(shares > threshold)
    return Assigned(torch.cat(right), torch.cat(best), above)

"""Find pairs of features whose cosine reaches a threshold, and the groups that such pairs link, to find duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.common import slices

if TYPE_CHECKING:
    from ..evaluate.encoder import Encoder

ROWS, COLUMNS = 8192, 1024  # the size of the block of float32 similarities that is in memory at a time, 32 MiB
RESCORED = 1 << 20  # cosines in float64 convert this many elements of features at once
MOST_PAIRS = 50_000_000


class Pairs(NamedTuple):
    """Pairs of similar features, sorted by the first feature and then by the second.

    Attributes:
        places: [P, 2], int64: the positions of both features; the smaller one comes first.
        similarity: [P], float64: the cosine of each pair.
    """

    places: Tensor
    similarity: Tensor


@torch.no_grad()
def similar_pairs(
    features: Tensor, threshold: float, *, device: str | torch.device | None = None,
    progress: Callable[[list[slice]], Iterable[slice]] = iter,
) -> Pairs:  # fmt: skip
    """Find all pairs of embeddings whose cosine is at least a threshold, exactly: no N x N matrix ever exists.

    Each pair is compared once, in float32. Pairs whose cosine is within rounding of the threshold are then compared in
    float64, and so the result does not depend on the blocks. Equal features have a cosine of exactly 1.

    Args:
        features: [N, D] of floats, of any length except 0. They may lie in CPU memory; they go to the device block by
            block.
        threshold: from -1 to 1.
        device: the device that computes the similarities; default: the device of the features.
        progress: wraps the list of blocks of rows, as tqdm does.

    Returns:
        The pairs, on the CPU.

    Raises:
        ValueError: a feature is not finite or has no length, or more than 50 million pairs reach the threshold.
    """
    check_features(features)
    device = features.device if device is None else torch.device(device)
    least = threshold - _rounding(features.shape[1])
    buffer = torch.empty(ROWS * COLUMNS, device=device)
    found, count = [torch.empty(0, 2, dtype=torch.int64)], 0
    for rows in progress(list(slices(len(features), ROWS))):
        block = unit(features[rows], device)
        for columns in slices(len(features), COLUMNS):
            if columns.stop <= rows.start:
                continue
            left = block[: columns.stop - rows.start]  # only rows on or above the diagonal, to compare each pair once
            tile = buffer[: len(left) * (columns.stop - columns.start)].view(len(left), -1)
            torch.mm(left, unit(features[columns], device).T, out=tile)
            if tile.amax() < least:
                continue
            places = (tile >= least).nonzero() + torch.tensor([rows.start, columns.start], device=device)
            found.append(places[places[:, 0] < places[:, 1]].cpu())
            count += len(found[-1])
            if count > MOST_PAIRS:
                raise ValueError(
                    f"more than {MOST_PAIRS:,} pairs have a similarity of {threshold:g} or more: raise the threshold"
                )
    places = torch.cat(found)
    similarity = cosines_of_pairs(features, places)
    places, similarity = places[similarity >= threshold], similarity[similarity >= threshold]
    order = (places[:, 0] * len(features) + places[:, 1]).argsort()
    return Pairs(places[order], similarity[order])


def linked(pairs: Tensor, count: int) -> Tensor:
    """Return the connected component of each item in the graph whose edges are the pairs: groups of duplicates.

    Args:
        pairs: the positions of the items of each pair, [P, 2], int64.
        count: the number of items.

    Returns:
        [count], int64: the first item of each item's group. An item without a pair is a group of its own.
    """
    groups = torch.arange(count)
    a, b = pairs.unbind(1)
    while True:
        least = torch.minimum(groups[a], groups[b])
        # For each pair, the root (first item) of both items' groups takes the smaller of the two roots as its own. Then
        # every item takes the root of its root, until nothing changes.
        joined = groups.clone()
        for side in (a, b):
            joined.scatter_reduce_(0, groups[side], least, "amin")
        while not torch.equal(joined, joined[joined]):
            joined = joined[joined]
        if torch.equal(joined, groups):
            return groups
        groups = joined


def _rounding(width: int) -> float:
    """Return a bound for the rounding error of a float32 inner product of two embeddings of unit length."""
    if torch.get_float32_matmul_precision() != "highest":
        return 2**-6  # below the precision "highest", a GPU may multiply in bfloat16
    return (width + 8) * 2**-24


def check_features(features: Tensor) -> None:
    """Raise ValueError if a feature has no cosine, before duplicates or clusters are searched.

    Raises:
        ValueError: a feature is not finite, or has length 0.
    """
    for start in range(0, len(features), ROWS):
        lengths = torch.linalg.vector_norm(features[start : start + ROWS].double(), dim=1)
        wrong = (~(lengths.isfinite() & (lengths > 0))).nonzero()
        if len(wrong):
            kind = "has no length" if lengths[wrong[0]] == 0 else "contains NaN or infinity"
            raise ValueError(f"feature {start + int(wrong[0])} {kind}")


def unit(features: Tensor, device: torch.device) -> Tensor:
    """Return embeddings [N, D] on a device, scaled to unit length, in float32."""
    found = features.to(device).float()
    return found / torch.linalg.vector_norm(found, dim=1, keepdim=True, dtype=torch.float64).float()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each embedding in ``a`` [N, D] and that in the same row of ``b``: [N], float64, CPU."""
    found = [torch.empty(0, dtype=torch.float64)]
    rows = max(1, RESCORED // max(1, a.shape[1]))
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        x, y = x.double(), y.double()
        # With one square root of the product of both squared norms, equal features have a cosine of exactly 1, because
        # the square root of a square is exact.
        found.append(((x * y).sum(1) / ((x * x).sum(1) * (y * y).sum(1)).sqrt()).clamp(-1, 1).cpu())
    return torch.cat(found)


def cosines_of_pairs(features: Tensor, places: Tensor) -> Tensor:
    """Return the cosine of each pair of embeddings, given their positions [P, 2], as [P], float64, on the CPU."""
    blocks = places.to(features.device).split(max(1, RESCORED // max(1, features.shape[1])))
    return torch.cat([cosines(*(features[side] for side in block.unbind(1))) for block in blocks])


def probabilities(encoder: Encoder, images: Tensor, classifier: Tensor) -> Tensor:
    """Return the zero-shot probability of each class for each embedded image, [N, C], on the CPU.

    Args:
        encoder: its model has the scale of the logits. If it also has a bias, as SigLIP does, each class gets a
            probability of its own by the sigmoid; otherwise a softmax over the classes is taken.
        images: the features of the images, of unit length, [N, D].
        classifier: the classifier's weights [D, C].
    """
    import torch

    model: Any = encoder.model
    with torch.no_grad():
        logits = model.logit_scale.exp() * (images @ classifier)
        if model.logit_bias is None:
            return logits.softmax(1).cpu()
        return (logits + model.logit_bias).sigmoid().cpu()

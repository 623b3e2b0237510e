"""Pairs of features that are at least as similar as a threshold, block by block, and the groups that they link."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.common import slices

ROWS, COLUMNS = 8192, 1024  # of the block of similarities that exists at a time: 32 MiB
RESCORED = 1 << 20  # elements of features that are widened to float64 at once
MOST_PAIRS = 50_000_000


class Pairs(NamedTuple):
    """Pairs of features, in rising order of the first and then of the second one.

    Attributes:
        places: [P, 2], int64; the first of each pair is the smaller one.
        similarity: [P], float64: the cosines.
    """

    places: Tensor
    similarity: Tensor


@torch.no_grad()
def similar_pairs(
    features: Tensor, threshold: float, *, device: str | torch.device | None = None,
    progress: Callable[[list[slice]], Iterable[slice]] = iter,
) -> Pairs:  # fmt: skip
    """Find all pairs whose cosine is at least a threshold, exactly: no N x N matrix ever exists.

    Each pair is looked at once, in float32. Those that come within rounding of the threshold are then decided in
    float64, so the answer does not depend on the blocks. Equal features have a cosine of exactly 1.

    Args:
        features: [N, D], float32, float16, bfloat16 or float64, of any length but 0. They may stay in the memory of the
            CPU, and go to the device block by block.
        threshold: from -1 to 1.
        device: computes the similarities; by default that of the features.
        progress: wraps the list of blocks of rows, as tqdm does.

    Returns:
        The pairs, on the CPU.

    Raises:
        ValueError: the features are no matrix, one of them is not finite or has no length, the threshold is out of
            range, or more than 50 million pairs reach it.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features must be [N, D] of floats, got {[*features.shape]} of {features.dtype}")
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be from -1 to 1, got {threshold}")
    device = features.device if device is None else torch.device(device)
    scales = _inverse_lengths(features)
    least = threshold - _rounding(features.shape[1])
    buffer = torch.empty(ROWS * COLUMNS, device=device)
    found, count = [torch.empty(0, 2, dtype=torch.int64)], 0
    for rows in progress(list(slices(len(features), ROWS))):
        block = _unit(features, scales, rows, device)
        for columns in slices(len(features), COLUMNS):
            if columns.stop <= rows.start:
                continue
            left = block[: columns.stop - rows.start]  # those below are looked at as columns of other blocks
            tile = buffer[: len(left) * (columns.stop - columns.start)].view(len(left), -1)
            torch.mm(left, _unit(features, scales, columns, device).T, out=tile)
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
    similarity = cosines(features, places)
    places, similarity = places[similarity >= threshold], similarity[similarity >= threshold]
    order = (places[:, 0] * len(features) + places[:, 1]).argsort()
    return Pairs(places[order], similarity[order])


def linked(pairs: Tensor, count: int) -> Tensor:
    """Return the group of each of ``count`` items: the first item that it is linked with, through any chain of pairs.

    Args:
        pairs: places [P, 2], int64.
        count: of the items.

    Returns:
        [count], int64. An item that is in no pair is its own group.
    """
    groups = torch.arange(count)
    a, b = pairs.unbind(1)
    while True:
        least = torch.minimum(groups[a], groups[b])
        # the root of either side learns of the smaller group, and so does all that points to it
        joined = groups.clone()
        for side in (a, b):
            joined.scatter_reduce_(0, groups[side], least, "amin")
        while not torch.equal(joined, joined[joined]):
            joined = joined[joined]
        if torch.equal(joined, groups):
            return groups
        groups = joined


def _rounding(width: int) -> float:
    """Return how far a product of unit features can be from their cosine."""
    if torch.get_float32_matmul_precision() != "highest":
        return 2**-6  # of products in bfloat16
    return (width + 8) * 2**-24


def _inverse_lengths(features: Tensor) -> Tensor:
    """Return 1 / |x| of each feature, float32.

    Raises:
        ValueError: a feature is not finite, or has no length.
    """
    lengths = torch.cat([torch.linalg.vector_norm(x.double(), dim=1) for x in features.split(ROWS)] or [features[:, 0]])
    wrong = (~(lengths.isfinite() & (lengths > 0))).nonzero()
    if len(wrong):
        what = "has no length" if lengths[wrong[0]] == 0 else "contains NaN or infinity"
        raise ValueError(
            f"feature {int(wrong[0])} {what} ({len(wrong):,} of {len(features):,} features cannot be used)"
        )
    return (1 / lengths).float()


def _unit(features: Tensor, scales: Tensor, rows: slice, device: torch.device) -> Tensor:
    """Return some of the features with unit length, float32, on the device."""
    return features[rows].to(device).float() * scales[rows, None].to(device)


def cosines(features: Tensor, places: Tensor) -> Tensor:
    """Return the cosines of pairs, float64, on the CPU."""
    found = [torch.empty(0, dtype=torch.float64)]
    for some in places.split(max(1, RESCORED // max(1, features.shape[1]))):
        a, b = (features[side.to(features.device)].double() for side in some.unbind(1))
        # the root of a square is exact, so equal features have a cosine of exactly 1
        found.append(((a * b).sum(1) / ((a * a).sum(1) * (b * b).sum(1)).sqrt()).clamp(-1, 1).cpu())
    return torch.cat(found)

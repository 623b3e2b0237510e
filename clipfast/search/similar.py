"""Cosines of features, pairs that are at least as similar as a threshold, and the groups that such pairs link."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.common import slices

if TYPE_CHECKING:
    from ..evaluate.encoder import Encoder

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
        features: [N, D] of floats, of any length but 0. They may stay in the memory of the CPU, and go to the device
            block by block.
        threshold: from -1 to 1.
        device: computes the similarities; by default that of the features.
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
            left = block[: columns.stop - rows.start]  # those below are looked at as columns of other blocks
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


def check_features(features: Tensor) -> None:
    """Refuse features without a direction.

    Raises:
        ValueError: a feature is not finite, or has no length.
    """
    for start in range(0, len(features), ROWS):
        lengths = torch.linalg.vector_norm(features[start : start + ROWS].double(), dim=1)
        wrong = (~(lengths.isfinite() & (lengths > 0))).nonzero()
        if len(wrong):
            kind = "has no length" if lengths[wrong[0]] == 0 else "contains NaN or infinity"
            raise ValueError(f"feature {start + int(wrong[0])} {kind}")


def unit(features: Tensor, device: torch.device) -> Tensor:
    """Return features with unit length, float32, on a device."""
    found = features.to(device).float()
    return found / torch.linalg.vector_norm(found, dim=1, keepdim=True, dtype=torch.float64).float()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each row of one matrix with that row of another one, float64, on the CPU."""
    found = [torch.empty(0, dtype=torch.float64)]
    rows = max(1, RESCORED // max(1, a.shape[1]))
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        x, y = x.double(), y.double()
        # the root of a square is exact, so equal features have a cosine of exactly 1
        found.append(((x * y).sum(1) / ((x * x).sum(1) * (y * y).sum(1)).sqrt()).clamp(-1, 1).cpu())
    return torch.cat(found)


def cosines_of_pairs(features: Tensor, places: Tensor) -> Tensor:
    """Return the cosines of the pairs of features at these places [P, 2], float64, on the CPU."""
    blocks = places.to(features.device).split(max(1, RESCORED // max(1, features.shape[1])))
    return torch.cat([cosines(*(features[side] for side in block.unbind(1))) for block in blocks])


def probabilities(encoder: Encoder, images: Tensor, classifier: Tensor) -> Tensor:
    """Return the probability of each class for each image, [N, C], on the CPU.

    Args:
        encoder: gives the scale of the logits, and their bias if the model has one: then each class is judged alone.
        images: unit features [N, D].
        classifier: weights [D, C].
    """
    import torch

    model: Any = encoder.model
    with torch.no_grad():
        logits = model.logit_scale.exp() * (images @ classifier)
        if model.logit_bias is None:
            return logits.softmax(1).cpu()
        return (logits + model.logit_bias).sigmoid().cpu()

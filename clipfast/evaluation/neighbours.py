"""Exact nearest neighbours among features, block by block: no matrix of all similarities ever exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

QUERIES = 1024  # that are compared at once
GALLERY = 8192  # items that they are compared with


@torch.no_grad()
def nearest(
    queries: Tensor,
    gallery: Tensor,
    k: int = 1,
    *,
    device: str | torch.device | None = None,
    progress: Callable[[list[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[Tensor, Tensor]:
    """Return the k items of a gallery that are most similar to each query, the best first.

    The similarity is the product of features, which is the cosine if they are of unit length. Beyond the features and
    the results, memory is that of one block of 1,024 x 8,192 similarities: 32 MiB in float32, and a few MiB to choose
    from. Features may stay in the memory of the CPU, and go to the device block by block. Items that are equally
    similar come in any order.

    Args:
        queries: [N, D] of any float dtype.
        gallery: [M, D] of the same dtype.
        k: how many items; there are fewer if the gallery has fewer.
        device: computes the similarities; by default that of the queries.
        progress: wraps the list of blocks of queries, as tqdm does.

    Returns:
        Similarities and places in the gallery, both [N, min(k, M)], on the device of the queries.

    Raises:
        ValueError: shapes do not fit together, k is below 1, or a similarity is not finite.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {[*queries.shape]} and {[*gallery.shape]}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    device = queries.device if device is None else device
    k = min(k, len(gallery))
    found = [_nearest_of_block(block.to(device), gallery, k) for block in progress(list(queries.split(QUERIES)))]
    scores = torch.cat([scores for scores, _ in found]) if found else queries.new_empty(0, k)
    places = torch.cat([places for _, places in found]) if found else torch.empty(0, k, dtype=torch.long)
    if not scores.isfinite().all():
        raise ValueError("nearest neighbours: features contain NaN or infinity")
    return scores.to(queries.device), places.to(queries.device)


def _nearest_of_block(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = queries.new_full((len(queries), k), float("-inf"))
    places = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
    for start in range(0, len(gallery), GALLERY):
        tile = queries @ gallery[start : start + GALLERY].to(queries.device).T
        # after the first few blocks hardly a row has anything better than what was found; NaN counts as better
        rows = (~(tile.amax(1) <= best[:, -1])).nonzero().squeeze(1)
        scores, columns = tile[rows].topk(min(k, tile.shape[1]), dim=1)
        both = torch.cat([best[rows], scores], 1)
        best[rows], order = both.topk(k, dim=1)
        places[rows] = torch.cat([places[rows], columns + start], 1).gather(1, order)
    return best, places

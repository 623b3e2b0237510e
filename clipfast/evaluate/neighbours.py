"""Exact nearest neighbours among features, for retrieval and overlap, without the matrix of all similarities."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..kernels import top_k

QUERIES = 1024  # the number of queries in a block, which is compared at once and is a step of the progress bar


def nearest(
    queries: Tensor,
    gallery: Tensor,
    k: int = 1,
    *,
    device: str | torch.device | None = None,
    progress: Callable[[list[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[Tensor, Tensor]:
    """Return the k items (images or texts) of a gallery that are most similar to each query, the best first.

    The similarity is the inner product of features, which is the cosine for features of unit length.

    Args:
        queries: [N, D] of any float dtype.
        gallery: [M, D] of the same dtype.
        k: the number of items for each query; a smaller gallery gives fewer.
        device: the device that computes the similarities; default: the device of the queries.
        progress: wraps the list of blocks of queries, as tqdm does.

    Returns:
        The similarities and the positions in the gallery, both [N, min(k, M)], on the device of the queries.

    Raises:
        ValueError: shapes do not fit together, k is below 1, or a feature is not finite.
    """
    if not all(rows.isfinite().all() for x in (queries, gallery) for rows in x.split(1 << 16)):
        raise ValueError("nearest neighbours: features contain NaN or infinity")
    device = queries.device if device is None else device
    gallery = gallery.to(device)
    found = [top_k(block.to(device), gallery, k) for block in progress(list(queries.split(QUERIES)))]
    scores, places = (torch.cat(parts)[:, : len(gallery)].to(queries.device) for parts in zip(*found, strict=True))
    return scores, places

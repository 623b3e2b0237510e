"""Recall of images by text and of text by images, without the full matrix of scores."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def retrieval_ranks(
    queries: Tensor, gallery: Tensor, query_groups: Tensor, gallery_groups: Tensor, block: int = 1024
) -> Tensor:
    """For each query, how many wrong items of the gallery come before its best right one.

    An item is right if its group is the query's. A wrong item with the same score counts as before it, so that a
    collapsed model, for which all scores are equal, gets no credit.

    Args:
        queries, gallery: features [Q, D] and [N, D] of unit length.
        query_groups, gallery_groups: [Q] and [N] integers.
        block: queries scored at once; memory is O(block N).

    Returns:
        [Q] int64; 0 is a hit at rank 1, and a query with nothing right in the gallery gets N.

    Raises:
        ValueError: a feature is not finite; comparisons with NaN would make it a perfect score.
    """
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("retrieval: features contain NaN or infinity")
    ranks = []
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ gallery.T
        right = query_groups[start : start + block, None] == gallery_groups[None, :]
        best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~right).sum(1))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def recall_at(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries with a right item among the first k: ``{"R@1": ..., ...}``."""
    return {f"R@{k}": (ranks < k).double().mean().item() for k in ks}

"""Recall of images by text and of text by images, without the full matrix of scores."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def retrieval_ranks(
    queries: Tensor, gallery: Tensor, query_keys: Tensor, gallery_keys: Tensor, block: int = 1024
) -> Tensor:
    """For each query of N pairs, how many wrong items of the gallery come before its best right one.

    Pair i joins query i and item i. Several queries may be the same thing, such as one caption of many images, and so
    may several items: then they have the same key. An item is right for a query if some pair joins their keys. A wrong
    item with the same score as the right one counts as before it, so that a collapsed model, for which all scores are
    equal, gets no credit.

    Args:
        queries, gallery: features [N, D] of unit length.
        query_keys, gallery_keys: [N] integers from 0.
        block: queries scored at once; memory is O(block N).

    Returns:
        [N] int64; 0 is a hit at rank 1.

    Raises:
        ValueError: a feature is not finite; comparisons with NaN would make it a perfect score.
    """
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("retrieval: features contain NaN or infinity")
    ranks = [torch.zeros(0, dtype=torch.int64, device=queries.device)]
    num_keys = int(gallery_keys.max()) + 1 if len(gallery_keys) else 0
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ gallery.T
        same_query = query_keys[start : start + block, None] == query_keys[None, :]
        joined = scores.new_zeros(len(scores), num_keys).index_add_(1, gallery_keys, same_query.to(scores.dtype)) > 0
        right = joined[:, gallery_keys]
        best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~right).sum(1))
    return torch.cat(ranks)


def recall_at(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries with a right item among the first k: ``{"R@1": ..., ...}``."""
    return {f"R@{k}": (ranks < k).double().mean().item() for k in ks}

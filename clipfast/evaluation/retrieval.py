"""Recall of images by text and of text by images, without the full matrix of scores."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import retrieval_ranks


@torch.no_grad()
def pair_ranks(queries: Tensor, gallery: Tensor, query_keys: Tensor, gallery_keys: Tensor) -> Tensor:
    """For each query of N pairs, how many wrong items of the gallery come before its best right one.

    Pair i joins query i and item i. Several queries may be the same thing, such as one caption of many images, and so
    may several items: then they have the same key. An item is right for a query if some pair joins their keys. A wrong
    item with the same score as the right one counts as before it, so that a collapsed model, for which all scores are
    equal, gets no credit.

    Args:
        queries, gallery: features [N, D] of unit length.
        query_keys, gallery_keys: [N] integers from 0.

    Returns:
        [N] int64; 0 is a hit at rank 1. Queries of one key have the rank of the first.

    Raises:
        ValueError: a feature is not finite.
    """
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("retrieval: features contain NaN or infinity")
    first: dict[int, int] = {}
    right: dict[int, set[int]] = {}
    for place, (query, item) in enumerate(zip(query_keys.tolist(), gallery_keys.tolist(), strict=True)):
        first.setdefault(query, place)
        right.setdefault(query, set()).add(item)
    by_key = query_keys.new_zeros(max(first, default=-1) + 1)
    num_items = int(gallery_keys.max()) + 1 if len(gallery_keys) else 0
    for turn in _turns(right):
        owner = [-1] * num_items
        for number, query in enumerate(turn):
            for item in right[query]:
                owner[item] = number
        chosen = queries[[first[query] for query in turn]]
        by_key[turn] = retrieval_ranks(chosen, gallery, text_image=gallery_keys.new_tensor(owner)[gallery_keys])[0]
    return by_key[query_keys]


def _turns(right: dict[int, set[int]]) -> list[list[int]]:
    """Queries in groups that share no right item, since there each item can belong to one query only."""
    turns: dict[int, list[int]] = defaultdict(list)
    next_turn: dict[int, int] = defaultdict(int)
    for query, items in right.items():
        turn = max(next_turn[item] for item in items)
        turns[turn].append(query)
        next_turn.update(dict.fromkeys(items, turn + 1))
    return list(turns.values())


def recall_at(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries with a right item among the first k: ``{"R@1": ..., ...}``; a negative rank is of no query."""
    asked = ranks[ranks >= 0]
    return {f"R@{k}": (asked < k).double().mean().item() for k in ks}

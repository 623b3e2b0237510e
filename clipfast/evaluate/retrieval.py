"""Recall of images by text and of text by images, without the full matrix of scores."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import retrieval_ranks
from .intervals import bootstrap


@torch.no_grad()
def pair_ranks(queries: Tensor, gallery: Tensor, query_keys: Tensor, gallery_keys: Tensor) -> Tensor:
    """Return for each query of N pairs the number of wrong items that rank before its best right item.

    Pair i joins query i and item i of the gallery. Equal queries, such as one caption of several images, have the same
    key, and so do equal items. Equal items count as one item, since otherwise the names of large classes would fill the
    first ranks. An item is right for a query if some pair has both their keys. Of equal scores, those of wrong items
    rank first, so that a collapsed model, for which all scores are equal, gets no credit.

    Args:
        queries, gallery: features [N, D] of unit length.
        query_keys, gallery_keys: [N] integers from 0.

    Returns:
        [N] int64; 0 is a hit at rank 1. Queries with the same key get the rank of the first of them.

    Raises:
        ValueError: a feature is not finite.
    """
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("retrieval: features contain NaN or infinity")
    query_places: dict[int, int] = {}  # the key of a query -> the first position of the query
    item_places: dict[int, int] = {}  # the key of an item -> the first position of the item
    right: dict[int, set[int]] = {}  # the key of a query -> the keys of its right items
    for place, (query, item) in enumerate(zip(query_keys.tolist(), gallery_keys.tolist(), strict=True)):
        query_places.setdefault(query, place)
        item_places.setdefault(item, place)
        right.setdefault(query, set()).add(item)
    by_key = query_keys.new_zeros(max(query_places, default=-1) + 1)
    numbers = {item: number for number, item in enumerate(item_places)}
    items = gallery[list(item_places.values())]
    for turn in _without_common_items(right):
        owner = [-1] * len(items)
        for number, query in enumerate(turn):
            for item in right[query]:
                owner[numbers[item]] = number
        chosen = queries[[query_places[query] for query in turn]]
        by_key[turn] = retrieval_ranks(chosen, items, text_image=gallery_keys.new_tensor(owner))[0]
    return by_key[query_keys]


def caption_recalls(
    images: Tensor, texts: Tensor, counts: Sequence[int], ks: Sequence[int]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return recall@k by CLIP_benchmark's names and definitions, and the 95% interval of each.

    Every caption belongs to one image, and is wrong for every other image, even if that has a caption of the same text.
    Of equal scores, those of wrong items rank first. Apart from the features, memory is a few bytes per item.

    Args:
        images: features [M, D] of unit length.
        texts: features [N, D] of all captions, image after image.
        counts: the number of captions of each image.
        ks: the values of k.

    Raises:
        ValueError: a feature is not finite.
    """
    for features in (images, texts):
        if not all(rows.isfinite().all() for rows in features.split(65536)):
            raise ValueError("retrieval: features contain NaN or infinity")
    of_image = torch.tensor(counts)
    owner = torch.repeat_interleave(torch.arange(len(counts)), of_image)
    found = retrieval_ranks(images, texts, text_image=owner.to(texts.device))
    image_ranks, text_ranks = (ranks.cpu() for ranks in found)
    metrics, intervals = {}, {}
    for k in sorted(set(ks)):
        # ``hits`` and ``queries`` are counts for each image, since the bootstrap resamples images with their captions.
        by_caption = torch.bincount(owner, (text_ranks < k).double(), minlength=len(counts))
        by_image = ((image_ranks < k) & (image_ranks >= 0)).double()
        for name, hits, queries in (
            (f"image_retrieval_recall@{k}", by_caption, of_image.double()),
            (f"text_retrieval_recall@{k}", by_image, torch.ones_like(by_image)),
        ):
            metrics[name] = (hits.sum() / queries.sum()).item()
            intervals[name] = bootstrap(hits, queries)
    return metrics, intervals


def _without_common_items(right: dict[int, set[int]]) -> list[list[int]]:
    """Split queries into groups in which no two have a common right item, as ``retrieval_ranks`` requires.

    ``right`` has the right items of each query.
    """
    turns: dict[int, list[int]] = defaultdict(list)
    next_turn: dict[int, int] = defaultdict(int)
    for query, items in right.items():
        turn = max(next_turn[item] for item in items)
        turns[turn].append(query)
        next_turn.update(dict.fromkeys(items, turn + 1))
    return list(turns.values())


def recall_at(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return retrieval recall ``{"R@1": ..., ...}``: the share of queries with a right item among the first k.

    A negative rank marks a row that is not a query, and is left out.
    """
    asked = ranks[ranks >= 0]
    return {f"R@{k}": (asked < k).double().mean().item() for k in ks}

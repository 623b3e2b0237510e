"""How unevenly groups come among the first results of a query (Geyik et al. 2019; of CLIP: Berg et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..neighbours import nearest
from ..significance import DRAWS, independence
from .bias_groups import Grouping


def skews(counts: Tensor, of_set: Tensor) -> Tensor:
    """Return the log of each group's share among the first results, divided by its share in the set, [..., G].

    Args:
        counts: [..., G], images of each group among the first results.
        of_set: [G], images of each group in the set.
    """
    shares = counts.double() / counts.sum(-1, keepdim=True)
    return (shares / (of_set.double() / of_set.sum())).log()


def ndkl(order: Tensor, of_set: Tensor) -> float:
    """Return the normalised discounted divergence of groups in results from those in the set: 0 if they never differ.

    Args:
        order: [k], the number of each result's group, the best result first.
        of_set: [G], images of each group in the set.
    """
    places = torch.arange(1, len(order) + 1, dtype=torch.float64)
    shares = torch.nn.functional.one_hot(order, len(of_set)).double().cumsum(0) / places[:, None]
    divergence = torch.special.xlogy(shares, shares / (of_set.double() / of_set.sum())).sum(1)
    discounts = 1 / (places + 1).log2()
    return ((discounts * divergence).sum() / discounts.sum()).item()


def max_skew_by_chance(of_set: Tensor, k: int, seed: int = 0) -> float:
    """Return the mean of the largest skew among the first k results if images come in random order, by drawing some."""
    import numpy as np

    drawn = np.random.default_rng(seed).multivariate_hypergeometric(of_set.numpy(), k, DRAWS, method="marginals")
    return skews(torch.from_numpy(drawn), of_set).amax(-1).mean().item()


def retrieval_skew(
    queries: Sequence[str], texts: Tensor, images: Tensor, grouping: Grouping, ks: Sequence[int]
) -> list[dict[str, Any]]:
    """Return for each k how uneven the first k results of each query are.

    Args:
        queries: the texts.
        texts: their features [Q, D].
        images: features [N, D].
        grouping: the groups of the images; those of groups that are too small are not searched.
        ks: numbers of results.

    Raises:
        ValueError: there are fewer images than results, or a feature is not finite.
    """
    kept = torch.isin(grouping.members, torch.tensor(grouping.compared))
    if max(ks) > int(kept.sum()):
        raise ValueError(f"--k must be at most the {int(kept.sum())} images of {grouping.key}, got {max(ks)}")
    numbers = torch.tensor([-1] * (len(grouping.names) + 1))
    numbers[grouping.compared] = torch.arange(len(grouping.compared))
    members, names = numbers[grouping.members[kept]], [grouping.names[number] for number in grouping.compared]
    of_set = torch.bincount(members, minlength=len(names))
    order = members[nearest(texts, images[kept], max(ks))[1].cpu()]
    rows = []
    for k in sorted(set(ks)):
        found = [_of_query(query, groups[:k], of_set, names) for query, groups in zip(queries, order, strict=True)]
        means = {f"mean_{name}": sum(row[name] for row in found) / len(found) for name in ("max_skew", "ndkl")}
        rows.append({"k": k, **means, "max_skew_by_chance": max_skew_by_chance(of_set, k), "queries": found})
    return rows


def _of_query(query: str, order: Tensor, of_set: Tensor, names: list[str]) -> dict[str, Any]:
    counts = torch.bincount(order, minlength=len(names))
    skew = skews(counts, of_set)
    return {
        "query": query,
        "groups": dict(zip(names, counts.tolist(), strict=True)),
        "max_skew": skew.max().item(),
        "max_skew_group": names[int(skew.argmax())],
        "ndkl": ndkl(order, of_set),
        "p_value": independence(counts.tolist(), of_set.tolist()),
    }

"""Significance tests and exact confidence intervals for accuracies and other shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

DRAWS = 9999  # the number of random assignments of a permutation test
HALVINGS = 60  # after this many halvings of an interval, its ends are equal in float64


def binomial_tail(hits: int, count: int, share: float) -> float:
    """Return the probability of at least ``hits`` in ``count`` trials of probability ``share``.

    This probability is the p-value of a one-tailed binomial test of an accuracy.
    """
    if hits <= 0:
        return 1.0
    k = torch.arange(hits, count + 1, dtype=torch.float64)
    p = torch.tensor(share, dtype=torch.float64)
    ways = (
        torch.lgamma(torch.tensor(count + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    )
    terms = ways + torch.special.xlogy(k, p) + torch.special.xlog1py(count - k, -p)
    return min(1.0, torch.logsumexp(terms, 0).exp().item())


def clopper_pearson(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Clopper and Pearson's exact interval of an accuracy: of ``hits`` among ``count`` trials.

    Args:
        hits, count: the number of hits and of trials.
        level: the confidence level.
    """
    tail = (1 - level) / 2
    low = _share_with_tail(hits, count, tail) if hits else 0.0
    return low, _share_with_tail(hits + 1, count, 1 - tail) if hits < count else 1.0


def _share_with_tail(hits: int, count: int, tail: float) -> float:
    """Return the ``share`` for which :func:`binomial_tail`, which rises with it, is ``tail``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(hits, count, middle) < tail else (low, middle)
    return (low + high) / 2


def independence(hits: Sequence[int], counts: Sequence[int]) -> float:
    """Return the p-value of a permutation test that hits do not depend on the group.

    The hits are assigned to the groups at random, 9,999 times. The p-value is the share of assignments, the observed
    one included, whose chi-square statistic is at least the observed one. The test is valid for small groups too.

    Args:
        hits: the number of hits in each group.
        counts: the size of each group.
    """
    import numpy as np

    total, sizes = sum(hits), np.asarray(counts)
    if total in (0, sizes.sum()):
        return 1.0
    expected = sizes * (total / sizes.sum())
    dealt = np.random.default_rng(0).multivariate_hypergeometric(sizes, total, DRAWS, method="marginals")

    def statistic(found: Any) -> Any:
        """Return the chi-square statistic of the hits in each group, up to a factor that all assignments share."""
        return ((found - expected) ** 2 / sizes).sum(-1)

    observed = statistic(np.asarray(hits))
    return (1 + int((statistic(dealt) >= observed * (1 - 1e-9)).sum())) / (1 + DRAWS)

"""Confidence intervals of accuracies and other shares, at 95%."""

import math

import torch
from torch import Tensor

Z = 1.959963984540054  # the 97.5% quantile of the normal distribution
RESAMPLES = 1000
BLOCK = 1 << 19  # the number of random numbers that a bootstrap draws at once


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of an accuracy: of ``hits`` among ``count`` independent trials."""
    share, spread = hits / count, Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def of_share(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of an accuracy ``share``, measured on ``count`` images."""
    return wilson(round(share * count), count)


def bootstrap(hits: Tensor, trials: Tensor) -> tuple[float, float]:
    """Return the 95% bootstrap percentile interval of ``hits.sum() / trials.sum()``; the seed is fixed.

    Args:
        hits, trials: [N] each; the N items are resampled. An item may be an image, with the number of its queries
            (trials) and of those that were answered right (hits).
    """
    generator, count = torch.Generator().manual_seed(0), len(hits)
    both = torch.stack([hits, trials], 1).double().cpu()
    shares = []
    for rows in torch.arange(RESAMPLES).split(max(1, BLOCK // count)):
        drawn = torch.randint(count, (len(rows), count), generator=generator)
        sums = both[drawn].sum(1)
        shares.append(sums[:, 0] / sums[:, 1])
    low, high = torch.cat(shares).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def percent(share: float | None, interval: tuple[float, float] | None) -> str:
    """Format an accuracy and its interval, such as "29.2% (27.1-31.3)"; "-" if there is none."""
    if share is None or interval is None:
        return "-"
    return f"{share:.1%} ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"


def shown(value: float | None, form: str) -> str:
    """Format a figure of a table, such as a p-value; "-" if there is none."""
    return "-" if value is None else format(value, form)

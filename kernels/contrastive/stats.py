"""What the blocks of a loss say about its rows and columns, and what follows from it: vectors of N, nothing larger.

A block is the logits of some rows against some columns. A pair (i, i + diagonal) in it is left out of the sums: then
its loss log(1 + others / positive) and what its probability lacks, others / (others + positive), are exact however
small they are. Logits, maxima and positives are in base 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import LN2, LOG2E
from ..dtypes import accumulate_dtype

# Largest logit of unit features after the shared shift: 2^28 of them still fit float32's exponent.
HEADROOM = 100.0
# A sum below this may lack terms that underflowed; above it, they are less than its rounding.
LEAST_SUM = 2.0**-70


class Stats(NamedTuple):
    """Of M rows and N columns: maximum (or the shift in its place), sum of 2^(logit - maximum) over all but pairs, the
    logit of each row's pair (anything without one), and whether all maxima are the shared shift.
    """

    row_max: Tensor  # [M] fp32
    row_sum: Tensor  # [M] fp32
    col_max: Tensor  # [N] fp32
    col_sum: Tensor  # [N] fp32
    positive: Tensor  # [M] fp32
    shared: Tensor  # [] int8: 0 or 1


class Weights(NamedTuple):
    """Of rows [3, M] and columns [3, N], maximum, weight and miss, for the gradients; whether maxima are one shift."""

    row: Tensor
    col: Tensor
    shared: Tensor


class Terms(NamedTuple):
    """Of rows (or columns) that have a positive: loss, 1 / (others + positive) in units of 2^max, and what the
    probability of the positive lacks.
    """

    nll: Tensor
    weight: Tensor
    miss: Tensor


def no_stats(x: Tensor, y: Tensor) -> Stats:
    """Room for the statistics of x y^T: of no columns yet."""
    m, n = len(x), len(y)
    row_max, col_max = (x.new_full((size,), float("-inf"), dtype=accumulate_dtype(x.dtype)) for size in (m, n))
    shared = torch.zeros((), dtype=torch.int8, device=x.device)
    return Stats(row_max, torch.zeros_like(row_max), col_max, torch.zeros_like(col_max), row_max.clone(), shared)


def shared_shift(logit_scale: Tensor) -> Tensor:
    """One shift for all rows and columns, with which no 2^(logit - shift) of unit features overflows, and for a scale
    up to 78 none underflows. A whole number, and 0 as long as it can be: what is subtracted is not rounded again.
    """
    return ((logit_scale.abs() * LOG2E).ceil() - HEADROOM).clamp(min=0)


def is_exact(*sums: Tensor) -> Tensor:
    """Whether sums taken with the shared shift have neither overflowed nor lost what counts."""
    checks = [((total >= LEAST_SUM) & (total < float("inf"))).all() for total in sums]
    return torch.stack(checks).all()


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Maximum and sum over several blocks, in their order."""
    maximum = torch.stack([part[0] for part in parts]).amax(0)
    pivot = maximum.where(maximum > float("-inf"), 0)
    total = torch.zeros_like(maximum)
    for part_max, part_sum in parts:
        total = total + part_sum * (part_max - pivot).exp2()
    return maximum, total


def pairs_in(num_rows: int, num_cols: int, diagonal: int) -> tuple[slice, slice]:
    """Rows that have a pair (i, i + diagonal), and the columns of these pairs."""
    start = min(max(0, -diagonal), num_rows)
    stop = max(start, min(num_rows, num_cols - diagonal))
    return slice(start, stop), slice(start + diagonal, stop + diagonal) if stop > start else slice(0, 0)


def terms(maximum: Tensor, total: Tensor, positive: Tensor) -> Terms:
    """Loss, weight and miss of rows (or columns) with these positives; all three are vectors of the same length."""
    # the exponent of the sum is a whole number: as a logarithm of its own, the sum would be rounded to its size
    mantissa, exponent = torch.frexp(total)
    others = (((maximum - positive) + exponent) + mantissa.log2()) * LN2  # log(others / positive)
    weight = (total + (positive - maximum).exp2()).reciprocal()
    return Terms(torch.logaddexp(others, torch.zeros_like(others)), weight, others.sigmoid())

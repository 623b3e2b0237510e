"""Features and their pairs; the statistics of a softmax over logits in blocks, and the loss that follows from them.

A block is the logits of some rows against some columns. Logits, maxima and positives are in base 2 here: they are
multiplied by log2e. The logit of a pair (i, i + offset) is left out of the sums. Therefore the loss of a pair,
log(1 + others / positive), and one minus its probability, others / (others + positive), are exact however small they
are.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import LN2, LOG2E
from ..dtypes import accumulate_dtype

# The largest logit of unit features after the shared shift, in base 2. In float32, a sum of 2^27 powers of this size
# does not overflow.
HEADROOM = 100.0
# A sum below this may lack terms that underflowed. Above it, such terms are less than the rounding of the sum.
LEAST_SUM = 2.0**-70
ALL = slice(None)
# The number of pairs whose features are converted to float32 at a time.
PAIR_ROWS = 4096


class Features(NamedTuple):
    """Features in the form that the products of the contrastive losses take."""

    rows: Tensor  # [N, D]
    inv_norm: Tensor | None  # [N], 1 / norm of each row before it was normalised; None without a normalisation

    def part(self, rows: slice) -> "Features":
        """Return the contrastive features of some rows."""
        return Features(self.rows[rows], None if self.inv_norm is None else self.inv_norm[rows])


def pairs_in(num_rows: int, num_cols: int, offset: int) -> tuple[slice, slice]:
    """Return the rows of logits that have a pair (i, i + offset), and the columns of these pairs."""
    start = min(max(0, -offset), num_rows)
    stop = max(start, min(num_rows, num_cols - offset))
    return slice(start, stop), slice(start + offset, stop + offset) if stop > start else slice(0, 0)


def pair_products(x: Tensor, y: Tensor) -> Tensor:
    """Return x_i . y_i [P] of features [P, D], in float32 at least."""
    wide = accumulate_dtype(x.dtype)
    parts = zip(x.split(PAIR_ROWS), y.split(PAIR_ROWS), strict=True)
    return torch.cat([torch.linalg.vecdot(a.to(wide), b.to(wide)) for a, b in parts])


class SoftmaxStats(NamedTuple):
    """Statistics of the logits of M rows against N columns, float32 (float64 for float64 features).

    A sum is the sum of 2^(logit - maximum) over all logits except those of pairs. With the shared shift, every maximum
    is this one number.
    """

    row_max: Tensor  # [M]
    row_sum: Tensor  # [M]
    col_max: Tensor  # [N]
    col_sum: Tensor  # [N]
    positive: Tensor  # [M], the logit of each row's pair; undefined in a row without a pair
    uses_shared_shift: Tensor  # [] or [any] int8, all 1 if every maximum is the shared shift

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The maximum and the sum of each row of logits."""
        return self.row_max, self.row_sum

    @property
    def cols(self) -> tuple[Tensor, Tensor]:
        """The maximum and the sum of each column of logits."""
        return self.col_max, self.col_sum


class PairTerms(NamedTuple):
    """The loss and the terms of its gradient, for rows (or columns) that have a positive; each field is [P]."""

    nll: Tensor  # the loss: minus the logarithm of the positive's probability
    inv_denom: Tensor  # 1 / (others + positive), in units of 2^-maximum
    one_minus_p: Tensor  # one minus the positive's probability


class Normalizers(NamedTuple):
    """The vectors from which the G of ``contrastive`` is computed, in base 2.

    G_ij = 2^(l_ij - max_i) inv_denom_i + 2^(l_ij - max_j) inv_denom_j, with the logits l_ij.

    ``row`` [2 or more, M] has the maxima of the rows, then their inv_denom. ``col`` [2 or more, N] has the same of the
    columns. Further entries of ``row`` and ``col`` are not used for G.
    """

    row: Tensor
    col: Tensor
    uses_shared_shift: Tensor  # [] int8, as in SoftmaxStats

    def part(self, rows: slice, cols: slice) -> "Normalizers":
        """Return the normalizers of a block of the logits."""
        return Normalizers(self.row[:, rows], self.col[:, cols], self.uses_shared_shift)


class RankWeights(NamedTuple):
    """The numbers that the gradients of one rank's pairs need, if the losses of the ranks have different gradients.

    The share of a pair is the gradient of its rank's loss over the largest one of all ranks. G may be rounded to 16
    bits, for which the gradients themselves could be too small or too large.
    """

    normalizers: Normalizers  # of the logits of all ranks; inv_denom is multiplied by the share
    one_minus_p: Tensor  # [b], of this rank's pairs, times the share
    coefficient: Tensor  # [], the largest gradient times the weight of a pair in the loss
    factor: Tensor  # [], coefficient times the scale of the logits


def new_accumulator(x: Tensor) -> Tensor:
    """Return an uninitialised accumulator [M, D] for the gradients of prepared features x [M, D]."""
    return x.new_empty(x.shape, dtype=accumulate_dtype(x.dtype))


def clear_new(*accumulators: tuple[Tensor | None, bool]) -> None:
    """Write zeros to those accumulators of gradients that have no values yet, as their flags say."""
    for acc, is_new in accumulators:
        if acc is not None and is_new:
            acc.zero_()


def new_stats(x: Tensor, y: Tensor) -> SoftmaxStats:
    """Return the statistics of the logits x y^T before any logit has been seen."""
    row_max, col_max = (x.new_full((len(side),), float("-inf"), dtype=accumulate_dtype(x.dtype)) for side in (x, y))
    uses_shared_shift = torch.zeros((), dtype=torch.int8, device=x.device)
    row_sum, col_sum = torch.zeros_like(row_max), torch.zeros_like(col_max)
    return SoftmaxStats(row_max, row_sum, col_max, col_sum, row_max.clone(), uses_shared_shift)


def shared_shift(logit_scale: Tensor) -> Tensor:
    """Return one shift [] for all rows and columns with which no 2^(logit - shift) of unit features overflows.

    For scales of up to 78 no power underflows either. The shift is a whole number, and 0 for all scales that permit it;
    then the subtraction does not round.
    """
    return ((logit_scale.abs() * LOG2E).ceil() - HEADROOM).clamp(min=0)


def is_exact(*sums: Tensor) -> Tensor:
    """Return [] int8: 1 if sums with the shared shift have neither overflowed nor lost terms that matter, else 0."""
    checks = []
    for total in sums:
        if total.numel() > 0:
            least, largest = torch.aminmax(total)  # both are NaN if a sum is NaN
            checks.append((least >= LEAST_SUM) & (largest < float("inf")))
    if not checks:
        return torch.ones((), dtype=torch.int8, device=sums[0].device)
    return functools.reduce(torch.logical_and, checks).to(torch.int8)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the maximum and the sum over several blocks of logits from those of each block."""
    maxima, sums = (torch.stack(vectors) for vectors in zip(*parts, strict=True))
    return merge_stacked(maxima, sums)


def merge_stacked(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the maxima and the sums of all blocks of logits, each [blocks, rows], as :func:`merge` does."""
    maximum = maxima.amax(0)
    pivot = maximum.clamp(min=torch.finfo(maximum.dtype).min)  # a maximum may be -inf, and -inf - (-inf) is NaN
    return maximum, (sums * (maxima - pivot).exp2()).sum(0)


def finite(maximum: Tensor) -> Tensor:
    """Return the maxima of logits with 0 in place of -inf: otherwise -inf minus its maximum -inf would be NaN."""
    return maximum.where(maximum > float("-inf"), 0)


def pair_terms(maximum: Tensor, total: Tensor, positive: Tensor) -> PairTerms:
    """Return loss, inv_denom and one_minus_p of rows (or columns) with these statistics and positives, all [P]."""
    # The rounding error of log2(total) would be proportional to its size. Therefore frexp splits total: the exponent is
    # combined with the distance, without rounding if the two cancel, and only a logarithm in [-1, 0] is rounded.
    mantissa, exponent = torch.frexp(total)
    distance = positive - maximum
    others = ((exponent - distance) + mantissa.log2()) * LN2  # log(others / positive)
    # The loss shows that a positive is not finite: NaN and inf make it NaN. So does -inf in a row without other logits;
    # beside other logits, -inf makes it inf.
    shown = positive.clamp(min=0).where(total > 0, positive)
    others = others + (shown - shown)
    inv_denom = (total + distance.exp2()).reciprocal()
    # Above the threshold, log(1 + e^x) equals x to the last digit of float64.
    return PairTerms(F.softplus(others, threshold=50.0), inv_denom, others.sigmoid())


def pair_losses(stats: SoftmaxStats, offset: int, *, both: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss of the pairs (i, i + offset), in ``both`` directions or of the rows only.

    Also return three vectors for the rows of the logits [3, M], and for their columns [3, N]: the maximum of the
    logits; inv_denom, by which the gradient of the loss multiplies exponentials; and one_minus_p, 1 minus the
    probability of the pair, summed over the directions of the loss. The last two are 0 in a row or column without a
    pair. If the loss has only the direction of the rows, inv_denom of the columns is 0 too.
    """
    paired, partners = pairs_in(len(stats.row_max), len(stats.col_max), offset)
    maximum = torch.stack([stats.row_max[paired], stats.col_max[partners]])  # [2, P]
    total = torch.stack([stats.row_sum[paired], stats.col_sum[partners]])
    terms = pair_terms(maximum, total, stats.positive[paired])
    loss = terms.nll.mean() if both else terms.nll[0].mean()
    one_minus_p = terms.one_minus_p.sum(0) if both else terms.one_minus_p[0]
    row = _with_pairs(stats.row_max, terms.inv_denom[0], one_minus_p, paired)
    col = _with_pairs(stats.col_max, terms.inv_denom[1] if both else None, one_minus_p, partners)
    return loss, row, col


def _with_pairs(maximum: Tensor, inv_denom: Tensor | None, one_minus_p: Tensor, pairs: slice) -> Tensor:
    """Return maximum, inv_denom and one_minus_p [3, N] of all rows or columns of logits, from those of the pairs [P].

    inv_denom and one_minus_p are 0 where there is no pair; inv_denom is 0 everywhere if it is None.
    """
    if inv_denom is not None and len(maximum) == len(one_minus_p):
        return torch.stack([maximum, inv_denom, one_minus_p])
    result = maximum.new_zeros(3, len(maximum))
    result[0], result[1, pairs], result[2, pairs] = maximum, 0 if inv_denom is None else inv_denom, one_minus_p
    return result

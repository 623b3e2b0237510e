"""The Triton kernel of what follows for pairs from the statistics of their rows and columns; see ``pair_terms``."""

import triton
import triton.language as tl

from ..tiles import log_1p


@triton.jit
def _terms(maximum, total, positive):
    """Return loss, inv_denom and one_minus_p of one direction, given statistics and positives in base 2, each [B]."""
    # The sum is split as frexp splits it. The whole part of log2(total) joins the distance without rounding where the
    # two cancel, and only a logarithm in [-1, 0] is rounded. Sums below the normal numbers are scaled first.
    is_tiny = total < 1.1754943508222875e-38
    bits = tl.where(is_tiny, total * 16777216.0, total).to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 255) - tl.where(is_tiny, 150, 126)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    distance = positive - maximum
    others = (exponent.to(tl.float32) - distance) + tl.log2(mantissa)  # log2(others / positive)
    others = tl.where(total > 0.0, others, float("-inf"))
    others = tl.where(total < float("inf"), others, total)  # NaN stays
    e = tl.exp2(-tl.abs(others))
    nll = tl.maximum(others, 0.0, propagate_nan=tl.PropagateNan.ALL) * 0.6931471805599453 + log_1p(e)
    return nll, 1.0 / (total + tl.exp2(distance)), tl.where(others > 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def _pair_terms_kernel(
    row_max_ptr, row_sum_ptr,  # [M] fp32
    col_max_ptr, col_sum_ptr,  # [N] fp32
    positive_ptr,  # [M] fp32
    row_ptr,  # [3, M] fp32 contiguous
    col_ptr,  # [3, N] fp32 contiguous
    nll_ptr,  # [programs of rows] fp32
    M, N, offset,
    IS_BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write maximum, inv_denom and one_minus_p of rows (the first programs) and of columns, and sums of the losses.

    inv_denom and one_minus_p are 0 without a pair; one_minus_p is summed over the directions of the loss. Unless
    IS_BOTH, the columns have no direction.
    """
    pid, num_m = tl.program_id(0), tl.cdiv(M, BLOCK)
    is_row = pid < num_m
    own = tl.where(is_row, pid, pid - num_m) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.where(is_row, own, own - offset)
    cols = rows + offset
    has_pair = (rows >= 0) & (rows < M) & (cols >= 0) & (cols < N)
    row_max = tl.load(row_max_ptr + rows, mask=(rows >= 0) & (rows < M), other=0.0)
    positive = tl.load(positive_ptr + rows, mask=has_pair, other=0.0)
    row_sum = tl.load(row_sum_ptr + rows, mask=has_pair, other=1.0)
    nll, row_inv, one_minus_p = _terms(row_max, row_sum, positive)
    col_max = tl.load(col_max_ptr + cols, mask=(cols >= 0) & (cols < N), other=0.0)
    col_inv = tl.zeros((BLOCK,), tl.float32)
    if IS_BOTH:
        col_sum = tl.load(col_sum_ptr + cols, mask=has_pair, other=1.0)
        col_nll, col_inv, col_one_minus_p = _terms(col_max, col_sum, positive)
        nll += col_nll
        one_minus_p += col_one_minus_p
    size = tl.where(is_row, M, N)
    out_ptr = row_ptr if is_row else col_ptr
    mask = own < size
    tl.store(out_ptr + own, tl.where(is_row, row_max, col_max), mask=mask)
    tl.store(out_ptr + size + own, tl.where(has_pair, tl.where(is_row, row_inv, col_inv), 0.0), mask=mask)
    tl.store(out_ptr + 2 * size + own, tl.where(has_pair, one_minus_p, 0.0), mask=mask)
    if is_row:
        tl.store(nll_ptr + pid, tl.sum(tl.where(has_pair, nll, 0.0), 0))

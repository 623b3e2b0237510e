"""The Triton kernels of losses whose rows have logits in several blocks: the terms of the loss from all blocks.

InfoNCE and NT-Xent have two blocks of logits. In the loss of all ranks, a column has a block on each rank. The
statistics of a block are, for each row, the maximum of its logits and the sum of 2^(logit - maximum), as
``_pairs_kernel`` stores them without IS_LOSS. As in ``stats.merge``, the maximum of all blocks is the largest one, and
the sums are added after they have been scaled to this maximum.
"""

import triton
import triton.language as tl

from .softmax_kernels import _terms
from .tiles import pair_cosines


@triton.jit
def _merged(first_ptr, second_ptr, N, offs, mask):
    """Return maxima and sums [B] of the rows ``offs`` over two blocks of logits, given the statistics of each, [2, N].

    Where a block has no logits, its maximum is -inf. The pivot is finite, since -inf - (-inf) would be NaN.
    """
    first_max = tl.load(first_ptr + offs, mask=mask, other=0.0)
    second_max = tl.load(second_ptr + offs, mask=mask, other=0.0)
    maximum = tl.maximum(first_max, second_max, propagate_nan=tl.PropagateNan.ALL)
    pivot = tl.maximum(maximum, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
    first_sum = tl.load(first_ptr + N + offs, mask=mask, other=0.0)
    second_sum = tl.load(second_ptr + N + offs, mask=mask, other=0.0)
    return maximum, first_sum * tl.exp2(first_max - pivot) + second_sum * tl.exp2(second_max - pivot)


@triton.jit
def _store_terms(out_ptr, maximum, inv_denom, one_minus_p, N, offs, mask):
    """Store maximum, inv_denom and one_minus_p [B] of the rows ``offs``, for the gradient of a loss, in [3, N]."""
    tl.store(out_ptr + offs, maximum, mask=mask)
    tl.store(out_ptr + N + offs, inv_denom, mask=mask)
    tl.store(out_ptr + 2 * N + offs, one_minus_p, mask=mask)


@triton.jit
def _queries_kernel(
    stats_ptr,  # [2, 2, N] fp32, of the queries against the queue and, with IN_BATCH, against the keys
    positive_ptr,  # [N] fp32, the logits of the pairs; unused without IN_BATCH
    x_ptr,  # [N, D], the queries
    y_ptr,  # [N, D], the keys
    scale_ptr,  # [] fp32
    row_ptr,  # [3, N] fp32
    loss_ptr,  # [programs] fp32
    uses_shared_shift_ptr,  # [programs] int8
    N, D, stride_x, stride_y, log2e,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, IN_BATCH: tl.constexpr,
):  # fmt: skip
    """Store maximum, inv_denom and one_minus_p of BLOCK_M queries of InfoNCE, and the sum of their losses."""
    offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = offs < N
    if IN_BATCH:
        maximum, total = _merged(stats_ptr, stats_ptr + 2 * N, N, offs, mask)
        positive = tl.load(positive_ptr + offs, mask=mask, other=0.0)
    else:
        maximum = tl.load(stats_ptr + offs, mask=mask, other=0.0)
        total = tl.load(stats_ptr + N + offs, mask=mask, other=0.0)
        cosines = pair_cosines(x_ptr, y_ptr, offs, mask, D, 0, stride_x, stride_y, BLOCK_M, BLOCK_K)
        positive = cosines * (tl.load(scale_ptr) * log2e)
    nll, inv_denom, one_minus_p = _terms(maximum, total, positive)
    _store_terms(row_ptr, maximum, inv_denom, one_minus_p, N, offs, mask)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(mask, nll, 0.0), 0))
    tl.store(uses_shared_shift_ptr + tl.program_id(0), 1)


@triton.jit
def _views_kernel(
    stats_ptr,  # [6, 2, N] fp32: rows and columns of x against x, of y against y, and of x against y
    positive_ptr,  # [N] fp32, the logits of the pairs
    row_ptr,  # [2, 3, N] fp32, of x
    col_ptr,  # [2, 3, N] fp32, of y
    loss_ptr,  # [programs] fp32
    uses_shared_shift_ptr,  # [programs] int8
    N,
    BLOCK_M: tl.constexpr,
):
    """Store the vectors ``row`` and ``col`` that ``_nt_xent_fwd`` returns, for BLOCK_M pairs of NT-Xent's views, and
    the sum of the losses of both views.
    """
    offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = offs < N
    positive = tl.load(positive_ptr + offs, mask=mask, other=0.0)
    x_rows, x_cols, y_rows, y_cols = stats_ptr, stats_ptr + 2 * N, stats_ptr + 4 * N, stats_ptr + 6 * N
    across_rows, across_cols = stats_ptr + 8 * N, stats_ptr + 10 * N
    x_max, x_sum = _merged(x_rows, across_rows, N, offs, mask)
    y_max, y_sum = _merged(y_rows, across_cols, N, offs, mask)
    x_loss, x_inv_denom, x_one_minus_p = _terms(x_max, x_sum, positive)
    y_loss, y_inv_denom, y_one_minus_p = _terms(y_max, y_sum, positive)
    one_minus_p = x_one_minus_p + y_one_minus_p
    _store_terms(row_ptr, x_max, x_inv_denom, one_minus_p, N, offs, mask)
    _store_terms(col_ptr, y_max, y_inv_denom, one_minus_p, N, offs, mask)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(mask, x_loss + y_loss, 0.0), 0))
    tl.store(uses_shared_shift_ptr + tl.program_id(0), 1)
    # row[1] and col[1] treat the views as columns of the logits of their own side.
    x_max, x_sum = _merged(x_cols, across_rows, N, offs, mask)
    y_max, y_sum = _merged(y_cols, across_cols, N, offs, mask)
    _, x_inv_denom, _ = _terms(x_max, x_sum, positive)
    _, y_inv_denom, _ = _terms(y_max, y_sum, positive)
    _store_terms(row_ptr + 3 * N, x_max, x_inv_denom, one_minus_p, N, offs, mask)
    _store_terms(col_ptr + 3 * N, y_max, y_inv_denom, one_minus_p, N, offs, mask)


@triton.jit
def _rank_terms_kernel(
    row_max_ptr, row_sum_ptr,  # [N] fp32, of this rank's rows
    col_max_ptr, col_sum_ptr,  # [blocks, N] fp32, of this rank's columns in each block of logits
    positive_ptr,  # [N] fp32, the logits of the pairs
    uses_shared_shift_ptr,  # [flags] int8
    out_ptr,  # [N, 5] fp32, contiguous
    one_minus_p_ptr,  # [N] fp32
    loss_ptr,  # [programs] fp32
    N, blocks, stride_block, stride_n, flags,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_FLAGS: tl.constexpr,
):  # fmt: skip
    """Store what each rank sends of its BLOCK_M pairs: maximum and inv_denom of the row, the same of the column, and
    0 if all flags are 1, else 1. Also store one_minus_p, summed over both directions, and the sum of the losses.
    """
    offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = offs < N
    out = out_ptr + offs * 5
    flag = tl.full((BLOCK_FLAGS,), 1, tl.int32)
    for first in range(0, flags, BLOCK_FLAGS):
        others = first + tl.arange(0, BLOCK_FLAGS)
        flag = tl.minimum(flag, tl.load(uses_shared_shift_ptr + others, mask=others < flags, other=1).to(tl.int32))
    has_own_shifts = 1.0 - tl.min(flag, 0).to(tl.float32)
    tl.store(out + 4, has_own_shifts + tl.zeros((BLOCK_M,), tl.float32), mask=mask)
    positive = tl.load(positive_ptr + offs, mask=mask, other=0.0)
    row_max = tl.load(row_max_ptr + offs, mask=mask, other=0.0)
    row_sum = tl.load(row_sum_ptr + offs, mask=mask, other=0.0)
    col_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    col_sum = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, blocks, BLOCK_N):
        others = first + tl.arange(0, BLOCK_N)
        places = others.to(tl.int64)[:, None] * stride_block + offs.to(tl.int64)[None, :] * stride_n
        held = (others < blocks)[:, None] & mask[None, :]
        maxima = tl.load(col_max_ptr + places, mask=held, other=float("-inf"))  # [BN, BM]
        sums = tl.load(col_sum_ptr + places, mask=held, other=0.0)  # [BN, BM]
        maximum = tl.maximum(col_max, tl.max(maxima, 0), propagate_nan=tl.PropagateNan.ALL)
        pivot = tl.maximum(maximum, -3.4028234663852886e38)
        col_sum = col_sum * tl.exp2(col_max - pivot) + tl.sum(sums * tl.exp2(maxima - pivot[None, :]), 0)
        col_max = maximum
    row_loss, row_inv, row_one_minus_p = _terms(row_max, row_sum, positive)
    col_loss, col_inv, col_one_minus_p = _terms(col_max, col_sum, positive)
    tl.store(out, row_max, mask=mask)
    tl.store(out + 1, row_inv, mask=mask)
    tl.store(out + 2, col_max, mask=mask)
    tl.store(out + 3, col_inv, mask=mask)
    tl.store(one_minus_p_ptr + offs, row_one_minus_p + col_one_minus_p, mask=mask)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(mask, row_loss + col_loss, 0.0), 0))


@triton.jit
def _rank_weights_kernel(
    terms_ptr,  # [N, 6] fp32, contiguous: ``out`` of _rank_terms_kernel and the gradient of its rank's loss
    heads_ptr,  # [ranks, 6] fp32: the terms of a pair of each rank, or zeros if it has none
    one_minus_p_ptr,  # [own] fp32, of this rank's pairs
    scale_ptr,  # [] fp32
    vectors_ptr,  # [4, N] fp32: maximum and inv_denom of the rows, then of the columns
    flag_ptr,  # [] int8
    weighted_ptr,  # [own] fp32
    coefficient_ptr, factor_ptr,  # [] fp32
    N, ranks, stride_heads, start, own, weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Multiply the terms of BLOCK_M pairs by their share of the largest gradient of a loss.

    share_i = grad_i / max |grad|;  coefficient = weight * max |grad|;  factor = coefficient * scale

    If all gradients are subnormal numbers or 0, the least normal number takes the place of max |grad|.

    Store the maxima and share * inv_denom of all pairs, and share * one_minus_p of this rank's pairs, which begin at
    ``start``. Also store in ``flag`` whether all ranks use one shift.
    """
    pid = tl.program_id(0)
    has_own_shifts = tl.zeros((BLOCK_N,), tl.float32)
    largest = tl.full((BLOCK_N,), 1.1754943508222875e-38, tl.float32)  # the least normal number
    for first in range(0, ranks, BLOCK_N):
        others = first + tl.arange(0, BLOCK_N)
        heads, held = heads_ptr + others.to(tl.int64) * stride_heads, others < ranks
        largest = tl.maximum(largest, tl.abs(tl.load(heads + 5, mask=held, other=0.0)))
        has_own_shifts = tl.maximum(has_own_shifts, tl.load(heads + 4, mask=held, other=0.0))
    most = tl.max(largest, 0)
    offs = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = offs < N
    terms = terms_ptr + offs.to(tl.int64) * 6
    grad = tl.load(terms + 5, mask=mask, other=0.0)
    share = tl.div_rn(grad, most + tl.zeros((BLOCK_M,), tl.float32))
    for side in tl.static_range(2):
        tl.store(vectors_ptr + 2 * side * N + offs, tl.load(terms + 2 * side, mask=mask, other=0.0), mask=mask)
        inv_denom = tl.load(terms + 2 * side + 1, mask=mask, other=0.0)
        tl.store(vectors_ptr + (2 * side + 1) * N + offs, inv_denom * share, mask=mask)
    mine = offs - start
    is_mine = mask & (mine >= 0) & (mine < own)
    one_minus_p = tl.load(one_minus_p_ptr + mine, mask=is_mine, other=0.0)
    tl.store(weighted_ptr + mine, one_minus_p * share, mask=is_mine)
    if pid == 0:
        tl.store(flag_ptr, (tl.max(has_own_shifts, 0) == 0.0).to(tl.int8))
        tl.store(coefficient_ptr, most * weight)
        tl.store(factor_ptr, most * weight * tl.load(scale_ptr))

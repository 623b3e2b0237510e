"""The Triton kernels of the softmax losses (contrastive, InfoNCE, NT-Xent).

Logits are in base 2: l_ij = log2e * scale * x_i . y_j.

    statistics  row sums_i = sum_j 2^(l_ij - m) and column sums_j = sum_i 2^(l_ij - m) of each tile, without the pairs
    merge       the sums of tiles, added in the order of the tiles
    pair terms  loss, inv_denom and one_minus_p of the pairs, as ``stats.pair_terms`` computes them
    gradient    G_ij = 2^(l_ij - max_i) inv_denom_i + 2^(l_ij - max_j) inv_denom_j, 0 for pairs, in the operands' dtype

With the shared shift, m and all maxima are one number. Then one exponential serves both directions, and no maximum is
computed. The exponentials take half as long as the product, and overlap with it. Logits that the shared shift does not
suit need a maximum for each row and column (``IS_ONLINE``). Only the device knows which case holds: the kernels of both
cases start, and the kernels of the case that does not hold read a flag and end.
"""

import triton
import triton.language as tl

from ..tiles import grouped_tile, halves, halves_of_columns, log_1p
from .tiles import (
    cosine_tile,
    grad_segment,
    pair_cosines,
    shared_shift,
    store_tile,
    sum_segment,
    tile_with_pairs,
    without_pairs,
    zero_pairs,
)


@triton.jit
def _logits(
    x, y, scale_ptr, start_m, start_n, M, N, D, stride_x, stride_y, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Return the logits [BM, BN] of one tile, in base 2, and their shared shift."""
    cosines = cosine_tile(x, y, start_m, start_n, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA)
    factor = tl.load(scale_ptr) * log2e
    return cosines * factor, shared_shift(factor)


@triton.jit
def _stats_kernel(
    x,  # [M, D]
    y,  # [N, D]
    scale_ptr,  # [] fp32
    row_sum_ptr,  # [tiles of N, M] fp32
    col_sum_ptr,  # [tiles of M, N] fp32, or with IS_TMA [segments, N]
    positive_ptr,  # [M] fp32, without IS_TMA
    M, N, D, offset, stride_x, stride_y, num_segments, tiles, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr, WARP_ROWS: tl.constexpr,
):  # fmt: skip
    """Sum rows and columns of tiles with the shared shift, without the pairs (i, i + offset).

    With tensor descriptors, a program sums the ``tiles`` tiles of one of ``num_segments`` segments of a column of
    tiles, and the logits of the pairs are left to ``_pairs_kernel``. Otherwise it sums one tile, and stores them.
    """
    if IS_TMA:
        sum_segment(
            x, y, scale_ptr, row_sum_ptr, col_sum_ptr, M, N, D, offset, num_segments, tiles, log2e,
            BLOCK_M, BLOCK_N, BLOCK_K, WARP_ROWS,
        )  # fmt: skip
    else:
        pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
        logits, shift = _logits(
            x, y, scale_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, D, stride_x, stride_y, log2e,
            BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA,
        )  # fmt: skip
        logits = without_pairs(logits, positive_ptr, pid_m, pid_n, M, N, offset, BLOCK_M, BLOCK_N)
        p = tl.exp2(logits - shift)  # [BM, BN]
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(row_sum_ptr + pid_n.to(tl.int64) * M + offs_m, tl.sum(p, 1), mask=offs_m < M)
        tl.store(col_sum_ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(p, 0), mask=offs_n < N)


@triton.jit
def _pairs_kernel(
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    scale_ptr,  # [] fp32
    positive_ptr,  # [M] fp32
    M, N, D, offset, stride_x, stride_y, log2e,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the logits of the pairs (i, i + offset)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_pair = (offs_m < M) & (offs_m + offset >= 0) & (offs_m + offset < N)
    cosines = pair_cosines(x_ptr, y_ptr, offs_m, has_pair, D, offset, stride_x, stride_y, BLOCK_M, BLOCK_K)
    tl.store(positive_ptr + offs_m, cosines * (tl.load(scale_ptr) * log2e), mask=has_pair)


@triton.jit
def _online_stats_kernel(
    x,  # [M, D]
    y,  # [N, D]
    scale_ptr,  # [] fp32
    uses_shared_shift_ptr,  # [] int8
    row_max_ptr,  # [tiles of N, M] fp32
    row_sum_ptr,  # [tiles of N, M] fp32
    col_max_ptr,  # [tiles of M, N] fp32
    col_sum_ptr,  # [tiles of M, N] fp32
    positive_ptr,  # [M] fp32
    M, N, D, offset, stride_x, stride_y, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store the maxima and sums of tiles of logits that the shared shift does not suit.

    There are few programs, each for several tiles, since most of the time they all end at once.
    """
    if tl.load(uses_shared_shift_ptr) != 0:
        return
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
        logits, _ = _logits(
            x, y, scale_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, D, stride_x, stride_y, log2e,
            BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA,
        )  # fmt: skip
        logits = without_pairs(logits, positive_ptr, pid_m, pid_n, M, N, offset, BLOCK_M, BLOCK_N)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = pid_n.to(tl.int64) * M + offs_m
        cols = pid_m.to(tl.int64) * N + offs_n
        row_max = tl.max(logits, 1)
        col_max = tl.max(logits, 0)
        tl.store(row_max_ptr + rows, row_max, mask=offs_m < M)
        tl.store(col_max_ptr + cols, col_max, mask=offs_n < N)
        # The pivot is finite: in a row where all logits are -inf, the maximum minus itself would be NaN.
        row_pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
        col_pivot = tl.where(col_max == float("-inf"), 0.0, col_max)
        tl.store(row_sum_ptr + rows, tl.sum(tl.exp2(logits - row_pivot[:, None]), 1), mask=offs_m < M)
        tl.store(col_sum_ptr + cols, tl.sum(tl.exp2(logits - col_pivot[None, :]), 0), mask=offs_n < N)


@triton.jit
def _merge_kernel(
    rows_max_ptr,  # [row_tiles, M] fp32; unused with the shared shift
    rows_sum_ptr,  # [row_tiles, M] fp32
    row_max_ptr,  # [M] fp32
    row_sum_ptr,  # [M] fp32
    cols_max_ptr,  # [col_tiles, N] fp32; unused with the shared shift
    cols_sum_ptr,  # [col_tiles, N] fp32
    col_max_ptr,  # [N] fp32
    col_sum_ptr,  # [N] fp32
    scale_ptr,  # [] fp32
    uses_shared_shift_ptr,  # [] int8, used if IS_ONLINE
    row_tiles, M, has_rows, col_tiles, N, has_cols, log2e,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, IS_ONLINE: tl.constexpr,
):  # fmt: skip
    """Merge the softmax statistics of new tiles into those of the tiles before; the first programs take rows.

    The other programs take columns. With the shared shift, the shift is stored as each maximum, and sums start at zero.
    Otherwise ``has_rows`` and ``has_cols`` say whether there are statistics of earlier tiles.
    """
    if IS_ONLINE and tl.load(uses_shared_shift_ptr) != 0:
        return
    shift = shared_shift(tl.load(scale_ptr) * log2e)
    pid, num_m = tl.program_id(0), tl.cdiv(M, BLOCK)
    if pid < num_m:
        _merge(
            rows_max_ptr, rows_sum_ptr, row_max_ptr, row_sum_ptr, pid * BLOCK, row_tiles, M, has_rows, shift,
            BLOCK, CHUNK, IS_ONLINE,
        )  # fmt: skip
    else:
        _merge(
            cols_max_ptr, cols_sum_ptr, col_max_ptr, col_sum_ptr, (pid - num_m) * BLOCK, col_tiles, N, has_cols, shift,
            BLOCK, CHUNK, IS_ONLINE,
        )  # fmt: skip


@triton.jit
def _merge(
    tile_max_ptr, tile_sum_ptr, max_ptr, sum_ptr, start, num_tiles, N, has_sums, shift,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, IS_ONLINE: tl.constexpr,
):  # fmt: skip
    """Merge the softmax statistics of tiles for BLOCK rows or BLOCK columns."""
    offs_n = start + tl.arange(0, BLOCK)
    mask = offs_n < N
    total = tl.load(sum_ptr + offs_n, mask=mask, other=0.0)
    if IS_ONLINE:
        total = tl.where(has_sums != 0, total, 0.0)
        total_max = tl.load(max_ptr + offs_n, mask=mask, other=0.0)
        total_max = tl.where(has_sums != 0, total_max, float("-inf"))
        for tile in range(num_tiles):
            offs = tl.cast(tile, tl.int64) * N + offs_n
            tile_sum = tl.load(tile_sum_ptr + offs, mask=mask, other=0.0)
            tile_max = tl.load(tile_max_ptr + offs, mask=mask, other=0.0)
            new_max = tl.maximum(total_max, tile_max, propagate_nan=tl.PropagateNan.ALL)
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            total = total * tl.exp2(total_max - pivot) + tile_sum * tl.exp2(tile_max - pivot)
            total_max = new_max
        tl.store(max_ptr + offs_n, total_max, mask=mask)
    else:
        sums = tl.zeros((CHUNK, BLOCK), tl.float32)
        for first in range(0, num_tiles, CHUNK):
            tiles = first + tl.arange(0, CHUNK)
            offs = tiles.to(tl.int64)[:, None] * N + offs_n[None, :]
            sums += tl.load(tile_sum_ptr + offs, mask=(tiles < num_tiles)[:, None] & mask[None, :], other=0.0)
        total += tl.sum(sums, 0)
        tl.store(max_ptr + offs_n, tl.zeros((BLOCK,), tl.float32) + shift, mask=mask)
    tl.store(sum_ptr + offs_n, total, mask=mask)


@triton.jit
def _grad_tile_kernel(
    x,  # [M, D]
    y,  # [N, D]
    grad,  # [M, N], the operands' dtype
    scale_ptr,  # [] fp32
    uses_shared_shift_ptr,  # [] int8
    row_max_ptr,  # [M] fp32
    row_inv_denom_ptr,  # [M] fp32
    col_max_ptr,  # [N] fp32
    col_inv_denom_ptr,  # [N] fp32
    scale_sum_ptr,  # [programs] fp32
    M, N, D, offset, stride_x, stride_y, stride_grad, num_segments, tiles, log2e, grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GROUP_M: tl.constexpr,
    SPAN: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Compute grad = grad_scale * G, and each program's sum of G_ij x_i . y_j before grad is rounded.

    With tensor descriptors and the shared shift, each column of tiles is cut into ``num_segments`` segments. Each of
    the first programs walks down the ``tiles`` tiles of a segment, and leaves out the tiles that may hold pairs. The
    other programs compute these, at most ``SPAN`` in a row of tiles. Without the shared shift, or without segments, all
    programs take tiles in turns. Without descriptors, a program computes one tile.
    """
    pid = tl.program_id(0)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    uses_shared_shift = tl.load(uses_shared_shift_ptr)
    walks = tl.where(uses_shared_shift != 0, num_segments * num_n, 0)
    if IS_TMA:
        if pid < walks:
            scale_sum = grad_segment(
                x, y, grad, scale_ptr, row_inv_denom_ptr, col_inv_denom_ptr,
                M, N, D, offset, num_segments, tiles, log2e, grad_scale, BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
            )  # fmt: skip
            tl.store(scale_sum_ptr + pid, scale_sum / grad_scale)
        else:
            scale_sum = 0.0
            first, count, programs = pid, num_m * num_n, tl.num_programs(0)
            if walks > 0:
                first, count, programs = first - walks, SPAN * num_m, programs - walks
            for tile in range(first, count, programs):
                if walks > 0:
                    pid_m, pid_n, is_wanted = tile_with_pairs(tile, offset, M, N, BLOCK_M, BLOCK_N, SPAN)
                else:
                    pid_m, pid_n = tile % num_m, tile // num_m
                    is_wanted = pid_n < num_n
                if is_wanted:
                    scale_sum += _grad_tile(
                        x, y, grad, scale_ptr, uses_shared_shift, row_max_ptr, row_inv_denom_ptr,
                        col_max_ptr, col_inv_denom_ptr, pid_m, pid_n, M, N, D, offset, stride_x, stride_y, stride_grad,
                        log2e, grad_scale, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, IS_TMA,
                    )  # fmt: skip
            tl.store(scale_sum_ptr + pid, scale_sum / grad_scale)
    else:
        pid_m, pid_n = grouped_tile(pid, num_m, num_n, GROUP_M)
        scale_sum = _grad_tile(
            x, y, grad, scale_ptr, uses_shared_shift, row_max_ptr, row_inv_denom_ptr, col_max_ptr, col_inv_denom_ptr,
            pid_m, pid_n, M, N, D, offset, stride_x, stride_y, stride_grad, log2e, grad_scale,
            BLOCK_M, BLOCK_N, BLOCK_K, PARTS, IS_TMA,
        )  # fmt: skip
        tl.store(scale_sum_ptr + pid, scale_sum / grad_scale)


@triton.jit
def _grad_tile(
    x, y, grad, scale_ptr, uses_shared_shift, row_max_ptr, row_inv_denom_ptr, col_max_ptr, col_inv_denom_ptr,
    pid_m, pid_n, M, N, D, offset, stride_x, stride_y, stride_grad, log2e, grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store one tile of the softmax losses' G; return the sum of its elements times the cosines."""
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    # These are loaded before the loop, so that they arrive while it runs.
    factor = tl.load(scale_ptr) * log2e
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    row_inv_denom = tl.load(row_inv_denom_ptr + offs_m, mask=offs_m < M, other=0.0) * grad_scale
    col_inv_denom = tl.load(col_inv_denom_ptr + offs_n, mask=offs_n < N, other=0.0) * grad_scale
    cosines = cosine_tile(x, y, start_m, start_n, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA)
    scale_sum = tl.zeros((BLOCK_M, 4), tl.float32)
    scale_sum = _store_grad(
        grad, cosines, scale_sum, factor, uses_shared_shift, row_max_ptr, row_inv_denom, col_max_ptr,
        col_inv_denom, start_m, start_n, M, N, offset, stride_grad, BLOCK_M, BLOCK_N, PARTS, IS_TMA,
    )  # fmt: skip
    return tl.sum(scale_sum)


@triton.jit
def _store_grad(
    grad, cosines, scale_sum, factor, uses_shared_shift, row_max_ptr, row_inv_denom, col_max_ptr, col_inv_denom,
    start_m, start_n, M, N, offset, stride_grad,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store grad_scale * G [BM, BN] of a softmax loss, and add the products of G and the cosines to ``scale_sum``.

    The products are computed before G is rounded. Both inv_denom, [BM] and [BN], are already multiplied by grad_scale.
    The columns are taken in ``PARTS`` parts, one after the other: all maxima at once would not fit into the registers.
    """
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves_of_columns(cosines, BLOCK_M, BLOCK_N)
        of_left, of_right = halves(col_inv_denom, BLOCK_N)
        scale_sum = _store_grad(
            grad, left, scale_sum, factor, uses_shared_shift, row_max_ptr, row_inv_denom, col_max_ptr, of_left,
            start_m, start_n, M, N, offset, stride_grad, BLOCK_M, HALF, PARTS // 2, IS_TMA,
        )  # fmt: skip
        scale_sum = _store_grad(
            grad, right, scale_sum, factor, uses_shared_shift, row_max_ptr, row_inv_denom, col_max_ptr, of_right,
            start_m, start_n + HALF, M, N, offset, stride_grad, BLOCK_M, HALF, PARTS // 2, IS_TMA,
        )  # fmt: skip
    else:
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if uses_shared_shift != 0:
            tile = tl.exp2(cosines * factor - shared_shift(factor)) * (
                row_inv_denom[:, None] + col_inv_denom[None, :]
            )  # [BM, BN]
        else:
            row_max = tl.load(row_max_ptr + offs_m, mask=offs_m < M, other=0.0)
            col_max = tl.load(col_max_ptr + offs_n, mask=offs_n < N, other=0.0)
            tile = (
                tl.exp2(cosines * factor - row_max[:, None]) * row_inv_denom[:, None]
                + tl.exp2(cosines * factor - col_max[None, :]) * col_inv_denom[None, :]
            )
            # Past the edges the logit is 0. It may be far above the maximum, and its power of 2 may then be infinite.
            if start_m + BLOCK_M > M:
                tile = tl.where((offs_m < M)[:, None], tile, 0.0)
            if start_n + BLOCK_N > N:
                tile = tl.where((offs_n < N)[None, :], tile, 0.0)
        tile = zero_pairs(tile, start_m, start_n, offset, BLOCK_M, BLOCK_N)
        store_tile(grad, tile, start_m, start_n, M, N, stride_grad, BLOCK_M, BLOCK_N, IS_TMA)
        scale_sum += tl.sum(tl.sum(tl.reshape(tile * cosines, (BLOCK_M, BLOCK_N // 8, 4, 2)), 3), 1)
    return scale_sum


@triton.jit
def _terms(maximum, total, positive):
    """Return loss, inv_denom and one_minus_p of one direction, given statistics and positives in base 2, each [B]."""
    # The sum is split into exponent and mantissa, as by frexp. The exponent is subtracted from the distance, without
    # rounding if the two cancel, and only a logarithm in [-1, 0] is rounded. Subnormal sums are scaled first.
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
    """Write maximum, inv_denom and one_minus_p of rows (in the first programs) and of columns, and sums of the losses.

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

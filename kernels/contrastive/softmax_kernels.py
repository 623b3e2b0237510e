"""The Triton kernels of the softmax losses (contrastive, InfoNCE, NT-Xent).

Logits are in base 2: l_ij = log2e * scale * x_i . y_j.

    statistics  row sums_i = sum_j 2^(l_ij - m) and column sums_j = sum_i 2^(l_ij - m) of each tile, without the pairs
    pairs       the sums of tiles, added in the order of the tiles; the logits of the pairs; for a loss also its terms,
                inv_denom and one_minus_p, as ``stats.pair_terms`` computes them
    gradient    G_ij = 2^(l_ij - max_i) inv_denom_i + 2^(l_ij - max_j) inv_denom_j, 0 for pairs, in the operands' dtype

With the shared shift (``stats.shared_shift``), m and all maxima are one number. Then one exponential serves both
directions, and no maximum is computed. The exponentials take half as long as the product, and overlap with it. If
logits lie far from the shift, sums overflow or underflow, and each row and column needs its own maximum. Only the
device knows whether they do: a program of the pairs kernel that finds such sums computes the logits of its rows and
columns once more.

The loss subtracts the logit of a pair from others, so all must be rounded alike. Where all features are equal, one last
bit of a logit of 144 (a scale of 100, times log2e) would be an error of 1e-5. Therefore the logit of a pair is an
element of a tile, never a sum of its own: it is stored by the program of its tile, or the pairs kernel computes it by
the same instructions.
"""

import triton
import triton.language as tl

from ..tiles import grouped_tile, halves, halves_of_columns, log_1p, online_softmax_step
from .tiles import (
    cosine_tile,
    grad_segment,
    shared_shift,
    store_tile,
    sum_segment,
    tile_with_pairs,
    without_pairs,
    zero_pairs,
)


@triton.jit
def _stats_kernel(
    x,  # [M, D]
    y,  # [N, D]
    scale_ptr,  # [] fp32
    row_sum_ptr,  # [tiles of N, M] fp32
    col_sum_ptr,  # [tiles of M, N] fp32, or with IS_TMA [segments, N]
    positive_ptr,  # [M] fp32, the logits of the pairs; unused with IS_TMA
    M, N, D, offset, stride_x, stride_y, num_segments, tiles, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr, WARP_ROWS: tl.constexpr,
):  # fmt: skip
    """Sum rows and columns of tiles with the shared shift, without the pairs (i, i + offset).

    With tensor descriptors, a program sums the ``tiles`` tiles of one of ``num_segments`` segments of a column of
    tiles. To store the logits of the pairs as well, it would need more registers than there are. Without descriptors, a
    program sums one tile, and stores the logits of the tile's pairs.
    """
    if IS_TMA:
        sum_segment(
            x, y, scale_ptr, row_sum_ptr, col_sum_ptr, M, N, D, offset, num_segments, tiles, log2e,
            BLOCK_M, BLOCK_N, BLOCK_K, WARP_ROWS,
        )  # fmt: skip
    else:
        pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
        cosines = cosine_tile(
            x, y, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA
        )
        factor = tl.load(scale_ptr) * log2e
        logits = without_pairs(cosines * factor, positive_ptr, pid_m, pid_n, M, N, offset, BLOCK_M, BLOCK_N)
        p = tl.exp2(logits - shared_shift(factor))  # [BM, BN]
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(row_sum_ptr + pid_n.to(tl.int64) * M + offs_m, tl.sum(p, 1), mask=offs_m < M)
        tl.store(col_sum_ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(p, 0), mask=offs_n < N)


@triton.jit
def _pairs_kernel(
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    scale_ptr,  # [] fp32
    row_sums_ptr,  # [row_tiles, M] fp32, of tiles, with the shared shift
    col_sums_ptr,  # [col_tiles, N] fp32
    positive_ptr,  # [M] fp32, the logits of the pairs; written with IS_TMA
    row_ptr,  # [3, M] fp32
    col_ptr,  # [3, N] fp32
    loss_ptr,  # [programs] fp32
    uses_shared_shift_ptr,  # [programs] int8
    M, N, D, offset, first, stride_x, stride_y, row_tiles, col_tiles, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    IS_TMA: tl.constexpr, IS_LOSS: tl.constexpr, IS_BOTH: tl.constexpr,
):  # fmt: skip
    """Compute the maxima and sums of logits, and the logits of pairs, of BLOCK_M rows from ``first`` on and the columns
    that are paired with them.

    Without IS_LOSS, store maximum and sum. With IS_LOSS, store maximum, inv_denom and one_minus_p, which is summed over
    the directions, and the sum of the losses. Rows and columns without a pair then have inv_denom and one_minus_p 0.
    Unless IS_BOTH, the loss has only the direction of the rows, and inv_denom of the columns is 0.
    """
    pid = tl.program_id(0)
    rows = first + pid * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = rows + offset
    has_row, has_col = (rows >= 0) & (rows < M), (cols >= 0) & (cols < N)
    has_pair = has_row & has_col
    factor = tl.load(scale_ptr) * log2e
    if IS_TMA:
        cosines = _cosines(
            x_ptr, y_ptr, rows, cols, has_pair, has_pair, D, stride_x, stride_y, BLOCK_M, BLOCK_M, BLOCK_K
        )
        logits = tl.where(rows[:, None] + offset == cols[None, :], cosines * factor, 0.0)
        # Triton 3.6 fails to compile for sm_100 unless the logits of the pairs go through memory.
        tl.store(positive_ptr + rows, tl.sum(logits, 1), mask=has_pair)
        tl.debug_barrier()
    positive = tl.load(positive_ptr + rows, mask=has_pair, other=0.0)
    row_max = tl.zeros((BLOCK_M,), tl.float32) + shared_shift(factor)
    col_max = row_max
    row_sum = _sum_of_tiles(row_sums_ptr, rows, has_row, row_tiles, M, BLOCK_M, CHUNK)
    col_sum = _sum_of_tiles(col_sums_ptr, cols, has_col, col_tiles, N, BLOCK_M, CHUNK)
    is_wrong = tl.max((_is_wrong(row_sum, has_row) | _is_wrong(col_sum, has_col)).to(tl.int32), 0)
    if is_wrong != 0:
        row_max, row_sum = _online(
            x_ptr, y_ptr, rows, has_row, N, D, offset, stride_x, stride_y, factor, BLOCK_M, BLOCK_N, BLOCK_K, True
        )
        col_max, col_sum = _online(
            x_ptr, y_ptr, cols, has_col, M, D, -offset, stride_x, stride_y, factor, BLOCK_M, BLOCK_N, BLOCK_K, False
        )
    tl.store(uses_shared_shift_ptr + pid, (is_wrong == 0).to(tl.int8))
    tl.store(row_ptr + rows, row_max, mask=has_row)
    tl.store(col_ptr + cols, col_max, mask=has_col)
    if IS_LOSS:
        loss, row_inv, one_minus_p = _terms(row_max, row_sum, positive)
        col_inv = tl.zeros((BLOCK_M,), tl.float32)
        if IS_BOTH:
            col_loss, col_inv, col_one_minus_p = _terms(col_max, col_sum, positive)
            loss += col_loss
            one_minus_p += col_one_minus_p
        one_minus_p = tl.where(has_pair, one_minus_p, 0.0)
        tl.store(row_ptr + M + rows, tl.where(has_pair, row_inv, 0.0), mask=has_row)
        tl.store(col_ptr + N + cols, tl.where(has_pair, col_inv, 0.0), mask=has_col)
        tl.store(row_ptr + 2 * M + rows, one_minus_p, mask=has_row)
        tl.store(col_ptr + 2 * N + cols, one_minus_p, mask=has_col)
        tl.store(loss_ptr + pid, tl.sum(tl.where(has_pair, loss, 0.0), 0))
    else:
        tl.store(row_ptr + M + rows, row_sum, mask=has_row)
        tl.store(col_ptr + N + cols, col_sum, mask=has_col)
        tl.store(loss_ptr + pid, 0.0)


@triton.jit
def _sum_of_tiles(sums_ptr, own, mask, num_tiles, N, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Return the sums over ``num_tiles`` tiles [BLOCK] of the rows (or columns) ``own``, from sums [num_tiles, N]."""
    sums = tl.zeros((CHUNK, BLOCK), tl.float32)
    for first in range(0, num_tiles, CHUNK):
        tiles = first + tl.arange(0, CHUNK)
        offs = tiles.to(tl.int64)[:, None] * N + own[None, :]
        sums += tl.load(sums_ptr + offs, mask=(tiles < num_tiles)[:, None] & mask[None, :], other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _is_wrong(total, mask):
    """Return True for sums with the shared shift that have overflowed or lost terms that matter, or are NaN.

    A sum below 2^-70 may lack terms that underflowed. Above it, such terms are less than the rounding of the sum.
    """
    is_exact = (total >= 8.470329472543003e-22) & (total < float("inf"))
    return mask & (is_exact == 0)


@triton.jit
def _online(
    x_ptr, y_ptr, own, mask_own, N, D, offset, stride_x, stride_y, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_ROW: tl.constexpr,
):  # fmt: skip
    """Return maxima and sums [BM] of the logits of the rows ``own`` (or columns) against all N of the other side.

    A sum is that of 2^(logit - maximum). The logits of the pairs (i, i + offset) are left out.
    """
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        others = offs_n < N
        if IS_ROW:
            cosines = _cosines(
                x_ptr, y_ptr, own, offs_n, mask_own, others, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K
            )
        else:
            cosines = _cosines(
                x_ptr, y_ptr, offs_n, own, others, mask_own, D, stride_x, stride_y, BLOCK_N, BLOCK_M, BLOCK_K
            ).T
        is_left_out = ((own + offset)[:, None] == offs_n[None, :]) | (offs_n >= N)[None, :]
        logits = tl.where(is_left_out, float("-inf"), cosines * factor)  # [BM, BN]
        _, _, row_max, row_sum = online_softmax_step(logits, row_max, row_sum, 1.0)
    return row_max, row_sum


@triton.jit
def _cosines(
    x_ptr, y_ptr, rows, cols, mask_m, mask_n, D, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the products [BM, BN] of some rows of x and of y, as ``cosine_tile`` computes them.

    Large logits must have the same bits as in the kernel of G, since G is a power of their distance to the maximum.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x
    y_rows = y_ptr + cols.to(tl.int64)[:, None] * stride_y
    for start_k in range(0, D, BLOCK_K):
        dims = (start_k + tl.arange(0, BLOCK_K))[None, :]
        x = tl.load(x_rows + dims, mask=mask_m[:, None] & (dims < D), other=0.0)  # [BM, BK]
        y = tl.load(y_rows + dims, mask=mask_n[:, None] & (dims < D), other=0.0)  # [BN, BK]
        acc = tl.dot(x, y.T, acc, input_precision="ieee")
    return acc


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
    M, N, D, offset, stride_x, stride_y, stride_grad, walks, tiles, log2e, grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GROUP_M: tl.constexpr,
    SPAN: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Compute grad = grad_scale * G, and each program's sum of G_ij x_i . y_j before grad is rounded.

    With tensor descriptors and the shared shift, each of the first ``walks`` programs walks down the ``tiles`` tiles of
    a segment of a column of tiles, and leaves out the tiles that may hold pairs. The other programs compute these, at
    most ``SPAN`` in a row of tiles. Without the shared shift, or if ``walks`` is 0, all programs take tiles in turns.
    Without descriptors, a program computes one tile.
    """
    pid = tl.program_id(0)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    uses_shared_shift = tl.load(uses_shared_shift_ptr)
    # The number of segments of a column is no argument: as the constant that Triton makes of a 1, it costs a register.
    walks = tl.where(uses_shared_shift != 0, walks, 0)
    if IS_TMA:
        if pid < walks:
            scale_sum = grad_segment(
                x, y, grad, scale_ptr, row_inv_denom_ptr, col_inv_denom_ptr,
                M, N, D, offset, walks // num_n, tiles, log2e, grad_scale, BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
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
    # The scale and both inv_denom are loaded before the loop over D, so that they arrive while it runs.
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
    # A positive that is not finite shows in the loss, even without any other logit. Beside other logits, a positive of
    # -inf makes the loss infinite.
    shown = tl.where(total > 0.0, tl.maximum(positive, 0.0), positive)
    others = tl.where(total > 0.0, others, float("-inf")) + (shown - shown)
    others = tl.where(total < float("inf"), others, total)  # a sum that is infinite or NaN shows in the loss
    e = tl.exp2(-tl.abs(others))
    nll = tl.maximum(others, 0.0, propagate_nan=tl.PropagateNan.ALL) * 0.6931471805599453 + log_1p(e)
    return nll, 1.0 / (total + tl.exp2(distance)), tl.where(others > 0.0, 1.0, e) / (1.0 + e)

"""The Triton kernels of the losses with a softmax. Logits are in base 2: l_ij = log2e * scale * x_i . y_j.

    statistics  row sums_i = sum_j 2^(l_ij - m) and column sums_j = sum_i 2^(l_ij - m) of each tile, without the pairs
    merge       the sums of tiles, added in the order of the tiles
    gradient    G_ij = 2^(l_ij - max_i) inv_denom_i + 2^(l_ij - max_j) inv_denom_j, 0 for pairs, in the operands' dtype

With the shared shift, m and all maxima are one number. Then one exponential serves both directions and no maximum is
taken, so the exponentials take half of the time that the product takes, and overlap with it. Logits that the shared
shift does not suit need a maximum for each row and column (``IS_ONLINE``). Which of the two holds is known on the
device only: the kernels of both cases start, and those of the other case read the flag and end.
"""

import triton
import triton.language as tl

from ..tiles import grouped_tile
from .logit_tiles import cosine_tile, store_tile, without_pairs, zero_pairs


@triton.jit
def _logits(
    x, y, scale_ptr, start_m, start_n, M, N, D, stride_x, stride_y, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Return the logits [BM, BN] of one tile, in base 2, and their shared shift."""
    cosines = cosine_tile(x, y, start_m, start_n, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA)
    factor = tl.load(scale_ptr) * log2e
    return cosines * factor, _shared_shift(factor)


@triton.jit
def _shared_shift(factor):
    """Return the shift of ``softmax_stats.shared_shift`` for log2e times the scale."""
    return tl.maximum(tl.ceil(tl.abs(factor)) - 100.0, 0.0)


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
        _sum_segment(
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
def _sum_segment(
    x, y, scale_ptr, row_sum_ptr, col_sum_ptr, M, N, D, offset, num_segments, tiles, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARP_ROWS: tl.constexpr,
):  # fmt: skip
    """Store the sums of a segment's rows, tile by tile, and those of its columns.

    The loop runs over all steps of all tiles, so that the next tile is being loaded while the last one is summed.
    """
    segment, pid_n = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    factor = tl.load(scale_ptr) * log2e
    shift = _shared_shift(factor)
    # The warps hold WARP_ROWS rows of a product at a time, 16 each, and a thread the rows r and r + 8 of its warp's. To
    # sum what a thread holds takes no exchange between threads; these sums are added once, after the last tile.
    col_sum = tl.zeros((WARP_ROWS // 16, 8, BLOCK_N), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(D, BLOCK_K)
    step, pid_m = -1, segment * tiles - 1
    tl.assume(tiles * steps > 0)
    for _ in range(tiles * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            pid_m += 1
        x_tile = x.load([pid_m * BLOCK_M, step * BLOCK_K])  # [BM, BK]
        y_tile = y.load([pid_n * BLOCK_N, step * BLOCK_K])  # [BN, BK]
        acc = tl.dot(x_tile, y_tile.T, acc, input_precision="ieee")
        if step == steps - 1:
            # The accumulator must be used before ``without_pairs`` branches: in a branch, the compiler would wait for
            # the product on one of the two ways only. To store the pairs here as well would take the last registers.
            logits = acc * factor
            logits = without_pairs(logits, None, pid_m, pid_n, M, N, offset, BLOCK_M, BLOCK_N)
            p = tl.exp2(logits - shift)  # [BM, BN]
            offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(row_sum_ptr + pid_n.to(tl.int64) * M + offs_m, tl.sum(p, 1), mask=offs_m < M)
            of_warps = tl.sum(tl.reshape(p, (BLOCK_M // WARP_ROWS, WARP_ROWS, BLOCK_N)), 0)
            col_sum += tl.sum(tl.reshape(of_warps, (WARP_ROWS // 16, 2, 8, BLOCK_N)), 1)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.sum(tl.reshape(col_sum, (WARP_ROWS // 2, BLOCK_N)), 0)
    tl.store(col_sum_ptr + segment.to(tl.int64) * N + offs_n, total, mask=offs_n < N)


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
    rows = offs_m.to(tl.int64)[:, None]
    factor = tl.load(scale_ptr) * log2e
    cosines = tl.zeros((BLOCK_M,), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = (start_k + tl.arange(0, BLOCK_K))[None, :]
        mask = has_pair[:, None] & (dims < D)
        x = tl.load(x_ptr + rows * stride_x + dims, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        y = tl.load(y_ptr + (rows + offset) * stride_y + dims, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        cosines += tl.sum(x * y, 1)
    tl.store(positive_ptr + offs_m, cosines * factor, mask=has_pair)


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
    tile_max_ptr,  # [TILES, N] fp32; unused with the shared shift
    tile_sum_ptr,  # [TILES, N] fp32
    scale_ptr,  # [] fp32
    max_ptr,  # [N] fp32
    sum_ptr,  # [N] fp32
    uses_shared_shift_ptr,  # [] int8, used if IS_ONLINE
    TILES, N, log2e,
    BLOCK: tl.constexpr, IS_ONLINE: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Fold the maxima and sums of tiles into those of all tiles before them (``IS_FIRST``: there are none).

    With the shared shift, that stands in the place of each maximum.
    """
    if IS_ONLINE and tl.load(uses_shared_shift_ptr) != 0:
        return
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    total_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if not IS_FIRST:
        total = tl.load(sum_ptr + offs_n, mask=mask, other=0.0)
        if IS_ONLINE:
            total_max = tl.load(max_ptr + offs_n, mask=mask, other=0.0)
    for tile in range(TILES):
        offs = tl.cast(tile, tl.int64) * N + offs_n
        tile_sum = tl.load(tile_sum_ptr + offs, mask=mask, other=0.0)
        if IS_ONLINE:
            tile_max = tl.load(tile_max_ptr + offs, mask=mask, other=0.0)
            new_max = tl.maximum(total_max, tile_max, propagate_nan=tl.PropagateNan.ALL)
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            total = total * tl.exp2(total_max - pivot) + tile_sum * tl.exp2(tile_max - pivot)
            total_max = new_max
        else:
            total += tile_sum
    tl.store(sum_ptr + offs_n, total, mask=mask)
    if IS_ONLINE:
        tl.store(max_ptr + offs_n, total_max, mask=mask)
    elif IS_FIRST:
        shift = _shared_shift(tl.load(scale_ptr) * log2e)
        tl.store(max_ptr + offs_n, tl.zeros((BLOCK,), tl.float32) + shift, mask=mask)


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
    scale_sum_ptr,  # [tiles] fp32
    M, N, D, offset, stride_x, stride_y, stride_grad, log2e, grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Compute grad = grad_scale * G for one tile, and the tile's sum of G_ij x_i . y_j before grad is rounded."""
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    # One half of the columns after the other: maxima and inv_denom of all at once would not fit the registers.
    HALF: tl.constexpr = BLOCK_N // 2
    # What is loaded before the loop arrives while the loop runs.
    factor, uses_shared_shift = tl.load(scale_ptr) * log2e, tl.load(uses_shared_shift_ptr)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, HALF)
    row_inv_denom = tl.load(row_inv_denom_ptr + offs_m, mask=offs_m < M, other=0.0)
    left_inv_denom = tl.load(col_inv_denom_ptr + offs_n, mask=offs_n < N, other=0.0)
    right_inv_denom = tl.load(col_inv_denom_ptr + offs_n + HALF, mask=offs_n + HALF < N, other=0.0)
    cosines = cosine_tile(x, y, start_m, start_n, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA)
    left, right = tl.split(tl.permute(tl.reshape(cosines, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    row_inv_denom *= grad_scale
    scale_sum = _store_grad_half(
        grad, left, factor, uses_shared_shift, row_max_ptr, row_inv_denom, col_max_ptr, left_inv_denom * grad_scale,
        start_m, start_n, M, N, offset, stride_grad, BLOCK_M, HALF, IS_TMA,
    )  # fmt: skip
    scale_sum += _store_grad_half(
        grad, right, factor, uses_shared_shift, row_max_ptr, row_inv_denom, col_max_ptr, right_inv_denom * grad_scale,
        start_m, start_n + HALF, M, N, offset, stride_grad, BLOCK_M, HALF, IS_TMA,
    )  # fmt: skip
    tl.store(scale_sum_ptr + tl.program_id(0), scale_sum / grad_scale)


@triton.jit
def _store_grad_half(
    grad, cosines, factor, uses_shared_shift, row_max_ptr, row_inv_denom, col_max_ptr, col_inv_denom,
    start_m, start_n, M, N, offset, stride_grad,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store grad_scale * G [BM, BN] for cosines [BM, BN]; return the sum of their product, from G before rounding.

    Both inv_denom, [BM] and [BN], are already multiplied by grad_scale.
    """
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    if uses_shared_shift != 0:
        tile = tl.exp2(cosines * factor - _shared_shift(factor)) * (
            row_inv_denom[:, None] + col_inv_denom[None, :]
        )  # [BM, BN]
    else:
        row_max = tl.load(row_max_ptr + offs_m, mask=offs_m < M, other=0.0)
        col_max = tl.load(col_max_ptr + offs_n, mask=offs_n < N, other=0.0)
        tile = (
            tl.exp2(cosines * factor - row_max[:, None]) * row_inv_denom[:, None]
            + tl.exp2(cosines * factor - col_max[None, :]) * col_inv_denom[None, :]
        )
        # Past the edges the logit is 0, which may be far above the maximum: its power of 2 may be infinite.
        if start_m + BLOCK_M > M:
            tile = tl.where((offs_m < M)[:, None], tile, 0.0)
        if start_n + BLOCK_N > N:
            tile = tl.where((offs_n < N)[None, :], tile, 0.0)
    tile = zero_pairs(tile, start_m, start_n, offset, BLOCK_M, BLOCK_N)
    store_tile(grad, tile, start_m, start_n, M, N, stride_grad, BLOCK_M, BLOCK_N, IS_TMA)
    # The sum is over both axes at once: on sm_100, Triton 3.6 fails to sum a half along one axis.
    return tl.sum(tile * cosines)

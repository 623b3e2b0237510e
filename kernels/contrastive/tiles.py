"""The Triton kernels of the contrastive losses. Logits are in base 2: l_ij = log2e * scale * x_i . y_j.

    statistics  row sums_i = sum_j 2^(l_ij - m), column sums_j = sum_i 2^(l_ij - m), pairs left out, by tile
    merge       sums of tiles, in their order
    gradient    G_ij = 2^(l_ij - max_i) weight_i + 2^(l_ij - max_j) weight_j, pairs 0, in the operands' dtype
    products    acc_x += G y and acc_y += G^T x in float32, one writer for each tile
    finish      grad = factor * (acc - miss * positive), through the normalisation

With the shared shift, m and all maxima are one number, one exponential serves both directions, and no maximum is taken:
the exponentials then take half of the time that the product takes, and overlap with it. Any other logits need a maximum
for each row and column (``IS_ONLINE``). Which of the two holds is known on the device only: the kernels for the other
case start, read the flag and end.
"""

import triton
import triton.language as tl

from ..tiles import grouped_tile, load_tile


@triton.jit
def _cosines(
    x, y, start_m, start_n, M, N, D, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Products x_i . y_j [BM, BN] of one tile; zeros past the edges."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        x_tile = load_tile(x, start_m, start_k, M, D, stride_x, BLOCK_M, BLOCK_K, IS_TMA)  # [BM, BK]
        y_tile = load_tile(y, start_n, start_k, N, D, stride_y, BLOCK_N, BLOCK_K, IS_TMA)  # [BN, BK]
        acc = tl.dot(x_tile, y_tile.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _logits(
    x, y, scale_ptr, start_m, start_n, M, N, D, stride_x, stride_y, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Logits [BM, BN] in base 2 of one tile, and their shared shift."""
    cosines = _cosines(x, y, start_m, start_n, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA)
    factor = tl.load(scale_ptr) * log2e
    return cosines * factor, _shared_shift(factor)


@triton.jit
def _shared_shift(factor):
    return tl.maximum(tl.ceil(tl.abs(factor)) - 100.0, 0.0)


@triton.jit
def _stats_kernel(
    x,  # [M, D]
    y,  # [N, D]
    scale_ptr,  # [] fp32
    row_sum_ptr,  # [tiles of N, M] fp32
    col_sum_ptr,  # [tiles of M, N] fp32
    positive_ptr,  # [M] fp32
    M, N, D, diagonal, stride_x, stride_y, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Sums of one tile's rows and columns with the shared shift, without the pairs (i, i + diagonal), and the logits of
    the pairs.
    """
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    logits, shift = _logits(
        x, y, scale_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, D, stride_x, stride_y, log2e,
        BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA,
    )  # fmt: skip
    logits = _without_pairs(logits, positive_ptr, pid_m, pid_n, M, N, diagonal, BLOCK_M, BLOCK_N)
    p = tl.exp2(logits - shift)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(row_sum_ptr + pid_n.to(tl.int64) * M + offs_m, tl.sum(p, 1), mask=offs_m < M)
    tl.store(col_sum_ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(p, 0), mask=offs_n < N)


@triton.jit
def _without_pairs(
    logits, positive_ptr, pid_m, pid_n, M, N, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Logits of a tile with -inf for its pairs and past the edges; the pairs' go to ``positive_ptr``."""
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    first_pair = start_m + diagonal  # column of the first row's pair
    has_pairs = (first_pair < start_n + BLOCK_N) & (start_n < first_pair + BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    # most tiles have neither pairs nor an edge, and no time for masks; one after the other, they need fewer registers
    if has_pairs:
        paired = offs_m + diagonal
        is_pair = paired[:, None] == offs_n[None, :]  # [BM, BN]
        in_tile = (offs_m < M) & (paired >= start_n) & (paired < tl.minimum(start_n + BLOCK_N, N))
        tl.store(positive_ptr + offs_m, tl.sum(tl.where(is_pair, logits, 0.0), 1), mask=in_tile)
        logits = tl.where(is_pair, float("-inf"), logits)
    if start_m + BLOCK_M > M:
        logits = tl.where((offs_m < M)[:, None], logits, float("-inf"))
    if start_n + BLOCK_N > N:
        logits = tl.where((offs_n < N)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _online_stats_kernel(
    x,  # [M, D]
    y,  # [N, D]
    scale_ptr,  # [] fp32
    shared_ptr,  # [] int8: the shared shift suits these logits
    row_max_ptr,  # [tiles of N, M] fp32, of each tile
    row_sum_ptr,  # [tiles of N, M] fp32
    col_max_ptr,  # [tiles of M, N] fp32
    col_sum_ptr,  # [tiles of M, N] fp32
    positive_ptr,  # [M] fp32
    M, N, D, diagonal, stride_x, stride_y, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of tiles, for logits that the shared shift does not suit; few programs: most end at once."""
    if tl.load(shared_ptr) != 0:
        return
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
        logits, _ = _logits(
            x, y, scale_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, D, stride_x, stride_y, log2e,
            BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA,
        )  # fmt: skip
        logits = _without_pairs(logits, positive_ptr, pid_m, pid_n, M, N, diagonal, BLOCK_M, BLOCK_N)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = pid_n.to(tl.int64) * M + offs_m
        cols = pid_m.to(tl.int64) * N + offs_n
        row_max = tl.max(logits, 1)
        col_max = tl.max(logits, 0)
        tl.store(row_max_ptr + rows, row_max, mask=offs_m < M)
        tl.store(col_max_ptr + cols, col_max, mask=offs_n < N)
        # a finite pivot: where nothing is left of a row, its maximum minus itself would be NaN
        row_pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
        col_pivot = tl.where(col_max == float("-inf"), 0.0, col_max)
        tl.store(row_sum_ptr + rows, tl.sum(tl.exp2(logits - row_pivot[:, None]), 1), mask=offs_m < M)
        tl.store(col_sum_ptr + cols, tl.sum(tl.exp2(logits - col_pivot[None, :]), 0), mask=offs_n < N)


@triton.jit
def _merge_kernel(
    tile_max_ptr,  # [TILES, N] fp32; unused with the shared shift
    tile_sum_ptr,  # [TILES, N] fp32
    max_ptr,  # [N] fp32
    sum_ptr,  # [N] fp32
    shared_ptr,  # [] int8
    TILES, N,
    BLOCK: tl.constexpr, IS_ONLINE: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Fold the maxima and sums of tiles into those of all before them (``IS_FIRST``: there are none)."""
    if IS_ONLINE and tl.load(shared_ptr) != 0:
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


@triton.jit
def _grad_tile_kernel(
    x,  # [M, D]
    y,  # [N, D]
    grad,  # [M, N], the operands' dtype
    scale_ptr,  # [] fp32
    shared_ptr,  # [] int8
    row_max_ptr,  # [M] fp32
    row_weight_ptr,  # [M] fp32
    col_max_ptr,  # [N] fp32
    col_weight_ptr,  # [N] fp32
    dot_ptr,  # [tiles] fp32
    M, N, D, diagonal, stride_x, stride_y, stride_grad, log2e, grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """grad = grad_scale * G for one tile, and the tile's sum of grad_ij x_i . y_j before grad is rounded."""
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    cosines = _cosines(x, y, start_m, start_n, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA)
    factor = tl.load(scale_ptr) * log2e
    # one half after the other: for all columns at once, maxima and weights would not fit the registers
    HALF: tl.constexpr = BLOCK_N // 2
    halves = tl.split(tl.permute(tl.reshape(cosines, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    dot = 0.0
    for half in tl.static_range(2):
        dot += _store_grad_half(
            grad, halves[half], factor, shared_ptr, row_max_ptr, row_weight_ptr, col_max_ptr, col_weight_ptr,
            start_m, start_n + half * HALF, M, N, diagonal, stride_grad, grad_scale, BLOCK_M, HALF, IS_TMA,
        )  # fmt: skip
    tl.store(dot_ptr + tl.program_id(0), dot)


@triton.jit
def _store_grad_half(
    grad, cosines, factor, shared_ptr, row_max_ptr, row_weight_ptr, col_max_ptr, col_weight_ptr,
    start_m, start_n, M, N, diagonal, stride_grad, grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    row_weight = tl.load(row_weight_ptr + offs_m, mask=offs_m < M, other=0.0) * grad_scale
    col_weight = tl.load(col_weight_ptr + offs_n, mask=offs_n < N, other=0.0) * grad_scale
    if tl.load(shared_ptr) != 0:
        tile = tl.exp2(cosines * factor - _shared_shift(factor)) * (
            row_weight[:, None] + col_weight[None, :]
        )  # [BM, BN]
    else:
        row_max = tl.load(row_max_ptr + offs_m, mask=offs_m < M, other=0.0)
        col_max = tl.load(col_max_ptr + offs_n, mask=offs_n < N, other=0.0)
        tile = (
            tl.exp2(cosines * factor - row_max[:, None]) * row_weight[:, None]
            + tl.exp2(cosines * factor - col_max[None, :]) * col_weight[None, :]
        )
        # past the edges, a logit of 0 may be far above the maximum
        if start_m + BLOCK_M > M:
            tile = tl.where((offs_m < M)[:, None], tile, 0.0)
        if start_n + BLOCK_N > N:
            tile = tl.where((offs_n < N)[None, :], tile, 0.0)
    tile = zero_pairs(tile, start_m, start_n, diagonal, BLOCK_M, BLOCK_N)
    store_grad(grad, tile, start_m, start_n, M, N, stride_grad, BLOCK_M, BLOCK_N, IS_TMA)
    # of all at once: Triton 3.6 fails on sm_100 where what was split is summed along an axis
    return tl.sum(tile * cosines)


@triton.jit
def zero_pairs(tile, start_m, start_n, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of G with zeros for its pairs."""
    first_pair = start_m + diagonal
    if (first_pair < start_n + BLOCK_N) & (start_n < first_pair + BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        tile = tl.where((offs_m + diagonal)[:, None] == offs_n[None, :], 0.0, tile)
    return tile


@triton.jit
def store_grad(
    grad, tile, start_m, start_n, M, N, stride_grad,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store a tile of G in the operands' dtype."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    if IS_TMA:
        grad.store([start_m, start_n], tile.to(grad.dtype))
    else:
        pointers = grad + offs_m.to(tl.int64)[:, None] * stride_grad + offs_n[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(pointers, tile.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _products_kernel(
    grad,  # [M, N], tiles of [BM, BK]
    grad_cols,  # the same, tiles of [BK, BM]
    x,  # [M, D]
    y,  # [N, D]
    acc_x_ptr,  # [M, D] fp32, contiguous
    acc_y_ptr,  # [N, D] fp32, contiguous
    M, N, D, num_x_tiles, stride_grad, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """acc_x += grad y (the first ``num_x_tiles`` programs) and acc_y += grad^T x (the others)."""
    pid = tl.program_id(0)
    num_d = tl.cdiv(D, BLOCK_N)
    if pid < num_x_tiles:
        start_m, start_d = pid // num_d * BLOCK_M, pid % num_d * BLOCK_N
        acc = _load_accumulator(acc_x_ptr, start_m, start_d, M, D, BLOCK_M, BLOCK_N)
        for start_k in range(0, N, BLOCK_K):
            g = load_tile(grad, start_m, start_k, M, N, stride_grad, BLOCK_M, BLOCK_K, IS_TMA)  # [BM, BK]
            b = load_tile(y, start_k, start_d, N, D, stride_y, BLOCK_K, BLOCK_N, IS_TMA)  # [BK, BN]
            acc = tl.dot(g, b, acc, input_precision="ieee")
        _store_accumulator(acc_x_ptr, acc, start_m, start_d, M, D, BLOCK_M, BLOCK_N)
    else:
        pid -= num_x_tiles
        start_m, start_d = pid // num_d * BLOCK_M, pid % num_d * BLOCK_N
        acc = _load_accumulator(acc_y_ptr, start_m, start_d, N, D, BLOCK_M, BLOCK_N)
        for start_k in range(0, M, BLOCK_K):
            g = load_tile(grad_cols, start_k, start_m, M, N, stride_grad, BLOCK_K, BLOCK_M, IS_TMA)  # [BK, BM]
            b = load_tile(x, start_k, start_d, M, D, stride_x, BLOCK_K, BLOCK_N, IS_TMA)  # [BK, BN]
            acc = tl.dot(g.T, b, acc, input_precision="ieee")
        _store_accumulator(acc_y_ptr, acc, start_m, start_d, N, D, BLOCK_M, BLOCK_N)


@triton.jit
def _load_accumulator(ptr, start_m, start_d, M, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The accumulator [BM, BN]: loaded before the product, since afterwards there are no registers for it."""
    return load_tile(ptr, start_m, start_d, M, D, D, BLOCK_M, BLOCK_N, False)


@triton.jit
def _store_accumulator(ptr, acc, start_m, start_d, M, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = start_d + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    tl.store(ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :], acc, mask=mask)

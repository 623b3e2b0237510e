"""Triton functions on tiles of logits, or of their gradient G, which the kernels of the contrastive losses share.

``sum_segment`` and ``grad_segment`` walk down a column of tiles, on GPUs with tensor descriptors. The steps of all
tiles of a segment form one loop, so the first operands of a tile are loaded while the tile before is still computed.
The vectors of the columns stay in registers for the whole segment. The kernels that call these functions state the
equations.
"""

import triton
import triton.language as tl

from ..tiles import halves, halves_of_columns, load_tile


@triton.jit
def shared_shift(factor):
    """Return the shift that ``stats.shared_shift`` defines; ``factor`` is log2e times the scale."""
    return tl.maximum(tl.ceil(tl.abs(factor)) - 100.0, 0.0)


@triton.jit
def has_pairs(start_m, start_n, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return whether a tile [BM, BN] at (start_m, start_n) may hold a pair (i, i + offset)."""
    first_pair = start_m + offset  # column of the first row's pair
    return (first_pair < start_n + BLOCK_N) & (start_n < first_pair + BLOCK_M)


@triton.jit
def cosine_tile(
    x, y, start_m, start_n, M, N, D, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Return the products x_i . y_j [BM, BN] of one tile; they are 0 past the edges."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        x_tile = load_tile(x, start_m, start_k, M, D, stride_x, BLOCK_M, BLOCK_K, IS_TMA)  # [BM, BK]
        y_tile = load_tile(y, start_n, start_k, N, D, stride_y, BLOCK_N, BLOCK_K, IS_TMA)  # [BN, BK]
        acc = tl.dot(x_tile, y_tile.T, acc, input_precision="ieee")
    return acc


@triton.jit
def pair_cosines(
    x_ptr, y_ptr, offs_m, has_pair, D, offset, stride_x, stride_y, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Return x_i . y_(i + offset) [BM] for the rows ``offs_m``; it is 0 in a row without a pair."""
    rows = offs_m.to(tl.int64)[:, None]
    cosines = tl.zeros((BLOCK_M,), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = (start_k + tl.arange(0, BLOCK_K))[None, :]
        mask = has_pair[:, None] & (dims < D)
        x = tl.load(x_ptr + rows * stride_x + dims, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        y = tl.load(y_ptr + (rows + offset) * stride_y + dims, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        cosines += tl.sum(x * y, 1)
    return cosines


@triton.jit
def without_pairs(
    logits, positive_ptr, pid_m, pid_n, M, N, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return a tile of logits [BM, BN] with -inf for its pairs and past the edges.

    The logits of the pairs are stored, unless ``positive_ptr`` is None.
    """
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    # Most tiles hold no pair and no edge, so they skip the masks. The masks are applied one after the other, since this
    # needs fewer registers than all of them at once.
    if has_pairs(start_m, start_n, offset, BLOCK_M, BLOCK_N):
        paired = offs_m + offset
        is_pair = paired[:, None] == offs_n[None, :]  # [BM, BN]
        if positive_ptr is not None:
            in_tile = (offs_m < M) & (paired >= start_n) & (paired < tl.minimum(start_n + BLOCK_N, N))
            tl.store(positive_ptr + offs_m, tl.sum(tl.where(is_pair, logits, 0.0), 1), mask=in_tile)
        logits = tl.where(is_pair, float("-inf"), logits)
    if start_m + BLOCK_M > M:
        logits = tl.where((offs_m < M)[:, None], logits, float("-inf"))
    if start_n + BLOCK_N > N:
        logits = tl.where((offs_n < N)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def zero_pairs(tile, start_m, start_n, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a tile of G [BM, BN] with 0 for its pairs."""
    if has_pairs(start_m, start_n, offset, BLOCK_M, BLOCK_N):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        tile = tl.where((offs_m + offset)[:, None] == offs_n[None, :], 0.0, tile)
    return tile


@triton.jit
def store_tile(
    out, tile, start_m, start_n, M, N, stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store a tile [BM, BN] of a matrix [M, N] in its dtype; ``out`` is a tensor descriptor or a pointer."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    if IS_TMA:
        out.store([start_m, start_n], tile.to(out.dtype))
    else:
        pointers = out + offs_m.to(tl.int64)[:, None] * stride + offs_n[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(pointers, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_segment(
    x, y, scale_ptr, row_sum_ptr, col_sum_ptr, M, N, D, offset, num_segments, tiles, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARP_ROWS: tl.constexpr,
):  # fmt: skip
    """Store the sums of 2^(logit - shift) of each row and of each column of a segment of tiles.

    The sums of rows are stored for each tile, and the sums of columns for the whole segment.
    """
    segment, pid_n = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    factor = tl.load(scale_ptr) * log2e
    shift = shared_shift(factor)
    # All warps together hold WARP_ROWS rows of a product at a time, 16 each. A thread holds the rows r and r + 8 of its
    # warp's 16. Adding the elements of one thread takes no exchange between threads. The sums of different threads are
    # added once, after the last tile.
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
            # The accumulator must be used before the branch in ``without_pairs``: otherwise the compiler would wait for
            # the product in only one of the two paths.
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
def tile_with_pairs(tile, offset, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr):
    """Return row and column of the ``tile``-th candidate for a tile with pairs, and whether it is such a tile.

    There are ``SPAN`` candidates in each row of tiles.
    """
    pid_m = tile // SPAN
    pid_n = tl.maximum(pid_m * BLOCK_M + offset, 0) // BLOCK_N + tile % SPAN
    is_one = has_pairs(pid_m * BLOCK_M, pid_n * BLOCK_N, offset, BLOCK_M, BLOCK_N) & (pid_n * BLOCK_N < N)
    return pid_m, pid_n, is_one & (pid_m * BLOCK_M < M)


@triton.jit
def grad_segment(
    x, y, grad, scale_ptr, row_inv_denom_ptr, col_inv_denom_ptr,
    M, N, D, offset, num_segments, tiles, log2e, grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store grad_scale * G of a segment of tiles, except in tiles with pairs; return the sum of G times the cosines."""
    segment, pid_n = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    start_n = pid_n * BLOCK_N
    factor = tl.load(scale_ptr) * log2e
    offs_n = start_n + tl.arange(0, BLOCK_N)
    col_inv_denom = tl.load(col_inv_denom_ptr + offs_n, mask=offs_n < N, other=0.0) * grad_scale
    # A thread holds two neighbours of each group of 8 columns of a product. Adding these over all groups takes no
    # exchange between threads.
    scale_sum = tl.zeros((BLOCK_M, 4), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(D, BLOCK_K)
    step, pid_m = -1, segment * tiles - 1
    offs_m = segment * tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inv_denom = tl.load(row_inv_denom_ptr + offs_m, mask=offs_m < M, other=0.0) * grad_scale
    tl.assume(tiles * steps > 0)
    for _ in range(tiles * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            pid_m += 1
        start_m = pid_m * BLOCK_M
        x_tile = x.load([start_m, step * BLOCK_K])  # [BM, BK]
        y_tile = y.load([start_n, step * BLOCK_K])  # [BN, BK]
        acc = tl.dot(x_tile, y_tile.T, acc, input_precision="ieee")
        if step == steps - 1:
            is_left_out = has_pairs(start_m, start_n, offset, BLOCK_M, BLOCK_N)
            before = scale_sum
            # ``following`` is inv_denom of the next tile's rows, which arrives while this tile is stored.
            offs_m = start_m + BLOCK_M + tl.arange(0, BLOCK_M)
            following = tl.load(row_inv_denom_ptr + offs_m, mask=offs_m < M, other=0.0)
            # A branch that skips a tile would cost registers in all tiles. Instead, a tile that is left out gets a row
            # past the end, where the descriptor stores nothing.
            scale_sum = _store_parts(
                grad, acc, scale_sum, factor, row_inv_denom, col_inv_denom, tl.where(is_left_out, M, start_m), start_n,
                BLOCK_M, BLOCK_N, PARTS,
            )  # fmt: skip
            scale_sum = tl.where(is_left_out, before, scale_sum)
            row_inv_denom = following * grad_scale
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return tl.sum(scale_sum)


@triton.jit
def _store_parts(
    grad, cosines, scale_sum, factor, row_inv_denom, col_inv_denom, start_m, start_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store grad_scale * G for cosines [BM, BN], one part of the columns after the other.

    Return ``scale_sum`` [BM, 4] with the products of G and the cosines added.
    """
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves_of_columns(cosines, BLOCK_M, BLOCK_N)
        of_left, of_right = halves(col_inv_denom, BLOCK_N)
        scale_sum = _store_parts(
            grad, left, scale_sum, factor, row_inv_denom, of_left, start_m, start_n, BLOCK_M, HALF, PARTS // 2
        )
        scale_sum = _store_parts(
            grad, right, scale_sum, factor, row_inv_denom, of_right, start_m, start_n + HALF, BLOCK_M, HALF, PARTS // 2
        )
    else:
        tile = tl.exp2(cosines * factor - shared_shift(factor)) * (row_inv_denom[:, None] + col_inv_denom[None, :])
        grad.store([start_m, start_n], tile.to(grad.dtype))
        scale_sum += tl.sum(tl.sum(tl.reshape(tile * cosines, (BLOCK_M, BLOCK_N // 8, 4, 2)), 3), 1)
    return scale_sum

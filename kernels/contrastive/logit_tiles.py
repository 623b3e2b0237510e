"""Triton functions on one tile of logits or of G, which the kernels of all losses share."""

import triton
import triton.language as tl

from ..tiles import load_tile


@triton.jit
def shared_shift(factor):
    """Return the shift of ``softmax_stats.shared_shift`` for log2e times the scale."""
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
    # Most tiles hold no pair and no edge, and masks would cost them time. One mask after the other needs fewer
    # registers than all at once.
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

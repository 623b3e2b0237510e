"""The Triton kernels of the sigmoid loss. Logits are in base 2: l_ij = log2e * (scale * x_i . y_j + bias).

sums      of one tile: losses log2(1 + 2^l) and probabilities 1 / (1 + 2^-l), pairs left out
gradient  G_ij = 1 / (1 + 2^-l_ij), pairs 0, in the operands' dtype
"""

import triton
import triton.language as tl

from .._tiles import grouped_tile
from .tiles import _logits, _without_pairs, store_grad, zero_pairs


@triton.jit
def _log2_1p(e):
    """log2(1 + e) for e in [0, 1], with full relative precision: in the sum, a small e would lose its digits.

    e times the polynomial of degree 8 whose largest relative error is least: 3e-8.
    """
    p = e * 0.007549182046204805 - 0.04256706312298775
    p = p * e + 0.1128561943769455
    p = p * e - 0.19711896777153015
    p = p * e + 0.27564141154289246
    p = p * e - 0.35840848088264465
    p = p * e + 0.48069295287132263
    p = p * e - 0.7213401794433594
    p = p * e + 1.4426950216293335
    return p * e


@triton.jit
def _probability(logits, e):
    """1 / (1 + 2^-logits), given e = 2^-|logits|."""
    return tl.where(logits > 0, 1.0, e) / (1.0 + e)


@triton.jit
def _sigmoid_sums_kernel(
    x,  # [M, D]
    y,  # [N, D]
    scale_ptr,  # [] fp32
    bias_ptr,  # [] fp32
    loss_ptr,  # [tiles] fp32
    probability_ptr,  # [tiles] fp32
    positive_ptr,  # [M] fp32
    M, N, D, diagonal, stride_x, stride_y, log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Sums over one tile without its pairs (i, i + diagonal), and the logits of the pairs."""
    pid = tl.program_id(0)
    pid_m, pid_n = grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    logits, _ = _logits(
        x, y, scale_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, D, stride_x, stride_y, log2e,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, IS_TMA,
    )  # fmt: skip
    logits += tl.load(bias_ptr) * log2e
    # what is left out becomes -inf: no loss, no probability
    logits = _without_pairs(logits, positive_ptr, pid_m, pid_n, M, N, diagonal, BLOCK_M, BLOCK_N)
    # one half after the other: for all columns at once, both terms would not fit the registers
    halves = tl.split(tl.permute(tl.reshape(logits, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    loss = tl.zeros((BLOCK_M,), tl.float32)
    probability = tl.zeros((BLOCK_M,), tl.float32)
    for half in tl.static_range(2):
        e = tl.exp2(-tl.abs(halves[half]))
        loss += tl.sum(tl.maximum(halves[half], 0.0) + _log2_1p(e), 1)
        probability += tl.sum(_probability(halves[half], e), 1)
    tl.store(loss_ptr + pid, tl.sum(loss, 0))
    tl.store(probability_ptr + pid, tl.sum(probability, 0))


@triton.jit
def _sigmoid_grad_tile_kernel(
    x,  # [M, D]
    y,  # [N, D]
    grad,  # [M, N], the operands' dtype
    scale_ptr,  # [] fp32
    bias_ptr,  # [] fp32
    M, N, D, diagonal, stride_x, stride_y, stride_grad, log2e, grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """grad = grad_scale * G for one tile."""
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    logits, _ = _logits(
        x, y, scale_ptr, start_m, start_n, M, N, D, stride_x, stride_y, log2e,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, IS_TMA,
    )  # fmt: skip
    logits += tl.load(bias_ptr) * log2e
    tile = _probability(logits, tl.exp2(-tl.abs(logits))) * grad_scale
    tile = zero_pairs(tile, start_m, start_n, diagonal, BLOCK_M, BLOCK_N)
    store_grad(grad, tile, start_m, start_n, M, N, stride_grad, BLOCK_M, BLOCK_N, IS_TMA)

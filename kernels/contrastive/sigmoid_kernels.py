"""The Triton kernels of the sigmoid loss. Logits are l_ij = scale * x_i . y_j + bias.

    sums      of one tile without its pairs, the sums of the losses log(1 + exp l) and of the probabilities
              1 / (1 + exp -l)
    gradient  G_ij = 1 / (1 + exp -l_ij), 0 for pairs, in the operands' dtype

They are not in base 2: its factor would round both terms of a logit, and where the two cancel, the error would stay.
"""

import triton
import triton.language as tl

from ..tiles import grouped_tile, halves_of_columns, log_1p
from .logit_tiles import cosine_tile, store_tile, without_pairs, zero_pairs


@triton.jit
def _probability(logits, e):
    """Return 1 / (1 + exp -logits), given e = exp -|logits|."""
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
    M, N, D, offset, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Sum losses and probabilities of one tile without its pairs (i, i + offset), and store the logits of the pairs."""
    pid = tl.program_id(0)
    pid_m, pid_n = grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)  # before the loop, during which they arrive
    cosines = cosine_tile(
        x, y, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, D, stride_x, stride_y,
        BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA,
    )  # fmt: skip
    logits = cosines * scale + bias
    # Logits that are left out become -inf, which has no loss and no probability.
    logits = without_pairs(logits, positive_ptr, pid_m, pid_n, M, N, offset, BLOCK_M, BLOCK_N)
    # One half of the columns after the other: for all of them at once, both terms would not fit the registers.
    halves = halves_of_columns(logits, BLOCK_M, BLOCK_N)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    probability = tl.zeros((BLOCK_M,), tl.float32)
    for half in tl.static_range(2):
        e = tl.exp(-tl.abs(halves[half]))
        loss += tl.sum(tl.maximum(halves[half], 0.0) + log_1p(e), 1)
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
    scale_sum_ptr,  # [tiles] fp32
    M, N, D, offset, stride_x, stride_y, stride_grad, grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Compute grad = grad_scale * G for one tile, and the tile's sum of G_ij x_i . y_j before grad is rounded."""
    pid = tl.program_id(0)
    pid_m, pid_n = grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)  # before the loop, during which they arrive
    cosines = cosine_tile(x, y, start_m, start_n, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA)
    # One half of the columns after the other: all of cosines and G at once would not fit the registers.
    HALF: tl.constexpr = BLOCK_N // 2
    halves = halves_of_columns(cosines, BLOCK_M, BLOCK_N)
    scale_sum = 0.0
    for half in tl.static_range(2):
        start = start_n + half * HALF
        # This is exact at both ends: if exp overflows, the probability is 0.
        tile = grad_scale / (1.0 + tl.exp(-(halves[half] * scale + bias)))  # [BM, BN / 2]
        tile = zero_pairs(tile, start_m, start, offset, BLOCK_M, HALF)
        # The sum is over both axes at once: on sm_100, Triton 3.6 fails to sum a half along one axis.
        scale_sum += tl.sum(tile * halves[half])
        store_tile(grad, tile, start_m, start, M, N, stride_grad, BLOCK_M, HALF, IS_TMA)
    tl.store(scale_sum_ptr + pid, scale_sum / grad_scale)

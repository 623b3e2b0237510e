"""The Triton kernels of the sigmoid loss. Logits are l_ij = scale * x_i . y_j + bias.

    pairs     of each pair, one_minus_p = 1 / (1 + exp l); and the sums of log(1 + exp -l), of -one_minus_p and of
              -one_minus_p x_i . y_j
    sums      the sum of the losses log(1 + exp l) of one tile without its pairs
    gradient  G_ij = 1 / (1 + exp -l_ij), 0 for pairs, in the operands' dtype; and the sums of log(1 + exp l), of G_ij
              and of G_ij x_i . y_j of one tile without its pairs

They are not in base 2: its factor would round both terms of a logit, and where the two cancel, the error would stay.
"""

import triton
import triton.language as tl

from ..tiles import grouped_tile, halves_of_columns, log_1p
from .logit_tiles import cosine_tile, pair_cosines, store_tile, without_pairs


@triton.jit
def _probability(logits, e):
    """Return 1 / (1 + exp -logits), given e = exp -|logits|.

    A division would first look whether its divisor is too large to be inverted, which 1 + e never is.
    """
    root = tl.rsqrt(1.0 + e)
    return tl.where(logits > 0, 1.0, e) * (root * root)


@triton.jit
def _of_product(a, b):
    """Return (1 + a) (1 + b) - 1; to round 1 + a would take the digits of a small a away."""
    return a * b + (a + b)


@triton.jit
def _exp_of_minus(distance):
    """Return exp -distance for distances of at least 0."""
    return tl.exp2(distance * -1.4426950408889634)


@triton.jit
def _sums(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return parts [BM, 4] of the sum of a tile [BM, BN].

    A thread holds two neighbours of each 8 columns of a product: to add these, of all groups of 8, takes no exchange
    between threads.
    """
    return tl.sum(tl.sum(tl.reshape(tile, (BLOCK_M, BLOCK_N // 8, 4, 2)), 3), 1)


@triton.jit
def _loss_sums(logits, e, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return parts [BM, 4] of the sum of log(1 + exp logits), given e = exp -|logits|.

    A thread takes one logarithm for eight logits, of the product of their 1 + e.
    """
    left, right = tl.split(tl.reshape(e, (BLOCK_M, BLOCK_N // 2, 2)))
    products = _of_product(left, right)
    left, right = tl.split(tl.permute(tl.reshape(products, (BLOCK_M, BLOCK_N // 16, 2, 4)), (0, 1, 3, 2)))
    products = _of_product(left, right)
    left, right = tl.split(tl.permute(tl.reshape(products, (BLOCK_M, BLOCK_N // 32, 2, 4)), (0, 1, 3, 2)))
    products = _of_product(left, right)  # [BM, BN / 32, 4], from 0 to 255
    is_large = products > 1.0
    logs = tl.where(is_large, tl.log2(1.0 + products) * 0.6931471805599453, log_1p(tl.where(is_large, 1.0, products)))
    return tl.sum(logs, 1) + _sums(tl.maximum(logits, 0.0), BLOCK_M, BLOCK_N)


@triton.jit
def _sigmoid_pairs_kernel(
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    scale_ptr,  # [] fp32
    bias_ptr,  # [] fp32
    one_minus_p_ptr,  # [M] fp32
    loss_ptr,  # [programs] fp32
    bias_sum_ptr,  # [programs] fp32
    scale_sum_ptr,  # [programs] fp32
    M, N, D, offset, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store one_minus_p of the pairs (i, i + offset), 0 in a row without one, and the sums of the pairs."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_pair = (offs_m < M) & (offs_m + offset >= 0) & (offs_m + offset < N)
    cosines = pair_cosines(x_ptr, y_ptr, offs_m, has_pair, D, offset, stride_x, stride_y, BLOCK_M, BLOCK_K)
    logits = -(cosines * tl.load(scale_ptr) + tl.load(bias_ptr))
    e = _exp_of_minus(tl.abs(logits))
    one_minus_p = tl.where(has_pair, _probability(logits, e), 0.0)
    tl.store(one_minus_p_ptr + offs_m, one_minus_p, mask=offs_m < M)
    losses = tl.where(has_pair, tl.maximum(logits, 0.0) + log_1p(e), 0.0)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(losses, 0))
    tl.store(bias_sum_ptr + tl.program_id(0), -tl.sum(one_minus_p, 0))
    tl.store(scale_sum_ptr + tl.program_id(0), -tl.sum(one_minus_p * cosines, 0))


@triton.jit
def _sigmoid_sums_kernel(
    x,  # [M, D]
    y,  # [N, D]
    scale_ptr,  # [] fp32
    bias_ptr,  # [] fp32
    loss_ptr,  # [tiles] fp32
    M, N, D, offset, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store the sum of the losses of one tile without its pairs (i, i + offset)."""
    pid = tl.program_id(0)
    pid_m, pid_n = grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)  # before the loop, during which they arrive
    cosines = cosine_tile(
        x, y, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, D, stride_x, stride_y,
        BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA,
    )  # fmt: skip
    logits = cosines * scale + bias
    # Logits that are left out become -inf, which has no loss.
    logits = without_pairs(logits, None, pid_m, pid_n, M, N, offset, BLOCK_M, BLOCK_N)
    losses = _loss_sums(logits, _exp_of_minus(tl.abs(logits)), BLOCK_M, BLOCK_N)
    tl.store(loss_ptr + pid, tl.sum(losses))


@triton.jit
def _sigmoid_grad_tile_kernel(
    x,  # [M, D]
    y,  # [N, D]
    grad,  # [M, N], the operands' dtype
    scale_ptr,  # [] fp32
    bias_ptr,  # [] fp32
    loss_ptr,  # [tiles] fp32
    bias_sum_ptr,  # [tiles] fp32
    scale_sum_ptr,  # [tiles] fp32
    M, N, D, offset, stride_x, stride_y, stride_grad,
    GRAD_SCALE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store grad = GRAD_SCALE * G for one tile, and the tile's sums, which are taken before grad is rounded."""
    pid = tl.program_id(0)
    pid_m, pid_n = grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)  # before the loop, during which they arrive
    cosines = cosine_tile(x, y, start_m, start_n, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA)
    zero = tl.zeros((BLOCK_M, 4), tl.float32)
    loss, bias_sum, scale_sum = _store_grad(
        grad, cosines, zero, zero, zero, scale, bias, start_m, start_n, M, N, offset, stride_grad,
        GRAD_SCALE, PARTS, BLOCK_M, BLOCK_N, IS_TMA,
    )  # fmt: skip
    tl.store(loss_ptr + pid, tl.sum(loss))
    tl.store(bias_sum_ptr + pid, tl.sum(bias_sum))
    tl.store(scale_sum_ptr + pid, tl.sum(scale_sum))


@triton.jit
def _store_grad(
    grad, cosines, loss, bias_sum, scale_sum, scale, bias, start_m, start_n, M, N, offset, stride_grad,
    GRAD_SCALE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store GRAD_SCALE * G for cosines [BM, BN]; return the three sums [BM, 4] and what these add to them.

    The columns are taken in ``PARTS`` parts, one after the other: all of G at once would not fit the registers.
    """
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves_of_columns(cosines, BLOCK_M, BLOCK_N)
        loss, bias_sum, scale_sum = _store_grad(
            grad, left, loss, bias_sum, scale_sum, scale, bias, start_m, start_n, M, N, offset, stride_grad,
            GRAD_SCALE, PARTS // 2, BLOCK_M, HALF, IS_TMA,
        )  # fmt: skip
        loss, bias_sum, scale_sum = _store_grad(
            grad, right, loss, bias_sum, scale_sum, scale, bias, start_m, start_n + HALF, M, N, offset, stride_grad,
            GRAD_SCALE, PARTS // 2, BLOCK_M, HALF, IS_TMA,
        )  # fmt: skip
    else:
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # Pairs and what lies past the edges get a logit of -inf, which has no loss and no probability. A branch around
        # this would cost more than it saves: the compiler moves sums behind it, and their terms wait in registers.
        row_bias = tl.where(offs_m < M, bias, float("-inf"))[:, None]
        col_bias = tl.where(offs_n < N, 0.0, float("-inf"))[None, :]
        is_pair = (offs_m + offset)[:, None] == offs_n[None, :]
        logits = tl.where(is_pair, float("-inf"), cosines * scale + (row_bias + col_bias))  # [BM, BN]
        e = _exp_of_minus(tl.abs(logits))
        tile = _probability(logits, e)
        loss += _loss_sums(logits, e, BLOCK_M, BLOCK_N)
        bias_sum += _sums(tile, BLOCK_M, BLOCK_N)
        scale_sum += _sums(tile * cosines, BLOCK_M, BLOCK_N)
        store_tile(grad, tile * GRAD_SCALE, start_m, start_n, M, N, stride_grad, BLOCK_M, BLOCK_N, IS_TMA)
    return loss, bias_sum, scale_sum

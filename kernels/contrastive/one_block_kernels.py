"""The Triton kernels of a contrastive or sigmoid loss whose G, the gradient of the logits, is one block.

They need no accumulators in memory.

gradients     grad = factor * (G y - one_minus_p * positive), or for normalised features the sum without ``factor``
through norm  the gradient of features before they were normalised
totals        sums of the numbers that the programs of other kernels have stored, added in a fixed order
scaled        the gradients that the sigmoid loss has kept, times the gradient of the loss
"""

import triton
import triton.language as tl

from ..tiles import halves_of_columns, load_tile
from .kernels import EPS
from .tiles import store_tile


@triton.jit
def _gradients_kernel(
    grad,  # [M, N], tiles of [BM, BK]
    grad_cols,  # grad again, as tiles of [BK, BM]
    x,  # [M, D], tiles of [BK, BN]
    y,  # [N, D], tiles of [BK, BN]
    x_ptr,  # [M, D], the same as x
    y_ptr,  # [N, D], the same as y
    one_minus_p_ptr,  # [M] fp32
    scale_ptr,  # [] fp32
    grad_loss_ptr,  # [] fp32; unused without HAS_GRAD_LOSS
    x_grad_ptr,  # [M, D], contiguous
    y_grad_ptr,  # [N, D], contiguous
    of_pairs_ptr,  # [programs of x] fp32
    M, N, D, offset, num_x_tiles, stride_grad, stride_x, stride_y, weight, inv_grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    IS_TMA: tl.constexpr, HAS_NORM: tl.constexpr, HAS_GRAD_LOSS: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradient of x (in the first ``num_x_tiles`` programs) or of y (in the other programs).

    grad is G / inv_grad_scale. Programs of x also store the sum of -one_minus_p * positive . x over their tile.
    """
    pid = tl.program_id(0)
    num_d = tl.cdiv(D, BLOCK_N)
    factor = weight * tl.load(scale_ptr)
    if HAS_GRAD_LOSS:
        factor *= tl.load(grad_loss_ptr)
    if HAS_NORM:
        factor = 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if pid < num_x_tiles:
        start_m, start_d = pid // num_d * BLOCK_M, pid % num_d * BLOCK_N
        for start_k in range(0, N, BLOCK_K):
            g = load_tile(grad, start_m, start_k, M, N, stride_grad, BLOCK_M, BLOCK_K, IS_TMA)  # [BM, BK]
            b = load_tile(y, start_k, start_d, N, D, stride_y, BLOCK_K, BLOCK_N, IS_TMA)  # [BK, BN]
            acc = tl.dot(g, b, acc, input_precision="ieee")
        of_pairs = _store_gradient(
            x_grad_ptr, acc * inv_grad_scale, x_ptr, y_ptr, one_minus_p_ptr, factor, start_m, start_d,
            M, N, D, offset, 0, stride_x, stride_y, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip
        tl.store(of_pairs_ptr + pid, tl.sum(of_pairs))
    else:
        pid -= num_x_tiles
        start_m, start_d = pid // num_d * BLOCK_M, pid % num_d * BLOCK_N
        for start_k in range(0, M, BLOCK_K):
            g = load_tile(grad_cols, start_k, start_m, M, N, stride_grad, BLOCK_K, BLOCK_M, IS_TMA)  # [BK, BM]
            b = load_tile(x, start_k, start_d, M, D, stride_x, BLOCK_K, BLOCK_N, IS_TMA)  # [BK, BN]
            acc = tl.dot(g.T, b, acc, input_precision="ieee")
        # The barrier costs nothing. It keeps LLVM from merging the code after the loops of the two branches. In merged
        # code, ptxas could not tell which products are still running, and would wait for each of them.
        tl.debug_barrier()
        _store_gradient(
            y_grad_ptr, acc * inv_grad_scale, y_ptr, x_ptr, one_minus_p_ptr, factor, start_m, start_d,
            N, M, D, -offset, -offset, stride_y, stride_x, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip


@triton.jit
def _store_gradient(
    grad_ptr, acc, own_ptr, other_ptr, one_minus_p_ptr, factor, start_m, start_d, M, N, D, offset, to_row,
    stride_own, stride_other, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store factor * (acc - one_minus_p * positive) for a tile [BM, BN], in PARTS groups of columns, one after another.

    The positive of row i is row i + offset of the other side, and the one_minus_p of this pair has the index
    i + to_row. Return the sums [BM] of -one_minus_p * positive * own over the columns of the tile.
    """
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves_of_columns(acc, BLOCK_M, BLOCK_N)
        of_left = _store_gradient(
            grad_ptr, left, own_ptr, other_ptr, one_minus_p_ptr, factor, start_m, start_d, M, N, D, offset,
            to_row, stride_own, stride_other, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
        of_pairs = of_left + _store_gradient(
            grad_ptr, right, own_ptr, other_ptr, one_minus_p_ptr, factor, start_m, start_d + HALF, M, N, D, offset,
            to_row, stride_own, stride_other, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
    else:
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_d = start_d + tl.arange(0, BLOCK_N)
        has_pair = (offs_m < M) & (offs_m + offset >= 0) & (offs_m + offset < N)
        mask = has_pair[:, None] & (offs_d < D)[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        one_minus_p = tl.load(one_minus_p_ptr + offs_m + to_row, mask=has_pair, other=0.0)[:, None]
        positive = tl.load(other_ptr + (rows + offset) * stride_other + offs_d[None, :], mask=mask, other=0.0)
        own = tl.load(own_ptr + rows * stride_own + offs_d[None, :], mask=mask, other=0.0)  # [BM, BN]
        from_pair = one_minus_p * positive.to(tl.float32)
        of_pairs = -tl.sum(from_pair * own.to(tl.float32), 1)
        store_tile(grad_ptr, (acc - from_pair) * factor, start_m, start_d, M, D, D, BLOCK_M, BLOCK_N, False)
    return of_pairs


@triton.jit
def _through_norm_kernel(
    x_total_ptr, y_total_ptr,  # [M, D] and [N, D] fp32, contiguous
    x_ptr, y_ptr,  # [M, D] and [N, D]
    x_inv_norm_ptr, y_inv_norm_ptr,  # [M] and [N] fp32
    scale_ptr,  # [] fp32
    grad_loss_ptr,  # [] fp32; unused without HAS_GRAD_LOSS
    x_grad_ptr, y_grad_ptr,  # [M, D] and [N, D], contiguous
    numbers_ptr,  # [NUMBERS, count] fp32, contiguous
    first_ptr, rest_ptr,  # [1] and [NUMBERS - 1] fp32
    M, N, D, stride_x, stride_y, count, weight,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, NUMBERS: tl.constexpr, HAS_GRAD_LOSS: tl.constexpr,
):  # fmt: skip
    """Compute grad = factor / norm * (total - dot * unit) with dot = total . unit; the first programs take rows of x.

    The others take rows of y. A norm that was raised to EPS is a constant, so no gradient flows through it. The first
    program also stores the totals that ``_totals_kernel`` computes.
    """
    pid, num_m = tl.program_id(0), tl.cdiv(M, BLOCK_M)
    is_x = pid < num_m
    total_ptr = x_total_ptr if is_x else y_total_ptr
    own_ptr = x_ptr if is_x else y_ptr
    inv_norm_ptr = x_inv_norm_ptr if is_x else y_inv_norm_ptr
    grad_ptr = x_grad_ptr if is_x else y_grad_ptr
    stride = tl.where(is_x, stride_x, stride_y)
    offs = tl.where(is_x, pid, pid - num_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs < tl.where(is_x, M, N)
    rows = offs.to(tl.int64)[:, None]
    coefficient = weight
    if HAS_GRAD_LOSS:
        coefficient = weight * tl.load(grad_loss_ptr)
    if pid == 0:
        tl.store(first_ptr, coefficient * _total(numbers_ptr, count, 512))
        for i in tl.static_range(1, NUMBERS):
            tl.store(rest_ptr + (i - 1), coefficient * _total(numbers_ptr + i * count, count, 512))
    factor = coefficient * tl.load(scale_ptr)
    inv_norm = tl.load(inv_norm_ptr + offs, mask=mask_n, other=0.0)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = (start_k + tl.arange(0, BLOCK_K))[None, :]
        mask = mask_n[:, None] & (dims < D)
        own = tl.load(own_ptr + rows * stride + dims, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        dot += tl.sum(tl.load(total_ptr + rows * D + dims, mask=mask, other=0.0) * own, 1)
    along = tl.where(inv_norm < 0.999 / EPS, dot, 0.0)[:, None]
    for start_k in range(0, D, BLOCK_K):
        dims = (start_k + tl.arange(0, BLOCK_K))[None, :]
        mask = mask_n[:, None] & (dims < D)
        own = tl.load(own_ptr + rows * stride + dims, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        total = tl.load(total_ptr + rows * D + dims, mask=mask, other=0.0)
        grad = (total - along * own) * (factor * inv_norm)[:, None]
        tl.store(grad_ptr + rows * D + dims, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _totals_kernel(
    numbers_ptr,  # [programs, count] fp32, contiguous
    flags_ptr,  # [count] int8; unused without HAS_FLAGS
    grad_loss_ptr,  # [] fp32; unused without HAS_GRAD_LOSS
    first_ptr, rest_ptr,  # [1] and [programs - 1] fp32
    flag_ptr,  # [] int8
    count, weight,
    BLOCK: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_GRAD_LOSS: tl.constexpr,
):  # fmt: skip
    """Store weight times the sum of each row of a loss's partial sums, and whether all flags of programs are 1."""
    pid = tl.program_id(0)
    coefficient = weight
    if HAS_GRAD_LOSS:
        coefficient = weight * tl.load(grad_loss_ptr)
    total = coefficient * _total(numbers_ptr + pid.to(tl.int64) * count, count, BLOCK)
    # For AMD, Triton 3.6 compiles no pointer that is chosen at run time.
    if pid == 0:
        tl.store(first_ptr, total)
    else:
        tl.store(rest_ptr + (pid - 1), total)
    if HAS_FLAGS:
        flag = tl.full((BLOCK,), 1, tl.int32)
        for start in range(0, count, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            flag = tl.minimum(flag, tl.load(flags_ptr + offs, mask=offs < count, other=1).to(tl.int32))
        tl.store(flag_ptr, tl.min(flag, 0).to(tl.int8))


@triton.jit
def _total(numbers_ptr, count, BLOCK: tl.constexpr):
    """Return the total of ``count`` partial sums of a loss in float32; they are added in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(numbers_ptr + offs, mask=offs < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0).to(tl.float32)


@triton.jit
def _scaled_kernel(
    x_grad_ptr, y_grad_ptr, number_grads_ptr,  # contiguous, of x_size, y_size and number_size elements
    grad_loss_ptr,  # [] fp32
    x_out_ptr, y_out_ptr, numbers_out_ptr,
    x_size, y_size, number_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply the gradients of x, y and a loss's scalar arguments by the gradient of the loss, one after the other."""
    pid = tl.program_id(0)
    num_x, num_y = tl.cdiv(x_size, BLOCK), tl.cdiv(y_size, BLOCK)
    if pid < num_x:
        _scale_part(x_grad_ptr, grad_loss_ptr, x_out_ptr, pid, x_size, BLOCK)
    elif pid < num_x + num_y:
        _scale_part(y_grad_ptr, grad_loss_ptr, y_out_ptr, pid - num_x, y_size, BLOCK)
    else:
        _scale_part(number_grads_ptr, grad_loss_ptr, numbers_out_ptr, 0, number_size, BLOCK)


@triton.jit
def _scale_part(source_ptr, factor_ptr, out_ptr, part, size, BLOCK: tl.constexpr):
    """Write ``BLOCK`` elements of a tensor, times the number at ``factor_ptr``, to ``out_ptr``."""
    offs = tl.cast(part, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source_ptr + offs, mask=offs < size, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=offs < size)

"""The Triton kernels that all contrastive losses share: what happens to features before and after G.

normalize  unit rows, and one over the length that each row had
products   acc_x += G y and acc_y += G^T x in float32; one program writes each tile
finish     grad = factor * (acc - one_minus_p * positive), through the normalisation if there was one
"""

import triton
import triton.language as tl

from ..launch import INTERPRET
from ..tiles import halves_of_columns, load_tile
from .logit_tiles import store_tile

IS_INTERPRETED = tl.constexpr(INTERPRET)
# The least norm that torch.nn.functional.normalize divides by.
EPS = tl.constexpr(1e-12)


@triton.jit
def _normalize_kernel(
    x_ptr,  # [N, D]
    out_ptr,  # [N, D]
    inv_norm_ptr,  # [N] fp32
    N, D, stride_xn, stride_xd, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out_i = x_i / max(|x_i|, EPS), rounded once."""
    offs_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)[:, None]
    square = tl.zeros((BLOCK_M,), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        mask = mask_n[:, None] & (dims < D)
        x = tl.load(x_ptr + rows * stride_xn + dims * stride_xd, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        square += tl.sum(x * x, 1)
    norm = tl.maximum(tl.sqrt_rn(square), EPS, propagate_nan=tl.PropagateNan.ALL)
    tl.store(inv_norm_ptr + offs_n, 1.0 / norm, mask=mask_n)
    for start_k in range(0, D, BLOCK_K):
        dims = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        mask = mask_n[:, None] & (dims < D)
        x = tl.load(x_ptr + rows * stride_xn + dims * stride_xd, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        unit = tl.div_rn(x, tl.broadcast_to(norm[:, None], x.shape))
        tl.store(out_ptr + rows * stride_out + dims, unit.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _products_kernel(
    grad,  # [M, N], tiles of [BM, BK]
    grad_cols,  # the same, tiles of [BK, BM]
    x,  # [M, D]
    y,  # [N, D]
    acc_x,  # [M, D] fp32, contiguous; with IS_ADDED a descriptor of tiles [BM, BN / PARTS]
    acc_y,  # [N, D] fp32, the same
    M, N, D, num_x_tiles, stride_grad, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    IS_TMA: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Add grad y to acc_x (the first ``num_x_tiles`` programs) and grad^T x to acc_y (the others)."""
    pid = tl.program_id(0)
    num_d = tl.cdiv(D, BLOCK_N)
    if pid < num_x_tiles:
        start_m, start_d = pid // num_d * BLOCK_M, pid % num_d * BLOCK_N
        acc = _first(acc_x, start_m, start_d, M, D, BLOCK_M, BLOCK_N, IS_ADDED)
        for start_k in range(0, N, BLOCK_K):
            g = load_tile(grad, start_m, start_k, M, N, stride_grad, BLOCK_M, BLOCK_K, IS_TMA)  # [BM, BK]
            b = load_tile(y, start_k, start_d, N, D, stride_y, BLOCK_K, BLOCK_N, IS_TMA)  # [BK, BN]
            acc = tl.dot(g, b, acc, input_precision="ieee")
        _last(acc_x, acc, start_m, start_d, M, D, BLOCK_M, BLOCK_N, PARTS, IS_ADDED)
    else:
        pid -= num_x_tiles
        start_m, start_d = pid // num_d * BLOCK_M, pid % num_d * BLOCK_N
        acc = _first(acc_y, start_m, start_d, N, D, BLOCK_M, BLOCK_N, IS_ADDED)
        for start_k in range(0, M, BLOCK_K):
            g = load_tile(grad_cols, start_k, start_m, M, N, stride_grad, BLOCK_K, BLOCK_M, IS_TMA)  # [BK, BM]
            b = load_tile(x, start_k, start_d, M, D, stride_x, BLOCK_K, BLOCK_N, IS_TMA)  # [BK, BN]
            acc = tl.dot(g.T, b, acc, input_precision="ieee")
        # The barrier costs nothing, and keeps LLVM from merging what the two branches do after their loops. If they
        # were merged, ptxas could not tell which products are still under way there, and would wait for each one.
        tl.debug_barrier()
        _last(acc_y, acc, start_m, start_d, N, D, BLOCK_M, BLOCK_N, PARTS, IS_ADDED)


@triton.jit
def _first(
    acc, start_m, start_d, M, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_ADDED: tl.constexpr
):  # fmt: skip
    """Return what the products are added to: zeros if they are added in L2, or else the accumulator itself, since after
    the products no registers would be left to load it.
    """
    if IS_ADDED:
        first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        first = load_tile(acc, start_m, start_d, M, D, D, BLOCK_M, BLOCK_N, False)
    return first


@triton.jit
def _last(
    acc, tile, start_m, start_d, M, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, IS_ADDED: tl.constexpr,
):  # fmt: skip
    """Store a tile [BM, BN] of an accumulator, or add it to the accumulator in L2, one part after the other."""
    if not IS_ADDED:
        store_tile(acc, tile, start_m, start_d, M, D, D, BLOCK_M, BLOCK_N, False)
    elif PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves_of_columns(tile, BLOCK_M, BLOCK_N)
        _last(acc, left, start_m, start_d, M, D, BLOCK_M, HALF, PARTS // 2, IS_ADDED)
        _last(acc, right, start_m, start_d + HALF, M, D, BLOCK_M, HALF, PARTS // 2, IS_ADDED)
    elif IS_INTERPRETED:  # Triton's interpreter cannot add
        acc.store([start_m, start_d], acc.load([start_m, start_d]) + tile)
    else:
        acc.atomic_add([start_m, start_d], tile)  # this launch adds to each element once, so the sums are reproducible


@triton.jit
def _finish_kernel(
    acc_ptr,  # [N, D] fp32, contiguous: grad_scale * G times the other side
    own_ptr,  # [N, D]
    other_ptr,  # [C, D]: the positive of row i is row i + offset, if there is one
    one_minus_p_ptr,  # [N] fp32
    factor_ptr,  # [] fp32
    inv_norm_ptr,  # [N] fp32; unused without HAS_NORM
    grad_ptr,  # [N, D], contiguous
    of_scale_ptr,  # [N] fp32
    N, C, D, offset, stride_own, stride_other, inv_grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, HAS_NORM: tl.constexpr, IS_ROUNDED: tl.constexpr,
):  # fmt: skip
    """Compute total = acc - one_minus_p * positive;  dot = total . own;  grad = factor * total, or through the
    normalisation grad = factor / norm * (total - dot * own).

    of_scale is dot, or the part -one_minus_p * positive . own of it where ``acc`` is of a rounded G.
    """
    offs_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)[:, None]
    has_pair = mask_n & (offs_n + offset >= 0) & (offs_n + offset < C)
    one_minus_p = tl.load(one_minus_p_ptr + offs_n, mask=has_pair, other=0.0)[:, None]
    factor = tl.load(factor_ptr)
    along = tl.zeros((BLOCK_M,), tl.float32)
    scale = tl.zeros((BLOCK_M,), tl.float32) + factor
    dot = tl.zeros((BLOCK_M,), tl.float32)
    of_pair = tl.zeros((BLOCK_M,), tl.float32)
    # With a normalisation, a first pass finds the dot product, which the second pass needs; what that reads again is in
    # the cache.
    FIRST: tl.constexpr = 0 if HAS_NORM else 1
    for last in tl.static_range(FIRST, 2):
        for start_k in range(0, D, BLOCK_K):
            dims = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
            mask = mask_n[:, None] & (dims < D)
            acc = tl.load(acc_ptr + rows * D + dims, mask=mask, other=0.0)  # [BM, BK]
            positive = tl.load(
                other_ptr + (rows + offset) * stride_other + dims, mask=has_pair[:, None] & (dims < D), other=0.0
            )  # [BM, BK]
            own = tl.load(own_ptr + rows * stride_own + dims, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
            from_pair = one_minus_p * positive.to(tl.float32)
            total = acc * inv_grad_scale - from_pair
            if last == FIRST:
                if HAS_NORM or not IS_ROUNDED:
                    dot += tl.sum(total * own, 1)
                if IS_ROUNDED:
                    of_pair -= tl.sum(from_pair * own, 1)
            if last == 1:
                grad = (total - along[:, None] * own) * scale[:, None]
                tl.store(grad_ptr + rows * D + dims, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if last == 0:
            inv_norm = tl.load(inv_norm_ptr + offs_n, mask=mask_n, other=0.0)
            # where the norm was raised to EPS, it is a constant: nothing flows through it
            along = tl.where(inv_norm < 0.999 / EPS, dot, 0.0)
            scale = factor * inv_norm
    tl.store(of_scale_ptr + offs_n, of_pair if IS_ROUNDED else dot, mask=mask_n)

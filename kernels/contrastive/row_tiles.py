"""The Triton kernels of the contrastive losses that walk rows of features: normalisation, and the end of a gradient."""

import triton
import triton.language as tl

# Of torch.nn.functional.normalize.
EPS = tl.constexpr(1e-12)


@triton.jit
def _normalize_kernel(
    x_ptr,  # [N, D]
    out_ptr,  # [N, D]
    inv_norm_ptr,  # [N] fp32
    N, D, stride_xn, stride_xd, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out_i = x_i / max(|x_i|, EPS), rounded once."""
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
        x = tl.load(x_ptr + rows * stride_xn + dims * stride_xd, mask=mask, other=0.0).to(tl.float32)
        unit = tl.div_rn(x, tl.broadcast_to(norm[:, None], x.shape))
        tl.store(out_ptr + rows * stride_out + dims, unit.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish_kernel(
    acc_ptr,  # [N, D] fp32, contiguous: grad_scale * G times the other side
    own_ptr,  # [N, D]
    other_ptr,  # [C, D]: the positive of row i is row i + diagonal, if there is one
    miss_ptr,  # [N] fp32
    factor_ptr,  # [] fp32
    inv_norm_ptr,  # [N] fp32; unused without HAS_NORM
    grad_ptr,  # [N, D], contiguous
    dot_ptr,  # [N] fp32
    N, C, D, diagonal, stride_own, stride_other, inv_grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """total = acc - miss * positive;  dot = total . own;  grad = factor * total, or through the normalisation
    factor / norm * (total - dot * own).
    """
    offs_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)[:, None]
    has_pair = mask_n & (offs_n + diagonal >= 0) & (offs_n + diagonal < C)
    miss = tl.load(miss_ptr + offs_n, mask=has_pair, other=0.0)[:, None]
    factor = tl.load(factor_ptr)
    along = tl.zeros((BLOCK_M,), tl.float32)
    scale = tl.zeros((BLOCK_M,), tl.float32) + factor
    dot = tl.zeros((BLOCK_M,), tl.float32)
    # the second time with the product that the first has found; it reads from the cache
    for last in tl.static_range(2):
        for start_k in range(0, D, BLOCK_K):
            dims = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
            mask = mask_n[:, None] & (dims < D)
            acc = tl.load(acc_ptr + rows * D + dims, mask=mask, other=0.0)  # [BM, BK]
            positive = tl.load(
                other_ptr + (rows + diagonal) * stride_other + dims, mask=has_pair[:, None] & (dims < D), other=0.0
            )
            own = tl.load(own_ptr + rows * stride_own + dims, mask=mask, other=0.0).to(tl.float32)
            total = acc * inv_grad_scale - miss * positive.to(tl.float32)
            if last == 0:
                dot += tl.sum(total * own, 1)
            else:
                grad = (total - along[:, None] * own) * scale[:, None]
                tl.store(grad_ptr + rows * D + dims, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if last == 0 and HAS_NORM:
            inv_norm = tl.load(inv_norm_ptr + offs_n, mask=mask_n, other=0.0)
            # at the least norm, the norm is a constant
            along = tl.where(inv_norm < 0.999 / EPS, dot, 0.0)
            scale = factor * inv_norm
    tl.store(dot_ptr + offs_n, dot, mask=mask_n)

"""The kernels of attention pooling: one program owns an image, and holds the weights of all its queries and tokens.

A program loops over the width only, ``BLOCK_K`` columns at a time, so no gradient has two writers.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, rows, num_rows, stride_r, columns, num_columns, stride_c):
    """Load a tile [rows, columns] of a matrix, with zeros past its end."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    offs = rows.to(tl.int64)[:, None] * stride_r + columns.to(tl.int64)[None, :] * stride_c
    return tl.load(ptr + offs, mask=mask, other=0.0)


@triton.jit
def _pool_fwd_kernel(
    q_ptr,  # [B, H, C]
    x_ptr,  # [B, N, C]
    out_ptr,  # [B, H, C] contiguous
    lse_ptr,  # [B, H] fp32, base 2
    seqlens_ptr,  # [B]
    H, N, C,
    stride_qb, stride_qh, stride_qc, stride_xb, stride_xn, stride_xc, log2e,
    HAS_SEQLENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pool the tokens of one image by its queries; each program owns one image.

    p = softmax(q x^T) over the tokens, and out = p x. The tokens are read twice, the second time from the cache.
    """
    b = tl.program_id(0).to(tl.int64)
    if HAS_SEQLENS:
        N = tl.minimum(tl.load(seqlens_ptr + b), N).to(tl.int32)
    q_ptr += b * stride_qb
    x_ptr += b * stride_xb
    heads, tokens = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    scores = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        q = _load(q_ptr, heads, H, stride_qh, columns, C, stride_qc)  # [BH, BK]
        x = _load(x_ptr, tokens, N, stride_xn, columns, C, stride_xc)  # [BN, BK]
        scores = tl.dot(q, x.T, scores, input_precision="ieee")
    scores = tl.where((tokens < N)[None, :], scores * log2e, float("-inf"))
    row_max = tl.max(scores, 1)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)  # without tokens, -inf minus -inf would be NaN
    p = tl.exp2(scores - row_max[:, None])
    row_sum = tl.sum(p, 1)
    # For an image without tokens, an infinite log-sum-exp makes every weight 0 in the backward pass.
    lse = tl.where(row_sum == 0.0, float("inf"), row_max + tl.log2(row_sum))
    tl.store(lse_ptr + b * H + heads, lse, mask=heads < H)
    p = (p / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]).to(x_ptr.dtype.element_ty)  # [BH, BN]
    for start in range(0, C, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = _load(x_ptr, tokens, N, stride_xn, columns, C, stride_xc)  # [BN, BK]
        out = tl.dot(p, x, input_precision="ieee")
        pointers = out_ptr + (b * H + heads)[:, None] * C + columns[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(heads < H)[:, None] & (columns < C)[None, :])


@triton.jit
def _pool_bwd_kernel(
    grad_ptr,  # [B, H, C]
    q_ptr,  # [B, H, C]
    x_ptr,  # [B, N, C]
    lse_ptr,  # [B, H] fp32, base 2
    dq_ptr,  # [B, H, C] contiguous
    dx_ptr,  # [B, N, C] contiguous
    seqlens_ptr,  # [B]
    H, N, C,
    stride_gb, stride_gh, stride_gc, stride_qb, stride_qh, stride_qc, stride_xb, stride_xn, stride_xc, log2e,
    HAS_SEQLENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the queries and tokens of one image; each program owns one image.

    dp = do x^T, ds = p (dp - sum_m p_m dp_m), dq = ds x, and dx = p^T do + ds^T q. A token that no query sees gets a
    gradient of zero.
    """
    b = tl.program_id(0).to(tl.int64)
    num_tokens = N
    if HAS_SEQLENS:
        num_tokens = tl.minimum(tl.load(seqlens_ptr + b), N).to(tl.int32)
    dtype = x_ptr.dtype.element_ty
    grad_ptr += b * stride_gb
    q_ptr += b * stride_qb
    x_ptr += b * stride_xb
    heads, tokens = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    scores = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    dp = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        q = _load(q_ptr, heads, H, stride_qh, columns, C, stride_qc)  # [BH, BK]
        do = _load(grad_ptr, heads, H, stride_gh, columns, C, stride_gc)  # [BH, BK]
        x = _load(x_ptr, tokens, num_tokens, stride_xn, columns, C, stride_xc)  # [BN, BK]
        scores = tl.dot(q, x.T, scores, input_precision="ieee")
        dp = tl.dot(do, x.T, dp, input_precision="ieee")
    lse = tl.load(lse_ptr + b * H + heads, mask=heads < H, other=0.0)
    is_there = (heads < H)[:, None] & (tokens < num_tokens)[None, :]
    p = tl.where(is_there, tl.exp2(scores * log2e - lse[:, None]), 0.0)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(dtype)  # [BH, BN]
    p = p.to(dtype)
    for start in range(0, C, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        q = _load(q_ptr, heads, H, stride_qh, columns, C, stride_qc)  # [BH, BK]
        do = _load(grad_ptr, heads, H, stride_gh, columns, C, stride_gc)  # [BH, BK]
        x = _load(x_ptr, tokens, num_tokens, stride_xn, columns, C, stride_xc)  # [BN, BK]
        mask_c = (columns < C)[None, :]
        dq = tl.dot(ds, x, input_precision="ieee")
        pointers = dq_ptr + (b * H + heads)[:, None] * C + columns[None, :]
        tl.store(pointers, dq.to(dq_ptr.dtype.element_ty), mask=(heads < H)[:, None] & mask_c)
        dx = tl.dot(ds.T, q, tl.dot(p.T, do, input_precision="ieee"), input_precision="ieee")
        pointers = dx_ptr + (b * N + tokens)[:, None] * C + columns[None, :]
        tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=(tokens < N)[:, None] & mask_c)

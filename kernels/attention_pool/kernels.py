"""The kernels of attention pooling: one program owns an image, and holds the weights of all its queries and tokens.

A program loops over the width only, ``BLOCK_K`` columns at a time, so no gradient has two writers. If ``IS_PACKED``,
the images are sequences of several lengths, whose tokens [T] lie behind one another, and each program finds the tokens
of its sequence by the cumulative lengths.
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
def _tokens_of(cu_seqlens_ptr, b, T):
    """Return the first token of packed sequence ``b`` and the number of its tokens, clamped to the T tokens."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1), first), T)
    return first.to(tl.int64), end - first


@triton.jit
def _store_zeros(ptr, first, end, step, C, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Store zeros in blocks of BLOCK_N rows of a contiguous matrix [rows, C].

    The blocks begin at the rows ``first``, ``first + step``, and so on; no row from ``end`` on is written.
    """
    for start in range(first, end, step):
        rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
        for column in range(0, C, BLOCK_K):
            columns = column + tl.arange(0, BLOCK_K)
            mask = (rows < end)[:, None] & (columns < C)[None, :]
            tl.store(ptr + rows[:, None] * C + columns[None, :], 0.0, mask=mask)


@triton.jit
def _pool_fwd_kernel(
    q_ptr,  # [B, H, C]
    x_ptr,  # [B, N, C], or [T, C] if IS_PACKED
    out_ptr,  # [B, H, C] contiguous
    lse_ptr,  # [B, H] fp32, base 2
    seqlens_ptr,  # [B], or [B + 1] cumulative lengths if IS_PACKED
    H, N, T, C,
    stride_qb, stride_qh, stride_qc, stride_xb, stride_xn, stride_xc, log2e,
    HAS_SEQLENS: tl.constexpr, IS_PACKED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pool the tokens of one image by its queries; each program owns one image.

    p = softmax(q x^T) over the tokens, and out = p x. The tokens are read twice, the second time from the cache. At
    most N tokens are seen.
    """
    b = tl.program_id(0).to(tl.int64)
    q_ptr += b * stride_qb
    out_ptr += b * H * C
    if IS_PACKED:
        first, length = _tokens_of(seqlens_ptr, b, T)
        x_ptr += first * stride_xn
        N = tl.minimum(length, N)
    else:
        x_ptr += b * stride_xb
    if HAS_SEQLENS:
        N = tl.minimum(tl.load(seqlens_ptr + b), N).to(tl.int32)
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
        pointers = out_ptr + heads.to(tl.int64)[:, None] * C + columns[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(heads < H)[:, None] & (columns < C)[None, :])


@triton.jit
def _pool_bwd_kernel(
    grad_ptr,  # [B, H, C]
    q_ptr,  # [B, H, C]
    x_ptr,  # [B, N, C], or [T, C] if IS_PACKED
    lse_ptr,  # [B, H] fp32, base 2
    dq_ptr,  # [B, H, C] contiguous
    dx_ptr,  # [B, N, C], or [T, C] if IS_PACKED, contiguous
    seqlens_ptr,  # [B], or [B + 1] cumulative lengths if IS_PACKED
    H, N, T, C,
    stride_gb, stride_gh, stride_gc, stride_qb, stride_qh, stride_qc, stride_xb, stride_xn, stride_xc, log2e,
    HAS_SEQLENS: tl.constexpr, IS_PACKED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the queries and tokens of one image; each program owns one image.

    dp = do x^T, ds = p (dp - sum_m p_m dp_m), dq = ds x, and dx = p^T do + ds^T q. A token that no query sees gets a
    gradient of zero. The programs share the work of writing these zeros for packed tokens that belong to no sequence.
    """
    b = tl.program_id(0).to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    grad_ptr += b * stride_gb
    q_ptr += b * stride_qb
    num_tokens = N
    first = b * N
    if IS_PACKED:
        first, length = _tokens_of(seqlens_ptr, b, T)
        x_ptr += first * stride_xn
        num_tokens = tl.minimum(length, N)
        _store_zeros(dx_ptr, first + BLOCK_N, first + length, BLOCK_N, C, BLOCK_N, BLOCK_K)
        programs = tl.num_programs(0).to(tl.int64)
        last, of_last = _tokens_of(seqlens_ptr, programs - 1, T)
        _store_zeros(dx_ptr, last + of_last + b * BLOCK_N, T, programs * BLOCK_N, C, BLOCK_N, BLOCK_K)
        N = length
    else:
        x_ptr += b * stride_xb
    if HAS_SEQLENS:
        num_tokens = tl.minimum(tl.load(seqlens_ptr + b), N).to(tl.int32)
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
        pointers = dx_ptr + (first + tokens)[:, None] * C + columns[None, :]
        tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=(tokens < N)[:, None] & mask_c)

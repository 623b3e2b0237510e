"""Attention of any length: a program owns a block of queries or of keys and walks the other side.

The backward pass has two phases. The first owns queries, and leaves delta for the second, which owns keys: each block
of each gradient has one writer, so that the result is deterministic without atomics. The price is that the scores are
computed twice, where the short kernels compute them once. Each phase is a kernel of its own, since the registers that
the second one needs would otherwise limit how many programs of the first one run at once.
"""

import triton
import triton.language as tl

from ..tiles import online_softmax_step
from .tiles import (
    add_product,
    inner,
    load_rows,
    probabilities,
    row_dot,
    scaled_rows,
    store_row_sums,
    store_rows,
    transposed_probabilities,
    visible_keys,
    zero_rows,
)


@triton.jit
def _looped_fwd_kernel(
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, H, D]
    v_ptr,  # [B, N, H, D]
    out_ptr,  # [B, M, H, D] contiguous
    lse_ptr,  # [B, H, M] fp32, in units of q . k
    seqlens_ptr,  # [B] int32
    M, N, H,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    qk_scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_SEQLENS: tl.constexpr,
):  # fmt: skip
    """Compute the output and the log-sum-exp of BLOCK_M queries, which one program owns.

    TAIL is how many keys a step takes behind the last whole block. ``qk_scale`` is scale * log2(e).
    """
    num_m = tl.cdiv(M, BLOCK_M)
    pid_bh, start_m = tl.program_id(0) // num_m, tl.program_id(0) % num_m * BLOCK_M
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    out_ptr += (b * M * H + h) * HEAD_DIM
    num_keys = N
    if HAS_SEQLENS:
        num_keys = tl.minimum(N, tl.load(seqlens_ptr + b))
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, offs_m, M, stride_qn, stride_qd, HEAD_DIM, D_PARTS)  # [BM, D]
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_rows(BLOCK_M, D_PARTS)
    # a whole block that every query sees needs no mask
    whole = num_keys // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        whole = tl.minimum(whole, start_m // BLOCK_N * BLOCK_N)
    for start_n in range(0, whole, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [BN, D]
        v = load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [BN, D]
        scores = inner(q, k, BLOCK_M, BLOCK_N)  # [BM, BN]
        p, decay, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, qk_scale)
        acc = add_product(scaled_rows(acc, decay[:, None]), p.to(q_ptr.dtype.element_ty), v)
    end = tl.minimum(num_keys, start_m + BLOCK_M) if IS_CAUSAL else num_keys
    for start_n in range(whole, end, TAIL):
        offs_n = start_n + tl.arange(0, TAIL)
        k = load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [TAIL, D]
        v = load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [TAIL, D]
        visible = visible_keys(offs_m, offs_n, num_keys, IS_CAUSAL)
        scores = tl.where(visible, inner(q, k, BLOCK_M, TAIL), float("-inf"))  # [BM, TAIL]
        p, decay, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, qk_scale)
        acc = add_product(scaled_rows(acc, decay[:, None]), p.to(q_ptr.dtype.element_ty), v)
    is_empty = row_sum == 0.0
    factor = 1.0 / tl.where(is_empty, 1.0, row_sum)
    store_rows(out_ptr, acc, factor[:, None], offs_m, M, H * HEAD_DIM, 1, HEAD_DIM, D_PARTS)
    lse = tl.where(is_empty, float("inf"), row_max + tl.log2(row_sum) / qk_scale)
    tl.store(lse_ptr + pid_bh.to(tl.int64) * M + offs_m, lse, mask=offs_m < M)


@triton.jit
def _query_bwd_kernel(
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, H, D]
    v_ptr,  # [B, N, H, D]
    out_ptr,  # [B, M, H, D] contiguous
    grad_ptr,  # [B, M, H, D]
    lse_ptr,  # [B, H, M] fp32, in units of q . k
    seqlens_ptr,  # [B] int32
    stats_ptr,  # [B, H, 2, ROWS] fp32, written
    dq_ptr,  # [B, M, H, D]
    dq_sum_ptr,  # [B, blocks of M, H, D] fp32, over the queries of each
    M, N, H, ROWS,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gn, stride_gh, stride_gd,
    stride_dqb, stride_dqn,
    qk_scale, scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_SEQLENS: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BLOCK_M queries, which one program owns, and what the keys need of each query.

    That is lse and delta, or infinity and 0 from the last query up to ROWS, which both kernels' blocks divide: loads
    that need no mask take several numbers at a time. The gradients of a head are contiguous.
    """
    num_m = ROWS // BLOCK_M
    pid_bh, pid = tl.program_id(0) // num_m, tl.program_id(0) % num_m
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    dtype = q_ptr.dtype.element_ty
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    out_ptr += (b * M * H + h) * HEAD_DIM
    grad_ptr += b * stride_gb + h * stride_gh
    dq_ptr += b * stride_dqb + h * HEAD_DIM
    num_keys = N
    if HAS_SEQLENS:
        num_keys = tl.minimum(N, tl.load(seqlens_ptr + b))
    start_m = pid * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, offs_m, M, stride_qn, stride_qd, HEAD_DIM, D_PARTS)  # [BM, D]
    do = load_rows(grad_ptr, offs_m, M, stride_gn, stride_gd, HEAD_DIM, D_PARTS)  # [BM, D]
    delta = row_dot(do, load_rows(out_ptr, offs_m, M, H * HEAD_DIM, 1, HEAD_DIM, D_PARTS))  # [BM]
    lse = tl.load(lse_ptr + pid_bh.to(tl.int64) * M + offs_m, mask=offs_m < M, other=float("inf"))
    stats_ptr += pid_bh.to(tl.int64) * 2 * ROWS
    tl.store(stats_ptr + offs_m, lse)
    tl.store(stats_ptr + ROWS + offs_m, delta)
    acc_dq = zero_rows(BLOCK_M, D_PARTS)
    end = tl.minimum(num_keys, start_m + BLOCK_M) if IS_CAUSAL else num_keys
    for start_n in range(0, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [BN, D]
        v = load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [BN, D]
        scores = inner(q, k, BLOCK_M, BLOCK_N)  # [BM, BN]
        p = probabilities(scores, lse[:, None], qk_scale, dtype == tl.float32)
        p = tl.where(visible_keys(offs_m, offs_n, num_keys, IS_CAUSAL), p, 0.0)
        dp = inner(do, v, BLOCK_M, BLOCK_N)  # [BM, BN]
        ds = (p * (dp - delta[:, None])).to(dtype)
        acc_dq = add_product(acc_dq, ds, k)
    store_rows(dq_ptr, acc_dq, scale, offs_m, M, stride_dqn, 1, HEAD_DIM, D_PARTS)
    if HAS_SUMS:
        store_row_sums(dq_sum_ptr + ((b * num_m + pid) * H + h) * HEAD_DIM, acc_dq, scale, HEAD_DIM, D_PARTS)


@triton.jit
def _key_bwd_kernel(
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, H, D]
    v_ptr,  # [B, N, H, D]
    grad_ptr,  # [B, M, H, D]
    stats_ptr,  # [B, H, 2, ROWS] fp32
    seqlens_ptr,  # [B] int32
    dk_ptr,  # [B, N, H, D]
    dv_ptr,  # [B, N, H, D]
    dv_sum_ptr,  # [B, blocks of N, H, D] fp32, over the values of each
    M, N, H, ROWS,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gn, stride_gh, stride_gd,
    stride_dkb, stride_dkn,
    qk_scale, scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_SEQLENS: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BLOCK_N keys and values, which one program owns, from transposed scores.

    They are zero for keys that do not exist. The gradients of a head are contiguous, and dv has the strides of dk.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    pid_bh, pid = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    dtype = q_ptr.dtype.element_ty
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    grad_ptr += b * stride_gb + h * stride_gh
    stats_ptr += pid_bh.to(tl.int64) * 2 * ROWS
    num_keys = N
    if HAS_SEQLENS:
        num_keys = tl.minimum(N, tl.load(seqlens_ptr + b))
    start_n = pid * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [BN, D]
    v = load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [BN, D]
    acc_dk = zero_rows(BLOCK_N, D_PARTS)
    acc_dv = zero_rows(BLOCK_N, D_PARTS)
    first_m = start_n // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    for start_m in range(first_m, M, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, offs_m, M, stride_qn, stride_qd, HEAD_DIM, D_PARTS)  # [BM, D]
        do = load_rows(grad_ptr, offs_m, M, stride_gn, stride_gd, HEAD_DIM, D_PARTS)  # [BM, D]
        lse = tl.load(stats_ptr + offs_m)
        delta = tl.load(stats_ptr + ROWS + offs_m)
        p_t = transposed_probabilities(
            k, q, lse, offs_n, offs_m, num_keys, qk_scale, BLOCK_N, BLOCK_M, IS_CAUSAL, dtype == tl.float32
        )  # [BN, BM]
        acc_dv = add_product(acc_dv, p_t.to(dtype), do)
        dp_t = inner(v, do, BLOCK_N, BLOCK_M)  # [BN, BM]
        ds_t = (p_t * (dp_t - delta[None, :])).to(dtype)
        acc_dk = add_product(acc_dk, ds_t, q)
    offset = b * stride_dkb + h * HEAD_DIM
    store_rows(dk_ptr + offset, acc_dk, scale, offs_n, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
    store_rows(dv_ptr + offset, acc_dv, 1.0, offs_n, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
    if HAS_SUMS:
        store_row_sums(dv_sum_ptr + ((b * num_n + pid) * H + h) * HEAD_DIM, acc_dv, 1.0, HEAD_DIM, D_PARTS)

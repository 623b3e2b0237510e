"""Attention of short sequences: one program owns a head, reads it once and writes it once.

Programs share no results, so each result has one writer. The forward pass holds whole rows of scores, and its softmax
needs no running maximum. It holds 257 keys in parts of 256 and 16, so that few scores are computed for padding. The
backward pass holds the gradients of all keys and values in registers and loops over the queries, on transposed scores.
It computes delta_i = sum_j p_ij (do_i . v_j) / sum_j p_ij, so it does not read the output again.
"""

import triton
import triton.language as tl

from .tiles import (
    add_product,
    add_transposed_product,
    added,
    head_of,
    inner,
    load_rows,
    offs_of,
    size_of,
    store_row_sums,
    store_rows,
    transposed,
    transposed_probabilities,
    visible_keys,
    zero_columns,
    zero_rows,
)


@triton.jit
def _short_fwd_kernel(
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
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, N_PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    MULTIPLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_SEQLENS: tl.constexpr,
):  # fmt: skip
    """Compute the output and the log-sum-exp of one attention head. ``qk_scale`` is scale * log2(e)."""
    pid = tl.program_id(0)
    b, h = pid // H, pid % H
    q_ptr = head_of(q_ptr, b, h, stride_qb, stride_qh, MULTIPLE)
    k_ptr = head_of(k_ptr, b, h, stride_kb, stride_kh, MULTIPLE)
    v_ptr = head_of(v_ptr, b, h, stride_vb, stride_vh, MULTIPLE)
    out_ptr = head_of(out_ptr, b.to(tl.int64) * M, h, H * HEAD_DIM, HEAD_DIM, MULTIPLE)
    num_keys = N
    if HAS_SEQLENS:
        num_keys = tl.minimum(N, tl.load(seqlens_ptr + b))
    keys = ()
    values = ()
    for j in tl.static_range(len(N_PARTS)):
        offs_n = offs_of(N_PARTS, j)
        keys = keys + (load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS),)
        values = values + (load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS),)
    for start_m in range(0, M, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, offs_m, M, stride_qn, stride_qd, HEAD_DIM, D_PARTS)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        scores = ()
        for j in tl.static_range(len(N_PARTS)):
            tile = inner(q, keys[j], BLOCK_M, size_of(N_PARTS, j))
            # Only the last part contains offsets past the last key.
            if IS_CAUSAL or HAS_SEQLENS or j == len(N_PARTS) - 1:
                offs_n = offs_of(N_PARTS, j)
                tile = tl.where(visible_keys(offs_m, offs_n, num_keys, IS_CAUSAL), tile, float("-inf"))
            row_max = tl.maximum(row_max, tl.max(tile, 1))
            scores = scores + (tile,)
        # A query that sees no key has row_max = -inf, and -inf - (-inf) is NaN, so 0 is subtracted there.
        pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        acc = zero_rows(BLOCK_M, D_PARTS)
        for j in tl.static_range(len(N_PARTS)):
            # The difference of a score and a row_max that are close to each other is exact, so it is taken before the
            # product with the scale.
            p = tl.exp2((scores[j] - pivot[:, None]) * qk_scale)
            row_sum += tl.sum(p, 1)
            acc = add_product(acc, p.to(q_ptr.dtype.element_ty), values[j])
        is_empty = row_sum == 0.0
        factor = 1.0 / tl.where(is_empty, 1.0, row_sum)
        store_rows(out_ptr, acc, factor[:, None], offs_m, M, H * HEAD_DIM, 1, HEAD_DIM, D_PARTS)
        lse = tl.where(is_empty, float("inf"), pivot + tl.log2(row_sum) / qk_scale)
        tl.store(lse_ptr + pid.to(tl.int64) * M + offs_m, lse, mask=offs_m < M)


@triton.jit
def _short_bwd_kernel(
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, H, D]
    v_ptr,  # [B, N, H, D]
    grad_ptr,  # [B, M, H, D]
    lse_ptr,  # [B, H, M] fp32, in units of q . k
    seqlens_ptr,  # [B] int32
    dq_ptr,  # [B, M, H, D]
    dk_ptr,  # [B, N, H, D]
    dv_ptr,  # [B, N, H, D]
    dq_sum_ptr,  # [B, H, D] fp32, over the queries
    dv_sum_ptr,  # [B, H, D] fp32, over the values
    M, N, H,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gn, stride_gh, stride_gd,
    stride_dqb, stride_dqn, stride_dkb, stride_dkn,
    qk_scale, scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MULTIPLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_SEQLENS: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one attention head. BLOCK_N holds all keys.

    The gradients of a head are contiguous, and dv has the strides of dk.
    """
    pid = tl.program_id(0)
    b, h = pid // H, pid % H
    dtype = q_ptr.dtype.element_ty
    q_ptr = head_of(q_ptr, b, h, stride_qb, stride_qh, MULTIPLE)
    k_ptr = head_of(k_ptr, b, h, stride_kb, stride_kh, MULTIPLE)
    v_ptr = head_of(v_ptr, b, h, stride_vb, stride_vh, MULTIPLE)
    grad_ptr = head_of(grad_ptr, b, h, stride_gb, stride_gh, MULTIPLE)
    dq_ptr = head_of(dq_ptr, b, h, stride_dqb, HEAD_DIM, MULTIPLE)
    dk_ptr = head_of(dk_ptr, b, h, stride_dkb, HEAD_DIM, MULTIPLE)
    dv_ptr = head_of(dv_ptr, b, h, stride_dkb, HEAD_DIM, MULTIPLE)
    lse_ptr += pid.to(tl.int64) * M
    num_keys = N
    if HAS_SEQLENS:
        num_keys = tl.minimum(N, tl.load(seqlens_ptr + b))
    offs_n = tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [BN, D]
    v = load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [BN, D]
    acc_dk = zero_rows(BLOCK_N, D_PARTS)
    acc_dv = zero_rows(BLOCK_N, D_PARTS)
    dq_sum = zero_columns(BLOCK_M, D_PARTS)
    for start_m in range(0, M, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, offs_m, M, stride_qn, stride_qd, HEAD_DIM, D_PARTS)  # [BM, D]
        do = load_rows(grad_ptr, offs_m, M, stride_gn, stride_gd, HEAD_DIM, D_PARTS)  # [BM, D]
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < M, other=float("inf"))
        p_t = transposed_probabilities(
            k, q, lse, offs_n, offs_m, num_keys, qk_scale, BLOCK_N, BLOCK_M, IS_CAUSAL, dtype == tl.float32
        )  # [BN, BM]
        acc_dv = add_product(acc_dv, p_t.to(dtype), do)
        dp_t = inner(v, do, BLOCK_N, BLOCK_M)  # [BN, BM]
        # The sum of p differs from 1 by the rounding of lse. The division keeps this error out of dp - delta.
        total = tl.sum(p_t, 0)
        delta = tl.sum(p_t * dp_t, 0) / tl.where(total == 0.0, 1.0, total)  # [BM]
        ds_t = (p_t * (dp_t - delta[None, :])).to(dtype)
        acc_dk = add_product(acc_dk, ds_t, q)
        # dq is computed transposed, since D rows fill the matrix unit and BLOCK_M rows would not.
        dq_t = add_transposed_product(zero_columns(BLOCK_M, D_PARTS), k, ds_t)  # [D, BM]
        if HAS_SUMS:
            dq_sum = added(dq_sum, dq_t)
        store_rows(dq_ptr, transposed(dq_t), scale, offs_m, M, stride_dqn, 1, HEAD_DIM, D_PARTS)
    store_rows(dk_ptr, acc_dk, scale, offs_n, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
    store_rows(dv_ptr, acc_dv, 1.0, offs_n, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
    if HAS_SUMS:
        store_row_sums(dq_sum_ptr + pid.to(tl.int64) * HEAD_DIM, transposed(dq_sum), scale, HEAD_DIM, D_PARTS)
        store_row_sums(dv_sum_ptr + pid.to(tl.int64) * HEAD_DIM, acc_dv, 1.0, HEAD_DIM, D_PARTS)

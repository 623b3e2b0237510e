"""Attention on packed sequences: T tokens hold sequences of any lengths one after another, without padding.

A program owns a block of queries or of keys, which may belong to several short sequences, and loops over all tokens of
these sequences. ``bounds`` [2, T] holds for each token the first token of its sequence and the end of the sequence.
Both rows ascend, so the bounds of a block's first and last token tell which tokens its sequences have. For a token that
belongs to no sequence, the first token is T, so it sees no key and no query sees it. As in ``looped.py``, the backward
pass has two phases, and each block of each gradient has one writer.
"""

import triton
import triton.language as tl

from .tiles import (
    add_product,
    head_of,
    inner,
    load_rows,
    log_sum_exp,
    probabilities,
    row_dot,
    scaled_rows,
    shift_of,
    softmax_step,
    store_row_sums,
    store_rows,
    zero_rows,
)


@triton.jit
def _varlen_fwd_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    bounds_ptr,  # [2, T] int32: the first token of each token's sequence, and the end of the sequence
    out_ptr,  # [T, H, D] contiguous
    lse_ptr,  # [H, T] fp32, in units of q . k
    T, H,
    stride_qn, stride_qh, stride_qd,
    stride_kn, stride_kh, stride_kd,
    stride_vn, stride_vh, stride_vd,
    qk_scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MULTIPLE: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Compute the output and the log-sum-exp of BLOCK_M tokens, which one program owns.

    ``qk_scale`` is scale * log2(e).
    """
    num_m = tl.cdiv(T, BLOCK_M)
    h, start_m = tl.program_id(0) // num_m, tl.program_id(0) % num_m * BLOCK_M
    dtype = q_ptr.dtype.element_ty
    q_ptr = head_of(q_ptr, h, 0, stride_qh, 0, MULTIPLE)
    k_ptr = head_of(k_ptr, h, 0, stride_kh, 0, MULTIPLE)
    v_ptr = head_of(v_ptr, h, 0, stride_vh, 0, MULTIPLE)
    out_ptr = head_of(out_ptr, h, 0, HEAD_DIM, 0, MULTIPLE)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    first, end, start, last = bounds_of(bounds_ptr, start_m, T, IS_CAUSAL, BLOCK_M)  # [BM], [BM]
    q = load_rows(q_ptr, offs_m, T, stride_qn, stride_qd, HEAD_DIM, D_PARTS)  # [BM, D]
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_rows(BLOCK_M, D_PARTS)
    for start_n in range(start, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, last, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [BN, D]
        v = load_rows(v_ptr, offs_n, last, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [BN, D]
        visible = (offs_n[None, :] >= first[:, None]) & (offs_n[None, :] < end[:, None])
        scores = tl.where(visible, inner(q, k, BLOCK_M, BLOCK_N), float("-inf"))  # [BM, BN]
        p, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum, qk_scale, dtype == tl.float32)
        acc = add_product(scaled_rows(acc, decay[:, None]), p.to(dtype), v)
    is_empty = row_sum == 0.0
    factor = 1.0 / tl.where(is_empty, 1.0, row_sum)
    store_rows(out_ptr, acc, factor[:, None], offs_m, T, H * HEAD_DIM, 1, HEAD_DIM, D_PARTS)
    lse = log_sum_exp(row_max, row_sum, qk_scale, dtype == tl.float32)
    tl.store(lse_ptr + h.to(tl.int64) * T + offs_m, lse, mask=offs_m < T)


@triton.jit
def bounds_of(bounds_ptr, start, T, IS_CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first token and the end of the sequence of each token in a block, [BLOCK] each, and the first token
    and the end of all sequences in the block together.

    With IS_CAUSAL, a token's end is right after the token itself, since it sees no later token.
    """
    offs = start + tl.arange(0, BLOCK)
    first = tl.load(bounds_ptr + offs, mask=offs < T, other=T)
    end = tl.load(bounds_ptr + T + offs, mask=offs < T, other=0)
    stop = tl.minimum(start + BLOCK, T)
    last = tl.load(bounds_ptr + T + stop - 1)
    if IS_CAUSAL:
        end, last = tl.minimum(end, offs + 1), tl.minimum(last, stop)
    return first, end, tl.load(bounds_ptr + start), last


@triton.jit
def _varlen_query_bwd_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    bounds_ptr,  # [2, T] int32
    out_ptr,  # [T, H, D] contiguous
    grad_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, in units of q . k
    delta_ptr,  # [H, T] fp32, written
    dq_ptr,  # [T, H, D]
    dq_sum_ptr,  # [blocks of T, H, D] fp32, the sum of dq over the queries of each block
    T, H,
    stride_qn, stride_qh, stride_qd,
    stride_kn, stride_kh, stride_kd,
    stride_vn, stride_vh, stride_vd,
    stride_gn, stride_gh, stride_gd,
    stride_dqn,
    qk_scale, scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MULTIPLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BLOCK_M queries, which one program owns, and store their delta for the key phase.

    The heads of a gradient are contiguous.
    """
    num_m = tl.cdiv(T, BLOCK_M)
    h, pid = tl.program_id(0) // num_m, tl.program_id(0) % num_m
    dtype = q_ptr.dtype.element_ty
    q_ptr = head_of(q_ptr, h, 0, stride_qh, 0, MULTIPLE)
    k_ptr = head_of(k_ptr, h, 0, stride_kh, 0, MULTIPLE)
    v_ptr = head_of(v_ptr, h, 0, stride_vh, 0, MULTIPLE)
    out_ptr = head_of(out_ptr, h, 0, HEAD_DIM, 0, MULTIPLE)
    grad_ptr = head_of(grad_ptr, h, 0, stride_gh, 0, MULTIPLE)
    dq_ptr = head_of(dq_ptr, h, 0, HEAD_DIM, 0, MULTIPLE)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    first, end, start, last = bounds_of(bounds_ptr, pid * BLOCK_M, T, IS_CAUSAL, BLOCK_M)  # [BM], [BM]
    q = load_rows(q_ptr, offs_m, T, stride_qn, stride_qd, HEAD_DIM, D_PARTS)  # [BM, D]
    do = load_rows(grad_ptr, offs_m, T, stride_gn, stride_gd, HEAD_DIM, D_PARTS)  # [BM, D]
    rows = h.to(tl.int64) * T + offs_m
    lse = tl.load(lse_ptr + rows, mask=offs_m < T, other=float("inf"))
    delta = row_dot(do, load_rows(out_ptr, offs_m, T, H * HEAD_DIM, 1, HEAD_DIM, D_PARTS))  # [BM]
    tl.store(delta_ptr + rows, delta, mask=offs_m < T)
    shift = shift_of(lse, qk_scale, dtype == tl.float32)
    acc_dq = zero_rows(BLOCK_M, D_PARTS)
    for start_n in range(start, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, last, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [BN, D]
        v = load_rows(v_ptr, offs_n, last, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [BN, D]
        visible = (offs_n[None, :] >= first[:, None]) & (offs_n[None, :] < end[:, None])
        p = probabilities(inner(q, k, BLOCK_M, BLOCK_N), shift[:, None], qk_scale, dtype == tl.float32)
        # Hidden keys do not count in lse. Their scores s can exceed it by far, and 2^(s - lse) can be infinite.
        dp = tl.where(visible, p * (inner(do, v, BLOCK_M, BLOCK_N) - delta[:, None]), 0.0)  # [BM, BN]
        acc_dq = add_product(acc_dq, dp.to(dtype), k)
    store_rows(dq_ptr, acc_dq, scale, offs_m, T, stride_dqn, 1, HEAD_DIM, D_PARTS)
    if HAS_SUMS:
        store_row_sums(dq_sum_ptr + (pid.to(tl.int64) * H + h) * HEAD_DIM, acc_dq, scale, HEAD_DIM, D_PARTS)


@triton.jit
def _varlen_key_bwd_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    bounds_ptr,  # [2, T] int32
    grad_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, in units of q . k
    delta_ptr,  # [H, T] fp32
    dk_ptr,  # [T, H, D]
    dv_ptr,  # [T, H, D]
    dv_sum_ptr,  # [blocks of T, H, D] fp32, the sum of dv over the values of each block
    T, H,
    stride_qn, stride_qh, stride_qd,
    stride_kn, stride_kh, stride_kd,
    stride_vn, stride_vh, stride_vd,
    stride_gn, stride_gh, stride_gd,
    stride_dkn,
    qk_scale, scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MULTIPLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BLOCK_N keys and values, which one program owns, from transposed scores.

    The heads of a gradient are contiguous, and dv has the strides of dk.
    """
    num_n = tl.cdiv(T, BLOCK_N)
    h, pid = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    dtype = q_ptr.dtype.element_ty
    q_ptr = head_of(q_ptr, h, 0, stride_qh, 0, MULTIPLE)
    k_ptr = head_of(k_ptr, h, 0, stride_kh, 0, MULTIPLE)
    v_ptr = head_of(v_ptr, h, 0, stride_vh, 0, MULTIPLE)
    grad_ptr = head_of(grad_ptr, h, 0, stride_gh, 0, MULTIPLE)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    # ``first`` is the first query that sees each key, and ``end`` is right after the last one.
    first, end, start, last = bounds_of(bounds_ptr, pid * BLOCK_N, T, False, BLOCK_N)  # [BN], [BN]
    if IS_CAUSAL:
        first, start = tl.maximum(first, offs_n), tl.maximum(start, pid * BLOCK_N)
    k = load_rows(k_ptr, offs_n, last, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [BN, D]
    v = load_rows(v_ptr, offs_n, last, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [BN, D]
    acc_dk, acc_dv = zero_rows(BLOCK_N, D_PARTS), zero_rows(BLOCK_N, D_PARTS)
    for start_m in range(start, last, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, offs_m, last, stride_qn, stride_qd, HEAD_DIM, D_PARTS)  # [BM, D]
        do = load_rows(grad_ptr, offs_m, last, stride_gn, stride_gd, HEAD_DIM, D_PARTS)  # [BM, D]
        visible = (offs_m[None, :] >= first[:, None]) & (offs_m[None, :] < end[:, None])
        lse = tl.load(lse_ptr + h.to(tl.int64) * T + offs_m, mask=offs_m < last, other=float("inf"))
        shift = shift_of(lse, qk_scale, dtype == tl.float32)
        p_t = probabilities(inner(k, q, BLOCK_N, BLOCK_M), shift[None, :], qk_scale, dtype == tl.float32)
        p_t = tl.where(visible, p_t, 0.0)  # [BN, BM]
        acc_dv = add_product(acc_dv, p_t.to(dtype), do)
        # delta is loaded only here, so that it takes no registers during the products above.
        delta = tl.load(delta_ptr + h.to(tl.int64) * T + offs_m, mask=offs_m < last, other=0.0)
        ds_t = (p_t * (inner(v, do, BLOCK_N, BLOCK_M) - delta[None, :])).to(dtype)  # [BN, BM]
        acc_dk = add_product(acc_dk, ds_t, q)
    dk_ptr = head_of(dk_ptr, h, 0, HEAD_DIM, 0, MULTIPLE)
    dv_ptr = head_of(dv_ptr, h, 0, HEAD_DIM, 0, MULTIPLE)
    store_rows(dk_ptr, acc_dk, scale, offs_n, T, stride_dkn, 1, HEAD_DIM, D_PARTS)
    store_rows(dv_ptr, acc_dv, 1.0, offs_n, T, stride_dkn, 1, HEAD_DIM, D_PARTS)
    if HAS_SUMS:
        store_row_sums(dv_sum_ptr + (pid.to(tl.int64) * H + h) * HEAD_DIM, acc_dv, 1.0, HEAD_DIM, D_PARTS)

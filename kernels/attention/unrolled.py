"""The backward pass of attention for heads that are slightly longer than a block, such as the 77 tokens of a text.

The kernel has no loop: its blocks are unrolled at compile time. A program holds all queries, their gradients and the
accumulators of dq, and takes the keys block by block. A loop over queries with all keys in registers, as in
``short.py``, would pad 77 keys to 128, and could not skip the blocks that a causal mask hides.
"""

import triton
import triton.language as tl

from .tiles import (
    add_product,
    add_transposed_product,
    head_of,
    inner,
    load_rows,
    offs_of,
    probabilities,
    row_dot,
    row_sums,
    shift_of,
    size_of,
    start_of,
    store_rows,
    store_sums,
    transposed,
    zero_columns,
    zero_rows,
    zero_sums,
)


@triton.jit
def _unrolled_bwd_kernel(
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, H, D]
    v_ptr,  # [B, N, H, D]
    out_ptr,  # [B, M, H, D] contiguous
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
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, M_PARTS: tl.constexpr, N_PARTS: tl.constexpr,
    MULTIPLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_SEQLENS: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one attention head; its queries and keys are in blocks of the sizes M_PARTS and N_PARTS.

    The gradients of a head are contiguous, and dv has the strides of dk.
    """
    pid = tl.program_id(0)
    b, h = pid // H, pid % H
    dtype = q_ptr.dtype.element_ty
    q_ptr = head_of(q_ptr, b, h, stride_qb, stride_qh, MULTIPLE)
    k_ptr = head_of(k_ptr, b, h, stride_kb, stride_kh, MULTIPLE)
    v_ptr = head_of(v_ptr, b, h, stride_vb, stride_vh, MULTIPLE)
    out_ptr = head_of(out_ptr, b.to(tl.int64) * M, h, H * HEAD_DIM, HEAD_DIM, MULTIPLE)
    grad_ptr = head_of(grad_ptr, b, h, stride_gb, stride_gh, MULTIPLE)
    dq_ptr = head_of(dq_ptr, b, h, stride_dqb, HEAD_DIM, MULTIPLE)
    dk_ptr = head_of(dk_ptr, b, h, stride_dkb, HEAD_DIM, MULTIPLE)
    dv_ptr = head_of(dv_ptr, b, h, stride_dkb, HEAD_DIM, MULTIPLE)
    lse_ptr += pid.to(tl.int64) * M
    num_keys = N
    if HAS_SEQLENS:
        num_keys = tl.minimum(N, tl.load(seqlens_ptr + b))
    queries, grads, shifts, deltas, acc_dq = (), (), (), (), ()
    for j in tl.static_range(len(M_PARTS)):
        offs_m = offs_of(M_PARTS, j)
        do = load_rows(grad_ptr, offs_m, M, stride_gn, stride_gd, HEAD_DIM, D_PARTS)  # [BM, D]
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < M, other=float("inf"))
        out = load_rows(out_ptr, offs_m, M, H * HEAD_DIM, 1, HEAD_DIM, D_PARTS)  # [BM, D]
        queries = queries + (load_rows(q_ptr, offs_m, M, stride_qn, stride_qd, HEAD_DIM, D_PARTS),)
        grads = grads + (do,)
        shifts = shifts + (shift_of(lse, qk_scale, dtype == tl.float32),)
        deltas = deltas + (row_dot(do, out),)
        acc_dq = acc_dq + (zero_columns(size_of(M_PARTS, j), D_PARTS),)
    dq_sum, dv_sum = zero_sums(D_PARTS), zero_sums(D_PARTS)
    for i in tl.static_range(len(N_PARTS)):
        offs_n = offs_of(N_PARTS, i)
        k = load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [BN, D]
        v = load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [BN, D]
        acc_dk, acc_dv = zero_rows(size_of(N_PARTS, i), D_PARTS), zero_rows(size_of(N_PARTS, i), D_PARTS)
        updated = ()
        for j in tl.static_range(len(M_PARTS)):
            # Under a causal mask, no query of an earlier block sees a key of this block.
            if IS_CAUSAL and start_of(M_PARTS, j + 1) <= start_of(N_PARTS, i):
                updated = updated + (acc_dq[j],)
            else:
                scores = inner(k, queries[j], size_of(N_PARTS, i), size_of(M_PARTS, j))  # [BN, BM]
                p_t = probabilities(scores, shifts[j][None, :], qk_scale, dtype == tl.float32)
                if HAS_SEQLENS or i == len(N_PARTS) - 1:
                    p_t = tl.where((offs_n < num_keys)[:, None], p_t, 0.0)
                if IS_CAUSAL:
                    p_t = tl.where(offs_n[:, None] <= offs_of(M_PARTS, j)[None, :], p_t, 0.0)
                acc_dv = add_product(acc_dv, p_t.to(dtype), grads[j])
                dp_t = inner(v, grads[j], size_of(N_PARTS, i), size_of(M_PARTS, j))  # [BN, BM]
                ds_t = (p_t * (dp_t - deltas[j][None, :])).to(dtype)
                acc_dk = add_product(acc_dk, ds_t, queries[j])
                updated = updated + (add_transposed_product(acc_dq[j], k, ds_t),)  # [D, BM]
        acc_dq = updated
        store_rows(dk_ptr, acc_dk, scale, offs_n, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
        store_rows(dv_ptr, acc_dv, 1.0, offs_n, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
        if HAS_SUMS:
            dv_sum = row_sums(dv_sum, acc_dv)
    for j in tl.static_range(len(M_PARTS)):
        dq = transposed(acc_dq[j])
        store_rows(dq_ptr, dq, scale, offs_of(M_PARTS, j), M, stride_dqn, 1, HEAD_DIM, D_PARTS)
        if HAS_SUMS:
            dq_sum = row_sums(dq_sum, dq)
    if HAS_SUMS:
        store_sums(dq_sum_ptr + pid.to(tl.int64) * HEAD_DIM, dq_sum, scale, HEAD_DIM, D_PARTS)
        store_sums(dv_sum_ptr + pid.to(tl.int64) * HEAD_DIM, dv_sum, 1.0, HEAD_DIM, D_PARTS)

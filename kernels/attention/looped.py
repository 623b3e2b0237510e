"""Attention of any length: a program owns a block of queries and loops over the keys, or the other way round.

The backward pass has two phases. A program of the first phase owns queries, and stores delta for the second phase,
whose programs own keys. So each block of each gradient has one writer, and the result is deterministic without atomics.
The price is that the scores are computed twice; the short kernels compute them once. Each phase is a kernel of its own,
since the second one needs more registers, with which fewer programs of the first one would run at once.

The loop loads whole blocks. The rows that are left over are loaded in a tile of ``FIRST`` rows before the loop, or in
tiles of ``TAIL`` rows after it. Whole blocks are loaded through tensor descriptors on GPUs that have them: the
addresses of plain loads would take registers and instructions.

If a few keys are left over after whole blocks, no program of the second phase owns them, since it would load all
queries for these few keys. The first phase, which computes their scores anyway, writes the contribution of each block
of queries to their gradients, and the last program of the head in the second phase adds these parts up in order.
"""

import triton
import triton.language as tl

from .tiles import (
    MOST_REST,
    add_product,
    as_rows,
    head_of,
    held,
    inner,
    load_rows,
    log_sum_exp,
    masked_rows,
    probabilities,
    row_dot,
    scaled_rows,
    shift_of,
    softmax_step,
    store_rest,
    store_row_sums,
    store_rows,
    sum_of_rest,
    visible_keys,
    walked_rows,
    zero_rows,
)


@triton.jit
def _looped_fwd_kernel(
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, H, D]
    v_ptr,  # [B, N, H, D]
    k_tiles, k_rest,  # descriptors of blocks [1, BN, 1, part] of k for each part of D, or None
    v_tiles, v_rest,  # descriptors of blocks of v, like those of k
    out_ptr,  # [B, M, H, D] contiguous
    lse_ptr,  # [B, H, M] fp32, in units of q . k
    seqlens_ptr,  # [B] int32
    M, N, H,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    qk_scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr, TAIL: tl.constexpr, MULTIPLE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_SEQLENS: tl.constexpr, IS_HELD: tl.constexpr,
):  # fmt: skip
    """Compute the output and the log-sum-exp of BLOCK_M queries, which one program owns.

    ``qk_scale`` is scale * log2(e).
    """
    num_m = tl.cdiv(M, BLOCK_M)
    pid_bh, start_m = tl.program_id(0) // num_m, tl.program_id(0) % num_m * BLOCK_M
    b, h = pid_bh // H, pid_bh % H
    dtype = q_ptr.dtype.element_ty
    q_ptr = head_of(q_ptr, b, h, stride_qb, stride_qh, MULTIPLE)
    k_ptr = head_of(k_ptr, b, h, stride_kb, stride_kh, MULTIPLE)
    v_ptr = head_of(v_ptr, b, h, stride_vb, stride_vh, MULTIPLE)
    out_ptr = head_of(out_ptr, b.to(tl.int64) * M, h, H * HEAD_DIM, HEAD_DIM, MULTIPLE)
    num_keys = N
    if HAS_SEQLENS:
        num_keys = tl.minimum(N, tl.load(seqlens_ptr + b))
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, offs_m, M, stride_qn, stride_qd, HEAD_DIM, D_PARTS)  # [BM, D]
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_rows(BLOCK_M, D_PARTS)
    # Every query of the program sees all keys of the blocks before ``whole``, so these blocks need no mask.
    whole = num_keys // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        whole = tl.minimum(whole, start_m // BLOCK_N * BLOCK_N)
    if FIRST > 0:
        acc, row_max, row_sum = _forward_tail(
            acc, row_max, row_sum, q, k_ptr, v_ptr, offs_m, whole, num_keys,
            stride_kn, stride_kd, stride_vn, stride_vd, qk_scale,
            HEAD_DIM, D_PARTS, BLOCK_M, FIRST, IS_CAUSAL, True, dtype,
        )  # fmt: skip
    for start_n in range(0, whole, BLOCK_N):
        k = walked_rows(
            k_tiles, k_rest, k_ptr, b, h, start_n, num_keys,
            stride_kn, stride_kd, BLOCK_N, HEAD_DIM, D_PARTS,
        )  # fmt: skip
        v = walked_rows(
            v_tiles, v_rest, v_ptr, b, h, start_n, num_keys,
            stride_vn, stride_vd, BLOCK_N, HEAD_DIM, D_PARTS,
        )  # fmt: skip
        k, v = as_rows(k, BLOCK_N, D_PARTS), as_rows(v, BLOCK_N, D_PARTS)
        scores = inner(q, k, BLOCK_M, BLOCK_N)  # [BM, BN]
        p, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum, qk_scale, dtype == tl.float32)
        acc = add_product(scaled_rows(acc, decay[:, None]), p.to(dtype), v)
        if IS_HELD:
            acc = held(acc)
    if TAIL > 0:
        end = tl.minimum(num_keys, start_m + BLOCK_M) if IS_CAUSAL else num_keys
        for start_n in range(whole, end, TAIL):
            acc, row_max, row_sum = _forward_tail(
                acc, row_max, row_sum, q, k_ptr, v_ptr, offs_m, start_n, num_keys,
                stride_kn, stride_kd, stride_vn, stride_vd, qk_scale,
                HEAD_DIM, D_PARTS, BLOCK_M, TAIL, IS_CAUSAL, False, dtype,
            )  # fmt: skip
    is_empty = row_sum == 0.0
    factor = 1.0 / tl.where(is_empty, 1.0, row_sum)
    store_rows(out_ptr, acc, factor[:, None], offs_m, M, H * HEAD_DIM, 1, HEAD_DIM, D_PARTS)
    lse = log_sum_exp(row_max, row_sum, qk_scale, dtype == tl.float32)
    tl.store(lse_ptr + pid_bh.to(tl.int64) * M + offs_m, lse, mask=offs_m < M)


@triton.jit
def _forward_tail(
    acc, row_max, row_sum, q, k_ptr, v_ptr, offs_m, start_n, num_keys,
    stride_kn, stride_kd, stride_vn, stride_vd, qk_scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_FIRST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Add TAIL keys, which may be hidden from some queries, to the running softmax and output of a program's queries.

    With IS_FIRST, they are the first keys, so the accumulator is zero and need not be scaled.
    """
    offs_n = start_n + tl.arange(0, TAIL)
    k = load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [TAIL, D]
    v = load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [TAIL, D]
    visible = visible_keys(offs_m, offs_n, num_keys, IS_CAUSAL)
    scores = tl.where(visible, inner(q, k, BLOCK_M, TAIL), float("-inf"))  # [BM, TAIL]
    p, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum, qk_scale, dtype == tl.float32)
    if not IS_FIRST:
        acc = scaled_rows(acc, decay[:, None])
    return add_product(acc, p.to(dtype), v), row_max, row_sum


@triton.jit
def _query_bwd_kernel(
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, H, D]
    v_ptr,  # [B, N, H, D]
    k_tiles, k_rest,  # descriptors of blocks [1, BN, 1, part] of k for each part of D, or None
    v_tiles, v_rest,  # descriptors of blocks of v, like those of k
    out_ptr,  # [B, M, H, D] contiguous
    grad_ptr,  # [B, M, H, D]
    lse_ptr,  # [B, H, M] fp32, in units of q . k
    seqlens_ptr,  # [B] int32
    stats_ptr,  # [B, H, 2, ROWS] fp32, written: shift and delta
    dq_ptr,  # [B, M, H, D]
    dq_sum_ptr,  # [B, blocks of M, H, D] fp32, the sum of dq over the queries of each block
    rest_ptr,  # [B, H, blocks of M, 2, N % BN, D] fp32, written: dk and dv of the last keys from each block, or None
    M, N, H, ROWS,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gn, stride_gh, stride_gd,
    stride_dqb, stride_dqn,
    qk_scale, scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr, TAIL: tl.constexpr, MULTIPLE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_SEQLENS: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BLOCK_M queries, which one program owns, and store two statistics for the key phase.

    These are delta and the ``shift`` of :func:`probabilities`. Past the last query, up to ROWS, which is a multiple of
    both kernels' blocks, they are 0 and infinity. The key phase can then load them without a mask, several numbers at a
    time. The gradients of a head are contiguous.
    """
    num_m = ROWS // BLOCK_M
    pid_bh, pid = tl.program_id(0) // num_m, tl.program_id(0) % num_m
    b, h = pid_bh // H, pid_bh % H
    dtype = q_ptr.dtype.element_ty
    q_ptr = head_of(q_ptr, b, h, stride_qb, stride_qh, MULTIPLE)
    k_ptr = head_of(k_ptr, b, h, stride_kb, stride_kh, MULTIPLE)
    v_ptr = head_of(v_ptr, b, h, stride_vb, stride_vh, MULTIPLE)
    out_ptr = head_of(out_ptr, b.to(tl.int64) * M, h, H * HEAD_DIM, HEAD_DIM, MULTIPLE)
    grad_ptr = head_of(grad_ptr, b, h, stride_gb, stride_gh, MULTIPLE)
    dq_ptr = head_of(dq_ptr, b, h, stride_dqb, HEAD_DIM, MULTIPLE)
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
    shift = shift_of(lse, qk_scale, dtype == tl.float32)
    tl.store(stats_ptr + offs_m, shift)
    tl.store(stats_ptr + ROWS + offs_m, delta)
    acc_dq = zero_rows(BLOCK_M, D_PARTS)
    whole = num_keys // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        whole = tl.minimum(whole, start_m // BLOCK_N * BLOCK_N)
    if FIRST > 0:
        acc_dq, rest_p, rest_ds = _query_tail(
            acc_dq, q, do, shift, delta, k_ptr, v_ptr, offs_m, whole, num_keys,
            stride_kn, stride_kd, stride_vn, stride_vd, qk_scale,
            HEAD_DIM, D_PARTS, BLOCK_M, FIRST, IS_CAUSAL, dtype,
        )  # fmt: skip
        if rest_ptr is not None:
            store_rest(rest_ptr, q, do, rest_p, rest_ds, scale, N - whole, HEAD_DIM, D_PARTS, FIRST)
    for start_n in range(0, whole, BLOCK_N):
        k = walked_rows(
            k_tiles, k_rest, k_ptr, b, h, start_n, num_keys,
            stride_kn, stride_kd, BLOCK_N, HEAD_DIM, D_PARTS,
        )  # fmt: skip
        v = walked_rows(
            v_tiles, v_rest, v_ptr, b, h, start_n, num_keys,
            stride_vn, stride_vd, BLOCK_N, HEAD_DIM, D_PARTS,
        )  # fmt: skip
        k, v = as_rows(k, BLOCK_N, D_PARTS), as_rows(v, BLOCK_N, D_PARTS)
        p = probabilities(inner(q, k, BLOCK_M, BLOCK_N), shift[:, None], qk_scale, dtype == tl.float32)
        ds = (p * (inner(do, v, BLOCK_M, BLOCK_N) - delta[:, None])).to(dtype)  # [BM, BN]
        acc_dq = add_product(acc_dq, ds, k)
    if TAIL > 0:
        end = tl.minimum(num_keys, start_m + BLOCK_M) if IS_CAUSAL else num_keys
        for start_n in range(whole, end, TAIL):
            acc_dq, _, _ = _query_tail(
                acc_dq, q, do, shift, delta, k_ptr, v_ptr, offs_m, start_n, num_keys,
                stride_kn, stride_kd, stride_vn, stride_vd, qk_scale,
                HEAD_DIM, D_PARTS, BLOCK_M, TAIL, IS_CAUSAL, dtype,
            )  # fmt: skip
    store_rows(dq_ptr, acc_dq, scale, offs_m, M, stride_dqn, 1, HEAD_DIM, D_PARTS)
    if HAS_SUMS:
        dq_sum_ptr += ((b.to(tl.int64) * num_m + pid) * H + h) * HEAD_DIM
        store_row_sums(dq_sum_ptr, acc_dq, scale, HEAD_DIM, D_PARTS)


@triton.jit
def _query_tail(
    acc_dq, q, do,  # [BM, D]
    shift, delta,  # [BM]
    k_ptr, v_ptr, offs_m, start_n, num_keys,
    stride_kn, stride_kd, stride_vn, stride_vd, qk_scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
    IS_CAUSAL: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Add the contributions of TAIL keys, which may be hidden from some queries, to the gradients of the queries."""
    offs_n = start_n + tl.arange(0, TAIL)
    k = load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [TAIL, D]
    v = load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [TAIL, D]
    p = probabilities(inner(q, k, BLOCK_M, TAIL), shift[:, None], qk_scale, dtype == tl.float32)
    p = tl.where(visible_keys(offs_m, offs_n, num_keys, IS_CAUSAL), p, 0.0)
    ds = (p * (inner(do, v, BLOCK_M, TAIL) - delta[:, None])).to(dtype)  # [BM, TAIL]
    return add_product(acc_dq, ds, k), p.to(dtype), ds


@triton.jit
def _key_bwd_kernel(
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, H, D]
    v_ptr,  # [B, N, H, D]
    grad_ptr,  # [B, M, H, D]
    q_tiles, q_rest,  # descriptors of blocks [1, BM, 1, part] of q for each part of D, or None
    grad_tiles, grad_rest,  # descriptors of blocks of the gradient, like those of q
    stats_ptr,  # [B, H, 2, ROWS] fp32: shift and delta
    seqlens_ptr,  # [B] int32
    dk_ptr,  # [B, N, H, D]
    dv_ptr,  # [B, N, H, D]
    dv_sum_ptr,  # [B, blocks of N, H, D] fp32, the sum of dv over the values of each block
    rest_ptr,  # [B, H, parts, 2, N % BN, D] fp32, dk and dv of the last keys in parts, or None
    M, N, H, ROWS,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gn, stride_gh, stride_gd,
    stride_dkb, stride_dkn,
    num_parts, qk_scale, scale,
    HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    MULTIPLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_SEQLENS: tl.constexpr, HAS_SUMS: tl.constexpr,
    IS_HELD: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BLOCK_N keys and values, which one program owns, from transposed scores.

    Keys past the end of the sequence get gradients of zero. The gradients of a head are contiguous, and dv has the
    strides of dk.
    """
    num_blocks = tl.cdiv(N, BLOCK_N)
    num_n = num_blocks if rest_ptr is None else num_blocks - 1
    pid_bh, pid = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    b, h = pid_bh // H, pid_bh % H
    dtype = q_ptr.dtype.element_ty
    q_ptr = head_of(q_ptr, b, h, stride_qb, stride_qh, MULTIPLE)
    k_ptr = head_of(k_ptr, b, h, stride_kb, stride_kh, MULTIPLE)
    v_ptr = head_of(v_ptr, b, h, stride_vb, stride_vh, MULTIPLE)
    grad_ptr = head_of(grad_ptr, b, h, stride_gb, stride_gh, MULTIPLE)
    stats_ptr += pid_bh.to(tl.int64) * 2 * ROWS
    num_keys = N
    if HAS_SEQLENS:
        num_keys = tl.minimum(N, tl.load(seqlens_ptr + b))
    if rest_ptr is not None:  # noqa: SIM102  (the compiler decides this condition, the next one is the program's)
        if pid == num_n - 1:
            # The last program of a head also adds up and stores the gradients of the keys that no program owns.
            offs_r = num_n * BLOCK_N + tl.arange(0, MOST_REST)
            dk, dv = sum_of_rest(rest_ptr, pid_bh, num_parts, N % BLOCK_N, HEAD_DIM, D_PARTS)
            rest_dk_ptr = head_of(dk_ptr, b, h, stride_dkb, HEAD_DIM, MULTIPLE)
            rest_dv_ptr = head_of(dv_ptr, b, h, stride_dkb, HEAD_DIM, MULTIPLE)
            store_rows(rest_dk_ptr, dk, 1.0, offs_r, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
            store_rows(rest_dv_ptr, dv, 1.0, offs_r, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
            if HAS_SUMS:
                rest_sum_ptr = dv_sum_ptr + ((b.to(tl.int64) * num_blocks + num_n) * H + h) * HEAD_DIM
                store_row_sums(rest_sum_ptr, dv, 1.0, HEAD_DIM, D_PARTS)
    start_n = pid * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, num_keys, stride_kn, stride_kd, HEAD_DIM, D_PARTS)  # [BN, D]
    v = load_rows(v_ptr, offs_n, num_keys, stride_vn, stride_vd, HEAD_DIM, D_PARTS)  # [BN, D]
    acc_dk = zero_rows(BLOCK_N, D_PARTS)
    acc_dv = zero_rows(BLOCK_N, D_PARTS)
    first = start_n // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    whole = M
    if TAIL > 0:
        whole = M // BLOCK_M * BLOCK_M
    for start_m in range(first, whole, BLOCK_M):
        q = walked_rows(
            q_tiles, q_rest, q_ptr, b, h, start_m, M,
            stride_qn, stride_qd, BLOCK_M, HEAD_DIM, D_PARTS,
        )  # fmt: skip
        do = walked_rows(
            grad_tiles, grad_rest, grad_ptr, b, h, start_m, M,
            stride_gn, stride_gd, BLOCK_M, HEAD_DIM, D_PARTS,
        )  # fmt: skip
        q, do = as_rows(q, BLOCK_M, D_PARTS), as_rows(do, BLOCK_M, D_PARTS)
        acc_dk, acc_dv = _key_step(
            acc_dk, acc_dv, k, v, q, do, stats_ptr, offs_n, start_m, ROWS, qk_scale,
            BLOCK_N, BLOCK_M, IS_CAUSAL, dtype,
        )  # fmt: skip
        if IS_HELD:
            acc_dv = held(acc_dv)
    if TAIL > 0 and whole < M:
        offs_m = whole + tl.arange(0, TAIL)
        q = load_rows(q_ptr, offs_m, M, stride_qn, stride_qd, HEAD_DIM, D_PARTS)  # [TAIL, D]
        do = load_rows(grad_ptr, offs_m, M, stride_gn, stride_gd, HEAD_DIM, D_PARTS)  # [TAIL, D]
        acc_dk, acc_dv = _key_step(
            acc_dk, acc_dv, k, v, q, do, stats_ptr, offs_n, whole, ROWS, qk_scale,
            BLOCK_N, TAIL, IS_CAUSAL, dtype,
        )  # fmt: skip
    # A key past the end has score 0, and 2^(0 - lse) can be infinite. This spoils only the key's own rows, which become
    # zero here.
    exists = (offs_n < num_keys)[:, None]
    acc_dk, acc_dv = masked_rows(acc_dk, exists), masked_rows(acc_dv, exists)
    dk_ptr = head_of(dk_ptr, b, h, stride_dkb, HEAD_DIM, MULTIPLE)
    dv_ptr = head_of(dv_ptr, b, h, stride_dkb, HEAD_DIM, MULTIPLE)
    store_rows(dk_ptr, acc_dk, scale, offs_n, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
    store_rows(dv_ptr, acc_dv, 1.0, offs_n, N, stride_dkn, 1, HEAD_DIM, D_PARTS)
    if HAS_SUMS:
        dv_sum_ptr += ((b.to(tl.int64) * num_blocks + pid) * H + h) * HEAD_DIM
        store_row_sums(dv_sum_ptr, acc_dv, 1.0, HEAD_DIM, D_PARTS)


@triton.jit
def _key_step(
    acc_dk, acc_dv, k, v,  # [BN, D]
    q, do,  # [BM, D]
    stats_ptr, offs_n, start_m, ROWS, qk_scale,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, IS_CAUSAL: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Add the contributions of BLOCK_M queries to the gradients of the keys and values that a program owns."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    shift = tl.load(stats_ptr + offs_m)
    delta = tl.load(stats_ptr + ROWS + offs_m)
    p_t = probabilities(inner(k, q, BLOCK_N, BLOCK_M), shift[None, :], qk_scale, dtype == tl.float32)  # [BN, BM]
    if IS_CAUSAL:
        p_t = tl.where(offs_n[:, None] <= offs_m[None, :], p_t, 0.0)
    acc_dv = add_product(acc_dv, p_t.to(dtype), do)
    dp_t = inner(v, do, BLOCK_N, BLOCK_M)  # [BN, BM]
    ds_t = (p_t * (dp_t - delta[None, :])).to(dtype)
    return add_product(acc_dk, ds_t, q), acc_dv

"""The Triton kernels of the text embedding; ``op`` has the equations."""

import triton
import triton.language as tl


@triton.jit
def _text_embed_fwd_kernel(
    text_ptr,  # [B, L]
    table_ptr,  # [V, N]
    pos_ptr,  # [L, N]
    out_ptr,  # [B, L, N] contiguous
    ids_ptr,  # [B, L] int32 contiguous; -1 where an id is no row of the table
    B, L, N, V,
    stride_tb, stride_tl, stride_ev, stride_en, stride_pl, stride_pn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Embed the ids at BLOCK_M positions of several texts, in BLOCK_N columns.

    A program loads its rows of the position table once, for all its texts.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.cdiv(L, BLOCK_M) * num_n
    tile = tl.program_id(0) % num_tiles
    offs_l = (tile // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_l, mask_n = offs_l < L, offs_n < N
    mask = mask_l[:, None] & mask_n[None, :]
    pos_tile = pos_ptr + offs_l[:, None] * stride_pl + offs_n[None, :] * stride_pn
    pos = tl.load(pos_tile, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
    first, step = (tl.program_id(0) // num_tiles).to(tl.int64), tl.num_programs(0) // num_tiles
    for text in tl.range(first, B, step, num_stages=NUM_STAGES):
        ids = tl.load(text_ptr + text * stride_tb + offs_l * stride_tl, mask=mask_l, other=-1).to(tl.int64)  # [BM]
        in_table = (ids >= 0) & (ids < V)  # no row is read for an id outside the table
        rows = table_ptr + ids[:, None] * stride_ev + offs_n[None, :] * stride_en
        x = tl.load(rows, mask=in_table[:, None] & mask_n[None, :], other=0.0).to(tl.float32) + pos  # [BM, BN]
        tokens = (text * L + offs_l)[:, None]
        tl.store(out_ptr + tokens * N + offs_n[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)
        if tile % num_n == 0:
            tl.store(ids_ptr + text * L + offs_l, tl.where(in_table, ids, -1).to(tl.int32), mask=mask_l)


@triton.jit
def _text_embed_packed_kernel(
    text_ptr,  # [T]
    first_ptr,  # [T] int32, the first token of each token's sequence; T for a token that belongs to none
    table_ptr,  # [V, N]
    pos_ptr,  # [L, N]
    out_ptr,  # [T, N] contiguous
    ids_ptr,  # [2, T] int32; the ids and positions, -1 where one is no row of its table or the token has no sequence
    T, L, N, V,
    stride_t, stride_ev, stride_en, stride_pl, stride_pn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Embed BLOCK_M tokens of packed texts, in BLOCK_N columns. A token without a sequence becomes zeros."""
    num_n = tl.cdiv(N, BLOCK_N)
    offs_t = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_t, mask_n = offs_t < T, offs_n < N
    ids = tl.load(text_ptr + offs_t * stride_t, mask=mask_t, other=-1).to(tl.int64)  # [BM]
    positions = offs_t - tl.load(first_ptr + offs_t, mask=mask_t, other=0)  # [BM]
    has_position = (positions >= 0) & (positions < L)
    in_table = (ids >= 0) & (ids < V) & has_position  # no row is read for an id outside the table
    rows = table_ptr + ids[:, None] * stride_ev + offs_n[None, :] * stride_en
    x = tl.load(rows, mask=in_table[:, None] & mask_n[None, :], other=0.0).to(tl.float32)  # [BM, BN]
    rows = pos_ptr + positions[:, None] * stride_pl + offs_n[None, :] * stride_pn
    x += tl.load(rows, mask=has_position[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    mask = mask_t[:, None] & mask_n[None, :]
    tl.store(out_ptr + offs_t[:, None] * N + offs_n[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(0) % num_n == 0:
        tl.store(ids_ptr + offs_t, tl.where(in_table, ids, -1).to(tl.int32), mask=mask_t)
        tl.store(ids_ptr + T + offs_t, tl.where(has_position, positions, -1).to(tl.int32), mask=mask_t)


@triton.jit
def clear_rows(
    ids_ptr,  # [M] int32, sorted
    out_ptr,  # [V, N] contiguous
    block, M, N, V, num_steps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write zeros to the rows of the table's gradient in block ``block`` that no id selects.

    A binary search among M ids takes ``num_steps`` steps.
    """
    offs_v = block * ROWS + tl.arange(0, ROWS)
    mask_v = offs_v < V
    # low becomes the number of ids that are less than the index of each row.
    low = tl.zeros((ROWS,), tl.int32)
    high = low + M
    for _ in range(num_steps):
        middle = low + (high - low) // 2
        is_below = tl.load(ids_ptr + middle, mask=mask_v & (middle < M), other=V) < offs_v
        low, high = tl.where(is_below, middle + 1, low), tl.where(is_below, high, middle)
    is_named = tl.load(ids_ptr + low, mask=mask_v & (low < M), other=V) == offs_v
    rows = out_ptr + offs_v.to(tl.int64)[:, None] * N
    zeros = tl.zeros((ROWS, BLOCK_N), out_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        tl.store(rows + offs_n[None, :], zeros, mask=(mask_v & ~is_named)[:, None] & (offs_n < N)[None, :])


@triton.jit
def sum_segments(
    rows_ptr, order_ptr, ids_ptr, out_ptr, sums_ptr, sum_ids_ptr, pid, M, N, stride_m, stride_n,
    HAS_ORDER: tl.constexpr, IS_LAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of equal ids (a segment) in CHUNK rows x BLOCK_N columns.

    The first and the last segment may be parts of longer ones.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    chunk = (pid // num_n).to(tl.int64)
    block_n = pid % num_n
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    current = tl.full((), -1, tl.int32)  # id of the open segment
    first = tl.full((), -1, tl.int32)  # id of the first segment, -1 until it is closed
    acc = tl.zeros((BLOCK_N,), tl.float32)
    acc_first = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, M), num_stages=NUM_STAGES):
        token = tl.load(ids_ptr + i)
        row = tl.load(order_ptr + i) if HAS_ORDER else i
        x = tl.load(rows_ptr + row * stride_m + offs_n * stride_n, mask=offs_n < N, other=0.0).to(tl.float32)  # [BN]
        opens = (token >= 0) & (token != current)
        closes = opens & (current >= 0)
        is_complete = closes
        if not IS_LAST:
            is_complete = closes & (first >= 0)
            is_first = closes & (first < 0)
            acc_first = tl.where(is_first, acc, acc_first)
            first = tl.where(is_first, current, first)
        # A mask in place of a branch lets the loads of later rows run ahead of the store.
        of_current = out_ptr + current.to(tl.int64) * N + offs_n
        tl.store(of_current, acc.to(out_ptr.dtype.element_ty), mask=offs_n < tl.where(is_complete, N, 0))
        # A row that belongs to no id may hold NaN, and must not be added.
        acc = tl.where(opens, 0.0, acc) + tl.where(token >= 0, x, 0.0)
        current = tl.where(opens, token, current)
    mask = offs_n < tl.where(current >= 0, N, 0)
    if IS_LAST:
        tl.store(out_ptr + current.to(tl.int64) * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        is_only = first < 0  # the chunk has one segment or none, so the second of its two sums is marked as empty
        places = sums_ptr + 2 * chunk * N + offs_n
        tl.store(places, tl.where(is_only, acc, acc_first), mask=mask)
        tl.store(places + N, acc, mask=offs_n < tl.where(is_only, 0, N))
        if block_n == 0:
            tl.store(sum_ids_ptr + 2 * chunk, tl.where(is_only, current, first))
            tl.store(sum_ids_ptr + 2 * chunk + 1, tl.where(is_only, -1, current))


@triton.jit
def _segment_sums_kernel(
    rows_ptr,  # [M, N]
    order_ptr,  # [M] int64, the row of each id; if HAS_ORDER is false, rows lie in the order of the ids
    ids_ptr,  # [M] int32, equal ids side by side; -1 marks a row that belongs to no id
    out_ptr,  # [V, N] contiguous
    sums_ptr,  # [2 chunks, N] fp32
    sum_ids_ptr,  # [2 chunks] int32
    M, N, V, num_sums, num_steps, stride_m, stride_n,
    HAS_ORDER: tl.constexpr, IS_LAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, CLEAR_ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the token embeddings' gradients by id in the first ``num_sums`` programs.

    The other programs, which only the first launch has, write zeros to the rows of the table's gradient that no id
    selects.
    """
    pid = tl.program_id(0)
    if pid < num_sums:
        sum_segments(
            rows_ptr, order_ptr, ids_ptr, out_ptr, sums_ptr, sum_ids_ptr, pid, M, N, stride_m, stride_n,
            HAS_ORDER, IS_LAST, CHUNK, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
    elif HAS_ORDER:
        clear_rows(ids_ptr, out_ptr, pid - num_sums, M, N, V, num_steps, CLEAR_ROWS, BLOCK_N)

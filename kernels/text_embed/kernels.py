"""The Triton kernels of the text embedding; ``op`` has the equations."""

import triton
import triton.language as tl


@triton.jit
def _text_embed_fwd_kernel(
    text_ptr,  # [B, L]
    table_ptr,  # [V, N]
    pos_ptr,  # [L, N]
    out_ptr,  # [B, L, N] contiguous
    B, L, N, V,
    stride_tb, stride_tl, stride_ev, stride_en, stride_pl, stride_pn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Each program owns BLOCK_M positions x BLOCK_N columns and walks over texts, so it loads its positions once."""
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
        in_table = (ids >= 0) & (ids < V)  # an id outside the table must not read outside it
        rows = table_ptr + ids[:, None] * stride_ev + offs_n[None, :] * stride_en
        x = tl.load(rows, mask=in_table[:, None] & mask_n[None, :], other=0.0).to(tl.float32) + pos  # [BM, BN]
        tokens = (text * L + offs_l)[:, None]
        tl.store(out_ptr + tokens * N + offs_n[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _segment_sums_kernel(
    rows_ptr,  # [M, N]
    order_ptr,  # [M] int64, the row of each id; if HAS_ORDER is false, rows lie in the order of the ids
    ids_ptr,  # [M] int32, equal ids side by side; -1 marks a row that belongs to no id
    out_ptr,  # [V, N] contiguous
    sums_ptr,  # [2 chunks, N] fp32
    sum_ids_ptr,  # [2 chunks] int32
    M, N, stride_m, stride_n,
    HAS_ORDER: tl.constexpr, IS_LAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Each program sums the segments in CHUNK rows x BLOCK_N columns. Those at the ends may be parts of longer ones."""
    num_n = tl.cdiv(N, BLOCK_N)
    chunk = (tl.program_id(0) // num_n).to(tl.int64)
    block_n = tl.program_id(0) % num_n
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    current = tl.full((), -1, tl.int32)  # id of the open segment
    first = tl.full((), -1, tl.int32)  # id of the first segment, -1 until it is closed
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, M), num_stages=NUM_STAGES):
        token = tl.load(ids_ptr + i)
        row = tl.load(order_ptr + i) if HAS_ORDER else i
        x = tl.load(
            rows_ptr + row * stride_m + offs_n * stride_n, mask=offs_n < tl.where(token >= 0, N, 0), other=0.0
        )  # [BN]
        opens = (token >= 0) & (token != current)
        closes = opens & (current >= 0)
        # Masks in place of branches let the loads of later rows run ahead of the stores.
        is_complete = closes
        if not IS_LAST:
            is_complete = closes & (first >= 0)
            is_first = closes & (first < 0)
            tl.store(sums_ptr + 2 * chunk * N + offs_n, acc, mask=offs_n < tl.where(is_first, N, 0))
            first = tl.where(is_first, current, first)
        of_current = out_ptr + current.to(tl.int64) * N + offs_n
        tl.store(of_current, acc.to(out_ptr.dtype.element_ty), mask=offs_n < tl.where(is_complete, N, 0))
        acc = tl.where(opens, 0.0, acc) + x.to(tl.float32)
        current = tl.where(opens, token, current)
    mask = offs_n < tl.where(current >= 0, N, 0)
    if IS_LAST:
        tl.store(out_ptr + current.to(tl.int64) * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        is_only = first < 0  # the chunk has one segment or none, so its second place stays empty
        place = 2 * chunk + tl.where(is_only, 0, 1)
        tl.store(sums_ptr + place * N + offs_n, acc, mask=mask)
        if block_n == 0:
            tl.store(sum_ids_ptr + 2 * chunk, tl.where(is_only, current, first))
            tl.store(sum_ids_ptr + 2 * chunk + 1, tl.where(is_only, -1, current))

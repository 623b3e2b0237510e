"""Tiles of rows of one head. A head dimension that is no power of two is held in parts, 80 as 64 + 16.

A tile of rows is a tuple of [rows, part]. Padding 80 to 128 instead would cost 1.6 times the products and the shared
memory.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def size_of(parts, i):
    """Return the size of part ``i``."""
    return parts[i]


@triton.constexpr_function
def start_of(parts, i):
    """Return where part ``i`` begins."""
    return sum(parts[:i])


@triton.jit
def offs_of(PARTS: tl.constexpr, i: tl.constexpr):
    """Return the offsets that part ``i`` covers."""
    return start_of(PARTS, i) + tl.arange(0, size_of(PARTS, i))


@triton.jit
def load_rows(
    ptr, offs_r, num_rows, stride_r, stride_d, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr
):  # fmt: skip
    """Load rows ``offs_r`` of a head [num_rows, HEAD_DIM], with zeros past its end."""
    parts = ()
    for i in tl.static_range(len(D_PARTS)):
        offs_d = offs_of(D_PARTS, i)
        mask = (offs_r < num_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
        offs = offs_r.to(tl.int64)[:, None] * stride_r + offs_d.to(tl.int64)[None, :] * stride_d
        parts = parts + (tl.load(ptr + offs, mask=mask, other=0.0),)
    return parts


@triton.jit
def store_rows(
    ptr, parts, factor, offs_r, num_rows, stride_r, stride_d, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr
):  # fmt: skip
    """Store ``factor`` times a tile. ``factor`` is one number, or one for each row: [rows, 1]."""
    for i in tl.static_range(len(D_PARTS)):
        offs_d = offs_of(D_PARTS, i)
        mask = (offs_r < num_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
        offs = offs_r.to(tl.int64)[:, None] * stride_r + offs_d.to(tl.int64)[None, :] * stride_d
        tl.store(ptr + offs, (parts[i] * factor).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_row_sums(ptr, parts, factor, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr):
    """Store ``factor`` times the sum over the rows of a tile: HEAD_DIM numbers."""
    for i in tl.static_range(len(D_PARTS)):
        offs_d = offs_of(D_PARTS, i)
        tl.store(ptr + offs_d, tl.sum(parts[i], 0) * factor, mask=offs_d < HEAD_DIM)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D_PARTS: tl.constexpr):
    """Return an accumulator of rows: zeros in float32."""
    parts = ()
    for i in tl.static_range(len(D_PARTS)):
        parts = parts + (tl.zeros((ROWS, size_of(D_PARTS, i)), tl.float32),)
    return parts


@triton.jit
def zero_columns(COLS: tl.constexpr, D_PARTS: tl.constexpr):
    """Return an accumulator of transposed rows, which is a tuple of [part, COLS]."""
    parts = ()
    for i in tl.static_range(len(D_PARTS)):
        parts = parts + (tl.zeros((size_of(D_PARTS, i), COLS), tl.float32),)
    return parts


@triton.jit
def inner(a, b, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return a b^T [ROWS, COLS], the product of each row of ``a`` with each row of ``b``."""
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for i in tl.static_range(len(a)):
        acc = tl.dot(a[i], b[i].T, acc, input_precision="ieee")
    return acc


@triton.jit
def probabilities(scores, lse, qk_scale, IS_EXACT: tl.constexpr):
    """Return 2^(qk_scale (scores - lse)). ``lse`` has the unit of the scores, and broadcasts against them."""
    if IS_EXACT:
        # scaled first, scores of thousands would lose the digits in which they differ
        return tl.exp2((scores - lse) * qk_scale)
    # this is one operation less, and the probabilities are rounded to 16 bits afterwards
    return tl.exp2(scores * qk_scale - lse * qk_scale)


@triton.jit
def visible_keys(offs_m, offs_n, num_keys, IS_CAUSAL: tl.constexpr):
    """Return which queries [BM] see which keys [BN]: [BM, BN], or [1, BN] where all queries see the same."""
    visible = (offs_n < num_keys)[None, :]
    if IS_CAUSAL:
        visible = visible & (offs_n[None, :] <= offs_m[:, None])
    return visible


@triton.jit
def transposed_probabilities(
    k, q, lse, offs_n, offs_m, num_keys, qk_scale,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """Return the probabilities of keys [BN] for queries [BM], transposed: [BN, BM]."""
    p_t = probabilities(inner(k, q, BLOCK_N, BLOCK_M), lse[None, :], qk_scale, IS_EXACT)
    visible = (offs_n < num_keys)[:, None]
    if IS_CAUSAL:
        visible = visible & (offs_n[:, None] <= offs_m[None, :])
    # the mask is applied here, since a key that is not there has score 0, and 2^(0 - lse) can be infinite
    return tl.where(visible, p_t, 0.0)


@triton.jit
def add_product(acc, weights, rows):
    """Return acc + weights rows."""
    parts = ()
    for i in tl.static_range(len(acc)):
        parts = parts + (tl.dot(weights, rows[i], acc[i], input_precision="ieee"),)
    return parts


@triton.jit
def add_transposed_product(acc, rows, weights):
    """Return acc + rows^T weights."""
    parts = ()
    for i in tl.static_range(len(acc)):
        parts = parts + (tl.dot(rows[i].T, weights, acc[i], input_precision="ieee"),)
    return parts


@triton.jit
def scaled_rows(parts, factor):
    """Return ``factor`` [rows, 1] times a tile."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def transposed(parts):
    """Return the rows of an accumulator of :func:`zero_columns`."""
    rows = ()
    for i in tl.static_range(len(parts)):
        rows = rows + (parts[i].T,)
    return rows


@triton.jit
def row_dot(a, b):
    """Return the product of each row of ``a`` with the same row of ``b``, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total

"""Rows of one head as tiles: a head dimension that is no power of two is held in parts, 80 as 64 + 16.

A tile of rows is a tuple of [rows, part]. Padding 80 to 128 instead would cost 1.6 times the products and the shared
memory.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def size_of(parts, i):
    """Of part ``i``."""
    return parts[i]


@triton.constexpr_function
def start_of(parts, i):
    """Where part ``i`` begins."""
    return sum(parts[:i])


@triton.jit
def offs_of(PARTS: tl.constexpr, i: tl.constexpr):
    """Offsets that part ``i`` covers."""
    return start_of(PARTS, i) + tl.arange(0, size_of(PARTS, i))


@triton.jit
def load_rows(
    ptr, offs_r, num_rows, stride_r, stride_d, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr
):  # fmt: skip
    """Rows ``offs_r`` of a head [num_rows, HEAD_DIM]; zeros past its end."""
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
    """Store ``factor`` times a tile; ``factor`` is a number or has one for each row, [rows, 1]."""
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
    """An accumulator of rows."""
    parts = ()
    for i in tl.static_range(len(D_PARTS)):
        parts = parts + (tl.zeros((ROWS, size_of(D_PARTS, i)), tl.float32),)
    return parts


@triton.jit
def zero_columns(COLS: tl.constexpr, D_PARTS: tl.constexpr):
    """An accumulator of rows, transposed: a tuple of [part, COLS]."""
    parts = ()
    for i in tl.static_range(len(D_PARTS)):
        parts = parts + (tl.zeros((size_of(D_PARTS, i), COLS), tl.float32),)
    return parts


@triton.jit
def inner(a, b, ROWS: tl.constexpr, COLS: tl.constexpr):
    """a b^T: products of all rows [ROWS] of ``a`` with all rows [COLS] of ``b``."""
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for i in tl.static_range(len(a)):
        acc = tl.dot(a[i], b[i].T, acc, input_precision="ieee")
    return acc


@triton.jit
def probabilities(scores, lse, qk_scale, IS_EXACT: tl.constexpr):
    """2^(qk_scale (scores - lse)), for an ``lse`` in units of the scores that broadcasts against them."""
    if IS_EXACT:
        # the difference first: scores of thousands would lose what tells them apart
        return tl.exp2((scores - lse) * qk_scale)
    # one operation less; probabilities are rounded to 16 bits afterwards
    return tl.exp2(scores * qk_scale - lse * qk_scale)


@triton.jit
def add_product(acc, weights, rows):
    """acc + weights rows."""
    parts = ()
    for i in tl.static_range(len(acc)):
        parts = parts + (tl.dot(weights, rows[i], acc[i], input_precision="ieee"),)
    return parts


@triton.jit
def add_transposed_product(acc, rows, weights):
    """acc + rows^T weights."""
    parts = ()
    for i in tl.static_range(len(acc)):
        parts = parts + (tl.dot(rows[i].T, weights, acc[i], input_precision="ieee"),)
    return parts


@triton.jit
def scaled_rows(parts, factor):
    """``factor`` [rows, 1] times a tile."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def transposed(parts):
    """Rows of an accumulator made by :func:`add_transposed_product`."""
    rows = ()
    for i in tl.static_range(len(parts)):
        rows = rows + (parts[i].T,)
    return rows


@triton.jit
def row_dot(a, b):
    """Product of each row of ``a`` with the same row of ``b``, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total

"""Triton functions on tiles of rows of one attention head, which all attention kernels share.

A head dimension that is no power of two is held in two parts where possible, 80 as 64 + 16 (``launches.head_parts``),
so a tile of rows is a tuple of tiles [rows, part]. Padding 80 to 128 instead would take 1.6 times the products and the
shared memory.
"""

import triton
import triton.language as tl

from ..tiles import online_softmax_step

# The most keys beyond whole blocks whose gradients the first phase of the looped kernels writes in parts.
MOST_REST: tl.constexpr = tl.constexpr(8)


@triton.constexpr_function
def size_of(parts, i):
    """Return the size of part ``i`` of a head dimension or of a sequence."""
    return parts[i]


@triton.constexpr_function
def start_of(parts, i):
    """Return the offset at which part ``i`` of a head dimension or of a sequence begins."""
    return sum(parts[:i])


@triton.jit
def offs_of(PARTS: tl.constexpr, i: tl.constexpr):
    """Return the offsets in part ``i`` of a head dimension or of a sequence."""
    return start_of(PARTS, i) + tl.arange(0, size_of(PARTS, i))


@triton.jit
def head_of(ptr, b, h, stride_b, stride_h, MULTIPLE: tl.constexpr):
    """Return the address of head ``h`` of image ``b``. Heads begin at multiples of MULTIPLE elements.

    The compiler knows the alignment of strides that are multiples of 16. The alignment of other strides, such as 88 for
    a head of 88 elements, must be stated, or the compiler would load one element at a time.
    """
    return ptr + tl.multiple_of(b.to(tl.int64) * stride_b + h * stride_h, MULTIPLE)


@triton.jit
def load_rows(
    ptr, offs_r, num_rows, stride_r, stride_d, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr
):  # fmt: skip
    """Load rows ``offs_r`` of an attention head [num_rows, HEAD_DIM], with zeros past its end."""
    parts = ()
    for i in tl.static_range(len(D_PARTS)):
        offs_d = offs_of(D_PARTS, i)
        mask = (offs_r < num_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
        offs = offs_r.to(tl.int64)[:, None] * stride_r + offs_d.to(tl.int64)[None, :] * stride_d
        parts = parts + (tl.load(ptr + offs, mask=mask, other=0.0),)
    return parts


@triton.jit
def walked_rows(
    tiles, rest, ptr, b, h, start, num_rows, stride_r, stride_d,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr,
):  # fmt: skip
    """Load ROWS rows from ``start`` on of head ``h`` of image ``b``; :func:`as_rows` makes tiles of the result.

    ``tiles`` and ``rest`` are descriptors for the first and the second part of the head dimension. If they are None,
    the head is loaded from ``ptr``.
    """
    if tiles is None:
        parts = load_rows(ptr, start + tl.arange(0, ROWS), num_rows, stride_r, stride_d, HEAD_DIM, D_PARTS)
    else:
        parts = (tiles.load([b, start, h, 0]),)
        if rest is not None:
            parts = parts + (rest.load([b, start, h, start_of(D_PARTS, 1)]),)
    return parts


@triton.jit
def as_rows(parts, ROWS: tl.constexpr, D_PARTS: tl.constexpr):
    """Return the rows that :func:`walked_rows` has loaded, as a tile of an attention head in parts [ROWS, part].

    Loads through descriptors that follow each other, with no operation on their results in between, wait at one barrier
    together. So a kernel calls this function after all loads of a step.
    """
    rows = ()
    for i in tl.static_range(len(parts)):
        rows = rows + (parts[i].reshape(ROWS, size_of(D_PARTS, i)),)
    return rows


@triton.jit
def store_rows(
    ptr, parts, factor, offs_r, num_rows, stride_r, stride_d, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr
):  # fmt: skip
    """Store ``factor``, which is a number or [rows, 1], times a tile of an attention head."""
    for i in tl.static_range(len(D_PARTS)):
        offs_d = offs_of(D_PARTS, i)
        mask = (offs_r < num_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
        offs = offs_r.to(tl.int64)[:, None] * stride_r + offs_d.to(tl.int64)[None, :] * stride_d
        tl.store(ptr + offs, (parts[i] * factor).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_row_sums(ptr, parts, factor, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr):
    """Store ``factor`` times the sum over the rows of a tile of an attention head: HEAD_DIM numbers."""
    store_sums(ptr, row_sums(zero_sums(D_PARTS), parts), factor, HEAD_DIM, D_PARTS)


@triton.jit
def zero_sums(D_PARTS: tl.constexpr):
    """Return zeros for sums over the rows of an attention head, which are a tuple of [part]."""
    sums = ()
    for i in tl.static_range(len(D_PARTS)):
        sums = sums + (tl.zeros((size_of(D_PARTS, i),), tl.float32),)
    return sums


@triton.jit
def row_sums(sums, parts):
    """Return ``sums`` plus the sums over the rows of a tile of an attention head."""
    added = ()
    for i in tl.static_range(len(parts)):
        added = added + (sums[i] + tl.sum(parts[i], 0),)
    return added


@triton.jit
def store_sums(ptr, sums, factor, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr):
    """Store ``factor`` times sums over the rows of an attention head: HEAD_DIM numbers."""
    for i in tl.static_range(len(D_PARTS)):
        offs_d = offs_of(D_PARTS, i)
        tl.store(ptr + offs_d, sums[i] * factor, mask=offs_d < HEAD_DIM)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D_PARTS: tl.constexpr):
    """Return an accumulator for rows of an attention head, which is a tuple of [ROWS, part]: zeros in float32."""
    parts = ()
    for i in tl.static_range(len(D_PARTS)):
        parts = parts + (tl.zeros((ROWS, size_of(D_PARTS, i)), tl.float32),)
    return parts


@triton.jit
def held(parts):
    """Return accumulators of wgmma after waiting for their products to end.

    An empty instruction reads them, so Triton waits for the products here. A product that still ran while the next step
    begins would take registers of its own.
    """
    kept = ()
    for i in tl.static_range(len(parts)):
        kept = kept + (tl.inline_asm_elementwise("", "=f,0", [parts[i]], dtype=tl.float32, is_pure=True, pack=1),)
    return kept


@triton.jit
def zero_columns(COLS: tl.constexpr, D_PARTS: tl.constexpr):
    """Return an accumulator for transposed rows of an attention head, which is a tuple of [part, COLS]."""
    parts = ()
    for i in tl.static_range(len(D_PARTS)):
        parts = parts + (tl.zeros((size_of(D_PARTS, i), COLS), tl.float32),)
    return parts


@triton.jit
def inner(a, b, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return a b^T [ROWS, COLS], the products of the rows of two tiles of attention heads in parts."""
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for i in tl.static_range(len(a)):
        acc = tl.dot(a[i], b[i].T, acc, input_precision="ieee")
    return acc


@triton.jit
def shift_of(lse, qk_scale, IS_EXACT: tl.constexpr):
    """Return the ``shift`` of :func:`probabilities` for a log-sum-exp in units of q . k.

    If probabilities are rounded to 16 bits afterwards, the log-sum-exp is scaled here, which saves an operation for
    each probability. If IS_EXACT, it is not scaled: scores of several thousand would lose the digits in which they
    differ.
    """
    return lse if IS_EXACT else lse * qk_scale


@triton.jit
def probabilities(scores, shift, qk_scale, IS_EXACT: tl.constexpr):
    """Return 2^(qk_scale (scores - lse)), where :func:`shift_of` has made ``shift``, which broadcasts to the scores,
    from lse.
    """
    return tl.exp2((scores - shift) * qk_scale) if IS_EXACT else tl.exp2(scores * qk_scale - shift)


@triton.jit
def softmax_step(scores, row_max, row_sum, qk_scale, IS_EXACT: tl.constexpr):
    """Fold scores [M, N] of attention into a running softmax; if IS_EXACT, as :func:`online_softmax_step` does.

    Otherwise the exponent takes one operation, a multiply-add: ``row_max`` has been scaled and rounded before. The
    factor between two blocks is computed from these rounded values too, so their rounding error is the same for all
    scores of the row, and cancels when the row is divided by its sum.
    """
    if IS_EXACT:
        p, decay, new_max, new_sum = online_softmax_step(scores, row_max, row_sum, qk_scale)
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
        # While all scores of a row are -inf, new_max is -inf, and -inf - (-inf) is NaN, so 0 is subtracted there.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(row_max - pivot)
        p = tl.exp2(scores * qk_scale - pivot[:, None])
        new_sum = row_sum * decay + tl.sum(p, 1)
    return p, decay, new_max, new_sum


@triton.jit
def log_sum_exp(row_max, row_sum, qk_scale, IS_EXACT: tl.constexpr):
    """Return the log-sum-exp of rows of scores in units of q . k, from the state of :func:`softmax_step`; inf for a row
    in which no key is visible.
    """
    lse = row_max + tl.log2(row_sum) / qk_scale if IS_EXACT else (row_max + tl.log2(row_sum)) / qk_scale
    return tl.where(row_sum == 0.0, float("inf"), lse)


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
    shift = shift_of(lse, qk_scale, IS_EXACT)
    p_t = probabilities(inner(k, q, BLOCK_N, BLOCK_M), shift[None, :], qk_scale, IS_EXACT)
    visible = (offs_n < num_keys)[:, None]
    if IS_CAUSAL:
        visible = visible & (offs_n[:, None] <= offs_m[None, :])
    # The mask is applied here, because a key past the end has score 0, and 2^(0 - lse) can be infinite.
    return tl.where(visible, p_t, 0.0)


@triton.jit
def add_product(acc, weights, rows):
    """Return acc + weights @ rows, where ``rows`` is a tile of an attention head in parts."""
    parts = ()
    for i in tl.static_range(len(acc)):
        parts = parts + (tl.dot(weights, rows[i], acc[i], input_precision="ieee"),)
    return parts


@triton.jit
def add_transposed_product(acc, rows, weights):
    """Return acc + rows^T @ weights, where ``rows`` is a tile of an attention head in parts."""
    parts = ()
    for i in tl.static_range(len(acc)):
        parts = parts + (tl.dot(rows[i].T, weights, acc[i], input_precision="ieee"),)
    return parts


@triton.jit
def scaled_rows(parts, factor):
    """Return ``factor`` [rows, 1] times a tile of an attention head in parts."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def masked_rows(parts, mask):
    """Return a tile of an attention head in parts, with zeros in the rows where ``mask`` [rows, 1] is false."""
    masked = ()
    for i in tl.static_range(len(parts)):
        masked = masked + (tl.where(mask, parts[i], 0.0),)
    return masked


@triton.jit
def transposed(parts):
    """Return a tile of rows from an accumulator of transposed rows, as :func:`zero_columns` makes it."""
    rows = ()
    for i in tl.static_range(len(parts)):
        rows = rows + (parts[i].T,)
    return rows


@triton.jit
def row_dot(a, b):
    """Return the dot product of each row of ``a`` with the same row of ``b``, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def added(a, b):
    """Return the sum of two tiles of an attention head, each of which is a tuple of parts."""
    parts = ()
    for i in tl.static_range(len(a)):
        parts = parts + (a[i] + b[i],)
    return parts


@triton.jit
def store_rest(
    rest_ptr, q, do,  # [BM, D]
    p, ds,  # [BM, TAIL]
    scale, rest, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Store the contributions of a program's queries to the gradients of a head's last ``rest`` keys and values."""
    offs_r = tl.arange(0, TAIL)
    rest_ptr += tl.program_id(0).to(tl.int64) * 2 * rest * HEAD_DIM
    # The products are computed transposed, since D rows fill the matrix unit and TAIL rows would not.
    dk = add_transposed_product(zero_columns(TAIL, D_PARTS), q, ds)  # [D, TAIL]
    dv = add_transposed_product(zero_columns(TAIL, D_PARTS), do, p)  # [D, TAIL]
    store_rows(rest_ptr, transposed(dk), scale, offs_r, rest, HEAD_DIM, 1, HEAD_DIM, D_PARTS)
    store_rows(rest_ptr + rest * HEAD_DIM, transposed(dv), 1.0, offs_r, rest, HEAD_DIM, 1, HEAD_DIM, D_PARTS)


@triton.jit
def sum_of_rest(rest_ptr, pid_bh, num_parts, rest, HEAD_DIM: tl.constexpr, D_PARTS: tl.constexpr):
    """Return dk and dv [MOST_REST, D] of the last ``rest`` keys of a head: the sums, in order, of the parts that
    :func:`store_rest` has stored.
    """
    offs_r = tl.arange(0, MOST_REST)
    rest_ptr += pid_bh.to(tl.int64) * num_parts * 2 * rest * HEAD_DIM
    dk, dv = zero_rows(MOST_REST, D_PARTS), zero_rows(MOST_REST, D_PARTS)
    for _ in range(num_parts):
        dk = added(dk, load_rows(rest_ptr, offs_r, rest, HEAD_DIM, 1, HEAD_DIM, D_PARTS))
        rest_ptr += rest * HEAD_DIM
        dv = added(dv, load_rows(rest_ptr, offs_r, rest, HEAD_DIM, 1, HEAD_DIM, D_PARTS))
        rest_ptr += rest * HEAD_DIM
    return dk, dv

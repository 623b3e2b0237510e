"""Triton functions on tiles that the kernels of several ops share: arithmetic, loads of tiles, and stores in 8 bits."""

import triton
import triton.language as tl

from .launch import INTERPRET

IS_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRET)


@triton.jit
def online_softmax_step(
    scores,  # [M, N]
    row_max,  # [M]
    row_sum,  # [M]
    scale,
):  # fmt: skip
    """Fold one tile of scores into a running softmax of 2^(scale s).

    m' = max(m, max_j s_j) and l' = l 2^(scale (m - m')) + sum_j 2^(scale (s_j - m')).

    Returns ``(p, decay, m', l')`` with ``p = 2^(scale (s - m'))`` and ``decay = 2^(scale (m - m'))``, the factor for
    anything accumulated so far (Milakov and Gimelshein 2018). ``scale`` is positive. The difference is taken before the
    scaling, since it is exact for scores that are close to the maximum.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # While all scores of a row are -inf, new_max is -inf, and -inf - (-inf) is NaN, so 0 is subtracted there.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp2((row_max - pivot) * scale)
    p = tl.exp2((scores - pivot[:, None]) * scale)  # [M, N]
    return p, decay, new_max, row_sum * decay + tl.sum(p, 1)


@triton.jit
def log_1p(e):
    """Return log(1 + e) for e in [0, 1] with full relative precision; 1 + e would round the digits of a small e away.

    It is e times a polynomial of degree 8, the one with the least largest relative error: 3e-8, or 1e-7 with its
    coefficients in float32.
    """
    p = e * 0.0052326940931379795 - 0.02950523979961872
    p = p * e + 0.07822595536708832
    p = p * e - 0.13663245737552643
    p = p * e + 0.19106006622314453
    p = p * e - 0.24842983484268188
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949038028717
    p = p * e + 1.0
    return p * e


@triton.jit
def grouped_tile(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Return the row and the column of the tile that program ``pid`` computes.

    Consecutive programs take tiles from groups of ``GROUP_M`` rows of tiles, so that their operands stay in L2.
    """
    group = pid // (GROUP_M * num_n)
    first_m = group * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    within = pid % (GROUP_M * num_n)
    return first_m + within % rows, within // rows


@triton.jit
def load_tile(
    source, row, col, num_rows, num_cols, stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Load a tile [ROWS, COLS] at (row, col) of a matrix [num_rows, num_cols], with zeros past its end.

    The matrix has unit stride along rows. ``source`` is a tensor descriptor whose block is the tile, or a pointer.
    """
    if IS_TMA:
        tile = source.load([row, col])
    else:
        offs_r = row + tl.arange(0, ROWS)
        offs_c = col + tl.arange(0, COLS)
        mask = (offs_r < num_rows)[:, None] & (offs_c < num_cols)[None, :]
        tile = tl.load(source + offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def halves(vector, SIZE: tl.constexpr):
    """Return the first and the second half of a vector [SIZE]."""
    return tl.split(tl.permute(tl.reshape(vector, (2, SIZE // 2)), (1, 0)))


@triton.jit
def halves_of_columns(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the left and the right half of a tile [ROWS, COLS]."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def row_products(
    x_rows,  # [BM] pointers
    y_rows,  # [BN] pointers
    mask_m,  # [BM]
    mask_n,  # [BN]
    D,
    stride_xd, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return one tile of x y^T [BM, BN], in fp32.

    Equal rows of x and y give equal bits in every kernel that uses the same block sizes.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = dims < D
        x = tl.load(
            x_rows[:, None] + dims[None, :] * stride_xd, mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )  # [BM, BK]
        y = tl.load(
            y_rows[None, :] + dims[:, None] * stride_yd, mask=mask_n[None, :] & mask_k[:, None], other=0.0
        )  # [BK, BN]
        acc = tl.dot(x, y, acc, input_precision="ieee")
    return acc


@triton.jit
def scales(largest, MOST: tl.constexpr):
    """Return the factors L / m by which rows are multiplied before they are rounded to 8 bits, and the scales m / L.

    L is MOST, the largest number of the dtype, and ``largest`` has the m of each row, the maximum of its magnitudes.
    This maximum ignores NaN, and is NaN itself only if a row holds nothing else.
    """
    largest = tl.where(largest > 0.0, largest, 0.0)
    largest = tl.where(largest == 0.0, MOST, tl.maximum(largest, 7.888609052210118e-31))  # 2^-100
    most = tl.zeros_like(largest) + MOST
    return tl.div_rn(most, largest), tl.div_rn(largest, most)


@triton.jit
def in_eight_bits(x, factor, dtype: tl.constexpr):
    """Return the tile ``x * factor`` in 8 bits: to the nearest, ties to even, NaN for NaN.

    No product exceeds the dtype's largest number by more than its own rounding in float32, so nothing overflows. The
    factor of a row with an infinity is zero, and infinity times zero is NaN.
    """
    product = x * factor
    if IS_INTERPRETED:
        # Triton's interpreter does not round to the nearest number of 8 bits, and turns NaN into numbers.
        product = _interpreted_bits(product, dtype).to(dtype, bitcast=True)
    return product.to(dtype)


@triton.jit
def _interpreted_bits(x, dtype: tl.constexpr):
    """Return the bits of a tile in 8 bits, uint8, by operations on integers; for Triton's interpreter."""
    DIGITS: tl.constexpr = dtype.fp_mantissa_width
    BIAS: tl.constexpr = dtype.exponent_bias
    cut = 23 - DIGITS
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    # ``normal``: the bits of float32, rounded to DIGITS of its mantissa, with the narrow dtype's bias of the exponent.
    # ``small``: a number below the least normal one is counted in units of the least number of the narrow dtype, and
    # the sum with 1.5 * 2^23 rounds this count to an integer.
    normal = ((bits + (1 << (cut - 1)) - 1 + ((bits >> cut) & 1)) >> cut) - ((127 - BIAS) << DIGITS)
    small = (size * 2.0 ** (BIAS + DIGITS - 1) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    code = tl.where(size < 2.0 ** (1 - BIAS), small, normal)
    code = tl.where(x != x, 0x7F, code)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | tl.where(x != x, 0, sign)).to(tl.uint8)


@triton.jit
def store_rows(
    y,  # [BM, BN], zero past the end of a row
    values_ptr,  # [M, N] contiguous
    scale_ptr,  # [M] fp32
    rows, columns, mask_m, mask_n, N,
    MOST: tl.constexpr,
):  # fmt: skip
    """Store whole rows in 8 bits, and their scales; ``rows`` [BM] and ``columns`` [BN] are their numbers in int64."""
    factor, scale = scales(tl.max(tl.abs(y), 1), MOST)
    values = in_eight_bits(y, factor[:, None], values_ptr.dtype.element_ty)
    tl.store(values_ptr + rows[:, None] * N + columns[None, :], values, mask=mask_m[:, None] & mask_n[None, :])
    tl.store(scale_ptr + rows, scale, mask=mask_m)


@triton.jit
def store_carrier(carrier_ptr):
    """Store the zero that all elements of the carrier of ``Fp8Rows`` share, if the rows have a carrier."""
    if carrier_ptr is not None:  # noqa: SIM102  (the compiler decides this condition, the next one is the program's)
        if tl.program_id(0) == 0:
            tl.store(carrier_ptr, tl.zeros((), tl.float32).to(carrier_ptr.dtype.element_ty))

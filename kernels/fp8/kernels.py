"""Triton kernels that round rows, and the rows and columns of matrices, to 8 bits, and that widen them again.

``fp8_rows.py`` has the equations. A program of the kernels for rows loops over tiles of whole rows, which stay in
registers.
"""

import triton
import triton.language as tl

from ..activation.kernels import _quick_gelu
from ..tiles import in_eight_bits, scales, store_carrier, store_rows


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [M, N]
    values_ptr,  # [M, N] contiguous
    scale_ptr,  # [M] fp32
    carrier_ptr,  # [] or None
    M, stride_xm, stride_xn,
    N: tl.constexpr, MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Round rows to 8 bits, tile by tile of whole rows."""
    store_carrier(carrier_ptr)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n, columns = offs_n < N, offs_n.to(tl.int64)
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xn, mask=mask, other=0.0)  # [BM, BN]
        store_rows(x.to(tl.float32), values_ptr, scale_ptr, rows, columns, mask_m, mask_n, N, MOST)


@triton.jit
def _short_gelu(u):
    """Return GELU(u) of a tile with an error of 2e-7 |u|, in half the instructions of ``erf``, which would take the
    kernel longer than its loads and stores.

    The normal distribution's tail is e^(-u^2 / 2) times a polynomial of t = 1 / (1 + p |u| / sqrt(2)), by formula
    7.1.26 of Abramowitz and Stegun.
    """
    t = 1.0 / (1.0 + 0.2316418883 * tl.abs(u))
    tail = 0.5307027145 * t - 0.7265760135
    tail = tail * t + 0.7107068705
    tail = tail * t - 0.142248368
    tail = tail * t + 0.127414796
    tail = tail * t * tl.exp2(-0.7213475204444817 * u * u)
    return u * tl.where(u < 0.0, tail, 1.0 - tail)


@triton.jit
def _bias_act_fp8_fwd_kernel(
    x_ptr,  # [M, N]
    bias_ptr,  # [N] contiguous
    values_ptr,  # [M, N] contiguous
    scale_ptr,  # [M] fp32
    carrier_ptr,  # [] or None
    M, stride_xm, stride_xn,
    N: tl.constexpr, MOST: tl.constexpr, IS_QUICK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute GELU(x + bias), or QuickGELU, tile by tile of whole rows, and round them to 8 bits."""
    store_carrier(carrier_ptr)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n, columns = offs_n < N, offs_n.to(tl.int64)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xn, mask=mask, other=0.0)  # [BM, BN]
        u = x.to(tl.float32) + bias
        y = _quick_gelu(u) if IS_QUICK else _short_gelu(u)  # zero past the end of a row, since u is zero there
        store_rows(y, values_ptr, scale_ptr, rows, columns, mask_m, mask_n, N, MOST)


@triton.jit
def _dequantize_rows_kernel(
    values_ptr,  # [M, N] contiguous
    scale_ptr,  # [M] fp32
    y_ptr,  # [M, N] contiguous
    M,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Widen rows of 8 bits, tile by tile of whole rows."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n, columns = offs_n < N, offs_n.to(tl.int64)[None, :]
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]
        values = tl.load(values_ptr + rows[:, None] * N + columns, mask=mask, other=0.0)  # [BM, BN]
        y = values.to(tl.float32) * tl.load(scale_ptr + rows, mask=mask_m, other=0.0)[:, None]
        tl.store(y_ptr + rows[:, None] * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(
    x_ptr,  # [M, N]
    scale_ptr,  # [M] fp32 if x has 8 bits, or None
    tile, M, N, stride_xm, stride_xn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return a tile [BM, BN] of a matrix in float32, zero past its ends, and the indices of its rows and columns."""
    num_n = tl.cdiv(N, BLOCK_N)
    rows = (tile // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xn, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
    return x, rows, columns


@triton.jit
def order_of(size):
    """Return numbers that are not negative as integers with the same bits, which have the same order; 0 for NaN."""
    return tl.where(size >= 0.0, size, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _maxima_kernel(
    x_ptr,  # [M, N]
    x_scale_ptr,  # [M] fp32 if x has 8 bits, or None
    row_max_ptr,  # [M] int32 zeros, or None
    column_max_ptr,  # [N] int32 zeros
    M, N, stride_xm, stride_xn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Find the largest absolute value of each row and of each column, one tile for each program.

    The bits of floating numbers that are not negative are ordered as integers are, so an atomic maximum of integers
    finds the largest. It does not depend on the order of the programs.
    """
    x, rows, columns = load_tile(x_ptr, x_scale_ptr, tl.program_id(0), M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N)
    size = tl.abs(x)
    if row_max_ptr is not None:
        tl.atomic_max(row_max_ptr + rows, order_of(tl.max(size, 1)), mask=rows < M, sem="relaxed")
    tl.atomic_max(column_max_ptr + columns, order_of(tl.max(size, 0)), mask=columns < N, sem="relaxed")


@triton.jit
def _quantize_both_kernel(
    x_ptr,  # [M, N]
    x_scale_ptr,  # [M] fp32 if x has 8 bits, or None
    row_max_ptr,  # [M] int32, or None
    column_max_ptr,  # [N] int32
    values_ptr,  # [M, N] contiguous, or None
    scale_ptr,  # [M] fp32, or None
    column_values_ptr,  # [N, M] contiguous
    column_scale_ptr,  # [N] fp32
    M, N, stride_xm, stride_xn,
    MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Round a matrix to 8 bits along its rows, and along its columns, one tile for each program.

    Every program computes the scales of its rows and columns. The programs of the first column of tiles store the
    scales of the rows, and those of the first row of tiles store the scales of the columns.
    """
    x, rows, columns = load_tile(x_ptr, x_scale_ptr, tl.program_id(0), M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N)
    mask_m, mask_n = rows < M, columns < N
    if row_max_ptr is not None:
        largest = tl.load(row_max_ptr + rows, mask=mask_m, other=0).to(tl.float32, bitcast=True)
        factor, scale = scales(largest, MOST)
        values = in_eight_bits(x, factor[:, None], values_ptr.dtype.element_ty)
        tl.store(values_ptr + rows[:, None] * N + columns[None, :], values, mask=mask_m[:, None] & mask_n[None, :])
        if tl.program_id(0) % tl.cdiv(N, BLOCK_N) == 0:
            tl.store(scale_ptr + rows, scale, mask=mask_m)
    largest = tl.load(column_max_ptr + columns, mask=mask_n, other=0).to(tl.float32, bitcast=True)
    factor, scale = scales(largest, MOST)
    values = tl.trans(in_eight_bits(x, factor[None, :], column_values_ptr.dtype.element_ty))  # [BN, BM]
    mask = mask_n[:, None] & mask_m[None, :]
    tl.store(column_values_ptr + columns[:, None] * M + rows[None, :], values, mask=mask)
    if tl.program_id(0) < tl.cdiv(N, BLOCK_N):
        tl.store(column_scale_ptr + columns, scale, mask=mask_n)

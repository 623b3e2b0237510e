"""The Triton kernels of GELU and QuickGELU with a bias; ``op`` has the equations.

The kernels loop over rows, and each program has columns of its own.
"""

import triton
import triton.language as tl

from ..tiles import store_rows


@triton.jit
def _quick_gelu(u):
    """Return QuickGELU(u) of a tile."""
    return u * tl.sigmoid(1.702 * u)


@triton.jit
def _quick_gelu_slope(u):
    """Return the derivative of QuickGELU at each element of a tile."""
    p = tl.sigmoid(1.702 * u)
    # The factor u comes last: 1.702 * u may be infinite, and infinity times zero would be NaN.
    return p + 1.702 * (p * (1.0 - p) * u)


@triton.jit
def _gelu(u):
    """Return GELU(u) of a tile, by the error function."""
    return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _gelu_slope(u):
    """Return the derivative of GELU at each element of a tile."""
    density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * density


@triton.jit
def _bias_act_fwd_kernel(
    x_ptr,  # [M, N]
    bias_ptr,  # [N] contiguous
    y_ptr,  # [M, N] contiguous
    M, N, stride_xm, stride_xn,
    IS_QUICK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute GELU(x + bias), or QuickGELU, in the BLOCK_N columns of this program, which loads their bias once for all
    rows.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    offs_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    first, step = (tl.program_id(0) // num_n).to(tl.int64), tl.num_programs(0) // num_n
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), step, num_stages=NUM_STAGES):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        mask = (rows < M) & mask_n[None, :]
        x = tl.load(x_ptr + rows * stride_xm + offs_n[None, :] * stride_xn, mask=mask, other=0.0)  # [BM, BN]
        u = x.to(tl.float32) + bias
        y = _quick_gelu(u) if IS_QUICK else _gelu(u)
        tl.store(y_ptr + rows * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_act_bwd_kernel(
    grad_ptr,  # [M, N]
    x_ptr,  # [M, N]
    bias_ptr,  # [N] contiguous
    dx_ptr,  # [M, N] contiguous
    sums_ptr,  # [programs per column, N] fp32
    values_ptr,  # [M, N] contiguous, dx in 8 bits, or None; if dx is stored in 8 bits, BLOCK_N columns are a whole row
    scale_ptr,  # [M] fp32, the scales of the rows in values_ptr, or None
    y_ptr,  # [M, N] contiguous, the activation once more, or None
    M, N, stride_gm, stride_gn, stride_xm, stride_xn,
    IS_QUICK: tl.constexpr, HAS_SUMS: tl.constexpr, MOST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx in the BLOCK_N columns of this program, and sum dx over its rows for the gradient of the bias."""
    num_n = tl.cdiv(N, BLOCK_N)
    offs_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    # acc is the sum of the tiles of dx, element by element. Its rows are added up once, after the loop.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, step = (tl.program_id(0) // num_n).to(tl.int64), tl.num_programs(0) // num_n
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), step, num_stages=NUM_STAGES):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        rows = offs_m[:, None]
        mask = (rows < M) & mask_n[None, :]
        x = tl.load(x_ptr + rows * stride_xm + offs_n[None, :] * stride_xn, mask=mask, other=0.0)  # [BM, BN]
        dy = tl.load(grad_ptr + rows * stride_gm + offs_n[None, :] * stride_gn, mask=mask, other=0.0)  # [BM, BN]
        u = x.to(tl.float32) + bias
        dx = dy.to(tl.float32) * (_quick_gelu_slope(u) if IS_QUICK else _gelu_slope(u))
        if y_ptr is not None:
            y = _quick_gelu(u) if IS_QUICK else _gelu(u)
            tl.store(y_ptr + rows * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
        rounded = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows * N + offs_n[None, :], rounded, mask=mask)
        if scale_ptr is not None:
            store_rows(rounded.to(tl.float32), values_ptr, scale_ptr, offs_m, offs_n, offs_m < M, mask_n, N, MOST)
        if HAS_SUMS:
            acc += dx  # past the last row, dx is zero, because dy is zero there
    if HAS_SUMS:
        tl.store(sums_ptr + first * N + offs_n, tl.sum(acc, 0), mask=mask_n)

"""Triton kernels of the layer norm. Each program loops over tiles of whole rows, which stay in registers.

A tile is as wide as the next power of two, so it may have padding columns past the width N. N is known when a kernel is
compiled. A register that holds only padding then takes no instructions, and is left out. For this the compiler must see
that padding is zero in every intermediate result. ``tl.where`` shows this to the compiler; the mask of a load does not.
"""

import triton
import triton.language as tl

from ..tiles import store_carrier, store_rows


@triton.jit
def centred_rows(s, mask_n, N: tl.constexpr, eps):
    """Return rows [BM, BN] minus their means, the means [BM], and the rstds [BM]. A row must be zero past its end."""
    mean = tl.sum(s, 1) / N
    # The variance is computed around the mean, since E[s^2] - mean^2 would cancel. Elements past the end of a row must
    # not count.
    centred = tl.where(mask_n[None, :], s - mean[:, None], 0.0)
    return centred, mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / N + eps)


@triton.jit
def grad_of_rows(dy, weight, normed, rstd, N: tl.constexpr):
    """Return ds [BM, BN] from dy, weight and normalised rows; ``dy`` and ``normed`` are zero past the end of a row."""
    g = dy * weight
    # Both sums are computed together, so the warps of a program wait for each other only once.
    g_mean, g_slope = tl.split(tl.sum(tl.join(g, g * normed), 1) / N)
    return (g - g_mean[:, None] - normed * g_slope[:, None]) * rstd


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N]
    weight_ptr,  # [N] contiguous
    bias_ptr,  # [N] contiguous
    y_ptr,  # [M, N] contiguous; in 8 bits if there is a scale
    s_ptr,  # [M, N] contiguous
    mean_ptr,  # [M] fp32
    rstd_ptr,  # [M] fp32
    scale_ptr,  # [M] fp32, the scales of y in 8 bits, or None
    carrier_ptr,  # [], the carrier of ``Fp8Rows``, or None
    M, eps,
    stride_xm, stride_xn, stride_rm, stride_rn,
    N: tl.constexpr, MOST: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Add the residual and normalise, tile by tile of whole rows; a program loads weight and bias once."""
    store_carrier(carrier_ptr)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    columns = offs_n.to(tl.int64)[None, :]
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        rows, mask_m = offs_m[:, None], offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        s = tl.load(x_ptr + rows * stride_xm + columns * stride_xn, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + rows * stride_rm + columns * stride_rn, mask=mask, other=0.0)
            rounded = (s + residual.to(tl.float32)).to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + rows * N + columns, rounded, mask=mask)
            s = rounded.to(tl.float32)
        centred, mean, rstd = centred_rows(s, mask_n, N, eps)
        y = centred * rstd[:, None] * weight + bias
        if scale_ptr is None:
            tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            store_rows(y, y_ptr, scale_ptr, offs_m, offs_n.to(tl.int64), mask_m, mask_n, N, MOST)
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit
def _layer_norm_bwd_kernel(
    grad_y_ptr,  # [M, N]
    grad_s_ptr,  # [M, N]
    s_ptr,  # [M, N]
    weight_ptr,  # [N] contiguous
    mean_ptr,  # [M] fp32
    rstd_ptr,  # [M] fp32
    ds_ptr,  # [M, N] contiguous
    dx_ptr,  # [M, N] contiguous, ds in another dtype
    sums_ptr,  # [programs, 2, N] fp32, for weight and bias
    values_ptr,  # [M, N] contiguous, dx in 8 bits, or None
    scale_ptr,  # [M] fp32, the scales of dx in 8 bits, or None
    bias_ptr,  # [N] contiguous, or None if y is not wanted
    y_ptr,  # [M, N] contiguous, the norm y once more, or None
    M,
    stride_ym, stride_yn, stride_gm, stride_gn, stride_sm, stride_sn,
    N: tl.constexpr, MOST: tl.constexpr, HAS_GRAD_S: tl.constexpr, HAS_DX: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute ds and dx tile by tile of whole rows, and this program's part of the sums over rows, dw and db."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    if y_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    columns = offs_n.to(tl.int64)[None, :]
    # acc_dw and acc_db are sums of tiles, element by element. Their rows are added up once, after the loop.
    acc_dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        rows, mask_m = offs_m[:, None], offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        s = tl.load(s_ptr + rows * stride_sm + columns * stride_sn, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
        dy = tl.load(grad_y_ptr + rows * stride_ym + columns * stride_yn, mask=mask, other=0.0).to(tl.float32)
        dy = tl.where(mask_n[None, :], dy, 0.0)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        normed = tl.where(mask_n[None, :], (s - mean) * rstd, 0.0)
        if y_ptr is not None:
            y = normed * weight + bias
            tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
        ds = grad_of_rows(dy, weight, normed, rstd, N)
        if HAS_GRAD_S:
            ds += tl.load(grad_s_ptr + rows * stride_gm + columns * stride_gn, mask=mask, other=0.0).to(tl.float32)
        tl.store(ds_ptr + rows * N + columns, ds.to(ds_ptr.dtype.element_ty), mask=mask)
        if HAS_DX:
            tl.store(dx_ptr + rows * N + columns, ds.to(dx_ptr.dtype.element_ty), mask=mask)
        if scale_ptr is not None:
            dx = tl.where(mask_n[None, :], ds.to(dx_ptr.dtype.element_ty).to(tl.float32), 0.0)
            store_rows(dx, values_ptr, scale_ptr, offs_m, offs_n.to(tl.int64), mask_m, mask_n, N, MOST)
        if HAS_SUMS:
            acc_dw += dy * normed
            acc_db += dy
    if HAS_SUMS:
        sums = sums_ptr + first * 2 * N + offs_n
        tl.store(sums, tl.sum(acc_dw, 0), mask=mask_n)
        tl.store(sums + N, tl.sum(acc_db, 0), mask=mask_n)

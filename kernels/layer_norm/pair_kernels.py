"""Triton kernels of two layer norms in a row. Each program walks tiles of whole rows, which stay in registers."""

import triton
import triton.language as tl

from .kernels import centred_rows, grad_of_rows


@triton.jit
def _layer_norm_pair_fwd_kernel(
    x_ptr,  # [M, N]
    weight_1_ptr, bias_1_ptr, weight_2_ptr, bias_2_ptr,  # [N] contiguous
    s_ptr,  # [M, N] contiguous
    y_ptr,  # [M, N] contiguous
    stats_ptr,  # [4, M] fp32: mean and rstd of the first norm, and of the second
    M, eps_1, eps_2, stride_xm, stride_xn,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Walk tiles of whole rows, so that the parameters are loaded once."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight_1 = tl.load(weight_1_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    bias_1 = tl.load(bias_1_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    weight_2 = tl.load(weight_2_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    bias_2 = tl.load(bias_2_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    columns = offs_n.to(tl.int64)[None, :]
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        rows, mask_m = offs_m[:, None], offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + rows * stride_xm + columns * stride_xn, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
        centred, mean_1, rstd_1 = centred_rows(x, mask_n, N, eps_1)
        rounded = (centred * rstd_1[:, None] * weight_1 + bias_1).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + rows * N + columns, rounded, mask=mask)
        # rounded is zero past the end of a row, since the parameters are
        centred, mean_2, rstd_2 = centred_rows(rounded.to(tl.float32), mask_n, N, eps_2)
        y = centred * rstd_2[:, None] * weight_2 + bias_2
        tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
        # offs_m has 64 bits, and 32 may not hold 2 M
        tl.store(stats_ptr + offs_m, mean_1, mask=mask_m)
        tl.store(stats_ptr + (offs_m + M), rstd_1, mask=mask_m)
        tl.store(stats_ptr + (offs_m + M + M), mean_2, mask=mask_m)
        tl.store(stats_ptr + (offs_m + M + M + M), rstd_2, mask=mask_m)


@triton.jit
def _layer_norm_pair_bwd_kernel(
    grad_s_ptr,  # [M, N]
    grad_y_ptr,  # [M, N]
    x_ptr,  # [M, N]
    weight_1_ptr, bias_1_ptr, weight_2_ptr,  # [N] contiguous
    stats_ptr,  # [4, M] fp32: mean and rstd of the first norm, and of the second
    dx_ptr,  # [M, N] contiguous
    sums_ptr,  # [programs, 4, N] fp32, for weight_1, bias_1, weight_2, bias_2
    M,
    stride_sm, stride_sn, stride_ym, stride_yn, stride_xm, stride_xn,
    N: tl.constexpr, HAS_GRAD_S: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Walk tiles of whole rows, and keep this program's part of the sums over rows."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight_1 = tl.load(weight_1_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    bias_1 = tl.load(bias_1_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    weight_2 = tl.load(weight_2_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    columns = offs_n.to(tl.int64)[None, :]
    # one sum for each row of the tile; these are added up at the end
    acc_dw_1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_db_1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_dw_2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_db_2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        rows, mask_m = offs_m[:, None], offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + rows * stride_xm + columns * stride_xn, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
        dy = tl.load(grad_y_ptr + rows * stride_ym + columns * stride_yn, mask=mask, other=0.0).to(tl.float32)
        dy = tl.where(mask_n[None, :], dy, 0.0)
        mean_1 = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        rstd_1 = tl.load(stats_ptr + (offs_m + M), mask=mask_m, other=0.0)[:, None]
        mean_2 = tl.load(stats_ptr + (offs_m + M + M), mask=mask_m, other=0.0)[:, None]
        rstd_2 = tl.load(stats_ptr + (offs_m + M + M + M), mask=mask_m, other=0.0)[:, None]
        normed_1 = tl.where(mask_n[None, :], (x - mean_1) * rstd_1, 0.0)
        # rounded as in forward
        s = (normed_1 * weight_1 + bias_1).to(dx_ptr.dtype.element_ty).to(tl.float32)
        normed_2 = tl.where(mask_n[None, :], (s - mean_2) * rstd_2, 0.0)
        ds = grad_of_rows(dy, weight_2, normed_2, rstd_2, N)
        if HAS_GRAD_S:
            ds += tl.load(grad_s_ptr + rows * stride_sm + columns * stride_sn, mask=mask, other=0.0).to(tl.float32)
        ds = tl.where(mask_n[None, :], ds, 0.0)
        dx = grad_of_rows(ds, weight_1, normed_1, rstd_1, N)
        tl.store(dx_ptr + rows * N + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_SUMS:
            # past the last row, ds is zero since rstd_2 and grad_s are
            acc_dw_1 += ds * normed_1
            acc_db_1 += ds
            acc_dw_2 += dy * normed_2
            acc_db_2 += dy
    if HAS_SUMS:
        sums = sums_ptr + first * 4 * N + offs_n
        tl.store(sums, tl.sum(acc_dw_1, 0), mask=mask_n)
        tl.store(sums + N, tl.sum(acc_db_1, 0), mask=mask_n)
        tl.store(sums + 2 * N, tl.sum(acc_dw_2, 0), mask=mask_n)
        tl.store(sums + 3 * N, tl.sum(acc_db_2, 0), mask=mask_n)

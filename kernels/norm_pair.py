"""Two layer norms in a row: what enters a CLIP image tower, and what its first block makes of it.

Per row, with the equations of ``norm`` for each of the two:

    s = LN_1(x), rounded once to the dtype of x        y = LN_2(s)

    ds = (gradient through LN_2 of dy) + the gradient that arrives through s
    dx = gradient through LN_1 of ds        and the parameters' gradients of both

It is the rounded s that is normalised, and backward makes it again from x: it is written, since the residual stream
goes on from it, but never read here.

Bytes for M rows of width N: forward 3 M N items, backward 4 M N; two layer norms take 4 M N and, with the addition of
two gradients between them, 9 M N. Statistics and sums are in float32. The widest rows, which no CLIP has, take two
layer norms.
FLOPs: about 16 M N forward and 28 M N backward, far below what the bytes take.
Method: layer normalisation (Ba et al. 2016), twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backends import outside_autocast, uses_reference
from .checks import check_float, check_parameter, check_tensor
from .common import as_rows
from .dtypes import accumulate_dtype
from .launch import launch, triton_runs_on
from .norm import centred_rows, check_eps, check_width, grad_of_rows, layer_norm, row_tiles

# With four sums over rows, wider ones do not fit the registers.
MAX_WIDTH = 4096
# Of a thread, about: parameters stay there, and backward has the sums over rows of four parameters to keep.
FWD_REGISTERS, BWD_REGISTERS = 80, 128


@triton.jit
def _layer_norm_pair_fwd_kernel(
    x_ptr,  # [M, N]
    weight_1_ptr, bias_1_ptr, weight_2_ptr, bias_2_ptr,  # [N] contiguous
    s_ptr,  # [M, N] contiguous
    y_ptr,  # [M, N] contiguous
    stats_ptr,  # [4, M] fp32: mean and rstd of the first norm, and of the second
    M, N, eps_1, eps_2, stride_xm, stride_xn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A program walks tiles of whole rows, so that the parameters are loaded once."""
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
        centred, mean_1, rstd_1 = centred_rows(x, mask, N, eps_1)
        rounded = (centred * rstd_1[:, None] * weight_1 + bias_1).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + rows * N + columns, rounded, mask=mask)
        # zero past the row, as the parameters are
        centred, mean_2, rstd_2 = centred_rows(rounded.to(tl.float32), mask, N, eps_2)
        y = centred * rstd_2[:, None] * weight_2 + bias_2
        tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
        stats = stats_ptr + offs_m
        tl.store(stats, mean_1, mask=mask_m)
        tl.store(stats + M, rstd_1, mask=mask_m)
        tl.store(stats + 2 * M, mean_2, mask=mask_m)
        tl.store(stats + 3 * M, rstd_2, mask=mask_m)


@triton.jit
def _layer_norm_pair_bwd_kernel(
    grad_s_ptr,  # [M, N]
    grad_y_ptr,  # [M, N]
    x_ptr,  # [M, N]
    weight_1_ptr, bias_1_ptr, weight_2_ptr,  # [N] contiguous
    stats_ptr,  # [4, M] fp32: mean and rstd of the first norm, and of the second
    dx_ptr,  # [M, N] contiguous
    sums_ptr,  # [programs, 4, N] fp32: of weight_1, bias_1, weight_2, bias_2
    M, N,
    stride_sm, stride_sn, stride_ym, stride_yn, stride_xm, stride_xn,
    HAS_GRAD_S: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A program walks tiles of whole rows and keeps its part of the sums over rows."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight_1 = tl.load(weight_1_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    bias_1 = tl.load(bias_1_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    weight_2 = tl.load(weight_2_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    columns = offs_n.to(tl.int64)[None, :]
    # a sum for each row of the tile: adding rows up is left to the end
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
        stats = stats_ptr + offs_m
        mean_1 = tl.load(stats, mask=mask_m, other=0.0)[:, None]
        rstd_1 = tl.load(stats + M, mask=mask_m, other=0.0)[:, None]
        mean_2 = tl.load(stats + 2 * M, mask=mask_m, other=0.0)[:, None]
        rstd_2 = tl.load(stats + 3 * M, mask=mask_m, other=0.0)[:, None]
        normed_1 = (x - mean_1) * rstd_1  # not zero past the row, where the parameters are
        # as forward rounded it
        s = (normed_1 * weight_1 + bias_1).to(dx_ptr.dtype.element_ty).to(tl.float32)
        normed_2 = (s - mean_2) * rstd_2
        ds = grad_of_rows(dy, weight_2, normed_2, rstd_2, N)
        if HAS_GRAD_S:
            ds += tl.load(grad_s_ptr + rows * stride_sm + columns * stride_sn, mask=mask, other=0.0).to(tl.float32)
        dx = grad_of_rows(ds, weight_1, normed_1, rstd_1, N)
        tl.store(dx_ptr + rows * N + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_SUMS:
            # of rows past the last, ds is zero as their rstd is
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


def _fwd_triton(x: Tensor, parameters: list[Tensor], eps_1: float, eps_2: float) -> tuple[Tensor, Tensor, Tensor]:
    s, y = (x.new_empty(x.shape) for _ in range(2))
    stats = x.new_empty(4, x.shape[0], dtype=torch.float32)
    cfg, programs, tile = row_tiles("layer_norm_pair_fwd", x, FWD_REGISTERS)
    launch(
        _layer_norm_pair_fwd_kernel, (programs,), x, *(p.contiguous() for p in parameters), s, y, stats,
        *x.shape, eps_1, eps_2, *x.stride(), config=cfg, device=x.device, **tile,
    )  # fmt: skip
    return s, y, stats


def _bwd_triton(
    grad_s: Tensor | None, grad_y: Tensor, x: Tensor, parameters: list[Tensor], stats: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor]:
    cfg, programs, tile = row_tiles("layer_norm_pair_bwd", x, BWD_REGISTERS)
    dx = x.new_empty(x.shape)
    sums = x.new_empty(programs if with_sums else 0, 4, x.shape[1], dtype=torch.float32)
    strides = (*(x if grad_s is None else grad_s).stride(), *grad_y.stride(), *x.stride())
    launch(
        _layer_norm_pair_bwd_kernel, (programs,), grad_s, grad_y, x, *(p.contiguous() for p in parameters), stats,
        dx, sums, *x.shape, *strides,
        config=cfg, device=x.device, HAS_GRAD_S=grad_s is not None, HAS_SUMS=with_sums, **tile,
    )  # fmt: skip
    return dx, sums.sum(0)


def _fwd_cpu(x: Tensor, parameters: list[Tensor], eps_1: float, eps_2: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype, width = accumulate_dtype(x.dtype), x.shape[1:]
    weight_1, bias_1, weight_2, bias_2 = (p.to(dtype) for p in parameters)
    s, *stats_1 = torch.native_layer_norm(x.to(dtype), width, weight_1, bias_1, eps_1)
    s = s.to(x.dtype)
    y, *stats_2 = torch.native_layer_norm(s.to(dtype), width, weight_2, bias_2, eps_2)
    return s, y.to(x.dtype), torch.stack([value.flatten() for value in (*stats_1, *stats_2)])


def _bwd_cpu(
    grad_s: Tensor | None, grad_y: Tensor, x: Tensor, parameters: list[Tensor], stats: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor]:
    # widened: in 16 bits PyTorch rounds the sums over rows
    dtype, width = accumulate_dtype(x.dtype), x.shape[1:]
    weight_1, bias_1, weight_2 = (p.to(dtype) for p in parameters)
    mean_1, rstd_1, mean_2, rstd_2 = stats[..., None]
    wide = x.to(dtype)
    s = ((wide - mean_1) * rstd_1 * weight_1 + bias_1).to(x.dtype).to(dtype)
    backward, mask = torch.ops.aten.native_layer_norm_backward, [True, with_sums, with_sums]
    ds, *sums_2 = backward(grad_y.to(dtype), s, width, mean_2, rstd_2, weight_2, weight_2, mask)
    if grad_s is not None:
        ds += grad_s
    dx, *sums_1 = backward(ds, wide, width, mean_1, rstd_1, weight_1, weight_1, mask)
    return dx.to(x.dtype), torch.stack([*sums_1, *sums_2]) if with_sums else x.new_zeros(4, x.shape[1], dtype=dtype)


@torch.library.custom_op("clipfast::layer_norm_pair_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _layer_norm_pair_fwd(
    x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor, eps_1: float, eps_2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """s, y, and of each row the mean and rstd of both norms."""
    fwd = _fwd_triton if triton_runs_on(x.device) else _fwd_cpu
    s, y, stats = fwd(as_rows(x), [weight_1, bias_1, weight_2, bias_2], eps_1, eps_2)
    return s.view(x.shape), y.view(x.shape), stats.view(4, *x.shape[:-1])


@_layer_norm_pair_fwd.register_fake
def _(
    x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor, eps_1: float, eps_2: float
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((4, *x.shape[:-1]), dtype=accumulate_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), stats


@torch.library.custom_op("clipfast::layer_norm_pair_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _layer_norm_pair_bwd(
    grad_s: Tensor | None, grad_y: Tensor, x: Tensor,
    weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, stats: Tensor, with_sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of the four parameters in float32 (zeros without ``with_sums``)."""
    bwd = _bwd_triton if triton_runs_on(x.device) else _bwd_cpu
    rows_of_s = None if grad_s is None else as_rows(grad_s)
    parameters = [weight_1, bias_1, weight_2]
    dx, sums = bwd(rows_of_s, as_rows(grad_y), as_rows(x), parameters, stats.view(4, -1), with_sums)
    return dx.view(x.shape), sums


@_layer_norm_pair_bwd.register_fake
def _(
    grad_s: Tensor | None, grad_y: Tensor, x: Tensor,
    weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, stats: Tensor, with_sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), stats.new_empty(4, x.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, _, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [parameter.dtype for parameter in parameters]
    # the last bias is only added
    ctx.save_for_backward(x, *parameters[:3], output[2])


def _backward(ctx: Any, grad_s: Tensor | None, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, *parameters, stats = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 4
    if grad_y is None:
        if grad_s is None:
            return (None,) * 7
        # only the first norm was used
        with_sums = any(ctx.needs_input_grad[1:3])
        mean, rstd = stats[0], stats[1]
        dx, _, *sums = torch.ops.clipfast.layer_norm_bwd(grad_s, None, x, parameters[0], mean, rstd, with_sums)
    else:
        with_sums = any(ctx.needs_input_grad[1:5])
        dx, sums = torch.ops.clipfast.layer_norm_pair_bwd(grad_s, grad_y, x, *parameters, stats, with_sums)
    if with_sums:
        grads[: len(sums)] = [total.to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=False)]
    return dx, *grads, None, None


_layer_norm_pair_fwd.register_autograd(_backward, setup_context=_setup_context)


def layer_norm_pair(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    eps_1: float = 1e-5,
    eps_2: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Layer norm over the last dimension, and a second layer norm of the result in the same pass.

    Autocast changes nothing: a 16-bit ``x`` is read and written as it is, with statistics in float32.

    Args:
        x: [..., N], float32, float16 or bfloat16 (float64 on the CPU); any strides (rows that do not lie evenly apart
            are copied first). N is from 1 to 8,192 outside the reference.
        weight_1: [N], of any floating dtype: float32 under a 16-bit ``x``, as a model keeps it.
        bias_1: [N], likewise.
        weight_2: [N], likewise, of the second norm.
        bias_2: [N], likewise.
        eps_1: added to the variance of the first norm, not negative.
        eps_2: likewise, of the second.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        The first norm of ``x``, and the second norm of that as it is returned, rounded: each [..., N] in the dtype of
        ``x``, contiguous.

    Raises:
        ValueError, TypeError: a shape, a dtype or a value that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "layer_norm_pair"
    parameters = weight_1, bias_1, weight_2, bias_2
    names = "weight_1", "bias_1", "weight_2", "bias_2"
    check_tensor(op, "x", x, None)
    for name, parameter in zip(names, parameters, strict=True):
        check_parameter(op, name, parameter, x)
    check_eps(op, "eps_1", eps_1)
    check_eps(op, "eps_2", eps_2)
    if uses_reference(op, backend, x):
        return reference.layer_norm_pair(x, *parameters, eps_1, eps_2)
    for name, tensor in zip(("x", *names), (x, *parameters), strict=True):
        check_float(op, name, tensor)
    check_width(op, x)
    if x.shape[-1] > MAX_WIDTH:
        s = layer_norm(x, weight_1, bias_1, eps_1, backend=backend)
        return s, layer_norm(s, weight_2, bias_2, eps_2, backend=backend)
    s, y, _ = _layer_norm_pair_fwd(x, *parameters, float(eps_1), float(eps_2))
    return s, y

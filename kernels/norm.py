"""Layer norm of the residual stream, with the addition that comes before it.

Per row, with width N and, where a residual is given, s = x + residual rounded once to the dtype of the stream:

    mean = sum_n s_n / N        rstd = (sum_n (s_n - mean)^2 / N + eps)^-1/2
    x^_n = (s_n - mean) rstd    y_n = x^_n w_n + b_n

    g_n = dy_n w_n              ds_n = rstd (g_n - mean(g) - x^_n mean(g x^)) + the gradient that arrives through s
    dw_n = sum over rows of dy_n x^_n                  db_n = sum over rows of dy_n

It is the rounded s that is normalised: y is a function of the s that is stored, so backward needs no other.

Bytes for M rows: forward 2 M N items, with a residual 4 M N; backward 3 M N, with a residual 4 M N: every tensor is
read or written once, and a row stays in registers. Statistics and sums are in float32.
FLOPs: about 8 M N forward and 13 M N backward, far below what the bytes take.
Method: layer normalisation (Ba et al. 2016).
"""

from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backends import outside_autocast, uses_reference
from .checks import check_float, check_parameter, check_tensor
from .common import as_rows
from .configs import WIDTHS, RowConfig, row_config
from .dtypes import accumulate_dtype
from .launch import arch_of, launch, programs_at_once, triton_runs_on

MAX_WIDTH = WIDTHS[-1]
# Of a thread, about: backward has the sums over rows to keep.
FWD_REGISTERS, BWD_REGISTERS = 64, 128


@triton.jit
def centred_rows(s, mask, N, eps):
    """Rows [BM, BN] less their means, the means [BM], and the rstd [BM]."""
    mean = tl.sum(s, 1) / N
    # around the mean, not E[s^2] - mean^2, which cancels; what lies past the row must not count
    centred = tl.where(mask, s - mean[:, None], 0.0)
    return centred, mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / N + eps)


@triton.jit
def grad_of_rows(dy, weight, normed, rstd, N):
    """ds [BM, BN] of the rows that ``normed`` was made of; ``dy`` or ``weight`` is zero past the row."""
    g = dy * weight
    g_mean = tl.sum(g, 1)[:, None] / N
    g_slope = tl.sum(g * normed, 1)[:, None] / N
    return (g - g_mean - normed * g_slope) * rstd


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N]
    weight_ptr,  # [N] contiguous
    bias_ptr,  # [N] contiguous
    y_ptr,  # [M, N] contiguous
    s_ptr,  # [M, N] contiguous
    mean_ptr,  # [M] fp32
    rstd_ptr,  # [M] fp32
    M, N, eps,
    stride_xm, stride_xn, stride_rm, stride_rn,
    HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A program walks tiles of whole rows, so that weight and bias are loaded once."""
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
        centred, mean, rstd = centred_rows(s, mask, N, eps)
        y = centred * rstd[:, None] * weight + bias
        tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
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
    dx_ptr,  # [M, N] contiguous, the same in another dtype
    dw_ptr,  # [programs, N] fp32
    db_ptr,  # [programs, N] fp32
    M, N,
    stride_ym, stride_yn, stride_gm, stride_gn, stride_sm, stride_sn,
    HAS_GRAD_S: tl.constexpr, HAS_DX: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A program walks tiles of whole rows and keeps its part of the sums over rows."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    columns = offs_n.to(tl.int64)[None, :]
    # a sum for each row of the tile: adding rows up is left to the end
    acc_dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        rows, mask_m = offs_m[:, None], offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        s = tl.load(s_ptr + rows * stride_sm + columns * stride_sn, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
        dy = tl.load(grad_y_ptr + rows * stride_ym + columns * stride_yn, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        normed = (s - mean) * rstd  # not zero past the row, where dy and weight are
        ds = grad_of_rows(dy, weight, normed, rstd, N)
        if HAS_GRAD_S:
            ds += tl.load(grad_s_ptr + rows * stride_gm + columns * stride_gn, mask=mask, other=0.0).to(tl.float32)
        tl.store(ds_ptr + rows * N + columns, ds.to(ds_ptr.dtype.element_ty), mask=mask)
        if HAS_DX:
            tl.store(dx_ptr + rows * N + columns, ds.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_SUMS:
            acc_dw += dy * normed
            acc_db += dy
    if HAS_SUMS:
        sums = first * N + offs_n
        tl.store(dw_ptr + sums, tl.sum(acc_dw, 0), mask=mask_n)
        tl.store(db_ptr + sums, tl.sum(acc_db, 0), mask=mask_n)


def row_tiles(kernel: str, x: Tensor, registers: int) -> tuple[RowConfig, int, dict[str, int]]:
    """Configuration, number of programs and tile for the rows of ``x``: narrow rows share a tile."""
    num_rows, width = x.shape
    cfg = row_config(kernel, arch_of(x.device), x.dtype, width)
    block_n = triton.next_power_of_2(width)
    block_m = max(1, cfg.block_m * cfg.block_n // block_n)
    programs = min(triton.cdiv(num_rows, block_m), programs_at_once(x.device, cfg.num_warps, registers))
    return cfg, programs, {"BLOCK_M": block_m, "BLOCK_N": block_n, "NUM_STAGES": cfg.num_stages}


def check_eps(op: str, name: str, eps: float) -> None:
    """Refuse what cannot be added to a variance."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{op}: {name} must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: {name} must not be negative, got {eps}")


def check_width(op: str, x: Tensor) -> None:
    """Refuse rows that do not fit the registers."""
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: rows must be 1 to {MAX_WIDTH} wide, got {x.shape[-1]}: use backend='torch'")


def _fwd_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, width = x.shape
    stream = x if residual is None else residual
    y = x.new_empty(x.shape)
    s = stream.new_empty(0 if residual is None else x.shape)
    mean, rstd = (x.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    cfg, programs, tile = row_tiles("layer_norm_fwd", stream, FWD_REGISTERS)
    launch(
        _layer_norm_fwd_kernel, (programs,), x, residual, weight.contiguous(), bias.contiguous(), y, s, mean, rstd,
        num_rows, width, eps, *x.stride(), *stream.stride(),
        config=cfg, device=x.device, HAS_RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return y, s, mean, rstd


def _bwd_triton(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, width = s.shape
    with_dx = grad_y.dtype != s.dtype
    cfg, programs, tile = row_tiles("layer_norm_bwd", s, BWD_REGISTERS)
    ds = s.new_empty(s.shape)
    dx = grad_y.new_empty(s.shape if with_dx else 0)
    dw, db = (s.new_empty(programs if with_sums else 0, width, dtype=torch.float32) for _ in range(2))
    strides = (*grad_y.stride(), *(s if grad_s is None else grad_s).stride(), *s.stride())
    launch(
        _layer_norm_bwd_kernel, (programs,), grad_y, grad_s, s, weight.contiguous(), mean, rstd, ds, dx, dw, db,
        num_rows, width, *strides,
        config=cfg, device=s.device, HAS_GRAD_S=grad_s is not None, HAS_DX=with_dx, HAS_SUMS=with_sums, **tile,
    )  # fmt: skip
    return ds, dx, dw.sum(0), db.sum(0)


def _fwd_cpu(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x if residual is None else torch.add(x, residual).to(residual.dtype)
    dtype = accumulate_dtype(s.dtype)
    y, mean, rstd = torch.native_layer_norm(s.to(dtype), s.shape[1:], weight.to(dtype), bias.to(dtype), eps)
    return y.to(x.dtype), s.new_empty(0) if residual is None else s, mean.flatten(), rstd.flatten()


def _bwd_cpu(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # widened: in 16 bits PyTorch rounds the sums over rows
    dtype = accumulate_dtype(s.dtype)
    weight = weight.to(dtype)
    ds, dw, db = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(dtype), s.to(dtype), s.shape[1:], mean, rstd, weight, weight, [True, with_sums, with_sums]
    )
    if grad_s is not None:
        ds += grad_s
    dx = ds.to(grad_y.dtype) if grad_y.dtype != s.dtype else grad_y.new_empty(0)
    return ds.to(s.dtype), dx, *((dw, db) if with_sums else (weight.new_empty(0), weight.new_empty(0)))


@torch.library.custom_op("clipfast::layer_norm_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s (empty without a residual), and mean and rstd of each row."""
    fwd = _fwd_triton if triton_runs_on(x.device) else _fwd_cpu
    y, s, mean, rstd = fwd(as_rows(x), None if residual is None else as_rows(residual), weight, bias, eps)
    rows = x.shape[:-1]
    return y.view(x.shape), s if residual is None else s.view(x.shape), mean.view(rows), rstd.view(rows)


@_layer_norm_fwd.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = x if residual is None else residual
    s = stream.new_empty((0,) if residual is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=accumulate_dtype(stream.dtype)) for _ in range(2))
    return x.new_empty(x.shape), s, mean, rstd


@torch.library.custom_op("clipfast::layer_norm_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _layer_norm_bwd(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s, of x where its dtype is another (else empty), and of weight and bias in float32 (or empty)."""
    bwd = _bwd_triton if triton_runs_on(s.device) else _bwd_cpu
    rows_of_s = None if grad_s is None else as_rows(grad_s)
    ds, dx, dw, db = bwd(as_rows(grad_y), rows_of_s, as_rows(s), weight, mean.flatten(), rstd.flatten(), with_sums)
    return ds.view(s.shape), dx.view(s.shape) if dx.dtype != ds.dtype else dx, dw, db


@_layer_norm_bwd.register_fake
def _(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = grad_y.new_empty((0,) if grad_y.dtype == s.dtype else s.shape)
    dw, db = (mean.new_empty(s.shape[-1] if with_sums else 0) for _ in range(2))
    return s.new_empty(s.shape), dx, dw, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    ctx.x_dtype, ctx.bias_dtype, ctx.has_sum = x.dtype, bias.dtype, residual is not None
    ctx.mark_non_differentiable(*output[2 if ctx.has_sum else 1 :])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else output[1], weight, *output[2:])


def _backward(ctx: Any, grad_y: Tensor | None, grad_s: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if not ctx.has_sum:
        grad_s = None  # of an empty tensor: a compiled graph makes one
    if grad_y is None:
        # only the sum was used
        return grad_s if grad_s is None else grad_s.to(ctx.x_dtype), grad_s, None, None, None
    s, weight, mean, rstd = ctx.saved_tensors
    with_sums = any(ctx.needs_input_grad[2:4])
    ds, dx, dw, db = torch.ops.clipfast.layer_norm_bwd(grad_y, grad_s, s, weight, mean, rstd, with_sums)
    grads = (ds if ctx.x_dtype == s.dtype else dx, ds if ctx.needs_input_grad[1] else None)
    return *grads, *((dw.to(weight.dtype), db.to(ctx.bias_dtype)) if with_sums else (None, None)), None


_layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: None = ..., backend: str = ...
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: Tensor, backend: str = ...
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last dimension, and the residual addition before it in the same pass.

    Autocast changes nothing: a 16-bit stream is read and written as it is, with statistics in float32.

    Args:
        x: [..., N], float32, float16 or bfloat16 (float64 on the CPU); any strides (rows that do not lie evenly apart
            are copied first). N is from 1 to 8,192 outside the reference.
        weight: [N], of any floating dtype: float32 under a 16-bit ``x``, as a model keeps it.
        bias: [N], likewise.
        eps: added to the variance, not negative.
        residual: [..., N], the residual stream that ``x`` is added to; it may have another dtype than ``x``, such as
            float32 where autocast makes ``x`` bfloat16.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [..., N] in the dtype of ``x``, contiguous; with ``residual`` also the sum, in the dtype of ``residual``. What
        is normalised is the sum as it is returned, rounded to that dtype.

    Raises:
        ValueError, TypeError: a shape, a dtype or a value that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "layer_norm"
    check_tensor(op, "x", x, None)
    check_parameter(op, "weight", weight, x)
    check_parameter(op, "bias", bias, x)
    check_eps(op, "eps", eps)
    if residual is not None:
        check_tensor(op, "residual", residual, None)
        if residual.shape != x.shape or residual.device != x.device:
            raise ValueError(
                f"{op}: residual must be {tuple(x.shape)} on {x.device}, "
                f"got {tuple(residual.shape)} on {residual.device}"
            )
    if uses_reference(op, backend, x):
        return reference.layer_norm(x, weight, bias, eps, residual=residual)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None:
            check_float(op, name, tensor)
    check_width(op, x)
    y, s, _, _ = _layer_norm_fwd(x, residual, weight, bias, float(eps))
    return y if residual is None else (y, s)

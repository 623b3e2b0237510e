"""Host side of the layer norm's kernels: configurations, grids, and memory for the results.

Streams and their gradients are [..., N] with any strides. ``cpu`` has ``forward`` and ``backward`` for CPUs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common import as_rows, cdiv, new_tensors, next_power_of_2, num_rows, row_strides
from ..configs import RowConfig, planned, row_config
from ..fp8_rows import E4M3, LARGEST
from ..launch import Plan, Start, arch_of, programs_at_once
from .kernels import _layer_norm_bwd_kernel, _layer_norm_fwd_kernel

# About how many registers a thread takes if a configuration sets no limit. Parameters stay in registers, and so do the
# sums over rows for their gradients in the backward kernel.
FWD_REGISTERS, BWD_REGISTERS = 64, 128


def row_tiles(
    kernel: str, num_rows: int, width: int, dtype: torch.dtype, device: torch.device, registers: int, *,
    with_rows: bool = False,
) -> tuple[RowConfig, int, dict[str, int]]:  # fmt: skip
    """Choose the tiles in which ``kernel`` takes rows [M, N], if a thread takes about ``registers`` registers.

    A tile holds whole rows. It has as many elements as the configuration says, so narrow rows share a tile. If the
    kernel writes rows in 8 bits too (``with_rows``), it needs more registers, and twice as many threads share a tile.

    Returns:
        The configuration, the number of programs, and the compile-time sizes of a tile.
    """
    cfg = row_config(kernel, arch_of(device), dtype, width)
    if with_rows:
        cfg = dataclasses.replace(cfg, num_warps=min(16, 2 * cfg.num_warps), max_registers=None)
    block_n = next_power_of_2(width)
    block_m = max(1, cfg.block_m * cfg.block_n // block_n)
    at_once = programs_at_once(device, cfg.num_warps, cfg.max_registers or registers)
    programs = min(cdiv(num_rows, block_m), at_once)
    return cfg, programs, {"N": width, "BLOCK_M": block_m, "BLOCK_N": block_n, "NUM_STAGES": cfg.num_stages}


@planned
def _forward_plan(
    device: torch.device, dtype: torch.dtype, num_rows: int, width: int, x_strides: tuple[int, ...],
    stream_strides: tuple[int, ...], eps: float, has_residual: bool, in_fp8: bool,
) -> Plan:  # fmt: skip
    """Plan the launch of the layer norm's forward kernel for a residual stream of ``dtype``."""
    cfg, programs, tile = row_tiles("layer_norm_fwd", num_rows, width, dtype, device, FWD_REGISTERS)
    return Plan(
        _layer_norm_fwd_kernel, (programs,), num_rows, eps, *x_strides, *stream_strides,
        config=cfg, device=device, HAS_RESIDUAL=has_residual, MOST=LARGEST[E4M3] if in_fp8 else None, **tile,
    )  # fmt: skip


@planned
def _backward_plan(
    device: torch.device, dtype: torch.dtype, num_rows: int, width: int, *strides: int,
    has_grad_s: bool, with_dx: bool, with_sums: bool, in_fp8: bool,
) -> tuple[Plan, int]:  # fmt: skip
    """Plan the layer norm's backward kernel for a residual stream of ``dtype``; also return its number of programs."""
    cfg, programs, tile = row_tiles("layer_norm_bwd", num_rows, width, dtype, device, BWD_REGISTERS, with_rows=in_fp8)
    plan = Plan(
        _layer_norm_bwd_kernel, (programs,), num_rows, *strides,
        config=cfg, device=device, HAS_GRAD_S=has_grad_s, HAS_DX=with_dx, HAS_SUMS=with_sums,
        MOST=LARGEST[E4M3] if in_fp8 else None, **tile,
    )  # fmt: skip
    return plan, programs


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, *, in_fp8: bool = False
) -> Callable[..., Any]:
    """Plan the launch of a layer norm for tensors with the memory layout of the arguments.

    Returns:
        The function that computes the layer norm y, the sum s (None without a residual), and mean and rstd [..., 1] of
        each row. With ``in_fp8`` it returns the carrier, the values and the scales of rows in 8 bits in place of y.
    """
    stream = x if residual is None else residual
    (x_strides, x_copied), (stream_strides, stream_copied) = row_strides(x), row_strides(stream)
    start = Start(
        _forward_plan(
            x.device,
            stream.dtype,
            num_rows(x),
            x.shape[-1],
            x_strides,
            stream_strides,
            eps,
            residual is not None,
            in_fp8,
        )
    )
    new_y, new_s = new_tensors(x, None, E4M3 if in_fp8 else None), new_tensors(stream)
    new_scale, new_carrier = new_tensors(x, x.shape[:-1], torch.float32), new_tensors(x, ())
    new_stats, no_s = new_tensors(x, (*x.shape[:-1], 1), torch.float32), new_tensors(x, (0,))()

    def compute(
        x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Any = None
    ) -> tuple[Any, ...]:
        """Compute the layer norm of x, or of x + residual, for tensors of the planned layout.

        ``out`` are the tensors y, s, mean and rstd to write to; None for new ones.
        """
        y, s, mean, rstd = out or (new_y(), None if residual is None else new_s(), new_stats(), new_stats())
        scale, carrier = (new_scale(), new_carrier()) if in_fp8 else (None, None)
        rows = as_rows(x) if x_copied else x
        stream = as_rows(residual) if residual is not None and stream_copied else residual
        start(
            rows,
            stream,
            weight.contiguous(),
            bias.contiguous(),
            y,
            no_s if s is None else s,
            mean,
            rstd,
            scale,
            carrier,
        )
        return (y, s, mean, rstd) if carrier is None else (carrier.expand(y.shape), y, scale, s, mean, rstd)

    return compute


def backward(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool,
    bias: Tensor | None = None, *, in_fp8: bool = False,
) -> Callable[..., Any]:  # fmt: skip
    """Plan the launch that computes a layer norm's gradients for tensors with the memory layout of the arguments.

    Returns:
        The function that computes ds, dx (None if it has the dtype of ds), and dw and db [2, N] (None unless
        ``with_sums``). With ``in_fp8`` it also returns, if ``bias`` is given, the norm y in the dtype of ``grad_y``,
        and the values and the scales of dx, or of ds, in 8 bits.
    """
    width, with_dx = s.shape[-1], grad_y.dtype != s.dtype
    layouts = [row_strides(x) for x in (grad_y, s if grad_s is None else grad_s, s)]
    (y_strides, y_copied), (grad_s_strides, grad_s_copied), (s_strides, s_copied) = layouts
    plan, programs = _backward_plan(
        s.device, s.dtype, num_rows(s), width, *y_strides, *grad_s_strides, *s_strides,
        has_grad_s=grad_s is not None, with_dx=with_dx, with_sums=with_sums, in_fp8=in_fp8,
    )  # fmt: skip
    start, new_ds, new_dx, new_y = Start(plan), new_tensors(s), new_tensors(grad_y), new_tensors(grad_y)
    new_sums = new_tensors(s, (programs, 2, width), torch.float32)
    new_values, new_scale = new_tensors(grad_y, None, E4M3), new_tensors(grad_y, grad_y.shape[:-1], torch.float32)
    no_dx, no_sums = new_tensors(grad_y, (0,))(), new_tensors(s, (0,), torch.float32)()

    def compute(
        grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool,
        bias: Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Compute the gradients of layer norm, for tensors of the planned layout."""
        if y_copied:
            grad_y = as_rows(grad_y)
        if grad_s_copied and grad_s is not None:
            grad_s = as_rows(grad_s)
        if s_copied:
            s = as_rows(s)
        ds = new_ds()
        dx, sums = new_dx() if with_dx else no_dx, new_sums() if with_sums else no_sums
        rows = (new_values(), new_scale()) if in_fp8 else (None, None)
        y = None if bias is None else new_y()
        bias = None if bias is None else bias.contiguous()
        start(grad_y, grad_s, s, weight.contiguous(), mean, rstd, ds, dx, sums, *rows, bias, y)
        found = ds, dx if with_dx else None, sums.sum(0) if with_sums else (None, None)
        return (*found, *(() if y is None else (y,)), *rows) if in_fp8 else found

    return compute

"""Host side of the layer norm's kernels: configurations, grids, and memory for the results.

Streams and their gradients are [..., N] with any strides. ``cpu`` has the same two functions.
"""

import torch
from torch import Tensor

from ..common import cdiv, new_contiguous, next_power_of_2, row_layout
from ..configs import RowConfig, planned, row_config
from ..launch import Plan, arch_of, programs_at_once
from .kernels import _layer_norm_bwd_kernel, _layer_norm_fwd_kernel

# About how many registers a thread takes if a configuration sets no limit. Parameters stay in registers, and so do the
# sums over rows for their gradients in the backward kernel.
FWD_REGISTERS, BWD_REGISTERS = 64, 128


def row_tiles(
    kernel: str, num_rows: int, width: int, dtype: torch.dtype, device: torch.device, registers: int
) -> tuple[RowConfig, int, dict[str, int]]:
    """Choose how ``kernel`` walks rows [M, N], if each of its threads takes about ``registers``.

    A tile holds whole rows. It has as many elements as the configuration says, so narrow rows share a tile.

    Returns:
        The configuration, the number of programs, and the compile-time sizes of a tile.
    """
    cfg = row_config(kernel, arch_of(device), dtype, width)
    block_n = next_power_of_2(width)
    block_m = max(1, cfg.block_m * cfg.block_n // block_n)
    at_once = programs_at_once(device, cfg.num_warps, cfg.max_registers or registers)
    programs = min(cdiv(num_rows, block_m), at_once)
    return cfg, programs, {"N": width, "BLOCK_M": block_m, "BLOCK_N": block_n, "NUM_STAGES": cfg.num_stages}


@planned
def _forward_plan(
    device: torch.device, dtype: torch.dtype, num_rows: int, width: int, x_strides: tuple[int, ...],
    stream_strides: tuple[int, ...], eps: float, has_residual: bool,
) -> Plan:  # fmt: skip
    """Plan the forward kernel for a residual stream of ``dtype``."""
    cfg, programs, tile = row_tiles("layer_norm_fwd", num_rows, width, dtype, device, FWD_REGISTERS)
    return Plan(
        _layer_norm_fwd_kernel, (programs,), num_rows, eps, *x_strides, *stream_strides,
        config=cfg, device=device, HAS_RESIDUAL=has_residual, **tile,
    )  # fmt: skip


@planned
def _backward_plan(
    device: torch.device, dtype: torch.dtype, num_rows: int, width: int, *strides: int,
    has_grad_s: bool, with_dx: bool, with_sums: bool,
) -> tuple[Plan, int]:  # fmt: skip
    """Plan the backward kernel for a residual stream of ``dtype``; return also the number of its programs."""
    cfg, programs, tile = row_tiles("layer_norm_bwd", num_rows, width, dtype, device, BWD_REGISTERS)
    plan = Plan(
        _layer_norm_bwd_kernel, (programs,), num_rows, *strides,
        config=cfg, device=device, HAS_GRAD_S=has_grad_s, HAS_DX=with_dx, HAS_SUMS=with_sums, **tile,
    )  # fmt: skip
    return plan, programs


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the layer norm y, the sum s (empty without a residual), and mean and rstd [...] of each row."""
    *rows, width = x.shape
    y = new_contiguous(x)
    s = x.new_empty(0) if residual is None else new_contiguous(residual)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    x, x_strides = row_layout(x)
    stream, stream_strides = (x, x_strides) if residual is None else row_layout(residual)
    plan = _forward_plan(
        x.device, stream.dtype, mean.numel(), width, x_strides, stream_strides, eps, residual is not None
    )
    plan.start(x, None if residual is None else stream, weight.contiguous(), bias.contiguous(), y, s, mean, rstd)
    return y, s, mean, rstd


def backward(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ds, dx (empty if it has the dtype of ds), and dw and db [2, N] (empty unless ``with_sums``)."""
    width = s.shape[-1]
    with_dx = grad_y.dtype != s.dtype
    ds = new_contiguous(s)
    dx = new_contiguous(grad_y) if with_dx else grad_y.new_empty(0)
    grad_y, grad_y_strides = row_layout(grad_y)
    s, s_strides = row_layout(s)
    grad_s, grad_s_strides = (None, s_strides) if grad_s is None else row_layout(grad_s)
    plan, programs = _backward_plan(
        s.device, s.dtype, mean.numel(), width, *grad_y_strides, *grad_s_strides, *s_strides,
        has_grad_s=grad_s is not None, with_dx=with_dx, with_sums=with_sums,
    )  # fmt: skip
    sums = torch.empty((programs, 2, width if with_sums else 0), dtype=torch.float32, device=s.device)
    plan.start(grad_y, grad_s, s, weight.contiguous(), mean, rstd, ds, dx, sums)
    return ds, dx, sums.sum(0)

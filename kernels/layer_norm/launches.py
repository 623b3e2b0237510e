"""Host side of the layer norm's kernels: configurations, grids, and memory for the results.

Streams and their gradients are [M, N] with any strides. ``cpu`` has the same two functions.
"""

import torch
import triton
from torch import Tensor

from ..configs import RowConfig, row_config
from ..launch import arch_of, launch, programs_at_once
from .kernels import _layer_norm_bwd_kernel, _layer_norm_fwd_kernel

# About how many registers a thread takes if a configuration sets no limit. Parameters stay in registers, and so do the
# sums over rows for their gradients in the backward kernel.
FWD_REGISTERS, BWD_REGISTERS = 64, 128


def row_tiles(kernel: str, x: Tensor, registers: int) -> tuple[RowConfig, int, dict[str, int]]:
    """Choose how ``kernel`` walks the rows of ``x``, if each of its threads takes about ``registers``.

    A tile holds whole rows. It has as many elements as the configuration says, so narrow rows share a tile.

    Returns:
        The configuration, the number of programs, and the compile-time sizes of a tile.
    """
    num_rows, width = x.shape
    cfg = row_config(kernel, arch_of(x.device), x.dtype, width)
    block_n = triton.next_power_of_2(width)
    block_m = max(1, cfg.block_m * cfg.block_n // block_n)
    at_once = programs_at_once(x.device, cfg.num_warps, cfg.max_registers or registers)
    programs = min(triton.cdiv(num_rows, block_m), at_once)
    return cfg, programs, {"N": width, "BLOCK_M": block_m, "BLOCK_N": block_n, "NUM_STAGES": cfg.num_stages}


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the layer norm y, the sum s (empty without a residual), and mean and rstd [M] of each row."""
    num_rows = x.shape[0]
    stream = x if residual is None else residual
    y = x.new_empty(x.shape)
    s = stream.new_empty(0 if residual is None else x.shape)
    mean, rstd = (x.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    cfg, programs, tile = row_tiles("layer_norm_fwd", stream, FWD_REGISTERS)
    launch(
        _layer_norm_fwd_kernel, (programs,), x, residual, weight.contiguous(), bias.contiguous(), y, s, mean, rstd,
        num_rows, eps, *x.stride(), *stream.stride(),
        config=cfg, device=x.device, HAS_RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return y, s, mean, rstd


def backward(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ds, dx (empty if it has the dtype of ds), and dw and db [2, N] (empty unless ``with_sums``)."""
    num_rows, width = s.shape
    with_dx = grad_y.dtype != s.dtype
    cfg, programs, tile = row_tiles("layer_norm_bwd", s, BWD_REGISTERS)
    ds = s.new_empty(s.shape)
    dx = grad_y.new_empty(s.shape if with_dx else 0)
    sums = s.new_empty(programs, 2, width if with_sums else 0, dtype=torch.float32)
    strides = (*grad_y.stride(), *(s if grad_s is None else grad_s).stride(), *s.stride())
    launch(
        _layer_norm_bwd_kernel, (programs,), grad_y, grad_s, s, weight.contiguous(), mean, rstd, ds, dx, sums,
        num_rows, *strides,
        config=cfg, device=s.device, HAS_GRAD_S=grad_s is not None, HAS_DX=with_dx, HAS_SUMS=with_sums, **tile,
    )  # fmt: skip
    return ds, dx, sums.sum(0)

"""Host side of the activations' kernels: configurations, grids, and memory for the results.

Rows and their gradients are [..., N] with any strides. ``cpu`` has ``forward`` and ``backward`` for CPUs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common import as_rows, cdiv, new_tensors, num_rows, row_strides
from ..configs import RowConfig, planned, row_config
from ..fp8_rows import E4M3, LARGEST
from ..launch import Plan, Start, arch_of, programs_at_once
from .kernels import _bias_act_bwd_kernel, _bias_act_fwd_kernel

# About how many registers a thread of each kernel takes, from which ``programs_at_once`` computes the size of the grid.
# The backward kernel also keeps its sums over rows in registers.
FWD_REGISTERS, BWD_REGISTERS = 64, 128


@planned
def _fwd_plan(device: torch.device, dtype: torch.dtype, rows: int, width: int, *strides: int, quick: bool) -> Plan:
    """Plan the launch of the bias-and-activation forward kernel for x [rows, width]."""
    cfg, _, grid, tile = _grid("bias_act_fwd", device, dtype, rows, width, FWD_REGISTERS)
    return Plan(_bias_act_fwd_kernel, grid, rows, width, *strides, config=cfg, device=device, IS_QUICK=quick, **tile)


@planned
def _bwd_plan(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, *strides: int, quick: bool, with_sums: bool,
    row_tiles: Callable[..., Any] | None,
) -> tuple[Plan, int]:  # fmt: skip
    """Plan the launch of the bias-and-activation backward kernel for x [rows, width].

    Returns:
        The plan, and the number of programs for each block of columns.
    """
    if row_tiles is None:
        cfg, per_block, grid, tile = _grid("bias_act_bwd", device, dtype, rows, width, BWD_REGISTERS)
    else:
        cfg, per_block, tile = row_tiles(rows, width, device)
        grid = (per_block,)
    plan = Plan(
        _bias_act_bwd_kernel, grid, rows, width, *strides, config=cfg, device=device, IS_QUICK=quick,
        HAS_SUMS=with_sums, MOST=None if row_tiles is None else LARGEST[E4M3], **tile,
    )  # fmt: skip
    return plan, per_block


def _grid(
    kernel: str, device: torch.device, dtype: torch.dtype, rows: int, width: int, registers: int
) -> tuple[RowConfig, int, tuple[int], dict[str, int]]:
    """Return how a bias-and-activation kernel is launched.

    Returns:
        The configuration, the number of programs for each block of columns, the grid, and the sizes of a tile.
    """
    cfg = row_config(kernel, arch_of(device), dtype)
    num_n = cdiv(width, cfg.block_n)
    at_once = programs_at_once(device, cfg.num_warps, registers)
    per_block = min(cdiv(rows, cfg.block_m), max(1, at_once // max(1, num_n)))
    tile = {"BLOCK_M": cfg.block_m, "BLOCK_N": cfg.block_n, "NUM_STAGES": cfg.num_stages}
    return cfg, per_block, (per_block * num_n,), tile


def forward(x: Tensor, bias: Tensor, quick: bool) -> Callable[..., Tensor]:
    """Return the function that computes GELU(x + bias), or QuickGELU if ``quick``, by the Triton kernel."""
    strides, is_copied = row_strides(x)
    start = Start(_fwd_plan(x.device, x.dtype, num_rows(x), x.shape[-1], *strides, quick=quick))
    new_y = new_tensors(x)

    def compute(x: Tensor, bias: Tensor, _: bool, out: Tensor | None = None) -> Tensor:
        """Compute an activation with its bias by the kernel, for tensors of the planned layout; write it to ``out``."""
        y: Tensor = new_y() if out is None else out
        start(as_rows(x) if is_copied else x, bias.contiguous(), y)
        return y

    return compute


def backward(
    grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool, with_y: bool = False,
    row_tiles: Callable[..., Any] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Return the function that computes the gradients of bias and activation by the Triton kernel.

    With ``with_y``, that function also returns the activation y. With ``row_tiles``, which chooses the tiles of a
    kernel that holds whole rows, it returns the values and the scales of dx in 8 bits at the end.
    """
    width = x.shape[-1]
    (grad_strides, grad_copied), (strides, x_copied) = row_strides(grad), row_strides(x)
    plan, per_block = _bwd_plan(
        x.device, x.dtype, num_rows(x), width, *grad_strides, *strides, quick=quick, with_sums=with_sums,
        row_tiles=row_tiles,
    )  # fmt: skip
    start, new_dx = Start(plan), new_tensors(x)
    new_values, new_scale = new_tensors(x, None, E4M3), new_tensors(x, x.shape[:-1], torch.float32)
    new_sums = new_tensors(x, (per_block, width if with_sums else 0), torch.float32)

    def compute(grad: Tensor, x: Tensor, bias: Tensor, *_: bool) -> tuple[Tensor | None, ...]:
        """Compute the gradients of an activation and its bias by the kernels, for tensors of the planned layout."""
        dx, sums, y = new_dx(), new_sums(), new_dx() if with_y else None
        rows = (None, None) if row_tiles is None else (new_values(), new_scale())
        grad, x = as_rows(grad) if grad_copied else grad, as_rows(x) if x_copied else x
        start(grad, x, bias.contiguous(), dx, sums, *rows, y)
        found = dx, sums.sum(0) if with_sums else None, *((y,) if with_y else ())
        return found if row_tiles is None else (*found, *rows)

    return compute

"""Host side of the kernels for rows in 8 bits. Each function plans the launch for tensors with the memory layout of its
arguments, and returns the function that computes all calls with this layout; ``cpu`` has the same functions for CPUs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..activation import launches as activation
from ..common import as_rows, cdiv, new_tensors, next_power_of_2, num_rows, row_strides
from ..configs import RowConfig, planned
from ..fp8_rows import E4M3, LARGEST
from ..launch import Start, plan_start, programs_at_once
from .cpu import with_rows
from .kernels import (
    _bias_act_fp8_fwd_kernel,
    _dequantize_rows_kernel,
    _maxima_kernel,
    _quantize_both_kernel,
    _quantize_rows_kernel,
)

MAX_WIDTH = 16384
# The widest rows that an activation's backward kernel holds whole and rounds to 8 bits. By the model of an H100, a
# kernel that does not hold rows, and another one that rounds its result, take less time for wider rows.
MAX_GRAD_WIDTH = 4096
REGISTERS = 96  # about how many registers a thread of the kernels for rows takes
# The tile of the kernels that round a matrix along rows and columns. It is also stored transposed, in rows of 64 bytes.
TILE = RowConfig(64, 64, num_warps=4, num_stages=1)

Rounded = tuple[Tensor, Tensor]


@planned
def row_tiles(rows: int, width: int, device: torch.device, numbers: int = 32) -> tuple[RowConfig, int, dict[str, int]]:
    """Choose the tiles of a kernel on whole rows [M, N]: ``numbers`` numbers for each thread, three tiles in flight.

    Returns:
        The configuration, the number of programs, and the compile-time sizes of a tile.
    """
    block_n = next_power_of_2(width)
    block_m = max(1, 1024 // block_n)
    cfg = RowConfig(block_m, block_n, num_warps=max(1, block_m * block_n // (32 * numbers)), num_stages=3)
    programs = min(cdiv(rows, block_m), programs_at_once(device, cfg.num_warps, REGISTERS))
    return cfg, programs, {"BLOCK_M": block_m, "BLOCK_N": block_n, "NUM_STAGES": cfg.num_stages}


def _row_start(kernel: Any, x: Tensor, strides: tuple[int, ...], **constexprs: Any) -> Start:
    """Return the :class:`Start` of a kernel that takes whole rows of ``x`` [..., N]."""
    rows, width = num_rows(x), x.shape[-1]
    cfg, programs, tile = row_tiles(rows, width, x.device)
    return plan_start(kernel, (programs,), rows, *strides, config=cfg, device=x.device, N=width, **tile, **constexprs)


def quantize(x: Tensor, dtype: torch.dtype, *, carried: bool = False) -> Callable[[Tensor], Any]:
    """Return the function that rounds rows like ``x`` to 8 bits, and returns the carrier (if ``carried``), the values
    and the scales.
    """
    strides, is_copied = row_strides(x)
    start = _row_start(_quantize_rows_kernel, x, strides, MOST=LARGEST[dtype])
    new_values, new_scale = new_tensors(x, None, dtype), new_tensors(x, x.shape[:-1], torch.float32)
    new_carrier, shape = new_tensors(x, ()), x.shape

    def compute(x: Tensor) -> Any:
        """Round rows of the planned layout to 8 bits."""
        values, scale = new_values(), new_scale()
        carrier = new_carrier() if carried else None
        start(as_rows(x) if is_copied else x, values, scale, carrier)
        return (carrier.expand(shape), values, scale) if carrier is not None else (values, scale)

    return compute


def bias_act(x: Tensor, bias: Tensor, quick: bool) -> Callable[..., Any]:
    """Return the function that computes GELU(x + bias), or QuickGELU, as carrier, values and scales of 8-bit rows."""
    strides, is_copied = row_strides(x)
    start = _row_start(_bias_act_fp8_fwd_kernel, x, strides, MOST=LARGEST[E4M3], IS_QUICK=quick)
    new_values, new_scale = new_tensors(x, None, E4M3), new_tensors(x, x.shape[:-1], torch.float32)
    new_carrier, shape = new_tensors(x, ()), x.shape

    def compute(x: Tensor, bias: Tensor, _: bool) -> tuple[Tensor, ...]:
        """Compute an activation with its bias in 8 bits, for tensors of the planned layout."""
        carrier, values, scale = new_carrier(), new_values(), new_scale()
        start(as_rows(x) if is_copied else x, bias.contiguous(), values, scale, carrier)
        return carrier.expand(shape), values, scale

    return compute


def _grad_tiles(rows: int, width: int, device: torch.device) -> tuple[RowConfig, int, dict[str, int]]:
    """Choose the tiles of whole rows of an activation's backward kernel, with fewer numbers for each thread, since it
    holds a tile of x, one of the upstream gradient, and sums.
    """
    cfg, programs, tile = row_tiles(rows, width, device, 16)
    return replace(cfg, max_registers=128), programs, tile


def _grad_and_y_tiles(rows: int, width: int, device: torch.device) -> tuple[RowConfig, int, dict[str, int]]:
    """Choose the tiles of an activation's backward kernel that also writes the activation y, and would spill registers
    with as many numbers for each thread as other backward kernels have.
    """
    cfg, programs, tile = row_tiles(rows, width, device, 8)
    return replace(cfg, max_registers=80), programs, tile


def bias_act_bwd(
    grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool, with_y: bool = False
) -> Callable[..., Any]:
    """Return the function that computes the gradients of bias and activation, the activation y as well if ``with_y``,
    and the gradient of x in 8 bits.
    """
    args = grad, x, bias, quick, with_sums, with_y
    if x.shape[-1] <= MAX_GRAD_WIDTH:
        return activation.backward(*args, row_tiles=_grad_and_y_tiles if with_y else _grad_tiles)
    return with_rows(activation.backward(*args), lambda found: found[0], quantize(new_tensors(x)(), E4M3))


def dequantize(values: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that widens 8-bit rows like ``values`` (contiguous) and their scales to rows in ``dtype``."""
    start, new_rows = _row_start(_dequantize_rows_kernel, values, ()), new_tensors(values, None, dtype)

    def compute(values: Tensor, scale: Tensor) -> Tensor:
        """Widen rows in 8 bits of the planned layout."""
        rows: Tensor = new_rows()
        start(values, scale, rows)
        return rows

    return compute


def quantize_both(x: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    """Return the function that rounds a matrix like ``x`` [M, N] to 8 bits along its rows, and along its columns.

    It returns the values and the scales of the rows, and those of the columns as rows [N, M].
    """
    m, n = x.shape
    first, second = _both_starts(x, dtype)
    new_values, new_scale = new_tensors(x, None, dtype), new_tensors(x, (m,), torch.float32)
    new_columns, new_column_scale = new_tensors(x, (n, m), dtype), new_tensors(x, (n,), torch.float32)

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        """Round a matrix of the planned layout to 8 bits along its rows and its columns."""
        row_max, column_max = x.new_zeros(m, dtype=torch.int32), x.new_zeros(n, dtype=torch.int32)
        first(x, None, row_max, column_max)
        found = new_values(), new_scale(), new_columns(), new_column_scale()
        second(x, None, row_max, column_max, *found)
        return found

    return compute


def quantize_columns(values: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Any]:
    """Return the function that rounds the columns of rows in 8 bits like ``values`` [M, N], given with their scales.

    It returns the values and the scales of the columns as rows [N, M].
    """
    m, n = values.shape
    first, second = _both_starts(values, dtype)
    new_columns, new_scale = new_tensors(values, (n, m), dtype), new_tensors(values, (n,), torch.float32)

    def compute(values: Tensor, scale: Tensor) -> Rounded:
        """Round the columns of rows in 8 bits that have the planned layout."""
        column_max = values.new_zeros(n, dtype=torch.int32)
        first(values, scale, None, column_max)
        found = new_columns(), new_scale()
        second(values, scale, None, column_max, None, None, *found)
        return found

    return compute


def _both_starts(x: Tensor, dtype: torch.dtype) -> tuple[Start, Start]:
    """Return the :class:`Start` of the kernel that finds the maxima of a matrix's rows and columns, and of the kernel
    that rounds rows and columns to 8 bits.
    """
    m, n = x.shape
    grid = (cdiv(m, TILE.block_m) * cdiv(n, TILE.block_n),)
    numbers, device = (m, n, *x.stride()), x.device
    blocks = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    return (
        plan_start(_maxima_kernel, grid, *numbers, config=TILE, device=device, **blocks),
        plan_start(_quantize_both_kernel, grid, *numbers, config=TILE, device=device, MOST=LARGEST[dtype], **blocks),
    )

"""The form in which the Triton kernels of the contrastive losses take features, and the start of the kernels.

Kernels take tiles of features by tensor descriptors where the products load from shared memory, otherwise by pointers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import aligned_stride, cdiv, matrix_tiles, new_rows, new_tensors
from ..configs import GemmConfig, RowConfig, gemm_config, planned, row_config, smaller_gemm_configs
from ..hardware import architecture
from ..launch import RECORDED_MULTIPROCESSORS, Plan, arch_of, launch, multiprocessors
from .kernels import _normalize_kernel
from .one_block_kernels import _totals_kernel
from .stats import Features

TOTALS = RowConfig(block_m=1, block_n=512, num_warps=4, num_stages=1)  # a program adds up block_n numbers at a time
GROUP_M = 8
Tile = tuple[int, int] | None  # the rows and columns of a tile that a descriptor loads; None if pointers load it
Describe = Callable[[Tensor, Tile], Tensor | TensorDescriptor]  # makes descriptors as :func:`tiles` does


class Layout(NamedTuple):
    """A block of logits, as far as launches depend on it: features [M, D] against features [N, D]."""

    device: torch.device
    dtype: torch.dtype
    m: int
    n: int
    d: int
    offset: int
    stride_x: int
    stride_y: int


def tiles(matrix: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
    """Return a descriptor of tiles of features or of G; the matrix itself if ``tile`` is None."""
    return matrix if tile is None else matrix_tiles(matrix, *tile)


class TilePlan(NamedTuple):
    """A launch of a kernel whose programs each take a tile of the logits x y^T."""

    plan: Plan
    x_tile: Tile
    y_tile: Tile

    def start(self, x: Tensor, y: Tensor, *others: Tensor | TensorDescriptor, describe: Describe = tiles) -> None:
        """Start a kernel on tiles of logits with its other tensors."""
        self.plan.start(describe(x, self.x_tile), describe(y, self.y_tile), *others)


def layout_of(x: Tensor, y: Tensor, offset: int) -> Layout:
    """Return the layout of the logits of x against y."""
    m, d = x.shape
    return Layout(x.device, x.dtype, m, y.shape[0], d, offset, x.stride(0), y.stride(0))


def prepare(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> Features:
    """Return features ``x`` [M, D] as :func:`prepare_both` does."""
    return prepare_both(x, x[:0], dtype, normalize=True)[0] if normalize else _aligned(x.to(dtype))


def prepare_both(x: Tensor, y: Tensor, dtype: torch.dtype, *, normalize: bool) -> tuple[Features, Features]:
    """Return features [M, D] and [N, D] for the products of logits, in ``dtype``; with ``normalize``, as unit rows.

    Rows have unit stride and start at multiples of 16 bytes.
    """
    if not normalize:
        return _aligned(x.to(dtype)), _aligned(y.to(dtype))
    (m, d), n = x.shape, y.shape[0]
    first = Features(new_rows(x, m, d, dtype), vector(x, m))
    second = Features(new_rows(y, n, d, dtype), vector(y, n))
    plan = _normalize_plan(
        x.device, x.dtype, m, n, d, (*x.stride(), *y.stride(), first.rows.stride(0), second.rows.stride(0))
    )
    plan.start(x, y, first.rows, second.rows, first.inv_norm, second.inv_norm)
    return first, second


@planned
def _normalize_plan(device: torch.device, dtype: torch.dtype, m: int, n: int, d: int, strides: tuple[int, ...]) -> Plan:
    """Return the plan of the kernel that normalises the features of both sides of the logits."""
    cfg = row_config("contrastive_rows", arch_of(device), dtype)
    grid = (cdiv(m, cfg.block_m) + cdiv(n, cfg.block_m),)
    return Plan(
        _normalize_kernel, grid, m, n, d, *strides, config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n
    )


def copy_of(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> Callable[[Tensor], Tensor] | None:
    """Return the function that copies features with the layout of ``x`` as :func:`prepare_both` would copy them.

    Return None if it would not. Only features that do not start at a multiple of 16 bytes are left for it to copy.
    """
    if normalize or (x.dtype == dtype and _has_aligned_rows(x)):
        return None
    new = new_tensors(x, dtype=dtype, strides=(aligned_stride(x.shape[1], dtype), 1))
    return lambda x: new().copy_(x)


def _aligned(x: Tensor) -> Features:
    """Return features that are not to be normalised, copied if tensor descriptors cannot describe their rows."""
    is_aligned = _has_aligned_rows(x) and x.data_ptr() % 16 == 0
    return Features(x if is_aligned else new_rows(x, *x.shape).copy_(x), None)


def vector(like: Tensor, *size: int) -> Tensor:
    """Return an uninitialised float32 vector for rows or columns of logits, on the device of ``like``."""
    return like.new_empty(size, dtype=torch.float32)


def totals_plan(
    device: torch.device, rows: int, count: int, weight: float, *, has_flags: bool, has_grad_loss: bool
) -> Plan:
    """Plan a launch that adds up the numbers of a contrastive loss.

    Its tensors are numbers [rows, count], flags [count], grad_loss [], first [1], rest [rows - 1] and flag []. It
    writes ``weight`` times the sum of each row of numbers to ``first`` and then ``rest``; if ``has_grad_loss``, times
    ``grad_loss`` too; if ``has_flags``, it writes to ``flag`` whether all flags are 1. Any tensor may take the place of
    one that is not used.
    """
    return Plan(
        _totals_kernel, (rows,), count, weight,
        config=TOTALS, device=device, BLOCK=TOTALS.block_n, HAS_FLAGS=has_flags, HAS_GRAD_LOSS=has_grad_loss,
    )  # fmt: skip


def rows_config(x: Tensor) -> RowConfig:
    """Return the configuration of kernels whose programs each take some rows of features."""
    return row_config("contrastive_rows", arch_of(x.device), x.dtype)


def launch_on_rows(
    kernel: triton.JITFunction, cfg: RowConfig, x: Tensor, *args: Tensor | float, **constants: bool
) -> None:
    """Launch a kernel of the contrastive losses whose programs each take some rows of its first argument."""
    launch(
        kernel, (cdiv(len(x), cfg.block_m),), x, *args,
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n, **constants,
    )  # fmt: skip


def plan_on_tiles(
    kernel: triton.JITFunction, programs: int, cfg: GemmConfig, layout: Layout, *numbers: float, **constants: Any
) -> TilePlan:
    """Plan a launch of a kernel whose programs each take a tile of the logits x y^T.

    Its arguments are x, y, other tensors, the sizes and strides of x and y, and ``numbers``.
    """
    plan = Plan(
        kernel, (programs,), *layout[2:], *numbers, config=cfg, device=layout.device,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, GROUP_M=GROUP_M,
        IS_TMA=has_tma(layout.device, layout.dtype, layout.d), **constants,
    )  # fmt: skip
    return TilePlan(plan, tile_of(cfg.block_m, cfg.block_k, layout), tile_of(cfg.block_n, cfg.block_k, layout))


def tile_config(
    kernel: str, device: torch.device, dtype: torch.dtype, *sizes: tuple[int, int], copies: int = 1
) -> GemmConfig:
    """Return the configuration of a contrastive kernel that computes ``copies`` matrices of each of ``sizes`` in one
    launch.

    If its tiles leave some multiprocessors idle, smaller ones may take less time. The time is taken to be proportional
    to the number of rounds in which the tiles run, times the numbers that a step of a tile's loop loads.
    """
    arch, at_once = arch_of(device), processors(device)

    def tiles_of(cfg: GemmConfig) -> int:
        """Return the number of tiles of logits or gradients in one launch with this configuration."""
        return copies * sum(cdiv(rows, cfg.block_m) * cdiv(cols, cfg.block_n) for rows, cols in sizes)

    def time_of(cfg: GemmConfig) -> int:
        """Return the estimated time of a launch on tiles of logits with this configuration."""
        return cdiv(tiles_of(cfg), at_once) * (cfg.block_m + cfg.block_n)

    cfg = gemm_config(kernel, arch, dtype)
    return cfg if tiles_of(cfg) >= at_once else min((cfg, *smaller_gemm_configs(kernel, arch, dtype)), key=time_of)


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of the GPU that computes the logits."""
    return multiprocessors(device, RECORDED_MULTIPROCESSORS)


def has_tma(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return True if products of features [M, width] load their tiles through tensor descriptors.

    Float32 products do not: they stay exact, so they do not use the matrix units that read shared memory. For a width
    of 0 there is no tile, and a descriptor of an empty tensor would be an error.
    """
    return dtype.itemsize == 2 and width > 0 and architecture(arch_of(device)).multiplies_from_shared


def tile_of(rows: int, cols: int, layout: Layout) -> Tile:
    """Return the tile of features in a descriptor, or None if the products load by pointers."""
    return (rows, cols) if has_tma(layout.device, layout.dtype, layout.d) else None


def _has_aligned_rows(x: Tensor) -> bool:
    """Return True if a tensor descriptor can describe the rows of these features, if the first one is aligned."""
    # A stride below the width belongs to expanded or overlapping rows, which a tensor descriptor cannot describe.
    is_matrix = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return is_matrix and x.stride(0) * x.dtype.itemsize % 16 == 0

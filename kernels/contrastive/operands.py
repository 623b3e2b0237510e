"""The form in which the Triton kernels of the contrastive losses take features, and the start of the kernels.

Kernels take tiles of features by tensor descriptors where the products load from shared memory, otherwise by pointers.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import cdiv, matrix_tiles, new_rows
from ..configs import GemmConfig, RowConfig, gemm_config, row_config, small_gemm_config
from ..hardware import architecture
from ..launch import arch_of, launch
from .kernels import _normalize_kernel
from .one_block_kernels import _totals_kernel
from .stats import Features

TOTALS = RowConfig(block_m=1, block_n=512, num_warps=4, num_stages=1)  # block_n numbers at a time
GROUP_M = 8


def prepare(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> Features:
    """Return features ``x`` [M, D] as :func:`prepare_both` does."""
    return prepare_both(x, x[:0], dtype, normalize=True)[0] if normalize else _aligned(x.to(dtype))


def prepare_both(x: Tensor, y: Tensor, dtype: torch.dtype, *, normalize: bool) -> tuple[Features, Features]:
    """Return features [M, D] and [N, D] for the products of logits, in ``dtype``; with ``normalize``, as unit rows.

    Rows have unit stride and start at multiples of 16 bytes.
    """
    if not normalize:
        return _aligned(x.to(dtype)), _aligned(y.to(dtype))
    cfg, (m, d), n = rows_config(x), x.shape, len(y)
    found = [Features(new_rows(side, len(side), d, dtype), vector(side, len(side))) for side in (x, y)]
    (x_out, x_inv_norm), (y_out, y_inv_norm) = found
    launch(
        _normalize_kernel, (cdiv(m, cfg.block_m) + cdiv(n, cfg.block_m),),
        x, y, x_out, y_out, x_inv_norm, y_inv_norm, m, n, d, *x.stride(), *y.stride(), x_out.stride(0), y_out.stride(0),
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n,
    )  # fmt: skip
    return found[0], found[1]


def _aligned(x: Tensor) -> Features:
    """Return features that are not to be normalised, copied if tensor descriptors cannot describe their rows."""
    return Features(x if _is_aligned(x) else new_rows(x, *x.shape).copy_(x), None)


def vector(like: Tensor, *size: int) -> Tensor:
    """Return an uninitialised float32 tensor on the device of ``like``."""
    return like.new_empty(size, dtype=torch.float32)


def totals(
    numbers: Tensor, weight: float, first: Tensor, rest: Tensor | None = None, *,
    grad_loss: Tensor | None = None, flags: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write ``weight`` times the sum of each row of ``numbers`` [R, any] to ``first`` [1] and then ``rest`` [R - 1].

    With ``grad_loss`` [], the sums are multiplied by it too. With ``flags``, a vector and a result [], the result is
    whether all flags are 1.
    """
    given, flag = flags or (numbers, numbers)
    launch(
        _totals_kernel, (len(numbers),), numbers, given, first if grad_loss is None else grad_loss,
        first, first if rest is None else rest, flag, numbers.shape[1], weight,
        config=TOTALS, device=numbers.device, BLOCK=TOTALS.block_n,
        HAS_FLAGS=flags is not None, HAS_GRAD_LOSS=grad_loss is not None,
    )  # fmt: skip


def rows_config(x: Tensor) -> RowConfig:
    """Return the configuration of kernels that walk rows of features."""
    return row_config("contrastive_rows", arch_of(x.device), x.dtype)


def launch_on_rows(
    kernel: triton.JITFunction, cfg: RowConfig, x: Tensor, *args: Tensor | float, **constants: bool
) -> None:
    """Launch a kernel of the contrastive losses whose programs each take some rows of its first argument."""
    launch(
        kernel, (cdiv(len(x), cfg.block_m),), x, *args,
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n, **constants,
    )  # fmt: skip


def launch_on_tiles(
    kernel: triton.JITFunction, programs: int, cfg: GemmConfig, x: Tensor, y: Tensor, offset: int,
    pointers: tuple[Tensor | TensorDescriptor, ...], *numbers: float, **constants: float,
) -> None:  # fmt: skip
    """Launch a kernel of the contrastive losses whose programs each take a tile of the logits x y^T.

    Its arguments are x, y, ``pointers``, the sizes and strides of x and y, and ``numbers``.
    """
    launch(
        kernel, (programs,), tiles(x, cfg.block_m, cfg.block_k, x), tiles(y, cfg.block_n, cfg.block_k, x), *pointers,
        len(x), len(y), x.shape[1], offset, x.stride(0), y.stride(0), *numbers,
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        GROUP_M=GROUP_M, IS_TMA=has_tma(x), **constants,
    )  # fmt: skip


def tile_config(kernel: str, x: Tensor, sizes: list[tuple[int, int]], at_once: int) -> GemmConfig:
    """Return the configuration of a kernel that computes matrices of ``sizes`` in one launch, for features like ``x``.

    If its tiles leave some of the ``at_once`` multiprocessors idle, smaller ones may take less time: it is proportional
    to the rounds of tiles and to the size of a tile.
    """
    cfg, small = gemm_config(kernel, arch_of(x.device), x.dtype), small_gemm_config(kernel, arch_of(x.device), x.dtype)

    def tiles_of(cfg: GemmConfig) -> int:
        return sum(cdiv(rows, cfg.block_m) * cdiv(cols, cfg.block_n) for rows, cols in sizes)

    def time_of(cfg: GemmConfig) -> int:
        return cdiv(tiles_of(cfg), at_once) * cfg.block_m * cfg.block_n

    if small is None or tiles_of(cfg) >= at_once or time_of(small) >= time_of(cfg):
        return cfg
    return small


def has_tma(x: Tensor) -> bool:
    """Return True if products of features ``x`` [M, D] load their tiles through tensor descriptors.

    Float32 products do not: they stay exact, so they do not use the matrix units that read shared memory. For D = 0
    there is no tile, and a descriptor of an empty tensor would be an error.
    """
    return x.dtype.itemsize == 2 and x.shape[1] > 0 and architecture(arch_of(x.device)).multiplies_from_shared


def tiles(matrix: Tensor, rows: int, cols: int, x: Tensor) -> Tensor | TensorDescriptor:
    """Return a descriptor of tiles [rows, cols] of a matrix, or the matrix if products of ``x`` load by pointers."""
    return matrix_tiles(matrix, rows, cols) if has_tma(x) else matrix


def _is_aligned(x: Tensor) -> bool:
    # A stride below the width belongs to expanded or overlapping rows, which a tensor descriptor cannot describe.
    is_matrix = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return is_matrix and x.stride(0) * x.dtype.itemsize % 16 == 0 and x.data_ptr() % 16 == 0

"""The work on blocks of logits by Triton kernels: their launches. ``logit_blocks`` describes the functions."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import LOG2E, slices
from ..configs import GemmConfig, RowConfig, gemm_config, row_config
from ..hardware import architecture
from ..launch import arch_of, launch, multiprocessors
from .feature_kernels import _finish_kernel, _normalize_kernel, _products_kernel
from .features import Features
from .sigmoid_kernels import _sigmoid_grad_tile_kernel, _sigmoid_sums_kernel
from .softmax_kernels import _grad_tile_kernel, _merge_kernel, _online_stats_kernel, _stats_kernel
from .softmax_stats import Normalizers, SoftmaxStats, is_exact, new_stats, shared_shift

# The most rows and columns of a block of logits: their sums by tile take at most 64 MiB, whatever M and N are.
MAX_EDGE = 16384
MERGE = RowConfig(block_m=256, block_n=1, num_warps=4, num_stages=1)
RECORDED_MULTIPROCESSORS = 132  # those of an H100, where launches are recorded without a GPU
GROUP_M = 8


@contextlib.contextmanager
def small_blocks(edge: int) -> Iterator[None]:
    """Take blocks of at most ``edge`` rows and columns, so that a few features already need several blocks."""
    global MAX_EDGE
    before, MAX_EDGE = MAX_EDGE, edge
    try:
        yield
    finally:
        MAX_EDGE = before


def _blocks(x: Tensor, y: Tensor, edge: int) -> Iterator[tuple[slice, slice]]:
    return itertools.product(slices(len(x), edge), slices(len(y), edge))


def prepare(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> Features:
    """Return rows in ``dtype`` with unit stride, each of which starts at a multiple of 16 bytes."""
    if not normalize:
        x = x.to(dtype)
        return Features(x if _is_aligned(x) else _new_aligned(x.shape, x).copy_(x), None)
    (n, d), device = x.shape, x.device
    out = _new_aligned(x.shape, x.new_empty(0, dtype=dtype))
    inv_norm = x.new_empty(n, dtype=torch.float32)
    cfg = row_config("contrastive_rows", arch_of(device), x.dtype)
    launch(
        _normalize_kernel, (triton.cdiv(n, cfg.block_m),), x, out, inv_norm, n, d, *x.stride(), out.stride(0),
        config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n,
    )  # fmt: skip
    return Features(out, inv_norm)


def new_accumulator(rows: int, like: Tensor) -> Tensor:
    """Return zeros [rows, D] in float32."""
    return like.new_zeros(rows, like.shape[1], dtype=torch.float32)


def strips(x: Tensor) -> list[slice]:
    """Return strips as high as the blocks of G."""
    return slices(len(x), _block_edge(x))


def statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> SoftmaxStats:
    """Take one product if the shared shift is exact; only the device knows, so the kernels of both cases start."""
    result = new_stats(x, y)
    _accumulate_stats(x, y, logit_scale, offset, result, is_online=False)
    shift = shared_shift(logit_scale)
    result.row_max.copy_(shift)
    result.col_max.copy_(shift)
    result.uses_shared_shift.copy_(is_exact(result.row_sum, result.col_sum))
    _accumulate_stats(x, y, logit_scale, offset, result, is_online=True)
    return result


def _accumulate_stats(
    x: Tensor, y: Tensor, logit_scale: Tensor, offset: int, result: SoftmaxStats, *, is_online: bool
) -> None:
    cfg = gemm_config(f"contrastive_{'online_stats' if is_online else 'stats'}", arch_of(x.device), x.dtype)
    # These hold the sums of each tile's rows and of its columns; where maxima are taken, they come before the sums.
    most_rows, most_cols = min(MAX_EDGE, len(x)), min(MAX_EDGE, len(y))
    sizes = triton.cdiv(most_cols, cfg.block_n) * most_rows, triton.cdiv(most_rows, cfg.block_m) * most_cols
    of_rows, of_cols = (result.row_sum.new_empty(2 if is_online else 1, size) for size in sizes)
    for rows, cols in _blocks(x, y, MAX_EDGE):
        m, n = rows.stop - rows.start, cols.stop - cols.start
        num_m, num_n = triton.cdiv(m, cfg.block_m), triton.cdiv(n, cfg.block_n)
        kernel, programs, buffers = _stats_kernel, num_m * num_n, (of_rows[0], of_cols[0])
        if is_online:
            programs = min(programs, 2 * multiprocessors(x.device, RECORDED_MULTIPROCESSORS))
            kernel, buffers = _online_stats_kernel, (result.uses_shared_shift, *of_rows, *of_cols)
        _launch_on_tiles(
            kernel, programs, cfg, x[rows], y[cols], logit_scale, *buffers, result.positive[rows],
            m, n, x.shape[1], offset + rows.start - cols.start, x.stride(0), y.stride(0), LOG2E,
        )  # fmt: skip
        sides = (
            (of_rows, num_n, m, result.row_max[rows], result.row_sum[rows], cols.start == 0),
            (of_cols, num_m, n, result.col_max[cols], result.col_sum[cols], rows.start == 0),
        )
        for buffer, count, size, maximum, total, is_first in sides:
            launch(
                _merge_kernel, (triton.cdiv(size, MERGE.block_m),), buffer[0], buffer[-1], maximum, total,
                result.uses_shared_shift, count, size, config=MERGE, device=x.device,
                BLOCK=MERGE.block_m, IS_ONLINE=is_online, IS_FIRST=is_first,
            )  # fmt: skip


def add_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, offset: int,
    acc_x: Tensor | None, acc_y: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Add grad_scale * G y to acc_x and grad_scale * G^T x to acc_y; return the sum of G_ij x_i . y_j."""

    def inputs(rows: slice, cols: slice) -> tuple[Tensor, ...]:
        row, col, uses_shared_shift = normalizers.part(rows, cols)
        return logit_scale, uses_shared_shift, row[0], row[1], col[0], col[1]

    cfg = gemm_config("contrastive_grad_tile", arch_of(x.device), x.dtype)
    return _add_products(_grad_tile_kernel, cfg, x, y, offset, inputs, (LOG2E,), acc_x, acc_y)


def sigmoid_sums(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum of losses, sum of probabilities, and logits of the pairs."""
    positive = x.new_empty(len(x), dtype=torch.float32)
    totals = x.new_zeros(2, dtype=torch.float64)
    cfg = gemm_config("sigmoid_sums", arch_of(x.device), x.dtype)
    for rows, cols in _blocks(x, y, MAX_EDGE):
        m, n = rows.stop - rows.start, cols.stop - cols.start
        tiles = triton.cdiv(m, cfg.block_m) * triton.cdiv(n, cfg.block_n)
        of_tiles = x.new_empty(2, tiles, dtype=torch.float32)
        _launch_on_tiles(
            _sigmoid_sums_kernel, tiles, cfg, x[rows], y[cols], logit_scale, logit_bias, *of_tiles, positive[rows],
            m, n, x.shape[1], offset + rows.start - cols.start, x.stride(0), y.stride(0),
        )  # fmt: skip
        totals += of_tiles.sum(1, dtype=torch.float64)
    return totals[0], totals[1], positive


def add_sigmoid_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, acc_x: Tensor, acc_y: Tensor
) -> Tensor | None:
    """Add grad_scale * G y to acc_x and grad_scale * G^T x to acc_y; return the sum of G_ij x_i . y_j."""
    cfg = gemm_config("sigmoid_grad_tile", arch_of(x.device), x.dtype)
    inputs = logit_scale, logit_bias
    return _add_products(_sigmoid_grad_tile_kernel, cfg, x, y, offset, lambda *_: inputs, (), acc_x, acc_y)


def _add_products(
    kernel: triton.JITFunction, cfg: GemmConfig, x: Tensor, y: Tensor, offset: int,
    inputs: Callable[[slice, slice], tuple[Tensor, ...]], constants: tuple[float, ...],
    acc_x: Tensor | None, acc_y: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Add grad_scale * G y to acc_x and grad_scale * G^T x to acc_y, block by block.

    Args:
        kernel: writes a tile of grad_scale * G, and the sum of grad_scale * G_ij x_i . y_j over the tile.
        inputs: ``inputs(rows, cols)`` returns what the kernel takes besides features to compute a block of G.
        constants: what it takes after the strides.

    Returns:
        Sum of G_ij x_i . y_j, [] in float64, taken before G is rounded to 16 bits. The accumulators already contain
        the rounding error of G, so a gradient of the scale taken from them would contain it too. None if G is float32:
        it is not rounded.
    """
    total = x.new_zeros((), dtype=torch.float64)
    edge, grad_scale = _block_edge(x), _grad_scale(x.dtype)
    buffer = _new_aligned((min(edge, len(x)), min(edge, len(y))), x)
    for rows, cols in _blocks(x, y, edge):
        m, n = rows.stop - rows.start, cols.stop - cols.start
        grad = buffer[:m, :n]
        scale_sums = grad.new_empty(triton.cdiv(m, cfg.block_m) * triton.cdiv(n, cfg.block_n), dtype=torch.float32)
        _launch_on_tiles(
            kernel, len(scale_sums), cfg, x[rows], y[cols], _tiles(grad, cfg.block_m, cfg.block_n // 2, x),
            *inputs(rows, cols), scale_sums, m, n, x.shape[1], offset + rows.start - cols.start,
            x.stride(0), y.stride(0), grad.stride(0), *constants, grad_scale,
        )  # fmt: skip
        total += scale_sums.sum(dtype=torch.float64)
        acc_rows = None if acc_x is None else acc_x[rows]
        acc_cols = None if acc_y is None else acc_y[cols]
        _launch_products(grad, x[rows], y[cols], acc_rows, acc_cols)
    return total / grad_scale if x.dtype.itemsize == 2 else None


def _launch_products(grad: Tensor, x: Tensor, y: Tensor, acc_x: Tensor | None, acc_y: Tensor | None) -> None:
    (m, n), d = grad.shape, x.shape[1]
    cfg = gemm_config("contrastive_products", arch_of(x.device), x.dtype)
    num_d = triton.cdiv(d, cfg.block_n)
    num_x_tiles = 0 if acc_x is None else triton.cdiv(m, cfg.block_m) * num_d
    num_y_tiles = 0 if acc_y is None else triton.cdiv(n, cfg.block_m) * num_d
    unused = x.new_empty(0, dtype=torch.float32)
    launch(
        _products_kernel, (num_x_tiles + num_y_tiles,),
        _tiles(grad, cfg.block_m, cfg.block_k, x), _tiles(grad, cfg.block_k, cfg.block_m, x),
        _tiles(x, cfg.block_k, cfg.block_n, x), _tiles(y, cfg.block_k, cfg.block_n, x),
        unused if acc_x is None else acc_x, unused if acc_y is None else acc_y,
        m, n, d, num_x_tiles, grad.stride(0), x.stride(0), y.stride(0),
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        IS_TMA=_has_tma(x),
    )  # fmt: skip


def finish(
    acc: Tensor, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor
) -> Tensor:
    """Write factor * (acc - one_minus_p * positive) to out, through the normalisation; return its product with own."""
    rows, inv_norm = own
    n, d = rows.shape
    dot = torch.empty_like(one_minus_p)
    cfg = row_config("contrastive_rows", arch_of(rows.device), rows.dtype)
    launch(
        _finish_kernel, (triton.cdiv(n, cfg.block_m),),
        acc, rows, other, one_minus_p, factor, one_minus_p if inv_norm is None else inv_norm, out, dot,
        n, len(other), d, offset, rows.stride(0), other.stride(0), 1.0 / _grad_scale(rows.dtype),
        config=cfg, device=rows.device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n, HAS_NORM=inv_norm is not None,
    )  # fmt: skip
    return dot


def _launch_on_tiles(
    kernel: triton.JITFunction, programs: int, cfg: GemmConfig, x: Tensor, y: Tensor,
    *args: Tensor | TensorDescriptor | float,
) -> None:  # fmt: skip
    """Launch a kernel whose programs take tiles of the products x y^T; ``args`` are its arguments after x and y."""
    launch(
        kernel, (programs,), _tiles(x, cfg.block_m, cfg.block_k, x), _tiles(y, cfg.block_n, cfg.block_k, x), *args,
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        GROUP_M=GROUP_M, IS_TMA=_has_tma(x),
    )  # fmt: skip


def _grad_scale(dtype: torch.dtype) -> float:
    """Return the constant that G is multiplied by before it is rounded.

    G lies in [0, 2] and is about 2/N at the start of training, which would be subnormal in float16.
    """
    return 2.0**14 if dtype == torch.float16 else 1.0


def _block_edge(x: Tensor) -> int:
    """Return the rows and columns of a block of G: then both products are one wave of tiles, and G stays in L2."""
    cfg = gemm_config("contrastive_products", arch_of(x.device), x.dtype)
    half = multiprocessors(x.device, RECORDED_MULTIPROCESSORS) // 2
    return min(MAX_EDGE, cfg.block_m * max(4, half // triton.cdiv(max(x.shape[1], 1), cfg.block_n)))


def _has_tma(x: Tensor) -> bool:
    """Return True if products of features ``x`` [M, D] load their tiles through tensor descriptors.

    Float32 products stay exact, so they do not use the matrix units for which descriptors bring tiles. Without a
    dimension, features have no tile, and a descriptor of nothing would be an error.
    """
    return architecture(arch_of(x.device)).multiplies_from_shared and x.dtype.itemsize == 2 and x.shape[1] > 0


def _tiles(matrix: Tensor, rows: int, cols: int, x: Tensor) -> Tensor | TensorDescriptor:
    """Return what ``load_tile`` takes for tiles [rows, cols] of a matrix in a product of features ``x``."""
    if not _has_tma(x):
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, cols])


def _is_aligned(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) * x.dtype.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def _new_aligned(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised matrix whose rows start at multiples of 16 bytes, as tensor descriptors need."""
    multiple = 16 // like.dtype.itemsize
    return like.new_empty(shape[0], triton.cdiv(shape[1], multiple) * multiple)[:, : shape[1]]

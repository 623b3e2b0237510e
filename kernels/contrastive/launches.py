"""The launches of the Triton kernels that compute blocks of logits for the contrastive losses.

A block is the logits of features x [M, D] against features y [N, D]; a pair is (i, i + offset), where both exist.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import LOG2E, cdiv, new_rows, slices
from ..configs import GemmConfig, gemm_config
from ..launch import RECORDED_MULTIPROCESSORS, arch_of, launch, multiprocessors
from .block_sizes import GradGrid, edges_of, grad_grid, segments_of_column, span
from .kernels import (
    _finish_kernel,
    _products_kernel,
    _sigmoid_grad_tile_kernel,
    _sigmoid_pairs_kernel,
    _sigmoid_sums_kernel,
)
from .operands import has_tma, launch_on_rows, launch_on_tiles, prepare, rows_config, tile_config, tiles, totals, vector
from .softmax_kernels import _grad_tile_kernel, _pairs_kernel, _stats_kernel
from .stats import Features, Normalizers, SoftmaxStats, pairs_in

__all__ = ["prepare"]  # the losses find it here as in ``cpu``

# The most rows and columns of a square block of logits. The sums of its tiles then take at most 64 MiB.
MAX_EDGE = 16384
CHUNK = 16  # tiles whose sums are added at a time
PART_COLS = 64  # the columns of a part: tiles are computed and stored part by part


@contextlib.contextmanager
def small_blocks(edge: int) -> Iterator[None]:
    """Limit blocks of logits to ``edge`` rows and columns, so that a test with few features has several blocks."""
    global MAX_EDGE
    before, MAX_EDGE = MAX_EDGE, edge
    try:
        yield
    finally:
        MAX_EDGE = before


def new_accumulator(rows: int, like: Tensor) -> Tensor:
    """Return zeros [rows, D] that gradients are added to, for prepared features ``like`` [any, D]."""
    return like.new_zeros(rows, like.shape[1], dtype=torch.float32)


def strips(x: Tensor, y: Tensor) -> list[slice]:
    """Return strips of the rows of x, as high as the blocks of G.

    Gradients are accumulated and finished strip by strip, so that accumulators stay small.
    """
    return slices(len(x), _block_edges(x, y)[0])


def statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> SoftmaxStats:
    """Return the statistics of the logits of x against y."""
    row, col, losses, flags = _pairs(x, y, logit_scale, offset)
    uses_shared_shift = flags.new_empty(())
    totals(losses, 0.0, vector(x), flags=(flags, uses_shared_shift))
    return SoftmaxStats(row[0], row[1], col[0], col[1], row[2], uses_shared_shift)


def pair_losses(
    x: Tensor, y: Tensor, logit_scale: Tensor, offset: int, *, both: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss of the pairs and the vectors for the gradient, as :func:`.stats.pair_losses`.

    Also return uses_shared_shift, as in :class:`.stats.SoftmaxStats`.
    """
    row, col, losses, flags = _pairs(x, y, logit_scale, offset, IS_LOSS=True, IS_BOTH=both)
    loss, uses_shared_shift = vector(x), flags.new_empty(())
    paired, _ = pairs_in(len(x), len(y), offset)
    # The mean over no pairs is NaN.
    terms = (2 if both else 1) * (paired.stop - paired.start)
    totals(losses, 1 / terms if terms else float("nan"), loss, flags=(flags, uses_shared_shift))
    return loss, row, col, uses_shared_shift


def _pairs(
    x: Tensor, y: Tensor, logit_scale: Tensor, offset: int, *, IS_LOSS: bool = False, IS_BOTH: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``_pairs_kernel`` stores: row [3, M], col [3, N], losses [1, any] and flags [any]."""
    m, n = len(x), len(y)
    row_sums, col_sums = _sums(x, y, logit_scale, offset)
    cfg = gemm_config("contrastive_pairs", arch_of(x.device), x.dtype)
    offset = max(-m, min(n, offset))  # any other offset has no pairs either
    first = min(0, -offset)
    programs = cdiv(max(m, n - offset) - first, cfg.block_m)
    row, col, losses = vector(x, 3, m), vector(x, 3, n), vector(x, 1, programs)
    flags = losses.new_empty(programs, dtype=torch.int8)
    launch(
        _pairs_kernel, (programs,), x, y, logit_scale, row_sums, col_sums, row, col, losses, flags,
        m, n, x.shape[1], offset, first, x.stride(0), y.stride(0), len(row_sums), len(col_sums), LOG2E,
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, CHUNK=CHUNK,
        IS_LOSS=IS_LOSS, IS_BOTH=IS_BOTH,
    )  # fmt: skip
    return row, col, losses, flags


def _sums(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Return sums of the rows [any, M] and of the columns [any, N] of tiles; of whole blocks if there are several."""
    row_edge, col_edge = (MAX_EDGE**2 // max(1, min(len(other), MAX_EDGE)) for other in (y, x))
    blocks = list(itertools.product(slices(len(x), row_edge), slices(len(y), col_edge)))
    if len(blocks) == 1:
        return _sums_of_block(x, y, logit_scale, offset)
    row_sums, col_sums = (x.new_zeros(1, len(side), dtype=torch.float32) for side in (x, y))
    for rows, cols in blocks:
        of_rows, of_cols = _sums_of_block(x[rows], y[cols], logit_scale, offset + rows.start - cols.start)
        row_sums[0, rows] += of_rows.sum(0)
        col_sums[0, cols] += of_cols.sum(0)
    return row_sums, col_sums


def _sums_of_block(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Return the sums with the shared shift of the rows and of the columns of the tiles of a block of logits."""
    cfg = tile_config("contrastive_stats", x, [(len(x), len(y))], processors(x))
    num_m, num_n = cdiv(len(x), cfg.block_m), cdiv(len(y), cfg.block_n)
    segments, height = segments_of_column(num_m, num_n, processors(x)) if has_tma(x) else (num_m, 1)
    of_rows, of_cols = vector(x, num_n, len(x)), vector(x, segments, len(y))
    launch_on_tiles(
        _stats_kernel, segments * num_n, cfg, x, y, offset, (logit_scale, of_rows, of_cols), segments, height, LOG2E,
        WARP_ROWS=min(16 * cfg.num_warps, cfg.block_m),
    )  # fmt: skip
    return of_rows, of_cols


def add_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, offset: int,
    acc_x: Tensor | None, acc_y: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Add G y to acc_x [M, D] and G^T x to acc_y [N, D], from one computation of G; one of the two may be None.

    Both are multiplied by a constant that :func:`finish` takes out again.

    Returns:
        If G is rounded to 16 bits for the products: [any], numbers whose sum is the sum of G_ij x_i . y_j before the
        rounding. If G is not rounded: None, since :func:`finish` then gives this sum with the same accuracy.
    """

    def inputs(rows: slice, cols: slice) -> tuple[Tensor, ...]:
        row, col, uses_shared_shift = normalizers.part(rows, cols)
        return logit_scale, uses_shared_shift, row[0], row[1], col[0], col[1]

    cfg = gemm_config("contrastive_grad_tile", arch_of(x.device), x.dtype)
    (scale_sums,) = _add_products(_grad_tile_kernel, cfg, x, y, offset, inputs, acc_x, acc_y, is_softmax=True)
    return scale_sums if x.dtype.itemsize == 2 else None


def sigmoid_pairs(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Return the terms of the pairs in the sigmoid loss; the logit of a pair is l = logit_scale * x . y + logit_bias.

    Returns:
        one_minus_p = 1 / (1 + exp l) [M], 0 in a row without a pair; and [3, any], numbers that add up to the sums of
        log(1 + exp -l), of -one_minus_p and of -one_minus_p x . y.
    """
    cfg = rows_config(x)
    one_minus_p = x.new_empty(len(x), dtype=torch.float32)
    sums = one_minus_p.new_empty(3, cdiv(len(x), cfg.block_m))
    numbers = len(x), len(y), x.shape[1], offset, x.stride(0), y.stride(0)
    launch_on_rows(_sigmoid_pairs_kernel, cfg, x, y, logit_scale, logit_bias, one_minus_p, *sums, *numbers)
    return one_minus_p, sums


def sigmoid_losses(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
    """Return [any], numbers whose sum is the sigmoid loss log(1 + exp l) of all logits except those of the pairs."""
    cfg = gemm_config("sigmoid_grad_tile", arch_of(x.device), x.dtype)  # the kernel has the same loop
    blocks = list(itertools.product(slices(len(x), MAX_EDGE), slices(len(y), MAX_EDGE)))
    counts = [
        cdiv(rows.stop - rows.start, cfg.block_m) * cdiv(cols.stop - cols.start, cfg.block_n) for rows, cols in blocks
    ]
    losses = x.new_empty(sum(counts), dtype=torch.float32)
    for (rows, cols), count, loss in zip(blocks, counts, losses.split(counts), strict=True):
        pointers = logit_scale, logit_bias, loss
        launch_on_tiles(_sigmoid_sums_kernel, count, cfg, x[rows], y[cols], offset + rows.start - cols.start, pointers)
    return losses


def add_sigmoid_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, acc_x: Tensor, acc_y: Tensor
) -> Tensor:
    """Add G y to acc_x and G^T x to acc_y, as :func:`add_gradients` does, with the G of the sigmoid loss.

    Returns:
        [3, any], numbers that add up to the sums of log(1 + exp l), of G_ij and of G_ij x_i . y_j over all logits
        except those of the pairs, with G before it is rounded.
    """
    cfg = gemm_config("sigmoid_grad_tile", arch_of(x.device), x.dtype)
    inputs = logit_scale, logit_bias
    return _add_products(
        _sigmoid_grad_tile_kernel, cfg, x, y, offset, lambda *_: inputs, acc_x, acc_y, is_softmax=False
    )


class _Part(NamedTuple):
    """The features of one side (rows or columns) that take part in a block of logits."""

    start: int
    features: Tensor
    operand: Tensor | TensorDescriptor  # the features as the products take them
    acc: Tensor | None


def _add_products(
    kernel: triton.JITFunction, cfg: GemmConfig, x: Tensor, y: Tensor, offset: int,
    inputs: Callable[[slice, slice], tuple[Tensor, ...]], acc_x: Tensor | None, acc_y: Tensor | None,
    *, is_softmax: bool,
) -> Tensor:  # fmt: skip
    """Add grad_scale * G y to acc_x and grad_scale * G^T x to acc_y, block by block.

    Args:
        kernel: writes a tile of grad_scale * G, and for each program the sum of G_ij x_i . y_j over its tiles. The
            kernel of the sigmoid loss also writes the sums of the losses and of G_ij, before that sum.
        inputs: ``inputs(rows, cols)`` returns the kernel's other inputs (besides features) for a block of G.
        is_softmax: whether the kernel's programs may walk down columns of tiles, if there are descriptors.

    Returns:
        The kernel's sums of all programs [1 or 3, programs], from G before it is rounded to 16 bits. The accumulators
        contain the rounding error of G, and so would a gradient of the scale that is computed from them.
    """
    products = gemm_config("contrastive_products", arch_of(x.device), x.dtype)
    edges = _block_edges(x, y)
    tile = products.block_k, products.block_n
    row_parts, col_parts = (
        [
            _Part(own.start, side[own], tiles(side[own], *tile, x), None if acc is None else acc[own])
            for own in slices(len(side), edge)
        ]
        for side, edge, acc in ((x, edges[0], acc_x), (y, edges[1], acc_y))
    )
    buffer = new_rows(x, min(edges[0], len(x)), min(edges[1], len(y)))
    blocks = []
    for rows, cols in itertools.product(row_parts, col_parts):
        sizes = len(rows.features), len(cols.features), offset + rows.start - cols.start
        blocks.append((rows, cols, grid_of(*sizes, x, cfg, is_softmax=is_softmax)))
    sums = vector(x, 1 if is_softmax else 3, sum(grid.programs for *_, grid in blocks))
    done = 0
    for rows, cols, grid in blocks:
        m, n = len(rows.features), len(cols.features)
        grad = buffer[:m, :n]
        of_block = inputs(slice(rows.start, rows.start + m), slice(cols.start, cols.start + n))
        of_programs = sums[:, done : done + grid.programs]
        start = offset + rows.start - cols.start
        launch_grad(kernel, grid, cfg, grad, rows.features, cols.features, start, of_block, of_programs)
        done += grid.programs
        _launch_products(grad, rows, cols, products)
    return sums


def grid_of(rows: int, cols: int, offset: int, x: Tensor, cfg: GemmConfig, *, is_softmax: bool) -> GradGrid:
    """Return the programs that compute a block of G [rows, cols] for features like ``x``.

    The kernel of the sigmoid loss does not walk down columns of tiles.
    """
    return grad_grid(rows, cols, offset, cfg, processors(x), walks=is_softmax and has_tma(x))


def launch_grad(
    kernel: triton.JITFunction, grid: GradGrid, cfg: GemmConfig, grad: Tensor, x: Tensor, y: Tensor, offset: int,
    inputs: tuple[Tensor, ...], sums: Tensor,
) -> None:  # fmt: skip
    """Write grad_scale * G of a block to ``grad``, and the sums of each program to ``sums`` [1 or 3, programs]."""
    parts, grad_scale = max(1, cfg.block_n // PART_COLS), scale_of_grad(x.dtype)
    is_softmax = len(sums) == 1
    numbers = (grid.segments, grid.tiles, LOG2E, grad_scale) if is_softmax else ()
    launch_on_tiles(
        kernel, grid.programs, cfg, x, y, offset,
        (tiles(grad, cfg.block_m, cfg.block_n // parts, x), *inputs, *sums), grad.stride(0), *numbers, PARTS=parts,
        **({"SPAN": span(cfg)} if is_softmax else {"GRAD_SCALE": grad_scale}),
    )  # fmt: skip


def _launch_products(grad: Tensor, rows: _Part, cols: _Part, cfg: GemmConfig) -> None:
    x, y, d = rows.features, cols.features, rows.features.shape[1]
    m, n = grad.shape
    num_d = cdiv(d, cfg.block_n)
    num_x_tiles = 0 if rows.acc is None else cdiv(m, cfg.block_m) * num_d
    num_y_tiles = 0 if cols.acc is None else cdiv(n, cfg.block_m) * num_d
    is_added, parts = has_tma(x) and d % 4 == 0, max(1, cfg.block_n // PART_COLS)
    wanted = [acc for acc in (rows.acc, cols.acc) if acc is not None]
    # No program writes an accumulator that is not wanted. The other one is passed in its place.
    accs = [tiles(acc, cfg.block_m, cfg.block_n // parts, x) if is_added else acc for acc in (wanted[0], wanted[-1])]
    launch(
        _products_kernel, (num_x_tiles + num_y_tiles,),
        tiles(grad, cfg.block_m, cfg.block_k, x), tiles(grad, cfg.block_k, cfg.block_m, x),
        rows.operand, cols.operand, *accs, m, n, d, num_x_tiles, grad.stride(0), x.stride(0), y.stride(0),
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PARTS=parts,
        IS_TMA=has_tma(x), IS_ADDED=is_added,
    )  # fmt: skip


def finish(
    acc: Tensor, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor
) -> Tensor:
    """Write the gradient of features, factor * (acc - one_minus_p * positive), through the normalisation if any.

    Args:
        acc: [R, D], G times the features of the other side, of :func:`new_accumulator`; its values are lost.
        own: the R rows whose gradient it is.
        other, offset: [C, D], features of the other side; the positive of row i is row i + offset, if there is one.
        one_minus_p: [R], one minus the probability of the positive, summed over the directions of the loss; not used
            in a row without a positive.
        factor: [], gradient of the loss times scale.
        out: [R, D], contiguous, in any dtype; the gradient is written here.

    Returns:
        [R], the product of each row's gradient and features, before factor and normalisation; if G is rounded, only
        the part of the positives: -one_minus_p * positive . features. Either way, these numbers and those that
        :func:`add_gradients` returns add up to the gradient of the scale, before its coefficient.
    """
    rows, inv_norm = own
    n, d = rows.shape
    of_scale = torch.empty_like(one_minus_p)
    launch_on_rows(
        _finish_kernel, rows_config(rows),
        acc, rows, other, one_minus_p, factor, one_minus_p if inv_norm is None else inv_norm, out, of_scale,
        n, len(other), d, offset, rows.stride(0), other.stride(0), 1.0 / scale_of_grad(rows.dtype),
        HAS_NORM=inv_norm is not None, IS_ROUNDED=rows.dtype.itemsize == 2,
    )  # fmt: skip
    return of_scale


def scale_of_grad(dtype: torch.dtype) -> float:
    """Return the constant that G is multiplied by before it is rounded.

    G lies in [0, 2] and is about 2/N at the start of training, which would be subnormal in float16.
    """
    return 2.0**14 if dtype == torch.float16 else 1.0


def _block_edges(x: Tensor, y: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a block of G for features x against features y."""
    return edges_of(x, y, MAX_EDGE, processors(x))


def is_one_block(x: Tensor, y: Tensor) -> bool:
    """Return whether the G of features x against features y is one block; not if it has no elements."""
    rows, cols = _block_edges(x, y)
    return 0 < len(x) <= rows and 0 < len(y) <= cols and x.shape[1] > 0


def processors(x: Tensor) -> int:
    """Return the number of multiprocessors of the GPU that has ``x``."""
    return multiprocessors(x.device, RECORDED_MULTIPROCESSORS)

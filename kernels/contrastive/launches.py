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

from ..common import LOG2E, cdiv, matrix_tiles, new_rows, slices
from ..configs import GemmConfig, RowConfig, gemm_config, row_config
from ..hardware import architecture
from ..launch import RECORDED_MULTIPROCESSORS, arch_of, launch, multiprocessors
from .block_sizes import edges_of, grad_grid, segments_of_column, span
from .kernels import (
    _finish_kernel,
    _normalize_kernel,
    _products_kernel,
    _sigmoid_grad_tile_kernel,
    _sigmoid_pairs_kernel,
    _sigmoid_sums_kernel,
)
from .softmax_kernels import (
    _grad_tile_kernel,
    _merge_kernel,
    _online_stats_kernel,
    _pair_terms_kernel,
    _pairs_kernel,
    _stats_kernel,
)
from .stats import Features, Normalizers, SoftmaxStats, is_exact, pairs_in, shared_shift

# The most rows and columns of a block of logits. The sums of its tiles then take at most 64 MiB for any M and N.
MAX_EDGE = 16384
# Kernels on vectors: block_m rows or columns for each program. MERGE adds the sums of block_n tiles at a time.
MERGE = RowConfig(block_m=64, block_n=16, num_warps=8, num_stages=1)
TERMS = RowConfig(block_m=128, block_n=1, num_warps=4, num_stages=1)
GROUP_M = 8
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


def prepare(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> Features:
    """Return features ``x`` [M, D] for the products of logits, in ``dtype``; with ``normalize``, as unit rows.

    Rows have unit stride and start at multiples of 16 bytes.
    """
    if not normalize:
        x = x.to(dtype)
        return Features(x if _is_aligned(x) else new_rows(x, *x.shape).copy_(x), None)
    n, d = x.shape
    out = new_rows(x, n, d, dtype)
    inv_norm = x.new_empty(n, dtype=torch.float32)
    _launch_on_rows(_normalize_kernel, _rows_config(x), x, out, inv_norm, n, d, *x.stride(), out.stride(0))
    return Features(out, inv_norm)


def new_accumulator(rows: int, like: Tensor) -> Tensor:
    """Return zeros [rows, D] that gradients are added to, for prepared features ``like`` [any, D]."""
    return like.new_zeros(rows, like.shape[1], dtype=torch.float32)


def strips(x: Tensor, y: Tensor) -> list[slice]:
    """Return strips of the rows of x, as high as the blocks of G.

    Gradients are accumulated and finished strip by strip, so that accumulators stay small.
    """
    return slices(len(x), _block_edges(x, y)[0])


def statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> SoftmaxStats:
    """Return the statistics of the logits of x against y.

    One product is enough if the shared shift is exact. Only the device knows, so the kernels of both cases start.
    """
    sizes = len(x), len(y)
    sums, maxima = x.new_zeros(sum(sizes), dtype=torch.float32), x.new_empty(sum(sizes), dtype=torch.float32)
    if 0 in sizes:
        maxima.copy_(shared_shift(logit_scale))  # no kernel starts
    (row_sum, col_sum), (row_max, col_max) = sums.split(sizes), maxima.split(sizes)
    positive = sums.new_empty(len(x))
    unused = torch.empty((), dtype=torch.int8, device=x.device)
    result = SoftmaxStats(row_max, row_sum, col_max, col_sum, positive, unused)
    if _has_tma(x):
        numbers = len(x), len(y), x.shape[1], offset, x.stride(0), y.stride(0)
        _launch_on_rows(_pairs_kernel, _rows_config(x), x, y, logit_scale, positive, *numbers, LOG2E)
    _accumulate_stats(x, y, logit_scale, offset, result, is_online=False)
    result = result._replace(uses_shared_shift=is_exact(sums))
    _accumulate_stats(x, y, logit_scale, offset, result, is_online=True)
    return result


def _accumulate_stats(
    x: Tensor, y: Tensor, logit_scale: Tensor, offset: int, result: SoftmaxStats, *, is_online: bool
) -> None:
    arch, processors = arch_of(x.device), multiprocessors(x.device, RECORDED_MULTIPROCESSORS)
    cfg = gemm_config(f"contrastive_{'online_stats' if is_online else 'stats'}", arch, x.dtype)
    # These buffers hold the sums of each tile's rows and columns, after their maxima if there are any.
    most_rows, most_cols = min(MAX_EDGE, len(x)), min(MAX_EDGE, len(y))
    sizes = cdiv(most_cols, cfg.block_n) * most_rows, cdiv(most_rows, cfg.block_m) * most_cols
    of_rows, of_cols = (result.row_sum.new_empty(2 if is_online else 1, size) for size in sizes)
    for rows, cols in itertools.product(slices(len(x), MAX_EDGE), slices(len(y), MAX_EDGE)):
        m, n = rows.stop - rows.start, cols.stop - cols.start
        num_m, num_n = cdiv(m, cfg.block_m), cdiv(n, cfg.block_n)
        block, positive = (x[rows], y[cols], offset + rows.start - cols.start), result.positive[rows]
        if is_online:
            pointers = logit_scale, result.uses_shared_shift, *of_rows, *of_cols, positive
            programs = min(num_m * num_n, 2 * processors)
            _launch_on_tiles(_online_stats_kernel, programs, cfg, *block, pointers, LOG2E)
        else:
            segments, tiles = segments_of_column(num_m, num_n, processors) if _has_tma(x) else (num_m, 1)
            pointers = logit_scale, of_rows[0], of_cols[0], positive
            _launch_on_tiles(
                _stats_kernel, segments * num_n, cfg, *block, pointers, segments, tiles, LOG2E,
                WARP_ROWS=min(16 * cfg.num_warps, cfg.block_m),
            )  # fmt: skip
            num_m = segments
        launch(
            _merge_kernel, (cdiv(m, MERGE.block_m) + cdiv(n, MERGE.block_m),),
            of_rows[0], of_rows[-1], result.row_max[rows], result.row_sum[rows],
            of_cols[0], of_cols[-1], result.col_max[cols], result.col_sum[cols],
            logit_scale, result.uses_shared_shift, num_n, m, int(cols.start > 0), num_m, n, int(rows.start > 0), LOG2E,
            config=MERGE, device=x.device, BLOCK=MERGE.block_m, CHUNK=MERGE.block_n, IS_ONLINE=is_online,
        )  # fmt: skip


def pair_losses(stats: SoftmaxStats, offset: int, *, both: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the pairs and the vectors for the gradient, as :func:`.stats.pair_losses`, from one kernel."""
    m, n, like = len(stats.row_max), len(stats.col_max), stats.row_max
    row, col, nll = like.new_empty(3, m), like.new_empty(3, n), like.new_empty(cdiv(m, TERMS.block_m))
    launch(
        _pair_terms_kernel, (cdiv(m, TERMS.block_m) + cdiv(n, TERMS.block_m),),
        *stats.rows, *stats.cols, stats.positive, row, col, nll, m, n, offset,
        config=TERMS, device=like.device, IS_BOTH=both, BLOCK=TERMS.block_m,
    )  # fmt: skip
    paired, _ = pairs_in(m, n, offset)
    # The mean over no pairs is NaN.
    terms = (2 if both else 1) * (paired.stop - paired.start)
    return nll.sum() * (1 / terms if terms else float("nan")), row, col


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
    cfg = _rows_config(x)
    one_minus_p = x.new_empty(len(x), dtype=torch.float32)
    sums = one_minus_p.new_empty(3, cdiv(len(x), cfg.block_m))
    numbers = len(x), len(y), x.shape[1], offset, x.stride(0), y.stride(0)
    _launch_on_rows(_sigmoid_pairs_kernel, cfg, x, y, logit_scale, logit_bias, one_minus_p, *sums, *numbers)
    return one_minus_p, sums


def sigmoid_losses(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
    """Return [any], numbers whose sum is the sigmoid loss log(1 + exp l) of all logits except those of the pairs."""
    cfg = gemm_config("sigmoid_grad_tile", arch_of(x.device), x.dtype)  # the kernel has the same loop
    blocks = list(itertools.product(slices(len(x), MAX_EDGE), slices(len(y), MAX_EDGE)))
    counts = [
        cdiv(rows.stop - rows.start, cfg.block_m) * cdiv(cols.stop - cols.start, cfg.block_n) for rows, cols in blocks
    ]
    losses = x.new_empty(sum(counts), dtype=torch.float32)
    for (rows, cols), tiles, loss in zip(blocks, counts, losses.split(counts), strict=True):
        pointers = logit_scale, logit_bias, loss
        _launch_on_tiles(_sigmoid_sums_kernel, tiles, cfg, x[rows], y[cols], offset + rows.start - cols.start, pointers)
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
    edges, grad_scale = _block_edges(x, y), _grad_scale(x.dtype)
    tile = products.block_k, products.block_n
    row_parts, col_parts = (
        [
            _Part(own.start, side[own], _tiles(side[own], *tile, x), None if acc is None else acc[own])
            for own in slices(len(side), edge)
        ]
        for side, edge, acc in ((x, edges[0], acc_x), (y, edges[1], acc_y))
    )
    buffer = new_rows(x, min(edges[0], len(x)), min(edges[1], len(y)))
    parts = max(1, cfg.block_n // PART_COLS)
    constants = {"SPAN": span(cfg)} if is_softmax else {"GRAD_SCALE": grad_scale}
    at_once = multiprocessors(x.device, RECORDED_MULTIPROCESSORS)
    blocks = []
    for rows, cols in itertools.product(row_parts, col_parts):
        sizes = len(rows.features), len(cols.features), offset + rows.start - cols.start
        blocks.append((rows, cols, grad_grid(*sizes, cfg, at_once, walks=is_softmax and _has_tma(x))))
    sums = x.new_empty(1 if is_softmax else 3, sum(grid.programs for *_, grid in blocks), dtype=torch.float32)
    done = 0
    for rows, cols, grid in blocks:
        m, n = len(rows.features), len(cols.features)
        grad, numbers = buffer[:m, :n], (grid.segments, grid.tiles, LOG2E, grad_scale) if is_softmax else ()
        pointers = (
            _tiles(grad, cfg.block_m, cfg.block_n // parts, x),
            *inputs(slice(rows.start, rows.start + m), slice(cols.start, cols.start + n)),
            *sums[:, done : done + grid.programs],
        )
        _launch_on_tiles(
            kernel, grid.programs, cfg, rows.features, cols.features, offset + rows.start - cols.start, pointers,
            grad.stride(0), *numbers, PARTS=parts, **constants,
        )  # fmt: skip
        done += grid.programs
        _launch_products(grad, rows, cols, products)
    return sums


def _launch_products(grad: Tensor, rows: _Part, cols: _Part, cfg: GemmConfig) -> None:
    x, y, d = rows.features, cols.features, rows.features.shape[1]
    m, n = grad.shape
    num_d = cdiv(d, cfg.block_n)
    num_x_tiles = 0 if rows.acc is None else cdiv(m, cfg.block_m) * num_d
    num_y_tiles = 0 if cols.acc is None else cdiv(n, cfg.block_m) * num_d
    is_added, parts = _has_tma(x) and d % 4 == 0, max(1, cfg.block_n // PART_COLS)
    wanted = [acc for acc in (rows.acc, cols.acc) if acc is not None]
    # No program writes an accumulator that is not wanted. The other one is passed in its place.
    accs = [_tiles(acc, cfg.block_m, cfg.block_n // parts, x) if is_added else acc for acc in (wanted[0], wanted[-1])]
    launch(
        _products_kernel, (num_x_tiles + num_y_tiles,),
        _tiles(grad, cfg.block_m, cfg.block_k, x), _tiles(grad, cfg.block_k, cfg.block_m, x),
        rows.operand, cols.operand, *accs, m, n, d, num_x_tiles, grad.stride(0), x.stride(0), y.stride(0),
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PARTS=parts,
        IS_TMA=_has_tma(x), IS_ADDED=is_added,
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
    _launch_on_rows(
        _finish_kernel, _rows_config(rows),
        acc, rows, other, one_minus_p, factor, one_minus_p if inv_norm is None else inv_norm, out, of_scale,
        n, len(other), d, offset, rows.stride(0), other.stride(0), 1.0 / _grad_scale(rows.dtype),
        HAS_NORM=inv_norm is not None, IS_ROUNDED=rows.dtype.itemsize == 2,
    )  # fmt: skip
    return of_scale


def _rows_config(x: Tensor) -> RowConfig:
    """Return the configuration of kernels that walk rows of features."""
    return row_config("contrastive_rows", arch_of(x.device), x.dtype)


def _launch_on_rows(
    kernel: triton.JITFunction, cfg: RowConfig, x: Tensor, *args: Tensor | float, **constants: bool
) -> None:
    """Launch a kernel of the contrastive losses whose programs each take some rows of its first argument."""
    launch(
        kernel, (cdiv(len(x), cfg.block_m),), x, *args,
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n, **constants,
    )  # fmt: skip


def _launch_on_tiles(
    kernel: triton.JITFunction, programs: int, cfg: GemmConfig, x: Tensor, y: Tensor, offset: int,
    pointers: tuple[Tensor | TensorDescriptor, ...], *numbers: float, **constants: float,
) -> None:  # fmt: skip
    """Launch a kernel of the contrastive losses whose programs each take a tile of the logits x y^T.

    Its arguments are x, y, ``pointers``, the sizes and strides of x and y, and ``numbers``.
    """
    launch(
        kernel, (programs,), _tiles(x, cfg.block_m, cfg.block_k, x), _tiles(y, cfg.block_n, cfg.block_k, x), *pointers,
        len(x), len(y), x.shape[1], offset, x.stride(0), y.stride(0), *numbers,
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        GROUP_M=GROUP_M, IS_TMA=_has_tma(x), **constants,
    )  # fmt: skip


def _grad_scale(dtype: torch.dtype) -> float:
    """Return the constant that G is multiplied by before it is rounded.

    G lies in [0, 2] and is about 2/N at the start of training, which would be subnormal in float16.
    """
    return 2.0**14 if dtype == torch.float16 else 1.0


def _block_edges(x: Tensor, y: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a block of G for features x against features y."""
    return edges_of(x, y, MAX_EDGE, multiprocessors(x.device, RECORDED_MULTIPROCESSORS))


def _has_tma(x: Tensor) -> bool:
    """Return True if products of features ``x`` [M, D] load their tiles through tensor descriptors.

    Float32 products do not: they stay exact, so they do not use the matrix units that read shared memory. For D = 0
    there is no tile, and a descriptor of an empty tensor would be an error.
    """
    return x.dtype.itemsize == 2 and x.shape[1] > 0 and architecture(arch_of(x.device)).multiplies_from_shared


def _tiles(matrix: Tensor, rows: int, cols: int, x: Tensor) -> Tensor | TensorDescriptor:
    """Return a descriptor of tiles [rows, cols] of a matrix, or the matrix if products of ``x`` load by pointers."""
    return matrix_tiles(matrix, rows, cols) if _has_tma(x) else matrix


def _is_aligned(x: Tensor) -> bool:
    # A stride below the width belongs to expanded or overlapping rows, which a tensor descriptor cannot describe.
    is_matrix = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return is_matrix and x.stride(0) * x.dtype.itemsize % 16 == 0 and x.data_ptr() % 16 == 0

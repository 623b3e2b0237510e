"""The launches of the Triton kernels that compute blocks of logits for the contrastive losses.

A block is the logits of features x [M, D] against features y [N, D]; a pair is (i, i + offset), where both exist. G is
the gradient with respect to the logits, as ``contrastive`` and ``sigmoid`` define it.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..common import LOG2E, cdiv, slices
from ..configs import GemmConfig, gemm_config, overrides, planned
from ..launch import Plan, arch_of
from .block_sizes import edges_of, most_bytes, segments_of_column
from .kernels import _finish_kernel, _sigmoid_pairs_kernel, _sigmoid_sums_kernel
from .operands import (
    Layout,
    TilePlan,
    has_tma,
    launch_on_rows,
    layout_of,
    plan_on_tiles,
    prepare,
    prepare_both,
    processors,
    rows_config,
    tile_config,
    totals_plan,
    vector,
)
from .products import add_products, add_strip, scale_of_grad
from .ranks import rank_terms, rank_weights
from .softmax_kernels import _pairs_kernel, _stats_kernel
from .stats import Features, Normalizers, SoftmaxStats, new_accumulator, pairs_in
from .strips import parts_of

__all__ = ["add_strip", "prepare", "rank_terms", "rank_weights"]  # the losses call them as functions of this module

# The most rows and columns of a square block of logits. The sums of its tiles then take at most 64 MiB.
MAX_EDGE = 16384
# A loss computes fewer rows and columns than this in one block, whose kernel has programs that loop over all of them.
# From this many columns on, such a loop takes 80 us or more by the model of an H100, and the product of a G with few
# rows is cut into parts instead (see ``strips``).
LONGEST_LOOP = 8192
MOST_TILES = 128  # the kernel for pairs adds the sums of at most this many tiles of a row: those of a square block
CHUNK = 16  # the kernel for pairs adds the sums of this many tiles at a time


@contextlib.contextmanager
def small_blocks(edge: int, longest_loop: int = LONGEST_LOOP) -> Iterator[None]:
    """Limit blocks of logits to ``edge`` rows and columns, and loops to ``longest_loop``, so that a test with few
    features has several blocks, or parts of one.
    """
    global MAX_EDGE, LONGEST_LOOP
    before, (MAX_EDGE, LONGEST_LOOP) = (MAX_EDGE, LONGEST_LOOP), (edge, longest_loop)
    try:
        with overrides({}):  # ops and plans forget what they decided for other blocks, before and after
            yield
    finally:
        MAX_EDGE, LONGEST_LOOP = before


def strip_accumulator(x: Tensor, y: Tensor, *, is_block: bool = False) -> Tensor:
    """Return a new accumulator for the gradients of rows x [M, D] against columns y: [M, D], or [parts, M or more, D].

    If ``is_block``, all columns y are in one block of G; otherwise in as many as :func:`add_gradients` takes.
    """
    edges = (len(x), len(y)) if is_block else _block_edges(x, y)
    parts, height = parts_of(layout_of(x[: edges[0]], y[: edges[1]], 0), len(x))
    if parts == 0:
        return new_accumulator(x)
    return vector(x, parts, height, x.shape[1])


def strips(x: Tensor, y: Tensor) -> list[slice]:
    """Return strips of the rows of x, as high as the blocks of G.

    Gradients are accumulated and finished strip by strip, so that accumulators stay small. Without rows, there is one
    empty strip, so that the accumulator of the columns is written.
    """
    return slices(len(x), _block_edges(x, y)[0]) or [slice(0, 0)]


def statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> SoftmaxStats:
    """Return the statistics of the logits of x against y."""
    row, col, positive, _, flags = _pairs(x, y, logit_scale, layout_of(x, y, offset), is_loss=False, both=True)
    return SoftmaxStats(row[0], row[1], col[0], col[1], positive, flags)


def pair_losses(
    x: Tensor, y: Tensor, logit_scale: Tensor, offset: int, *, both: bool, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss of the pairs and the vectors for the gradient, as :func:`.stats.pair_losses`.

    Also return uses_shared_shift, as in :class:`.stats.SoftmaxStats`. The features are as a loss gets them.
    """
    x, y = (side.rows for side in prepare_both(x, y, dtype, normalize=normalize))
    layout = layout_of(x, y, offset)
    row, col, _, losses, flags = _pairs(x, y, logit_scale, layout, is_loss=True, both=both)
    loss, flag = vector(x), losses.new_empty((), dtype=torch.int8)
    _total_of_pairs(layout, both).start(losses, flags, loss, loss, loss, flag)
    return loss, row, col, flag


def _pairs(
    x: Tensor, y: Tensor, logit_scale: Tensor, layout: Layout, *, is_loss: bool, both: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the results of ``_pairs_kernel``: row [3, M], col [3, N], positive [M], losses and flags [programs]."""
    programs = programs_of_pairs(layout)[0]
    row, col, positive = vector(x, 3, layout.m), vector(x, 3, layout.n), vector(x, layout.m)
    losses = vector(x, programs)
    flags = losses.new_empty(programs, dtype=torch.int8)
    start_pairs(x, y, logit_scale, layout, positive, row, col, losses, flags, is_loss=is_loss, both=both)
    return row, col, positive, losses, flags


def start_pairs(
    x: Tensor, y: Tensor, logit_scale: Tensor, layout: Layout, positive: Tensor, *outs: Tensor,
    is_loss: bool = False, both: bool = True,
) -> None:  # fmt: skip
    """Compute the logits of x against y, and store the results of ``_pairs_kernel`` to ``positive`` and ``outs``."""
    row_sums, col_sums = _sums(x, y, logit_scale, layout, positive)
    if len(row_sums) > MOST_TILES:  # so wide a block has few rows, so few programs would add very many sums each
        row_sums = row_sums.sum(0, keepdim=True)
    pairs = _pairs_plan(layout, row_sums.shape[0], col_sums.shape[0], is_loss, both)
    pairs.start(x, y, logit_scale, row_sums, col_sums, positive, *outs)


@planned
def programs_of_pairs(layout: Layout) -> tuple[int, int, int]:
    """Return the number of programs of ``_pairs_kernel``, their first row of logits, and the offset that they get."""
    offset = max(-layout.m, min(layout.n, layout.offset))  # there are no pairs at the ends of this range, nor beyond
    first = min(0, -offset)
    cfg = gemm_config("contrastive_pairs", arch_of(layout.device), layout.dtype)
    return cdiv(max(layout.m, layout.n - offset) - first, cfg.block_m), first, offset


@planned
def _total_of_pairs(layout: Layout, both: bool) -> Plan:
    """Return the plan that totals the losses of the programs of ``_pairs_kernel``, and merges their flags."""
    paired, _ = pairs_in(layout.m, layout.n, layout.offset)
    weight = mean_of((2 if both else 1) * (paired.stop - paired.start))
    programs = programs_of_pairs(layout)[0]
    return totals_plan(layout.device, 1, programs, weight, has_flags=True, has_grad_loss=False)


def mean_of(terms: int) -> float:
    """Return the weight of each term of a loss in its mean; the mean over no terms is NaN."""
    return 1 / terms if terms else float("nan")


@planned
def _pairs_plan(layout: Layout, row_tiles: int, col_tiles: int, is_loss: bool, both: bool) -> Plan:
    """Return the plan of ``_pairs_kernel``, which computes the losses of pairs from sums of logits."""
    device, dtype, m, n, d, _, stride_x, stride_y = layout
    cfg = gemm_config("contrastive_pairs", arch_of(device), dtype)
    if not (is_loss and both) and not has_tma(device, dtype, d):
        cfg = dataclasses.replace(cfg, num_stages=1)  # with two stages, the assembler spills one to five registers
    programs, first, offset = programs_of_pairs(layout)
    return Plan(
        _pairs_kernel, (programs,), m, n, d, offset, first, stride_x, stride_y, row_tiles, col_tiles, LOG2E,
        config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, CHUNK=CHUNK,
        IS_TMA=has_tma(device, dtype, d), IS_LOSS=is_loss, IS_BOTH=is_loss and both,
    )  # fmt: skip


def _sums(x: Tensor, y: Tensor, logit_scale: Tensor, layout: Layout, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return partial sums of the rows of the logits [any, M] and of their columns [any, N].

    There is one sum for each tile, or for each block of logits if there are several blocks. The logits of the pairs are
    written to ``positive`` [M].
    """
    if 0 < layout.m * layout.n <= MAX_EDGE**2:
        return _sums_of_block(x, y, logit_scale, layout, positive)
    row_edge, col_edge = (MAX_EDGE**2 // max(1, min(other, MAX_EDGE)) for other in (layout.n, layout.m))
    row_blocks, col_blocks = slices(layout.m, row_edge), slices(layout.n, col_edge)
    row_sums, col_sums = vector(x, len(col_blocks), layout.m), vector(x, len(row_blocks), layout.n)
    for (i, rows), (j, cols) in itertools.product(enumerate(row_blocks), enumerate(col_blocks)):
        block = layout_of(x[rows], y[cols], layout.offset + rows.start - cols.start)
        of_rows, of_cols = _sums_of_block(x[rows], y[cols], logit_scale, block, positive[rows])
        torch.sum(of_rows, 0, out=row_sums[j, rows])
        torch.sum(of_cols, 0, out=col_sums[i, cols])
    return row_sums, col_sums


def _sums_of_block(
    x: Tensor, y: Tensor, logit_scale: Tensor, layout: Layout, positive: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums with the shared shift of the rows and of the columns of the tiles of a block of logits."""
    plan, row_tiles, col_tiles = _sums_plan(layout)
    of_rows, of_cols = vector(x, row_tiles, layout.m), vector(x, col_tiles, layout.n)
    plan.start(x, y, logit_scale, of_rows, of_cols, positive)
    return of_rows, of_cols


@planned
def _sums_plan(layout: Layout) -> tuple[TilePlan, int, int]:
    """Return the plan of ``_stats_kernel``, and how many sums it stores for a row and for a column."""
    cfg = tile_config("contrastive_stats", layout.device, layout.dtype, (layout.m, layout.n))
    num_m, num_n = cdiv(layout.m, cfg.block_m), cdiv(layout.n, cfg.block_n)
    segments, height = num_m, 1
    if has_tma(layout.device, layout.dtype, layout.d):
        segments, height = segments_of_column(num_m, num_n, processors(layout.device))
    warp_rows = min(16 * cfg.num_warps, cfg.block_m)
    plan = plan_on_tiles(_stats_kernel, segments * num_n, cfg, layout, segments, height, LOG2E, WARP_ROWS=warp_rows)
    return plan, num_n, segments


def add_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, offset: int,
    acc_x: Tensor | None, acc_y: Tensor | None, *, is_new_x: bool = False, is_new_y: bool = False,
) -> Tensor | None:  # fmt: skip
    """Add G y to acc_x [M, D] and G^T x to acc_y [N, D], from one computation of G; one of the two may be None.

    Both are multiplied by the constant of :func:`.products.scale_of_grad`, which keeps G out of float16's subnormal
    numbers; :func:`finish` divides by it. If ``is_new_x`` (or ``is_new_y``), the accumulator has no values yet, and is
    overwritten.

    Returns:
        If G is rounded to 16 bits for the products: [any], numbers whose sum is the sum of G_ij x_i . y_j before the
        rounding. If G is not rounded: None, since :func:`finish` then gives this sum with the same accuracy.
    """
    row, col, uses_shared_shift = normalizers
    (scale_sums,) = add_products(
        x, y, offset, _block_edges(x, y), (logit_scale, uses_shared_shift), (row[0], row[1]), (col[0], col[1]),
        acc_x, acc_y, is_softmax=True, is_new=(is_new_x, is_new_y),
    )  # fmt: skip
    return scale_sums if x.dtype.itemsize == 2 else None


def columns_of_block(rows: int, columns: int, width: int, dtype: torch.dtype) -> int:
    """Return the most columns of a block of G for :func:`.products.add_strip`, which has all ``rows``.

    ``columns`` is the number of columns in all, for features of ``width`` numbers. If there is no such block, return 0.
    """
    most = min(most_bytes(columns, width) // dtype.itemsize, MAX_EDGE**2)
    return most // rows if 0 < rows <= MAX_EDGE else 0


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


def sigmoid_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, offset: int, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor]:
    """Return the sigmoid loss [] of features [M, D] and [N, D] without gradients; NaN if M is 0.

    The arguments are those of :func:`pair_losses`.
    """
    x, y = (side.rows for side in prepare_both(x, y, dtype, normalize=normalize))
    # The configuration is that of the kernel for G, which has the same loop.
    of_rows, cfg = rows_config(x), gemm_config("sigmoid_grad_tile", arch_of(x.device), x.dtype)
    m = x.shape[0]
    blocks = list(itertools.product(slices(m, MAX_EDGE), slices(y.shape[0], MAX_EDGE)))
    counts = [cdiv(m, of_rows.block_m)] + [
        cdiv(rows.stop - rows.start, cfg.block_m) * cdiv(cols.stop - cols.start, cfg.block_n) for rows, cols in blocks
    ]
    losses, loss = vector(x, sum(counts)), vector(x)
    of_pairs, *of_blocks = losses.split(counts)
    numbers = m, y.shape[0], x.shape[1], offset, x.stride(0), y.stride(0)
    unused = vector(x, m), *vector(x, 2, counts[0])  # the kernel stores these vectors for gradients
    launch_on_rows(
        _sigmoid_pairs_kernel, of_rows, x, y, logit_scale, logit_bias, unused[0], of_pairs, *unused[1:], *numbers
    )
    for (rows, cols), count, of_block in zip(blocks, counts[1:], of_blocks, strict=True):
        layout = layout_of(x[rows], y[cols], offset + rows.start - cols.start)
        _sigmoid_sums_plan(layout, count, cfg).start(x[rows], y[cols], logit_scale, logit_bias, of_block)
    _mean_plan(x.device, sum(counts), m).start(losses, losses, loss, loss, loss, losses)
    return (loss,)


@planned
def _mean_plan(device: torch.device, count: int, terms: int) -> Plan:
    """Return the plan that adds up ``count`` partial sums of a loss, and divides by the terms of the mean."""
    return totals_plan(device, 1, count, mean_of(terms), has_flags=False, has_grad_loss=False)


@planned
def _sigmoid_sums_plan(layout: Layout, programs: int, cfg: GemmConfig) -> TilePlan:
    """Return the plan of the kernel that sums the sigmoid losses of tiles of logits."""
    return plan_on_tiles(_sigmoid_sums_kernel, programs, cfg, layout)


def add_sigmoid_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, acc_x: Tensor, acc_y: Tensor, *,
    is_new_y: bool,
) -> Tensor:  # fmt: skip
    """Write G y to acc_x and add G^T x to acc_y, as :func:`add_gradients` does, with the G of the sigmoid loss.

    Returns:
        [3, any], numbers that add up to the sums of log(1 + exp l), of G_ij and of G_ij x_i . y_j over all logits
        except those of the pairs, with G before it is rounded.
    """
    return add_products(
        x, y, offset, _block_edges(x, y), (logit_scale, logit_bias), (), (), acc_x, acc_y,
        is_softmax=False, is_new=(True, is_new_y),
    )  # fmt: skip


def finish(
    acc: Tensor, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor
) -> Tensor:
    """Write the gradient of features, factor * (acc - one_minus_p * positive), through the normalisation if any.

    Args:
        acc: [R, D], G times the features of the other side, of :func:`.stats.new_accumulator` or
            :func:`strip_accumulator`; its values are lost.
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
    acc = acc.sum(0)[:n] if acc.ndim == 3 else acc
    of_scale, cfg = torch.empty_like(one_minus_p), rows_config(rows)
    if inv_norm is not None:
        # Without a limit, the assembler of Triton 3.6 spills four bytes on sm_90. With this one it takes 72 registers.
        cfg = dataclasses.replace(cfg, max_registers=80)
    launch_on_rows(
        _finish_kernel, cfg,
        acc, rows, other, one_minus_p, factor, one_minus_p if inv_norm is None else inv_norm, out, of_scale,
        n, len(other), d, offset, rows.stride(0), other.stride(0), 1.0 / scale_of_grad(rows.dtype),
        HAS_NORM=inv_norm is not None, IS_ROUNDED=rows.dtype.itemsize == 2,
    )  # fmt: skip
    return of_scale


def _block_edges(x: Tensor, y: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a block of G for features x against features y."""
    return edges_of(x.device, x.dtype, x.shape[0], y.shape[0], x.shape[1], MAX_EDGE, processors(x.device))


def is_one_block(device: torch.device, dtype: torch.dtype, m: int, n: int, d: int) -> bool:
    """Return whether the G of features [m, d] against features [n, d] is one block; a G without elements is not."""
    rows, cols = edges_of(device, dtype, m, n, d, MAX_EDGE, processors(device))
    return 0 < m <= rows and 0 < n <= cols and d > 0 and max(m, n) < LONGEST_LOOP

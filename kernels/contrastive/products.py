"""The launches that compute gradients of features block by block: a block of G, and its products with the features.

A block is the logits of features x [M, D] against features y [N, D]; a pair is (i, i + offset), where both exist. G is
the gradient with respect to the logits, as ``contrastive`` and ``sigmoid`` define it.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import LOG2E, cdiv, new_rows, slices
from ..configs import planned
from ..launch import Plan
from .block_sizes import grad_grid, products_config, span
from .kernels import _products_kernel, _sigmoid_grad_tile_kernel
from .operands import (
    Describe,
    Layout,
    Tile,
    TilePlan,
    has_tma,
    layout_of,
    plan_on_tiles,
    processors,
    tile_config,
    tile_of,
    tiles,
    vector,
)
from .softmax_kernels import _grad_tile_kernel
from .stats import Normalizers, clear_new
from .strips import PART_COLS, strip_plan


class _Part(NamedTuple):
    """The features of one side (rows or columns) that take part in a block of logits."""

    start: int
    features: Tensor
    acc: Tensor | None
    vectors: tuple[Tensor, ...]  # vectors of this side that the kernel for a block of G reads too


class _Descriptors:
    """The descriptors of matrices that several launches read, each of which is made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, Tile], Tensor | TensorDescriptor] = {}

    def __call__(self, matrix: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
        """Return :func:`tiles` of a matrix.

        The caller keeps the matrix alive for as long as this object, since the matrix's id is the key.
        """
        key = id(matrix), tile
        if key not in self._made:
            self._made[key] = tiles(matrix, tile)
        return self._made[key]


def add_products(
    x: Tensor, y: Tensor, offset: int, edges: tuple[int, int], shared: tuple[Tensor, ...], of_rows: tuple[Tensor, ...],
    of_cols: tuple[Tensor, ...], acc_x: Tensor | None, acc_y: Tensor | None, *, is_softmax: bool,
    is_new: tuple[bool, bool],
) -> Tensor:  # fmt: skip
    """Add grad_scale * G y to acc_x and grad_scale * G^T x to acc_y, block by block.

    Args:
        x, y, offset, acc_x, acc_y: see :func:`.launches.add_gradients`; acc_x may be that of a strip.
        edges: the rows and columns of a block.
        shared, of_rows, of_cols: the other inputs (besides features) of the kernel for a block of G, in this order:
            those that all blocks have, vectors [M] of the rows, and vectors [N] of the columns.
        is_softmax: whether G is that of the softmax losses or of the sigmoid loss.
        is_new: whether acc_x and acc_y have no values yet.

    Returns:
        The sums of all programs of the kernel [1 or 3, programs], from G before it is rounded to 16 bits. The
        accumulators contain the rounding error of G, and so would a gradient of the scale that is computed from them.
    """
    if 0 in (len(x), len(y)):
        # Without a block, no kernel runs, and so none writes the first values of an accumulator.
        clear_new((acc_x, is_new[0]), (acc_y, is_new[1]))
    acc_x, strip = (None, acc_x) if acc_x is not None and acc_x.ndim == 3 else (acc_x, None)
    if strip is None and 0 < x.shape[0] <= edges[0] and 0 < y.shape[0] <= edges[1]:
        vectors = *shared, *of_rows, *of_cols
        return _add_block(x, y, offset, vectors, acc_x, acc_y, is_softmax=is_softmax, is_new=is_new)
    described = _Descriptors()
    row_parts, col_parts = (
        [
            _Part(own.start, side[own], None if acc is None else acc[own], tuple(vector[own] for vector in vectors))
            for own in slices(len(side), edge)
        ]
        for side, edge, acc, vectors in ((x, edges[0], acc_x, of_rows), (y, edges[1], acc_y, of_cols))
    )
    buffer = new_rows(x, min(edges[0], len(x)), min(edges[1], len(y)))
    views = {
        (m, n): buffer[:m, :n]
        for m, n in itertools.product(*({len(part.features) for part in parts} for parts in (row_parts, col_parts)))
    }
    blocks = []
    for rows, cols in itertools.product(row_parts, col_parts):
        layout = layout_of(rows.features, cols.features, offset + rows.start - cols.start)
        grad, alike = grad_plan(layout, buffer.stride(0), is_softmax), layout._replace(offset=0)
        is_new_x, is_new_y = is_new[0] and cols.start == 0, is_new[1] and rows.start == 0
        has_x, has_y = acc_x is not None, acc_y is not None
        products = _products_plan(
            alike, buffer.stride(0), has_x, has_y, is_new_x if has_x else is_new_y, is_new_y if has_y else is_new_x
        )
        of_strip = None
        if strip is not None:
            parts, height, _ = strip.shape
            of_strip = strip_plan(alike, buffer.stride(0), parts, height, rows.start, is_new_x)
        blocks.append((rows, cols, grad, products, of_strip))
    counts = [grad.programs for _, _, grad, _, _ in blocks]
    sums = vector(x, 1 if is_softmax else 3, sum(counts))
    of_blocks = zip(*(numbers.split(counts) for numbers in sums), strict=True)
    for (rows, cols, grad, products, of_strip), of_block in zip(blocks, of_blocks, strict=True):
        block = views[len(rows.features), len(cols.features)]
        others = *shared, *rows.vectors, *cols.vectors, *of_block
        grad.start(rows.features, cols.features, block, *others, describe=described)
        if of_strip is not None and strip is not None:
            of_strip.start(block, cols.features, strip, described)
        if acc_x is not None or acc_y is not None:
            products.start(block, rows, cols, described)
    return sums


def add_strip(
    x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, offset: int, widths: Sequence[int],
    acc_x: Tensor, sums: list[Tensor | None], *, is_new: bool,
) -> Iterator[Tensor]:  # fmt: skip
    """Add grad_scale * G y to acc_x, where G of a softmax loss is one block; yield the parts of grad_scale * G^T x.

    A part is that of the next ``widths`` columns, which are multiples of 8 if there are several parts. It is yielded as
    soon as its kernel has been started, so that it can be sent while the next ones are computed, and while G y is,
    which comes last. If ``is_new``, acc_x has no values yet, and nothing is being sent. Then G is computed in pieces of
    one part, two, four and so on, so that the first part can be sent early; otherwise in one piece.

    The sums that :func:`add_products` returns are appended to ``sums``, unless G is not rounded.
    """
    layout, first, count = layout_of(x, y, 0), 0, 1 if is_new else len(widths)
    grad, rows = new_rows(x, layout.m, layout.n), _Part(0, x, None, ())
    stride = grad.stride(0)
    while first < len(widths):
        start, own = sum(widths[:first]), widths[first : first + count]
        cols = slice(start, start + sum(own))
        of_g = grad_plan(layout_of(x, y[cols], offset - start), stride, True)
        of_programs, piece = vector(x, of_g.programs), grad[:, cols]
        vectors = (*normalizers.row[:2], *normalizers.col[:2, cols])
        of_g.start(x, y[cols], piece, logit_scale, normalizers.uses_shared_shift, *vectors, of_programs)
        sums.append(of_programs if x.dtype.itemsize == 2 else None)
        for of_part, part in zip(piece.split(own, 1), y[cols].split(own), strict=True):
            acc_y = vector(x, *part.shape)
            plan = _products_plan(layout._replace(n=len(part)), stride, False, True, True, True)
            plan.start(of_part, rows, _Part(0, part, acc_y, ()), tiles)
            yield acc_y
        first, count = first + count, 2 * count
    if acc_x.ndim == 3:
        parts, height, _ = acc_x.shape
        strip_plan(layout, stride, parts, height, 0, is_new).start(grad, y, acc_x, tiles)
    else:
        plan = _products_plan(layout, stride, True, False, is_new, is_new)
        plan.start(grad, rows._replace(acc=acc_x), _Part(0, y, None, ()), tiles)


def _add_block(
    x: Tensor, y: Tensor, offset: int, vectors: tuple[Tensor, ...], acc_x: Tensor | None, acc_y: Tensor | None, *,
    is_softmax: bool, is_new: tuple[bool, bool],
) -> Tensor:  # fmt: skip
    """Add the products of a G of one block as :func:`add_products` does; ``vectors`` are other inputs of G's kernel."""
    describe, layout = _Descriptors(), layout_of(x, y, offset)
    grad = new_rows(x, layout.m, layout.n)
    of_g = grad_plan(layout, grad.stride(0), is_softmax)
    has_x, has_y = acc_x is not None, acc_y is not None
    products = _products_plan(layout._replace(offset=0), grad.stride(0), has_x, has_y, is_new[not has_x], is_new[has_y])
    sums = vector(x, 1 if is_softmax else 3, of_g.programs)
    of_g.start(x, y, grad, *vectors, *sums.unbind(), describe=describe)
    if has_x or has_y:
        products.start(grad, _Part(0, x, acc_x, ()), _Part(0, y, acc_y, ()), describe)
    return sums


class GradPlan(NamedTuple):
    """A launch of the kernel that writes grad_scale * G of a block, and the sums of each program.

    The sums are those of the softmax losses, G_ij x_i . y_j over the tiles of the program. The kernel of the sigmoid
    loss also writes the sums of the losses and of G_ij, before these sums.
    """

    on_tiles: TilePlan
    grad_tile: Tile
    programs: int

    def start(self, x: Tensor, y: Tensor, grad: Tensor, *others: Tensor, describe: Describe = tiles) -> None:
        """Start the kernel that writes a block of G; ``others`` are its other inputs and the vectors for its sums."""
        self.on_tiles.start(x, y, describe(grad, self.grad_tile), *others, describe=describe)


@planned
def grad_plan(layout: Layout, stride_grad: int, is_softmax: bool) -> GradPlan:
    """Plan the kernel that computes a block of G."""
    device, dtype, m, n, d, offset, *_ = layout
    name = "contrastive_grad_tile" if is_softmax else "sigmoid_grad_tile"
    cfg = tile_config(name, device, dtype, (m, n))
    # Each program of the sigmoid loss's kernel computes a single tile, not a segment of a column of tiles.
    grid = grad_grid(m, n, offset, cfg, processors(device), walks=is_softmax and has_tma(device, dtype, d))
    parts, grad_scale = max(1, cfg.block_n // PART_COLS), scale_of_grad(dtype)
    if is_softmax:
        numbers = stride_grad, grid.segments * cdiv(n, cfg.block_n), grid.tiles, LOG2E, grad_scale
        on_tiles = plan_on_tiles(_grad_tile_kernel, grid.programs, cfg, layout, *numbers, PARTS=parts, SPAN=span(cfg))
    else:
        on_tiles = plan_on_tiles(
            _sigmoid_grad_tile_kernel, grid.programs, cfg, layout, stride_grad, PARTS=parts, GRAD_SCALE=grad_scale
        )
    return GradPlan(on_tiles, tile_of(cfg.block_m, cfg.block_n // parts, layout), grid.programs)


class _ProductsPlan(NamedTuple):
    """A launch of the kernel that adds the products of a block of G with the features to the accumulators."""

    plan: Plan
    grad_tile: Tile
    transposed_tile: Tile
    operand_tile: Tile
    acc_tile: Tile

    def start(self, grad: Tensor, rows: _Part, cols: _Part, describe: Describe) -> None:
        """Start the kernel that adds the products of a block of G to the accumulators of its rows and columns."""
        # If only one side has an accumulator, it is passed for the other side too, to which no program writes.
        wanted = [describe(part.acc, self.acc_tile) for part in (rows, cols) if part.acc is not None]
        operands = (describe(part.features, self.operand_tile) for part in (rows, cols))
        of_grad = describe(grad, self.grad_tile), describe(grad, self.transposed_tile)
        self.plan.start(*of_grad, *operands, wanted[0], wanted[-1])


@planned
def _products_plan(
    layout: Layout, stride_grad: int, has_x: bool, has_y: bool, is_new_x: bool, is_new_y: bool
) -> _ProductsPlan:
    """Plan the products of a block of G with the features of those sides that have an accumulator."""
    device, dtype, m, n, d, _, stride_x, stride_y = layout
    cfg = products_config(device, dtype, d, m * has_x, n * has_y)
    num_d, is_tma, parts = cdiv(d, cfg.block_n), has_tma(device, dtype, d), max(1, cfg.block_n // PART_COLS)
    is_added = is_tma and d % 4 == 0
    num_x_tiles, num_y_tiles = (cdiv(side, cfg.block_m) * num_d * has for side, has in ((m, has_x), (n, has_y)))
    plan = Plan(
        _products_kernel, (num_x_tiles + num_y_tiles,), m, n, d, num_x_tiles, stride_grad, stride_x, stride_y,
        config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PARTS=parts,
        IS_TMA=is_tma, IS_ADDED=is_added, IS_NEW_X=is_new_x, IS_NEW_Y=is_new_y,
    )  # fmt: skip
    grad_tile, transposed_tile = tile_of(cfg.block_m, cfg.block_k, layout), tile_of(cfg.block_k, cfg.block_m, layout)
    acc_tile = (cfg.block_m, cfg.block_n // parts) if is_added else None
    return _ProductsPlan(plan, grad_tile, transposed_tile, tile_of(cfg.block_k, cfg.block_n, layout), acc_tile)


def scale_of_grad(dtype: torch.dtype) -> float:
    """Return the constant that G is multiplied by before it is rounded.

    G lies in [0, 2] and is about 2/N at the start of training, which would be subnormal in float16.
    """
    return 2.0**14 if dtype == torch.float16 else 1.0

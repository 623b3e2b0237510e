"""The computation of blocks of logits on a CPU: the kernels' algorithm in PyTorch. ``launches`` describes the
functions, and ``contrastive`` defines G, the gradient with respect to the logits.

A block of logits is large enough for BLAS to run at full speed, and small enough to stay in the cache that the cores
share. The steps after its product go through the block in pieces that fit into each core's own cache. Products are in
float32, or in float64 for float64 features. Products of bfloat16 features use the CPU's bfloat16 instructions if it has
them. The logits are then as exact as in float32, but G is rounded to bfloat16, as in the kernels of a GPU.

``small_batch``, not this module, computes a batch whose logits all fit into the cache at once.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import LOG2E, slices
from ..dtypes import accumulate_dtype
from .stats import (
    Features,
    Normalizers,
    RankWeights,
    SoftmaxStats,
    clear_new,
    finite,
    is_exact,
    merge_stacked,
    new_accumulator,
    new_stats,
    pair_products,
    pair_terms,
    pairs_in,
    shared_shift,
)

# The most rows of a block, and its most columns per thread: 8 MiB of float32 for each thread.
BLOCK_ROWS, BLOCK_COLS = 1024, 2048
EPS = 1e-12  # the least norm that torch.nn.functional.normalize divides by
PIECE_ELEMENTS = 2**17  # logits of a piece per thread: 512 KiB of float32, a quarter to a half of a core's L2 cache


def prepare(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> Features:
    """Return features in the form that products take: rows of ``dtype`` that are contiguous each, normalised if asked
    for.
    """
    if not normalize:
        x = x.to(dtype)
        return Features(x if x.stride(-1) == 1 else x.contiguous(), None)
    wide = x.to(accumulate_dtype(x.dtype))
    inv_norm = torch.linalg.vector_norm(wide, dim=-1).clamp_min_(EPS).reciprocal_()
    return Features((wide * inv_norm[:, None]).to(dtype), inv_norm)


def strip_accumulator(x: Tensor, y: Tensor, *, is_block: bool = False) -> Tensor:
    """Return a new accumulator for the gradients of a strip's rows x [M, D] against columns y."""
    return new_accumulator(x)


def strips(x: Tensor, y: Tensor) -> list[slice]:
    """Return one strip with all features x, so accumulators on a CPU are as large as the gradients in float32."""
    return [slice(0, len(x))]


def statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> SoftmaxStats:
    """Return the statistics of the logits of x against y.

    If the shared shift is exact, this takes one product, and one exponential per logit for rows and columns together.
    """
    result = new_stats(x, y)
    shift = shared_shift(logit_scale)
    is_shifted = bool(shift)
    for block in _blocks(x, y, offset, logit_scale * LOG2E):
        paired, _ = pairs_in(len(block.x), len(block.y), block.offset)
        pairs = block.logits.diagonal(block.offset)
        result.positive[block.rows][paired] = pairs
        pairs.fill_(float("-inf"))
        row_sum, col_sums = result.row_sum[block.rows], []
        for piece in block.pieces():
            tile = block.logits[piece].sub_(shift) if is_shifted else block.logits[piece]
            row_sum[piece].add_(tile.exp2_().sum(1))
            col_sums.append(tile.sum(0))
        result.col_sum[block.cols].add_(torch.stack(col_sums).sum(0))
    result.row_max.copy_(shift)
    result.col_max.copy_(shift)
    result.uses_shared_shift.copy_(is_exact(result.row_sum, result.col_sum))
    if not result.uses_shared_shift:
        _online_statistics(x, y, logit_scale, offset, result)
    return result


def _online_statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int, result: SoftmaxStats) -> None:
    """Write the softmax statistics of logits to ``result`` if the shared shift is not exact.

    Each row and each column then has its own maximum, and a logit takes two exponentials.
    """
    for maximum, total in (result.rows, result.cols):
        maximum.fill_(float("-inf"))
        total.zero_()
    for block in _blocks(x, y, offset, logit_scale * LOG2E):
        block.logits.diagonal(block.offset).fill_(float("-inf"))
        cols = result.col_max[block.cols], result.col_sum[block.cols]
        for piece in block.pieces():
            rows = result.row_max[block.rows][piece], result.row_sum[block.rows][piece]
            for (maximum, total), dim in ((rows, 1), (cols, 0)):
                tile = block.logits[piece]
                new_maximum = torch.maximum(maximum, tile.amax(dim))
                pivot = finite(new_maximum)
                powers = (tile - pivot.unsqueeze(dim)).exp2_()
                total.mul_((maximum - pivot).exp2_()).add_(powers.sum(dim))
                maximum.copy_(new_maximum)


def add_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, offset: int,
    acc_x: Tensor | None, acc_y: Tensor | None, *, is_new_x: bool = False, is_new_y: bool = False,
) -> Tensor | None:  # fmt: skip
    """Add G y to acc_x and G^T x to acc_y for a softmax loss; return sums of G_ij x_i . y_j if products round G.

    ``torch.dot`` is not used for these sums. On some CPUs it keeps few partial sums, which become so large that small
    terms are dropped.
    """
    clear_new((acc_x, is_new_x), (acc_y, is_new_y))
    shift, factor = shared_shift(logit_scale), logit_scale * LOG2E
    is_shifted = bool(shift)
    row_maxima, row_inv_denoms = finite(normalizers.row[0]), normalizers.row[1]
    col_maxima, col_inv_denoms = finite(normalizers.col[0]), normalizers.col[1]
    grads, weights = _scratch(x, y, 2)
    scale_sums = []
    for block in _blocks(x, y, offset, None if _rounds(x) else factor):
        col_max, col_inv_denom = col_maxima[block.cols], col_inv_denoms[block.cols]
        for piece in block.pieces():
            tile, row_inv_denom = block.logits[piece], row_inv_denoms[block.rows][piece, None]
            grad, weight = (buffer[: tile.numel()].view_as(tile) for buffer in (grads, weights))
            # If G is rounded, the cosines in ``tile`` are needed again. Otherwise G may overwrite the logits there.
            grad = torch.mul(tile, factor, out=grad) if _rounds(x) else tile
            if normalizers.uses_shared_shift:
                torch.add(row_inv_denom, col_inv_denom, out=weight)
                (grad.sub_(shift) if is_shifted else grad).exp2_().mul_(weight)
            else:
                torch.sub(grad, col_max, out=weight).exp2_().mul_(col_inv_denom)
                grad.sub_(row_maxima[block.rows][piece, None]).exp2_()
                torch.addcmul(weight, grad, row_inv_denom, out=grad)
            grad.diagonal(piece.start + block.offset).zero_()
            if _rounds(x):
                scale_sums.append(tile.mul_(grad).sum())
                tile.copy_(grad)
        block.add_products(acc_x, acc_y)
    return torch.stack(scale_sums) if scale_sums else None


def rank_terms(
    row: tuple[Tensor, Tensor], col: tuple[Tensor, Tensor], positive: Tensor, uses_shared_shift: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a rank sends of its pairs, one_minus_p and the loss, as :func:`.launches.rank_terms` does."""
    maximum, total = (torch.stack(pair) for pair in zip(row, merge_stacked(*col), strict=True))  # [2, b]
    terms = pair_terms(maximum, total, positive)
    has_own_shifts = (1 - uses_shared_shift.amin()).to(maximum.dtype).expand(1, len(positive))
    sent = torch.cat([torch.stack([maximum, terms.inv_denom], 1).flatten(0, 1), has_own_shifts])  # [5, b]
    return sent.T, terms.one_minus_p.sum(0), terms.nll.sum() * weight


def rank_weights(
    terms: Tensor, heads: Tensor, one_minus_p: Tensor, own: slice, logit_scale: Tensor, weight: float
) -> RankWeights:
    """Return what the gradients of a rank's pairs need, as :func:`.launches.rank_weights` does."""
    largest = heads[:, 5].abs().amax().clamp(min=torch.finfo(terms.dtype).tiny)
    share = terms[:, 5] / largest  # [N]
    row, col = vectors = terms.T[:4].clone(memory_format=torch.contiguous_format).view(2, 2, -1)
    vectors[:, 1].mul_(share)
    normalizers = Normalizers(row, col, (heads[:, 4] == 0).all().view(torch.int8))
    coefficient = largest * weight
    return RankWeights(normalizers, one_minus_p * share[own], coefficient, coefficient * logit_scale)


def columns_of_block(*_: int | torch.dtype) -> int:
    """Return 0: on a CPU, all gradients are computed by :func:`add_gradients`."""
    return 0


def sigmoid_pairs(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Return one_minus_p of the pairs, and the terms that they add to the sigmoid loss and to its bias and scale
    gradients.
    """
    paired, partners = pairs_in(len(x), len(y), offset)
    cosines = pair_products(x[paired], y[partners])
    logits = -(cosines * logit_scale + logit_bias)
    one_minus_p = logits.new_zeros(len(x))
    force = torch.sigmoid(logits, out=one_minus_p[paired])
    return one_minus_p, torch.stack((F.softplus(logits), -force, -force * cosines))


def sigmoid_loss(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
    """Return the sigmoid loss [], without gradients."""
    losses = [sigmoid_pairs(x, y, logit_scale, logit_bias, offset)[1][0]]
    for block in _blocks(x, y, offset):
        for piece in block.pieces():
            tile = _scaled(block.logits[piece], logit_scale, logit_bias)
            tile.diagonal(piece.start + block.offset).fill_(float("-inf"))
            losses.append(F.softplus(tile).sum()[None])
    return (torch.cat(losses).sum(dtype=torch.float64) / len(x)).to(logit_scale.dtype)


def add_sigmoid_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, acc_x: Tensor, acc_y: Tensor, *,
    is_new_y: bool,
) -> Tensor:  # fmt: skip
    """Write G y to acc_x and add G^T x to acc_y for the sigmoid loss; return three sums over tiles of logits [3, any].

    They are the sums of log(1 + exp l), of G_ij and of G_ij x_i . y_j over all logits l except those of the pairs.
    """
    clear_new((acc_x, True), (acc_y, is_new_y))
    (grads,) = _scratch(x, y, 1)
    sums = []
    for block in _blocks(x, y, offset):
        for piece in block.pieces():
            tile = block.logits[piece]
            grad = grads[: tile.numel()].view_as(tile)
            _scaled(tile, logit_scale, logit_bias, out=grad)
            grad.diagonal(piece.start + block.offset).fill_(float("-inf"))
            loss = F.softplus(grad).sum()
            grad.sigmoid_()
            sums.append(torch.stack((loss, grad.sum(), tile.mul_(grad).sum())))
            tile.copy_(grad)
        block.add_products(acc_x, acc_y)
    return torch.stack(sums, 1) if sums else logit_scale.new_zeros(3, 0)


def finish(
    acc: Tensor, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor
) -> Tensor:
    """Write the gradient of features, factor * (acc - one_minus_p * positive) through the normalisation, to ``out``.

    Return the product of each row's gradient and features, before factor and normalisation. ``out`` may be ``acc``.
    """
    # Intermediate results of all rows would take as much memory as the gradient, so some rows are finished at a time.
    parts = [
        _finish_rows(acc[rows], own.part(rows), other, offset + rows.start, one_minus_p[rows], factor, out[rows])
        for rows in slices(len(acc), BLOCK_ROWS)
    ]
    return torch.cat(parts) if parts else acc.new_empty(0)


def _finish_rows(
    acc: Tensor, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor
) -> Tensor:
    """Finish the gradient of features as :func:`finish` does, with intermediate results for all rows at once."""
    paired, partners = pairs_in(len(acc), len(other), offset)
    rows = own.rows.to(acc.dtype)
    acc[paired].addcmul_(one_minus_p[paired, None], other[partners].to(acc.dtype), value=-1)
    dot = of_scale = torch.linalg.vecdot(acc, rows)
    if _rounds(own.rows):
        of_scale = -one_minus_p[paired] * pair_products(own.rows[paired], other[partners])
    if own.inv_norm is not None:
        # A norm that was raised to EPS is a constant, so no gradient flows through it.
        along = dot.where(own.inv_norm < 0.999 / EPS, 0)
        acc.addcmul_(along[:, None], rows, value=-1).mul_(own.inv_norm[:, None])
    out.copy_(acc.mul_(factor))
    return of_scale


def _rounds(x: Tensor) -> bool:
    """Return True if products with features like ``x`` may round G to 16 bits."""
    return x.dtype == torch.bfloat16


def _wide(x: Tensor) -> Tensor:
    """Return contrastive features in the dtype that products are taken in."""
    return x.to(accumulate_dtype(x.dtype))


class _Block(NamedTuple):
    """A block of logits [R, C], of some rows of x against some rows of y, which are the columns of the logits."""

    rows: slice
    cols: slice
    x: Tensor  # [R, D], in the dtype of the logits
    y: Tensor  # [C, D]
    logits: Tensor
    offset: int  # the pairs of the block are (i, i + offset)
    dtype: torch.dtype  # the dtype of the features

    def pieces(self) -> list[slice]:
        """Return slices of the rows of a block of logits, so that each piece fits into the cache."""
        return slices(len(self.logits), max(1, _piece_elements() // self.logits.shape[1]))

    def add_products(self, acc_x: Tensor | None, acc_y: Tensor | None) -> None:
        """Add G y to acc_x and G^T x to acc_y, with the G that has replaced the logits."""
        with _instructions_for(self.dtype):
            if acc_x is not None:
                acc_x[self.rows].addmm_(self.logits, self.y)
            if acc_y is not None:
                acc_y[self.cols].addmm_(self.logits.T, self.x)


def _blocks(x: Tensor, y: Tensor, offset: int, factor: Tensor | None = None) -> Iterator[_Block]:
    """Yield all blocks of logits, ``factor`` times the products of x and y.

    Each block reuses the memory of the one before.
    """
    alpha = 1 if factor is None else factor.item()
    y = _wide(y)
    buffer = y.new_empty(min(len(x), BLOCK_ROWS) * min(len(y), _block_cols()))
    for rows in slices(len(x), BLOCK_ROWS):
        own = _wide(x[rows])
        for cols in slices(len(y), _block_cols()):
            other = y[cols]
            logits = buffer[: len(own) * len(other)].view(len(own), len(other))
            with _instructions_for(x.dtype):
                torch.addmm(logits, own, other.T, beta=0, alpha=alpha, out=logits)
            yield _Block(rows, cols, own, other, logits, rows.start + offset - cols.start, x.dtype)


@functools.cache
def _has_bfloat16() -> bool:
    """Return whether the CPU has instructions that multiply bfloat16 matrices, which the blocks of logits then use."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@contextlib.contextmanager
def _instructions_for(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 matrices use the CPU's bfloat16 instructions, if the features have the dtype bfloat16.

    The values of such features stay exact, and sums are in float32. PyTorch has one switch for the whole process, so a
    product that another thread starts meanwhile uses bfloat16 as well.
    """
    if dtype != torch.bfloat16 or not _has_bfloat16():
        yield
        return
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _scaled(tile: Tensor, factor: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """Write factor * logits + bias of a tile to ``out`` (to ``tile`` without it), in one pass, and return that."""
    return torch.add(bias, tile, alpha=factor.item(), out=tile if out is None else out)


def _scratch(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return ``count`` buffers that each hold as many numbers as a piece of the logits of x and y."""
    size = max(_piece_elements(), min(len(y), _block_cols()))
    return x.new_empty(count, size, dtype=accumulate_dtype(x.dtype)).unbind()


def _block_cols() -> int:
    """Return the most columns of a block of logits, which all threads compute together."""
    return BLOCK_COLS * torch.get_num_threads()


def _piece_elements() -> int:
    """Return the number of logits in a piece of a block, which all threads compute together."""
    return PIECE_ELEMENTS * torch.get_num_threads()

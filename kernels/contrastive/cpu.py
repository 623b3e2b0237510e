"""The computation of blocks of logits on a CPU: the kernels' algorithm in PyTorch. ``launches`` describes the
functions.

A chunk of rows is multiplied by all columns at once, a product that is large enough for BLAS to run at full speed. The
steps after it go through the chunk in pieces that fit into a core's cache. Products are in float32, or in float64 for
float64 features. Products of bfloat16 features use the CPU's bfloat16 instructions if it has them. The logits are then
as exact as in float32, but G is rounded to bfloat16, as in the kernels of a GPU.

A batch whose logits fit into the cache all at once does not come here: ``small_batch`` computes it.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import LOG2E, slices
from ..dtypes import accumulate_dtype
from .stats import (
    Features,
    Normalizers,
    SoftmaxStats,
    finite,
    is_exact,
    new_stats,
    pair_losses,
    pair_products,
    pairs_in,
    shared_shift,
)

__all__ = ["pair_losses"]  # the losses find it here as in ``launches``

CHUNK_ROWS = 1024  # more rows would not make the products faster
CHUNK_ELEMENTS = 2**24  # the most logits of a chunk: 64 MiB of float32
EPS = 1e-12  # the least norm that torch.nn.functional.normalize divides by
PIECE_ELEMENTS = 2**17  # logits of a piece per thread: 512 KiB of float32, a quarter to a half of a core's L2 cache


def prepare(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> Features:
    """Return features in the form that products take: contiguous rows in ``dtype``, normalised if asked for."""
    if not normalize:
        return Features(x.to(dtype).contiguous(), None)
    wide = x.to(accumulate_dtype(x.dtype))
    inv_norm = torch.linalg.vector_norm(wide, dim=-1).clamp_min_(EPS).reciprocal_()
    return Features((wide * inv_norm[:, None]).to(dtype), inv_norm)


def new_accumulator(rows: int, like: Tensor) -> Tensor:
    """Return zeros [rows, D] in float32 or float64, to which the gradients of features are added."""
    return like.new_zeros(rows, like.shape[1], dtype=accumulate_dtype(like.dtype))


def strips(x: Tensor, y: Tensor) -> list[slice]:
    """Return one strip with all rows of x, so accumulators on a CPU are as large as the gradients in float32."""
    return [slice(0, len(x))]


def statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> SoftmaxStats:
    """Return the statistics of the logits of x against y.

    If the shared shift is exact, this takes one product, and one exponential per logit for rows and columns together.
    """
    result = new_stats(x, y)
    shift = shared_shift(logit_scale)
    is_shifted = bool(shift)
    for rows, logits in _chunks(x, y, logit_scale * LOG2E):
        paired, _ = pairs_in(len(logits), len(y), rows.start + offset)
        pairs = logits.diagonal(rows.start + offset)
        result.positive[rows][paired] = pairs
        pairs.fill_(float("-inf"))
        for piece in _pieces(logits):
            tile = logits[piece].sub_(shift) if is_shifted else logits[piece]
            result.row_sum[rows][piece] = tile.exp2_().sum(1)
        result.col_sum.add_(logits.sum(0))
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
    result.col_max.fill_(float("-inf"))
    result.col_sum.zero_()
    for rows, logits in _chunks(x, y, logit_scale * LOG2E):
        logits.diagonal(rows.start + offset).fill_(float("-inf"))
        for piece in _pieces(logits):
            tile = logits[piece]
            row_max = tile.amax(1)
            result.row_max[rows][piece] = row_max
            result.row_sum[rows][piece] = (tile - finite(row_max)[:, None]).exp2_().sum(1)
            col_max = torch.maximum(result.col_max, tile.amax(0))
            pivot = finite(col_max)
            result.col_sum.mul_((result.col_max - pivot).exp2_()).add_(tile.sub_(pivot).exp2_().sum(0))
            result.col_max.copy_(col_max)


def add_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, offset: int,
    acc_x: Tensor | None, acc_y: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Add G y to acc_x and G^T x to acc_y for a softmax loss; return sums of G_ij x_i . y_j if products round G."""
    shift, factor = shared_shift(logit_scale), logit_scale * LOG2E
    is_shifted, y = bool(shift), _wide(y)
    row_max, row_inv_denoms = finite(normalizers.row[0]), normalizers.row[1]
    col_max, col_inv_denom = finite(normalizers.col[0]), normalizers.col[1]
    grads, weights = _scratch(x, y, 2)
    scale_sums = []
    for rows, tiles in _chunks(x, y, None if _rounds(x) else factor):
        for piece in _pieces(tiles):
            tile, row_inv_denom = tiles[piece], row_inv_denoms[rows][piece, None]
            grad, weight = (buffer[: tile.numel()].view_as(tile) for buffer in (grads, weights))
            # If G is rounded, the cosines in ``tile`` are needed again. Otherwise G may overwrite the logits there.
            grad = torch.mul(tile, factor, out=grad) if _rounds(x) else tile
            if normalizers.uses_shared_shift:
                torch.add(row_inv_denom, col_inv_denom, out=weight)
                (grad.sub_(shift) if is_shifted else grad).exp2_().mul_(weight)
            else:
                torch.sub(grad, col_max, out=weight).exp2_().mul_(col_inv_denom)
                torch.addcmul(weight, grad.sub_(row_max[rows][piece, None]).exp2_(), row_inv_denom, out=grad)
            grad.diagonal(rows.start + piece.start + offset).zero_()
            if _rounds(x):
                scale_sums.append(torch.dot(grad.view(-1), tile.view(-1)))
                tile.copy_(grad)
        _add_products(tiles, x, rows, y, acc_x, acc_y)
    return torch.stack(scale_sums) if scale_sums else None


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


def sigmoid_losses(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
    """Return numbers whose sum is the sigmoid loss of all logits except those of the pairs."""
    losses = []
    for rows, logits in _chunks(x, y):
        for piece in _pieces(logits):
            tile = _scaled(logits[piece], logit_scale, logit_bias)
            tile.diagonal(rows.start + piece.start + offset).fill_(float("-inf"))
            losses.append(F.softplus(tile).sum())
    return torch.stack(losses) if losses else logit_scale.new_zeros(0)


def add_sigmoid_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, acc_x: Tensor, acc_y: Tensor
) -> Tensor:
    """Add G y to acc_x and G^T x to acc_y for the sigmoid loss; return the sums over all logits except the pairs."""
    (grads,) = _scratch(x, y, 1)
    y = _wide(y)
    sums = []
    for rows, cosines in _chunks(x, y):
        for piece in _pieces(cosines):
            tile = cosines[piece]
            grad = grads[: tile.numel()].view_as(tile)
            _scaled(tile, logit_scale, logit_bias, out=grad)
            grad.diagonal(rows.start + piece.start + offset).fill_(float("-inf"))
            loss = F.softplus(grad).sum()
            grad.sigmoid_()
            sums.append(torch.stack((loss, grad.sum(), torch.dot(grad.view(-1), tile.view(-1)))))
            tile.copy_(grad)
        _add_products(cosines, x, rows, y, acc_x, acc_y)
    return torch.stack(sums, 1) if sums else logit_scale.new_zeros(3, 0)


def finish(
    acc: Tensor, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor
) -> Tensor:
    """Write the gradient of features, factor * (acc - one_minus_p * positive) through the normalisation, to ``out``.

    Return the product of each row's gradient and features, before factor and normalisation.
    """
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
    """Return features in the dtype that products are taken in."""
    return x.to(accumulate_dtype(x.dtype))


def _chunks(x: Tensor, y: Tensor, factor: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of logits: a slice of the rows of x, and ``factor`` times their products with y.

    Each chunk reuses the memory of the one before.
    """
    m, n = len(x), len(y)
    if m == 0 or n == 0:
        return
    size, columns = min(m, CHUNK_ROWS, max(16, CHUNK_ELEMENTS // n)), _wide(y).T
    buffer = columns.new_empty(size, n)
    alpha = 1 if factor is None else factor.item()
    for rows in slices(m, size):
        chunk = buffer[: rows.stop - rows.start]
        with _instructions_for(x.dtype):
            torch.addmm(chunk, _wide(x[rows]), columns, beta=0, alpha=alpha, out=chunk)
        yield rows, chunk


def _add_products(G: Tensor, x: Tensor, rows: slice, y: Tensor, acc_x: Tensor | None, acc_y: Tensor | None) -> None:
    """Add G y to some rows of acc_x, and G^T times the same rows of x to acc_y; y has the dtype of G."""
    with _instructions_for(x.dtype):
        if acc_x is not None:
            acc_x[rows].addmm_(G, y)
        if acc_y is not None:
            acc_y.addmm_(G.T, _wide(x[rows]))


@functools.cache
def _has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices."""
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
    """Write factor * tile + bias to ``out`` (to ``tile`` without it), in one pass, and return that."""
    return torch.add(bias, tile, alpha=factor.item(), out=tile if out is None else out)


def _scratch(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return ``count`` buffers that each hold as many numbers as a piece of the logits of x and y."""
    size = max(_piece_elements(), len(y))
    return x.new_empty(count, size, dtype=accumulate_dtype(x.dtype)).unbind()


def _pieces(chunk: Tensor) -> list[slice]:
    """Return slices of the rows of a chunk of logits, so that each piece fits into the cache."""
    return slices(len(chunk), max(1, _piece_elements() // chunk.shape[1]))


def _piece_elements() -> int:
    """Return the logits of a piece that all threads share."""
    return PIECE_ELEMENTS * torch.get_num_threads()

"""The computation of blocks of logits on a CPU: the kernels' algorithm in PyTorch. ``launches`` describes the
functions.

A chunk of rows is multiplied by all columns at once, a product that is large enough for BLAS to run at full speed. The
steps after it go through the chunk in pieces that fit into a core's cache. Products are in float32, or in float64 for
float64 features. Products of bfloat16 features use the CPU's bfloat16 instructions if it has them. The logits are then
as exact as in float32, but G is rounded to bfloat16, as in the kernels of a GPU.

The logits of a small batch fit into the cache all at once, and in blocks the calls would take longer than the
arithmetic. For such batches ``whole_loss`` has the formulas of :mod:`.contrastive` with the shift 0 for all rows and
columns.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..common import LOG2E, slices
from ..dtypes import accumulate_dtype
from ..launch import triton_runs_on
from .stats import (
    LEAST_SUM,
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

MOST_LOGITS = 2**20  # the most logits of a small batch: 4 MiB of float32
# Sums and powers between ``LEAST_SUM`` and this number have neither overflowed nor lost a term that matters.
LARGEST_SUM = 2.0**120
LEAST_SCALE = 2.0**-10  # below it, dividing by the scale would not give the gradient of the scale
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


def suits_whole(rows: Tensor, cols: Tensor, dtype: torch.dtype, ranks: int = 1) -> bool:
    """Return True if :func:`whole_loss` may compute all logits of a batch of this size on ``ranks`` ranks at once.

    It reads values of tensors, so tensors without values, as a tracer makes them, do not suit it.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        0 < rows.shape[0] * cols.shape[0] * ranks**2 <= MOST_LOGITS
        and rows.device.type == "cpu"
        and not triton_runs_on(rows.device)
        and type(rows) in (Tensor, torch.nn.Parameter)
        and torch.float64 not in (dtype, rows.dtype)
    )


def whole_operands(x: Tensor, y: Tensor, *, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return features for :func:`whole_loss`: in float32, but rounded to ``dtype``, as the products in blocks take
    them.

    Autocast is switched off for this. The gradients are not rounded.
    """
    x, y = (F.normalize(side.float(), dim=-1) if normalize else side.float() for side in (x, y))
    if dtype != torch.float32:
        x, y = (_Rounded.apply(side, dtype) for side in (x, y))  # type: ignore[no-untyped-call]
    return x, y


class _Rounded(torch.autograd.Function):
    """A rounding of float32 features to another dtype and back, through which gradients pass unchanged."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round features to ``dtype`` and return them in float32."""
        return x.to(dtype).float()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def whole_loss(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor | None:
    """Return the contrastive loss of a small batch from all its logits at once; None if its powers need a shift.

    The features x and y are [N, D], and the loss has both directions. If gradients will be needed, they are computed
    together with the loss, because computing them later takes more calls.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or logit_scale.requires_grad)
    with torch.no_grad():
        found = _loss_and_gradients(x, y, logit_scale, wanted)
    if found is None:
        return None
    if not wanted:
        return found[0]
    loss, *gradients = found
    return _WholeLoss.apply(  # type: ignore[no-untyped-call]
        reference.contrastive_loss, loss, x, y, logit_scale, *gradients
    )


def whole_sigmoid_loss(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
    """Return the sigmoid loss of a small batch from all its logits at once, with its gradients if they are needed."""
    loss_of = functools.partial(reference.sigmoid_loss, offset=offset)
    inputs = x, y, logit_scale, logit_bias
    wanted = [tensor.requires_grad for tensor in inputs]
    if not (torch.is_grad_enabled() and any(wanted)):
        return loss_of(*inputs)
    leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(inputs, wanted, strict=True)]
    with torch.enable_grad():
        loss = loss_of(*leaves)
    found = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad]))
    gradients = [next(found) if needed else None for needed in wanted]
    return _WholeLoss.apply(  # type: ignore[no-untyped-call]
        loss_of, loss.detach(), *inputs, *gradients
    )


def _loss_and_gradients(x: Tensor, y: Tensor, logit_scale: Tensor, wanted: bool) -> tuple[Tensor, ...] | None:
    """Return the loss and, if they are wanted, the gradients of x, y and the scale; None if another shift is needed."""
    powers = torch.mm(x, y.T).mul_(logit_scale)  # [N, N]
    positive = powers.diagonal().clone()
    powers.exp_().fill_diagonal_(0.0)
    sums = torch.cat((powers.sum(1), powers.sum(0), positive.exp()))
    least, largest = torch.aminmax(sums)
    if not (least.item() >= LEAST_SUM and largest.item() <= LARGEST_SUM):
        return None
    sums = sums.view(3, -1)
    totals = sums[:2]
    others = totals.log().sub_(positive)  # log(others / positive)
    coefficient = 1 / (2 * x.shape[0])
    loss = F.softplus(others).sum().mul_(coefficient)
    if not wanted:
        return (loss,)
    inv_row, inv_col = totals.add_(sums[2]).reciprocal_().unbind()
    G = powers.mul_(torch.add(inv_row.unsqueeze(1), inv_col))
    torch.sum(others.sigmoid_().neg_(), 0, out=G.diagonal())  # one_minus_p of both directions
    scale = logit_scale.item()
    if abs(scale) < LEAST_SCALE:
        x_grad = G @ y
        scale_grad = (x_grad * x).sum().mul_(coefficient)
        return loss, x_grad.mul_(coefficient * scale), (G.T @ x).mul_(coefficient * scale), scale_grad
    # BLAS multiplies by a number at no cost; beta=0 leaves out the first argument.
    x_grad = torch.addmm(y, G, y, beta=0, alpha=coefficient * scale)
    y_grad = torch.addmm(x, G.T, x, beta=0, alpha=coefficient * scale)
    return loss, x_grad, y_grad, torch.dot(x_grad.view(-1), x.reshape(-1)).div_(scale)


class _WholeLoss(torch.autograd.Function):
    """A loss of a small batch, whose gradients were computed together with it. Autocast does not round them."""

    @staticmethod
    def forward(ctx: Any, loss_of: Callable[..., Tensor], loss: Tensor, *tensors: Tensor | None) -> Tensor:
        """Return the loss; ``tensors`` are the inputs of ``loss_of``, the reference, and then their gradients."""
        ctx.loss_of = loss_of
        ctx.save_for_backward(*tensors)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        count = len(tensors) // 2
        inputs, gradients = tensors[:count], tensors[count:]
        found: list[Any] = [gradient if gradient is None else gradient * grad_loss for gradient in gradients]
        if torch.is_grad_enabled():
            # With create_graph=True the gradients depend on the inputs, as those of the reference do. They keep their
            # values, which are more exact than the reference's.
            wanted = [place for place in range(count) if inputs[place].requires_grad]
            with torch.autocast("cpu", enabled=False):
                loss = ctx.loss_of(*inputs)
                like = torch.autograd.grad(loss, [inputs[place] for place in wanted], grad_loss, create_graph=True)
            for place, gradient in zip(wanted, like, strict=True):
                found[place] = gradient + (found[place] - gradient).detach()
        return None, None, *found, *[None] * count

"""The losses of a small batch on a CPU, from all its logits at once, with their gradients.

These logits fit into the cache. If they were computed in blocks, PyTorch's calls would take longer than the arithmetic.
``whole_loss`` has the
formulas of :mod:`.contrastive` with the shift 0 for all rows and columns. Second derivatives are the reference's.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import apply_of, below_autograd
from ..launch import triton_runs_on
from .stats import LEAST_SUM

MOST_LOGITS = 2**20  # the most logits of a small batch: 4 MiB of float32
# Sums and powers between ``LEAST_SUM`` and this number have neither overflowed nor lost a term that matters.
LARGEST_SUM = 2.0**120
LARGEST_RATIO = 2.0**120  # a quotient of two sums up to this number does not overflow either


def suits_whole(rows: Tensor, cols: Tensor, dtype: torch.dtype, ranks: int = 1) -> bool:
    """Return True if :func:`whole_loss` may compute all logits of a batch of this size on ``ranks`` ranks at once.

    That function reads values of tensors, so tensors without values, which a tracer makes, do not suit it.
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


def whole_operands(*sides: Tensor, normalize: bool, dtype: torch.dtype) -> list[Tensor]:
    """Return features for a loss of all logits: in float32, but rounded to ``dtype``, as products in blocks take them.

    The gradients are not rounded.
    """
    found = [F.normalize(side.float(), dim=-1) if normalize else side.float() for side in sides]
    if dtype != torch.float32:
        found = [_Rounded.apply(side, dtype) for side in found]  # type: ignore[no-untyped-call]
    return found


class _Rounded(torch.autograd.Function):
    """A rounding of float32 features to another dtype and back, through which gradients pass unchanged."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round features to ``dtype`` and return them in float32."""
        return x.to(dtype).float()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of rounded contrastive features as it is."""
        return grad, None


def whole_loss(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor | None:
    """Return the contrastive loss of a small batch from all its logits at once; None if the logits need a shift.

    The features x and y are [N, D], and the loss has both directions.
    """
    return _whole(_loss_and_gradients, reference.contrastive_loss, x, y, logit_scale)


def whole_sigmoid_loss(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
    """Return the sigmoid loss of a small batch from all its logits at once."""
    of_offset = functools.partial(_sigmoid_loss_and_gradients, offset=offset)
    loss_of = functools.partial(reference.sigmoid_loss, offset=offset)
    loss: Tensor = _whole(of_offset, loss_of, x, y, logit_scale, logit_bias)  # type: ignore[assignment]
    return loss


def whole_nt_xent_loss(views: Tensor, logit_scale: Tensor) -> Tensor | None:
    """Return the NT-Xent loss of both views [2N, D] of a small batch, as :func:`whole_loss` does."""
    return _whole(_nt_xent_loss_and_gradients, _nt_xent_of_views, views, logit_scale)


def whole_info_nce_loss(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, *, in_batch: bool
) -> Tensor | None:
    """Return the InfoNCE loss of a small batch, as :func:`whole_loss` does; ``negatives`` may have no rows."""
    of_kind = functools.partial(_info_nce_loss_and_gradients, in_batch=in_batch)
    return _whole(of_kind, functools.partial(_info_nce_of, in_batch=in_batch), query, key, negatives, logit_scale)


def _info_nce_of(query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, *, in_batch: bool) -> Tensor:
    """Return the InfoNCE loss of all logits by the reference."""
    return reference.info_nce_loss(query, key, logit_scale, negatives=negatives, in_batch=in_batch)


def _nt_xent_of_views(views: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the NT-Xent loss of both views [2N, D] by the reference."""
    first, second = views.chunk(2)
    return reference.nt_xent_loss(first, second, logit_scale, normalize=False)


def _whole(loss_and_gradients: Callable[..., Any], loss_of: Callable[..., Tensor], *inputs: Tensor) -> Tensor | None:
    """Return a loss of a small batch, or None if its logits need a shift.

    If gradients will be needed, they are computed together with the loss, since a backward pass would take more calls
    of PyTorch. Autocast does not change the loss or its gradients.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _with_gradients(loss_and_gradients, loss_of, *inputs)
    found = loss_and_gradients(*inputs, wanted=False)
    return None if found is None else found[0]


def _are_exact(sums: Tensor) -> bool:
    """Return whether sums of powers keep their digits in a contrastive loss without a shift of the logits."""
    least, largest = (extreme.item() for extreme in torch.aminmax(sums))
    return least >= LEAST_SUM and largest <= min(LARGEST_SUM, LARGEST_RATIO * least)


def _gradients_of_rows(powers: Tensor, positive: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a cross-entropy over rows with respect to the logits of others, and of the pairs.

    Args:
        powers: [M, N], the powers of the logits with zeros for the pairs; they become the gradients.
        positive, others: [M], the power of each row's pair, and the sum of the others; both are overwritten.
    """
    inv_denom = positive.add_(others).reciprocal_()
    return powers.mul_(inv_denom.unsqueeze(1)), others.mul_(inv_denom).neg_()


@below_autograd
def _loss_and_gradients(x: Tensor, y: Tensor, logit_scale: Tensor, wanted: bool = True) -> tuple[Tensor, ...] | None:
    """Return the contrastive loss and, if they are wanted, the gradients of x, y and the scale; None if the logits need
    a shift.
    """
    scale, coefficient = logit_scale.item(), 1 / (2 * x.shape[0])
    # BLAS multiplies by a number at no cost; beta=0 leaves out the first argument.
    powers = torch.addmm(logit_scale, x, y.T, beta=0, alpha=scale).exp_()  # [N, N]
    diagonal = powers.diagonal()
    positive = diagonal.clone()
    diagonal.zero_()
    row_sum, col_sum = powers.sum(1), powers.sum(0)
    sums = torch.cat((row_sum, col_sum, positive))
    if not _are_exact(sums):
        return None
    others = sums.view(3, -1)[:2]
    loss = (others / positive).log1p_().sum().mul_(coefficient)
    if not wanted:
        return (loss,)
    inv_row, inv_col = others.add_(positive).reciprocal_().unbind()
    G = powers.mul_(torch.add(inv_row.unsqueeze(1), inv_col))
    # In the places of the pairs, G has minus one_minus_p, summed over both directions.
    diagonal.addcmul_(row_sum, inv_row, value=-1).addcmul_(col_sum, inv_col, value=-1)
    x_grad = torch.addmm(y, G, y, beta=0, alpha=coefficient)
    y_grad = torch.addmm(x, G.T, x, beta=0, alpha=coefficient * scale)
    scale_grad = (x_grad * x).sum()
    return loss, x_grad.mul_(scale), y_grad, scale_grad


@below_autograd
def _sigmoid_loss_and_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, wanted: bool = True
) -> tuple[Tensor, ...]:
    """Return the sigmoid loss and, if they are wanted, the gradients of x, y, the scale and the bias."""
    scale, coefficient = logit_scale.item(), 1 / x.shape[0]
    # [M, N], negated: the loss of a logit z is -logsigmoid(-z), and only that of a pair is -logsigmoid(z).
    logits = torch.addmm(logit_bias, x, y.T, beta=-1, alpha=-scale)
    pairs = logits.diagonal(offset)
    pairs.neg_()
    loss = F.logsigmoid(logits).sum().mul_(-coefficient)
    if not wanted:
        return (loss,)
    G = logits.neg_().sigmoid_()
    pairs.neg_()
    x_grad = torch.addmm(x, G, y, beta=0, alpha=coefficient)
    y_grad = torch.addmm(y, G.T, x, beta=0, alpha=coefficient * scale)
    scale_grad = (x_grad * x).sum()
    return loss, x_grad.mul_(scale), y_grad, scale_grad, G.sum().mul_(coefficient)


@below_autograd
def _nt_xent_loss_and_gradients(views: Tensor, logit_scale: Tensor, wanted: bool = True) -> tuple[Tensor, ...] | None:
    """Return the NT-Xent loss and, if they are wanted, the gradients of the views and the scale; None if the logits
    need a shift.
    """
    scale, count = logit_scale.item(), views.shape[0]
    powers = torch.addmm(logit_scale, views, views.T, beta=0, alpha=scale).exp_()  # [2N, 2N]
    powers.fill_diagonal_(0.0)
    upper, lower = powers.diagonal(count // 2), powers.diagonal(-(count // 2))
    positive = torch.cat((upper, lower))
    upper.zero_()
    lower.zero_()
    others = powers.sum(1)
    if not _are_exact(torch.cat((others, positive))):
        return None
    loss = (others / positive).log1p_().sum().mul_(1 / count)
    if not wanted:
        return (loss,)
    G, one_minus_p = _gradients_of_rows(powers, positive, others)
    upper.copy_(one_minus_p[: count // 2])
    lower.copy_(one_minus_p[count // 2 :])
    of_rows = torch.addmm(views, G, views, beta=0, alpha=1 / count)
    scale_grad = (of_rows * views).sum()
    return loss, of_rows.addmm_(G.T, views, alpha=1 / count).mul_(scale), scale_grad


@below_autograd
def _info_nce_loss_and_gradients(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, in_batch: bool, wanted: bool = True
) -> tuple[Tensor, ...] | None:
    """Return the InfoNCE loss and, if they are wanted, the gradients of all inputs; None if the logits need a shift."""
    scale, n = logit_scale.item(), query.shape[0]
    candidates = negatives if not in_batch else torch.cat((key, negatives)) if negatives.shape[0] else key  # [C, D]
    powers = torch.addmm(logit_scale, query, candidates.T, beta=0, alpha=scale).exp_()  # [N, C]
    if in_batch:
        diagonal = powers.diagonal()
        positive = diagonal.clone()
        diagonal.zero_()
    else:
        positive = torch.linalg.vecdot(query, key).mul_(scale).exp_()
    others = powers.sum(1)
    if not _are_exact(torch.cat((others, positive))):
        return None
    loss = (others / positive).log1p_().sum().mul_(1 / n)
    if not wanted:
        return (loss,)
    G, one_minus_p = _gradients_of_rows(powers, positive, others)
    if in_batch:
        diagonal.copy_(one_minus_p)
    query_grad = torch.addmm(query, G, candidates, beta=0, alpha=1 / n)
    key_grad = of_candidates = torch.addmm(candidates, G.T, query, beta=0, alpha=scale / n)
    if in_batch:
        key_grad, of_candidates = of_candidates[:n], of_candidates[n:]
    else:
        of_pairs = one_minus_p.mul_(1 / n).unsqueeze(1)
        query_grad.addcmul_(key, of_pairs)
        key_grad = (query * of_pairs).mul_(scale)
    scale_grad = (query_grad * query).sum()
    return loss, query_grad.mul_(scale), key_grad, of_candidates, scale_grad


class _WholeLoss(torch.autograd.Function):
    """A loss of a small batch, whose gradients are computed together with it. Autocast does not round them."""

    @staticmethod
    def forward(
        ctx: Any, loss_and_gradients: Callable[..., Any], loss_of: Callable[..., Tensor], *inputs: Tensor
    ) -> Any:
        """Return the loss of ``inputs``, or None if the logits need a shift; ``loss_of`` is the reference's loss."""
        found = loss_and_gradients(*inputs)
        if found is None:
            return None
        loss, *gradients = found
        ctx.loss_of = loss_of
        ctx.save_for_backward(*inputs, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that were computed with the contrastive loss, times the upstream gradient."""
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
        return None, None, *found


_with_gradients = apply_of(_WholeLoss)

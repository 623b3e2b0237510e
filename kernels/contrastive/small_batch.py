"""The losses of a small batch on a CPU, from all its logits at once, with their gradients.

These logits fit into the cache, and in blocks the calls would take longer than the arithmetic. ``whole_loss`` has the
formulas of :mod:`.contrastive` with the shift 0 for all rows and columns. Second derivatives are the reference's.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..launch import triton_runs_on
from .stats import LEAST_SUM

MOST_LOGITS = 2**20  # the most logits of a small batch: 4 MiB of float32
# Sums and powers between ``LEAST_SUM`` and this number have neither overflowed nor lost a term that matters.
LARGEST_SUM = 2.0**120
LEAST_SCALE = 2.0**-10  # below it, dividing by the scale would not give the gradient of the scale


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

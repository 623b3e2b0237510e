"""The losses of a small batch on a CPU, where the whole matrix of logits fits into the cache.

Blockwise work would cost more in calls than in arithmetic there. The formulas are those of :mod:`.contrastive`, with
one shift, 0, for all rows and columns, and the powers exp(s_ij) serve the loss and its gradients. As there, a pair is
in no sum, and 1 - p is never a difference from 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..launch import triton_runs_on

MOST_LOGITS = 2**20  # 4 MiB of float32
# Sums and powers between these have neither overflowed nor lost a term that matters.
LEAST_SUM, LARGEST_SUM = 2.0**-70, 2.0**120
LEAST_SCALE = 2.0**-10  # below it, dividing by the scale would not give the gradient of the scale


def suits_whole(rows: Tensor, cols: Tensor, dtype: torch.dtype, ranks: int = 1) -> bool:
    """Return True if all logits of features such as these on ``ranks`` ranks may be computed at once, in ``dtype``.

    The formulas here read values, so tensors that have none, such as a tracer's, do not suit them.
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
    """Return features in float32, rounded to ``dtype`` as the blockwise products take them; outside autocast.

    Their gradients are not rounded.
    """
    x, y = (F.normalize(side.float(), dim=-1) if normalize else side.float() for side in (x, y))
    if dtype != torch.float32:
        x, y = (_Rounded.apply(side, dtype) for side in (x, y))  # type: ignore[no-untyped-call]
    return x, y


class _Rounded(torch.autograd.Function):
    """Values in float32 that another dtype can hold; the gradient is that of the values before."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).float()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _NotExactError(Exception):
    """The powers of some logits need another shift than 0."""


def whole_loss(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor | None:
    """Return the loss of features [N, D] in both directions, or None if its powers need another shift than 0.

    The gradients are computed with the loss if they will be needed, because computing them later takes more calls.
    """
    needs_gradients = x.requires_grad or y.requires_grad or logit_scale.requires_grad
    try:
        if not (needs_gradients and torch.is_grad_enabled()):
            return _loss_and_gradients(x, y, logit_scale, wants_gradients=False)[0]
        loss: Tensor = _WholeLoss.apply(x, y, logit_scale)  # type: ignore[no-untyped-call]
        return loss
    except _NotExactError:
        return None


def _loss_and_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, *, wants_gradients: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and, if they are wanted, the gradients of x, y and the scale.

    Raises:
        _NotExactError: another shift is needed.
    """
    powers = torch.mm(x, y.T).mul_(logit_scale)  # [N, N]
    positive = powers.diagonal().clone()
    powers.exp_().fill_diagonal_(0.0)
    sums = torch.cat((powers.sum(1), powers.sum(0), positive.exp()))
    least, largest = torch.aminmax(sums)
    if not (least.item() >= LEAST_SUM and largest.item() <= LARGEST_SUM):
        raise _NotExactError
    sums = sums.view(3, -1)
    totals = sums[:2]
    others = totals.log().sub_(positive)  # log(others / positive)
    coefficient = 1 / (2 * x.shape[0])
    loss = F.softplus(others).sum().mul_(coefficient)
    if not wants_gradients:
        return loss, ()
    inv_row, inv_col = totals.add_(sums[2]).reciprocal_().unbind()
    G = powers.mul_(torch.add(inv_row.unsqueeze(1), inv_col))
    torch.sum(others.sigmoid_().neg_(), 0, out=G.diagonal())  # one_minus_p of both directions
    scale = logit_scale.item()
    if abs(scale) < LEAST_SCALE:
        x_grad = G @ y
        scale_grad = (x_grad * x).sum().mul_(coefficient)
        return loss, (x_grad.mul_(coefficient * scale), (G.T @ x).mul_(coefficient * scale), scale_grad)
    # BLAS multiplies by a number at no cost; beta=0 leaves out the first argument.
    x_grad = torch.addmm(y, G, y, beta=0, alpha=coefficient * scale)
    y_grad = torch.addmm(x, G.T, x, beta=0, alpha=coefficient * scale)
    return loss, (x_grad, y_grad, torch.dot(x_grad.view(-1), x.reshape(-1)).div_(scale))


class _WholeLoss(torch.autograd.Function):
    """The loss, whose gradients are computed along with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        loss, ctx.gradients = _loss_and_gradients(x, y, logit_scale)
        ctx.inputs = x, y, logit_scale
        ctx.versions = x._version, y._version, logit_scale._version
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, ...]:
        # The gradients are handed over, so that nobody has to copy them. A second backward pass computes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            if ctx.versions != tuple(tensor._version for tensor in ctx.inputs):
                raise RuntimeError("contrastive_loss: an input was modified in place between two backward passes")
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                _, gradients = _loss_and_gradients(*ctx.inputs)
        factor = grad_loss.item()
        if factor != 1:
            gradients = tuple(gradient.mul_(factor) for gradient in gradients)
        if torch.is_grad_enabled():  # create_graph=True: the gradients depend on the inputs again
            gradients = _final("contrastive_loss", gradients, ctx.inputs, grad_loss)
        return gradients


def whole_sigmoid_loss(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
    """Return the sigmoid loss of features [M, D] and [N, D], as the reference computes it."""
    inputs = x, y, logit_scale, logit_bias
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        return reference.sigmoid_loss(*inputs, offset=offset)
    loss: Tensor = _WholeSigmoidLoss.apply(offset, *inputs)  # type: ignore[no-untyped-call]
    return loss


class _WholeSigmoidLoss(torch.autograd.Function):
    """The loss, whose gradients are computed along with it: autocast may be on in the backward pass."""

    @staticmethod
    def forward(ctx: Any, offset: int, *inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            loss = reference.sigmoid_loss(*leaves, offset=offset)
        ctx.save_for_backward(*torch.autograd.grad(loss, leaves), *inputs)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = tuple(gradient * grad_loss for gradient in saved[:4])
        if torch.is_grad_enabled():
            gradients = _final("sigmoid_loss", gradients, saved[4:], grad_loss)
        return None, *gradients


def _final(op: str, gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...], grad_loss: Tensor) -> tuple[Tensor, ...]:
    """Return gradients of the loss of ``inputs`` whose own derivative is an error that names the op."""
    found: tuple[Tensor, ...] = _Final.apply(op, len(gradients), *gradients, *inputs, grad_loss)  # type: ignore[no-untyped-call]
    return found


class _Final(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(f"{ctx.op} has no second derivative: compute it with backend='torch'")

"""The contrastive loss of a small batch on a CPU, where the whole matrix of logits fits into the cache.

Blockwise work would cost more in calls than in arithmetic there. The formulas are those of :mod:`.contrastive`, with
one shift, 0, for all rows and columns: the powers exp(s_ij) of the forward pass are kept for the backward pass, so that
no product is computed twice. As there, a pair is in no sum, and 1 - p is never a difference from 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import triton_runs_on

MOST_LOGITS = 2**20  # 4 MiB of float32
# Sums between these have neither overflowed nor lost a term that matters.
LEAST_SUM, LARGEST_SUM = 2.0**-70, 2.0**120
LEAST_SCALE = 2.0**-10  # by a smaller one, the gradient of the scale cannot be divided out


def suits_whole(rows: Tensor, cols: Tensor, offset: int, dtype: torch.dtype) -> bool:
    """Return True if the loss of these features, multiplied in ``dtype``, may be computed by :func:`whole_loss`.

    It looks at values, so that tensors without any, as those of a tracer, do not suit it.
    """
    return (
        rows.device.type == "cpu"
        and not triton_runs_on(rows.device)
        and type(rows) in (Tensor, torch.nn.Parameter)
        and dtype == rows.dtype == torch.float32
        and offset == 0
        and 0 < len(rows) ** 2 <= MOST_LOGITS
        and len(rows) == len(cols)
        and not torch.compiler.is_compiling()
    )


def whole_loss(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor | None:
    """Return the loss of features [N, D] in both directions, or None if its powers need another shift than 0."""
    with torch.no_grad():
        powers = torch.mm(x, y.T).mul_(logit_scale)  # [N, N]
        positive = powers.diagonal().clone()
        powers.exp_().fill_diagonal_(0.0)
        sums = torch.cat((powers.sum(1), powers.sum(0))).view(2, -1)
        least, largest = torch.aminmax(sums)
        if not (least.item() >= LEAST_SUM and largest.item() <= LARGEST_SUM):
            return None
        others = sums.log().sub_(positive)  # log(others / positive)
        inv_denom = sums.add_(positive.exp_()).reciprocal_()
    loss: Tensor = _WholeLoss.apply(x, y, logit_scale, (powers, others, inv_denom))  # type: ignore[no-untyped-call]
    return loss


class _WholeLoss(torch.autograd.Function):
    """The loss and its gradient, from what :func:`whole_loss` has computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, logit_scale: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.found, ctx.logit_scale = found, logit_scale.item()
        return F.softplus(found[1]).sum().div_(2 * len(x))

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        powers, others, inv_denom = ctx.found
        coefficient = grad_loss.item() / (2 * len(x))
        with torch.no_grad():
            gradients = _gradients(x, y, ctx.logit_scale, powers, others, inv_denom, coefficient)
        if torch.is_grad_enabled():  # create_graph=True: the gradients depend on the features again
            gradients = _Final.apply(*gradients, x, y)  # type: ignore[no-untyped-call]
        return *gradients, None


def _gradients(
    x: Tensor, y: Tensor, logit_scale: float, powers: Tensor, others: Tensor, inv_denom: Tensor, coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, y and the scale; ``coefficient`` is that of the loss over the number of its terms."""
    weights = inv_denom * coefficient
    G = torch.add(weights[0, :, None], weights[1]).mul_(powers)  # [N, N]
    torch.sum(others.sigmoid().mul_(-coefficient), 0, out=G.diagonal())  # one_minus_p of both directions
    if abs(logit_scale) < LEAST_SCALE:
        x_grad, y_grad = G @ y, G.T @ x
        return x_grad * logit_scale, y_grad * logit_scale, (x_grad * x).sum()
    # BLAS multiplies by the scale at no cost; beta=0 leaves out the first argument.
    x_grad = torch.addmm(y, G, y, beta=0, alpha=logit_scale)
    y_grad = torch.addmm(x, G.T, x, beta=0, alpha=logit_scale)
    return x_grad, y_grad, torch.dot(x_grad.view(-1), x.reshape(-1)).div_(logit_scale)


class _Final(torch.autograd.Function):
    """The gradients of the loss, whose own derivative is an error."""

    @staticmethod
    def forward(
        _ctx: Any, x_grad: Tensor, y_grad: Tensor, scale_grad: Tensor, *_features: Tensor
    ) -> tuple[Tensor, ...]:
        return x_grad.clone(), y_grad.clone(), scale_grad.clone()

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("contrastive_loss has no second derivative: compute it with backend='torch'")

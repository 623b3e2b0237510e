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
from ..backends import apply_of, below_autograd
from ..launch import triton_runs_on
from .stats import LEAST_SUM

MOST_LOGITS = 2**20  # the most logits of a small batch: 4 MiB of float32
# Sums and powers between ``LEAST_SUM`` and this number have neither overflowed nor lost a term that matters.
LARGEST_SUM = 2.0**120
LARGEST_RATIO = 2.0**120  # the quotients of two sums do not overflow either


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
    together with the loss, because computing them later takes more calls. Autocast does not change anything.
    """
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or logit_scale.requires_grad):
        return _with_gradients(_loss_and_gradients, reference.contrastive_loss, x, y, logit_scale)
    found = _loss_and_gradients(x, y, logit_scale, wanted=False)
    return None if found is None else found[0]


def whole_sigmoid_loss(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
    """Return the sigmoid loss of a small batch from all its logits at once, with its gradients if they are needed."""
    loss_of = functools.partial(reference.sigmoid_loss, offset=offset)
    inputs = x, y, logit_scale, logit_bias
    wanted = [tensor.requires_grad for tensor in inputs]
    if not (torch.is_grad_enabled() and any(wanted)):
        return loss_of(*inputs)

    def loss_and_gradients(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(inputs, wanted, strict=True)]
        with torch.enable_grad():
            loss = loss_of(*leaves)
        found = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad]))
        return loss.detach(), *(next(found) if needed else None for needed in wanted)

    return _with_gradients(loss_and_gradients, loss_of, *inputs)


@below_autograd
def _loss_and_gradients(x: Tensor, y: Tensor, logit_scale: Tensor, wanted: bool = True) -> tuple[Tensor, ...] | None:
    """Return the loss and, if they are wanted, the gradients of x, y and the scale; None if another shift is needed."""
    scale, coefficient = logit_scale.item(), 1 / (2 * x.shape[0])
    # BLAS multiplies by a number at no cost; beta=0 leaves out the first argument.
    powers = torch.addmm(logit_scale, x, y.T, beta=0, alpha=scale).exp_()  # [N, N]
    diagonal = powers.diagonal()
    positive = diagonal.clone()
    diagonal.zero_()
    row_sum, col_sum = powers.sum(1), powers.sum(0)
    sums = torch.cat((row_sum, col_sum, positive))
    least, largest = (extreme.item() for extreme in torch.aminmax(sums))
    if not (least >= LEAST_SUM and largest <= min(LARGEST_SUM, LARGEST_RATIO * least)):
        return None
    others = sums.view(3, -1)[:2]
    loss = (others / positive).log1p_().sum().mul_(coefficient)
    if not wanted:
        return (loss,)
    inv_row, inv_col = others.add_(positive).reciprocal_().unbind()
    G = powers.mul_(torch.add(inv_row.unsqueeze(1), inv_col))
    # For the pairs, G has minus one_minus_p of both directions.
    diagonal.addcmul_(row_sum, inv_row, value=-1).addcmul_(col_sum, inv_col, value=-1)
    x_grad = torch.addmm(y, G, y, beta=0, alpha=coefficient)
    y_grad = torch.addmm(x, G.T, x, beta=0, alpha=coefficient * scale)
    scale_grad = (x_grad * x).sum()
    return loss, x_grad.mul_(scale), y_grad, scale_grad


class _WholeLoss(torch.autograd.Function):
    """A loss of a small batch, whose gradients are computed together with it. Autocast does not round them."""

    @staticmethod
    def forward(
        ctx: Any, loss_and_gradients: Callable[..., Any], loss_of: Callable[..., Tensor], *inputs: Tensor
    ) -> Any:
        """Return the loss, or None if there is none; ``loss_of`` is the reference for both functions of ``inputs``."""
        found = loss_and_gradients(*inputs)
        if found is None:
            return None
        loss, *gradients = found
        ctx.loss_of = loss_of
        ctx.save_for_backward(*inputs, *gradients)
        return loss

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
        return None, None, *found


_with_gradients = apply_of(_WholeLoss)

"""Activations that PyTorch computes, and gradients, for the functions of a transformer block (:mod:`.whole_block`)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fp8_layers

QUICK = "quick"


def linear_grads(
    ctx: Any, name: str, grad: Tensor, x: Any, weight: Any, weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of input, weight and bias of a block's linear layer on rows.

    The gradients of weight and bias have the dtypes given, where the product can be rounded to them at once; they are
    None for a dtype that is None, and that of the weight for an ``x`` of None. In 8 bits, ``weight`` is the columns of
    the weight, and ``name`` is the key under which the layer's plans are kept.
    """
    fp8 = ctx.options.fp8
    if fp8 == fp8_layers.FULL:
        wanted = weight_dtype is not None, bias_dtype is not None
        return fp8_layers.full_grads(ctx.plans, name, grad, x, weight, *wanted)
    dx = grad.mm(weight) if fp8 is None else fp8_layers.input_grad(ctx.plans, name, grad, weight)
    dw = None if x is None else weight_grad(grad, x, weight_dtype)
    return dx, dw, grad.sum(0, dtype=bias_dtype) if bias_dtype else None


def weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Return the gradient of the weight of a block's linear layer with the input ``x``, as :func:`linear_grads`."""
    if dtype is None:
        return None
    is_widened = dtype == torch.float32 and grad.is_cuda and grad.dtype != dtype
    return torch.mm(grad.t(), x, out_dtype=dtype) if is_widened else grad.t().mm(x)


def gelu_of(h: Tensor, gelu: str) -> Tensor:
    """Return the activation of a transformer block, for a GELU that PyTorch computes."""
    return h * torch.sigmoid(1.702 * h) if gelu == QUICK else F.gelu(h, approximate=gelu)


def gelu_grad(grad: Tensor, h: Tensor, gelu: str) -> Tensor:
    """Return the gradient of the input of a transformer block's activation, for a GELU that PyTorch computes."""
    if gelu != QUICK:
        return torch.ops.aten.gelu_backward(grad, h, approximate=gelu)
    p = torch.sigmoid(1.702 * h)
    return grad * p + 1.702 * torch.ops.aten.sigmoid_backward(grad * h, p)


def in_dtypes(grads: Sequence[Tensor | None], wanted: Sequence[Any]) -> list[Tensor | None]:
    """Return gradients of a transformer block in the dtypes that are wanted, by one launch; None for the others."""
    results = list(grads)
    targets, sources = [], []
    for k, (grad, dtype) in enumerate(zip(grads, wanted, strict=True)):
        if dtype is None or grad is None:
            results[k] = None
        elif grad.dtype != dtype:
            results[k] = target = torch.empty_like(grad, dtype=dtype)
            targets.append(target)
            sources.append(grad)
    if targets:
        torch._foreach_copy_(targets, sources)
    return results

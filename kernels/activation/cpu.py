"""The activations with a bias on the CPU by PyTorch's own functions: the same functions as in ``launches``."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulate_dtype

# This calls PyTorch's op without its Python wrapper, which would take the host longer.
_gelu_backward: Any = torch.ops.aten.gelu_backward.default._op


def forward(x: Tensor, bias: Tensor, quick: bool) -> Callable[..., Tensor]:
    """Return the function that computes GELU(x + bias), or QuickGELU if ``quick``, in PyTorch."""
    dtype = accumulate_dtype(x.dtype)
    is_wide = x.dtype == dtype

    def compute(x: Tensor, bias: Tensor, *_: Any) -> Tensor:
        """Compute an activation with its bias on the CPU."""
        u = (x if is_wide else x.to(dtype)) + bias
        y = u * torch.sigmoid(1.702 * u) if quick else F.gelu(u)
        return (y if is_wide else y.to(x.dtype)).contiguous()

    return compute


def backward(
    grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool, with_y: bool = False
) -> Callable[..., Any]:
    """Return the function that computes the gradients of bias and activation in PyTorch, and the activation y after
    them if ``with_y``.
    """
    dtype = accumulate_dtype(x.dtype)
    is_wide, rows = x.dtype == dtype, list(range(x.ndim - 1))
    activate = forward(x, bias, quick)

    def compute(grad: Tensor, x: Tensor, bias: Tensor, *_: bool) -> tuple[Tensor | None, ...]:
        """Compute the gradients of an activation and its bias on the CPU."""
        y = (activate(x, bias, quick),) if with_y else ()
        u, grad = (x + bias, grad) if is_wide else (x.to(dtype) + bias, grad.to(dtype))
        if quick:
            p = torch.sigmoid(1.702 * u)
            dx = grad * (p + 1.702 * (p * (1 - p) * u))
        else:
            dx = _gelu_backward(grad, u)
        sums = (dx.sum(rows) if rows else dx.clone()) if with_sums else None
        return (dx if is_wide else dx.to(x.dtype)).contiguous(), sums, *y

    return compute

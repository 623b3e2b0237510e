"""Layer norm on the CPU by PyTorch's own functions: the same functions as in ``launches``.

They compute in float32 or wider, since PyTorch's functions would round the sums over rows to 16 bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype

# This calls PyTorch's op without its Python wrapper, which would take the host longer.
_backward: Any = torch.ops.aten.native_layer_norm_backward.default._op


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Callable[..., Any]:
    """Return the function that computes the layer norm y, the sum s (None without a residual), and mean and rstd
    [..., 1] of each row.
    """
    dtype, shape = accumulate_dtype((x if residual is None else residual).dtype), x.shape[-1:]
    tensors = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    is_same = all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors)

    def compute(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Any, ...]:
        """Compute the layer norm of x, or of x + residual, on the CPU."""
        s = x if residual is None else torch.add(x, residual)
        if is_same:
            y, mean, rstd = torch.native_layer_norm(s, shape, weight, bias, eps)
            return y, None if residual is None else s, mean, rstd
        if residual is not None:
            s = s.to(residual.dtype).contiguous()
        y, mean, rstd = torch.native_layer_norm(s.to(dtype), shape, weight.to(dtype), bias.to(dtype), eps)
        return y.to(x.dtype), None if residual is None else s, mean, rstd

    return compute


def backward(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool,
    bias: Tensor | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Return the function that computes the layer norm's gradients: ds, dx (None if it has the dtype of ds), and dw and
    db (each None unless ``with_sums``). If ``bias`` is given, it also returns the norm y in the dtype of ``grad_y``.
    """
    dtype, shape, mask = accumulate_dtype(s.dtype), s.shape[-1:], [True, with_sums, with_sums]
    is_same = grad_y.dtype == s.dtype == weight.dtype == dtype

    def compute(
        grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, _: bool,
        bias: Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Compute the gradients of layer norm on the CPU."""
        y = () if bias is None else (((s - mean) * rstd * weight + bias).to(grad_y.dtype).contiguous(),)
        if is_same:
            ds, *sums = _backward(grad_y, s, shape, mean, rstd, weight, weight, mask)
            return ds if grad_s is None else ds.add_(grad_s), None, tuple(sums), *y
        wide = weight.to(dtype)
        ds, *sums = _backward(grad_y.to(dtype), s.to(dtype), shape, mean, rstd, wide, wide, mask)
        if grad_s is not None:
            ds += grad_s
        dx = ds.to(grad_y.dtype) if grad_y.dtype != s.dtype else None
        return ds.to(s.dtype), dx, tuple(sums), *y

    return compute

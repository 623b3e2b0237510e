"""Layer norm on the CPU by PyTorch's own functions, in float32 or wider: in 16 bits they would round the sums over
rows.

The functions have the arguments and results of those in ``launches``; with float64 input they compute in float64.
"""

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the layer norm y, the sum s (empty without a residual), and mean and rstd [...] of each row."""
    s = x if residual is None else torch.add(x, residual).to(residual.dtype).contiguous()
    dtype = accumulate_dtype(s.dtype)
    y, mean, rstd = torch.native_layer_norm(s.to(dtype), s.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return y.to(x.dtype), s.new_empty(0) if residual is None else s, mean.squeeze(-1), rstd.squeeze(-1)


def backward(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ds, dx (empty if it has the dtype of ds), and dw and db [2, N] (empty unless ``with_sums``)."""
    dtype = accumulate_dtype(s.dtype)
    weight = weight.to(dtype)
    ds, *sums = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(dtype),
        s.to(dtype),
        s.shape[-1:],
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        weight,
        weight,
        [True, with_sums, with_sums],
    )
    if grad_s is not None:
        ds += grad_s
    dx = ds.to(grad_y.dtype) if grad_y.dtype != s.dtype else grad_y.new_empty(0)
    return ds.to(s.dtype), dx, torch.stack(sums) if with_sums else weight.new_empty(2, 0)

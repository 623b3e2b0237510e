"""Layer norms on the CPU: PyTorch's own, in float32 at least, since in 16 bits it would round the sums over rows.

The functions have the arguments and results of those in ``launches``; with float64 input they compute in float64.
"""

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute y, s (empty without a residual), and mean and rstd [M] of each row."""
    s = x if residual is None else torch.add(x, residual).to(residual.dtype).contiguous()
    dtype = accumulate_dtype(s.dtype)
    y, mean, rstd = torch.native_layer_norm(s.to(dtype), s.shape[1:], weight.to(dtype), bias.to(dtype), eps)
    return y.to(x.dtype), s.new_empty(0) if residual is None else s, mean.flatten(), rstd.flatten()


def backward(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ds, dx (empty where it has the dtype of ds), and dw and db [2, N] (empty unless ``with_sums``)."""
    dtype = accumulate_dtype(s.dtype)
    weight = weight.to(dtype)
    ds, *sums = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(dtype), s.to(dtype), s.shape[1:], mean, rstd, weight, weight, [True, with_sums, with_sums]
    )
    if grad_s is not None:
        ds += grad_s
    dx = ds.to(grad_y.dtype) if grad_y.dtype != s.dtype else grad_y.new_empty(0)
    return ds.to(s.dtype), dx, torch.stack(sums) if with_sums else weight.new_empty(2, 0)


def pair_forward(x: Tensor, parameters: list[Tensor], eps_1: float, eps_2: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute s, y, and mean and rstd of both norms [4, M]; ``parameters`` are all four."""
    dtype, width = accumulate_dtype(x.dtype), x.shape[1:]
    weight_1, bias_1, weight_2, bias_2 = (p.to(dtype) for p in parameters)
    s, *stats_1 = torch.native_layer_norm(x.to(dtype), width, weight_1, bias_1, eps_1)
    s = s.to(x.dtype)
    y, *stats_2 = torch.native_layer_norm(s.to(dtype), width, weight_2, bias_2, eps_2)
    return s, y.to(x.dtype), torch.stack([value.flatten() for value in (*stats_1, *stats_2)])


def pair_backward(
    grad_s: Tensor | None, grad_y: Tensor, x: Tensor, parameters: list[Tensor], stats: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """Compute dx, and the gradients of all four parameters [4, N] (empty unless ``with_sums``) from the first three."""
    dtype, width = accumulate_dtype(x.dtype), x.shape[1:]
    weight_1, bias_1, weight_2 = (p.to(dtype) for p in parameters)
    mean_1, rstd_1, mean_2, rstd_2 = stats[..., None]
    wide = x.to(dtype)
    s = ((wide - mean_1) * rstd_1 * weight_1 + bias_1).to(x.dtype).to(dtype)  # rounded as in forward
    through_norm, mask = torch.ops.aten.native_layer_norm_backward, [True, with_sums, with_sums]
    ds, *sums_2 = through_norm(grad_y.to(dtype), s, width, mean_2, rstd_2, weight_2, weight_2, mask)
    if grad_s is not None:
        ds += grad_s
    dx, *sums_1 = through_norm(ds, wide, width, mean_1, rstd_1, weight_1, weight_1, mask)
    return dx.to(x.dtype), torch.stack([*sums_1, *sums_2]) if with_sums else wide.new_empty(4, 0)

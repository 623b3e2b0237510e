"""Rows in 8 bits on the CPU, and their products, exactly emulated: the same functions as in ``launches``."""

import torch
from torch import Tensor

from ..fp8_rows import rounded


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the values [..., K] and the scales [...] of rows."""
    return rounded(x, dtype)


def quantize_both(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the values and the scales of the rows of a matrix [M, K], and of its columns as rows [K, M]."""
    return *rounded(x, dtype), *rounded(x.T, dtype)


def multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Return the products [M, N] of rows ``a`` [M, K] and ``b`` [N, K], plus a bias [N].

    The products of two values are exact in float32, which adds them up; scales and bias come after the sum.
    """
    wide = a_scale.dtype
    y = a.to(wide) @ b.to(wide).T
    y *= a_scale[:, None]
    y *= b_scale
    return (y if bias is None else y.add_(bias)).to(dtype)

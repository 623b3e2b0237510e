"""Rows in 8 bits on the CPU, by PyTorch's own functions: the same functions as in ``launches``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..activation import cpu as activation
from ..dtypes import accumulate_dtype
from ..fp8_rows import E4M3, rounded, zero_carrier


def quantize(x: Tensor, dtype: torch.dtype, *, carried: bool = False) -> Callable[[Tensor], Any]:
    """Return the function that rounds rows like ``x`` to 8 bits, and returns the carrier (if ``carried``), the values
    and the scales.
    """

    def compute(x: Tensor) -> Any:
        """Round rows to 8 bits on the CPU."""
        return (zero_carrier(x), *rounded(x, dtype)) if carried else rounded(x, dtype)

    return compute


def bias_act(x: Tensor, bias: Tensor, quick: bool) -> Callable[..., Any]:
    """Return the function that computes GELU(x + bias), or QuickGELU if ``quick``, as carrier, values and scales.

    The activation is rounded to 8 bits once, from float32.
    """
    wide = accumulate_dtype(x.dtype)
    activate = activation.forward(x.to(wide), bias, quick)

    def compute(x: Tensor, bias: Tensor, quick: bool) -> tuple[Tensor, ...]:
        """Compute an activation with its bias in 8 bits on the CPU."""
        return zero_carrier(x), *rounded(activate(x.to(wide), bias, quick), E4M3)

    return compute


def with_rows(
    compute: Callable[..., Any], dx_of: Callable[[Any], Tensor],
    quantize: Callable[[Tensor], Any] = lambda x: rounded(x, E4M3),
) -> Callable[..., Any]:  # fmt: skip
    """Return the function that returns the results of ``compute``, the gradients of a layer norm or an activation, and
    after them the values and the scales of dx in 8 bits; ``dx_of`` returns dx from the results.
    """

    def both(*args: Any) -> tuple[Any, ...]:
        """Compute the gradients of a layer norm or an activation, and round the rows of dx to 8 bits."""
        found = compute(*args)
        return *found, *quantize(dx_of(found))

    return both


def bias_act_bwd(*args: Any) -> Callable[..., Any]:
    """Return the function that computes the gradients of bias and activation, and that of x in 8 bits as well."""
    return with_rows(activation.backward(*args), lambda found: found[0])


def dequantize(values: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that widens 8-bit rows like ``values`` and their scales to rows in ``dtype``."""

    def compute(values: Tensor, scale: Tensor) -> Tensor:
        """Widen rows of 8 bits on the CPU."""
        return (values.to(scale.dtype) * scale[..., None]).to(dtype)

    return compute


def quantize_both(x: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    """Return the function that rounds a matrix like ``x`` [M, N] to 8 bits along its rows, and along its columns.

    It returns the values and the scales of the rows, and those of the columns as rows [N, M].
    """
    return lambda x: (*rounded(x, dtype), *rounded(x.T, dtype))


def quantize_columns(values: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Any]:
    """Return the function that rounds the columns of rows in 8 bits like ``values`` [M, N], given with their scales.

    It returns the values and the scales of the columns as rows [N, M].
    """
    return lambda values, scale: rounded((values.to(scale.dtype) * scale[:, None]).T, dtype)

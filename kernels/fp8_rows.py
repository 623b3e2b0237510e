"""Rows in 8 bits with one scale each: the type, and its rounding in plain PyTorch, with which the kernels agree in
every bit.

For a row x of width K and a dtype of 8 bits whose largest number is L (448 in e4m3, 57,344 in e5m2):

    m = max of |x_k|        scale = m / L        values_k = round(x_k * (L / m))

Products and quotients are those of float32; ``round`` is to the nearest number of the dtype, ties to even. A row of
zeros has the scale 1. A row whose m is less than 2^-100 is rounded as if m were 2^-100, so that neither L / m nor the
scale leaves the normal numbers of float32. NaN stays NaN, and the other numbers of its row stay accurate. A row with an
infinity becomes NaN as a whole: its scale is infinite, and its values are zeros and NaN.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# This returns the address of a device's current stream. PyTorch without CUDA lacks it.
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
LEAST = 2.0**-100  # the least m of a row that is not zero


class Fp8Rows(NamedTuple):
    """Rows [..., K] in 8 bits: row i is about ``values[i] * scale[i]``. An op that quantises returns them.

    Rows of float64, in which only CPUs compute, are not rounded: their values stay float64, and all scales are 1. So
    an op in float64 gives the results that errors of 8 bits are measured against.

    Attributes:
        values: [..., K], float8_e4m3fn or float8_e5m2, contiguous.
        scale: [...], float32; 1 for a row of zeros.
        carrier: zeros [..., K] in the dtype of the rows before they were quantised, or None for rows without a
            gradient. Autograd sends the gradient of the rows through the carrier, since autograd would round a gradient
            of ``values`` to 8 bits. All elements of the carrier share one address in memory.
    """

    values: Tensor
    scale: Tensor
    carrier: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows before they were quantised, in which products of them are returned."""
        return self.scale.dtype if self.carrier is None else self.carrier.dtype

    def dequantize(self) -> Tensor:
        """Return the rows [..., K] as numbers in :attr:`dtype`; their gradient is that of the rows."""
        rows = self.wide().to(self.dtype)
        return rows if self.carrier is None else rows + self.carrier

    def wide(self) -> Tensor:
        """Return values times scales of the rows [..., K], in the dtype of the scales, in which only this product is
        rounded; without a gradient.
        """
        return self.values.to(self.scale.dtype) * self.scale[..., None]


class Fp8Weight(NamedTuple):
    """The two forms in 8 bits of a weight [N, K] that the products of a linear layer multiply.

    Attributes:
        rows: the rows of the weight, [N, K], for the forward pass.
        columns: its columns, the rows [K, N] of the transposed weight, for the gradient of the input.
    """

    rows: Fp8Rows
    columns: Fp8Rows


def lay_beside(grad: Tensor, values: Tensor | None, scale: Tensor | None) -> None:
    """Attach to a gradient its rows in 8 bits, so that the linear layer whose output it belongs to need not round it.

    They are an attribute of the tensor. If autograd hands the layer another tensor, such as a sum of gradients or the
    result of a hook, the attribute is missing, and the layer rounds the gradient itself, to the same bits. A tensor of
    inference mode gets no rows, since PyTorch does not count the changes of such a tensor.
    """
    if not grad.is_inference():
        grad.fp8_rows = grad._version, _stream(grad), values, scale  # type: ignore[attr-defined]


def rows_beside(grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the 8-bit values and the scales that :func:`lay_beside` has attached to a gradient; (None, None) if there
    are none, if the gradient was changed in place afterwards, or if another CUDA stream is current than at that time.

    Autograd lets the memory of a gradient wait for the stream of the layer that reads it, but not that of its rows.
    """
    version, stream, values, scale = getattr(grad, "fp8_rows", (None,) * 4)
    is_valid = version is not None and version == grad._version and stream == _stream(grad)
    return (values, scale) if is_valid else (None, None)


def _stream(x: Tensor) -> int:
    """Return the address of the current CUDA stream of the device of a tensor; 0 on a CPU."""
    return _current_stream(x.device.index) if x.is_cuda and _current_stream is not None else 0


def takes_rows(x: Tensor) -> bool:
    """Return whether the autograd function that computed ``x`` uses rows in 8 bits that are attached to its gradient.

    If ``x`` has a hook, the answer is no: a hook may change the gradient, and PyTorch does not count the changes that
    some functions make, such as collectives.
    """
    return not x._backward_hooks and getattr(x.grad_fn, "takes_rows", False)


def zero_carrier(x: Tensor) -> Tensor:
    """Return the carrier of rows that have the shape and the dtype of ``x``."""
    return x.new_zeros(()).expand(x.shape)


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return values and scales of rows [..., K]; this specifies the bits that kernels write."""
    if x.dtype == torch.float64:  # A copy, since a registered op must not return its argument.
        return x.clone(memory_format=torch.contiguous_format), x.new_ones(x.shape[:-1])
    x, most = x.float(), LARGEST[dtype]
    size = x.abs().nan_to_num(nan=0.0, posinf=float("inf"))
    largest = size.amax(-1) if x.shape[-1] else size.sum(-1)
    largest = torch.where(largest == 0, most, largest.clamp(min=LEAST))
    # PyTorch would round a quotient of a number and a tensor twice, by way of the reciprocal.
    limit = torch.full_like(largest, most)
    values = x * (limit / largest)[..., None]
    return values.to(dtype).contiguous(), (largest / limit).contiguous()

"""Products of rows in 8 bits: by PyTorch's kernel on a GPU, exactly emulated on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

ALIGNED = 16  # PyTorch's product of rows in 8 bits needs widths that are multiples of 16


def multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Return the products [M, N] of rows ``a`` [M, K] and ``b`` [N, K] in 8 bits, plus a bias [N].

    On a CPU, the products of two values are exact in float32, which adds them up; scales and bias come after the sum.
    On a GPU, PyTorch's product with a scale for each row returns bfloat16. With ``use_fast_accum=False``, it adds up
    partial sums of the matrix unit in float32. Fake tensors take the path of a GPU, since a compiler makes them.
    """
    if a.device.type != "cuda" and not isinstance(a, FakeTensor):
        y = a.to(a_scale.dtype) @ b.to(a_scale.dtype).T
        y *= a_scale[:, None]
        y *= b_scale
        return (y if bias is None else y.add_(bias)).to(dtype)
    n = len(b)
    bias = bias if bias is None else bias.to(torch.bfloat16)  # as autocast casts the bias of a linear layer
    if n % ALIGNED:
        b_scale, bias = F.pad(b_scale, (0, -n % ALIGNED)), bias if bias is None else F.pad(bias, (0, -n % ALIGNED))
    y = torch._scaled_mm(
        _padded(a, 0), _padded(b, ALIGNED).T, a_scale[:, None], b_scale[None], bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )  # fmt: skip
    return y[:, :n].contiguous().to(dtype)


def _padded(x: Tensor, rows: int) -> Tensor:
    """Pad rows in 8 bits to a width that PyTorch's product takes, and to a multiple of ``rows`` unless that is 0."""
    missing = -x.shape[1] % ALIGNED, -x.shape[0] % rows if rows else 0
    return F.pad(x.view(torch.uint8), (0, missing[0], 0, missing[1])).view(x.dtype) if any(missing) else x

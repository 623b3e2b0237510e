"""Small helpers that the host code of several ops shares: slices, rows, and matrices for tensor descriptors."""

import math

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


def cdiv(a: int, b: int) -> int:
    """Return the quotient rounded up. Triton's own function of this name takes the host some 5 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not less than ``n``, such as the size of a kernel's tile."""
    return 1 << max(0, n - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """Reshape an op's input [..., N] to [M, N]; the result is a view if one stride leads to each row, else a copy."""
    return x.reshape(num_rows(x), x.shape[-1])


def num_rows(x: Tensor) -> int:
    """Return the number of rows of an op's input ``x`` [..., N]."""
    return math.prod(x.shape[:-1])


def row_layout(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the memory of an op's ``x`` [..., N], and the strides of its rows [M, N] there."""
    if x.is_contiguous():
        return x, (x.shape[-1], 1)
    rows = as_rows(x)
    return rows, rows.stride()


def new_contiguous(like: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor with the shape, the dtype and the device of ``like``."""
    # empty_like takes half the time of new_empty, but would keep other strides.
    return torch.empty_like(like) if like.is_contiguous() else like.new_empty(like.shape)


def slices(length: int, size: int) -> list[slice]:
    """Cut ``range(length)`` into pieces of ``size``; the last piece may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def new_rows(like: Tensor, rows: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised matrix [rows, cols] on the device of ``like``, and in its dtype if none is given.

    Its rows start at multiples of 16 bytes, as tensor descriptors need.
    """
    multiple = 16 // (dtype or like.dtype).itemsize
    return like.new_empty(rows, cdiv(cols, multiple) * multiple, dtype=dtype)[:, :cols]


def matrix_tiles(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Return a descriptor of tiles [rows, cols] of a matrix, which the tensor memory accelerator of sm_90 reads."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, cols])

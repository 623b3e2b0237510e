"""Small helpers that the host code of several ops shares: slices, rows, and matrices for tensor descriptors."""

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


def as_rows(x: Tensor) -> Tensor:
    """Reshape [..., N] to [M, N]; the result is a view if one stride leads from each row to the next, else a copy."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def slices(length: int, size: int) -> list[slice]:
    """Cut ``range(length)`` into pieces of ``size``; the last piece may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def new_rows(like: Tensor, rows: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised matrix [rows, cols] on the device of ``like``, and in its dtype if none is given.

    Its rows start at multiples of 16 bytes, as tensor descriptors need.
    """
    multiple = 16 // (dtype or like.dtype).itemsize
    return like.new_empty(rows, triton.cdiv(cols, multiple) * multiple, dtype=dtype)[:, :cols]


def matrix_tiles(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Return a descriptor of tiles [rows, cols] of a matrix, which the tensor memory accelerator of sm_90 reads."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, cols])

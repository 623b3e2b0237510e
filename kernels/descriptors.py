"""Matrices whose tiles tensor descriptors bring, which the tensor memory accelerator of sm_90 and newer reads."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def new_rows(like: Tensor, rows: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised matrix [rows, cols] on the device of ``like``, and in its dtype if none is given.

    Its rows start at multiples of 16 bytes, as tensor descriptors need.
    """
    multiple = 16 // (dtype or like.dtype).itemsize
    return like.new_empty(rows, triton.cdiv(cols, multiple) * multiple, dtype=dtype)[:, :cols]


def matrix_tiles(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Return a descriptor of tiles [rows, cols] of a matrix."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, cols])

"""The arguments and constants of the two launches of this folder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..common import LOG2E

BLOCK = (4096, 8192)  # of G: it takes 67 MB, which fit into the memory of y's gradient and as much again
PROGRAMS = 128  # of the backward pass, one on each of as many multiprocessors of an H100's 132
_TILE, _STEP, _PRODUCT_COLS, _PART = 128, 64, 256, 64
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def descriptor(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Describe a contiguous matrix to TMA, in tiles of this size."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], _DTYPES[matrix.dtype])
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, cols], layout)


def stats_constants(width: int) -> dict[str, int]:
    """Return the constants of ``stats_kernel``."""
    return {"KS": width // _STEP, "SLOTS": 5, "BM": _TILE, "BN": _TILE, "BK": _STEP}


def stats_arguments(x: Tensor, y: Tensor, scale: Tensor, offset: int, empty: Callable[..., Tensor]) -> dict[str, Any]:
    """Return the arguments of ``stats_kernel`` for features [M, D] and [N, D], with M a multiple of 256."""
    (m, _), n = x.shape, len(y)
    return {
        "x": descriptor(x, _TILE, _STEP), "y": descriptor(y, _TILE, _STEP), "scale_ptr": scale,
        "row_sum_ptr": empty(-(-n // _TILE), m), "col_sum_ptr": empty(1, n),
        "M": m, "N": n, "offset": offset, "segments": 1, "tiles": -(-m // (2 * _TILE)) * 2, "log2e": LOG2E,
    }  # fmt: skip


def backward_constants(width: int) -> dict[str, int]:
    """Return the constants of ``backward_kernel``."""
    return stats_constants(width) | {"SLOTS_OF_PRODUCTS": 3}


def backward_arguments(
    x: Tensor, y: Tensor, offset: int, empty: Callable[..., Tensor],
    block: tuple[int, int] = BLOCK, programs: int = PROGRAMS,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of ``backward_kernel`` for features [M, D] and [N, D].

    What it is given besides (``scale_ptr`` and so on) is ``empty`` too, and ``counters`` must be set to 0.
    """
    (m, d), n, (rows, cols) = x.shape, len(y), block
    g, acc_x, acc_y = empty(rows, cols, dtype=x.dtype), empty(rows, d), empty(n, d)
    segments = programs // (cols // _TILE)
    of_x, of_y = (size // _TILE * (d // _PRODUCT_COLS) for size in (rows, cols))
    x_programs = max(1, programs // 2)  # with one program, it takes both
    return {
        "x": descriptor(x, _TILE, _STEP), "y": descriptor(y, _TILE, _STEP),
        "g": descriptor(g, _TILE, _STEP), "g_cols": descriptor(g, _STEP, _TILE),
        "x_wide": descriptor(x, _STEP, _PRODUCT_COLS), "y_wide": descriptor(y, _STEP, _PRODUCT_COLS),
        "acc_x": descriptor(acc_x, _TILE, _PART), "acc_y": descriptor(acc_y, _TILE, _PART),
        "acc_x_ptr": acc_x, "y_ptr": y, "grad_x_ptr": empty(m, d, dtype=x.dtype),
        "scale_ptr": empty(1), "factor_ptr": empty(1), "row_weight_ptr": empty(m), "col_weight_ptr": empty(n),
        "one_minus_p_ptr": empty(m), "dot_ptr": empty(programs), "counters": empty(2, dtype=torch.int32),
        "M": m, "N": n, "D": d, "R": rows, "C": cols, "offset": offset,
        "num_rows": -(-m // rows), "num_cols": -(-n // cols), "segments": segments, "tiles": rows // _TILE // segments,
        "x_programs": x_programs, "x_tiles": of_x // x_programs, "y_tiles": of_y // max(1, programs - x_programs),
        "log2e": LOG2E, "inv_grad_scale": 1.0,
    }  # fmt: skip

"""The Triton kernel for the product G y of a strip of G, the gradient of a contrastive loss's logits.

A strip has the rows of one process and the columns of all processes.

acc[part, i] += sum over the columns j in ``part`` of G_ij y_j          one program writes each tile
"""

import triton
import triton.language as tl

from ..tiles import load_tile
from .kernels import _initial_tile, _store_sum


@triton.jit
def _strip_products_kernel(
    grad,  # [M, N], tiles of [BM, BK]
    y,  # [N, D], tiles of [BK, BN]
    acc,  # [parts * height, D] fp32, contiguous; with IS_ADDED a descriptor of tiles [BM, BN / PARTS]
    M, N, D, first, height, acc_rows, length, stride_grad, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    IS_TMA: tl.constexpr, IS_ADDED: tl.constexpr, IS_NEW: tl.constexpr,
):  # fmt: skip
    """Add the product of ``grad``, the G of a strip of logits, and ``y`` to ``acc``.

    The columns of ``grad`` are divided into parts of ``length`` columns. Each part has its own ``height`` rows of
    ``acc``, so no two parts add to the same row, and adds to them from row ``first`` on. With IS_NEW, ``acc`` has no
    values yet, and is overwritten.
    """
    num_d = tl.cdiv(D, BLOCK_N)
    num_tiles = tl.cdiv(M, BLOCK_M) * num_d
    part, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    start_m, start_d = tile // num_d * BLOCK_M, tile % num_d * BLOCK_N
    row = part * height + first + start_m
    total = _initial_tile(acc, row, start_d, acc_rows, D, BLOCK_M, BLOCK_N, IS_ADDED or IS_NEW)
    for start_k in range(part * length, tl.minimum(part * length + length, N), BLOCK_K):
        g = load_tile(grad, start_m, start_k, M, N, stride_grad, BLOCK_M, BLOCK_K, IS_TMA)  # [BM, BK]
        b = load_tile(y, start_k, start_d, N, D, stride_y, BLOCK_K, BLOCK_N, IS_TMA)  # [BK, BN]
        total = tl.dot(g, b, total, input_precision="ieee")
    _store_sum(acc, total, row, start_d, acc_rows, D, BLOCK_M, BLOCK_N, PARTS, IS_ADDED, IS_NEW)

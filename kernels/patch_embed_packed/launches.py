"""The launch of the Triton kernel that lays out packed patches as a matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import cdiv, next_power_of_2
from ..configs import row_config
from ..launch import arch_of, launch
from .kernels import _patch_embed_packed_kernel


def lay_out(
    patches: Tensor, grids: Tensor, bounds: Tensor, sequence: Tensor, table_size: Sequence[int], num_prefix: int,
    columns: int, interpolation: str, keep_aspect: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the matrix of packed patches [T, columns], with a row for each token.

    The row of a patch has its pixels, the weights of positions and a one. The row of a prefix token has only a one.
    """
    total, (height, width) = len(sequence), table_size
    out = torch.empty(total, columns, dtype=dtype, device=patches.device)
    cfg = row_config("patch_embed_packed", arch_of(patches.device), dtype)
    launch(
        _patch_embed_packed_kernel, (cdiv(total, cfg.block_m),),
        patches, grids.contiguous(), bounds, sequence, out,
        total, len(patches), len(grids), num_prefix, patches.shape[1], columns, height * width, height, width,
        *patches.stride(),
        config=cfg, device=patches.device,
        IS_UINT8=patches.dtype == torch.uint8, IS_CUBIC=interpolation == "bicubic", KEEP_ASPECT=keep_aspect,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_GRID=next_power_of_2(max(height, width)),
        NUM_STAGES=cfg.num_stages,
    )  # fmt: skip
    return out

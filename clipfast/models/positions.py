"""The positional embeddings in a state dict: their names, their grids of patches, and resizing to other sizes.

Before the positions of the square grid of patches, a vision transformer has a position of the class token, a ResNet's
attention pooling one of the mean of all patches, and SigLIP none.
"""

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ..kernels.dtypes import accumulate_dtype
from .vision import interpolate_positions, resize_grid

POSITIONS_NAME = "visual.positional_embedding"
POOL_POSITIONS_NAME = "visual.attnpool.positional_embedding"
TRUNK_POSITIONS_NAME = "visual.trunk.pos_embed"
TEXT_POSITIONS_NAME = "positional_embedding"
_NAMES = (POSITIONS_NAME, POOL_POSITIONS_NAME, TRUNK_POSITIONS_NAME)


def positions_name(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the positional embedding of patches in a state dict, or None if it has none."""
    return next((name for name in _NAMES if name in state), None)


def text_positions_name(state: Mapping[str, Tensor]) -> str:
    """Return the name of the positional embedding of texts in a state dict."""
    in_tower = f"text.{TEXT_POSITIONS_NAME}"
    return in_tower if in_tower in state else TEXT_POSITIONS_NAME


def grid_side(name: str, positions: Tensor) -> int:
    """Return the side of the square grid of patches to which the positional embedding ``name`` belongs.

    Raises:
        ValueError: the positions are not those of a square grid.
    """
    is_bare = name == TRUNK_POSITIONS_NAME
    count = positions.shape[-2] - (not is_bare) if positions.ndim == 2 + is_bare else 0
    side = math.isqrt(max(0, count))
    if side == 0 or side * side != count:
        token = "" if is_bare else "a class token and "
        raise ValueError(f"{name} is {tuple(positions.shape)}, which are not the positions of {token}a square grid")
    return side


def resize_positions(name: str, positions: Tensor, side: int) -> Tensor:
    """Resize the positional embedding ``name`` to ``side`` x ``side`` patches; see :func:`interpolate_positions`.

    Raises:
        ValueError: the positions are not those of a square grid.
    """
    old, new = (grid_side(name, positions),) * 2, (side, side)
    if name != TRUNK_POSITIONS_NAME:
        return interpolate_positions(positions, old, new)
    return positions if old == new else resize_grid(positions[0], old, new)[None]


def resize_context(positions: Tensor, context_length: int) -> Tensor:
    """Resize the positional embedding of texts [L, width] to [context_length, width], linearly as OpenCLIP does."""
    columns = positions.to(accumulate_dtype(positions.dtype)).T[None]
    resized = F.interpolate(columns, context_length, mode="linear", align_corners=False)
    return resized[0].T.contiguous().to(positions.dtype)

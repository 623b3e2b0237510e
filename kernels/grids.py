"""The patches of packed images of several sizes: their places in the images, and the weights with which a table of
positions is resized for them.

``patch_embed_packed/op.py`` has the equations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import accumulate_dtype


class Places(NamedTuple):
    """The place of each token of packed images in its image and in the matrix of all patches; fields are int64 [T].

    Attributes:
        row: the row of the token's patch in the matrix of all patches; the number of patches for a token without one.
        y, x: the row and the column of the patch in its image.
        height, width: the rows and columns of patches of the image.
        prefix: the number of the prefix token; -1 for other tokens.
    """

    row: Tensor
    y: Tensor
    x: Tensor
    height: Tensor
    width: Tensor
    prefix: Tensor


def places_of(bounds: Tensor, sequence: Tensor, grids: Tensor, num_patches: int, num_prefix: int) -> Places:
    """Return the :class:`Places` of the tokens of packed images.

    ``bounds`` and ``sequence`` are those of the :class:`Packing` of all tokens, the ``num_prefix`` prefix tokens of
    each image included.
    """
    first, image = bounds[0], sequence.long()
    token = torch.arange(len(image), device=image.device)
    height, width = F.pad(grids, (0, 0, 0, 1), value=1).long()[image].unbind(1)
    in_image, index = image < len(grids), token - first - num_prefix
    row = token - num_prefix * (image + 1)
    is_patch = in_image & (index >= 0) & (index < height * width) & (row >= 0) & (row < num_patches)
    row, index = row.where(is_patch, num_patches), index.where(is_patch, index.clamp(max=-1))
    prefix = (index + num_prefix).where(in_image & (index < 0), -1)
    index = index.clamp(min=0)
    return Places(row, index // width, index % width, height, width, prefix)


def resizing_weights(
    places: Places, table_size: Sequence[int], interpolation: str, keep_aspect: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the weights [T, GH] and [T, GW] with which the rows and the columns of a table of positions add up to the
    position of each patch.

    The weights are those with which ``F.interpolate(antialias=True)`` resizes, computed in float32 at least.
    """
    height, width = places.height, places.width
    if keep_aspect:
        height = width = torch.maximum(height, width)
    axes = (places.y, height, table_size[0]), (places.x, width, table_size[1])
    rows, columns = (_axis_weights(*axis, interpolation, accumulate_dtype(dtype)).to(dtype) for axis in axes)
    return rows, columns


def _axis_weights(index: Tensor, size: Tensor, table_size: int, interpolation: str, dtype: torch.dtype) -> Tensor:
    """Return the weights [T, table_size] of a table's rows in row ``index`` of that table resized to ``size`` rows."""
    scale = table_size / size.to(dtype)[:, None]
    rows = torch.arange(table_size, dtype=dtype, device=index.device)
    x = ((rows + 0.5 - (index.to(dtype)[:, None] + 0.5) * scale) / scale.clamp(min=1)).abs()
    weights = (1 - x).clamp(min=0)
    if interpolation == "bicubic":
        far = (((-0.5 * x + 2.5) * x - 4) * x + 2).where(x < 2, 0)
        weights = ((1.5 * x - 2.5) * x * x + 1).where(x < 1, far)
    return weights / weights.sum(1, keepdim=True)

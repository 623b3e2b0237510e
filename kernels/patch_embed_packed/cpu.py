"""The matrix of packed patches on a CPU: the same function as in ``launches``, in PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..grids import places_of, resizing_weights


def lay_out(
    patches: Tensor, grids: Tensor, bounds: Tensor, sequence: Tensor, table_size: Sequence[int], num_prefix: int,
    columns: int, interpolation: str, keep_aspect: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the matrix of packed patches [T, columns], with a row for each token.

    The row of a patch has its pixels, the weights of positions and a one. The row of a prefix token has only a one.
    """
    places = places_of(bounds, sequence, grids, len(patches), num_prefix)
    of_patches = (places.row < len(patches)).nonzero()[:, 0]
    pixels, positions = patches.shape[1], patches.shape[1] + table_size[0] * table_size[1]
    out = torch.zeros(len(sequence), columns, dtype=dtype, device=patches.device)
    values = patches[places.row[of_patches]].to(dtype)
    out[of_patches, :pixels] = values.sub_(128).div_(128) if patches.dtype == torch.uint8 else values
    of_rows, of_columns = resizing_weights(places, table_size, interpolation, keep_aspect, dtype)
    weights = of_rows[of_patches, :, None] * of_columns[of_patches, None, :]
    out[of_patches, pixels:positions] = weights.flatten(1)
    out[of_patches, positions] = 1
    of_prefix = (places.prefix >= 0).nonzero()[:, 0]
    out[of_prefix, positions + 1 + places.prefix[of_prefix]] = 1
    return out

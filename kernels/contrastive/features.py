"""Rows of features as the products take them, and the pairs among them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype

# Pairs whose features are converted to float32 at once.
PAIR_ROWS = 4096


class Features(NamedTuple):
    """Features that are ready for products."""

    rows: Tensor  # [N, D]
    inv_norm: Tensor | None  # [N], one over the norm of each row before it was normalised; None if it was not

    def part(self, rows: slice) -> "Features":
        """Return the features of some rows."""
        return Features(self.rows[rows], None if self.inv_norm is None else self.inv_norm[rows])


def pairs_in(num_rows: int, num_cols: int, offset: int) -> tuple[slice, slice]:
    """Return the rows that have a pair (i, i + offset), and the columns of these pairs."""
    start = min(max(0, -offset), num_rows)
    stop = max(start, min(num_rows, num_cols - offset))
    return slice(start, stop), slice(start + offset, stop + offset) if stop > start else slice(0, 0)


def pair_products(x: Tensor, y: Tensor) -> Tensor:
    """Return x_i . y_i [P] of features [P, D], in float32 at least."""
    wide = accumulate_dtype(x.dtype)
    parts = zip(x.split(PAIR_ROWS), y.split(PAIR_ROWS), strict=True)
    return torch.cat([torch.linalg.vecdot(a.to(wide), b.to(wide)) for a, b in parts])

"""Small helpers that the host code of several ops shares."""

import math

from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


def as_rows(x: Tensor) -> Tensor:
    """Reshape [..., N] to [M, N]; the result is a view where the rows lie evenly apart."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def slices(length: int, size: int) -> list[slice]:
    """Cut ``range(length)`` into pieces of ``size``; the last piece may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]

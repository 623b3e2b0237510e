"""The base of packed texts and packed images: batches whose sequences follow one another, without padding."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels.common import cdiv

# On a GPU, the number of tokens is rounded up to a multiple of 64, the rows of the smallest tile of a matrix product,
# and of a 128th of the padded batch. Therefore only few different numbers occur, each of which needs launch plans,
# blocks of the allocator's memory, and a CUDA graph of its own. On average, a 256th of the padded batch is computed for
# nothing.
TILE, SIZES = 64, 128


def rounded(used: int, padded: int) -> int:
    """Return the number of tokens ``used``, rounded up for a GPU; with padding, the batch would have ``padded``."""
    multiple = TILE * cdiv(padded, TILE * SIZES)
    return multiple * cdiv(used, multiple)


class Packed:
    """A packed batch: a dataclass of tensors, whose last field is an upper bound of the sequences' lengths.

    CUDA graphs, compilers and wrappers of modules see the tensors, since each subclass is a node of PyTorch's pytrees.

    Attributes:
        order: int64 [B], for each sequence of the batch its index among the packed sequences.
    """

    order: Tensor

    def __init_subclass__(cls) -> None:
        pytree.register_pytree_node(cls, _flatten, lambda tensors, longest: _unflatten(cls, tensors, longest))

    def __len__(self) -> int:
        return len(self.order)

    @property
    def device(self) -> torch.device:
        """The device of the packed batch's tensors."""
        return self.order.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the packed batch on ``device``."""
        moved: Self = pytree.tree_map(lambda x: x.to(device, non_blocking=non_blocking), self)
        return moved

    def pin_memory(self) -> Self:
        """Return the packed batch in pinned memory, from which a GPU copies while the host goes on."""
        pinned: Self = pytree.tree_map(Tensor.pin_memory, self)
        return pinned


def _flatten(packed: Any) -> tuple[list[Any], int]:
    """Return the tensors of a packed batch, and the upper bound of its lengths."""
    *tensors, longest = (getattr(packed, field.name) for field in dataclasses.fields(packed))
    return tensors, longest


def _unflatten(cls: Any, tensors: Iterable[Any], longest: int) -> Any:
    """Return the packed batch with these tensors and this upper bound of lengths: the inverse of :func:`_flatten`."""
    return cls(*tensors, longest)

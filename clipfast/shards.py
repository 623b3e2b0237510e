"""Tensors that FSDP2 has cut along their first dimension, so that each process holds one part (``DTensor``).

These functions take any tensor. One that is not cut is its own part and its own whole.
"""

from typing import Any

import torch
from torch import Tensor


def is_cut(tensor: Tensor) -> bool:
    """Return True if each process holds a part of ``tensor`` only."""
    return hasattr(tensor, "device_mesh")  # a DTensor, whose class takes long to import


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds, in the same memory. It may be empty."""
    cut: Any = tensor
    part: Tensor = cut.to_local() if is_cut(tensor) else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return all of ``tensor``. All processes must call it together if it is cut."""
    if not is_cut(tensor):
        return tensor
    cut: Any = tensor.detach()
    full: Tensor = cut.to(cut.device_mesh.device_type).full_tensor()  # a part may have been moved to the host
    return full


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Return the part of ``value``, a whole tensor, that this process holds of ``like``, which has the same shape."""
    if not is_cut(like):
        return value
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    parts = value.chunk(mesh.size())
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else value[:0]


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value``, a whole tensor, cut as ``like`` is, which has the same shape, and on its device."""
    if not is_cut(like):
        return value
    from torch.distributed.tensor import DTensor

    own: Any = like
    part = part_of(value, like).to(local(own).device, copy=True)  # a view would keep the whole in memory
    return DTensor.from_local(
        part, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``tensor``: a whole tensor with as many elements, or one that is cut as ``tensor`` is."""
    local(tensor).copy_(local(value) if is_cut(value) else part_of(value.reshape(tensor.shape), tensor))


def gathered(content: Any, *, keep: bool) -> Any:
    """Return nested dicts and lists with whole tensors in the host's memory in place of those that are cut.

    All processes must call it together. They hold one whole tensor at a time.

    Args:
        content: the dicts and lists.
        keep: False for a process that needs no result; it gets None in place of those tensors.
    """
    if isinstance(content, dict):
        return {key: gathered(value, keep=keep) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(gathered(value, keep=keep) for value in content)
    if not isinstance(content, Tensor) or not is_cut(content):
        return content
    full = whole(content)
    return full.cpu() if keep else None

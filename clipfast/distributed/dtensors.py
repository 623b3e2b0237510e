"""DTensors: tensors that FSDP2 has sharded along their first dimension, so that each process holds one part.

These functions take any tensor. A plain tensor is its own part.
"""

from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Return True if each process holds a part of ``tensor`` only."""
    return hasattr(tensor, "device_mesh")  # the class takes long to import


def to_local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds, in the same memory. It may be empty."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_dtensor(tensor) else tensor
    return part


def _part_of(value: Tensor, like: Any) -> Tensor:
    """Return the part of ``value``, a full tensor, that this process holds of ``like``, which has the same shape."""
    if not is_dtensor(like):
        return value
    parts, rank = value.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else value[:0]


def distribute_like(value: Tensor, like: Any) -> Tensor:
    """Return ``value``, a full tensor, sharded as ``like`` is, which has the same shape, and on its device."""
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import DTensor

    part = _part_of(value, like).to(to_local(like).device, copy=True)  # a view would keep all of it in memory
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``tensor``: a full tensor with as many elements, or one that is sharded as ``tensor`` is."""
    to_local(tensor).copy_(to_local(value) if is_dtensor(value) else _part_of(value.reshape(tensor.shape), tensor))


def gather_full(content: Any, *, keep: bool) -> Any:
    """Return nested dicts and lists with full tensors in the host's memory in place of DTensors.

    All processes must call it together. They hold one full tensor at a time.

    Args:
        content: the dicts and lists.
        keep: False for a process that needs no result; it gets None in place of those tensors.
    """
    if isinstance(content, dict):
        return {key: gather_full(value, keep=keep) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(gather_full(value, keep=keep) for value in content)
    if not isinstance(content, Tensor) or not is_dtensor(content):
        return content
    sharded: Any = content.detach()
    full: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()  # a part may have been moved to the host
    return full.cpu() if keep else None

"""DTensors: tensors that FSDP2 has sharded along their first dimension. Each process holds one part.

These functions take any tensor. A plain tensor counts as its own local part.
"""

from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Return True if ``tensor`` is a DTensor, of which each process holds only a part."""
    return hasattr(tensor, "device_mesh")  # a check by isinstance would import the class, which takes long


def to_local(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor, in the same memory. It may be empty."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_dtensor(tensor) else tensor
    return part


def _part_of(value: Tensor, like: Any) -> Tensor:
    """Return the part of ``value`` that belongs to this rank if it is sharded like the DTensor ``like``."""
    if not is_dtensor(like):
        return value
    parts, rank = value.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else value[:0]


def distribute_like(value: Tensor, like: Any) -> Tensor:
    """Shard the full tensor ``value`` like the DTensor ``like`` of the same shape, and put it on the same device."""
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import DTensor

    part = _part_of(value, like).to(to_local(like).device, copy=True)  # a view would keep the full tensor in memory
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``tensor``, which may be a DTensor. ``value`` is full, or sharded like ``tensor``."""
    to_local(tensor).copy_(to_local(value) if is_dtensor(value) else _part_of(value.reshape(tensor.shape), tensor))


def gather_full(content: Any, *, keep: bool) -> Any:
    """Gather the DTensors in nested dicts and lists; return the same structure with full tensors in host memory.

    All processes must call it together. On the device, only one full tensor exists at a time.

    Args:
        content: the nested dicts and lists.
        keep: False for a process that needs no result; it gets None in place of each gathered tensor.
    """
    if isinstance(content, dict):
        return {key: gather_full(value, keep=keep) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(gather_full(value, keep=keep) for value in content)
    if not isinstance(content, Tensor) or not is_dtensor(content):
        return content
    sharded: Any = content.detach()
    # The local part may be on the host, but the collective runs on the devices of the mesh.
    full: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return full.cpu() if keep else None

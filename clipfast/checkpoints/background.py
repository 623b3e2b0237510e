"""Copies a run's state to host memory, and writes it as a checkpoint in a thread while training continues."""

import contextlib
import copy
import functools
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..distributed.dtensors import is_dtensor, to_local
from ..distributed.world import ALONE, World

PIECE = 0.5  # a thread is waited for in pieces of this many seconds


def join(thread: threading.Thread, seconds: float = math.inf) -> None:
    """Wait until the thread that writes a checkpoint ends, or for ``seconds``.

    It waits in pieces, since Python handles a signal that arrives just before a wait only after the wait.
    """
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        thread.join(PIECE)


class Background:
    """A thread that writes checkpoints, one at a time.

    The thread does not delay the end of the process: a checkpoint that is not written by then is lost.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Start to write a checkpoint in the thread, after the previous write is finished."""
        self.wait()
        self._error = None
        self._thread = threading.Thread(target=self._do, args=(work,), name="clipfast background", daemon=True)
        self._thread.start()

    def wait(self, seconds: float = math.inf) -> Exception | None:
        """Wait until the last checkpoint is written, or for ``seconds``, and return the error if its write failed."""
        if self._thread is not None:
            join(self._thread, seconds)
        return self._error

    def _do(self, work: Callable[[], object]) -> None:
        """Write a checkpoint by ``work``, and keep its error for :meth:`wait`."""
        try:
            work()
        except Exception as error:
            self._error = error


class HostCopy:
    """Copies the tensors of a run's state to host memory, and reuses that memory for the next checkpoint.

    A GPU copies on its current stream: later steps of training run after the copy, and the host need not wait. Tensors
    that share memory share it in the copy too.

    Args:
        world: the processes among which tensors are sharded. Each process copies its shard of such a tensor, and the
            copies are shards of a tensor in host memory.
    """

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._copied: dict[tuple[Any, ...], Tensor] = {}  # maps a device tensor's address and layout to its host copy
        self._events: list[torch.cuda.Event] = []

    def __call__(self, content: Any) -> Any:
        """Return ``content`` with host copies in place of its tensors; they overwrite those of the previous call."""
        buffers, self._buffers, self._copied = self._buffers, {}, {}
        copied = self._copy(content, (), buffers)
        devices = {key[0] for key in self._copied if key[0].type == "cuda"}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]
        self._copied = {}
        return copied

    def wait(self) -> None:
        """Wait until the GPU has copied all tensors of a checkpoint to host memory."""
        for event in self._events:
            event.synchronize()

    def _copy(self, content: Any, path: tuple[Any, ...], buffers: dict[tuple[Any, ...], Tensor]) -> Any:
        """Start to copy the content of a checkpoint to host memory, and return the copy."""
        if isinstance(content, Tensor):
            part = self._copy_tensor(to_local(content.detach()), path, buffers)
            return self._cut(part, content) if is_dtensor(content) else part
        if isinstance(content, dict):
            copied = copy.copy(content)  # a copy has the attributes that PyTorch adds to a state dict
            copied.update({key: self._copy(value, (*path, key), buffers) for key, value in content.items()})
            return copied
        if isinstance(content, list | tuple):
            return type(content)(self._copy(value, (*path, index), buffers) for index, value in enumerate(content))
        return content

    @functools.cached_property
    def _mesh(self) -> Any:
        """Return the device mesh of CPUs for DTensors of a checkpoint in host memory."""
        from torch.distributed.device_mesh import DeviceMesh

        assert self._world.hosts is not None
        return DeviceMesh.from_group(self._world.hosts, "cpu")

    def _cut(self, part: Tensor, like: Tensor) -> Tensor:
        """Return a checkpoint's sharded tensor in host memory, with shards like those of the device tensor ``like``."""
        from torch.distributed.tensor import DTensor

        own: Any = like
        return DTensor.from_local(
            part, self._mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
        )

    def _copy_tensor(self, tensor: Tensor, path: tuple[Any, ...], buffers: dict[tuple[Any, ...], Tensor]) -> Tensor:
        """Start to copy a tensor of a checkpoint to host memory; tensors that share memory are copied once."""
        source = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if source in self._copied:
            return self._copied[source]
        buffer = buffers.get(path)
        if buffer is None or buffer.dtype != tensor.dtype or buffer.shape != tensor.shape:
            buffer = _host_memory(tensor)
        buffer.copy_(tensor, non_blocking=True)
        self._buffers[path] = self._copied[source] = buffer
        return buffer


def _host_memory(tensor: Tensor) -> Tensor:
    """Return host memory for a copy of a checkpoint's ``tensor``, pinned if it is on a GPU."""
    if tensor.device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # pinned memory is limited; without it the copy is only slower
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")

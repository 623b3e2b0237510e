"""The copy of a run's state to host memory, and the thread that writes it while training goes on."""

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

PIECE = 0.5  # seconds


def join(thread: threading.Thread, seconds: float = math.inf) -> None:
    """Wait until a thread ends, or for so many seconds.

    It waits in pieces, since a signal that comes just before Python begins to wait is heard only after that.
    """
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        thread.join(PIECE)


class Background:
    """A thread that does one piece of work at a time.

    It does not keep a process that ends at once: what it was doing is left undone.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin a piece of work, after the one before is done."""
        self.wait()
        self._error = None
        self._thread = threading.Thread(target=self._do, args=(work,), name="clipfast background", daemon=True)
        self._thread.start()

    def wait(self, seconds: float = math.inf) -> Exception | None:
        """Wait until the last piece of work is done, or for so many seconds, and return the error that ended it."""
        if self._thread is not None:
            join(self._thread, seconds)
        return self._error

    @property
    def is_busy(self) -> bool:
        """True while a piece of work is being done."""
        return self._thread is not None and self._thread.is_alive()

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error


class HostCopy:
    """Copies nested dicts and lists of tensors to host memory, and keeps the memory for the next time.

    A GPU copies in the order of its current stream, so that whatever training does next comes after it, and the host
    need not wait. Tensors that share their memory share it in the copy.

    Args:
        world: the processes among which tensors are cut. Of such a tensor each process copies its part; the copy is cut
            in the same way, among their hosts.
    """

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._copied: dict[tuple[Any, ...], Tensor] = {}  # by what they are copies of
        self._events: list[torch.cuda.Event] = []

    def __call__(self, content: Any) -> Any:
        """Return ``content`` with copies in place of its tensors; those of the call before are overwritten."""
        buffers, self._buffers, self._copied = self._buffers, {}, {}
        copied = self._copy(content, (), buffers)
        devices = {key[0] for key in self._copied if key[0].type == "cuda"}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]
        self._copied = {}
        return copied

    def wait(self) -> None:
        """Wait until a GPU has copied everything."""
        for event in self._events:
            event.synchronize()

    def _copy(self, content: Any, path: tuple[Any, ...], buffers: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(content, Tensor):
            part = self._copy_tensor(to_local(content.detach()), path, buffers)
            return self._cut(part, content) if is_dtensor(content) else part
        if isinstance(content, dict):
            copied = copy.copy(content)  # with the attributes that PyTorch gives a state dict
            copied.update({key: self._copy(value, (*path, key), buffers) for key, value in content.items()})
            return copied
        if isinstance(content, list | tuple):
            return type(content)(self._copy(value, (*path, index), buffers) for index, value in enumerate(content))
        return content

    @functools.cached_property
    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import DeviceMesh

        assert self._world.hosts is not None
        return DeviceMesh.from_group(self._world.hosts, "cpu")

    def _cut(self, part: Tensor, like: Tensor) -> Tensor:
        """Return the tensor of which the hosts hold such parts as the devices hold of ``like``."""
        from torch.distributed.tensor import DTensor

        own: Any = like
        return DTensor.from_local(
            part, self._mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
        )

    def _copy_tensor(self, tensor: Tensor, path: tuple[Any, ...], buffers: dict[tuple[Any, ...], Tensor]) -> Tensor:
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
    """Return memory of the host for a copy of ``tensor``, pinned if a GPU is to copy."""
    if tensor.device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # there is a limit to pinned memory
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")

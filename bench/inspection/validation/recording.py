"""Launches of other people's kernels on a machine without a GPU: compiled for an H100, recorded, and not run.

Upstream code is called unchanged, and finds the stand-in for a GPU of :mod:`clipfast.verify.stand_in`. Its tensors are
CPU tensors without values, whose memory is never accessed.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.verify.stand_in import stand_in_gpu

ARCH = 90
MULTIPROCESSORS = 132
SMALL = 2**20  # a PyTorch op on fewer elements is computed; on more, its results are only allocated
# PyTorch ops that launch no kernel: they make a tensor without values, or a view of a tensor.
_FREE = frozenset((
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "view", "_unsafe_view", "expand",
    "detach", "alias", "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "as_strided",
    "lift_fresh", "_local_scalar_dense", "resize_", "split", "chunk", "unbind", "diagonal", "set_",
))  # fmt: skip
_REAL_DEVICE = torch.Tensor.device  # upstream code reads a GPU's device in its place while launches are recorded


@dataclasses.dataclass(frozen=True)
class Launched:
    """A kernel as Triton compiled it, the grid of its launch, and its arguments by name."""

    name: str
    compiled: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Other:
    """A PyTorch op between the recorded launches: the bytes of the tensors that it reads or writes, and its FLOPs."""

    name: str
    moved: int
    flops: int = 0


@dataclasses.dataclass
class Recorded:
    """The launches of a call, and its PyTorch ops, each in order."""

    launches: list[Launched] = dataclasses.field(default_factory=list)
    others: list[Other] = dataclasses.field(default_factory=list)


class _Others(TorchDispatchMode):
    """Record the PyTorch ops that would launch a kernel, without running large ones."""

    def __init__(self, found: list[Other]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _FREE:
            return func(*args, **(kwargs or {}))
        result = _computed(func, args, kwargs or {})
        leaves = torch.utils._pytree.tree_leaves((args, result))
        tensors = {id(one): one for one in leaves if isinstance(one, torch.Tensor)}
        moved = sum(
            min(one.nbytes, one.untyped_storage().nbytes()) for one in tensors.values()
        )  # an expanded tensor has less memory than its elements would take
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=result)
        self.found.append(Other(name, moved, flops))
        return result


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a PyTorch op on small tensors; for large ones, whose values are never read, only allocate the results."""
    leaves = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    if sum(one.numel() for one in leaves) < SMALL:
        return func(*args, **kwargs)
    if func._schema.is_mutable:
        return args[0]
    with mock.patch.object(torch.Tensor, "device", _REAL_DEVICE):
        return _without_values(func, args, kwargs)


def _without_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a PyTorch op on meta tensors, and return uninitialised CPU tensors of the same layout."""
    to_meta = functools.partial(torch.utils._pytree.tree_map_only, torch.Tensor, lambda one: one.to("meta"))
    result = func(*to_meta(args), **(to_meta(kwargs) | ({"device": "meta"} if "device" in kwargs else {})))
    empty = lambda one: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype)  # noqa: E731
    return torch.utils._pytree.tree_map_only(torch.Tensor, empty, result)


@contextlib.contextmanager
def recording() -> Iterator[Recorded]:
    """Record the launches in this context. Every kernel is compiled, and no kernel runs."""
    found = Recorded()
    run = JITFunction.run

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        """Compile a kernel and record its launch, in place of the launch."""
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        defaults = {one.name: one.default for one in kernel.params if one.has_default}
        named = defaults | named
        size = grid(named) if callable(grid) else grid
        arguments = {name: _plain(named[name]) for name in kernel.arg_names}
        launched = Launched(kernel.__name__, compiled, tuple(int(one) for one in size), arguments)
        found.launches.append(launched)
        return compiled

    with stand_in_gpu(ARCH), mock.patch.object(JITFunction, "run", record), _Others(found.others):
        yield found


def _plain(value: Any) -> Any:
    """Return a kernel's argument, with Gluon's tensor descriptor as Triton's, and a constexpr as its value."""
    if type(value).__name__ == "TensorDescriptor" and not isinstance(value, TensorDescriptor):
        return TensorDescriptor(value.base, value.shape, value.strides, value.block_shape)
    return getattr(value, "value", value) if type(value).__name__ == "constexpr" else value

"""Launches of other people's kernels on a machine without a GPU: compiled for an H100, recorded, and not run.

Upstream code is called unchanged. If it asks for the GPU, it is told that there is an H100. Its tensors are CPU tensors
without values, whose memory is never accessed.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

ARCH = 90
MULTIPROCESSORS = 132
SMALL = 2**20  # a PyTorch op on fewer elements is computed; on more, its results are only allocated
# PyTorch ops that launch no kernel: they make a tensor without values, or a view of a tensor.
_FREE = frozenset((
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "view", "_unsafe_view", "expand",
    "detach", "alias", "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "as_strided",
    "lift_fresh", "_local_scalar_dense", "resize_", "split", "chunk", "unbind", "diagonal", "set_",
))  # fmt: skip
# While launches are recorded, upstream code reads _CLAIMED as ``Tensor.device``; PyTorch's own ops need the real one.
_REAL, _CLAIMED = torch.Tensor.device, property(lambda self: torch.device("cuda", 0))  # noqa: ARG005
_FACTORIES = ("empty", "zeros", "ones", "full", "arange", "tensor", "empty_like", "zeros_like", "ones_like")


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


class _Driver(DriverBase):  # type: ignore[misc]
    """A Triton driver for recording: it answers the questions that Triton asks before it compiles, as an H100 would."""

    def __init__(self) -> None:
        """Do nothing: there is no library to load."""

    @classmethod
    def is_active(cls) -> bool:
        """Return True: Triton takes this driver to record launches."""
        return True

    def get_current_target(self) -> GPUTarget:
        """Return an H100 as the GPU for which recorded kernels are compiled."""
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        """Return device 0 for all recorded launches."""
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        """Return stream 0 for all recorded launches."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the CPU, where the tensors of recorded launches are."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return Triton's type as it is: no launcher is compiled for recorded launches."""
        return ty

    def get_benchmarker(self) -> Any:
        """Refuse to measure time: recorded kernels do not run."""
        raise NotImplementedError("nothing runs here")

    def get_device_interface(self) -> Any:
        """Return PyTorch's CUDA interface for Triton's questions while launches are recorded."""
        return torch.cuda


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


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a version of ``function`` that makes its tensor on the CPU if it is asked for one on the claimed GPU."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        """Make a tensor for recorded launches on the CPU if the GPU was asked for."""
        on_gpu = kwargs.get("device") is not None and str(kwargs["device"]) != "meta"
        return function(*args, **(kwargs | ({"device": "cpu"} if on_gpu else {})))

    return make


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a PyTorch op on small tensors; for large ones, whose values are never read, only allocate the results."""
    leaves = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    if sum(one.numel() for one in leaves) < SMALL:
        return func(*args, **kwargs)
    if func._schema.is_mutable:
        return args[0]
    with mock.patch.object(torch.Tensor, "device", _REAL):
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

    with contextlib.ExitStack() as stack:
        stack.enter_context(as_on_an_h100())
        stack.enter_context(mock.patch.object(torch.Tensor, "device", _CLAIMED))
        for name in _FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, _on_cpu(getattr(torch, name))))
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        stack.enter_context(_Others(found.others))
        yield found


@contextlib.contextmanager
def as_on_an_h100() -> Iterator[None]:
    """Answer questions of Triton and upstream code about the GPU as on an H100; some modules ask when imported."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver())
    properties = types.SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS, major=9, minor=0, name="NVIDIA H100 80GB HBM3", warp_size=32,
        total_memory=80 << 30, regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448,
    )  # fmt: skip
    patches: dict[str, Any] = {
        "current_device": lambda: 0, "get_device_capability": lambda device=None: (9, 0),  # noqa: ARG005
        "get_device_properties": lambda device=None: properties,  # noqa: ARG005
        "get_device_name": lambda device=None: properties.name,  # noqa: ARG005
        "device": lambda device=None: contextlib.nullcontext(),  # noqa: ARG005
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
        try:
            yield
        finally:
            triton.runtime.driver._active = before


def _plain(value: Any) -> Any:
    """Return a kernel's argument in Triton's own type if it has Gluon's type for the same thing."""
    if type(value).__name__ == "TensorDescriptor" and not isinstance(value, TensorDescriptor):
        return TensorDescriptor(value.base, value.shape, value.strides, value.block_shape)
    return getattr(value, "value", value) if type(value).__name__ == "constexpr" else value

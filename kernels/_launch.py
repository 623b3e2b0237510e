"""Between an op and its kernels: which backend runs, what input is refused, and the one place where a kernel starts.

Every launch of the package goes through :func:`launch`, so that a tool can see them all: :func:`record_launches`
collects what an op would launch on a given architecture, without a GPU, and the offline compiler compiles exactly that.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import triton
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "triton", "torch")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# Triton decides when a kernel is decorated, so the answer is fixed for the life of the process.
INTERPRET: bool = triton.knobs.runtime.interpret
# Interpreted kernels take the configurations of this architecture; tests set others.
CPU_ARCH = 80
REGISTERS = 65536  # of a multiprocessor, on every architecture
# Few enough that a small test has rows for every program to walk.
CPU_MULTIPROCESSORS = 2

_execute_on_cpu = INTERPRET
_recorder: "_Recorder | None" = None


class LaunchConfig(Protocol):
    """What :func:`launch` needs to know of a configuration."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: the kernel, its arguments by name, and its compile options."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any]
    options: dict[str, Any]


@dataclasses.dataclass
class _Recorder:
    arch: int
    launches: list[Launch]


@contextlib.contextmanager
def record_launches(arch: int) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, configured for compute capability ``arch`` (90 for sm_90)."""
    global _recorder
    outer, _recorder = _recorder, _Recorder(arch, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = outer


@contextlib.contextmanager
def execute_on_cpu() -> Iterator[None]:
    """Launch the Triton kernels for CPU tensors too: for tools that take over the launch."""
    global _execute_on_cpu
    outer, _execute_on_cpu = _execute_on_cpu, True
    try:
        yield
    finally:
        _execute_on_cpu = outer


def triton_runs_on(device: torch.device) -> bool:
    """Whether a Triton kernel can be launched for tensors on ``device``."""
    return device.type == "cuda" or (device.type == "cpu" and (_execute_on_cpu or _recorder is not None))


def arch_of(device: torch.device) -> int:
    """Compute capability that configurations are looked up for, as ``10 * major + minor``.

    Raises:
        RuntimeError: a GPU that is too old for the kernels.
    """
    if _recorder is not None:
        return _recorder.arch
    if device.type != "cuda":
        return CPU_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(f"the kernels need compute capability 8.0, {name} has {major}.{minor}: use backend='torch'")
    return 10 * major + minor


def programs_at_once(device: torch.device, num_warps: int, registers: int) -> int:
    """How many programs run at once, if a thread takes ``registers``: as many as a kernel that walks rows is given.

    More would load its parameters again, and leave more sums to add up.
    """
    return multiprocessors(device, CPU_MULTIPROCESSORS) * max(1, REGISTERS // (32 * num_warps * registers))


@functools.cache
def multiprocessors(device: torch.device, on_cpu: int) -> int:
    """How many the GPU has; ``on_cpu`` where there is none, and kernels are interpreted or recorded."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else on_cpu


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: LaunchConfig, device: torch.device, **constexprs: Any
) -> None:
    """Start ``kernel`` on ``device``; an empty grid starts nothing.

    FP fusion is set explicitly: its default changes between Triton versions, and with it the last bits of the result.
    """
    if 0 in grid:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if _recorder is not None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        _recorder.launches.append(Launch(kernel, grid, named, constexprs, options))
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **constexprs, **options)


def outside_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Run an op's implementation with autocast off: the op has chosen its precision already."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device_type, enabled=False):
            return fn(*args, **kwargs)

    return wrapper


def uses_reference(op: str, backend: str, tensor: Tensor) -> bool:
    """Resolve ``backend`` for ``tensor``: True for the PyTorch reference, False for the registered op.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" and not triton_runs_on(tensor.device):
        raise RuntimeError(
            f"{op}: backend='triton' cannot run on a {tensor.device.type} tensor: "
            "move it to a GPU, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU"
        )
    return backend == "torch" or tensor.device.type not in ("cuda", "cpu", "meta")


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast, where it is on, would convert ``tensor`` to; else the dtype that it has."""
    device_type = tensor.device.type
    if device_type not in ("cuda", "cpu") or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def autocast_to(tensor: Tensor) -> Tensor:
    """``tensor`` in the autocast dtype where autocast is on and would convert it, else unchanged."""
    return tensor.to(autocast_dtype(tensor))


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """Refuse a dtype that the kernels do not compute in."""
    on_cpu = tensor.device.type in ("cpu", "meta") and not _execute_on_cpu
    if INTERPRET and tensor.dtype == torch.bfloat16:
        raise TypeError(
            f"{op}: {name} is bfloat16, which Triton's interpreter multiplies as raw bits: use float32 or float16"
        )
    if tensor.dtype == torch.float64 and not on_cpu:
        raise TypeError(f"{op}: {name} is float64, which only the CPU path and backend='torch' compute in")


def check_tensor(op: str, name: str, tensor: Tensor, ndim: int | None, *, also: tuple[torch.dtype, ...] = ()) -> None:
    """Refuse anything but a tensor with ``ndim`` dimensions (None: one or more) of a floating dtype, or of a dtype in
    ``also``.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    allowed = (*FLOATS, *also)
    if tensor.dtype not in allowed:
        raise TypeError(
            f"{op}: {name} must be one of {', '.join(map(dtype_name, allowed))}, got {dtype_name(tensor.dtype)}"
        )
    if tensor.ndim != (ndim or max(1, tensor.ndim)):
        expected = "one dimension or more" if ndim is None else f"{ndim} dimensions"
        raise ValueError(f"{op}: {name} must have {expected}, got shape {tuple(tensor.shape)}")


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor on another device, or of another dtype, than ``other``."""
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but {other_name} is on {other.device}")
    if tensor.dtype != other.dtype:
        raise TypeError(f"{op}: {name} is {dtype_name(tensor.dtype)}, but {other_name} is {dtype_name(other.dtype)}")


def check_parameter(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuse anything but a value for each element of the last dimension of ``x``, of any floating dtype."""
    check_tensor(op, name, tensor, 1)
    if tensor.shape[0] != x.shape[-1] or tensor.device != x.device:
        raise ValueError(
            f"{op}: {name} must be [{x.shape[-1]}] on {x.device}, got {tuple(tensor.shape)} on {tensor.device}"
        )


def as_rows(x: Tensor) -> Tensor:
    """[..., N] -> [M, N], a view where the rows lie evenly apart."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def slices(length: int, size: int) -> list[slice]:
    """``range(length)`` in pieces of ``size``, the last of what is left."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)

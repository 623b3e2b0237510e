"""The one place where a kernel starts.

Every kernel of the package starts through :func:`launch`, so that a tool can see them all. :func:`record_launches`
collects the launches of an op for a given architecture, without a GPU; the offline compiler compiles exactly these.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton

from .configs import KernelConfig
from .hardware import ARCHITECTURES

# Triton decides when a kernel is decorated whether it will be interpreted, so the answer is fixed for this process.
INTERPRET: bool = triton.knobs.runtime.interpret
# Interpreted kernels take the configurations of this architecture; tests set another one.
CPU_ARCH = 80
# On a CPU, kernels that walk rows are launched as if there were only this many multiprocessors. Then even a small test
# has more rows than programs.
CPU_MULTIPROCESSORS = 2
RECORDED_MULTIPROCESSORS = 132  # of an H100; launches that fill a GPU are recorded with this number

_execute_on_cpu = INTERPRET
_target: "_Target | None" = None


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: the kernel, its arguments by name, and its compile options."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Target:
    """The GPU that kernels are launched for although no tensor is on it.

    Its launches are recorded, or go to ``device`` if the driver is a stub.
    """

    arch: int
    multiprocessors: int | None
    device: torch.device | None = None
    launches: list[Launch] | None = None


@contextlib.contextmanager
def _launches_for(target: _Target) -> Iterator[None]:
    """Launch the kernels in this context for ``target``."""
    global _target
    outer, _target = _target, target
    try:
        yield
    finally:
        _target = outer


@contextlib.contextmanager
def record_launches(arch: int, multiprocessors: int | None = None) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, configured for compute capability ``arch`` (90 for sm_90).

    With ``multiprocessors``, sizes that depend on the number of multiprocessors are those of a GPU that has this many.
    """
    launches: list[Launch] = []
    with _launches_for(_Target(arch, multiprocessors, launches=launches)):
        yield launches


@contextlib.contextmanager
def execute_on_cpu() -> Iterator[None]:
    """Launch the Triton kernels for CPU tensors too; this is for tools that replace the launch by their own
    execution.
    """
    global _execute_on_cpu
    outer, _execute_on_cpu = _execute_on_cpu, True
    try:
        yield
    finally:
        _execute_on_cpu = outer


@contextlib.contextmanager
def stand_in(device: torch.device, arch: int, multiprocessors: int) -> Iterator[None]:
    """Launch the Triton kernels for CPU tensors as if they were tensors of ``device``, a GPU of the given kind.

    This is for a stub of the driver: the device is made current for each launch, as if the tensors were on it.
    """
    with _launches_for(_Target(arch, multiprocessors, device)), execute_on_cpu():
        yield


def _target_of(device: torch.device) -> _Target | None:
    """Return the GPU that kernels are launched for in place of ``device``, or None."""
    return _target if _target is not None and (_target.launches is not None or device.type == "cpu") else None


def executes_on_cpu() -> bool:
    """Return whether kernels run for CPU tensors: in the interpreter, or in a tool that replaces the launch."""
    return _execute_on_cpu


def triton_runs_on(device: torch.device) -> bool:
    """Return whether a Triton kernel can be launched for tensors on ``device``."""
    return device.type == "cuda" or (device.type == "cpu" and (_execute_on_cpu or _target is not None))


def arch_of(device: torch.device) -> int:
    """Return the compute capability that configurations are looked up for, as ``10 * major + minor``.

    Raises:
        RuntimeError: a GPU that is too old for the kernels.
    """
    target = _target and _target_of(device)
    if target is not None:
        return target.arch
    return _arch_of_gpu(device) if device.type == "cuda" else CPU_ARCH


@functools.cache
def _arch_of_gpu(device: torch.device) -> int:
    """Return the compute capability of a GPU; refuse one that is too old."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(f"the kernels need compute capability 8.0, {name} has {major}.{minor}: use backend='torch'")
    return 10 * major + minor


def programs_at_once(device: torch.device, num_warps: int, registers: int) -> int:
    """Return how many programs of a kernel run on a GPU at once if each thread takes ``registers``.

    A kernel that walks rows is launched with this many programs. With more programs, its parameters would be loaded
    more often, and there would be more partial sums to add up.
    """
    per_multiprocessor = max(1, ARCHITECTURES[80].registers // (32 * num_warps * registers))
    return multiprocessors(device, CPU_MULTIPROCESSORS) * per_multiprocessor


def multiprocessors(device: torch.device, on_cpu: int) -> int:
    """Return the number of multiprocessors of a GPU.

    For a CPU, whose kernels are interpreted or recorded, return ``on_cpu`` unless the recorder has another number.
    """
    target = _target and _target_of(device)
    if target is not None and target.multiprocessors is not None:
        return target.multiprocessors
    return _multiprocessors_of(device, on_cpu)


@functools.cache
def _multiprocessors_of(device: torch.device, on_cpu: int) -> int:
    """Return the number of multiprocessors of a GPU, or ``on_cpu`` for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else on_cpu


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: KernelConfig, device: torch.device, **constexprs: Any
) -> None:
    """Start ``kernel`` on ``device``; an empty grid starts nothing.

    FP fusion is set explicitly: its default differs between Triton versions, and changes the last bits of the results.
    """
    if 0 in grid:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    target = _target and _target_of(device)
    if target is not None and target.launches is not None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        target.launches.append(Launch(kernel, grid, named, constexprs, options))
        return
    if target is not None and target.device is not None:
        device = target.device
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **constexprs, **options)

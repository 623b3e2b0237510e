"""The one place where a kernel starts.

Every kernel of the package starts through :func:`launch`, so that a tool can see them all. :func:`record_launches`
collects the launches of an op for a given architecture, without a GPU; the offline compiler compiles exactly these.
"""

import contextlib
import dataclasses
import functools
import operator
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .compiled import Compiled, ready
from .configs import KernelConfig, forget_plans, planned
from .hardware import AMD, ARCHITECTURES, target_name

# Triton decides when a kernel is decorated whether it will be interpreted, so the answer is fixed for this process.
INTERPRET: bool = triton.knobs.runtime.interpret
# Interpreted kernels take the configurations of this architecture; tests set another one.
CPU_ARCH = 80
# On a CPU, kernels whose programs loop over rows are launched as if there were only this many multiprocessors. Then
# even a small test has more rows than programs.
CPU_MULTIPROCESSORS = 2
# The Triton versions whose compiled kernels a plan starts by itself. With other versions, Triton starts every kernel.
DIRECT_VERSIONS = ("3.6", "3.9")
RECORDED_MULTIPROCESSORS = 132  # an H100's: a recorded launch that should fill a GPU is sized for this many

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

    Its launches are recorded in ``launches``, or go to ``device`` if a stub takes the place of the CUDA driver.
    """

    arch: int
    multiprocessors: int | None
    device: torch.device | None = None
    launches: list[Launch] | None = None


@contextlib.contextmanager
def _launches_for(target: _Target | None, *, on_cpu: bool) -> Iterator[None]:
    """Launch the kernels in this context for ``target``, and with ``on_cpu`` also those for CPU tensors."""
    global _target, _execute_on_cpu
    outer = _target, _execute_on_cpu
    _target, _execute_on_cpu = target, on_cpu
    forget_plans()
    try:
        yield
    finally:
        _target, _execute_on_cpu = outer
        forget_plans()


@contextlib.contextmanager
def record_launches(arch: int, multiprocessors: int | None = None) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, configured for compute capability ``arch`` (90 for sm_90).

    With ``multiprocessors``, sizes that depend on the number of multiprocessors are those of a GPU that has this many.
    """
    launches: list[Launch] = []
    with _launches_for(_Target(arch, multiprocessors, launches=launches), on_cpu=_execute_on_cpu):
        yield launches


def execute_on_cpu() -> contextlib.AbstractContextManager[None]:
    """Launch the Triton kernels for CPU tensors too; this is for tools that replace the launch by their own
    execution.
    """
    return _launches_for(_target, on_cpu=True)


def stand_in(device: torch.device, arch: int, multiprocessors: int) -> contextlib.AbstractContextManager[None]:
    """Launch the Triton kernels for CPU tensors as if these were on ``device``, a GPU of compute capability ``arch``.

    This is for a stub of the CUDA driver (:mod:`clipfast.bench.stub`). ``device`` is made current for each launch.
    """
    return _launches_for(_Target(arch, multiprocessors, device), on_cpu=True)


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
    """Return the architecture that configurations are looked up for: ``10 * major + minor`` of the compute capability,
    or 942 for AMD's gfx942.

    Raises:
        RuntimeError: a GPU that is too old for the kernels, or one of AMD for which they are not compiled.
    """
    target = _target and _target_of(device)
    if target is not None:
        return target.arch
    return _arch_of_gpu(device) if device.type == "cuda" else CPU_ARCH


@functools.cache
def _arch_of_gpu(device: torch.device) -> int:
    """Return the architecture of a GPU; refuse a GPU that is too old, or one of AMD that :data:`AMD` lacks."""
    if torch.version.hip is not None:
        return _arch_of_amd(device)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(f"the kernels need compute capability 8.0, {name} has {major}.{minor}: use backend='torch'")
    return 10 * major + minor


def _arch_of_amd(device: torch.device) -> int:
    """Return the number in the name of an AMD GPU's architecture, 942 for gfx942; refuse one that :data:`AMD` lacks."""
    name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    for arch in AMD:
        if name == target_name(arch):
            return arch
    known = ", ".join(map(target_name, AMD))
    raise RuntimeError(f"of AMD's GPUs, the kernels are compiled for {known} only, not for {name}: use backend='torch'")


def programs_at_once(device: torch.device, num_warps: int, registers: int) -> int:
    """Return how many programs of a kernel run on a GPU at once if each thread takes ``registers``.

    A kernel whose programs loop over rows is launched with this many programs. With more programs, its parameters would
    be loaded more often, and there would be more partial sums to add up. A multiprocessor of AMD has twice the
    registers, and its warps have twice the threads.
    """
    per_multiprocessor = max(1, ARCHITECTURES[80].registers // (32 * num_warps * registers))
    return multiprocessors(device, CPU_MULTIPROCESSORS) * per_multiprocessor


def multiprocessors(device: torch.device, on_cpu: int) -> int:
    """Return the number of multiprocessors of a GPU.

    For a CPU, whose kernels are interpreted or recorded, return ``on_cpu``, or the number that :func:`record_launches`
    or :func:`stand_in` was given.
    """
    target = _target and _target_of(device)
    if target is not None and target.multiprocessors is not None:
        return target.multiprocessors
    return _multiprocessors_of(device, on_cpu)


@functools.cache
def _multiprocessors_of(device: torch.device, on_cpu: int) -> int:
    """Return the number of multiprocessors of a GPU, or ``on_cpu`` for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else on_cpu


class _Thread(threading.local):
    """What each thread notes of the plans that it starts."""

    starts: "list[tuple[Plan, tuple[Any, ...]]] | None" = None


_thread = _Thread()


@contextlib.contextmanager
def noted_starts() -> "Iterator[list[tuple[Plan, tuple[Any, ...]]]]":
    """Collect the plans that this thread starts in the context, each with its tensors, descriptors or None."""
    outer, _thread.starts = _thread.starts, []
    try:
        yield _thread.starts
    finally:
        _thread.starts = outer


class Plan:
    """A launch of which everything is known but its tensors: the kernel, the grid, the numbers and the options.

    The first start with tensors of certain dtypes goes through Triton, which binds the arguments, looks at each of them
    and compiles. Later starts pass the addresses of their tensors directly to the compiled kernel. Triton specialises a
    kernel for numbers that are 1 or multiples of 16, which a plan fixes. It also specialises it for the dtypes of
    tensors, the blocks of descriptors, and addresses that are multiples of 16 bytes. These are the key by which a plan
    keeps its compiled kernels.

    FP fusion is set explicitly: its default differs between Triton versions, and changes the last bits of the results.
    """

    __slots__ = (
        "_constexprs", "_device_of", "_grid", "_kernel", "_numbers", "_options", "_target", "compiled", "index",
        "stream_of",
    )  # fmt: skip

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], *numbers: float, config: KernelConfig, device: torch.device,
        **constexprs: Any,
    ) -> None:  # fmt: skip
        """Plan a launch of ``kernel``, whose parameters are its tensors, then ``numbers``, then ``constexprs``."""
        self._kernel, self._grid, self._numbers, self._constexprs = kernel, grid, numbers, constexprs
        self._options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
        if config.max_registers is not None and arch_of(device) not in AMD:  # Triton has no option maxnreg on AMD
            self._options["maxnreg"] = config.max_registers
        self._target = _target and _target_of(device)
        if self._target is not None and self._target.device is not None:
            device = self._target.device
        self.index = device.index if device.type == "cuda" else None
        self.compiled: dict[tuple[Any, ...], Compiled] = {}

    def start(self, *tensors: Any) -> None:
        """Start the kernel with these tensors, tensor descriptors, or None for one that is absent.

        An empty grid starts nothing.
        """
        if _thread.starts is not None:
            _thread.starts.append((self, tensors))
        if not self.start_compiled(tensors):
            self.start_by_triton(tensors)

    def compiled_for(self, tensors: tuple[Any, ...]) -> Compiled | None:
        """Return the kernel compiled for tensors of these dtypes and alignments, or None if there is none."""
        return self.compiled.get(_bind(tensors)[0])

    def start_compiled(self, tensors: tuple[Any, ...]) -> bool:
        """Start the kernel compiled for tensors of these dtypes and alignments; return False if there is none."""
        if not self.compiled or not self.may_start():
            return False
        key, arguments = _bind(tensors)
        compiled = self.compiled.get(key)
        if compiled is None:
            return False
        compiled.start(self.stream_of(self.index), arguments)
        return True

    def may_start(self, *others: "Plan") -> bool:
        """Return whether the plan, and ``others`` on its GPU, may start their compiled kernels: no hook watches
        launches, and the GPU is current.
        """
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if self._kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            return False
        for other in others:
            if other._kernel.pre_run_hooks:
                return False
        is_current: bool = self._device_of() == self.index
        return is_current

    def start_by_triton(self, tensors: tuple[Any, ...]) -> None:
        """Start the kernel by Triton's own way, or record its launch, and keep the compiled kernel."""
        if 0 in self._grid:
            return
        kernel, arguments = self._kernel, (*tensors, *self._numbers)
        if self._target is not None and self._target.launches is not None:
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            self._target.launches.append(Launch(kernel, self._grid, named, self._constexprs, self._options))
            return
        with contextlib.nullcontext() if self.index is None else torch.cuda.device(self.index):
            compiled = kernel[self._grid](*arguments, **self._constexprs, **self._options)
        # On AMD, a kernel is also specialised for tensors of less than 2 GiB, which a plan does not know of.
        is_amd = torch.version.hip is not None
        if self.index is None or is_amd or triton.__version__.rsplit(".", 1)[0] not in DIRECT_VERSIONS:
            return
        if isinstance(compiled, CompiledKernel):
            constexprs = (self._constexprs[name] for name in kernel.arg_names[len(arguments) :])
            found = ready(compiled, (*self._grid, 1, 1)[:3], (*self._numbers, *constexprs))
            self.compiled[_bind(tensors)[0]] = found
            active = driver.active
            self.stream_of, self._device_of = active.get_current_stream, active.get_current_device
            # current_device checks that CUDA is initialised, and then calls _cuda_getDevice.
            if self._device_of is torch.cuda.current_device:
                self._device_of = torch._C._cuda_getDevice


class Start:
    """The start of a plan whose tensors always have the same dtypes, and are None in the same places.

    After a first start, only the addresses of the tensors have to be looked at.
    """

    __slots__ = ("_plan", "_ready")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._ready: Compiled | None = None

    def __call__(self, *tensors: Any) -> None:
        """Start the kernel with tensors, tensor descriptors or None; an empty grid starts nothing."""
        if self._ready is None or not self.at(*[0 if x is None else x.data_ptr() for x in tensors]):
            self._plan.start(*tensors)
            self.remember(tensors)

    def remember(self, tensors: tuple[Any, ...]) -> None:
        """Keep the kernel compiled for tensors like these, if all are aligned to 16 bytes and none is a descriptor."""
        key, arguments = _bind(tensors)
        if False not in key and not any(x.__class__ is TensorDescriptor for x in arguments):
            self._ready = self._plan.compiled.get(key)

    def at(self, *addresses: int) -> bool:
        """Start the kernel with tensors at these addresses, 0 for None, and return True.

        Return False, and start nothing, before a first call has compiled the kernel, for an address that is no multiple
        of 16 bytes, and where :meth:`Plan.may_start` forbids it.
        """
        plan, ready = self._plan, self._ready
        if ready is None or functools.reduce(operator.or_, addresses) % 16 or not plan.may_start():
            return False
        ready.start(plan.stream_of(plan.index), addresses)
        return True


def _bind(tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
    """Return the key by which a plan keeps the kernel compiled for tensors like these, and the kernel's arguments.

    The argument for a tensor is its address. A descriptor is passed as it is, since Triton's launcher makes a tensor
    map from it.
    """
    key: list[Any] = []
    arguments: list[Any] = []
    for x in tensors:
        if x is None:
            key.append(None)
            arguments.append(None)
        elif x.__class__ is TensorDescriptor:
            key.append((x.base.dtype, *x.block_shape))
            arguments.append(x)
        else:
            address = x.data_ptr()
            key.append(x.dtype)
            if address % 16:
                key.append(False)
            arguments.append(address)
    return tuple(key), arguments


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: KernelConfig, device: torch.device, **constexprs: Any
) -> None:
    """Start ``kernel`` on ``device``; an empty grid starts nothing.

    The :class:`Plan` of the launch is looked up by all its numbers. An op that every block of a model calls keeps a
    :class:`Start` for each layout instead, and so saves the look-up.

    Args:
        kernel: the kernel.
        grid: the number of its programs along each axis.
        args: its tensors (or None), then its numbers.
        config, device, constexprs: see :class:`Plan`.
    """
    count = len(args)
    while count and isinstance(args[count - 1], int | float):
        count -= 1
    plan = _plan_of(kernel, grid, config, device, tuple(constexprs.items()), *args[count:])
    plan.start(*args[:count])


def plan_start(
    kernel: Any, grid: tuple[int, ...], *numbers: float, config: KernelConfig, device: torch.device, **constexprs: Any
) -> Start:
    """Return a :class:`Start` of ``kernel``, for tensors of one layout; the arguments are those of :func:`launch`."""
    return Start(_plan_of(kernel, grid, config, device, tuple(constexprs.items()), *numbers))


@planned
def _plan_of(
    kernel: Any, grid: tuple[int, ...], config: KernelConfig, device: torch.device,
    constexprs: tuple[tuple[str, Any], ...], *numbers: float,
) -> Plan:  # fmt: skip
    """Return the plan of a kernel's launch, the same one for equal arguments."""
    return Plan(kernel, grid, *numbers, config=config, device=device, **dict(constexprs))

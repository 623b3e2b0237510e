"""A stand-in for a GPU, for the verification of other people's kernels on a machine without one.

Code that was written for a GPU asks Triton's driver and ``torch.cuda`` about the GPU, refuses tensors on other devices,
and lets an autotuner time its configurations. In the contexts of this module, driver, ``torch.cuda``, tensors and
autotuner answer as with a GPU, while every tensor is in the memory of the CPU. The kernels are then interpreted,
executed by ttsem, or only recorded.
"""

import contextlib
import copy
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels.hardware import ARCHITECTURES
from ..kernels.launch import Launch

ARCH = 90  # the compute capability of the GPU, if no other is wanted
_CPU = torch.device("cpu")
_CUDA = torch.device("cuda", 0)


class _Compiled:
    """A stand-in for a compiled kernel, whose registers and shared memory a user's code asks for before the launch.

    Nothing is compiled, so the numbers of registers and bytes are only plausible.
    """

    n_regs, n_spills, metadata = 32, 0, types.SimpleNamespace(shared=1024, num_warps=4)

    def __init__(self, kernel: Any, kwargs: dict[str, Any]) -> None:
        self._kernel, self._options = kernel, _options(kernel, kwargs)

    def _init_handles(self) -> None:
        """Load nothing; a user's code calls this to load a compiled kernel onto the GPU."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args: self._kernel.run(*args, grid=grid, warmup=False, **self._options)


class _Driver:
    """A stand-in for Triton's driver, which answers as it would for a GPU."""

    def __init__(self, arch: int) -> None:
        limits = ARCHITECTURES[arch]
        sizes = {"max_shared_mem": limits.block_shared_bytes, "multiprocessor_count": limits.multiprocessors}
        sizes |= {"max_num_regs": limits.registers, "warpSize": 32}
        self.utils = types.SimpleNamespace(get_device_properties=lambda _=0: sizes)
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        """Return the architecture that a user's kernels are compiled for."""
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        """Return 0, the number of the only GPU that this driver has."""
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        """Return 0, the number of the only stream of a GPU that this driver has."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device on which a user's code makes tensors; :class:`_OnCpu` puts the CPU in its place."""
        return _CUDA


class _OnCpu(TorchFunctionMode):
    """Make tensors on the CPU, and keep them there, where a user's code asks for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: _CPU if key == "device" and _is_cuda(value) else value for key, value in (kwargs or {}).items()}
        name = getattr(func, "__name__", "")
        if name == "cuda" and args:
            return args[0]
        if name == "to":
            args = tuple(_CPU if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    """Return whether an argument in a user's code names a GPU."""
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _pretended_device(mode: TorchFunctionMode) -> property:
    """Return the property ``Tensor.device``: the GPU for a user's code, and the CPU inside of PyTorch's functions."""
    real = torch._C.TensorBase.device.__get__

    def device(x: Any) -> torch.device:
        """Return the device that a tensor of a user's code seems to be on."""
        found: torch.device = real(x)
        return _CUDA if found.type == "cpu" and mode in _get_current_function_mode_stack() else found

    return property(device)


def _with_mode(mode: TorchFunctionMode) -> Callable[..., Any]:
    """Return PyTorch's function for a backward pass, changed so that a user's code finds the GPU in it.

    PyTorch switches ``mode`` off in its own functions, also in a backward pass, which calls a user's code.
    """
    run_backward = torch.autograd.graph._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        """Run the backward pass of a user's code."""
        with mode:
            return run_backward(*args, **kwargs)

    return run


def _answers(arch: int) -> dict[str, Any]:
    """Return the functions of ``torch.cuda`` that answer a user's code, for a compute capability."""
    limits = ARCHITECTURES[arch]
    properties = types.SimpleNamespace(
        name=f"stand-in for sm_{arch}", major=arch // 10, minor=arch % 10, warp_size=32, max_threads_per_block=1024,
        multi_processor_count=limits.multiprocessors, total_memory=80 * 2**30, regs_per_multiprocessor=limits.registers,
        shared_memory_per_multiprocessor=limits.shared_bytes, shared_memory_per_block_optin=limits.block_shared_bytes,
        max_threads_per_multi_processor=32 * limits.warps, L2_cache_size=50 * 2**20,
    )  # fmt: skip
    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_capability": lambda _=None: divmod(arch, 10), "get_device_name": lambda _=None: properties.name,
        "get_device_properties": lambda _=None: properties, "synchronize": lambda _=None: None,
        "set_device": lambda _=None: None, "empty_cache": lambda: None, "device": _nowhere, "_DeviceGuard": _nowhere,
    }  # fmt: skip


@contextlib.contextmanager
def stand_in_gpu(arch: int = ARCH) -> Iterator[None]:
    """Let a user's code find a GPU of a compute capability, whose memory is the CPU's, while the context is open.

    An autotuner takes the first of its configurations that is not pruned, since nothing can be timed.
    """
    mode = _OnCpu()
    before = driver._active
    with contextlib.ExitStack() as stack:
        for name, answer in _answers(arch).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", property(lambda _: True)))
        stack.enter_context(mock.patch.object(torch.Tensor, "device", _pretended_device(mode)))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _with_mode(mode)))
        stack.enter_context(mock.patch.object(Autotuner, "run", _run_first))
        interpreted = InterpretedFunction.run
        warm = lambda kernel, *args, warmup=False, **kwargs: (  # noqa: E731
            _Compiled(kernel, kwargs) if warmup else interpreted(kernel, *args, warmup=False, **kwargs)
        )
        stack.enter_context(mock.patch.object(InterpretedFunction, "run", warm))
        driver.set_active(_Driver(arch))
        try:
            with mode:
                yield
        finally:
            driver._active = before


def _nowhere(_: object = None) -> contextlib.AbstractContextManager[None]:
    """Return a context that does nothing, in place of one that would make a GPU current."""
    return contextlib.nullcontext()


def _prepared(tuner: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run the hooks before a launch of a user's kernel in one configuration, and return the arguments of the launch."""
    chosen = {**kwargs, **config.all_kwargs()}
    named = {**dict(zip(tuner.arg_names, args, strict=False)), **chosen}
    tuner.pre_hook(named, reset_only=True)
    if config.pre_hook is not None:
        config.pre_hook(named)
    return chosen


def _pruned(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the configurations of a user's autotuned kernel that its own rules leave for a call."""
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    configs: list[Any] = tuner.prune_configs(kwargs)
    return configs


def _run_first(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a user's autotuned kernel in its first configuration."""
    config = _pruned(tuner, args, kwargs)[0]
    return tuner.fn.run(*args, **_prepared(tuner, config, args, kwargs))


# The launches of one call of a kernel in each of its configurations, of which an autotuner would choose one.
Choice = list[Launch]


@contextlib.contextmanager
def record_others() -> Iterator[list[Choice]]:
    """Record the launches of other people's kernels in place of running them, each in all of its configurations."""
    found: list[Choice] = []
    is_other = False  # whether the next launch repeats the launch before it in another configuration

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        """Record a launch of a user's kernel, or return a stand-in for the kernel if it is only to be compiled."""
        if warmup:
            return _Compiled(kernel, kwargs)
        launch = _launch_of(kernel, args, grid, kwargs)
        if 0 not in launch.grid:
            found.append([*found.pop(), launch] if is_other and found else [launch])
        return None

    def run_all(tuner: Any, *args: Any, **kwargs: Any) -> None:
        """Record a launch of a user's autotuned kernel in each configuration."""
        nonlocal is_other
        for number, config in enumerate(_pruned(tuner, args, kwargs)):
            is_other = number > 0
            tuner.fn.run(*args, **_prepared(tuner, config, args, kwargs))
        is_other = False

    def run_nothing(kernel: Any, *_: Any, warmup: bool = False, **kwargs: Any) -> Any:
        """Skip the launch of a user's interpreted kernel, whose parameters cannot be recorded."""
        return _Compiled(kernel, kwargs) if warmup else None

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(InterpretedFunction, "run", run_nothing),
        mock.patch.object(Autotuner, "run", run_all),
    ):
        yield found


def _launch_of(kernel: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> Launch:
    """Return the record of a launch of a user's kernel: its arguments by name, its constants and its options."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    values = {param.name: given.get(param.name, param.default) for param in kernel.params}
    missing = [name for name, value in values.items() if value is inspect.Parameter.empty]
    if missing:
        raise TypeError(f"the launch of {kernel.__name__} lacks {', '.join(missing)}")
    sizes = grid(values) if callable(grid) else grid
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    constants = {param.name: values.pop(param.name) for param in kernel.params if param.is_constexpr}
    # Descriptors are copied, since the hook of the next configuration may change their blocks.
    values = {
        name: copy.copy(value) if isinstance(value, TensorDescriptor) else value for name, value in values.items()
    }
    return Launch(kernel, (*sizes, 1, 1)[:3], values, constants, _options(kernel, given))


def _options(kernel: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the compiler among the arguments of a launch of a user's kernel, such as num_warps."""
    return {name: value for name, value in given.items() if name not in (*kernel.arg_names, "grid", "warmup")}

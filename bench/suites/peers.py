"""Import and compile other people's implementations for benchmarks, if they are installed."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

from ..case import MissingError, short

R = TypeVar("R")


def need(module: str, package: str) -> ModuleType:
    """Import another package to benchmark it; ``pip install package`` installs its ``module``.

    Raises:
        MissingError: the module is not installed, or cannot be imported here.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        # Some packages need a GPU or another version of Triton when they are imported.
        if isinstance(error, ImportError) and error.name == module.split(".")[0]:
            raise MissingError(f"not installed (pip install {package})") from error
        raise MissingError(f"{package} cannot be imported: {short(error)}") from error


def compiled(function: Callable[..., R], *, fullgraph: bool = False) -> Callable[..., R]:
    """Compile a benchmark candidate for static shapes. ``harness.measure`` drops the code of earlier cases."""
    # With this option, the profiler also records TorchInductor's kernels on a CPU.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp.enable_kernel_profile": True}
    return torch.compile(function, dynamic=False, fullgraph=fullgraph, options=options)


@functools.cache
def need_compiler(device: torch.device) -> None:
    """Check that TorchInductor can compile a benchmark candidate for ``device``.

    Raises:
        MissingError: TorchInductor cannot compile here, for example because there is no C++ compiler.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        raise MissingError(f"torch.compile does not work here: {short(error)}") from error

"""Other people's implementations, where they are installed."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

from ..case import MissingError, short

R = TypeVar("R")


def need(module: str, package: str) -> ModuleType:
    """Import ``module``, which ``pip install package`` gives.

    Raises:
        MissingError: it is not installed, or cannot be imported here.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        # some peers ask for a GPU, or for another Triton, when they are imported
        if isinstance(error, ImportError) and error.name == module.split(".")[0]:
            raise MissingError(f"not installed (pip install {package})") from error
        raise MissingError(f"{package} cannot be imported: {short(error)}") from error


def compiled(function: Callable[..., R], *, fullgraph: bool = False) -> Callable[..., R]:
    """Compile a candidate for the shape at hand. ``harness.measure`` forgets what was compiled for earlier cases."""
    # on a CPU, the profiler sees what TorchInductor has compiled only if it was told so
    options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp.enable_kernel_profile": True}
    return torch.compile(function, dynamic=False, fullgraph=fullgraph, options=options)


@functools.cache
def need_compiler(device: torch.device) -> None:
    """Compile something small for ``device``.

    Raises:
        MissingError: TorchInductor cannot do it here, for want of a compiler perhaps.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        raise MissingError(f"torch.compile does not work here: {short(error)}") from error

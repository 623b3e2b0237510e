"""The choice of what an op runs on: its registered implementation, or the PyTorch reference."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from .launch import triton_runs_on

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "triton", "torch")


def uses_reference(op: str, backend: str, tensor: Tensor) -> bool:
    """Decide what ``backend`` means for ``tensor``: True for the PyTorch reference, False for the registered op.

    Raises:
        ValueError: an unknown backend.
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


def registered(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function the implementation of the PyTorch op ``clipfast::<name>``, on CPUs and GPUs, outside autocast."""
    register = torch.library.custom_op(f"clipfast::{name}", mutates_args=(), device_types=("cuda", "cpu"))
    return lambda fn: register(outside_autocast(fn))


def outside_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Run an op's implementation with autocast switched off: its operands have the right dtype already."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device_type, enabled=False):
            return fn(*args, **kwargs)

    return wrapper

"""The choice of the implementation of an op (the registered op or the PyTorch reference), and its registration."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from .launch import triton_runs_on

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "triton", "torch")


def uses_reference(op: str, backend: str, tensor: Tensor) -> bool:
    """Decide what ``backend`` means for ``tensor``: True for the PyTorch reference, False for the registered op.

    A registered op has a first derivative in reverse mode, and no rule for the transforms of ``torch.func``. PyTorch
    would silently take its forward-mode derivative to be zero. Therefore, under a transform, "auto" means the
    reference, and a warning says so.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: ``backend="triton"`` where Triton cannot run, or under a transform.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" and not triton_runs_on(tensor.device):
        raise RuntimeError(
            f"{op}: backend='triton' cannot run on a {tensor.device.type} tensor: "
            "move it to a GPU, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU"
        )
    if backend == "torch" or tensor.device.type not in ("cuda", "cpu", "meta"):
        return True
    if not _is_transformed():
        return False
    if backend == "triton":
        raise RuntimeError(f"{op}: backend='triton' has no forward-mode derivative and no torch.func transform")
    if not torch.compiler.is_compiling():  # which cannot trace a warning
        warnings.warn(
            f"{op}: torch.func and forward-mode derivatives take the PyTorch reference, which needs more memory",
            stacklevel=3,
        )
    return True


def _is_transformed() -> bool:
    """Return True within a transform of ``torch.func``, and where forward-mode derivatives are computed."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


# torch.compile may take the result as a constant, since it compiles again under another transform. The attribute is
# explained at ``_least_keys_of_sdpa`` in attention/op.py.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def registered(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function the implementation of the PyTorch op ``clipfast::<name>``, on CPUs and GPUs, outside autocast.

    A call of its derivative raises an error until the op registers one. The backward ops of the losses register none,
    so a second derivative of a loss raises this error.
    """

    def no_derivative(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"clipfast::{name} has no derivative: compute second derivatives with backend='torch', the reference"
        )

    def register(fn: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(f"clipfast::{name}", mutates_args=(), device_types=("cuda", "cpu"))(
            outside_autocast(fn)
        )
        op.register_autograd(no_derivative)
        return op

    return register


def outside_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Run an op's implementation without autocast on the device of its first tensor: it converted its operands."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(filter(torch.is_tensor, args)).device.type
        if not torch.is_autocast_enabled(device_type):
            return fn(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return fn(*args, **kwargs)

    return wrapper

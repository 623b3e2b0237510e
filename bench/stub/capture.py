"""Find calls that are forbidden during the capture of a CUDA graph, with CPU tensors in place of GPU tensors.

The stub driver refuses forbidden calls of the driver. But on CPU tensors PyTorch does not make all the calls that it
makes on a GPU: there it copies constants from the host, and waits for values that the host reads. These calls are
recognised by the PyTorch op that makes them.
"""

from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

# Ops that wait for the GPU, since the size or the value of their result is read on the host.
SYNCHRONISE = frozenset((
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive",
    "equal", "bincount", "repeat_interleave.Tensor", "multinomial", "to_sparse", "_assert_scalar", "item",
))  # fmt: skip
# The op that makes a tensor from Python numbers, which copies them from the host.
COPY_FROM_HOST = "lift_fresh"


class InsideOps(TorchDispatchMode):
    """A dispatch mode that calls :meth:`see` before each PyTorch op, including the ops within our own ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def see(self, func: Any, args: Any) -> None:
        """Inspect one call of a PyTorch op, which may lie inside one of our ops; subclasses define this method."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "clipfast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        self.see(func, args)
        return func(*args, **kwargs)


class CaptureError(Exception):
    """The error for a call that a CUDA graph cannot capture."""


class CaptureRules(InsideOps):
    """Raise :class:`CaptureError` for a PyTorch op that a CUDA graph cannot capture."""

    def see(self, func: Any, args: Any) -> None:
        """Raise an error if a CUDA graph could not capture this call of a PyTorch op on the stub."""
        name = func._schema.name.split("::")[1]
        full = f"{name}.{func._overloadname}"
        if name in SYNCHRONISE or full in SYNCHRONISE:
            raise CaptureError(f"{full} waits for the GPU while a graph is captured")
        if name == COPY_FROM_HOST:
            raise CaptureError("a constant is copied from the host while a graph is captured: make it with torch.full")
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        ):
            raise CaptureError(f"{full} with a mask waits for the GPU while a graph is captured")

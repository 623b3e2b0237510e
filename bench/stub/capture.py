"""The calls that a CUDA graph forbids while it is captured, found with CPU tensors that stand for those of a GPU.

The stub driver refuses forbidden calls of the driver. PyTorch makes others, which CPU tensors do not show: it copies
constants from the host, and waits for values that the host reads. They are recognised by the PyTorch op.
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
# The op that makes a tensor of Python numbers, and so copies them from the host.
COPY_FROM_HOST = "lift_fresh"


class InsideOps(TorchDispatchMode):
    """Call :meth:`see` for each PyTorch op before it runs, also for those within our own ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def see(self, func: Any, args: Any) -> None:
        """Look at one call of a PyTorch op."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "clipfast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        self.see(func, args)
        return func(*args, **kwargs)


class CaptureError(Exception):
    """A call did what a CUDA graph cannot capture."""


class CaptureRules(InsideOps):
    """Raise :class:`CaptureError` for a PyTorch op that a CUDA graph cannot capture."""

    def see(self, func: Any, args: Any) -> None:
        """Refuse one call, or let it pass."""
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

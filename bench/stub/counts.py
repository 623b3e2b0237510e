"""The number of Triton launches and PyTorch ops that an op's call would start on a GPU; this needs no stub."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from clipfast.kernels import backends
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import record_launches
from clipfast.kernels.spec import Call, Draw, OpSpec, Shape, specs

from .capture import InsideOps

# The compute capability of the GPU that launches are counted for.
ARCH = 90
_WITHOUT_KERNEL = ("detach", "lift_fresh", "unflatten_dense_tensors")


class Ops(InsideOps):
    """Count the PyTorch ops that start a kernel on a GPU: not views, not allocations, not our own ops.

    The count is that of a plain eager call: our ops do not notice that a dispatch mode is active.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._unseen = mock.patch.object(backends, "is_watched", return_value=False)

    def __enter__(self) -> "Ops":
        self._unseen.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._unseen.stop()

    def see(self, func: Any, _args: Any) -> None:
        """Count one call of a PyTorch op if it would start a kernel on a GPU."""
        name = func._schema.name.removeprefix("aten::")
        makes_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        allocates = name.startswith(("empty", "new_empty")) or name in _WITHOUT_KERNEL
        if func.namespace == "aten" and not makes_view and not allocates:
            self.count += 1


@dataclasses.dataclass(frozen=True)
class Count:
    """The launches and the PyTorch ops of a forward and a backward call."""

    forward_launches: int
    forward_ops: int
    backward_launches: int
    backward_ops: int


def count(spec: OpSpec, shape: Shape) -> Count:
    """Count the launches and PyTorch ops that a call of an op in bf16 would start on a GPU."""
    call = _leaves(spec.call(shape, "", Draw(empty=True), torch.bfloat16))
    numbers = []
    with record_launches(ARCH, ARCHITECTURES[ARCH].multiprocessors) as launches, Ops() as ops:
        results = _forward(spec, call)
        numbers += [len(launches), ops.count]
        _backward(results, call)
    return Count(numbers[0], numbers[1], len(launches) - numbers[0], ops.count - numbers[1])


def counts() -> dict[str, Count]:
    """Count the launches and PyTorch ops of every op, at its small shapes and at the first shape of its GPU
    benchmarks.
    """
    return {
        f"{spec.name} {shape}": count(spec, shape)
        for spec in specs().values()
        for shape in (*spec.small, spec.bench["cuda"][0])
    }


def _leaves(call: Call) -> Call:
    """Return the call whose launches are counted, with floating inputs that are leaves and require gradients."""
    inputs = {
        name: x.detach().requires_grad_(bool(call.grads) and x.is_floating_point()) for name, x in call.inputs.items()
    }
    return dataclasses.replace(call, inputs=inputs)


def _forward(spec: OpSpec, call: Call) -> tuple[torch.Tensor, ...]:
    """Call an op whose launches are counted, and return its results as a tuple."""
    op: Callable[..., Any] = functools.partial(spec.measured, **call.options)
    results = op(**call.inputs)
    return results if isinstance(results, tuple) else (results,)


def _backward(results: tuple[torch.Tensor, ...], call: Call) -> None:
    """Run the backward pass of an op whose launches are counted, from its results."""
    if not call.grads:
        return
    inputs = [x for x in call.inputs.values() if x.requires_grad]
    grads = [grad.to(result.dtype) for result, grad in zip(results, call.grads, strict=True)]
    torch.autograd.grad(results, inputs, grads, allow_unused=True)

"""What an op or a training step runs on a GPU: its launches, and the PyTorch ops beside them, without a GPU or memory.

The op or the step runs on fake tensors. Its launches keep what a compiler and the model must know of their arguments,
which are stand-ins without memory.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES, CARDS, Card
from clipfast.kernels.launch import Launch, record_launches
from clipfast.kernels.spec import Draw, OpSpec, Shape, specs
from clipfast.ledger import Event, Ledger
from clipfast.plan.step import Problem, run_step

FORWARD, BACKWARD = "forward", "backward"


@dataclasses.dataclass
class Work:
    """Launches and PyTorch ops in order, each with the phase that it belongs to."""

    launches: list[tuple[str, Launch]] = dataclasses.field(default_factory=list)
    ops: list[Event] = dataclasses.field(default_factory=list)


class _Recorder(Ledger):
    """A ledger that keeps the launches apart from the PyTorch ops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.work = Work()

    def book_launches(self) -> None:
        self.work.launches += [(self.phase, standing_in(launch)) for launch in self.launches]
        before = len(self.events)
        super().book_launches()
        del self.events[before:]

    def begin(self) -> None:
        super().begin()
        self.work.launches.clear()


def op_work(spec: OpSpec, shape: Shape, dtype: str, arch: int = 90) -> Work:
    """Return the forward and the backward pass of an op at a shape, on a GPU of a compute capability."""
    with (
        warnings.catch_warnings(action="ignore"),  # the address of a fake tensor is deprecated
        FakeTensorMode(allow_non_fake_inputs=True),
        record_launches(arch, ARCHITECTURES[arch].multiprocessors) as launches,
        _Recorder(launches) as ledger,
    ):
        call = spec.call(shape, spec.bench_values, Draw(empty=True), DTYPES[dtype])
        for name, x in call.inputs.items():
            x.requires_grad_(bool(call.grads) and x.is_floating_point() and name not in spec.frozen)
        ledger.begin()
        ledger.phase = FORWARD
        results = spec.op(**call.inputs, **call.options)
        ledger.book_launches()
        if call.grads:
            ledger.phase = BACKWARD
            results = results if isinstance(results, tuple) else (results,)
            # as the benchmark does; .backward() would copy a gradient that two leaves share, which in a model are none
            leaves = [x for x in call.inputs.values() if x.requires_grad]
            torch.autograd.grad(results, leaves, [torch.empty_like(result) for result in results], allow_unused=True)
            ledger.book_launches()
    ledger.work.ops = list(ledger.events)
    return ledger.work


def step_work(model: str, pairs: int, card: Card = CARDS["h100"]) -> Work:
    """Return one training step of a published model on one GPU, under autocast to bfloat16, with AdamW."""
    ledger = run_step(Problem(pairs, model=model), "default", card, ledger_type=_Recorder)
    assert isinstance(ledger, _Recorder)
    ledger.work.ops = list(ledger.events)
    return ledger.work


def measured_shapes() -> list[tuple[OpSpec, Shape]]:
    """Return every op at the sizes that are benchmarked on a GPU."""
    return [(spec, shape) for spec in specs().values() for shape in spec.bench["cuda"]]


def standing_in(launch: Launch) -> Launch:
    """Return a launch whose tensors have size, strides, dtype and alignment, but no memory."""
    with _disable_current_modes():
        stand_in = functools.cache(_empty)
        return dataclasses.replace(
            launch, args={name: _replace(value, stand_in) for name, value in launch.args.items()}
        )


def _replace(value: Any, stand_in: Any) -> Any:
    if isinstance(value, Tensor):
        return stand_in(
            value.untyped_storage()._cdata, tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
        )
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=_replace(value.base, stand_in))
    return value


def _empty(
    storage: int,  # noqa: ARG001  (two views of one storage are one tensor, and two storages are not)
    shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    size = offset + 1 + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    return torch.empty(max(0, size), dtype=dtype, device="meta").as_strided(shape, stride, offset)

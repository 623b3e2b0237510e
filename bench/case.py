"""What is measured: a case is one computation at one shape, and the candidates that can do it."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import Floor

__all__ = [
    "DTYPES", "OURS", "AnyFunction", "Candidate", "Case", "Function", "Inputs", "MissingError", "Results", "Sizes",
    "call", "observe", "require_cuda", "short",
]  # fmt: skip

OURS = "clipfast"
# The sizes of a case by name.
Sizes = Mapping[str, int | float | str | bool]
Inputs = dict[str, Tensor]
Function = Callable[..., Tensor]
Results = Tensor | tuple[Tensor, Tensor]
# Of one result or of two.
AnyFunction = Callable[..., Results]
# The names of each result's gradient among the inputs, which no candidate is called with, and of each result.
GRADS, VALUES = ("grad", "grad_2"), ("value", "value_2")


class MissingError(Exception):
    """A candidate cannot run here; the message says what it needs."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation.

    Attributes:
        name: as it appears in tables.
        make: imports and prepares; returns the function of the case's inputs, by name. Raises :class:`MissingError`.
        lacks: inputs for which it gives no gradient.
        note: what else a reader must know to compare.
        context: entered around every call, backward included.
    """

    name: str
    make: Callable[[], AnyFunction]
    lacks: tuple[str, ...] = ()
    note: str = ""
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclasses.dataclass(frozen=True)
class Case:
    """One computation at one shape.

    Attributes:
        suite: name of the suite that :func:`build <clipfast.bench.suites.build>` finds it by.
        op: what is computed, such as ``contrastive.fwd_bwd``.
        shape: sizes by name.
        dtype: of the floating inputs, a key of :data:`DTYPES`.
        device: where it runs.
        inputs: draws fresh inputs.
        candidates: implementations, :data:`OURS` among them.
        reference: computes the same in plain PyTorch; candidates that differ from it are not timed. None: the case
            checks itself.
        floor: the least work of one call, or None where it is not a matter of operations and bytes.
        items: how many things one call handles, and what they are called, for a throughput.
        wants_grad: inputs that gradients are taken for; none means that the function does all there is to do.
        gate_inputs: smaller inputs for the comparison with the reference where it does not fit at this shape.
        slack: outputs whose error may be larger than usual, by this factor, as rounding reaches them enlarged.
        model_flops: of one call of the published model, by :mod:`clipfast.bench.flops`; 0: it is no model's.
        transfers: bytes that cross to the device before a call, by how they may travel.
        graph: whether a call can be a CUDA graph. One that cannot is timed with the host, on one set of inputs.
    """

    suite: str
    op: str
    shape: Sizes
    dtype: str
    device: torch.device
    inputs: Callable[[], Inputs]
    candidates: tuple[Candidate, ...]
    reference: AnyFunction | None = None
    floor: Floor | None = None
    items: tuple[int, str] = (1, "calls")
    wants_grad: tuple[str, ...] = ()
    gate_inputs: Callable[[], Inputs] | None = None
    slack: Mapping[str, float] = dataclasses.field(default_factory=dict)
    model_flops: float = 0.0
    transfers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    graph: bool = True

    @property
    def name(self) -> str:
        """Op, sizes and dtype in one line."""
        return " ".join([self.op, *(f"{key}={value}" for key, value in self.shape.items()), self.dtype])


def call(case: Case, candidate: Candidate, function: AnyFunction, inputs: Inputs) -> dict[str, Tensor]:
    """One call: the value or values, and gradients as ``d_<name>`` where the case asks for them and the candidate has
    them.
    """
    wanted = [name for name in case.wants_grad if name not in candidate.lacks]
    arguments = {name: x for name, x in inputs.items() if name not in GRADS}
    with candidate.context():
        results = function(**arguments)
        values = results if isinstance(results, tuple) else (results,)
        if not wanted:
            return dict(zip(VALUES, values, strict=False))
        upstream = [
            torch.ones_like(value) if value.ndim == 0 else inputs[name].to(value.dtype)
            for value, name in zip(values, GRADS, strict=False)
        ]
        grads = torch.autograd.grad(values, [inputs[name] for name in wanted], upstream)
    detached = {name: value.detach() for name, value in zip(VALUES, values, strict=False)}
    return detached | {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def observe(case: Case, candidate: Candidate, function: AnyFunction, inputs: Inputs) -> dict[str, Tensor]:
    """What is compared with the reference: what the function itself says (its method ``observe``), or one call."""
    if hasattr(function, "observe"):
        with candidate.context():
            values: dict[str, Tensor] = function.observe(**inputs)
        return values
    return call(case, candidate, function, inputs)


def require_cuda(device: torch.device) -> None:
    """Refuse a CPU for a candidate that has kernels for GPUs only."""
    if device.type != "cuda":
        raise MissingError("needs a GPU")


def short(error: BaseException) -> str:
    """Kind and first line of an error; Triton's first line is only where, and its last one says what."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return f"{type(error).__name__}: {text[:200]}"

"""The cases of benchmarks: a case is one computation at one shape, with the candidates that can do it."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from clipfast.kernels.spec import Floor

OURS = "clipfast"
# The sizes of a case by name.
Sizes = Mapping[str, int | float | str | bool]
Inputs = dict[str, Tensor]
Function = Callable[..., Tensor]
Results = Tensor | tuple[Tensor, Tensor]
# A candidate's function, which returns one result or two.
AnyFunction = Callable[..., Results]
# GRADS are the names of the results' upstream gradients. They are among the inputs, but candidates are called without
# them. VALUES are the names of the results.
GRADS, VALUES = ("grad", "grad_2"), ("value", "value_2")


class MissingError(Exception):
    """The error for a benchmark candidate that cannot run here; the message names the missing requirement."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of the computation in a benchmark case.

    ``make`` imports and prepares what it needs, and returns a function that takes the case's inputs by name. It raises
    :class:`MissingError` if something that it needs is missing.
    """

    name: str
    make: Callable[[], AnyFunction]
    lacks: tuple[str, ...] = ()  # inputs for which the candidate gives no gradient
    note: str = ""  # a note that a reader needs for the comparison
    needs_gpu: bool = False  # whether the candidate has kernels for GPUs only
    context: Callable[[], AbstractContextManager[object]] = nullcontext  # entered around every call and its backward


@dataclasses.dataclass(frozen=True)
class Case:
    """A benchmark case: one computation at one shape, with its candidates."""

    suite: str  # the name by which :func:`clipfast.bench.suites.build` finds the suite
    op: str  # such as "contrastive_loss.fwd_bwd"
    shape: Sizes
    dtype: str  # name of the dtype of the floating inputs
    device: torch.device
    inputs: Callable[[], Inputs]  # draws new random inputs
    candidates: tuple[Candidate, ...]  # one of them has the name OURS
    # The same computation in plain PyTorch. A candidate that differs from it is not timed. If it is None, the results
    # are not compared.
    reference: Candidate | None = None
    floor: Floor | None = None  # the least work of one call, if operations and bytes describe it
    items: tuple[int, str] = (1, "calls")  # how many pairs, images or others one call handles, and their noun
    wants_grad: tuple[str, ...] = ()  # inputs whose gradients are taken; if it is empty, only the function runs
    gate_inputs: Callable[[], Inputs] | None = None  # draws smaller inputs, if the reference does not fit at this shape
    # Factors by which the errors of some outputs may exceed the usual limit, since they amplify rounding errors.
    slack: Mapping[str, float] = dataclasses.field(default_factory=dict)
    model_flops: float = 0.0  # operations of one call of the published model; 0 if the case is not of a model
    graph: bool = True  # whether a call can be a CUDA graph; if not, the host is timed too, on one set of inputs
    # The clock that is read before and after a sample, in seconds. If it is None, a GPU is timed by its events, and a
    # CPU by the wall clock.
    clock: Callable[[], float] | None = None

    @property
    def ours(self) -> Candidate:
        """Return the benchmark candidate that runs this package's implementation."""
        return next(candidate for candidate in self.candidates if candidate.name == OURS)

    @property
    def name(self) -> str:
        """Return the name of a benchmark case: op, sizes and dtype in one line."""
        return " ".join([self.op, *(f"{key}={value}" for key, value in self.shape.items()), self.dtype])


def call(case: Case, candidate: Candidate, function: AnyFunction, inputs: Inputs) -> dict[str, Tensor]:
    """Call a candidate's ``function``; return its values, and as ``d_<name>`` the wanted gradients that it has."""
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
    """Return a benchmark candidate's tensors to compare with the reference's."""
    if hasattr(function, "observe"):
        with candidate.context():
            values: dict[str, Tensor] = function.observe(**inputs)
        return values
    return call(case, candidate, function, inputs)


def short(error: BaseException) -> str:
    """Return type and first line of a benchmark candidate's error.

    If the first line only names a place in the code, as in errors of Triton, also return the last line.
    """
    lines = str(error).strip().splitlines() or [""]
    text = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return f"{type(error).__name__}: {text[:200]}"

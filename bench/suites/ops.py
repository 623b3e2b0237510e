"""The benchmarks of the ops: each is made from the op's specification.

A case times the forward and the backward pass of our op, of the reference, of the compiled reference, and of the other
people's implementations in :mod:`clipfast.bench.suites.rivals`.
"""

import dataclasses
import functools

import torch

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import Call, Draw, OpSpec, Shape

from ..case import GRADS, OURS, Candidate, Case, Inputs, Sizes
from . import peers
from .rivals import PLAIN, RIVALS


def build(spec: OpSpec, sizes: Sizes, dtype: str, device: torch.device) -> Case:
    """Make the benchmark case of an op; all floating inputs take gradients, except those that the op's spec freezes."""
    shape = type(spec.small[0])(**sizes)
    draw = functools.partial(_inputs, spec, dtype=dtype, device=device)
    smaller = {name: min(size, getattr(shape, name)) for name, size in spec.gate.get(device.type, {}).items()}
    call = spec.make(shape, spec.bench_values, Draw(device="meta", empty=True))
    floor, suffix = spec.floor(shape, DTYPES[dtype].itemsize, False), ""
    if call.grads:
        floor, suffix = floor + spec.floor(shape, DTYPES[dtype].itemsize, True), ".fwd_bwd"
    size, noun = spec.items
    reference = Candidate("reference", lambda: functools.partial(spec.reference, **call.options))
    # An op with ``timed`` is timed without the conversion that makes its results comparable. So its results are not
    # compared with the reference here, but by ``clipfast verify``.
    return Case(
        suite=spec.suite_name, op=f"{spec.name}{suffix}", shape=shape.to_dict(), dtype=dtype, device=device,
        inputs=functools.partial(draw, shape),
        gate_inputs=functools.partial(draw, dataclasses.replace(shape, **smaller)) if smaller else None,
        candidates=_candidates(spec, call),
        reference=None if spec.timed else reference,
        floor=floor,
        items=(getattr(shape, size), noun),
        wants_grad=tuple(
            name for name, x in call.inputs.items() if call.grads and x.is_floating_point() and name not in spec.frozen
        ),
    )  # fmt: skip


def _inputs(spec: OpSpec, shape: Shape, dtype: str, device: torch.device) -> Inputs:
    """Draw the inputs of an op's benchmark case."""
    seed = int(torch.randint(2**31, ()))  # each set of inputs gets another seed
    call = spec.call(shape, spec.bench_values, Draw(seed, device), DTYPES[dtype])
    return call.inputs | {name: grad for name, grad in zip(GRADS, call.grads, strict=False) if grad.ndim}


def _candidates(spec: OpSpec, call: Call) -> tuple[Candidate, ...]:
    """Return our op, the reference and other implementations as benchmark candidates."""
    ours = functools.partial(spec.measured, **call.options)
    plain, note = PLAIN.get(spec.name, (functools.partial(spec.reference, **call.options), ""))
    return (
        Candidate(OURS, lambda: ours),
        Candidate("PyTorch", lambda: plain, note=note),
        Candidate("PyTorch compiled", lambda: peers.compiled(plain), note=note),
        *(RIVALS[spec.name](call.options) if spec.name in RIVALS else ()),
    )

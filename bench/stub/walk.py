"""Call all ops through Triton's launcher on the stub driver: at the shipped shapes, and in all cases with odd
layouts.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from clipfast.kernels.contrastive import small_batch
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.spec import EXPANDED, Call, Case, Draw, OpSpec, specs
from clipfast.verify.ops import inputs_of, lay_out
from clipfast.verify.rule import value_and_grads

from ..inspection.shipped import compiles_for, shipped_calls
from .arguments import CheckedLaunch, checked_launches
from .capture import CaptureRules, InsideOps
from .driver import Stub, load, on_device

# If the reference's largest tensor in a case has more elements than this, the case's inputs are left uninitialised.
DRAWN_ELEMENTS = 2**20
# Cases with a larger tensor than this are left out, since their PyTorch ops between launches take a CPU too long.
MOST_ELEMENTS = 2**26
# Tensors belong to the second device while the first one is current, so that a missing device guard shows.
DEVICE, CURRENT = 1, 0


class ZeroedMemory(InsideOps):
    """Fill new memory with zeros: the stub runs no kernel that would write it, and an op may use it as indices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return out.zero_() if func._schema.name.startswith(("aten::empty", "aten::new_empty")) else out

    def see(self, func: Any, args: Any) -> None:
        """Do nothing, since every PyTorch op may be called on the stub."""


@dataclasses.dataclass
class Walked:
    """The result of a walk through the ops: the number of calls, and the launches and tensor maps of each op."""

    arch: int
    calls: int = 0
    launches: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    maps: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts of a walk through the ops on the stub, for JSON."""
        totals = {"launches": self.launches.total(), "maps": self.maps.total()}
        return {"arch": self.arch, "calls": self.calls, **totals, "by_op": dict(self.launches), "faults": self.faults}

    @contextlib.contextmanager
    def call(self, op: str, name: str, stub: Stub, *, emptied: bool = True) -> Iterator[list[CheckedLaunch]]:
        """Count the launches on the stub in this context, and record an error instead of raising it."""
        self.calls += 1
        before = stub.counts.refused
        try:
            on_stub = on_device(stub, DEVICE, current=CURRENT)
            with on_stub, ZeroedMemory(), checked_launches(stub, DEVICE, emptied=emptied) as seen:
                yield seen
            if stub.counts.refused != before:
                raise RuntimeError(f"the driver refused a call without an error: {stub.message}")
        except Exception as error:
            self.faults.append(f"{op}, {name}: {type(error).__name__}: {error}")
        self.launches[op] += len(seen)
        self.maps[op] += sum(one.maps for one in seen)


def shipped(arch: int, dtypes: tuple[str, ...] = tuple(DTYPES)) -> Walked:
    """Launch every shipped call (at the sizes of published models) on the stub in ``dtypes``, forward and backward.

    Kernels that load through tensor maps are compiled with their bodies, as ``inspect`` compiles them, since the box
    and the swizzle of a map depend on the body.
    """
    stub, walked = load(arch), Walked(arch)
    emptied = not ARCHITECTURES[arch].multiplies_from_shared
    for name, case in shipped_calls().items():
        if name.split()[-1] not in dtypes or not compiles_for(name, arch):
            continue
        with in_blocks(), walked.call(name.split()[0], name, stub, emptied=emptied):
            case()
    return walked


def odd(arch: int, dtypes: tuple[str, ...] = tuple(DTYPES), *, only_quick: bool = False) -> Walked:
    """Launch every case of every op on the stub in ``dtypes``, in its layout, forward and backward.

    Args:
        arch: compute capability, 90 for sm_90.
        dtypes: short names of dtypes.
        only_quick: take the cases of the quick verification, and those with a layout of their own.
    """
    stub, walked = load(arch), Walked(arch)
    for spec in specs().values():
        for case in spec.cases:
            if case.shape.elements > MOST_ELEMENTS or (only_quick and not (case.quick or case.layout)):
                continue
            for dtype in dtypes:
                call = _call(spec, case, DTYPES[dtype])
                with in_blocks(), walked.call(spec.name, f"{case.name}, {dtype}", stub):
                    _run(spec, call)
    return walked


def captured(arch: int) -> Walked:
    """Call every op on the stub at its small shapes, and once more while the stream is captured as for a CUDA graph."""
    stub, walked = load(arch), Walked(arch)
    for spec in specs().values():
        for shape in spec.small:
            call = spec.call(shape, "", Draw(), torch.bfloat16)
            with in_blocks(), walked.call(spec.name, str(shape), stub):
                _run(spec, call)
                with stub.capturing(DEVICE), CaptureRules():
                    _run(spec, call)
    return walked


def _call(spec: OpSpec, case: Case, dtype: torch.dtype) -> Call:
    """Make the inputs of a case for the stub; large ones hold no values, since only memory and layout matter here."""
    if case.shape.elements <= DRAWN_ELEMENTS:
        return inputs_of(spec, case, dtype, "cpu")
    call = spec.call(case.shape, case.values, Draw(empty=True), dtype)
    if case.layout in ("", EXPANDED):
        return call
    inputs = {name: lay_out(x, case.layout) for name, x in call.inputs.items()}
    return dataclasses.replace(call, inputs=inputs)


def _run(spec: OpSpec, call: Call) -> None:
    """Call an op on the stub driver, forward and backward."""
    value_and_grads(functools.partial(spec.op, **call.options), call.inputs, call.grads)


@contextlib.contextmanager
def in_blocks() -> Iterator[None]:
    """Send small batches of the contrastive loss through the kernels too: a CPU would compute them without kernels."""
    before, small_batch.MOST_LOGITS = small_batch.MOST_LOGITS, 0
    try:
        yield
    finally:
        small_batch.MOST_LOGITS = before


def describe(walked: Walked) -> str:
    """Return one line with the counts of a walk through the ops on the stub."""
    found = walked.to_dict()
    return (
        f"sm_{walked.arch}: {found['calls']} calls, {found['launches']} launches, {found['maps']} tensor maps, "
        f"{len(walked.faults)} faults"
    )

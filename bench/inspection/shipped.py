"""The calls that ship: every op at the shapes of the published models, and the resources that its kernels take.

``resources.json`` holds the resources by version of Triton ("3.9"), architecture ("sm_90"), case and kernel. A kernel
is a line, so that a change is a difference that one can read. The lists hold the fields of ``Resources`` in order.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.spec import Draw, OpSpec, Shipped, specs

from .offline import Resources

Case = Callable[[], object]
SNAPSHOT = Path(__file__).with_name("resources.json")
FIELDS = tuple(field.name for field in dataclasses.fields(Resources))
# The compiler makes the same of both, as a test asserts, so the snapshot has sm_89 only where it differs from sm_86.
STANDS_FOR = {"sm_89": "sm_86"}
# Resources by version, architecture, case and kernel; of a kernel, by the name of the field.
Snapshot = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]
# What the assembler warns of and clipfast leaves, by Triton version, architecture and case: the reason and the cost.
KNOWN_WARNINGS: dict[tuple[str, int, str], tuple[str, ...]] = {}
# Three registers of a tile with pairs find no place where a batch is no multiple of 16. The sigmoid loss keeps two or
# four numbers of a tile in memory for a while; without a limit of registers it keeps none, but takes a fifth longer.
KNOWN_SPILLS = {
    ("3.6", 90, "contrastive_loss N1001 D512 bf16"): ("spills 12 bytes",),
    ("3.9", 90, "sigmoid_loss N1001 D512 bf16"): ("spills 16 bytes",),
    ("3.9", 90, "sigmoid_loss N1024 D512 bf16"): ("spills 8 bytes",),
    ("3.9", 90, "sigmoid_loss N1024 D512 fp16"): ("spills 8 bytes",),
}


def known_problems(version: str, arch: int, case: str) -> tuple[str, ...]:
    """Return the problems that a case may have under a Triton version ("3.9") and that clipfast cannot help."""
    _, shipped, dtype = _named()[case]
    for known in (KNOWN_WARNINGS, KNOWN_SPILLS):
        if (version, arch, case) in known:
            return known[version, arch, case]
    if shipped.small_tiles and dtype != "fp32":
        return small_tile_problems(arch)
    if shipped.tf32_by_triton_36 and (version, arch, dtype) == ("3.6", 100, "fp32"):
        return (f"multiplies with {ARCHITECTURES[arch].matrix_unit}, expected none",)
    return ()


def small_tile_problems(arch: int) -> tuple[str, ...]:
    """Return the problems of a kernel whose tiles have fewer rows than the matrix units of ``arch`` want."""
    unit = ARCHITECTURES[arch].matrix_unit
    kinds = ("mma.sync", f"mma.sync+{unit}") if ARCHITECTURES[arch].multiplies_from_shared else ()
    return tuple(f"multiplies with {found}, expected {unit}" for found in kinds)


def shipped_cases() -> dict[str, Case]:
    """Return forward and backward calls by name, ``<op> <label> <dtype>``."""
    return {name: functools.partial(run, *named) for name, named in _named().items()}


@functools.cache
def _named() -> dict[str, tuple[OpSpec, Shipped, str]]:
    return {
        " ".join(part for part in (spec.name, shipped.label, dtype) if part): (spec, shipped, dtype)
        for spec in specs().values()
        for shipped in spec.shipped
        for dtype in shipped.dtypes
    }


def run(spec: OpSpec, shipped: Shipped, dtype: str) -> None:
    """Call the op forward and backward on tensors whose values nobody reads."""
    given = torch.float32 if shipped.autocast else DTYPES[dtype]
    call = spec.call(shipped.shape, "", Draw(empty=True), given)
    inputs = call.inputs | {name: call.inputs[name].to(DTYPES[cast]) for name, cast in shipped.casts.items()}
    leaves = {name: x.requires_grad_(bool(call.grads) and x.is_floating_point()) for name, x in inputs.items()}
    with torch.autocast("cpu", DTYPES[dtype], enabled=shipped.autocast):
        results = spec.op(**leaves, **call.options)
    if call.grads:
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])


def as_fields(found: Resources) -> dict[str, Any]:
    """Return resources as the snapshot holds them."""
    return dataclasses.asdict(found) | {"warnings": list(found.warnings)}


def loads(text: str) -> Snapshot:
    """Read a snapshot.

    Raises:
        ValueError: the text is no snapshot.
    """
    record = json.loads(text)
    if not isinstance(record, dict) or record.pop("fields", None) != list(FIELDS):
        raise ValueError(f'a snapshot has "fields": {json.dumps(FIELDS)}')
    for archs in record.values():
        for cases in archs.values():
            for kernels in cases.values():
                kernels.update({name: dict(zip(FIELDS, values, strict=True)) for name, values in kernels.items()})
        for arch, other in STANDS_FOR.items():
            if arch in archs:
                archs[arch] = archs.get(other, {}) | archs[arch]
    return record


def dumps(snapshot: Snapshot) -> str:
    """Return the text of a snapshot."""
    kept: dict[str, Any] = {"fields": FIELDS}
    for version, archs in snapshot.items():
        kept[version] = {}
        for arch, cases in archs.items():
            alike = archs.get(STANDS_FOR.get(arch, ""), {})
            kept[version][arch] = {
                case: {name: list(found.values()) for name, found in kernels.items()}
                for case, kernels in cases.items()
                if kernels != alike.get(case)
            }
    text = json.dumps(kept, indent=1, sort_keys=True)
    return re.sub(r"\n {5,}|\n {4}(?=\])", "", text) + "\n"

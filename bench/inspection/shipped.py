"""The kernels at the shapes of the published models, by the ops' specifications: what the offline compiler compiles."""

import functools
from collections.abc import Callable

import torch

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.spec import Draw, OpSpec, Shipped, specs

Case = Callable[[], object]
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

"""The shipped calls, every op at the shapes of the published models, and the resources that their kernels take.

``resources.json`` holds the resources by version of Triton ("3.9"), architecture ("sm_90"), case and kernel. Each
kernel has a line of its own, so that a diff of the file is readable. The lists hold the fields of ``Resources`` in
order.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipfast.kernels.contrastive.modes import MODES
from clipfast.kernels.contrastive.spec import STRIPS
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES, has_fp8
from clipfast.kernels.implementations import bias_act_fp8_bwd, layer_norm_fp8_bwd
from clipfast.kernels.spec import Draw, OpSpec, Shipped, specs
from clipfast.plan.planned_step import Problem, run_loss

from .offline import Resources

Case = Callable[[], object]
SNAPSHOT = Path(__file__).with_name("resources.json")
FIELDS = tuple(field.name for field in dataclasses.fields(Resources))
# The compiler usually makes the same code for sm_86 and sm_89, so the snapshot has sm_89 only where it differs. A slow
# test compiles two cases for both.
STANDS_FOR = {"sm_89": "sm_86"}
# Resources by version, architecture, case, kernel and name of the field.
Snapshot = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]
# Spills and warnings of the assembler that are accepted, by Triton version, architecture and case. If a batch is no
# multiple of 16, a large tile spills one to four registers. The sigmoid loss spills two or four registers of a tile;
# without a limit of registers it spills none, but takes a fifth longer. GELU in 8 bits keeps three tiles of whole rows
# in flight, which leaves no registers for one address.
KNOWN = {
    ("3.6", 90, "contrastive_loss N9001 D512 bf16"): ("spills 4 bytes", "spills 12 bytes", "spills 16 bytes"),
    ("3.9", 100, "bias_gelu_fp8 N5120 bf16"): ("spills 4 bytes",),
    ("3.9", 100, "fp8_linear K1280 N5120 gelu bf16"): ("spills 4 bytes",),
    ("3.9", 90, "sigmoid_loss N1001 D512 bf16"): ("spills 16 bytes",),
    ("3.9", 90, "sigmoid_loss N1024 D512 bf16"): ("spills 8 bytes",),
    ("3.9", 90, "sigmoid_loss N1024 D512 fp16"): ("spills 8 bytes",),
}


def known_problems(version: str, arch: int, case: str) -> tuple[str, ...]:
    """Return the faults that a shipped case may have under a Triton version ("3.9") because of the compiler."""
    if (version, arch, case) in KNOWN:
        return KNOWN[version, arch, case]
    if case not in _named():
        return ()
    _, shipped, dtype = _named()[case]
    if shipped.small_tiles and dtype != "fp32":
        return small_tile_problems(arch)
    if shipped.tf32_by_triton_36 and (version, arch, dtype) == ("3.6", 100, "fp32"):
        return (f"multiplies with {ARCHITECTURES[arch].matrix_unit}, expected none",)
    return ()


def small_tile_problems(arch: int) -> tuple[str, ...]:
    """Return the faults that are expected of a kernel with fewer rows in a tile than the matrix units of
    ``arch`` need.
    """
    unit = ARCHITECTURES[arch].matrix_unit
    kinds = ("mma.sync", f"mma.sync+{unit}") if ARCHITECTURES[arch].multiplies_from_shared else ()
    return tuple(f"multiplies with {found}, expected {unit}" for found in kinds)


def shipped_cases() -> dict[str, Case]:
    """Return the shipped calls, each forward and backward, by name: ``<op> <label> <dtype>``; all strips in each mode,
    most of which share their kernels; and the backward kernels of whole blocks in 8 bits, which write the results of
    their ops once more.
    """
    strips: dict[str, Case] = {
        f"distributed_contrastive_loss {mode} bf16": functools.partial(run_strips, mode) for mode in MODES
    }
    return shipped_calls() | strips | _of_blocks()


def shipped_calls() -> dict[str, Case]:
    """Return the shipped calls by name, without strips: unlike those of strips, their tensors have memory."""
    return {name: functools.partial(run, *named) for name, named in _named().items()}


def compiles_for(case: str, arch: int) -> bool:
    """Return whether the kernels of a shipped case compile for an architecture."""
    if case in _of_blocks():
        return has_fp8(arch)
    return case not in _named() or _named()[case][0].compiles_for(arch)


@functools.cache
def _of_blocks() -> dict[str, Case]:
    """Return the backward ops of the norms and the activations of whole blocks in 8 bits by name."""
    cases: dict[str, Case] = {}
    for width in (768, 1024, 1280):
        rows, parameter, stats = torch.empty(64, width).bfloat16(), torch.empty(width), torch.empty(64, 1)
        args = rows, rows, rows, parameter, stats, stats, True, parameter
        cases[f"layer_norm_fp8_bwd N{width} bf16"] = functools.partial(layer_norm_fp8_bwd, *args)
    for width, quick in ((3072, False), (4096, False), (5120, False), (4096, True)):
        rows, parameter = torch.empty(64, width).bfloat16(), torch.empty(width)
        name = f"bias_act_fp8_bwd N{width}{' quick' if quick else ''} bf16"
        cases[name] = functools.partial(bias_act_fp8_bwd, rows, rows, parameter, quick, True, True)
    return cases


def run_strips(mode: str) -> None:
    """Run the loss of all ranks on fake tensors as one of them, for each strip, to record its launches.

    In the ring, 16 ranks launch the same kernels as more of them would, since each block has the texts of one rank.
    """
    for rows, pairs, embed_dim in STRIPS:
        ranks = 16 if mode == "ring" else pairs // rows
        run_loss(Problem(ranks * rows, ranks, torch.bfloat16, embed_dim), mode, None)


@functools.cache
def _named() -> dict[str, tuple[OpSpec, Shipped, str]]:
    """Return specification, shipped call and dtype of each shipped case by name."""
    return {
        " ".join(part for part in (spec.name, shipped.label, dtype) if part): (spec, shipped, dtype)
        for spec in specs().values()
        for shipped in spec.shipped
        for dtype in shipped.dtypes
    }


def run(spec: OpSpec, shipped: Shipped, dtype: str) -> None:
    """Call a shipped op forward and backward on tensors without values, to record its launches."""
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
    """Return a kernel's resources in the form of the snapshot."""
    return dataclasses.asdict(found) | {"warnings": list(found.warnings)}


def loads(text: str) -> Snapshot:
    """Read a snapshot of the shipped kernels' resources from text.

    Raises:
        ValueError: the snapshot has other fields than :data:`FIELDS`.
    """
    record: dict[str, Any] = json.loads(text)
    if (fields := record.pop("fields", None)) != list(FIELDS):
        raise ValueError(f"a snapshot must have the fields {json.dumps(FIELDS)}, got {json.dumps(fields)}")
    for archs in record.values():
        for cases in archs.values():
            for kernels in cases.values():
                kernels.update({name: dict(zip(FIELDS, values, strict=True)) for name, values in kernels.items()})
        for arch, other in STANDS_FOR.items():
            if arch in archs:
                archs[arch] = archs.get(other, {}) | archs[arch]
    return record


def dumps(snapshot: Snapshot) -> str:
    """Return the text of a snapshot of the shipped kernels' resources."""
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

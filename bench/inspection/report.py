"""The report of a compiled kernel: as a record, as a table row, as JSON, and its differences from a snapshot."""

import dataclasses
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from clipfast.columns import align

from .bound import Bound
from .occupancy import Occupancy
from .offline import Resources

_COLUMNS = {
    "regs": "registers per thread, at most 255",
    "spill": "bytes per thread that found no register and go through memory: must be 0",
    "smem": "shared memory per block, KiB",
    "tmem": "columns of tensor memory per block; 512 exist",
    "blocks": "blocks that fit on one multiprocessor at a time, and the resources that allow no more",
    "MMA": "matrix instructions: HMMA is mma.sync, HGMMA wgmma, UTCHMMA tcgen05.mma",
    "TMA": "whether the tensor memory accelerator moves tiles",
    "mma": "clock cycles of the matrix unit for one iteration of the hottest loop",
    "exp": "the same of the exponential unit",
    "fp32": "the same of the float32 lanes",
    "issue": "the same of the issue slots",
    "bound": "how busy the matrix unit can be at most, and the unit that sets it; 'fp32': of the float32 lanes, for "
    "products that must stay exact. A bound, not an estimate: memory and waiting are left out",
    "around": "cycles of the busiest unit in the code around that loop: few, if the loop has many iterations",
}


def explain() -> str:
    """Return the text for ``--help``: what ``clipfast inspect`` does and what its columns mean."""
    what = (
        "Compile every shipped kernel for GPUs that need not be there, and report what each takes. The exit code is 1 "
        "if one spills, exceeds a limit or misses the matrix unit."
    )
    columns = [
        textwrap.fill(text, 100, initial_indent=f"  {name:8}", subsequent_indent=" " * 10)
        for name, text in _COLUMNS.items()
    ]
    return "\n".join([textwrap.fill(what, 100), "", "columns:", *columns])


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled launch on one architecture."""

    case: str  # name of the call that makes the launch
    kernel: str  # name of the kernel, and its number among the launches of that kernel
    arch: int  # compute capability, 80, 90 or 100
    resources: Resources
    warps: int  # per block
    occupancy: Occupancy
    mma: tuple[str, ...]  # kinds of matrix instructions, such as "HGMMA 64x128x16 bf16"
    tma: bool  # whether it uses the tensor memory accelerator
    bound: Bound | None  # upper bound on the use of the matrix unit
    unbounded: str  # why there is no bound, or ""
    problems: tuple[str, ...]  # what :func:`clipfast.bench.inspection.offline.problems` found
    known: tuple[str, ...] = ()  # problems that the compiler causes and clipfast cannot avoid
    peer: bool = False  # whether it is a kernel of another package

    @property
    def failures(self) -> tuple[str, ...]:
        """Return the problems that are not known ones."""
        return tuple(problem for problem in self.problems if problem not in self.known)

    @property
    def rank(self) -> tuple[bool, float, float, float]:
        """Return the key that sorts configurations of one kernel, the best first.

        Sound ones come first; then the bound decides, then the overhead beside the products, then the warps on a
        multiprocessor. A kernel that does not fit on a multiprocessor is not sound.
        """
        share, overhead = (self.bound.share, self.bound.overhead) if self.bound else (0.0, float("inf"))
        unsound = bool(self.failures) or self.occupancy.blocks == 0
        return unsound, -share, overhead, -self.occupancy.warps


def to_json(report: Report) -> dict[str, Any]:
    """Return a report for JSON: its fields, and the figures that follow from the bound."""
    record = dataclasses.asdict(report)
    if report.bound is not None:
        bound = report.bound
        record["bound"] |= {"share": bound.share, "limit": bound.loop.limit, "overhead": bound.overhead}
    return record


def table(reports: Sequence[Report]) -> str:
    """Return a table of reports for each architecture, one row for each report."""
    parts = []
    for arch in sorted({report.arch for report in reports}):
        rows = [_row(report) for report in reports if report.arch == arch]
        parts.append(f"sm_{arch}\n" + align([list(rows[0]), *(list(row.values()) for row in rows)]))
    return "\n\n".join(parts)


def _row(report: Report) -> dict[str, str]:
    bound, resources = report.bound, report.resources
    name, _, number = report.kernel.partition(" ")
    label = name.removeprefix("_").removesuffix("_kernel")
    cycles = {unit: f"{getattr(bound.loop, unit):.0f}" if bound else "-" for unit in ("mma", "exp", "fp32", "issue")}
    kind = " fp32" if bound and bound.unit == "fp32" else ""
    notes = [problem if problem in report.failures else f"known: {problem}" for problem in report.problems]
    if report.unbounded and report.unbounded != "no matrix product":
        notes.append(f"no bound: {report.unbounded}")
    return {
        "case": report.case, "kernel": label if number in ("", "0") else f"{label} {number}",
        "regs": str(resources.registers), "spill": str(resources.spill_bytes),
        "smem": f"{resources.shared_bytes / 1024:.0f}", "tmem": str(resources.tmem_columns),
        "blocks": f"{report.occupancy.blocks} {'+'.join(report.occupancy.limits)}",
        "MMA": _kinds(report.mma),
        "TMA": "yes" if report.tma else "no",
        **cycles,
        "bound": f"{bound.share:.0%}{kind} {bound.loop.limit}" if bound else "-",
        "around": f"{getattr(bound.outside, bound.outside.limit):.0f} {bound.outside.limit}" if bound else "-",
        "": "; ".join(notes),
    }  # fmt: skip


def _kinds(kinds: Sequence[str]) -> str:
    """Return the kinds of instructions in one text, with those that differ only in shape put together."""
    shapes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind in kinds:
        name, _, rest = kind.partition(" ")
        shape, _, operand = rest.partition(" ")
        shapes[name, operand].append(shape)
    return ", ".join(f"{name} {'+'.join(found)} {operand}".strip() for (name, operand), found in shapes.items()) or "-"


def differences(reports: Sequence[Report], snapshot: dict[str, Any], version: str) -> list[str]:
    """Return what differs from a snapshot, one line for each kernel. Only inspected cases are compared.

    The snapshot holds resources by Triton version ("3.9"), architecture ("sm_90"), case and kernel.
    """
    if version not in snapshot:
        return [f"the snapshot has no entry for Triton {version}, only {', '.join(sorted(snapshot)) or 'none at all'}"]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for report in reports:
        found[f"sm_{report.arch}", report.case][report.kernel] = dataclasses.asdict(report.resources)
    lines = []
    for (arch, case), kernels in found.items():
        before: dict[str, dict[str, Any]] = snapshot[version].get(arch, {}).get(case, {})
        for kernel in sorted({*kernels, *before}):
            old, new = before.get(kernel), kernels.get(kernel)
            if old == new:
                continue
            if old is None or new is None:
                changes = ["new" if old is None else "gone"]
            else:
                both = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
                changes = [f"{key} {was} -> {now}" for key, was, now in both if was != now]
            lines.append(f"{arch} {case}: {kernel}: {', '.join(changes)}")
    return lines

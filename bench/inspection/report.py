"""The report of a compiled kernel: as a record, as a table row, as JSON, and its differences from a snapshot."""

import dataclasses
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from clipfast.io.text import align

from .model import Prediction
from .offline import Occupancy, Resources
from .shipped import Snapshot, as_fields

_COLUMNS = {
    "regs": "registers per thread, at most 255",
    "spill": "bytes per thread that found no register and go through memory: must be 0",
    "smem": "shared memory per block, KiB",
    "tmem": "columns of tensor memory per block; 512 exist",
    "blocks": "blocks that fit on one multiprocessor at a time, and the resources that allow no more",
    "MMA": "matrix instructions: HMMA is mma.sync, HGMMA wgmma, UTCHMMA tcgen05.mma",
    "TMA": "whether the tensor memory accelerator moves tiles",
    "cycles": "clock cycles of one program on an H100 that is full of them, by the model of clipfast inspect --predict",
    "limit": "the unit of the multiprocessor that is busiest then, and the share of the time that it is busy",
}


def explain() -> str:
    """Return the text for ``--help``: the purpose of ``clipfast inspect`` and the meaning of its columns."""
    what = (
        "Compile every shipped kernel for GPUs that this machine may lack, and report the resources that each kernel "
        "takes. The exit code is 1 if a kernel spills registers, exceeds a limit or misses the matrix unit, or if the "
        "assembler warns, for example that it runs products one after another."
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
    arch: int  # compute capability, such as 90
    resources: Resources
    warps: int  # per block
    occupancy: Occupancy
    mma: tuple[str, ...]  # matrix instructions, such as "HGMMA.64x128x16.F32.BF16"
    tma: bool  # whether it uses the tensor memory accelerator
    prediction: Prediction | None  # of the launch on an H100; None for other architectures
    unpredicted: str  # why there is no prediction, or ""
    problems: tuple[str, ...]  # the faults from :func:`clipfast.bench.inspection.offline.problems`
    known: tuple[str, ...] = ()  # problems that the compiler causes and clipfast cannot avoid

    @property
    def failures(self) -> tuple[str, ...]:
        """Return the problems of a compiled kernel that are not known ones."""
        return tuple(problem for problem in self.problems if problem not in self.known)

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Return the key that sorts configurations of one kernel, the best first.

        Configurations without faults come first. Among these the predicted time decides, or without a prediction the
        number of warps on a multiprocessor. A kernel that does not fit on a multiprocessor has a fault.
        """
        unsound = bool(self.failures) or self.occupancy.blocks == 0
        return unsound, self.prediction.seconds if self.prediction else float("inf"), -self.occupancy.warps


def table(reports: Sequence[Report]) -> str:
    """Return a table of compiled kernels for each architecture, one row for each report."""
    parts = []
    for arch in sorted({report.arch for report in reports}):
        rows = [_row(report) for report in reports if report.arch == arch]
        parts.append(f"sm_{arch}\n" + align([list(rows[0]), *(list(row.values()) for row in rows)]))
    return "\n\n".join(parts)


def _row(report: Report) -> dict[str, str]:
    """Return a compiled kernel's report as the cells of a table row."""
    resources, prediction = report.resources, report.prediction
    name, _, number = report.kernel.partition(" ")
    label = name.removeprefix("_").removesuffix("_kernel")
    notes = [problem if problem in report.failures else f"known: {problem}" for problem in report.problems]
    if report.unpredicted:
        notes.append(f"no prediction: {report.unpredicted}")
    return {
        "case": report.case, "kernel": label if number in ("", "0") else f"{label} {number}",
        "regs": str(resources.registers), "spill": str(resources.spill_bytes),
        "smem": f"{resources.shared_bytes / 1024:.0f}", "tmem": str(resources.tmem_columns),
        "blocks": f"{report.occupancy.blocks} {'+'.join(report.occupancy.limits)}",
        "MMA": ", ".join(report.mma) or "-",
        "TMA": "yes" if report.tma else "no",
        "cycles": f"{prediction.cycles:.0f}" if prediction else "-",
        "limit": prediction.limit if prediction else "-",
        "": "; ".join(notes),
    }  # fmt: skip


def differences(reports: Sequence[Report], snapshot: Snapshot, version: str) -> list[str]:
    """Return the kernels whose resources differ from a snapshot of Triton ``version``, one line for each.

    Only inspected cases are compared.
    """
    if version not in snapshot:
        return [f"the snapshot has no entry for Triton {version}, only {', '.join(sorted(snapshot)) or 'none at all'}"]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for report in reports:
        found[f"sm_{report.arch}", report.case][report.kernel] = as_fields(report.resources)
    lines = []
    for (arch, case), kernels in found.items():
        before = snapshot[version].get(arch, {}).get(case, {})
        for kernel in sorted({*kernels, *before}):
            old, new = before.get(kernel), kernels.get(kernel)
            if old is None or new is None:
                lines.append(f"{arch} {case}: {kernel}: {'new' if old is None else 'gone'}")
            elif old != new:
                changes = [f"{name} {old[name]} -> {value}" for name, value in new.items() if value != old[name]]
                lines.append(f"{arch} {case}: {kernel}: {', '.join(changes)}")
    return lines

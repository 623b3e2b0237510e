"""Plans and checks as aligned text."""

from collections.abc import Sequence

from ..kernels.dtypes import dtype_name
from .check import Row
from .formulas import OPENCLIP, Problem
from .machine import Machine
from .measure import CPU, CUDA, RECORDED
from .predict import Prediction

HEADER = (
    "mode", "memory", "fits", "max pairs", "FLOPs", "sent fwd", "sent bwd", "messages", "compute", "exposed", "time",
)  # fmt: skip
BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
FLOPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1, ""))
SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))
PATHS = {CPU: "CPU path, run", RECORDED: "GPU path, kernels recorded", CUDA: "GPU, run"}


def plan_table(problem: Problem, machine: Machine, predictions: Sequence[Prediction]) -> str:
    """Modes as rows, what their memory is, and what the figures rest on."""
    lines = [_title(problem, machine.card), "", _align([HEADER, *(_cells(p) for p in predictions)]), ""]
    lines += ["memory at its peak"]
    names = [(p.mode, p.memory.phase, _items(p)) for p in predictions]
    return "\n".join([*lines, _align(names, right=False), "", *_basis(problem, machine, predictions)])


def _title(problem: Problem, card: str) -> str:
    dtype = dtype_name(problem.dtype)
    shared = f"{problem.gpus} ranks of {problem.rows:,} pairs" if problem.gpus > 1 else "one rank"
    rounded = f" (rounded up from {problem.pairs:,})" if problem.pairs != problem.total else ""
    where = f", {card}" if card else ""
    return f"{problem.total:,} pairs{rounded}, D = {problem.embed_dim}, {dtype}; {shared}{where}"


def _cells(p: Prediction) -> tuple[str, ...]:
    return (
        p.mode + (" (auto)" if p.is_auto else ""), size(p.memory.total), "yes" if p.fits else "NO",
        f"{p.largest_pairs:,}", scaled(sum(p.flops), FLOPS), *(size(sent) for sent in p.sent), f"{p.messages:,}",
        scaled(p.compute_s, SECONDS), scaled(p.exposed_s, SECONDS), scaled(p.seconds, SECONDS),
    )  # fmt: skip


def _items(p: Prediction) -> str:
    largest = sorted(p.memory.items.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size(count)}" for name, count in largest)


def _basis(problem: Problem, machine: Machine, predictions: Sequence[Prediction]) -> list[str]:
    memory_bytes = machine.memory_bytes / 1e9
    rates = f"{machine.flops_per_s(problem.dtype) / 1e12:g} TFLOP/s, {memory_bytes:g} GB for loss and features"
    if problem.gpus > 1:
        collective, ring = (machine.wire_bytes_per_s(problem.gpus, ring=ring) / 1e9 for ring in (False, True))
        rates += f", {collective:g} GB/s a rank in collectives and {ring:g} in the ring"
        rates += f", {machine.latency_us:g} us a message"
    lines = [f"taken: {rates}, {machine.launch_us:g} us of the host a kernel."]
    if any(p.mode == OPENCLIP for p in predictions):
        loss = "ClipLoss()" if problem.gpus == 1 else "ClipLoss(local_loss=True, gather_with_grad=True)"
        lines.append(f"openclip: {loss}, 16 bytes for each of {problem.rows:,} x {problem.total:,} logits.")
    return lines


def check_table(problem: Problem, rows: Sequence[Row]) -> str:
    """Figures as rows, grouped by path, and what they come to."""
    lines = [_title(problem, "") + "; what the rank takes that takes most"]
    for path in dict.fromkeys(row.path for row in rows):
        cells: list[tuple[str, ...]] = [("mode", "", "predicted", "measured", "measured/predicted", "")]
        cells += [_check_cells(row) for row in rows if row.path == path]
        lines += ["", PATHS[path], _align(cells, left=2)]
    wrong = sum(not row.agrees for row in rows)
    lines += ["", f"{len(rows)} figures: {len(rows) - wrong} as predicted, {wrong} not."]
    return "\n".join(lines)


def _check_cells(row: Row) -> tuple[str, ...]:
    units = {"bytes": BYTES, "FLOPs": FLOPS}.get(row.unit, ((1, ""),))
    shown = [scaled(value, units) for value in (row.predicted, row.measured)]
    return row.mode, row.what, *shown, f"{row.ratio:.4f}", "" if row.agrees else "WRONG"


def size(count: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    return scaled(count, BYTES)


def scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """``value`` in the largest unit that it has one of, to three digits at least."""
    factor, unit = next((unit for unit in units if value >= unit[0]), units[-1])
    number = value / factor
    digits = 0 if number >= 100 or value == 0 or (factor == 1 and number == int(number)) else 1 if number >= 10 else 2
    return f"{number:,.{digits}f} {unit}".rstrip()


def _align(lines: Sequence[Sequence[str]], *, left: int = 1, right: bool = True) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  " + "  ".join(
            cell.rjust(width) if right and index >= left else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )  # fmt: skip

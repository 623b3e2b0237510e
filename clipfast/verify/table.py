"""The report for people: tables of plain text and a summary."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby

from ..columns import align
from .report import FAIL, PASS, SKIP, CheckResult, count
from .rule import KINDS

HEADER = (
    "", "leg", "dtype", "check", "case", "output",
    "max: ours", "PyTorch", "allowed", "rms: ours", "PyTorch", "allowed", "",
)  # fmt: skip
REASON_WIDTH = 100


def table(rows: Sequence[CheckResult], *, all_rows: bool = False) -> str:
    """Return a table for each op: of every output, or of a case that passes only the one nearest to its limit."""
    by_op: dict[str, list[CheckResult]] = defaultdict(list)
    for row in rows:
        by_op[row.op].append(row)
    blocks = []
    for op, group in by_op.items():
        shown = [(row, 1) for row in group] if all_rows else _nearest(group)
        blocks.append(f"{op}\n" + align([HEADER, *(_cells(row, outputs) for row, outputs in shown)], indent="  "))
    return "\n\n".join(blocks)


def _nearest(rows: Iterable[CheckResult]) -> list[tuple[CheckResult, int]]:
    """Return each result that did not pass; and for each case one that did, with the number that it stands for."""
    shown: list[tuple[CheckResult, int]] = []
    for _, group in groupby(rows, key=lambda row: row.group):
        members = list(group)
        passed = [row for row in members if row.verdict == PASS]
        shown += [(row, 1) for row in members if row.verdict != PASS]
        if passed:
            shown.append((max(passed, key=lambda row: row.ratio), len(passed)))
    return shown


def _cells(row: CheckResult, outputs: int) -> tuple[str, ...]:
    figures = {figure.kind: figure for figure in row.figures}
    numbers = [
        f"{getattr(figures[kind], name):.1e}" if kind in figures else ""
        for kind in KINDS
        for name in ("ours", "torch", "allowed")
    ]
    output = row.output if outputs == 1 else f"{row.output} (nearest of {outputs})"
    note = row.reason.splitlines()[0][:REASON_WIDTH] if row.reason and not (row.figures and row.verdict == FAIL) else ""
    if row.truth and row.truth != "float64":
        note = f"truth in {row.truth}; {note}".removesuffix("; ")
    return row.verdict, row.leg, row.dtype, row.check, row.case, output, *numbers, note


def summary(rows: Sequence[CheckResult], seconds: float, *, complete: bool = True) -> str:
    """Return a line for each output that failed, one for each check that was not run, and a last one of counts."""
    lines = []
    for (op, leg, output), failed in _collect(rows, FAIL).items():
        worst = max(failed, key=lambda row: row.ratio)
        number = sum((row.op, row.leg, row.output) == (op, leg, output) for row in rows)
        dtypes = ", ".join(dict.fromkeys(row.dtype for row in failed if row.dtype))
        lines.append(
            f"FAILED   {' '.join(part for part in (op, leg, output) if part)}: {len(failed)} of {number} checks "
            f"({dtypes}); worst: {worst.case}: {''.join(worst.reason.strip().splitlines()[-1:])}"
        )
    for (op, leg, output), skipped in _collect(rows, SKIP).items():
        what = " ".join(part for part in (op, leg, output, skipped[0].dtype) if part)
        lines.append(f"NOT RUN  {what}: {skipped[0].reason}" + (f" ({len(skipped)} rows)" if len(skipped) > 1 else ""))
    counts = count(rows)
    ending = "" if complete else "; INTERRUPTED, the rest was not run"
    totals = f"{len(rows)} checks: {counts[PASS]} passed, {counts[FAIL]} failed, {counts[SKIP]} skipped"
    return "\n".join([*lines, f"{totals} in {seconds:.0f} s{ending}"])


def _collect(rows: Sequence[CheckResult], verdict: str) -> dict[tuple[str, str, str], list[CheckResult]]:
    found: dict[tuple[str, str, str], list[CheckResult]] = defaultdict(list)
    for row in rows:
        if row.verdict == verdict:
            found[row.op, row.leg, row.output if verdict == FAIL else row.case].append(row)
    return found

"""A run of several benchmark cases. The result file is written after each case, so a stopped run keeps the cases so
far.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from clipfast.kernels.dtypes import DTYPES

from . import results, tables
from .breakdown import Breakdown
from .case import OURS, Case, Sizes, short
from .harness import Budget, Timing, leaves, measure
from .machine import measure_roofs
from .memory import peak_bytes
from .suites import build

T = TypeVar("T")
# The arguments of :func:`build`, which makes a case: suite, shape and dtype.
CaseKey = tuple[str, Sizes, str]


def measure_all(
    keys: Sequence[CaseKey], device: torch.device, budget: Budget, path: Path, *, only: Sequence[str] | None = None,
    memory: bool = True, breakdown: bool = True, total_s: float = float("inf"),
) -> dict[str, Any]:  # fmt: skip
    """Measure the case of each of ``keys``, print its table, and write everything to the result file ``path``.

    ``only`` names candidates, see :func:`chosen`. ``memory`` measures peak memory too, and ``breakdown`` divides the
    time of whole steps into categories. No case begins after ``total_s`` seconds; the names of the remaining ones are
    printed.
    """
    start = time.monotonic()
    roofs = {dtype: measure_roofs(device, DTYPES[dtype]) for dtype in sorted({dtype for _, _, dtype in keys})}
    run = results.new_run(device, roofs)
    for number, (suite, shape, dtype) in enumerate(keys, start=1):
        case = chosen(build(suite, shape, dtype, device), only)
        if time.monotonic() - start > total_s:
            print(f"not begun, {total_s:.0f} s are over: {case.name}", flush=True)
            continue
        print(f"[{number}/{len(keys)}] {case.name}", file=sys.stderr, flush=True)
        result = _measure_one(case, budget, roofs[dtype], memory=memory, breakdown=breakdown)
        run["cases"].append(result)
        results.write(run, path)
        print(tables.case_table(result) + "\n", flush=True)
    print(path)
    return run


def _measure_one(
    case: Case, budget: Budget, roof: dict[str, float], *, memory: bool, breakdown: bool
) -> dict[str, Any]:
    """Measure one benchmark case, and return its entry in the result file."""
    # A case is measured in a function of its own so that the candidates' models are freed before the next case.
    timings, telemetry = measure(case, budget)
    breakdowns, peaks = {}, {}
    for timing in timings:
        name, function = timing.candidate.name, timing.function
        if breakdown and timing.samples and hasattr(function, "breakdown"):
            breakdowns[name] = _or_reason(functools.partial(_breakdown, case, timing))
        if memory and timing.samples and case.suite != "data":
            peaks[name] = _or_reason(functools.partial(peak_bytes, case, timing.candidate, function))
    return results.case_result(case, timings, telemetry, peaks, roof, breakdowns)


def _breakdown(case: Case, timing: Timing) -> Breakdown:
    """Trace a benchmarked training step, and return its median measured time, divided into categories."""
    found: Breakdown = timing.function.breakdown(
        **leaves(case, case.inputs()), seconds=statistics.median(timing.samples)
    )
    return found


def refused_of_ours(run: dict[str, Any]) -> list[str]:
    """Return a line with op, name and reason for each of our own candidates that a benchmark run has refused.

    Candidates that could not run because the machine lacks something, such as a GPU, are left out.
    """
    found = []
    for case in run["cases"]:
        for candidate in case["candidates"]:
            reason = candidate["refused"] or "missing: "
            if candidate["name"].startswith(OURS) and not reason.startswith("missing: "):
                found.append(f"{case['op']} {candidate['name']}: {reason}")
    return found


def _or_reason(function: Callable[[], T]) -> T | str:
    """Return the result of ``function``, or its error in one line, for the benchmark's result file."""
    try:
        return function()
    except Exception as error:
        return short(error)


def chosen(case: Case, only: Sequence[str] | None) -> Case:
    """Return a benchmark case with our candidate and those that ``only`` names; with all of them if it is None.

    A part of a name selects all candidates whose names contain it. A whole name selects that candidate only.

    Raises:
        ValueError: no candidate of the case has such a name.
    """
    if only is None:
        return case
    known = [candidate.name for candidate in case.candidates]
    kept = {OURS}
    for part in only:
        found = {name for name in known if name.lower() == part.lower()}
        found = found or {name for name in known if part.lower() in name.lower()}
        if not found:
            raise ValueError(f"--only {part!r}: {case.suite} has {', '.join(known)}")
        kept |= found
    return dataclasses.replace(case, candidates=tuple(c for c in case.candidates if c.name in kept))

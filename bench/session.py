"""A run of several cases. The file is written again after each case, so a run that is stopped keeps what it has."""

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
# What :func:`build` makes a case from: suite, shape and dtype.
CaseKey = tuple[str, Sizes, str]


def measure_all(
    keys: Sequence[CaseKey], device: torch.device, budget: Budget, path: Path, *, only: Sequence[str] | None = None,
    memory: bool = True, breakdown: bool = True, total_s: float = float("inf"),
) -> dict[str, Any]:  # fmt: skip
    """Measure the case of each of ``keys``, print its table, and write everything to the result file ``path``.

    ``only`` names candidates, see :func:`chosen`. ``memory`` measures peak memory too, ``breakdown`` traces where the
    time of whole steps goes. No case is begun after ``total_s`` seconds; those that are left are named.
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
    # a function of its own, so that whole models that the candidates have made are freed before the next case
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
    found: Breakdown = timing.function.breakdown(
        **leaves(case, case.inputs()), seconds=statistics.median(timing.samples)
    )
    return found


def refused_of_ours(run: dict[str, Any]) -> list[str]:
    """Return op, candidate and reason of each refused candidate of ours, but for those that only need a GPU."""
    found = []
    for case in run["cases"]:
        for candidate in case["candidates"]:
            reason = candidate["refused"] or "missing: "
            if candidate["name"].startswith(OURS) and not reason.startswith("missing: "):
                found.append(f"{case['op']} {candidate['name']}: {reason}")
    return found


def _or_reason(function: Callable[[], T]) -> T | str:
    """Return the result of ``function``, or in one line why it failed."""
    try:
        return function()
    except Exception as error:
        return short(error)


def chosen(case: Case, only: Sequence[str] | None) -> Case:
    """Return ``case`` with our candidate and those that ``only`` names, or with all of them if it is None.

    A part of a name selects all candidates that have it, the whole name of a candidate that candidate alone.

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

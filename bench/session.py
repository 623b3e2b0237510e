"""A run of several cases, written to its file after each, so that whatever stops it leaves what it had."""

import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import results, tables
from .breakdown import Breakdown, copy_seconds
from .case import DTYPES, OURS, Case, short
from .harness import Budget, Timing, leaves, measure
from .machine import measure_roofs
from .memory import peak_bytes
from .suites import Shape, build


def measure_all(
    plan: Sequence[tuple[str, Shape, str]],
    device: torch.device,
    budget: Budget,
    path: Path,
    *,
    only: Sequence[str] | None = None,
    memory: bool = True,
    breakdown: bool = True,
    plots: bool = True,
    total_s: float = float("inf"),
) -> dict[str, Any]:
    """Measure each (suite, shape, dtype) of ``plan``, print its table, and write everything to ``path``.

    Args:
        only: parts of the names of the candidates to run; the engine itself always does.
        memory: measure peak memory too.
        breakdown: trace where the time of whole steps goes.
        plots: draw pictures beside ``path``, where matplotlib is installed.
        total_s: no case is begun after this long; those that are left are named.
    """
    start = time.monotonic()
    roofs = {dtype: measure_roofs(device, DTYPES[dtype]) for dtype in sorted({dtype for _, _, dtype in plan})}
    run = results.new_run(device, roofs)
    for number, (suite, shape, dtype) in enumerate(plan, start=1):
        case = chosen(build(suite, shape, dtype, device), only)
        if time.monotonic() - start > total_s:
            print(f"not begun, {total_s:.0f} s are over: {case.name}", flush=True)
            continue
        label = f"[{number}/{len(plan)}] {case.name}"
        result = _measure_one(case, budget, roofs[dtype], label, memory=memory, breakdown=breakdown)
        run["cases"].append(result)
        results.write(run, path)
        print(tables.case_table(result) + "\n", flush=True)
    if plots:
        _draw(run, path)
    print(path)
    return run


def _measure_one(
    case: Case, budget: Budget, roof: dict[str, float], label: str, *, memory: bool, breakdown: bool
) -> dict[str, Any]:
    # by itself: what candidates have made, whole models among it, is gone when the next case begins
    _say(f"{label}: timing")
    timings, telemetry = measure(case, budget)
    broken_down = {}
    for timing in timings if breakdown else []:
        if timing.samples and hasattr(timing.function, "breakdown"):
            _say(f"{label}: trace of {timing.candidate.name}")
            broken_down[timing.candidate.name] = _breakdown(case, timing)
    peaks = {}
    for timing in timings if memory and case.suite not in ("data", "tokenizer") else []:
        if timing.samples:
            _say(f"{label}: memory of {timing.candidate.name}")
            peaks[timing.candidate.name] = _peak(case, timing)
    _say("")
    transfers = {name: _copied(size, case.device) for name, size in case.transfers.items()}
    return results.case_result(case, timings, telemetry, peaks, roof, broken_down, transfers)


def refused_of_ours(run: dict[str, Any]) -> list[str]:
    """What this package should have done and did not: case, candidate and reason."""
    return [
        f"{case['op']} {candidate['name']}: {candidate['refused']}"
        for case in run["cases"]
        for candidate in case["candidates"]
        if candidate["name"].startswith(OURS)
        and candidate["refused"]
        # what needs a GPU is not wrong for that
        and not candidate["refused"].startswith("missing: ")
    ]


def _peak(case: Case, timing: Timing) -> int | str:
    try:
        return peak_bytes(case, timing.candidate, timing.function)
    except Exception as error:
        return short(error)


def _copied(size: int, device: torch.device) -> float | None:
    # no memory left for it, pinned or on the device, is no reason to lose what was timed
    with contextlib.suppress(RuntimeError):
        return copy_seconds(size, device)
    return None


def _breakdown(case: Case, timing: Timing) -> Breakdown | str:
    try:
        result: Breakdown = timing.function.breakdown(  # type: ignore[union-attr]
            **leaves(case, case.inputs()), seconds=statistics.median(timing.samples)
        )
    except Exception as error:
        return short(error)
    return result


def chosen(case: Case, only: Sequence[str] | None) -> Case:
    """``case`` with our candidate and those whose name contains one of ``only``; a whole name means that one alone.

    Raises:
        ValueError: a name that no candidate of the case has.
    """

    if only is None:
        return case
    known = [candidate.name for candidate in case.candidates]
    for part in only:
        if not any(part.lower() in name.lower() for name in known):
            raise ValueError(f"--only {part!r}: {case.suite} has {', '.join(known)}")
    named = {part.lower() for part in only} & {name.lower() for name in known}
    parts = [part.lower() for part in only if part.lower() not in named]
    kept = [
        c
        for c in case.candidates
        if c.name == OURS or c.name.lower() in named or any(part in c.name.lower() for part in parts)
    ]
    return dataclasses.replace(case, candidates=tuple(kept))


def _draw(run: dict[str, Any], path: Path) -> None:
    try:
        from .plots import draw
    except ImportError:
        _say("no pictures: matplotlib is not installed (pip install 'clipfast[eval]')\n")
        return
    for picture in draw(run, path):
        print(picture)


def _say(text: str) -> None:
    """One line of progress that the next one replaces; on a terminal only, but a line that ends stays."""
    if sys.stderr.isatty() or text.endswith("\n"):
        sys.stderr.write(f"\r\033[K{text}" if sys.stderr.isatty() else text)
        sys.stderr.flush()

"""A run of several cases. The file is written again after each case, so a run that is stopped keeps what it has."""

import contextlib
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
from .breakdown import Breakdown, copy_seconds
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
    memory: bool = True, breakdown: bool = True, plots: bool = True, total_s: float = float("inf"),
) -> dict[str, Any]:  # fmt: skip
    """Measure the case of each of ``keys``, print its table, and write everything to the result file ``path``.

    ``only`` names candidates, see :func:`chosen`. ``memory`` measures peak memory too, ``breakdown`` traces where the
    time of whole steps goes, and ``plots`` draws pictures beside ``path``, if matplotlib is installed. No case is begun
    after ``total_s`` seconds; those that are left are named.
    """
    start = time.monotonic()
    roofs = {dtype: measure_roofs(device, DTYPES[dtype]) for dtype in sorted({dtype for _, _, dtype in keys})}
    run = results.new_run(device, roofs)
    for number, (suite, shape, dtype) in enumerate(keys, start=1):
        case = chosen(build(suite, shape, dtype, device), only)
        if time.monotonic() - start > total_s:
            print(f"not begun, {total_s:.0f} s are over: {case.name}", flush=True)
            continue
        label = f"[{number}/{len(keys)}] {case.name}"
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
    # a function of its own, so that whole models that the candidates have made are freed before the next case
    _say(f"{label}: timing", in_files=True)
    timings, telemetry = measure(case, budget)
    timed = [timing for timing in timings if timing.samples]
    breakdowns, peaks = {}, {}
    for timing in timed if breakdown else []:
        if hasattr(timing.function, "breakdown"):
            _say(f"{label}: trace of {timing.candidate.name}")
            breakdowns[timing.candidate.name] = _breakdown(case, timing)
    for timing in timed if memory and case.suite not in ("data", "tokenizer") else []:
        _say(f"{label}: memory of {timing.candidate.name}")
        peak = functools.partial(peak_bytes, case, timing.candidate, timing.function)
        peaks[timing.candidate.name] = _or_reason(peak)
    _say("")
    transfers = {name: _copied(size, case.device) for name, size in case.transfers.items()}
    return results.case_result(case, timings, telemetry, peaks, roof, breakdowns, transfers)


def refused_of_ours(run: dict[str, Any]) -> list[str]:
    """Return op, candidate and reason of each refused candidate of ours, unless it needs what is not here (a GPU)."""
    return [
        f"{case['op']} {candidate['name']}: {candidate['refused']}"
        for case in run["cases"]
        for candidate in case["candidates"]
        if candidate["name"].startswith(OURS)
        and candidate["refused"]
        and not candidate["refused"].startswith("missing: ")
    ]


def _or_reason(function: Callable[[], T]) -> T | str:
    """Return the result of ``function``, or in one line why it failed."""
    try:
        return function()
    except Exception as error:
        return short(error)


def _breakdown(case: Case, timing: Timing) -> Breakdown | str:
    given = {**leaves(case, case.inputs()), "seconds": statistics.median(timing.samples)}
    return _or_reason(lambda: timing.function.breakdown(**given))


def _copied(size: int, device: torch.device) -> float | None:
    # a copy that does not fit into memory, pinned or on the device, is no reason to lose the timings
    with contextlib.suppress(RuntimeError):
        return copy_seconds(size, device)
    return None


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


def _draw(run: dict[str, Any], path: Path) -> None:
    try:
        from .plots import draw
    except ImportError:
        _say("no pictures: matplotlib is not installed (pip install 'clipfast[eval]')\n")
        return
    for picture in draw(run, path):
        print(picture)


def _say(text: str, *, in_files: bool = False) -> None:
    """Show a line of progress on a terminal until the next one. A line that ends in a newline stays.

    The log of a CI has those that stay, and those that are for files too.
    """
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
    elif in_files or text.endswith("\n"):
        sys.stderr.write(text.removesuffix("\n") + "\n")
    sys.stderr.flush()

"""The time of a training step by category, from a few steps under PyTorch's profiler, which are not timed.

On a GPU, the device's work is counted: each kernel, copy and fill, by its name and by the ops that launched it. If two
of them overlap, the time goes to the one that began first, so the categories add up to the time that the device was
busy. In the rest of the step the device waits for the host. This rest is computed from the time of a step without a
profiler, since the profiler slows the host down.

On a CPU, each op counts without the ops that it calls, in the thread that runs the step. Time outside of ops, and the
bookkeeping of PyTorch, belong to the host. The time of the step is that of the traced step.

A backward op has the category of its forward op: the profiler connects the two by a sequence number.
"""

import dataclasses
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from clipfast.verify.context import exact_float32

from .categories import CATEGORIES, CONVOLUTION, HOST, INPUT, OTHER, classify, classify_op
from .harness import LONG_S
from .machine import synchronize

STEP_RANGE = "step: traced"
# The number of steps that are traced; a long step is traced once.
STEPS = 3
# A breakdown reports at most this many names that belong to no category.
NAMED = 5
# Microseconds by category or by name.
Sums = defaultdict[str, float]

_HOST_WORK = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver", "hip_runtime")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """The seconds of one training step, by category."""

    step_s: float  # the sum of all categories
    traced_s: float  # the time of a step under the profiler
    seconds: dict[str, float]  # for all of CATEGORIES
    unknown: tuple[tuple[str, float], ...] = ()  # names that belong to no category, the longest first

    def with_convolutions_as_input(self) -> "Breakdown":
        """Return the breakdown with convolutions counted as input, for models whose only convolution embeds patches."""
        moved = {**self.seconds, INPUT: self.seconds[INPUT] + self.seconds[CONVOLUTION], CONVOLUTION: 0.0}
        return dataclasses.replace(self, seconds=moved)


@dataclasses.dataclass
class _Range:
    """An op, an annotation or a launch in a thread of the host. Times are in microseconds."""

    name: str
    thread: Any
    start: float
    end: float
    sequence: int | None  # connects a forward op with its backward op
    is_backward: bool
    correlation: int | None  # connects a launch with the device's work; only launches have one
    self_us: float = 0.0  # the time of this range outside of the ranges inside it
    names: tuple[str, ...] = ()  # names of the ranges around this one, outermost first, then its own


@exact_float32()
def trace(step: Callable[[], object], device: torch.device, seconds: float) -> Breakdown:
    """Run a few steps under the profiler and return their breakdown.

    ``step`` has run before, and takes ``seconds`` without a profiler.

    Raises:
        RuntimeError: the profiler recorded no work of the device.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    steps = 1 if seconds > LONG_S else STEPS
    if device.type != "cuda":
        # At this level, the profiler's log is silent: on a CPU, it would only say that the profiler starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=activities) as profiler:
        step()  # the profiler starts up during this step
        for _ in range(steps):
            synchronize(device)
            with record_function(STEP_RANGE):
                step()
                synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    return of_device(events, seconds) if device.type == "cuda" else of_host(events)


def of_device(events: Sequence[dict[str, Any]], seconds: float) -> Breakdown:
    """Return the breakdown of a step by the device's work in a Chrome trace; without a profiler it takes ``seconds``.

    Raises:
        RuntimeError: no work of a device lies in a marked step.
    """
    ranges = _ranges(events)
    windows = _steps(ranges)
    launched = {r.correlation: r.names for r in ranges if r.correlation is not None}
    spans = [
        (event["ts"], event["ts"] + event["dur"], event["name"], event.get("args", {}).get("correlation"))
        for event in events
        if event.get("cat") in _DEVICE_WORK and any(low <= event["ts"] < high for low, high in windows)
    ]
    if not spans:
        raise RuntimeError("the profiler saw no work of the device (CUPTI may not be allowed here)")
    parts = []
    covered = -float("inf")
    for start, end, name, correlation in sorted(spans, key=lambda span: span[:2]):
        parts.append((classify(name, launched.get(correlation, ())), name, max(0.0, end - max(start, covered))))
        covered = max(covered, end)
    result = _sum(parts, windows)
    gaps_s = max(0.0, seconds - result.step_s)
    return dataclasses.replace(result, step_s=max(seconds, result.step_s), seconds={**result.seconds, HOST: gaps_s})


def of_host(events: Sequence[dict[str, Any]]) -> Breakdown:
    """Return the breakdown of a step in a Chrome trace by the ops of the thread that ran it.

    Raises:
        RuntimeError: no step is marked.
    """
    ranges = _ranges(events)
    windows = _steps(ranges)
    (thread,) = {r.thread for r in ranges if r.name == STEP_RANGE}
    parts = [
        # Starts and ends are rounded, so a difference may be slightly below zero.
        (HOST if r.name == STEP_RANGE else classify_op(r.names), r.name, max(0.0, r.self_us))
        for r in ranges
        if r.thread == thread and any(low <= r.start and r.end <= high for low, high in windows)
    ]
    return _sum(parts, windows)


def _sum(parts: Iterable[tuple[str, str, float]], windows: Sequence[tuple[float, float]]) -> Breakdown:
    """Add up a trace's ``parts``, each a category, a name and microseconds, over the measured steps in ``windows``."""
    total: Sums = defaultdict(float)
    unknown: Sums = defaultdict(float)
    for category, name, microseconds in parts:
        total[category] += microseconds
        if category == OTHER:
            unknown[name] += microseconds
    per_step = 1e-6 / len(windows)
    return Breakdown(
        step_s=per_step * sum(total.values()),
        traced_s=per_step * sum(high - low for low, high in windows),
        seconds={category: per_step * total[category] for category in CATEGORIES},
        unknown=tuple((name, per_step * us) for name, us in sorted(unknown.items(), key=lambda item: -item[1])[:NAMED]),
    )


def _ranges(events: Iterable[dict[str, Any]]) -> list[_Range]:
    """Return a trace's ops, annotations and launches, the earliest first, with the ops around each and its own time."""
    found = []
    for event in events:
        if event.get("cat") in _HOST_WORK:
            args, end = event.get("args", {}), event["ts"] + event["dur"]
            connections = args.get("Sequence number"), bool(args.get("Fwd thread id")), args.get("correlation")
            found.append(_Range(event["name"], event["tid"], event["ts"], end, *connections))
    found.sort(key=lambda r: (r.start, -r.end))
    stacks: dict[Any, list[_Range]] = defaultdict(list)
    forward: dict[int, tuple[str, ...]] = {}
    for r in found:
        stack = stacks[r.thread]
        while stack and stack[-1].end <= r.start:
            stack.pop()
        around = stack[-1].names if stack else ()
        r.self_us = r.end - r.start
        if stack:
            stack[-1].self_us -= min(r.end, stack[-1].end) - r.start
        if r.is_backward and r.sequence in forward:
            around = (*around, *forward[r.sequence])
        r.names = (*around, r.name)
        if r.sequence is not None and not r.is_backward:
            # An op that makes no node of the autograd graph has the sequence number of the next op that makes one. So
            # the last op with a number is the one that made the node.
            forward[r.sequence] = r.names
        stack.append(r)
    return found


def _steps(ranges: Iterable[_Range]) -> list[tuple[float, float]]:
    """Return start and end of each marked step in a profiler trace."""
    found = [(r.start, r.end) for r in ranges if r.name == STEP_RANGE]
    if not found:
        raise RuntimeError(f"no range {STEP_RANGE!r} in the trace")
    return found

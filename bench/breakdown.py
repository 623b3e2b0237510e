"""Where the time of a step goes: a few steps under PyTorch's profiler, outside of the timing, summed by category.

On a GPU, what counts is the device: each kernel, copy and fill by its name and by the ops that launched it. Where two
overlap, the one that began first has the time, so that categories add up to the time that the device was busy. What is
left of the step, as it was timed without a profiler (which slows the host down), are the gaps: the device waits for the
host. On a CPU, it is the time of each op without the ops that it calls, in the thread that takes the step; what is
outside of ops is the host's, and so is the bookkeeping of PyTorch. There the step is the traced one.

A backward op belongs to what its forward op belongs to: the profiler knows pairs of them by a sequence number.
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

from .categories import CATEGORIES, CONVOLUTION, DATA, HOST, INPUT, OTHER, classify, classify_op
from .harness import LONG_S
from .machine import exact_float32, synchronize

STEP_RANGE = "step: traced"
# A long step is traced once.
STEPS = 3
NAMED = 5
# Microseconds by category or by name.
Sums = defaultdict[str, float]

_RANGES = ("cpu_op", "user_annotation")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Seconds of one step, by category.

    Attributes:
        step_s: of the step; all categories together.
        traced_s: of a step under the profiler.
        seconds: by category, all of :data:`CATEGORIES`.
        unknown: names that no rule knows, with their seconds, the longest first.
    """

    step_s: float
    traced_s: float
    seconds: dict[str, float]
    unknown: tuple[tuple[str, float], ...] = ()

    def with_data(self, seconds: float) -> "Breakdown":
        """The same with the copy of its inputs to the device, which comes before the step."""
        added = {**self.seconds, DATA: self.seconds[DATA] + seconds}
        return dataclasses.replace(self, step_s=self.step_s + seconds, seconds=added)

    def with_convolutions_as_input(self) -> "Breakdown":
        """The same of a model whose only convolution cuts images into patches."""
        moved = {**self.seconds, INPUT: self.seconds[INPUT] + self.seconds[CONVOLUTION], CONVOLUTION: 0.0}
        return dataclasses.replace(self, seconds=moved)


@dataclasses.dataclass
class _Range:
    """An op or an annotation of a thread, in microseconds."""

    name: str
    thread: Any
    start: float
    end: float
    sequence: int | None
    is_backward: bool
    correlation: int | None
    self_us: float = 0.0
    names: tuple[str, ...] = ()


@exact_float32()
def trace(step: Callable[[], object], device: torch.device, seconds: float) -> Breakdown:
    """Take a few steps under the profiler.

    Args:
        step: takes one, and has done so before.
        seconds: of a step without a profiler.

    Raises:
        RuntimeError: the profiler saw nothing of the device.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    steps = 1 if seconds > LONG_S else STEPS
    if device.type != "cuda":
        # on a CPU it has nothing to say but that it starts and stops
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=activities) as profiler:
        step()  # the profiler starts up in it
        for _ in range(steps):
            synchronize(device)
            with record_function(STEP_RANGE):
                step()
                synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return of_device(events, seconds) if device.type == "cuda" else of_host(events)


def of_device(events: Iterable[dict[str, Any]], seconds: float) -> Breakdown:
    """Break a step down by the device's work.

    Args:
        events: of a Chrome trace, with steps marked by :data:`STEP_RANGE`.
        seconds: of a step without a profiler.

    Raises:
        RuntimeError: no work of a device is in a marked step.
    """
    events = [event for event in events if event.get("ph") == "X"]
    ranges = _named(_ranges_of(events))
    windows = _steps(ranges)
    launched = {r.correlation: r.names for r in ranges if r.correlation is not None}
    spans = [
        (event["ts"], event["ts"] + event["dur"], event["name"], event.get("args", {}).get("correlation"))
        for event in events
        if event.get("cat") in _DEVICE_WORK and any(low <= event["ts"] < high for low, high in windows)
    ]
    if not spans:
        raise RuntimeError("the profiler saw no work of the device (CUPTI may not be allowed here)")
    total: Sums = defaultdict(float)
    unknown: Sums = defaultdict(float)
    covered = -float("inf")
    for start, end, name, correlation in sorted(spans, key=lambda span: span[:2]):
        alone = max(0.0, end - max(start, covered))
        covered = max(covered, end)
        category = classify(name, launched.get(correlation, ()))
        total[category] += alone
        if category == OTHER:
            unknown[name] += alone
    busy_s = 1e-6 * sum(total.values()) / len(windows)
    result = _result(total, unknown, windows, max(seconds, busy_s))
    return dataclasses.replace(result, seconds={**result.seconds, HOST: max(0.0, seconds - busy_s)})


def of_host(events: Iterable[dict[str, Any]]) -> Breakdown:
    """Break a step down by the ops of the thread that took it; ``events`` as in :func:`of_device`.

    Raises:
        RuntimeError: no marked step.
    """
    ranges = _named(_ranges_of([event for event in events if event.get("ph") == "X"]))
    windows = _steps(ranges)
    (thread,) = {r.thread for r in ranges if r.name == STEP_RANGE}
    total: Sums = defaultdict(float)
    unknown: Sums = defaultdict(float)
    for r in ranges:
        if r.thread != thread or not any(low <= r.start and r.end <= high for low, high in windows):
            continue
        category = HOST if r.name == STEP_RANGE else classify_op(r.names)
        # the last digit of a start or an end may be off
        self_us = max(0.0, r.self_us)
        total[category] += self_us
        if category == OTHER:
            unknown[r.name] += self_us
    return _result(total, unknown, windows, 1e-6 * sum(total.values()) / len(windows))


def _result(total: Sums, unknown: Sums, windows: Sequence[tuple[float, float]], step_s: float) -> Breakdown:
    per_step = 1e-6 / len(windows)
    return Breakdown(
        step_s=step_s,
        traced_s=per_step * sum(high - low for low, high in windows),
        seconds={category: per_step * total[category] for category in CATEGORIES},
        unknown=tuple((name, per_step * us) for name, us in sorted(unknown.items(), key=lambda item: -item[1])[:NAMED]),
    )


def _ranges_of(events: Iterable[dict[str, Any]]) -> list[_Range]:
    """Ops, annotations and launches, those of a thread in the order that they began in."""
    found = []
    for event in events:
        is_launch = event.get("cat") in _LAUNCHES
        if not is_launch and event.get("cat") not in _RANGES:
            continue
        args = event.get("args", {})
        found.append(
            _Range(
                event["name"], event["tid"], event["ts"], event["ts"] + event["dur"], args.get("Sequence number"),
                bool(args.get("Fwd thread id")), args.get("correlation") if is_launch else None,
            )
        )  # fmt: skip
    return sorted(found, key=lambda r: (r.start, -r.end))


def _named(ranges: list[_Range]) -> list[_Range]:
    """``ranges`` with the names around each, outermost first, and the time that each spends itself."""
    stacks: dict[Any, list[_Range]] = defaultdict(list)
    forward: dict[int, tuple[str, ...]] = {}
    for r in ranges:
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
            # ops that make no node see the number of the next that does: the last to see it made it
            forward[r.sequence] = r.names
        stack.append(r)
    return ranges


def _steps(ranges: Iterable[_Range]) -> list[tuple[float, float]]:
    found = [(r.start, r.end) for r in ranges if r.name == STEP_RANGE]
    if not found:
        raise RuntimeError(f"no range {STEP_RANGE!r} in the trace")
    return found


def copy_seconds(size: int, device: torch.device, rounds: int = 5) -> float | None:
    """Seconds that ``size`` bytes take from pinned memory to the device; None on a CPU, where nothing crosses."""
    if device.type != "cuda":
        return None
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[rounds // 2]

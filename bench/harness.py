"""Timings that can be believed.

A candidate is timed only after it gave the reference's result at that shape. Candidates take turns, call by call, so
that a drift of the clocks meets all of them; inputs rotate past three times the cache; every sample is kept. On a GPU a
call is a CUDA graph, so that a short kernel is not hidden by the host that starts it, behind a backlog that keeps the
device busy while the host runs ahead.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .case import Candidate, Case, Function, Inputs, MissingError, call
from .machine import Telemetry, cache_bytes, synchronize

# Relative error (norm of the difference over norm of the reference, which is computed in float32) up to which a result
# counts as the same function: float32 may be TF32 somewhere, and 16 bits round at 2^-9. ``clipfast verify`` is the test
# of accuracy; this keeps a wrong kernel out of the tables.
GATE = {"fp32": 2e-3, "fp16": 1e-2, "bf16": 4e-2}
MIN_SAMPLE_S = {"cuda": 1e-3, "cpu": 5e-3}
BACKLOG_CYCLES = 2_000_000


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to measure: up to ``rounds`` rounds while ``seconds`` last, and never fewer than ``min_rounds``."""

    seconds: float
    rounds: int = 50
    min_rounds: int = 5


@dataclasses.dataclass
class Timing:
    """Seconds per call of one candidate, sample by sample, or why there are none."""

    candidate: Candidate
    samples: list[float] = dataclasses.field(default_factory=list)
    timer: str = ""
    refused: str | None = None
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)


def measure(case: Case, budget: Budget) -> tuple[list[Timing], dict[str, Any]]:
    """Time every candidate of ``case`` that can run here and is right.

    Returns:
        timings: one for each candidate, in the case's order.
        telemetry: NVML readings before and after, and whether the card was throttled.
    """
    telemetry = Telemetry(case.device)
    timings = [Timing(candidate) for candidate in case.candidates]
    sets = _input_sets(case)
    running = []
    for timing, function in _passed_gate(case, timings):
        try:
            running.append((timing, _Runner(case, timing.candidate, function, sets)))
        except Exception as error:
            timing.refused = _short(error)
    before = telemetry.sample()
    rounds = 0
    start = time.perf_counter()
    while running and rounds < budget.rounds:
        if rounds >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
            break
        # who goes first changes, so that nobody always runs on what another left in the cache
        turn = rounds % len(running)
        for timing, runner in running[turn:] + running[:turn]:
            timing.samples.append(runner.sample())
            timing.timer = runner.timer
        rounds += 1
    after = telemetry.sample()
    for timing, runner in running:
        timing.phases = runner.phases()
    return timings, {"before": before, "after": after, "throttled": _throttled(before, after)}


def ratio_interval(
    ours: Sequence[float], other: Sequence[float], resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """How many times as long ``other`` takes as ``ours``: median of the rounds' ratios, and its bootstrap interval.

    Both must come from the same rounds: what slowed a round down slowed both, and cancels.

    Returns:
        (median, low, high)
    """
    ratios = np.asarray(other) / np.asarray(ours)
    draws = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(ratios)), float(low), float(high)


def _input_sets(case: Case) -> list[Inputs]:
    first = leaves(case, case.inputs())
    size = sum(x.numel() * x.element_size() for x in first.values())
    count = min(16, math.ceil(3 * cache_bytes(case.device) / max(size, 1)))
    return [first, *(leaves(case, case.inputs()) for _ in range(count - 1))]


def leaves(case: Case, inputs: Inputs) -> Inputs:
    """``inputs`` with gradients switched on where the case takes them."""
    return {name: x.detach().requires_grad_(name in case.wants_grad) for name, x in inputs.items()}


def _passed_gate(case: Case, timings: list[Timing]) -> list[tuple[Timing, Function]]:
    inputs = leaves(case, (case.gate_inputs or case.inputs)())
    exact = leaves(case, {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()})

    @functools.cache
    def truth_of(reference: Function) -> dict[str, torch.Tensor]:
        return call(case, Candidate("reference", lambda: reference), reference, exact)

    passed = []
    for timing in timings:
        try:
            function = timing.candidate.make()
            reference = timing.candidate.reference or case.reference
            if reference is not None:
                timing.errors = _errors(case, timing.candidate, function, truth_of(reference), inputs)
                timing.refused = "; ".join(_differences(case, timing.errors)) or None
        except MissingError as error:
            timing.refused = f"missing: {error}"
        except Exception as error:
            timing.refused = _short(error)
        if timing.refused is None:
            passed.append((timing, function))
    return passed


def _errors(
    case: Case, candidate: Candidate, function: Function, truth: dict[str, torch.Tensor], inputs: Inputs
) -> dict[str, float]:
    result = call(case, candidate, function, inputs)
    return {
        name: ((value.double() - truth[name]).norm() / truth[name].double().norm().clamp(min=1e-30)).item()
        for name, value in result.items()
    }


def _differences(case: Case, errors: dict[str, float]) -> list[str]:
    limit = GATE[case.dtype]
    # not (error <= limit): NaN does not pass
    return [
        f"wrong: {name} is off by {error:.1e}, allowed {limit:.0e}"
        for name, error in errors.items()
        if not error <= limit
    ]


class _Runner:
    """One candidate, warmed up, ready to give one sample after another."""

    def __init__(self, case: Case, candidate: Candidate, function: Function, sets: list[Inputs]) -> None:
        self.device = case.device
        self._function, self._inputs = function, sets[0]
        self.calls: list[Callable[[], object]] = [
            lambda inputs=inputs: call(case, candidate, function, inputs)  # type: ignore[misc]
            for inputs in sets
        ]
        self.timer = "perf_counter"
        self._next = 0
        self._warm_up(0.2 if self.device.type == "cuda" else 0.0)
        if self.device.type == "cuda":
            self.timer = "cuda events"
            try:
                self.calls = [_graph(run) for run in self.calls]
                self.timer = "cuda graph, cuda events"
            except Exception:
                # what cannot be captured syncs with the host: it is timed as it is, host included
                torch.cuda.synchronize()
        estimate = self._timed(1)
        self.repeats = max(1, min(200, math.ceil(MIN_SAMPLE_S[self.device.type] / estimate)))

    def sample(self) -> float:
        """Seconds per call."""
        return self._timed(self.repeats) / self.repeats

    def phases(self, rounds: int = 3) -> dict[str, float]:
        """Seconds of the parts of a call, for functions that know theirs."""
        if not hasattr(self._function, "phases"):
            return {}
        readings = [self._function.phases(**self._inputs) for _ in range(rounds)]
        return {phase: float(np.median([reading[phase] for reading in readings])) for phase in readings[0]}

    def _turn(self) -> None:
        self.calls[self._next % len(self.calls)]()
        self._next += 1

    def _warm_up(self, seconds: float) -> None:
        start = time.perf_counter()
        self._turn()
        synchronize(self.device)
        while time.perf_counter() - start < seconds:
            self._turn()
            synchronize(self.device)

    def _timed(self, repeats: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                self._turn()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(BACKLOG_CYCLES)
        begin.record()
        for _ in range(repeats):
            self._turn()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _throttled(before: dict[str, Any], after: dict[str, Any]) -> bool | None:
    """None: nobody knows."""
    if not (before["available"] and after["available"]):
        return None
    return bool(before["throttled"] or after["throttled"])


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"

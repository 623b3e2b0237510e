"""The measurement of several implementations ("candidates") of one computation, with reliable timings.

A candidate is timed only after it gave the reference's result at that shape. Candidates take turns, sample by sample,
so that a drift of the clocks affects all of them. Calls rotate through sets of inputs that fill the cache three times,
and every sample is kept. On a GPU a call is a CUDA graph, since the host may take longer to launch a short kernel than
the kernel runs. The GPU is also kept busy before each sample, until the host has queued calls ahead. A candidate that
fails, runs out of memory or does not compile is refused with its reason, and the other candidates are still measured.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from clipfast.io.progress import each
from clipfast.train.graphs import Captures
from clipfast.verify.context import exact_float32

from .case import Candidate, Case, Inputs, MissingError, call, observe, short
from .graphs import replays
from .machine import cache_bytes, elapsed, free_bytes, synchronize, telemetry

# The largest relative error (norm of the difference over norm of the reference, which is computed in float32) with
# which a candidate counts as the same function. Implementations of others may use TF32 for float32, and bf16 rounds at
# 2^-9. ``clipfast verify`` tests the accuracy; these limits only keep wrong kernels out of the tables.
GATE = {"fp32": 2e-3, "fp16": 1e-2, "bf16": 4e-2}
# A sample repeats a call (at most 200 times) until it takes about this long.
MIN_SAMPLE_S = {"cuda": 1e-3, "cpu": 5e-3}
# The clock cycles for which a GPU is kept busy before a sample, while the host queues the calls.
BACKLOG_CYCLES = 2_000_000
# The most sets of inputs that calls rotate through.
MAX_SETS = 16
# A step that takes longer than this is traced once for its breakdown, and not several times.
LONG_S = 1.0
# The number of bootstrap resamples, and the quantiles between which 95% of them lie.
RESAMPLES, INTERVAL = 2000, (0.025, 0.975)
# The share of the free memory that sets of inputs may take. The candidates need the rest.
SETS_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to measure: at least ``min_rounds`` rounds, then up to ``rounds`` until ``seconds`` are over."""

    seconds: float
    rounds: int = 50
    min_rounds: int = 5


@dataclasses.dataclass(eq=False)
class Timing:
    """Seconds per call of one candidate, sample by sample, or why there are none."""

    candidate: Candidate
    samples: list[float] = dataclasses.field(default_factory=list)  # one for each round
    timer: str = ""  # the clock that measured the time
    refused: str | None = None  # the reason why the candidate was not timed
    eager: str | None = None  # the reason why a call is no CUDA graph; the time then includes the host
    function: Any = None  # the function that the candidate's ``make`` returned
    errors: dict[str, float] = dataclasses.field(default_factory=dict)  # relative errors by output


@exact_float32()
def measure(case: Case, budget: Budget) -> tuple[list[Timing], dict[str, Any]]:
    """Time every candidate of ``case`` that can run here and gives the right result.

    Returns:
        The timings, one for each candidate in the case's order; and the telemetry: NVML readings before and after, and
        whether the card was throttled (None if a reading could not be taken).
    """
    if "torch._dynamo" in sys.modules:
        # Functions that torch.compile compiled for an earlier case would only fill its cache.
        torch._dynamo.reset()
    timings = [Timing(candidate) for candidate in case.candidates]
    pass_gate(case, timings)
    running = _ready(case, timings)
    before = telemetry(case.device)
    _take_turns(running, budget)
    after = telemetry(case.device)
    throttled = None
    if before["available"] and after["available"]:
        throttled = before["throttled"] or after["throttled"]
    return timings, {"before": before, "after": after, "throttled": throttled}


def _ready(case: Case, timings: list[Timing]) -> "dict[Timing, _Runner]":
    """Warm up every candidate that is not refused, and return its runner; refuse a candidate that fails here."""
    chosen = [timing for timing in timings if timing.refused is None]
    running: dict[Timing, _Runner] = {}
    with _refusing(*chosen):
        sets = _input_sets(case)
        graphs = Captures(case.device) if case.graph and case.device.type == "cuda" else None
        for timing in each(chosen, "warming up", "candidate"):
            with _refusing(timing):
                running[timing] = _Runner(case, timing, sets, graphs)
    return running


def _take_turns(running: "dict[Timing, _Runner]", budget: Budget) -> None:
    """Add one sample to each benchmark candidate's timing in each round; remove those that fail from ``running``."""
    start = time.perf_counter()
    for number in each(range(budget.rounds), "timing all candidates", "round"):
        if number >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
            break
        # Another candidate goes first in each round, so that none always finds the cache in the same state.
        order = list(running)
        turn = number % max(len(order), 1)
        for timing in order[turn:] + order[:turn]:
            with _refusing(timing):
                timing.samples.append(running[timing].sample())
            if timing.refused is not None:
                del running[timing]


@contextlib.contextmanager
def _refusing(*timings: Timing) -> Iterator[None]:
    """Catch an exception inside the context, and record it as the reason why a benchmark refuses the ``timings``."""
    try:
        yield
    except Exception as error:
        reason = f"missing: {error}" if isinstance(error, MissingError) else short(error)
        for timing in timings:
            timing.refused = timing.refused or reason
            timing.samples.clear()
    if any(timing.refused for timing in timings) and torch.cuda.is_initialized():
        gc.collect()
        with contextlib.suppress(RuntimeError):
            # After an illegal access, every CUDA call fails, empty_cache too. The first error is already recorded.
            torch.cuda.empty_cache()


def ratio_interval(ours: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return the benchmarked time of ``other`` divided by that of ``ours``, and both ends of its 95% interval.

    The ratio is the median of the ratios of the rounds. Both must come from the same rounds: whatever slows down a
    round slows down both, and cancels in their ratio.
    """
    ratios = np.asarray(other) / np.asarray(ours)
    draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), INTERVAL)
    return float(np.median(ratios)), float(low), float(high)


def _input_sets(case: Case) -> list[Inputs]:
    """Draw enough sets of inputs to fill the cache three times, or fewer if memory does not allow that."""
    first = leaves(case, case.inputs())
    size = max(sum(x.numel() * x.element_size() for x in first.values()), 1)
    wanted = math.ceil(3 * cache_bytes(case.device) / size) if case.graph else 1
    room = 1 + int(SETS_SHARE * free_bytes(case.device) / size)
    return [first, *(leaves(case, case.inputs()) for _ in range(min(MAX_SETS, wanted, room) - 1))]


def leaves(case: Case, inputs: Inputs) -> Inputs:
    """Return a benchmark's ``inputs``, detached, with ``requires_grad`` set where the case takes gradients."""
    return {name: x.detach().requires_grad_(name in case.wants_grad) for name, x in inputs.items()}


@exact_float32()
def pass_gate(case: Case, timings: list[Timing]) -> None:
    """Make each candidate's function, and refuse the candidate unless it agrees with the reference on new inputs."""
    with _refusing(*timings):
        inputs = leaves(case, (case.gate_inputs or case.inputs)())
        exact = leaves(case, {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()})

        @functools.cache
        def results_of(reference: Candidate) -> dict[str, torch.Tensor]:
            """Return the results of the reference with which a benchmark compares its candidates."""
            return observe(case, reference, reference.make(), exact)

        for timing in each(timings, "checking", "candidate"):
            with _refusing(timing):
                if timing.candidate.needs_gpu and case.device.type != "cuda":
                    raise MissingError("needs a GPU")
                timing.function = timing.candidate.make()
                if case.reference is not None:
                    result = observe(case, timing.candidate, timing.function, inputs)
                    expected = results_of(case.reference)
                    timing.errors = {name: _error(value, expected[name]) for name, value in result.items()}
                    timing.refused = "; ".join(_differences(case, timing.errors)) or None


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of a candidate's result: the norm of the difference over the norm of ``expected``."""
    return ((value.double() - expected).norm() / expected.double().norm().clamp(min=1e-30)).item()


def _differences(case: Case, errors: dict[str, float]) -> Iterator[str]:
    """Yield a sentence for each output of a benchmark candidate whose error exceeds its limit."""
    for name, error in errors.items():
        limit = case.slack.get(name, 1.0) * GATE[case.dtype]
        if not error <= limit:  # NaN does not pass
            yield f"wrong: {name} is off by {error:.1e}, allowed {limit:.0e}"


class _Runner:
    """A candidate that has been warmed up, and from which samples are taken one after another."""

    def __init__(self, case: Case, timing: Timing, sets: list[Inputs], graphs: Captures | None) -> None:
        self.device, self._clock = case.device, case.clock
        calls = [functools.partial(call, case, timing.candidate, timing.function, inputs) for inputs in sets]
        self._turns: Iterator[Callable[[], object]] = itertools.cycle(calls)
        clock = case.clock or time.perf_counter
        timing.timer = clock.__name__ if case.clock or self.device.type != "cuda" else "cuda events"
        self._warm_up(0.2 if self.device.type == "cuda" else 0.0)
        if graphs is not None:
            try:
                self._turns = itertools.cycle(replays(graphs, calls))
                timing.timer = "cuda graph, cuda events"
            except Exception as error:
                # The candidate is timed without a graph, and the table says that the host's time is included.
                timing.eager = short(error)
        estimate = max(self._timed(1), 1e-7)
        self.repeats = max(1, min(200, math.ceil(MIN_SAMPLE_S[self.device.type] / estimate)))

    def sample(self) -> float:
        """Time the calls of one sample of a benchmark candidate, and return the seconds per call."""
        return self._timed(self.repeats) / self.repeats

    def _warm_up(self, seconds: float) -> None:
        """Call the benchmark candidate at least once, and again until ``seconds`` are over."""
        start = time.perf_counter()
        for turn in self._turns:
            turn()
            synchronize(self.device)
            if time.perf_counter() - start >= seconds:
                return

    def _timed(self, repeats: int) -> float:
        """Return the seconds that ``repeats`` calls of a benchmark candidate take together."""

        def turns() -> None:
            """Call the benchmark candidate ``repeats`` times, each time on other inputs."""
            for turn in itertools.islice(self._turns, repeats):
                turn()

        if self._clock is not None:
            # The C library sorts small blocks of freed memory later, at the next large request. After this call, which
            # is not timed, no candidate's sample contains that work for blocks that another candidate has freed.
            next(self._turns)()
            start = self._clock()
            turns()
            return self._clock() - start
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(BACKLOG_CYCLES)
        return elapsed(turns, self.device)

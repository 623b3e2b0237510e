"""One timing for each op, forward and backward, to be compared with an earlier run on the same machine.

    pytest bench/gates --benchmark-save=base
    pytest bench/gates --benchmark-compare --benchmark-compare-fail=median:5%

``python -m bench`` compares with other implementations and with another commit in the same run; this is the quick gate.
"""

import time
from typing import Any

import pytest
import torch

from clipfast.bench.case import Case, call
from clipfast.bench.harness import leaves
from clipfast.bench.machine import synchronize, telemetry
from clipfast.bench.suites import SUITES, build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bf16" if DEVICE.type == "cuda" else "fp32"
ROUNDS = 50 if DEVICE.type == "cuda" else 10
# The first default shape of each op that has a benchmark.
SHAPES = {name: suite.shapes[DEVICE.type][:1] for name, suite in SUITES.items() if suite.op is not None}
CASES = [build(name, shape, DTYPE, DEVICE) for name, shapes in SHAPES.items() for shape in shapes]


def device_timer() -> float:
    """Wait until everything that a gate launched has run, and return the time."""
    synchronize(DEVICE)
    return time.perf_counter()


@pytest.mark.benchmark(timer=device_timer)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_forward_and_backward(benchmark: Any, case: Case) -> None:
    """Time an op, forward and backward, and check that its results are finite."""
    function, inputs = case.ours.make(), leaves(case, case.inputs())
    benchmark.group = case.op
    benchmark.extra_info |= {"shape": dict(case.shape), "dtype": case.dtype, "before": telemetry(DEVICE)}
    if case.floor is not None:
        benchmark.extra_info |= {"flops": case.floor.flops, "bytes": case.floor.bytes}
    result = benchmark.pedantic(call, (case, case.ours, function, inputs), rounds=ROUNDS, warmup_rounds=3)
    benchmark.extra_info["after"] = telemetry(DEVICE)
    assert all(value.isfinite().all() for value in result.values())

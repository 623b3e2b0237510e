"""A case that takes no time: numbers, doubled."""

import torch

from clipfast.bench.case import Case
from clipfast.bench.harness import Budget, measure

CPU = torch.device("cpu")
ROOFS = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1.0}


def double(x):
    return 2 * x


def case(candidates, reference=double, **kwargs):
    return Case(
        suite="loss", op="double", shape={}, dtype="fp32", device=CPU, inputs=lambda: {"x": torch.randn(8)},
        candidates=candidates, reference=reference, **kwargs,
    )  # fmt: skip


def quickly(case):
    timings, _ = measure(case, Budget(seconds=0.0, rounds=3, min_rounds=2))
    return {timing.candidate.name: timing for timing in timings}

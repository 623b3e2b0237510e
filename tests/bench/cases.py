"""A case that takes no time: numbers, doubled."""

import dataclasses
import functools
import json
from pathlib import Path

import torch

import clipfast.bench
from clipfast.bench.case import Case
from clipfast.bench.harness import Budget, measure
from clipfast.bench.suites import SUITES, ops

CPU = torch.device("cpu")
ROOFS = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1.0}
NO_GPU = {"available": False, "why": "no GPU"}
TELEMETRY = {"before": NO_GPU, "after": NO_GPU, "throttled": None}
SCHEMA = json.loads(Path(clipfast.bench.__path__[0], "schema.json").read_text())


def double(x):
    return 2 * x


def grad_twice(x):
    """``x``, with twice its gradient."""
    return 2 * x - x.detach()


def case(candidates, reference=double, **kwargs):
    inputs = {"inputs": lambda: {"x": torch.randn(8)}, **kwargs}
    return Case(
        suite="loss", op="double", shape={}, dtype="fp32", device=CPU, candidates=candidates, reference=reference,
        **inputs,
    )  # fmt: skip


def break_loss(monkeypatch):
    """Make the contrastive loss of the benchmarks raise an error."""

    def contrastive_loss(**arguments):
        raise RuntimeError("illegal instruction")

    suite = SUITES["loss"]
    build = functools.partial(ops.build, dataclasses.replace(suite.op, op=contrastive_loss))
    monkeypatch.setitem(SUITES, "loss", dataclasses.replace(suite, build=build))


def quickly(case):
    timings, _ = measure(case, Budget(seconds=0.0, rounds=3, min_rounds=2))
    return {timing.candidate.name: timing for timing in timings}

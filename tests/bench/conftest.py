"""Helpers of the benchmark tests: a case that takes hardly any time (it doubles numbers), and ways to measure cases."""

import dataclasses
import functools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

import clipfast.bench
from clipfast.bench import session
from clipfast.bench.case import Candidate, Case
from clipfast.bench.harness import Budget, measure
from clipfast.bench.suites import SUITES, build, ops

from ..conftest import INTERPRET

CPU = torch.device("cpu")
ROOFS = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1.0}
NO_GPU = {"available": False, "why": "no GPU"}
TELEMETRY = {"before": NO_GPU, "after": NO_GPU, "throttled": None}
SCHEMA = json.loads(Path(clipfast.bench.__path__[0], "schema.json").read_text())


def double(x):
    """Return the double of ``x``: the reference of benchmark cases in these tests."""
    return 2 * x


def grad_twice(x):
    """Return ``x``, but double its gradient: a wrong candidate of a benchmark."""
    return 2 * x - x.detach()


def case(candidates, reference=double, **kwargs):
    """Return a small benchmark case with these candidates."""
    kwargs = {"inputs": lambda: {"x": torch.randn(8)}, **kwargs}
    made = Candidate("reference", lambda: reference) if reference else None
    return Case("loss", "double", {}, "fp32", CPU, candidates=candidates, reference=made, **kwargs)


def smallest(suite):
    """Return the benchmark case of ``suite`` at its smallest shape."""
    return build(suite, SUITES[suite].smallest, "fp32", CPU)


def break_loss(monkeypatch):
    """Make the contrastive loss of the benchmarks raise an error."""
    suite = SUITES["loss"]
    broken = mock.Mock(side_effect=RuntimeError("illegal instruction"), __name__=suite.op.name)
    spec = dataclasses.replace(suite.op, op=broken)
    monkeypatch.setitem(SUITES, "loss", dataclasses.replace(suite, build=functools.partial(ops.build, spec)))


def validate(run):
    """Raise an error if a benchmark result does not match the schema."""
    pytest.importorskip("jsonschema").validate(run, SCHEMA)


def quickly(case):
    """Measure a benchmark case in three rounds, and return the timings by the candidate's name."""
    timings, _ = measure(case, Budget(seconds=0.0, rounds=3, min_rounds=2))
    return {timing.candidate.name: timing for timing in timings}


@pytest.fixture(autouse=True)
def compiled_kernels():
    """Skip the test if kernels are interpreted, since benchmarks time compiled kernels."""
    if INTERPRET:
        pytest.skip("benchmarks time compiled kernels")


@pytest.fixture
def no_roofs(monkeypatch):
    """Let benchmark sessions skip the measurement of the machine's rates, which takes seconds."""
    monkeypatch.setattr(session, "measure_roofs", lambda device, dtype: ROOFS)


@pytest.fixture
def run_session(monkeypatch, no_roofs, tmp_path):
    """Return a function that measures cases in a session, and returns the result after checking it by the schema."""

    def run(*cases, **options):
        """Measure benchmark cases in a session, and return the result."""
        monkeypatch.setattr(session, "build", mock.Mock(side_effect=cases))
        options = {"memory": False, **options}
        keys = [("loss", {}, "fp32")] * len(cases)
        result = session.measure_all(keys, CPU, Budget(0.0, 2, 2), tmp_path / "run.json", **options)
        validate(result)
        return result

    return run

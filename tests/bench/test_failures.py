"""Test that a candidate that fails during a benchmark is refused with its reason, and that the others go on."""

import time
import weakref
from unittest import mock

import pytest
import torch

from clipfast.bench import cli, harness, results, session, tables
from clipfast.bench.case import OURS, Candidate
from clipfast.bench.suites import peers

from .conftest import TELEMETRY, break_loss, case, double, quickly, smallest

FULL = torch.OutOfMemoryError("CUDA out of memory")


def fails(error, after=0):
    """Return a candidate's ``make`` whose function works for ``after`` calls, and then raises ``error``."""
    return lambda: mock.Mock(double, wraps=double, side_effect=[mock.DEFAULT] * after + [error])


def test_an_error_while_timing_refuses_one_candidate():
    # The first call is at the gate, the second warms up, and the third is for the estimate. Then each call is a sample.
    candidates = (
        Candidate("late", fails(FULL, after=4)),
        Candidate("warm-up", fails(RuntimeError("no kernel image"), after=1)),
        Candidate(OURS, lambda: lambda x: time.sleep(0.006) or 2 * x),
    )
    timings = quickly(case(candidates))
    assert {name: (timing.refused, len(timing.samples)) for name, timing in timings.items()} == {
        OURS: (None, 2), "late": ("OutOfMemoryError: CUDA out of memory", 0),
        "warm-up": ("RuntimeError: no kernel image", 0),
    }  # fmt: skip


def test_a_card_that_has_failed_for_good_still_gives_a_result(monkeypatch):
    gone = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", mock.Mock(side_effect=gone))
    timings = quickly(case((Candidate(OURS, fails(RuntimeError("illegal memory access"))),)))
    assert timings[OURS].refused == "RuntimeError: illegal memory access"


def test_what_a_case_has_made_is_gone_before_the_next(run_session):
    alive, most = weakref.WeakSet(), []

    def make():
        """Make a candidate of a benchmark case, and count the candidates that are still alive."""
        alive.add(model := lambda x: 2 * x)
        most.append(len(alive))
        return model

    run_session(*(case((Candidate(OURS, make),)) for _ in range(3)))
    assert most == [1, 1, 1]


@pytest.mark.parametrize(
    "fault",
    [
        {"inputs": mock.Mock(side_effect=FULL)},
        {"inputs": mock.Mock(side_effect=[{"x": torch.ones(8)}, FULL])},  # the inputs of the gate fit, the next do not
        {"reference": mock.Mock(double, side_effect=FULL)},
    ],
    ids=["gate", "sets", "reference"],
)
def test_inputs_that_do_not_fit_refuse_the_case_and_no_more(fault, run_session):
    large, small = (case((Candidate(OURS, lambda: double),), **kwargs) for kwargs in (fault, {}))
    run = run_session(large, small)
    refused = "OutOfMemoryError: CUDA out of memory"
    assert [case["candidates"][0]["refused"] for case in run["cases"]] == [refused, None]
    assert refused in tables.case_table(run["cases"][0])


def test_an_op_of_ours_that_is_refused_is_exit_code_1(tmp_path, monkeypatch, no_roofs, capsys):
    arguments = ["loss", "--device", "cpu", "--smoke", "--no-memory", "--only", "PyTorch"]
    arguments += ["--overwrite", "--json", str(tmp_path / "run.json")]
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    assert cli.main(arguments) == 0
    break_loss(monkeypatch)
    assert cli.main(arguments) == 1
    assert "contrastive_loss.fwd_bwd clipfast: RuntimeError: illegal" in capsys.readouterr().err


def test_a_machine_that_cannot_compile_is_missing_something_and_nobody_is_wrong(monkeypatch):
    fail = mock.Mock(side_effect=RuntimeError("Python.h: no such file"))
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: fail)
    monkeypatch.setattr(peers, "need_compiler", peers.need_compiler.__wrapped__)  # without the cache of earlier results
    built = smallest("step")
    (timing,) = [harness.Timing(c) for c in built.candidates if c.name == f"{OURS} compiled"]
    harness.pass_gate(built, [timing])
    assert timing.refused.startswith("missing: ")
    assert "Python.h: no such file" in timing.refused


def test_no_case_is_begun_after_the_end(run_session):
    doubled = case((Candidate(OURS, lambda: double),))
    assert run_session(doubled, doubled, total_s=0.0)["cases"] == []


def test_float32_is_exact_while_measuring_and_as_before_afterwards():
    seen = []

    def flags():
        """Return whether PyTorch may use TF32 while the benchmark measures."""
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def run(x):
        """Record the setting of TF32 that a benchmark candidate sees."""
        seen.append(flags())
        return 2 * x

    before = flags()
    assert before[0]  # PyTorch's default: convolutions in TF32
    quickly(case((Candidate(OURS, lambda: run),), reference=run))
    assert set(seen) == {(False, False)}
    assert flags() == before


def test_what_gets_no_memory_figure_or_no_graph_is_timed_and_says_so(monkeypatch, run_session):
    monkeypatch.setattr(session, "peak_bytes", mock.Mock(side_effect=FULL))
    (found,) = run_session(case((Candidate(OURS, lambda: double),)), memory=True)["cases"]
    entry = found["candidates"][0]
    assert (entry["peak_bytes"], entry["peak_refused"]) == (None, "OutOfMemoryError: CUDA out of memory")
    assert "no memory figure: clipfast: OutOfMemoryError" in tables.case_table(found)

    graphs = mock.Mock(**{"beside.side_effect": RuntimeError("called a synchronizing CUDA operation")})
    built = case((Candidate(OURS, lambda: double),))
    timing = harness.Timing(built.ours, function=double)
    runner = harness._Runner(built, timing, [built.inputs()], graphs)
    timing.samples += [runner.sample(), runner.sample()]
    table = tables.case_table(results.case_result(built, [timing], TELEMETRY, {}, {}))
    assert "no CUDA graph: clipfast: RuntimeError: called a synchronizing" in table

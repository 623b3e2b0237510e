"""What fails while it is measured is refused with its reason, and the others go on."""

import contextlib
import functools
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from clipfast.bench import cli, harness, results, session, tables
from clipfast.bench.case import OURS, Candidate
from clipfast.bench.graphs import Graphs
from clipfast.bench.suites import build, peers

from .cases import CPU, TELEMETRY, break_loss, case, double, quickly


def fails(error, after=0):
    """A candidate that is right for ``after`` calls."""
    calls = []

    def run(x):
        calls.append(1)
        if len(calls) > after:
            raise error
        return 2 * x

    return lambda: run


def test_an_error_while_timing_refuses_one_candidate():
    # calls: one at the gate, one to warm up, one for the estimate, then a sample each
    candidates = (
        Candidate("late", fails(torch.OutOfMemoryError("CUDA out of memory"), after=4)),
        Candidate("warm-up", fails(RuntimeError("no kernel image"), after=1)),
        Candidate(OURS, lambda: lambda x: time.sleep(0.006) or 2 * x),
    )
    timings = quickly(case(candidates))
    assert timings[OURS].refused is None
    assert len(timings[OURS].samples) == 2
    assert timings["late"].refused == "OutOfMemoryError: CUDA out of memory"
    assert timings["warm-up"].refused == "RuntimeError: no kernel image"
    assert not timings["late"].samples


def test_a_card_that_has_failed_for_good_still_gives_a_result(monkeypatch):
    def gone():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", gone)
    timings = quickly(case((Candidate(OURS, fails(RuntimeError("illegal memory access"))),)))
    assert timings[OURS].refused == "RuntimeError: illegal memory access"


def test_what_a_case_has_made_is_gone_before_the_next(run_session):
    alive, most = weakref.WeakSet(), []

    def make():
        alive.add(model := lambda x: 2 * x)
        most.append(len(alive))
        return model

    run_session(*(case((Candidate(OURS, make),)) for _ in range(3)))
    assert most == [1, 1, 1]


@pytest.mark.parametrize("when", ["gate", "sets", "reference"])
def test_inputs_that_do_not_fit_refuse_the_case_and_no_more(when, run_session, capsys):
    drawn = []

    def inputs():
        drawn.append(1)
        if when == ("gate", "sets")[len(drawn) > 1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"x": torch.randn(8)}

    def reference(x):
        if when == "reference":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    large, small = (
        case((Candidate(OURS, lambda: double),), **kwargs)
        for kwargs in ({"inputs": inputs, "reference": reference}, {})
    )
    run = run_session(large, large, small)
    assert run["cases"][0]["candidates"][0]["refused"] == "OutOfMemoryError: CUDA out of memory"
    assert run["cases"][2]["candidates"][0]["refused"] is None
    assert "not timed: clipfast: OutOfMemoryError" in capsys.readouterr().out
    assert session.refused_of_ours(run)[0] == "double clipfast: OutOfMemoryError: CUDA out of memory"


def test_an_op_of_ours_that_is_refused_is_exit_code_1(tmp_path, monkeypatch, no_roofs, capsys):
    arguments = ["loss", "--device", "cpu", "--smoke", "--no-memory", "--no-plots", "--only", "PyTorch compiled"]
    monkeypatch.setattr("clipfast.bench.suites.peers.compiled", lambda function: function)
    arguments += ["--json", str(tmp_path / "run.json")]
    assert cli.main(arguments) == 0
    break_loss(monkeypatch)
    assert cli.main(arguments) == 1
    assert "refused: contrastive_loss.fwd_bwd clipfast: RuntimeError: illegal" in capsys.readouterr().err


def test_a_machine_that_cannot_compile_is_missing_something_and_nobody_is_wrong(monkeypatch):
    def fail(*args):
        raise RuntimeError("Python.h: no such file")

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: fail)
    peers.need_compiler.cache_clear()
    try:
        built = build("step", {"model": "ViT-T-8-32", "batch": 2}, "fp32", CPU)
        timings = [harness.Timing(c) for c in built.candidates if c.name == f"{OURS} compiled"]
        harness.pass_gate(built, timings)
    finally:
        peers.need_compiler.cache_clear()
    reason = "missing: torch.compile does not work here: RuntimeError: Python.h: no such file"
    assert [timing.refused for timing in timings] == [reason]


def test_our_model_and_loss_are_compiled_as_one_graph_each(monkeypatch):
    asked = []

    def compile(function, *, fullgraph, **kwargs):
        asked.append((function, fullgraph))
        return function

    monkeypatch.setattr(peers, "need_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", compile)
    built = build("step", {"model": "ViT-T-8-32", "batch": 2}, "fp32", CPU)
    step = next(c for c in built.candidates if c.name == f"{OURS} compiled").make()
    assert asked == [(step.model, True), (step.loss, True)]


def test_a_copy_that_does_not_fit_loses_no_timing(monkeypatch, run_session):
    def full(size, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session, "copy_seconds", full)
    run = run_session(case((Candidate(OURS, lambda: double),), transfers={"uint8": 8}))
    assert run["cases"][0]["transfers"] == {"uint8": {"bytes": 8, "seconds": None}}
    assert run["cases"][0]["candidates"][0]["samples_s"]


def test_no_case_is_begun_after_the_end(run_session, capsys):
    doubled = case((Candidate(OURS, lambda: double),))
    assert run_session(doubled, doubled, total_s=0.0)["cases"] == []
    assert capsys.readouterr().out.count("not begun, 0 s are over: double fp32") == 2


def test_float32_is_exact_while_measuring_and_as_before_afterwards():
    seen = []

    def flags():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def run(x):
        seen.append(flags())
        return 2 * x

    before = flags()
    assert before[0]  # PyTorch's default: convolutions in TF32
    quickly(case((Candidate(OURS, lambda: run),), reference=run))
    assert set(seen) == {(False, False)}
    assert flags() == before


def test_what_is_compiled_lives_for_a_case(monkeypatch):
    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    candidates = [Candidate(name, lambda: peers.compiled(double)) for name in (OURS, "other")]
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    quickly(case(tuple(candidates)))
    assert len(resets) == 1


def test_memory_is_that_of_the_function_that_was_timed(monkeypatch, run_session):
    made, measured = [], []

    def make():
        made.append(lambda x: 2 * x)
        return made[-1]

    def peak(case, candidate, function):
        measured.append(function)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session, "peak_bytes", peak)
    run = run_session(case((Candidate(OURS, make),)), memory=True)
    assert measured == made
    entry = run["cases"][0]["candidates"][0]
    assert (entry["peak_bytes"], entry["peak_refused"]) == (None, "OutOfMemoryError: CUDA out of memory")
    assert "no memory figure: clipfast: OutOfMemoryError" in tables.case_table(run["cases"][0])


def test_a_call_that_is_no_graph_is_timed_and_says_so(monkeypatch):
    class Graphs:
        def capture(self, calls):
            raise RuntimeError("called a synchronizing CUDA operation")

    built = case((Candidate(OURS, lambda: double),))
    timing = harness.Timing(built.candidates[0], function=double)
    runner = harness._Runner(built, timing, [{"x": torch.randn(8)}], Graphs())
    timing.samples += [runner.sample(), runner.sample()]
    assert timing.eager == "RuntimeError: called a synchronizing CUDA operation"
    table = tables.case_table(results.case_result(built, [timing], TELEMETRY, {}, {}))
    assert "clipfast (eager)" in table
    assert "host included, no CUDA graph: clipfast: RuntimeError: called a synchronizing" in table


class FakeCuda:
    """As much of torch.cuda as captures use; a capture of "bad" fails at its end, as one of a host sync does."""

    def __init__(self, monkeypatch):
        self.pools, self.ended, self.used, self.sync_mode = 0, [], [], 0
        self.calls, self.modes = [], []
        self.current = "outside"
        fakes = {
            "Stream": lambda device: self.stream("side"),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph_pool_handle": self.new_pool,
            "graph": self.graph,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda device: self.stream(self.current),
            "set_stream": lambda stream: setattr(self, "current", stream.name),
            "synchronize": lambda device=None: None,
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_mode", mode),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_pool, raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: self.calls.append("zeros"))

    def stream(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: None)

    def new_pool(self):
        self.pools += 1
        return self.pools

    def end_pool(self, index, pool):
        self.ended.append(pool)
        raise RuntimeError("not currently recording to mempool_id")

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        self.used.append(pool)
        self.current = "capturing"
        yield
        if self.calls[-1] == "bad":
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = "outside"

    def call(self, name):
        self.calls.append(name)
        self.modes.append(self.sync_mode)


def test_a_failed_capture_is_ended_and_the_next_works(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    good, bad = (functools.partial(cuda.call, name) for name in ("good", "bad"))
    graphs = Graphs(torch.device("cuda", 0))
    assert len(graphs.capture([good, good])) == 2
    assert cuda.used == [1, 1]  # one pool for all
    # host syncs are an error before the capture, and none of its business
    assert cuda.modes == ["error", 0, 0]
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.capture([bad])
    assert cuda.ended == [1]
    assert cuda.current == "outside"
    assert graphs.capture([good])
    assert cuda.used[-1] == 2

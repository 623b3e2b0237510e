"""Test the timing of candidates: the refused ones, the kept samples, and the verdict on the ratio of times."""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from clipfast.bench import checkout, cli, compare, harness, results, session, tables
from clipfast.bench.case import OURS, Candidate, MissingError
from clipfast.bench.harness import Budget, measure, ratio_interval
from clipfast.bench.memory import peak_bytes
from clipfast.bench.suites import SUITES, build

from .conftest import CPU, ROOFS, case, double, quickly, smallest, validate


def test_a_wrong_candidate_is_not_timed():
    def missing():
        """Fail like a benchmark candidate whose package is not installed."""
        raise MissingError("not installed (pip install peer)")

    faults = {
        "off by 1%": (lambda: lambda x: 2.02 * x, "wrong: value is off by 1.0e-02"),
        "NaN": (lambda: lambda x: 2 * x + float("nan"), "off by nan"),
        "raises": (lambda: lambda x: x @ torch.ones(3), "RuntimeError: "),
        "peer": (missing, "missing: not installed (pip install peer)"),
    }
    timings = quickly(case((Candidate(OURS, lambda: double), *(Candidate(name, faults[name][0]) for name in faults))))
    assert (timings[OURS].refused, len(timings[OURS].samples)) == (None, 2)
    for name, (_, reason) in faults.items():
        assert reason in timings[name].refused
        assert not timings[name].samples


def test_candidates_take_turns():
    calls = []

    def candidate(name):
        """Return a benchmark candidate that records each of its calls."""

        def run(x):
            """Record a call of a benchmark candidate that takes as long as a sample."""
            calls.append(name)
            time.sleep(0.006)  # longer than a sample needs, so one call is one sample
            return 2 * x

        return Candidate(name, lambda: run)

    measure(case((candidate("a"), candidate("b"))), Budget(seconds=100, rounds=4))
    assert calls[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    # Even with a budget of zero seconds, the least number of rounds is run.
    timings, _ = measure(case((candidate("a"),)), Budget(seconds=0.0, rounds=50, min_rounds=4))
    assert len(timings[0].samples) == 4


def test_interval_of_the_ratio():
    rng = np.random.default_rng(1)
    drift = 1 + np.arange(60) / 30  # both candidates slow down together, which must cancel in the ratio of their times
    ours, other = drift * rng.normal(1, 0.05, 60), drift * rng.normal(1.5, 0.05, 60)
    median, low, high = ratio_interval(ours, other)
    assert low < median < high
    assert 1.4 < low < 1.5 < high < 1.6


def test_a_verdict_counts_processes_more_than_samples():
    intervals = {(1.06, 1.2): "slower", (1.01, 1.2): "undecided", (0.97, 1.04): "same", (0.7, 0.9): "faster"}
    for interval, word in intervals.items():
        assert compare.verdict(*interval, False) == word
        assert compare.verdict(*interval, True) == "throttled"
    # Even if the samples of a process agree well, the next process may differ.
    base, head = [[1.0] * 50, [1.3] * 50, [0.8] * 50], [[1.2] * 50, [0.9] * 50, [1.1] * 50]
    _, low, high = compare.ratio_of_processes(base, head)
    assert low < 0.8
    assert high > 1.2
    ratio, low, high = compare.ratio_of_processes([[1.0, 1.01]] * 5, [[1.5, 1.52]] * 5)
    assert 1.45 < low <= ratio <= high < 1.55


def test_two_result_files_are_compared(tmp_path, no_roofs, capsys):
    paths = [str(tmp_path / name) for name in ("before.json", "after.json")]
    key = "bias_gelu", SUITES["bias_gelu"].smallest, "fp32"
    run = session.measure_all([key], CPU, Budget(0.0, 2, 2), tmp_path / "run.json", only=["PyTorch"], memory=False)
    for path, seconds, version in zip(paths, (1.0, 1.2), ("2.11", "2.13"), strict=True):
        for one in run["cases"][0]["candidates"]:
            time_s = seconds if one["name"] == OURS else 1.0
            one["samples_s"], one["timer"] = [time_s, 1.01 * time_s, 0.99 * time_s], "perf_counter"
        run["versions"]["torch"] = version
        results.write(run, Path(path))
    capsys.readouterr()
    assert cli.main(["compare", *paths]) == 1
    ours, theirs, *rest = capsys.readouterr().out.splitlines()[1:]
    assert (ours.split()[-1], theirs.split()[-1]) == ("slower", "same")
    assert rest == ["versions torch: 2.11 before, 2.13 after"]
    assert cli.main(["compare", *paths[::-1]]) == 0


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_and_validates(suite, tmp_path, no_roofs, capsys):
    key = suite, SUITES[suite].smallest, "fp32"
    built = build(*key, CPU)
    names = [c.name for c in built.candidates if "compiled" not in c.name]  # compiling takes long
    path = tmp_path / "run.json"
    run = session.measure_all([key], CPU, Budget(0.0, 2, 2), path, only=names, memory=False)
    validate(json.loads(path.read_text()))
    entry = next(c for c in run["cases"][0]["candidates"] if c["name"] == OURS)
    assert (entry["refused"], len(entry["samples_s"])) == (None, 2)
    assert built.op in capsys.readouterr().out
    assert suite != "step" or entry["mfu"]["measured"] > 0


def test_a_whole_name_means_that_candidate_alone():
    built = case(tuple(Candidate(name, lambda: double) for name in (OURS, f"{OURS} compiled", "peer", "peer compiled")))

    def names(*only):
        """Return the names of the benchmark candidates that the names on the command line select."""
        return [candidate.name for candidate in session.chosen(built, only).candidates]

    assert names() == [OURS]
    assert names("Peer") == [OURS, "peer"]
    assert names("pee") == [OURS, "peer", "peer compiled"]
    with pytest.raises(ValueError, match="--only 'nobody'"):
        names("peer", "nobody")


def test_committed_results_validate_and_a_broken_one_does_not():
    runs = [results.read(path) for path in (checkout.ROOT / "bench" / "results").rglob("*.json")]
    assert runs
    for run in runs:
        validate(run)
    runs[0]["cases"].append({"suite": "loss"})
    with pytest.raises(Exception, match="is a required property"):
        validate(runs[0])


LOSSES = ["clipfast, memory=min", "memeff", "Cut Cross-Entropy x2", "Liger x2"]
ATTENTION = ["flash-attn", "flash-attn-3", "FlexAttention"]


def test_gpu_only_peers_are_listed_not_forgotten():
    for suite, peers in (("loss", LOSSES), ("sigmoid", ["siglip-kernel"]), ("attention", ATTENTION)):
        built = smallest(suite)
        timings = quickly(dataclasses.replace(built, candidates=[c for c in built.candidates if c.name in peers]))
        assert {name: t.refused for name, t in timings.items()} == dict.fromkeys(peers, "missing: needs a GPU")


def test_peak_memory_is_the_calls_own():
    # 2048 x 2048 float32 logits are 16 MiB. The reference holds several such matrices, and clipfast's loss none.
    pairs, logits = 2048, 2048 * 2048 * 4
    built = build("loss", {"pairs": pairs, "embed_dim": 64}, "fp32", CPU)
    by_name = {candidate.name: candidate for candidate in built.candidates}
    theirs, ours = peak_bytes(built, by_name["PyTorch"]), peak_bytes(built, by_name[OURS])
    assert 2 * logits < theirs < 10 * logits
    assert 2 * pairs * 64 * 4 <= ours < logits  # at least the two gradients


def test_inputs_rotate_past_the_cache_and_do_not_fill_the_memory(monkeypatch):
    seen = set()

    def run(x):
        """Record the address of the inputs with which a benchmark candidate is called."""
        seen.add(x.data_ptr())
        return 2 * x

    built = case((Candidate(OURS, lambda: run),), reference=None)
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 100)
    measure(built, Budget(seconds=0, rounds=12, min_rounds=12))
    assert len(seen) == math.ceil(3 * 100 / 32)
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 2**20)
    for free, sets in ((10 * 32, 1 + 2), (2**30, harness.MAX_SETS)):  # in memory for ten sets: a fifth, and one more
        monkeypatch.setattr(harness, "free_bytes", lambda device, free=free: free)
        assert len(harness._input_sets(built)) == sets


BAD = [
    (["loss", "--device", "tpu"], "--device must be cpu, cuda or auto, got 'tpu'"),
    (["loss", "--dtype", "int8"], "dtype must be one of fp32, fp16, bf16, got 'int8'"),
    (["loss", "--shape", "pairs=x"], "--shape: pairs must be like 16384, got 'x'"),
    (["loss", "--shape", "rows=3"], "--shape: loss has no 'rows'"),
    (["loss", "--shape", "pairs=3"], "a shape of loss looks like 'pairs=16384 embed_dim=512'"),
    (["loss", "--shape", "pairs=0 embed_dim=4"], "pairs=0 must be like 16384, and positive"),
    (["ops", "--shape", "pairs=3 embed_dim=4"], "--shape needs one suite, not 'ops'"),
    (["step", "--shape", "model=ViT-X batch=2"], "unknown model 'ViT-X'"),
    (["step", "--shape", "model=ViT-B-16-SigLIP batch=2"], "sigmoid loss"),
    (["loss", "--seconds", "0"], "--seconds must be more than 0, got 0"),
    (["loss", "--shape", "pairs=8 embed_dim=4", "--only", "nobody", "--json", "x.json"], "--only 'nobody'"),
    (["loss", "--compare", "no-such-commit"], "--compare no-such-commit"),
    (["data", "--pairs-per-second", "0"], "--pairs-per-second must be more than 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments_are_one_clear_line(arguments, message, capsys, tmp_path, no_roofs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert cli.main([*arguments, *device]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("load", [0.0, 1000.5])
def test_a_terminal_sees_progress_and_a_busy_machine_is_noted(load, tmp_path, no_roofs, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = ["--device", "cpu", "--smoke", "--only", OURS, "--no-memory", "--json", str(tmp_path / "run.json")]
    assert cli.main(["bias_gelu", *options]) == 0
    said = capsys.readouterr().err
    assert ("the load average was 1000.5" in said) == (load > 0)
    assert all(f"{part}: " in said for part in ("checking", "warming up", "timing all candidates"))


SLOWER = """
import time
_call = Tokenizer.__call__
Tokenizer.__call__ = lambda self, *args, **kwargs: time.sleep(0.02) or _call(self, *args, **kwargs)
"""


def test_compare_measures_each_side_with_its_own_code_and_judges(tmp_path, monkeypatch, capsys):
    # The tokenizer of the side "head" takes 20 ms longer. The difference shows only if each side runs its own code, and
    # not the installed code.
    monkeypatch.setattr(compare, "TURNS", 1)
    no_roofs = f"from clipfast.bench import session; session.measure_roofs = lambda *_: {ROOFS}"
    monkeypatch.setattr(compare, "_START", compare._START.replace("main()", f"{no_roofs}\nmain()"))
    runs = {}
    for side in ("base", "head"):
        site = checkout.link_packages(tmp_path / f"site-{side}")
        if side == "head":
            models = site / "clipfast" / "models"
            original = models.resolve()
            models.unlink()  # the link to the code of this checkout
            shutil.copytree(original, models)
            with (models / "tokenizer.py").open("a") as file:
                file.write(SLOWER)
        sizes = {**SUITES["data"].smallest, "stage": "tokenize"}
        keys = [("data", sizes, "fp32")]
        runs[side] = [compare._measure(site, keys, CPU, Budget(0.0, 3, 3), tmp_path / f"{side}.json")]
    assert compare._verdicts(runs, "main") == 1
    assert "slower" in capsys.readouterr().out
    assert compare._verdicts({"base": runs["head"], "head": runs["base"]}, "main") == 0


@pytest.mark.parametrize(("page", "row"), [("README.md", "| 1,024 |"), ("docs/benchmarks.md", "| ViT-B-32, 64 |")])
def test_tables_of_pages_are_made_of_the_results(page, row):
    root = checkout.ROOT
    text = (root / page).read_text()
    assert text.count(row) == 1
    assert tables.fill_tables(text.replace(row, "| 7 |"), root / "bench" / "results") == text

"""Test the tuner: the configurations that it drops or refuses, and the tables that it writes."""

import argparse
import contextlib
import dataclasses
import functools
import json
import re
from unittest import mock

import pytest
import torch

from clipfast.bench import cli, tune
from clipfast.bench.case import OURS, Candidate
from clipfast.bench.harness import Budget, Timing
from clipfast.bench.suites import build
from clipfast.kernels import configs
from clipfast.kernels.contrastive.shared import logit_blocks
from clipfast.kernels.spec import Draw, Tunable

from ..conftest import ON_GPU
from .conftest import CPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="the tuner ranks configurations without a GPU")
SMALLEST = {"batch": 2, "tokens": 9, "heads": 2, "head_dim": 16, "causal": True}
TARGET = tune.TARGETS["attention-64"][1]
FORWARD = TARGET.kernels[0]
GOOD = configs.LoopedConfig(64, 64, num_warps=4, num_stages=2)
OTHER = configs.LoopedConfig(32, 64, num_warps=4, num_stages=2)
SPILLS = configs.LoopedConfig(128, 128, num_warps=4, num_stages=1)
NO_POWER_OF_2 = configs.LoopedConfig(24, 64, num_warps=4, num_stages=1)
TOO_LARGE = configs.LoopedConfig(128, 128, num_warps=4, num_stages=30)
SEARCH = tune.Search("bf16", 90, keep=3, limit=None, pool=mock.Mock(map=map))  # the pool compiles in this process


def test_what_is_not_sound_is_dropped_and_said(capsys):
    for config, sound, why in ((SPILLS, [GOOD], "spills"), (TOO_LARGE, [], ""), (NO_POWER_OF_2, [], "power of 2")):
        kept = tune.prune(FORWARD, TARGET, [config, *sound], SEARCH)
        assert [one.config for one in kept] == sound
        said = capsys.readouterr().out
        assert str(config) in said
        assert why in said
    gone = Tunable("attention_looped_fwd", "_renamed_kernel", configs.LoopedConfig)
    with pytest.raises(RuntimeError, match="_renamed_kernel"):
        tune.prune(gone, TARGET, [GOOD], SEARCH)


def test_small_tiles_may_miss_the_largest_matrix_units():
    _, target = tune.TARGETS["attention_pool"]
    (pool,) = target.kernels
    committed = configs.RowConfig(**configs.committed(tune.key_of(pool, target, "bf16"), 90))
    assert [one.config for one in tune.prune(pool, target, [committed], SEARCH)] == [committed]
    assert tune.prune(dataclasses.replace(pool, small_tiles=False), target, [committed], SEARCH) == []


def timing(samples, error=1e-3, refused=None):
    """Return a timing of a kernel configuration, as the tuner measures it."""
    return Timing(Candidate(OURS, lambda: torch.clone), samples=samples, errors={"value": error}, refused=refused)


def test_only_what_is_faster_beyond_doubt_and_no_less_accurate_wins():
    committed = timing([1.0, 1.1, 0.9, 1.0])
    faster = timing([0.8, 0.85, 0.75, 0.8], 1.1e-3)
    half = [0.5] * 4
    others = {
        "hardly faster": timing([0.99, 1.09, 0.89, 0.99]),
        "wrong": timing(half, 2e-3),
        "NaN": timing(half, float("nan")),
        "unsure": timing([0.7, 1.3, 0.7, 1.3]),
        "refused": timing([], refused="wrong: value is off by 1.0e+00, allowed 4e-02"),
    }
    assert tune.best([committed, *others.values(), faster], [OTHER] * len(others) + [GOOD]) == GOOD
    for name, other in others.items():
        assert tune.best([committed, other], [OTHER]) is None, name
    with pytest.raises(RuntimeError, match="cannot be timed"):
        tune.best([timing([], refused="no")], [])


KEY, OTHER_KEY = (configs.config_key("attention_looped_fwd", torch.bfloat16, dim) for dim in (64, 96))


def entry(config, by):
    """Return the entry that the tuner writes into its table for a configuration."""
    return configs.entry_of(config) | {"by": by}


def test_entries_join_the_committed_table_and_what_was_measured_stays(tmp_path, monkeypatch):
    def written(key, config, by):
        """Return the table of configurations after the tuner has written an entry."""
        return json.loads(tune.write_table({key: config}, 90, tmp_path, by=by).read_text())

    path = tune.write_table({}, 90, tmp_path, by=tune.MEASURED)
    assert path.read_text() == configs.table_path(90).read_text()
    before = json.loads(path.read_text())
    assert written(KEY, TOO_LARGE, tune.MEASURED) == before | {KEY: entry(TOO_LARGE, "measured")}
    assert written(KEY, GOOD, tune.MODEL)[KEY] == entry(TOO_LARGE, "measured")
    assert written(OTHER_KEY, GOOD, tune.MODEL)[OTHER_KEY] == entry(GOOD, "model")
    limited = dataclasses.replace(OTHER, max_registers=168)
    assert written(OTHER_KEY, limited, tune.MEASURED)[OTHER_KEY] == entry(limited, "measured")
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    assert configs.LoopedConfig(**configs.read_table(90)[OTHER_KEY]) == limited


@pytest.fixture
def tune_all(monkeypatch, tmp_path):
    """Return a function that tunes ops without a GPU: each kernel's timings are the next of the given outcomes."""
    monkeypatch.setattr(tune, "prune", lambda *args: [tune.Ranked(OTHER, None, 0.0)])
    monkeypatch.setattr(tune, "build", lambda suite, shape, dtype, device: build(suite, SMALLEST, dtype, device))

    def run(*ops, outcomes, total=100.0):
        """Tune ops without a GPU, with these timings, and return the exit code of the tuner."""
        monkeypatch.setattr(tune, "measure", mock.Mock(side_effect=outcomes))
        choose = functools.partial(tune.by_timing, device=CPU, budget=Budget(3.0))
        args = argparse.Namespace(total=total, tables=tmp_path, by=tune.MEASURED)
        return tune.tune_all(ops, args, SEARCH, choose)

    return run


SLOW, FAST, REFUSED = timing([1.0] * 20), timing([0.8] * 20), timing([], refused="no memory")


def outcome(committed, other, throttled=False):
    """Return the timings of two configurations, as the tuner's measurement returns them."""
    return [committed, other], {"throttled": throttled}


def test_each_kernel_is_written_before_the_next_is_measured(tune_all, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tune_all("attention-64", outcomes=[outcome(SLOW, FAST), KeyboardInterrupt])
    table = json.loads((tmp_path / "sm_90.json").read_text())
    assert table[tune.key_of(FORWARD, TARGET, "bf16")] == entry(OTHER, "measured")


def test_an_op_that_cannot_be_tuned_does_not_stop_the_next_and_time_does(tune_all, capsys, tmp_path):
    kernels = len(tune.TARGETS["attention-128"][1].kernels)
    outcomes = [outcome(REFUSED, SLOW), *[outcome(SLOW, FAST, throttled=True)] * kernels]
    assert tune_all("attention-64", "attention-128", outcomes=outcomes) == 1
    assert tune.measure.call_count == 1 + kernels
    assert re.search("attention-64: .*cannot be timed: no memory", capsys.readouterr().out)
    assert (tmp_path / "sm_90.json").read_text() == configs.table_path(90).read_text()
    assert tune_all("attention-64", outcomes=[outcome(SLOW, SLOW)], total=0.0) == 0


def test_targets_are_tuned_in_the_order_in_which_they_are_named():
    found = tune.named(["contrastive", "attention", "all"])
    assert found[:3] == ["contrastive", "attention-64", "attention-128"]
    assert found.index(tune.SDPA) < found.index("bias_act")
    assert sorted(found) == sorted([*tune.TARGETS, tune.SDPA])


def test_attention_is_pytorchs_from_the_least_keys_on_where_that_is_surely_faster(monkeypatch, tune_all, tmp_path):
    def measure(case, budget):
        """Let PyTorch's attention be faster at 50 keys and from 197 on (with a causal mask, from 577 on)."""
        least = 577 if case.shape.get("causal") else 197
        assert [one.name for one in case.candidates] == [OURS, "SDPA"]
        return outcome(SLOW, FAST if case.shape["tokens"] >= least or case.shape["tokens"] == 50 else SLOW)

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(
        tune, "build", lambda suite, shape, dtype, device: build(suite, shape | {"batch": 1}, dtype, device)
    )
    assert tune.sdpa_route(64, SEARCH, CPU, Budget(3.0)) == configs.SdpaConfig(197, 577)
    monkeypatch.setattr(tune, "measure", lambda *_: outcome(SLOW, SLOW))
    assert tune.sdpa_route(64, SEARCH, CPU, Budget(3.0)) is None
    monkeypatch.setattr(tune, "measure", lambda *_: outcome(SLOW, FAST, throttled=True))
    assert tune.sdpa_route(64, SEARCH, CPU, Budget(3.0)) is None
    tune.tune_all(
        [tune.SDPA],
        argparse.Namespace(total=9, tables=tmp_path, by=tune.MEASURED),
        SEARCH,
        None,
        lambda *_: configs.SdpaConfig(197, 577),
    )
    key = configs.config_key(tune.SDPA, torch.bfloat16, 64)
    written = json.loads((tmp_path / "sm_90.json").read_text())[key]
    assert written == {"min_keys": 197, "min_keys_causal": 577, "by": "measured"}


def test_the_scale_of_a_target_decides_which_kernel_works():
    spec, target = tune.TARGETS["contrastive-online"]
    shape = dataclasses.replace(target.shape, pairs=512)
    inputs = spec.call(shape, spec.bench_values, Draw(), torch.float32).inputs
    features = (inputs[name] for name in ("image", "text", "logit_scale"))
    assert not logit_blocks(CPU).statistics(*features, 0).uses_shared_shift


ENTRIES = {key for arch in configs.ARCHS for key in configs.read_table(arch)}


def test_every_entry_and_every_width_of_the_tables_can_be_tuned():
    tuned = [(tunable, target) for _, target in tune.TARGETS.values() for tunable in target.kernels]
    in_tables = {tunable.kernel for tunable, _ in tuned}
    assert in_tables == {key.split()[0] for key in ENTRIES} - {tune.SDPA}
    widths = [pair for pair in tuned if pair[0].per_width]
    keys = {tune.key_of(*pair, dtype) for pair in widths for dtype in ("bf16", "fp32")}
    assert keys == {key for key in ENTRIES if " width<=" in key}


def test_every_tunable_kernel_is_launched_and_has_a_committed_entry():
    for _, target in tune.TARGETS.values():
        names = {
            dtype: {launch.kernel.__name__ for launch in tune.launches(target, dtype, 90)} for dtype in ("bf16", "fp32")
        }
        for tunable in target.kernels:
            assert isinstance(next(tune.space(tunable)), tunable.kind)
            assert tunable.function in names["bf16"]
            for dtype in ("bf16", "fp32"):
                is_smaller = tunable.kernel.endswith(("_half", "_small"))
                if tunable.function not in names[dtype] or (dtype == "fp32" and is_smaller):
                    continue  # the tiles of float32 are small already
                key = tune.key_of(tunable, target, dtype)
                # For some numbers of keys, looped attention has an entry of its own, and for others a general one.
                general = key.split(" keys<=")[0] if tunable.kind is configs.LoopedConfig else key
                assert key in ENTRIES or general in ENTRIES


def test_the_model_chooses_what_is_faster_beyond_its_error(monkeypatch):
    seconds = {GOOD: 1.0, OTHER: 0.96}

    def ranked(tunable, target, tried, *_):
        """Return configurations in the order of the times that the tuner's model predicts."""
        return sorted((tune.Ranked(one, None, seconds[one]) for one in tried), key=lambda one: one.seconds)

    monkeypatch.setattr(tune, "space", lambda tunable: iter([OTHER, SPILLS]))
    monkeypatch.setattr(tune, "prune", ranked)
    for predicted, winner in ((0.9, SPILLS), (0.97, None)):
        seconds[SPILLS] = predicted
        assert tune.by_model(FORWARD, TARGET, GOOD, SEARCH) == winner


def test_what_cannot_be_tuned_here_is_refused_before_anything_is_written(capsys, tmp_path):
    assert cli.main(["tune", "--op", "attention-64", "--tables", str(tmp_path), "--card", "H100"]) == 2
    assert "needs the GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_who_chose(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "compilers", lambda jobs: contextlib.nullcontext(SEARCH.pool))
    options = ["--op", "attention-50", "--limit", "1", "--keep", "2", "--tables", str(tmp_path), "--by", "model"]
    assert cli.main(["tune", *options]) == 0
    found, before = (json.loads(path.read_text()) for path in (tmp_path / "sm_90.json", configs.table_path(90)))
    assert all(entry["by"] == "model" for key, entry in found.items() if entry != before.get(key))

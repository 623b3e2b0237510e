"""The tuner: what it drops, what it refuses, and what it writes."""

import argparse
import concurrent.futures
import dataclasses
import json

import pytest
import torch

from clipfast.bench import cli, tune, tune_targets
from clipfast.bench.case import OURS, Candidate
from clipfast.bench.harness import Timing
from clipfast.bench.inspection import offline
from clipfast.bench.suites import build
from clipfast.kernels import configs
from clipfast.kernels.contrastive.logit_blocks import logit_blocks
from clipfast.kernels.spec import Draw, Tunable

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(INTERPRET or ON_GPU, reason="ranks configurations without a GPU")
CPU = torch.device("cpu")
SMALLEST = {"batch": 2, "tokens": 9, "heads": 2, "head_dim": 16, "causal": True}
TARGET = tune_targets.TARGETS["attention-64"][1]
FORWARD = TARGET.kernels[0]
GOOD = configs.LoopedConfig(64, 64, num_warps=4, num_stages=2)
OTHER = configs.LoopedConfig(32, 64, num_warps=4, num_stages=2)
SPILLS = configs.LoopedConfig(128, 128, num_warps=4, num_stages=1)
TOO_LARGE = configs.LoopedConfig(128, 128, num_warps=4, num_stages=30)


class InThisProcess(concurrent.futures.Executor):
    def map(self, fn, *iterables, **kwargs):
        return map(fn, *iterables)


def test_what_spills_or_does_not_fit_is_dropped_and_said(capsys):
    kept = tune.prune(FORWARD, TARGET, "bf16", 90, [SPILLS, TOO_LARGE, GOOD], keep=3, pool=InThisProcess())
    assert [config for config, _ in kept] == [GOOD]
    said = capsys.readouterr().out
    assert f"2 of 3 configurations are not sound: {SPILLS}: " in said
    assert "spills" in said


def test_what_does_not_compile_says_why():
    odd = configs.LoopedConfig(24, 64, num_warps=4, num_stages=1)
    reason = tune._inspect(FORWARD, TARGET, "bf16", 90, odd)
    assert isinstance(reason, str)
    assert "power of 2" in reason


def test_small_tiles_may_miss_the_largest_matrix_units():
    _, target = tune_targets.TARGETS["attention_pool"]
    (pool,) = target.kernels
    committed = configs.RowConfig(**configs.committed(tune_targets.key_of(pool, target, "bf16"), 90))
    assert [c for c, _ in tune.prune(pool, target, "bf16", 90, [committed], keep=1, pool=InThisProcess())] == [
        committed
    ]
    strict = dataclasses.replace(pool, small_tiles=False)
    assert tune.prune(strict, target, "bf16", 90, [committed], keep=1, pool=InThisProcess()) == []


def test_a_kernel_that_is_not_launched_is_an_error():
    gone = Tunable("attention_looped_fwd", "_renamed_kernel", configs.LoopedConfig)
    with pytest.raises(RuntimeError, match=r"attention\.fwd_bwd launches no _renamed_kernel"):
        tune._inspect(gone, TARGET, "bf16", 90, GOOD)


def timing(samples, errors, refused=None):
    return Timing(Candidate(OURS, lambda: torch.clone), samples=samples, errors=errors, refused=refused)


def test_only_what_is_faster_beyond_doubt_and_no_less_accurate_wins():
    committed = timing([1.0, 1.1, 0.9, 1.0], {"value": 1e-3})
    faster, hardly, wrong, unsure, refused = (
        timing([0.8, 0.85, 0.75, 0.8], {"value": 1.1e-3}),
        timing([0.99, 1.09, 0.89, 0.99], {"value": 1e-3}),
        timing([0.5, 0.5, 0.5, 0.5], {"value": 2e-3}),
        timing([0.7, 1.3, 0.7, 1.3], {"value": 1e-3}),
        timing([], {}, "wrong: value is off by 1.0e+00, allowed 4e-02"),
    )
    names = [GOOD, SPILLS, TOO_LARGE, configs.LoopedConfig(16, 16, num_warps=4, num_stages=1)]
    assert tune.best([committed, faster, wrong, unsure, refused], names) == GOOD
    assert tune.best([committed, wrong, unsure, refused], names[1:]) is None
    assert tune.best([committed, hardly], names[:1]) is None
    nan = timing([0.5, 0.5, 0.5, 0.5], {"value": float("nan")})
    assert tune.best([committed, nan], names[:1]) is None


def test_a_committed_configuration_that_cannot_run_is_an_error():
    with pytest.raises(RuntimeError, match="the committed configuration cannot be timed: no"):
        tune.best([timing([], {}, "no")], [])


def test_table_is_written_in_the_committed_form(tmp_path):
    before = (configs.TUNED / "sm_90.json").read_text()
    (tmp_path / "sm_90.json").write_text(before)
    tune.write_table({}, 90, tmp_path)
    assert (tmp_path / "sm_90.json").read_text() == before
    key = configs.config_key("attention_looped_fwd", torch.bfloat16, 64)
    tune.write_table({key: TOO_LARGE}, 90, tmp_path)
    changed = json.loads((tmp_path / "sm_90.json").read_text())
    assert changed.pop(key) == {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 30}
    assert changed == {k: v for k, v in json.loads(before).items() if k != key}


def test_a_new_folder_starts_with_the_committed_table(tmp_path):
    key = configs.config_key("attention_looped_fwd", torch.bfloat16, 64)
    path = tune.write_table({key: TOO_LARGE}, 90, tmp_path / "tables")
    written = json.loads(path.read_text())
    assert written == configs.read_table(90) | {key: dataclasses.asdict(TOO_LARGE)}
    assert list(path.parent.iterdir()) == [path]


def on_a_card(monkeypatch, timings):
    """The tuner as it would be on a card, with timings that are given."""
    monkeypatch.setattr(tune, "_table_arch", lambda device: 90)
    monkeypatch.setattr(tune, "prune", lambda *args: [(OTHER, None)])
    monkeypatch.setattr(tune, "build", lambda suite, shape, dtype, device: build(suite, SMALLEST, dtype, device))
    budgets = []

    def measured(case, budget):
        budgets.append(budget)
        return timings(len(budgets)), {"throttled": False}

    monkeypatch.setattr(tune, "measure", measured)
    return budgets


def arguments(tmp_path, **changed):
    given = {"dtype": "bf16", "seconds": 3.0, "keep": 8, "limit": 4, "total": 100.0, "tables": tmp_path / "out"}
    return argparse.Namespace(**given | changed)


def test_each_kernel_is_written_before_the_next_is_measured(tmp_path, monkeypatch):
    before = []

    def timings(number):
        path = tmp_path / "out" / "sm_90.json"
        before.append(json.loads(path.read_text()) if path.exists() else None)
        if number == 2:
            raise KeyboardInterrupt
        return [timing([1.0] * 20, {}), timing([0.8] * 20, {})]

    budgets = on_a_card(monkeypatch, timings)
    with pytest.raises(KeyboardInterrupt):
        tune._tune_all(["attention-64"], arguments(tmp_path), CPU)
    keys = [tune_targets.key_of(kernel, TARGET, "bf16") for kernel in TARGET.kernels]
    assert before[0] is None
    assert before[1][keys[0]] == dataclasses.asdict(OTHER)
    assert all(budget.min_rounds >= 20 for budget in budgets)


def test_an_op_that_cannot_be_tuned_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    def timings(number):
        return [timing([], {}, "no memory" if number == 1 else None), timing([], {}, "slow")]

    budgets = on_a_card(monkeypatch, timings)
    assert tune._tune_all(["attention-64", "attention-128"], arguments(tmp_path), CPU) == 1
    assert len(budgets) == 3
    assert (
        "attention-64: RuntimeError: the committed configuration cannot be timed: no memory" in capsys.readouterr().out
    )


def test_no_kernel_is_begun_after_the_end(tmp_path, monkeypatch, capsys):
    budgets = on_a_card(monkeypatch, lambda _: [timing([1.0] * 20, {}), timing([1.0] * 20, {})])
    assert tune._tune_all(["attention-64"], arguments(tmp_path, total=0.0), CPU) == 0
    assert len(budgets) == 1
    assert "nothing is tuned after attention_looped_fwd" in capsys.readouterr().out


def test_the_scale_of_a_target_decides_which_kernel_works():
    spec, target = tune_targets.TARGETS["contrastive-online"]
    shape = dataclasses.replace(target.shape, pairs=512)
    inputs = spec.call(shape, spec.bench_values, Draw(), torch.float32).inputs
    stats = logit_blocks(CPU).statistics(inputs["image"], inputs["text"], inputs["logit_scale"], 0)
    assert not stats.uses_shared_shift


def test_every_entry_of_the_tables_can_be_tuned():
    tunable = {tunable.kernel for _, target in tune_targets.TARGETS.values() for tunable in target.kernels}
    assert tunable == {key.split()[0] for arch in configs.ARCHS for key in configs.read_table(arch)}


def test_every_width_can_be_tuned():
    tuned = {
        tune_targets.key_of(tunable, target, dtype)
        for _, target in tune_targets.TARGETS.values()
        for tunable in target.kernels
        for dtype in ("bf16", "fp32")
        if tunable.per_width
    }
    assert tuned == {key for arch in configs.ARCHS for key in configs.read_table(arch) if " width<=" in key}


@pytest.mark.parametrize("op", tune_targets.TARGETS)
def test_every_tunable_kernel_is_launched(op):
    spec, target = tune_targets.TARGETS[op]
    case = build(spec.suite_name, tune._small(target.shape.to_dict()), "bf16", CPU)
    names = {launch.kernel.__name__ for launch in offline.record(90, lambda: tune._once(case))}
    assert {tunable.function for tunable in target.kernels} <= names


@pytest.mark.parametrize("op", tune_targets.TARGETS)
def test_every_tunable_kernel_has_a_committed_entry(op):
    _, target = tune_targets.TARGETS[op]
    for tunable in target.kernels:
        # heads of float32 do not fit the registers
        for dtype in ("bf16",) if tunable.kind is configs.ShortConfig else ("bf16", "fp32"):
            key = tune_targets.key_of(tunable, target, dtype)
            assert any(key in configs.read_table(arch) for arch in configs.ARCHS), key
        assert isinstance(next(tune_targets.space(tunable)), tunable.kind)


def test_the_override_reaches_forward_and_backward():
    key = configs.config_key("attention_looped_fwd", torch.bfloat16, 64)
    with configs.override(key, GOOD):
        assert configs.attention_config(configs.LoopedConfig, "attention_looped_fwd", 80, torch.bfloat16, 50) == GOOD
        assert configs.attention_config(configs.LoopedConfig, "attention_looped_fwd", 80, torch.bfloat16, 80) != GOOD
    assert configs.attention_config(configs.LoopedConfig, "attention_looped_fwd", 80, torch.bfloat16, 50) != GOOD
    with (
        configs.override(key, configs.RowConfig(1, 1, 1, 1)),
        pytest.raises(TypeError, match="expected a LoopedConfig"),
    ):
        configs.attention_config(configs.LoopedConfig, "attention_looped_fwd", 80, torch.bfloat16, 50)


def test_spread_takes_from_everywhere():
    numbers = list(range(10))
    assert tune.spread(numbers, 3) == [0, 3, 6]
    assert tune.spread(numbers, None) == tune.spread(numbers, 20) == numbers


def test_tuning_without_the_card_is_a_clear_error(capsys, tmp_path):
    assert cli.main(["tune", "--op", "attention-64", "--card", "H100", "--tables", str(tmp_path)]) == 2
    assert "tuning needs the GPU that is tuned for: --dry ranks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_dry_run_ranks_the_committed_one_among_others(capsys):
    assert cli.main(["tune", "--op", "attention-64", "--dry", "--arch", "90", "--limit", "2", "--keep", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("configurations:") == 2
    assert "<- committed" in printed

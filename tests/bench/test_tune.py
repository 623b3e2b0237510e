"""The tuner: what it drops, what it refuses, and what it writes."""

import argparse
import dataclasses
import functools
import json
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

pytestmark = pytest.mark.skipif(ON_GPU, reason="ranks configurations without a GPU")
SMALLEST = {"batch": 2, "tokens": 9, "heads": 2, "head_dim": 16, "causal": True}
TARGET = tune.TARGETS["attention-64"][1]
FORWARD = TARGET.kernels[0]
GOOD = configs.LoopedConfig(64, 64, num_warps=4, num_stages=2)
OTHER = configs.LoopedConfig(32, 64, num_warps=4, num_stages=2)
SPILLS = configs.LoopedConfig(128, 128, num_warps=4, num_stages=1)
TOO_LARGE = configs.LoopedConfig(128, 128, num_warps=4, num_stages=30)


SEARCH = tune.Search("bf16", 90, keep=3, limit=None, pool=mock.Mock(map=map))  # compiles in this process


def test_what_spills_or_does_not_fit_is_dropped_and_said(capsys):
    kept = tune.prune(FORWARD, TARGET, [SPILLS, TOO_LARGE, GOOD], SEARCH)
    assert [one.config for one in kept] == [GOOD]
    said = capsys.readouterr().out
    assert f"2 of 3 configurations are not sound: {SPILLS}: " in said
    assert "spills" in said


def test_what_does_not_compile_says_why(capsys):
    assert tune.prune(FORWARD, TARGET, [configs.LoopedConfig(24, 64, num_warps=4, num_stages=1)], SEARCH) == []
    assert "power of 2" in capsys.readouterr().out


def test_small_tiles_may_miss_the_largest_matrix_units():
    _, target = tune.TARGETS["attention_pool"]
    (pool,) = target.kernels
    committed = configs.RowConfig(**configs.committed(tune.key_of(pool, target, "bf16"), 90))
    assert [one.config for one in tune.prune(pool, target, [committed], SEARCH)] == [committed]
    assert tune.prune(dataclasses.replace(pool, small_tiles=False), target, [committed], SEARCH) == []


def test_a_kernel_that_is_not_launched_is_an_error():
    gone = Tunable("attention_looped_fwd", "_renamed_kernel", configs.LoopedConfig)
    with pytest.raises(RuntimeError, match="attention-64 launches no _renamed_kernel"):
        tune.prune(gone, TARGET, [GOOD], SEARCH)


def timing(samples, errors, refused=None):
    return Timing(Candidate(OURS, lambda: torch.clone), samples=samples, errors=errors, refused=refused)


def test_only_what_is_faster_beyond_doubt_and_no_less_accurate_wins():
    committed = timing([1.0, 1.1, 0.9, 1.0], {"value": 1e-3})
    faster = timing([0.8, 0.85, 0.75, 0.8], {"value": 1.1e-3})
    others = {
        "hardly faster": timing([0.99, 1.09, 0.89, 0.99], {"value": 1e-3}),
        "wrong": timing([0.5, 0.5, 0.5, 0.5], {"value": 2e-3}),
        "NaN": timing([0.5, 0.5, 0.5, 0.5], {"value": float("nan")}),
        "unsure": timing([0.7, 1.3, 0.7, 1.3], {"value": 1e-3}),
        "refused": timing([], {}, "wrong: value is off by 1.0e+00, allowed 4e-02"),
    }
    assert tune.best([committed, *others.values(), faster], [OTHER] * len(others) + [GOOD]) == GOOD
    for name, other in others.items():
        assert tune.best([committed, other], [OTHER]) is None, name
    with pytest.raises(RuntimeError, match="the committed configuration cannot be timed: no"):
        tune.best([timing([], {}, "no")], [])


def test_a_new_folder_starts_with_the_committed_table_in_its_form(tmp_path):
    path = tune.write_table({}, 90, tmp_path / "tables", by=tune.MEASURED)
    assert path.read_text() == configs.table_path(90).read_text()
    key = configs.config_key("attention_looped_fwd", torch.bfloat16, 64)
    tune.write_table({key: TOO_LARGE}, 90, path.parent, by=tune.MEASURED)
    before = json.loads(configs.table_path(90).read_text())
    assert json.loads(path.read_text()) == before | {key: configs.entry_of(TOO_LARGE) | {"by": "measured"}}
    assert list(path.parent.iterdir()) == [path]


def test_what_has_no_limit_is_not_written(tmp_path):
    key = configs.config_key("attention_key_bwd", torch.bfloat16, 64)
    for config in (GOOD, dataclasses.replace(GOOD, max_registers=168)):
        entry = json.loads(tune.write_table({key: config}, 90, tmp_path, by=tune.MODEL).read_text())[key]
        assert configs.LoopedConfig(**{name: entry[name] for name in entry if name != "by"}) == config
        assert ("max_registers" in entry) == (config.max_registers is not None)


def test_what_was_measured_wins_over_the_model(tmp_path, capsys):
    key, other = (configs.config_key("attention_looped_fwd", torch.bfloat16, dim) for dim in (64, 96))
    tune.write_table({key: TOO_LARGE}, 90, tmp_path, by=tune.MEASURED)
    path = tune.write_table({key: GOOD, other: GOOD}, 90, tmp_path, by=tune.MODEL)
    table = json.loads(path.read_text())
    assert table[key] == configs.entry_of(TOO_LARGE) | {"by": "measured"}
    assert table[other] == configs.entry_of(GOOD) | {"by": "model"}
    assert f"{key}: the entry that was measured stays" in capsys.readouterr().out
    tune.write_table({other: OTHER}, 90, tmp_path, by=tune.MEASURED)
    assert json.loads(path.read_text())[other]["by"] == "measured"


def test_who_chose_an_entry_is_no_field_of_a_configuration(tmp_path, monkeypatch):
    key = configs.config_key("attention_looped_fwd", torch.bfloat16, 64)
    tune.write_table({key: GOOD}, 90, tmp_path, by=tune.MODEL)
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    assert configs.read_table(90)[key] == configs.entry_of(GOOD)


@pytest.fixture
def tune_all(monkeypatch, tmp_path):
    """A function that tunes ops as on a card, where each kernel is measured with the next of the given outcomes."""
    monkeypatch.setattr(tune, "prune", lambda *args: [tune.Candidate(OTHER, None, 0.0)])
    monkeypatch.setattr(tune, "build", lambda suite, shape, dtype, device: build(suite, SMALLEST, dtype, device))

    def run(*ops, outcomes, total=100.0):
        monkeypatch.setattr(tune, "measure", mock.Mock(side_effect=outcomes))
        budget = Budget(3.0, min_rounds=tune.MIN_ROUNDS)
        tuned = functools.partial(tune.tune, device=CPU, budget=budget, search=SEARCH)
        return tune._tune_all(ops, argparse.Namespace(total=total, tables=tmp_path, by=tune.MEASURED), tuned, 90)

    return run


def outcome(committed, other):
    return [committed, other], {"throttled": False}


SLOW, FAST = timing([1.0] * 20, {}), timing([0.8] * 20, {})


def test_each_kernel_is_written_before_the_next_is_measured(tune_all, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tune_all("attention-64", outcomes=[outcome(SLOW, FAST), KeyboardInterrupt])
    table = json.loads((tmp_path / "sm_90.json").read_text())
    assert table[tune.key_of(FORWARD, TARGET, "bf16")] == configs.entry_of(OTHER) | {"by": "measured"}
    assert tune.measure.call_args.args[1].min_rounds >= 20


def test_an_op_that_cannot_be_tuned_does_not_stop_the_next(tune_all, capsys):
    kernels = len(tune.TARGETS["attention-128"][1].kernels)
    outcomes = [outcome(timing([], {}, "no memory"), SLOW), *[outcome(SLOW, SLOW)] * kernels]
    assert tune_all("attention-64", "attention-128", outcomes=outcomes) == 1
    assert tune.measure.call_count == 1 + kernels
    reason = "attention-64: RuntimeError: the committed configuration cannot be timed: no memory"
    assert reason in capsys.readouterr().out


def test_no_kernel_is_begun_after_the_end(tune_all, capsys):
    assert tune_all("attention-64", outcomes=[outcome(SLOW, SLOW)], total=0.0) == 0
    assert "nothing is tuned after attention_looped_fwd" in capsys.readouterr().out


def test_the_scale_of_a_target_decides_which_kernel_works():
    spec, target = tune.TARGETS["contrastive-online"]
    shape = dataclasses.replace(target.shape, pairs=512)
    inputs = spec.call(shape, spec.bench_values, Draw(), torch.float32).inputs
    stats = logit_blocks(CPU).statistics(inputs["image"], inputs["text"], inputs["logit_scale"], 0)
    assert not stats.uses_shared_shift


ENTRIES = {key for arch in configs.ARCHS for key in configs.read_table(arch)}


def test_every_entry_and_every_width_of_the_tables_can_be_tuned():
    tuned = [(tunable, target) for _, target in tune.TARGETS.values() for tunable in target.kernels]
    in_tables = {tunable.kernel for tunable, _ in tuned}
    assert in_tables == {key.split()[0] for key in ENTRIES}
    widths = [pair for pair in tuned if pair[0].per_width]
    keys = {tune.key_of(*pair, dtype) for pair in widths for dtype in ("bf16", "fp32")}
    assert keys == {key for key in ENTRIES if " width<=" in key}


@pytest.mark.parametrize("op", tune.TARGETS)
def test_every_tunable_kernel_is_launched_and_has_a_committed_entry(op):
    _, target = tune.TARGETS[op]
    names = {
        dtype: {launch.kernel.__name__ for launch in tune.launches(target, dtype, 90)} for dtype in ("bf16", "fp32")
    }
    for tunable in target.kernels:
        assert isinstance(next(tune.space(tunable)), tunable.kind)
        assert tunable.function in names["bf16"]
        assert tune.key_of(tunable, target, "bf16") in ENTRIES
        if tunable.function in names["fp32"] and tune.key_of(tunable, target, "fp32") not in ENTRIES:
            # of looped attention, some numbers of keys have an entry of their own, and the others' serves float32
            assert tunable.kind is configs.LoopedConfig
            assert tune.key_of(tunable, target, "fp32").split(" keys<=")[0] in ENTRIES


def test_the_override_reaches_forward_and_backward():
    key = configs.config_key("attention_looped_fwd", torch.bfloat16, 64)

    def configured(head_dim):
        return configs.looped_config("attention_looped_fwd", 80, torch.bfloat16, head_dim, 577)

    with configs.override(key, GOOD):
        assert configured(50) == GOOD != configured(80)
    assert configured(50) != GOOD
    wrong = configs.override(key, configs.RowConfig(1, 1, num_warps=1, num_stages=1))
    with wrong, pytest.raises(TypeError, match="expected a LoopedConfig"):
        configured(50)


def test_spread_takes_from_everywhere():
    numbers = list(range(10))
    assert tune.spread(numbers, 3) == [0, 3, 6]
    assert tune.spread(numbers, None) == tune.spread(numbers, 20) == numbers


def test_tuning_without_the_card_is_a_clear_error(capsys, tmp_path):
    assert cli.main(["tune", "--op", "attention-64", "--card", "H100", "--tables", str(tmp_path)]) == 2
    assert "tuning needs the GPU that is tuned for: --by model, or --dry, does without one" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_model_chooses_what_is_faster_beyond_its_error(capsys, monkeypatch, tmp_path):
    seconds = {GOOD: 1.0, OTHER: 0.96, SPILLS: 0.9}
    report = mock.Mock(failures=())
    monkeypatch.setattr(tune, "space", lambda tunable: iter([OTHER, SPILLS]))
    monkeypatch.setattr(tune, "_committed", lambda *args: GOOD)
    monkeypatch.setattr(
        tune, "prune", lambda tunable, target, tried, *_: sorted(
            (tune.Candidate(config, report, seconds[config]) for config in tried), key=lambda one: one.seconds
        )
    )  # fmt: skip
    winners = dict(tune.tune_by_model("attention-64", SEARCH))
    assert set(winners.values()) == {SPILLS}
    seconds[SPILLS] = 0.97
    assert set(dict(tune.tune_by_model("attention-64", SEARCH)).values()) == {None}


def test_tuning_by_model_writes_who_chose_and_needs_the_architecture_of_the_model(capsys, tmp_path):
    options = ["--by", "model", "--op", "attention-50", "--limit", "2", "--keep", "2", "--tables", str(tmp_path)]
    assert cli.main(["tune", *options, "--arch", "80"]) == 2
    assert "--by model: there is a model of sm_90 only, got --arch 80" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["tune", *options]) == 0
    written = json.loads((tmp_path / "sm_90.json").read_text())
    before = json.loads(configs.table_path(90).read_text())
    assert all(entry["by"] == "model" for key, entry in written.items() if entry != before.get(key))


def test_dry_run_ranks_the_committed_one_among_others(capsys):
    assert cli.main(["tune", "--op", "attention-64", "--dry", "--arch", "90", "--limit", "2", "--keep", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("configurations:") == len(TARGET.kernels)
    assert "<- committed" in printed

"""The tuner: what it drops, what it refuses, and what it writes."""

import json

import pytest
import torch

from clipfast.bench import cli, tune
from clipfast.bench.case import OURS, Candidate
from clipfast.bench.harness import Timing
from clipfast.kernels import configs

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(INTERPRET or ON_GPU, reason="ranks configurations without a GPU")
TARGET = tune.TARGETS["attention-64"]
FORWARD = TARGET.kernels[0]
GOOD = configs.AttentionConfig(64, 64, num_warps=4, num_stages=2)
SPILLS = configs.AttentionConfig(128, 128, num_warps=4, num_stages=1)
TOO_LARGE = configs.AttentionConfig(128, 128, num_warps=4, num_stages=30)


def test_what_spills_or_does_not_fit_is_dropped():
    kept = tune.prune(FORWARD, TARGET, "bf16", 90, [SPILLS, TOO_LARGE, GOOD], keep=3)
    assert [config for config, _ in kept] == [GOOD]


def timing(samples, errors, refused=None):
    return Timing(Candidate(OURS, lambda: torch.clone), samples=samples, errors=errors, refused=refused)


def test_only_what_is_faster_beyond_doubt_and_no_less_accurate_wins():
    committed = timing([1.0, 1.1, 0.9, 1.0], {"value": 1e-3})
    faster, wrong, unsure, refused = (
        timing([0.8, 0.85, 0.75, 0.8], {"value": 1.1e-3}),
        timing([0.5, 0.5, 0.5, 0.5], {"value": 2e-3}),
        timing([0.7, 1.3, 0.7, 1.3], {"value": 1e-3}),
        timing([], {}, "wrong: value is off by 1.0e+00, allowed 4e-02"),
    )
    names = [GOOD, SPILLS, TOO_LARGE, configs.AttentionConfig(16, 16, num_warps=4, num_stages=1)]
    assert tune.best([committed, faster, wrong, unsure, refused], names) == GOOD
    assert tune.best([committed, wrong, unsure, refused], names[1:]) is None
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
    key = configs.config_key("attention_fwd", torch.bfloat16, 64)
    tune.write_table({key: TOO_LARGE}, 90, tmp_path)
    changed = json.loads((tmp_path / "sm_90.json").read_text())
    assert changed.pop(key) == {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 30}
    assert changed == {k: v for k, v in json.loads(before).items() if k != key}


@pytest.mark.parametrize("op", tune.TARGETS)
def test_every_tunable_kernel_has_a_committed_entry(op):
    target = tune.TARGETS[op]
    for tunable in target.kernels:
        for dtype in ("bf16", "fp32"):
            key = tune.key_of(tunable, target, dtype)
            assert any(key in configs.read_table(arch) for arch in configs.ARCHS), key
        assert isinstance(next(tune.space(tunable.kind)), tunable.kind)


def test_the_override_reaches_forward_and_backward():
    key = configs.config_key("attention_bwd_dq", torch.bfloat16, 64)
    with configs.override(key, GOOD):
        assert configs.attention_config("attention_bwd_dq", 80, torch.bfloat16, 50) == GOOD
        assert configs.attention_config("attention_bwd_dq", 80, torch.bfloat16, 80) != GOOD
    assert configs.attention_config("attention_bwd_dq", 80, torch.bfloat16, 50) != GOOD
    with (
        configs.override(key, configs.RowConfig(1, 1, 1, 1)),
        pytest.raises(TypeError, match="expected a AttentionConfig"),
    ):
        configs.attention_config("attention_bwd_dq", 80, torch.bfloat16, 50)


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
    assert printed.count("configurations:") == 3
    assert "<- committed" in printed

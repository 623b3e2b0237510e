"""The command that runs OpenCLIP's trainer through ``clipfast.run`` and without, and compares."""

import pytest

from clipfast.bench.adoption import trainer

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def run_of(*losses, seconds=(1.0, 2.0, 9.0), peak=100):
    """A training that printed these losses."""
    return trainer.Run("3.3.0", [[("Loss", each)] for each in losses], list(seconds), sum(seconds), peak * 2**20)


def test_steps_with_equal_losses_are_counted():
    one = run_of("2.7", "2.6", "2.5")
    assert trainer.count_equal([one, one, one]) == 3
    assert trainer.count_equal([one, run_of("2.7", "2.61", "2.5")]) == 2
    assert trainer.count_equal([one, run_of("2.7")]) == trainer.count_equal([run_of("2.7"), one]) == 1
    nothing = trainer.Run("3.3.0", [[], []], [], 0.0, 0)
    assert trainer.count_equal([nothing, nothing]) == 0


def test_other_work_on_the_machine_is_left_out():
    assert trainer.lower_quartile([9.0]) == 9.0
    assert trainer.lower_quartile([9.0, 1.0, 7.0, 8.0]) == 1.0
    assert trainer.lower_quartile([9.0, 1.0, 7.0, 8.0, 2.0]) == 2.0


def test_the_table(monkeypatch, capsys):
    calls = []
    loss = {1: "2.5", 2: "2.6"}

    def train(*, ours, ranks, steps, batch):
        calls.append((ours, ranks, steps, batch))
        losses = ["2.7"] * (steps - 1) + [loss[ranks] if ours else "2.5"]
        return run_of(*losses, seconds=[1.0] if ours else [3.0, 2.0, 9.0, 8.0], peak=90 if ours else 100)

    monkeypatch.setattr(trainer, "train", train)
    assert trainer.main(["--steps", "6", "--rounds", "2", "--ranks", "1"]) == 0
    assert calls == [(True, 1, 6, 16), (False, 1, 6, 16)] * 2
    head, line, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == line.count("|") == rows[0].count("|")
    assert rows == ["| 3.3.0 | 1 | 6 of 6 | 2.000 | 1.000 | 2.00 | 22.0 | 1.0 | 100 | 90 |"]
    assert trainer.main(["--steps", "6", "--rounds", "1"]) == 1
    assert [row.split(" | ")[2] for row in capsys.readouterr().out.splitlines()[2:]] == ["6 of 6", "5 of 6"]


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--ranks", "2", "0"], ["--steps", "5"], ["--batch", "-1"]])
def test_a_wrong_number(wrong, capsys):
    with pytest.raises(SystemExit):
        trainer.main(wrong)
    assert "must be at least 1 and --steps more than 5, got --ranks" in capsys.readouterr().err


@pytest.mark.long
def test_a_training_of_each_kind(monkeypatch):
    pytest.importorskip("open_clip_train")
    monkeypatch.setattr(trainer, "SMALL", TINY)
    runs = [trainer.train(ours=ours, ranks=1, steps=6, batch=4) for ours in (False, True)]
    assert trainer.count_equal(runs) == 6
    for run in runs:
        assert len(run.seconds) == 1
        assert 0 < run.seconds[0] < run.all_seconds
        assert 2**25 < run.peak < 2**34


def test_a_training_that_fails(monkeypatch):
    monkeypatch.setattr(trainer, "PROGRAM", "raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match=r"(?s)-m trainer .* ended with 1:\nno such thing"):
        trainer.train(ours=False, ranks=1, steps=6, batch=4)

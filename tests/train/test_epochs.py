"""The length of a training run: epochs that need not be whole numbers of batches, or a budget of pairs."""

import math

import pytest

from clipfast.checkpoints.checkpoint import read_checkpoint
from clipfast.cli.main import main
from clipfast.data import BudgetedBatches, EqualBatches, TokenBudget
from clipfast.train import TrainConfig
from clipfast.train.loop import train
from clipfast.train.schedule import Epochs, cosine_lr

from .test_training import results_of


@pytest.mark.parametrize(("num_samples", "batch_size"), [(32, 8), (30, 8), (7, 7), (100, 33), (9, 8)])
@pytest.mark.parametrize("samples_seen", [1, 30, 31, 64, 1001])
def test_every_step_is_in_one_epoch(num_samples, batch_size, samples_seen):
    plan = EqualBatches(batch_size)
    epochs = Epochs(num_samples, plan, plan.batches_for(samples_seen))
    assert epochs.total_steps == math.ceil(samples_seen / batch_size)
    step, ends = 0, []
    while step < epochs.total_steps:
        epoch = epochs.after(step)
        assert epoch.first <= step < epoch.stop <= epochs.total_steps
        assert epochs.after(epoch.stop - 1) == epoch
        step = epoch.stop
        ends.append(step)
        # an epoch ends with the batch that contains its last pair, and not before
        whole = (epoch.number + 1) * num_samples
        assert epochs.ends_with(step) == (step * batch_size >= whole)
        assert epochs.ends_with(step) or step == epochs.total_steps
    assert len(ends) == epochs.number
    assert [n for n in range(1, epochs.total_steps) if epochs.ends_with(n)] == [n for n in ends if n < step]


@pytest.mark.parametrize("plan", [EqualBatches(8), BudgetedBatches(TokenBudget((8, 16), max_tokens=64), 0)])
def test_an_epoch_may_be_much_longer_than_the_run(plan):
    epochs = Epochs(10**15, plan, 9)
    assert [epochs.after(step) for step in (0, 8)] == [(0, 0, 9)] * 2
    assert epochs.number == 1
    assert not any(map(epochs.ends_with, range(10)))


def test_a_run_ends_within_an_epoch_and_goes_on_with_a_larger_budget(small, tmp_path, capsys):
    """An epoch has 32 pairs in 4 steps, so a budget of 43 pairs ends in the second epoch."""
    budget = {"epochs": TrainConfig.epochs, "save_frequency": 1, "samples_seen": 43}
    folder, _ = train(small(**budget))
    lines = [line for line in folder.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["lr"] == cosine_lr(5, 1e-3, 2, 6)
    # The budget ends within the second epoch, so only the first epoch has a checkpoint of its end.
    steps = {path.name: steps_of(path) for path in folder.checkpoints.glob("*.pt")}
    assert steps == {"epoch_1.pt": 4, "step_4.pt": 4, "step_6.pt": 6, "epoch_latest.pt": 6}
    assert "Train Epoch: 1 [16/16 (100%)]" in (folder.path / "out.log").read_text()
    assert (results_of(folder.path)["steps"], results_of(folder.path)["samples_seen"]) == (6, 48)
    with pytest.raises(ValueError, match=r"within an epoch, .* --batch-size \(was 8"):
        train(small(**budget | {"samples_seen": 96}, batch_size=16), folder.latest)
    with pytest.raises(ValueError, match=r"finished 6 of 6 steps.*more --samples-seen"):
        train(small(**budget, wd=0.5), folder.latest)
    assert main(["train", "--resume", str(folder.path), "--samples-seen", "72"]) == 0
    assert "--samples-seen 43 -> 72" in capsys.readouterr().err
    assert (results_of(folder.path)["steps"], results_of(folder.path)["samples_seen"]) == (9, 72)
    # In a resumed run, --epochs replaces the run's --samples-seen, and --samples-seen its --epochs.
    for flag, value, step in (("--epochs", "3", 12), ("--samples-seen", "112", 14)):
        assert main(["train", "--resume", str(folder.path), flag, value]) == 0
        assert steps_of(folder.latest) == step


def steps_of(path):
    """Return the number of training steps before a checkpoint was written."""
    return read_checkpoint(path)["clipfast"]["progress"]["step"]

"""How long a run is: epochs that need not be whole numbers of batches, and a budget of pairs in their place."""

import dataclasses
import json
import math
import shutil

import pytest

from clipfast.checkpoint import read_checkpoint
from clipfast.cli import main
from clipfast.training import TrainConfig
from clipfast.training.epochs import Epochs
from clipfast.training.loop import train
from clipfast.training.schedule import cosine_lr

from .test_training import config, same, saved_step, stopped_after


@pytest.mark.parametrize(("num_samples", "batch_size"), [(32, 8), (30, 8), (7, 7), (100, 33), (9, 8)])
@pytest.mark.parametrize("samples_seen", [1, 8, 29, 30, 31, 64, 100, 1001])
def test_every_step_is_in_one_epoch(num_samples, batch_size, samples_seen):
    epochs = Epochs(num_samples, batch_size, samples_seen)
    assert epochs.total_steps == math.ceil(samples_seen / batch_size)
    step, ends = 0, []
    while step < epochs.total_steps:
        epoch = epochs.after(step)
        assert epoch.first <= step < epoch.stop <= epochs.total_steps
        assert epochs.after(epoch.stop - 1) == epoch
        step = epoch.stop
        ends.append(step)
        # an epoch ends with the batch that brings its last pair, and not before
        whole = (epoch.number + 1) * num_samples
        assert epochs.ends_with(step) == (step * batch_size >= whole)
        assert epochs.ends_with(step) or step == epochs.total_steps
    assert len(ends) == epochs.number
    assert [n for n in range(1, epochs.total_steps) if epochs.ends_with(n)] == [n for n in ends if n < step]


def budget(shards, tmp_path, samples_seen, **options):
    """Epochs of 32 pairs in steps of 8, in a run of ``samples_seen`` pairs."""
    whole = {"samples_seen": samples_seen, "epochs": TrainConfig.epochs, "save_frequency": 1} | options
    return config(shards, tmp_path, **whole)


def test_a_run_ends_within_an_epoch(shards, tmp_path):
    folder, _ = train(budget(shards, tmp_path, 43, val_data=shards))
    metrics = folder.metrics()
    losses = {line["step"]: line["lr"] for line in metrics if "loss" in line}
    assert list(losses) == [2, 4, 6]
    assert losses[6] == cosine_lr(5, 1e-3, 2, 6)
    assert [line["step"] for line in metrics if "eval" in line] == [4, 6]
    # epoch_1.pt is the one epoch that was finished
    checkpoints = {path.name: read_checkpoint(path) for path in folder.checkpoints.glob("*.pt")}
    steps = {name: checkpoint["clipfast"]["progress"]["step"] for name, checkpoint in checkpoints.items()}
    assert steps == {"epoch_1.pt": 4, "step_4.pt": 4, "step_6.pt": 6, "epoch_latest.pt": 6}
    log = (folder.path / "out.log").read_text()
    assert "6 steps of 8 pairs" in log
    assert "Train Epoch: 1 [16/16 (100%)]" in log
    results = json.loads((folder.path / "results.json").read_text())
    assert (results["steps"], results["samples_seen"], results["images"]) == (6, 48, 48)


def test_a_budget_of_whole_epochs_is_the_same_run(shards, tmp_path):
    by_epochs, _ = train(config(shards, tmp_path / "epochs", save_frequency=1))
    by_pairs, _ = train(budget(shards, tmp_path / "pairs", 64))
    assert same(by_epochs.path, by_pairs.path)
    for folder in (by_epochs, by_pairs):
        assert (folder.checkpoints / "epoch_2.pt").exists()


def test_a_budget_is_resumed_to_the_last_bit(shards, tmp_path):
    options = budget(shards, tmp_path / "whole", 75)
    whole, _ = train(options)
    options = dataclasses.replace(options, logs=str(tmp_path / "part"), save_every=1)
    with stopped_after(9):
        train(options)
    part = tmp_path / "part" / "run"
    train(options, part / "checkpoints" / "epoch_latest.pt")
    assert same(whole.path, part)
    assert saved_step(part) == 10


def test_a_larger_budget_goes_on_within_the_epoch(shards, tmp_path, capsys):
    folder, _ = train(budget(shards, tmp_path, 48))
    with pytest.raises(ValueError, match=r"from within an epoch, whose data cannot change: leave --batch-size \(was 8"):
        train(budget(shards, tmp_path, 96, batch_size=16), folder.latest)
    with pytest.raises(ValueError, match=r"finished after 6 steps.*only more --samples-seen would continue it"):
        train(budget(shards, tmp_path, 48, wd=0.5), folder.latest)
    shutil.copytree(tmp_path / "run", tmp_path / "other" / "run")
    assert main(["train", "--resume", str(folder.path), "--samples-seen", "72"]) == 0
    assert "--samples-seen 48 -> 72" in capsys.readouterr().err
    assert saved_step(folder.path) == 9
    results = json.loads((folder.path / "results.json").read_text())
    assert (results["steps"], results["samples_seen"]) == (9, 72)
    # --epochs takes the place of a budget, and a budget that of --epochs
    assert main(["train", "--resume", str(tmp_path / "other" / "run"), "--epochs", "2"]) == 0
    assert saved_step(tmp_path / "other" / "run") == 8
    assert main(["train", "--resume", str(tmp_path / "other" / "run"), "--samples-seen", "72"]) == 0
    assert saved_step(tmp_path / "other" / "run") == 9

"""The learning rate: OpenCLIP's schedules step by step, warm-ups that fit the run, and rates of resumed runs."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from clipfast.data import EqualBatches
from clipfast.train import TrainConfig
from clipfast.train.loop import changed_options
from clipfast.train.optim import parse_arguments
from clipfast.train.schedule import LONGEST_AUTO_WARMUP, Epochs, Schedule, schedule_of, warmup_steps

STEPS, EPOCHS = 120, Epochs(160, EqualBatches(8), 120)  # a run of 6 epochs of 20 steps


def schedule(total=STEPS, epochs=EPOCHS, **options):
    """Return the schedule of learning rates for a training run with these options."""
    return schedule_of(TrainConfig(**{"train_data": "x.tar", "lr": 7e-4, "epochs": 6} | options), total, epochs)


@pytest.mark.parametrize(
    ("options", "theirs", "arguments"),
    [
        ("lr_scheduler=cosine", "cosine_lr", ()),
        ("lr_scheduler=const", "const_lr", ()),
        ("lr_scheduler=const-cooldown epochs_cooldown=2", "const_lr_cooldown", (40,)),
        (
            "lr_scheduler=const-cooldown epochs_cooldown=6 lr_cooldown_power=0.5 lr_cooldown_end=1e-5",
            "const_lr_cooldown", (120, 0.5, 1e-5),
        ),
        ("lr_scheduler=wsd decay_fraction=0.25 lr_cooldown_power=2.0", "const_lr_cooldown", (30, 2.0)),
        ("lr_scheduler=wsd decay_fraction=1", "const_lr_cooldown", (120,)),
    ],
)  # fmt: skip
def test_schedules_are_those_of_open_clip(options, theirs, arguments):
    original = pytest.importorskip("open_clip_train.scheduler")
    for warmup in (0, 1, 13, 119, 400):
        adjust = getattr(original, theirs)(SimpleNamespace(param_groups=[{}]), 7e-4, warmup, STEPS, *arguments)
        ours = schedule(**parse_arguments(options.split()), warmup=warmup)
        # OpenCLIP may round the last digit of the angle differently
        rates = [ours.at(step) for step in range(STEPS)]
        assert rates == pytest.approx([adjust(step) for step in range(STEPS)], rel=0, abs=1e-18)


def test_constant_rates():
    """The learning rate is constant with a decay of length 0 and without a scheduler, also without a warm-up."""
    for options in ({"lr_scheduler": "wsd", "decay_fraction": 0, "warmup": 0}, {"skip_scheduler": True, "warmup": 50}):
        assert {schedule(**options).at(step) for step in range(STEPS)} == {7e-4}
    assert schedule(total=0, warmup=0).at(0) == 7e-4
    assert Schedule(1.0, 0, 5, 5).at(5) == 0.0  # the learning rate one step beyond the end


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        (2000, 10, 2000), (1, 10, 1), (1.0, 10, 1), (0, 10, 0), (0.0, 10, 0), (0.05, 1000, 50), (0.05, 9, 0),
        (0.999, 1000, 999), ("auto", 1000, 100), ("auto", 3, 0), ("auto", 10**6, LONGEST_AUTO_WARMUP),
    ],
)  # fmt: skip
def test_warmup_is_a_number_or_a_share(warmup, total, steps):
    assert warmup_steps(warmup, total) == steps
    assert schedule(total=total, warmup=warmup).warmup == steps


def test_cooldown_counts_the_steps_of_whole_epochs():
    uneven = Epochs(10, EqualBatches(4), 8)  # epochs end after 3, 5 and 8 steps
    assert schedule(8, uneven, lr_scheduler="const-cooldown", epochs_cooldown=2).cooldown == 5
    with pytest.raises(ValueError, match="--epochs-cooldown 4 is 10 steps, more than the 8"):
        schedule(8, uneven, lr_scheduler="const-cooldown", epochs_cooldown=4)


def test_an_option_that_is_newer_than_the_checkpoint_counts_as_changed():
    options = {"train_data": "x.tar", "model": "RN50"}
    saved = json.loads(json.dumps(dataclasses.asdict(TrainConfig(**options))))
    del saved["ema_decay"], saved["opt_kwargs"]
    assert changed_options(saved, TrainConfig(**options)) == {}
    now = TrainConfig(**options, ema_decay=0.9, opt_kwargs=("amsgrad=True",), lr=1.0)
    assert changed_options(saved, now) == {
        "lr": "--lr 0.0005 -> 1.0", "ema_decay": "--ema-decay None -> 0.9",
        "opt_kwargs": "--opt-kwargs [] -> ['amsgrad=True']",
    }  # fmt: skip
    assert changed_options({}, now) == {}  # a checkpoint of OpenCLIP's trainer holds no options

"""The epochs of a run, and the learning rate of each step.

The rate is a pure function of the step, so a resumed run needs no state of it. Schedules and flags are OpenCLIP's. One
schedule is new: ``wsd`` (warm-up, stable, decay: Hu et al. 2024), in which the length of the decay is a share of the
run.
"""

import dataclasses
import math
from typing import NamedTuple

import torch

from ..data.batch_plan import BatchPlan, Unit
from .train_config import TrainConfig


class Epoch(NamedTuple):
    """An epoch of a training run: its number from 0, and the steps of the run at its beginning and its end."""

    number: int
    first: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Epochs:
    """The epochs of a training run, ``length`` pairs or tokens each, in one sequence of batches.

    A batch may begin in one epoch and end in the next. The run ends after ``total_steps`` steps, perhaps within an
    epoch.
    """

    length: int
    plan: BatchPlan
    total_steps: int
    unit: Unit = "pairs"

    @property
    def number(self) -> int:
        """The number of epochs of the training run, the last of which may be cut short."""
        return self.after(self.total_steps - 1).number + 1

    def steps_before(self, epoch: int) -> int:
        """Return the number of training steps after which ``epoch`` epochs are finished."""
        return self.plan.batches_for(epoch * self.length, self.unit)

    def finished_after(self, step: int) -> int:
        """Return the number of epochs that are finished after ``step`` training steps."""
        return self.plan.before(step, self.unit) // self.length

    def ends_with(self, step: int) -> bool:
        """Return True if an epoch of training is finished by step ``step``, counted from 1."""
        return step > 0 and self.finished_after(step) > self.finished_after(step - 1)

    def after(self, step: int) -> Epoch:
        """Return the epoch of the training step after ``step`` finished steps; the run's end may cut it short."""
        number, stop = self.finished_after(step), self.total_steps
        # ``steps_before`` sums up batches, which would take long for an epoch that ends far after the end of the run.
        if self.finished_after(stop) > number:
            stop = self.steps_before(number + 1)
        return Epoch(number, self.steps_before(number), stop)


LONGEST_AUTO_WARMUP = 2000  # the most steps of --warmup auto, as many as in Radford et al. 2021


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: a linear warm-up from 0 to ``base_lr``, then a cosine decay, or a plateau and a decay.

    Attributes:
        base_lr: the highest learning rate.
        warmup: number of steps of the rise.
        total: number of steps of the run.
        cooldown: number of steps of the decay at the end; None decays as half a cosine from the warm-up on, to zero.
        end_lr: the learning rate at the end of the decay of ``cooldown`` steps.
        power: the exponent of the decay: 1 is linear, and a higher one falls faster at first.
    """

    base_lr: float
    warmup: int
    total: int
    cooldown: int | None = None
    end_lr: float = 0.0
    power: float = 1.0

    def at(self, step: int) -> float:
        """Return the learning rate of training step ``step``, counted from 0."""
        if self.cooldown is None or step < self.warmup:
            return cosine_lr(step, self.base_lr, self.warmup, self.total)
        begin = self.total - self.cooldown
        if step < begin:
            return self.base_lr
        decay = (1 - (step - begin) / max(1, self.cooldown)) ** self.power
        return self.end_lr + decay * (self.base_lr - self.end_lr)


def cosine_lr(step: int, base_lr: float, warmup: int, total: int) -> float:
    """Return the learning rate of ``step``, counted from 0, in CLIP's schedule (Radford et al. 2021, section 2.5).

    It rises linearly to ``base_lr`` over ``warmup`` steps, and falls as half a cosine to zero at ``total`` steps.
    """
    if step < warmup:
        return base_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return base_lr * 0.5 * (1 + math.cos(math.pi * progress))


def schedule_of(config: TrainConfig, total: int, epochs: Epochs) -> Schedule:
    """Return the learning-rate schedule that the options ask for, for a run of ``total`` steps.

    Raises:
        ValueError: the cool-down is longer than the run.
    """
    if config.skip_scheduler:
        return Schedule(config.lr, 0, total, 0)
    warmup, cooldown = warmup_steps(config.warmup, total), None
    if config.lr_scheduler == "const":
        cooldown = 0
    elif config.lr_scheduler == "const-cooldown":
        cooldown = epochs.steps_before(config.epochs_cooldown or 0)
    elif config.lr_scheduler == "wsd":
        cooldown = math.ceil(config.decay_fraction * total)
    if cooldown is not None and cooldown > total:
        raise ValueError(
            f"--epochs-cooldown {config.epochs_cooldown} is {cooldown} steps, more than the {total} of the whole run"
        )
    return Schedule(config.lr, warmup, total, cooldown, config.lr_cooldown_end, config.lr_cooldown_power)


def warmup_steps(warmup: float | str, total: int) -> int:
    """Return the number of warm-up steps for ``--warmup``: a number of steps, a share of ``total``, or "auto"."""
    if isinstance(warmup, str):
        return min(LONGEST_AUTO_WARMUP, total // 10)
    return round(warmup * total) if warmup < 1 else int(warmup)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter, times the ``lr_scale`` of its group if that has one.

    A learning rate that is a tensor is changed in place.
    """
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

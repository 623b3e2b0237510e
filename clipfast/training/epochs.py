"""How the steps of a run are divided into epochs, and where the run ends."""

import dataclasses
from typing import NamedTuple


class Epoch(NamedTuple):
    """An epoch of a run: its number from 0, and after how many steps of the run it begins and ends."""

    number: int
    first: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Epochs of ``num_samples`` pairs, in one sequence of batches, of which each can belong to two epochs.

    The run ends with the batch in which it has seen ``samples_seen`` pairs, which may be within an epoch.
    """

    num_samples: int
    batch_size: int
    samples_seen: int

    @property
    def total_steps(self) -> int:
        """The number of steps of the run."""
        return -(-self.samples_seen // self.batch_size)

    @property
    def number(self) -> int:
        """The number of epochs of the run, the last of which may be cut short."""
        return self.after(self.total_steps - 1).number + 1

    def steps_before(self, epoch: int) -> int:
        """Return after how many steps of a run ``epoch`` epochs are finished."""
        return -(-epoch * self.num_samples // self.batch_size)

    def finished_after(self, step: int) -> int:
        """Return how many epochs are finished after ``step`` steps."""
        return step * self.batch_size // self.num_samples

    def ends_with(self, step: int) -> bool:
        """Return True if an epoch is finished by step ``step``, counted from 1."""
        return self.finished_after(step) > self.finished_after(step - 1)

    def after(self, step: int) -> Epoch:
        """Return the epoch that goes on, or begins, after ``step`` steps. The end of the run is also its end."""
        number = self.finished_after(step)
        return Epoch(number, self.steps_before(number), min(self.steps_before(number + 1), self.total_steps))

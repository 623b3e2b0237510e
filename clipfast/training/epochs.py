"""How the steps of a run are divided into epochs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Epochs of ``num_samples`` pairs, in one sequence of batches, of which each can belong to two epochs."""

    num_samples: int
    batch_size: int

    def steps_before(self, epoch: int) -> int:
        """Return after how many steps of a run ``epoch`` epochs are finished."""
        return -(-epoch * self.num_samples // self.batch_size)

    def finished_after(self, step: int) -> int:
        """Return how many epochs are finished after ``step`` steps."""
        return step * self.batch_size // self.num_samples

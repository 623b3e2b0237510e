"""The steps that the guard skipped: counted, written down with what their batches were, and stopped if they go on."""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import Batch
from .data import TrainingData
from .errors import TrainingError
from .guard import Figures, Guard
from .logs import log
from .run import RunFolder
from .state import Progress
from .world import World

NAMED = 5  # parameters that are named of those whose gradients are not finite


class _Step(NamedTuple):
    """A step whose verdict may still be on its way from the device."""

    number: int  # of steps that were finished with it
    figures: Tensor
    ready: torch.cuda.Event | None
    norms: Tensor
    batch: Batch


class SkippedSteps:
    """Hears which steps were skipped: on a GPU one step later, so that the host does not wait for the step itself.

    All ranks call the same methods in the same order, and hear the same.

    Args:
        guard: of the steps.
        data: of the run, which knows what was in a batch.
        progress: the counts, which a checkpoint keeps.
        most: so many skipped steps in a row end the run.
        folder: of the run.
        world: the processes.
    """

    def __init__(
        self, guard: Guard, data: TrainingData, progress: Progress, most: int, folder: RunFolder, world: World
    ) -> None:
        self.guard, self.data, self.progress, self.most = guard, data, progress, most
        self.folder, self.world = folder, world
        self._pending: collections.deque[_Step] = collections.deque()

    def __call__(self, batch: Batch) -> None:
        """Take note of the step that was just finished with ``batch``.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        figures, norms, ready = self.guard.figures, self.guard.norms, None
        if figures.is_cuda:
            figures, norms = figures.to("cpu", non_blocking=True), norms.clone()
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Step(self.progress.step, figures, ready, norms, batch))
        self._hear(late=0 if ready is None else 1)

    def settle(self) -> None:
        """Wait for the verdicts on all steps that are finished, and count them.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        self._hear(late=0)

    def _hear(self, late: int) -> None:
        while len(self._pending) > late:
            step = self._pending.popleft()
            if step.ready is not None:
                step.ready.synchronize()
            figures = Figures(*step.figures.tolist())
            if not figures.skipped:
                self.progress.skipped_in_a_row = 0
                continue
            self.progress.skipped_steps += 1
            self.progress.skipped_in_a_row += 1
            self._record(step, figures)
            # Not without a new verdict: a run that was stopped so goes on with this count, and other options.
            if self.progress.skipped_in_a_row >= self.most:
                self.world.on_main(self._stop)

    def _record(self, step: _Step, figures: Figures) -> None:
        """Write down a step that was skipped."""
        with self.world.phase("names of a batch"):
            mine = _seen(step.batch) | {"keys": self.data.names(step.number - 1)}
        self.world.meet()  # names take different times
        ranks = self.world.gather({"loss": figures.loss} | mine)
        self.world.on_main(lambda: self._write(step, figures, ranks))

    def _write(self, step: _Step, figures: Figures, ranks: Sequence[dict[str, Any]]) -> None:
        finite = step.norms.isfinite().tolist()
        named = [name for name, is_finite in zip(self.guard.names, finite, strict=True) if not is_finite]
        lost = [rank for rank, found in enumerate(ranks) if not math.isfinite(found["loss"])]
        self.folder.record_nonfinite(
            _jsonable(
                {
                    "step": step.number, "grad_norm": figures.grad_norm, "logit_scale": figures.logit_scale,
                    "parameters": named[:NAMED], "more_parameters": len(named[NAMED:]), "ranks": ranks,
                }
            )
        )  # fmt: skip
        what = (
            f"the loss of rank(s) {', '.join(map(str, lost))} is not finite"
            if lost
            else (
                f"the gradient's norm is {figures.grad_norm}, with {len(named)} parameter(s) not finite"
                f"{f': {named[0]}' if named else ''}"
            )
        )
        path = self.folder.nonfinite_path
        log.warning(f"Step {step.number} changed nothing, since {what}; {path} says what is known of its batch")

    def _stop(self) -> None:
        raise TrainingError(
            f"the last {self.progress.skipped_in_a_row} steps changed nothing, since loss or gradient were not finite, "
            f"and --max-nonfinite-steps is {self.most}: {self.folder.nonfinite_path} lists their pairs; lower --lr, or "
            "set --grad-clip-norm"
        )


def _seen(batch: Batch) -> dict[str, Any]:
    """Return statistics of a batch, and which of its pairs others stood in for."""
    images = batch.images_on(torch.device("cpu"))
    pixels = {"min": images.min().item(), "max": images.max().item(), "mean": images.mean(dtype=torch.float64).item()}
    return {
        "pixels": pixels,
        "longest_text": batch.texts.shape[1],
        "unusable": [sample.name for sample in batch.skipped],
    }


def _jsonable(value: Any) -> Any:
    """Return ``value`` with strings in place of numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _jsonable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_jsonable(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

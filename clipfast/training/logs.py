"""Log lines in OpenCLIP's format on the console and in ``out.log``, and metrics in the folder of the run."""

import collections
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Batch
from .epochs import Epochs
from .guard import Figures
from .run import RunFolder
from .world import ALONE, World

log = logging.getLogger("clipfast")


class _OutLog(logging.FileHandler):
    """The file ``out.log``."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lose a line that cannot be written: a full disk would print a traceback for each."""


@contextmanager
def logging_to(folder: Path, world: World = ALONE, *, by_machine: bool = False) -> Iterator[None]:
    """Log to the console and to ``out.log`` in ``folder``, in OpenCLIP's format.

    Ranks other than 0 log warnings and errors, and to the console only. With ``by_machine``, one rank of each machine
    logs to a file of its own, ``out-RANK``.
    """
    rank = "" if world.is_main else f"rank {world.rank} | "
    formatter = logging.Formatter(f"%(asctime)s | %(levelname)s | {rank}%(message)s", "%Y-%m-%d,%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if world.local_rank == 0 if by_machine else world.is_main:
        folder.mkdir(parents=True, exist_ok=True)  # another machine may have its own disk
        handlers.append(_OutLog(folder / (f"out-{world.rank}" if by_machine else "out.log"), encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO if world.is_main else logging.WARNING)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class TrainLog:
    """Progress bar, log lines and metrics of a run.

    Args:
        folder: of the run.
        epochs: of the run.
        world: the processes; rank 0 writes, and the times are its own.
    """

    def __init__(self, folder: RunFolder, epochs: Epochs, world: World = ALONE) -> None:
        self.folder, self.epochs, self.world = folder, epochs, world

    def watch(self, batches: Iterator[Batch], step: int) -> Iterator[Batch]:
        """Pass on the batches from ``step`` of the run to the end of its epoch, and time the wait for each."""
        from tqdm import tqdm

        epoch, first, stop = self.epochs.after(step)
        description = f"epoch {epoch + 1}/{self.epochs.number}"
        self._start_again()
        options: dict[str, Any] = {"unit": "step", "disable": None if self.world.is_main else True, "leave": False}
        with tqdm(total=stop - first, initial=step - first, desc=description, **options) as bar:
            for _ in range(step, stop):
                asked = time.perf_counter()
                batch = next(batches)
                self._waiting += time.perf_counter() - asked
                self._stages.update(batch.seconds)
                yield batch
                bar.update()

    def step(self, figures: Tensor, pairs: int) -> None:
        """Count a finished step of so many pairs of this process.

        ``figures`` are those of :class:`clipfast.training.guard.Guard`, and stay on their device until they are logged.
        """
        self._figures.append(figures)
        self._pairs += pairs * self.world.size

    def write(self, step: int, lr: float, logit_scale: Tensor) -> None:
        """Log and record the steps since the last line; all ranks must call it.

        Steps that the guard skipped count for the times, and not for the losses.

        Args:
            step: number of steps that are finished.
            lr: learning rate of the last one.
            logit_scale: scalar, the factor of the cosines after the last one.
        """
        stacked = torch.stack(self._figures)
        stacked[:, 0] = self.world.mean(stacked[:, 0])
        figures = [Figures(*row) for row in stacked.tolist()]
        kept = [one for one in figures if not one.skipped]
        elapsed = time.perf_counter() - self._started
        rates = {
            "batch_time": elapsed / len(figures),
            "data_time": self._waiting / len(figures),
            "data_wait": self._waiting / elapsed,
            "pairs_per_second": self._pairs / elapsed,
        }
        scale, means = logit_scale.item(), dict[str, float]()
        if kept:
            means = {
                "loss": math.fsum(one.loss for one in kept) / len(kept),
                "grad_norm": math.fsum(one.grad_norm for one in kept) / len(kept),
            }
        last, mean = (kept[-1].loss, means["loss"]) if kept else (math.nan, math.nan)
        epoch, first, stop = self.epochs.after(step - 1)
        pairs, total = ((count - first) * self.epochs.batch_size for count in (step, stop))
        slowest = f" ({self._stages.most_common(1)[0][0]})" if self._stages else ""
        log.info(
            f"Train Epoch: {epoch} [{pairs:>{len(str(total))}}/{total} ({100 * pairs / total:.0f}%)] "
            f"Data (t): {rates['data_time']:.3f} Batch (t): {rates['batch_time']:.3f}, "
            f"{rates['pairs_per_second']:.6g}/s, {rates['pairs_per_second'] / self.world.size:.6g}/s/gpu "
            f"LR: {lr:.6f} Logit Scale: {scale:.3f} "
            f"Contrastive_loss: {last:.5g} ({mean:.5g}) Loss: {last:.5g} ({mean:.5g}) "
            f"Data-wait: {100 * rates['data_wait']:.1f}%{slowest}"
        )
        seconds = dict(self._stages)  # of all data workers together
        if self.world.is_main:
            self.folder.record(
                step=step, epoch=epoch, **means, skipped_steps=len(figures) - len(kept), lr=lr, logit_scale=scale,
                **rates, data_seconds=seconds,
            )  # fmt: skip
        self._start_again()

    def evaluation(self, step: int, results: dict[str, Any]) -> None:
        """Log and record an evaluation after ``step`` steps."""
        zero_shot, retrieval = results["zero_shot"], results["retrieval"]
        log.info(
            f"Eval step {step}: zero-shot top-1 {zero_shot['top1']:.4f}, top-5 {zero_shot['top5']:.4f}; "
            f"text to image R@1 {retrieval['text_to_image']['R@1']:.4f}"
        )
        self.folder.record(step=step, eval=results)

    def _start_again(self) -> None:
        self._figures: list[Tensor] = []
        self._stages: collections.Counter[str] = collections.Counter()
        self._started, self._waiting, self._pairs = time.perf_counter(), 0.0, 0

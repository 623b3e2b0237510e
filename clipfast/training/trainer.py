"""The trainer: it builds the components of a training run, and runs the loop over epochs and steps."""

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Batch
from ..evaluation.evaluate import Evaluation, evaluate
from ..evaluation.labelled import LabelledSet, encode_labelled
from ..factory import transform_of
from ..files import DiskFullError
from .build import build_device, build_loss, build_model, build_tokenizer
from .config import AUTO, TrainConfig
from .data import SkipBudget, TrainingData, validation_set
from .ema import WeightAverage
from .errors import NotFiniteError, TrainingError
from .interruption import Interruption
from .logs import TrainLog, log
from .optim import make_optimizer
from .run import RunFolder
from .schedule import schedule_of, set_lr
from .state import Progress, RunState
from .step import GraphedStep, TrainingStep, Upload

VALIDATION_BATCH_SIZE = 256


class Trainer:
    """One run, which writes to ``folder``.

    ``checkpoint`` is what it continues from, written by this package or by OpenCLIP; the model configuration in it, if
    there is one, replaces ``config.model``.

    Raises:
        ValueError: options, data or the checkpoint cannot be used.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, checkpoint: dict[str, Any] | None = None) -> None:
        self.config, self.folder = config, folder
        saved: dict[str, Any] = (checkpoint or {}).get("clipfast", {})
        self.device = build_device(config)
        self.data = TrainingData(config)
        self.total_steps = self.data.total_steps
        self.validation = None if config.val_data is None else validation_set(config)
        torch.manual_seed(config.seed)
        self.model = build_model(config, saved, self.device)
        self.tokenizer, loss = build_tokenizer(config, self.model), build_loss(config, self.model)
        self.optimizer = make_optimizer(config, self.model)
        self.schedule = schedule_of(config, self.total_steps, self.data.epochs)
        on_amp = config.precision.startswith("amp") or (config.precision == "auto" and self.device.type == "cuda")
        autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=on_amp)
        size = config.micro_batch_size if isinstance(config.micro_batch_size, int) else config.batch_size
        self.step = TrainingStep(
            self.model, self.optimizer, loss, autocast, config.grad_clip_norm, min(size, config.batch_size)
        )
        self.upload = Upload(self.device)
        self._take_step = GraphedStep(self.step, self.model.context_length) if config.cuda_graphs else self.step
        self.log = TrainLog(folder, self.data.epochs)
        self.progress, self.budget = Progress(), SkipBudget(config.max_bad_fraction, folder.skipped_path)
        self.average = None if config.ema_decay is None else WeightAverage(self.model, config.ema_decay)
        self.state = RunState(
            config, folder.path.name, self.model, self.optimizer, self.step, self.data, self.budget, self.progress,
            self.average,
        )  # fmt: skip
        self._unsaved = False  # whether steps were taken since the last checkpoint
        if checkpoint is not None:
            self.state.load_state_dict(checkpoint)

    def fit(self, interruption: Interruption) -> Evaluation | None:
        """Train until the run ends or is interrupted, and return the last evaluation, or None if there was none.

        Whatever error ends it, weights that are finite are saved, unless an update of them is not complete.

        Raises:
            TrainingError: loss or weights are not finite, or too many pairs cannot be decoded.
            ValueError: the data cannot be read.
            DiskFullError: there is no space for the last checkpoint.
        """
        try:
            if self.config.micro_batch_size == AUTO and self.progress.step < self.total_steps:
                self.step.fit_micro_batch(self.config.batch_size)
            evaluation = self._train(interruption)
            if self._unsaved:
                self.save()
        except Exception as error:
            self._rescue(error)
            raise
        if interruption.signum is not None:
            saved = f"Saved {self.folder.latest}; {self._continuation}"
            log.info(f"Interrupted. {saved if self.folder.latest.exists() else 'No step was finished.'}")
        return evaluation

    @property
    def _continuation(self) -> str:
        return f"go on with: clipfast train --resume {self.folder.path}"

    def _train(self, interruption: Interruption) -> Evaluation | None:
        """Train epoch after epoch, and return the last evaluation."""
        evaluation, epochs, frequency = None, self.data.epochs, self.config.save_frequency
        batches = self.data.batches(
            self.progress.step, self.model, self.tokenizer, pin_memory=self.device.type == "cuda"
        )
        with contextlib.closing(batches):  # an error must not leave the workers waiting
            try:
                while self.progress.step < self.total_steps and interruption.signum is None:
                    if self._train_epoch(batches, interruption):
                        step = self.progress.step
                        is_whole = epochs.ends_with(step)  # the end of the run may cut its last epoch short
                        kept = is_whole and frequency > 0 and epochs.finished_after(step) % frequency == 0
                        self._save_or_go_on(keep=kept)
                        evaluation = self.evaluate()
            except RuntimeError as error:
                if not isinstance(error, TrainingError):
                    # it may be PyTorch's report of a dead data worker, which can come at any moment: the loader knows
                    batches.throw(error)
                raise
        return evaluation

    def _rescue(self, error: Exception) -> None:
        """Save what an error would lose, if it is sound, and say how to go on."""
        if self._unsaved and not self.step.is_updating and not isinstance(error, NotFiniteError):
            try:
                log.info(f"Saved {self.save()}; {self._continuation}")
                return
            except Exception as failure:
                log.error(f"Step {self.progress.step} cannot be saved: {failure}")
        if self.folder.kept():
            log.info(f"The last checkpoint is {self.folder.kept()[0]}; {self._continuation}")

    def _save_or_go_on(self, *, keep: bool = False) -> None:
        """Save within the run. If the disk is full, training goes on: there may be space before it ends."""
        try:
            log.info(f"Saved {self.save(keep=keep)}")
        except DiskFullError as error:
            kept = self.folder.kept()
            log.error(f"{error}. Training goes on. {f'The last good checkpoint is {kept[0]}' if kept else ''}")

    def _train_epoch(self, batches: Iterator[Batch], interruption: Interruption) -> bool:
        """Train until the epoch of the current step ends or the run is interrupted; return True if the epoch ended."""
        config, progress = self.config, self.progress
        last = self.data.epochs.after(progress.step).stop
        self.model.train()
        started = time.perf_counter()
        for batch in self.log.watch(batches, progress.step):
            self.log.step(self._train_step(batch), len(batch))
            progress.step += 1
            self._unsaved = True
            now = time.perf_counter()
            progress.seconds, started = progress.seconds + now - started, now
            if batch.skipped:
                self.folder.record_skipped(progress.step, batch.skipped)
            self.budget.count(batch)
            if progress.step == last or progress.step % config.log_every_n_steps == 0:
                self.log.write(progress.step, self.schedule.at(progress.step - 1), self.model.logit_scale.exp())
            if progress.step < last and config.save_every and progress.step % config.save_every == 0:
                self._save_or_go_on()
            if interruption.signum is not None:
                break
        return progress.step == last

    def _train_step(self, batch: Batch) -> Tensor:
        """Set the learning rate of the current step, take the step and return its loss."""
        set_lr(self.optimizer, self.schedule.at(self.progress.step))
        # The seed depends on nothing but the step, so a resumed run drops the same patches as one that never stopped.
        torch.manual_seed(self.config.seed + self.progress.step)
        loss = self._take_step(*self.upload(batch))
        if self.average is not None:
            self.step.is_updating = True
            self.average.update(self.progress.step + 1)
            self.step.is_updating = False
        return loss

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has the average of its weights, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def save(self, *, keep: bool = False) -> Path:
        """Write ``epoch_latest.pt``, with ``keep`` also ``epoch_N.pt``, and return the path of the former.

        Raises:
            TrainingError, DiskFullError: the weights are not finite, or there is no space; the checkpoints that exist
                stay as they are.
        """
        path = self.folder.save(self.state.state_dict(), keep=keep)
        self._unsaved = False
        return path

    def evaluate(self) -> Evaluation | None:
        """Return zero-shot accuracy and retrieval on the validation data, logged and recorded; None without any.

        They are those of the average of the weights, if there is one.
        """
        if self.validation is None:
            return None
        with self.averaged():
            evaluation = self.evaluate_weights(self.validation)
        skipped = self.validation.skipped
        if skipped:
            self.folder.record_skipped(self.progress.step, skipped)
            log.warning(
                f"{len(skipped)} validation image(s) cannot be used and are left out, as {self.folder.skipped_path} "
                f"says; first: {skipped[0]}"
            )
        self.log.evaluation(self.progress.step, evaluation.results)
        return evaluation

    def evaluate_weights(self, validation: LabelledSet) -> Evaluation:
        """Return zero-shot accuracy and retrieval of the weights that the model has now."""
        self.model.eval()
        transform = transform_of(self.model, uint8=True)
        features = encode_labelled(self.model, validation, transform, VALIDATION_BATCH_SIZE, self.device)
        return evaluate(
            self.model, self.tokenizer, features,
            leave_out=self.config.val_leave_out, skipped=len(validation.skipped),
        )  # fmt: skip

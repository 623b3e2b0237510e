"""The trainer: it builds the components of a training run, and runs the loop over epochs and steps."""

import collections
import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.of_run import Checkpoints
from ..data import Batch, BatchPlan, EqualBatches, Skipped
from ..distributed.ending import Interrupted, Interruption, NotFiniteError, TrainingError, elected
from ..distributed.watchdog import STEP
from ..distributed.world import ALONE, LateSum, World
from ..evaluate.evaluate import Evaluation
from ..models.packed_text import pack_on_host
from ..runs.folder import RunFolder, by_step
from ..runs.lock import FolderLostError
from .batches import plan_of
from .build import (
    Distillation,
    bare_model,
    build_device,
    build_loss,
    build_model,
    build_parallel,
    build_tokenizer,
    uses_autocast,
)
from .data import SkipBudget, TrainingData
from .ema import WeightAverage
from .fp8_figures import Fp8Figures
from .fsdp import is_sharded
from .guard import SkippedSteps
from .logs import Meters, TrainLog, log
from .naflex_options import loss_scale
from .optim import make_optimizer
from .option_checks import AUTO, source_command
from .schedule import schedule_of, set_lr
from .spikes import SENSIBLE, Signs, guessing
from .state import Progress, RunState
from .step import TrainingStep, Upload, at_once, graphed_step, length_of, seed_step
from .train_config import TrainConfig
from .validation import Validation


class Trainer:
    """Builds all parts of a training run, trains, and writes checkpoints and metrics to the run's ``folder``.

    ``checkpoint`` is the content of the checkpoint from which the run resumes, written by clipfast or OpenCLIP. If it
    has a model configuration, that replaces ``config.model``. With several ranks in ``world``, each rank has a trainer,
    and all ranks call the same methods in the same order.

    Attributes:
        signum: the signal that interrupted the run on any rank.
        about_mfu: a sentence on what MFU means in this run; None if MFU is unknown.

    Raises:
        ValueError: options, data or the checkpoint cannot be used.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, checkpoint: dict[str, Any] | None = None, world: World = ALONE
    ) -> None:
        self.config, self.folder, self.world = config, folder, world
        saved: dict[str, Any] = (checkpoint or {}).get("clipfast", {})
        self.device = build_device(config, world)
        plan = plan_of(config, world, saved)
        self.batch_size = plan.largest // world.size  # the most pairs of this rank in a step
        with world.local_first():
            self.data = TrainingData(config, plan, world)
        self.total_steps, self._longest = self.data.total_steps, max(plan.sizes, key=length_of)
        torch.manual_seed(config.seed)
        self.model = build_model(config, saved, self.device, world)
        self.tokenizer, loss = build_tokenizer(config, self.model), build_loss(config, self.model, world)
        parallel = build_parallel(config, self.model, world, self.device)
        self._is_sharded = is_sharded(config, world)
        self.optimizer = make_optimizer(config, self.model)
        self.schedule = schedule_of(config, self.total_steps, self.data.epochs)
        on_amp = uses_autocast(config, self.device)
        autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=on_amp)
        self.distillation = None
        if config.distill_model is not None:
            loss = self.distillation = Distillation(config, self.model, self.device, world, autocast)
        size = config.micro_batch_size if isinstance(config.micro_batch_size, int) else self.batch_size
        self.step = TrainingStep(
            self.model, self.optimizer, loss, autocast, config.grad_clip_norm, min(size, self.batch_size), parallel,
            world if self._is_sharded else None, _loss_scale(config, plan, world),
        )  # fmt: skip
        # Texts are packed even if that saves little, when the model is compiled (padded texts would need a second
        # compilation) or on a GPU (which computes padded texts only after the host has waited for their lengths).
        always = config.torchcompile or self.device.type != "cpu"
        pack = functools.partial(pack_on_host, device=self.device, always=always)
        self.upload = Upload(self.device, pack if self.model.takes_packed() else None)
        self._take_step = graphed_step(self.step, self.model.context_length) if config.cuda_graphs else self.step
        meters = Meters(self.device, parallel, config.log_metric_every_n_steps or config.log_every_n_steps)
        self.about_mfu = meters.count_flops(
            lambda: bare_model(config, saved, torch.device("meta")), plan.sizes, world.size,
            half=on_amp or config.precision == "pure_bf16",
        )  # fmt: skip
        signs = Signs(self.schedule.warmup, guessing(config, self.model, plan))
        self._fp8: Fp8Figures | None = None
        if config.precision == "amp_fp8" and world.is_main and not self._is_sharded:
            self._fp8 = Fp8Figures(self.model, build_loss(config, self.model), autocast)
        self._figures: dict[str, Any] = {}  # figures of rounding to 8 bits in the last step that is logged
        self.log = TrainLog(folder, self.data.epochs, world, meters, signs)
        self.progress = Progress()
        doctor = source_command(["doctor", "--data", config.train_data, "--all"], vars(config))
        self.budget = SkipBudget(config.max_bad_fraction, folder.skipped_path, doctor)
        self.average = None if config.ema_decay is None else WeightAverage(self.model, config.ema_decay)
        self.validation = Validation(config, self.model, self.tokenizer, self.average, self.log, world)
        self.state = RunState(
            config, folder.path.name, self.model, self.optimizer, self.step, self.data, self.budget, self.progress,
            self.average,
        )  # fmt: skip
        self._writes_parts = self._is_sharded and config.fsdp_checkpoint == "sharded"
        self.checkpoints = Checkpoints(
            folder.checkpoints, config.keep_last, only_last_epoch=config.delete_previous_checkpoint,
            is_held=folder.is_held,
            world=world.for_thread() if self._writes_parts else ALONE,
        )  # fmt: skip
        # Whether this session has finished a step at all, and whether it has finished one since the last checkpoint.
        self._has_begun, self._unsaved = False, False
        self._is_time_to_save = False  # whether --save-every-minutes have passed, as rank 0 has told all ranks
        self.signum: int | None = None
        self._skipped: list[tuple[int, Skipped]] = []  # pairs that this rank skipped and has not recorded, with steps
        self._news = LateSum(world)
        self.skips = SkippedSteps(self.step.guard, self.data, self.progress, config.max_nonfinite_steps, folder, world)
        if checkpoint is not None:
            self.state.load_state_dict(checkpoint)
            signs.good = self.progress.good_step

    def fit(self, interruption: Interruption) -> Evaluation | None:
        """Train until the run ends or is interrupted, and return the last evaluation, or None if there was none.

        If an error ends training, a checkpoint is saved, unless the weights are not finite, an update of them is
        incomplete, or only some of several ranks met the error.

        Raises:
            TrainingError: losses, gradients or weights are not finite, or too many pairs cannot be decoded.
            ValueError: the data cannot be read.
            DiskFullError: there is no space for the last checkpoint.
            OSError: the last checkpoint cannot be written for another reason.
        """
        self.validation.interruption = interruption
        if self.world.watchdog is not None:
            self.world.watchdog.interruption = interruption
        try:
            if self.config.micro_batch_size == AUTO and self.progress.step < self.total_steps:
                sizes = {seq_len: pairs // self.world.size for seq_len, pairs in self.data.plan.sizes.items()}
                self.step.fit_micro_batch(sizes, build_loss(self.config, self.model), self.world)
            evaluation = self._train(interruption)
            self._finish_saving()
            self._news.close()
            self.conclude(interruption)
        except Exception as error:
            self._rescue(error)
            raise
        return evaluation

    def conclude(self, interruption: Interruption) -> None:
        """Find out whether a signal has interrupted any training rank; if so, log the path of the newest checkpoint."""
        self._share_signal(interruption)
        if self.signum is not None:
            kept = self.folder.kept()
            log.info(f"Interrupted. {self._saved(kept[0]) if kept else 'No step was finished.'}")

    def _saved(self, path: Path) -> str:
        """Return the text of a log line on a saved training checkpoint, with the command that resumes from it."""
        return f"Saved {path}; {self._continuation}"

    @property
    def _continuation(self) -> str:
        """The text "go on with: ..." with the command that resumes this training run."""
        start = "clipfast" if self.world.size == 1 else f"torchrun --nproc-per-node {self.world.size} -m clipfast"
        return f"go on with: {start} train --resume {self.folder.path}"

    def _share_signal(self, interruption: Interruption) -> None:
        """Set ``signum`` on all training ranks to the signal that has interrupted any of them, or None."""
        self.signum = elected(self.world.sum(interruption.votes()))

    def _train(self, interruption: Interruption) -> Evaluation | None:
        """Train and evaluate epoch after epoch until the run ends or is interrupted; return the last evaluation."""
        evaluation, config = None, self.config
        batches = self.data.batches(
            self.progress.step, self.model, self.tokenizer, pin_memory=self.device.type == "cuda"
        )
        with contextlib.closing(batches):  # ends the data workers, also after an error
            try:
                self._share_signal(interruption)
                while self.progress.step < self.total_steps and self.signum is None:
                    with self.world.phase(STEP):
                        is_whole_epoch = self._train_epoch(batches, interruption)
                    if is_whole_epoch:
                        step = self.progress.step
                        self.save()
                        with contextlib.suppress(Interrupted):
                            evaluation = self.validation.evaluate(step) if self._is_due(config.val_frequency) else None
                            if self._is_due(config.zeroshot_frequency):
                                self.validation.evaluate_imagenet(step)
                        self._share_signal(interruption)
            except RuntimeError as error:
                if not isinstance(error, TrainingError):
                    # After the death of a data worker, any call may raise a RuntimeError. The generator of batches then
                    # raises an error that says that a worker has died; if none has, it raises this error again.
                    batches.throw(error)
                raise
        return evaluation

    def _is_due(self, frequency: int) -> bool:
        """Return True at the end of every ``frequency`` epochs of training, and at the end of the run."""
        step, epochs = self.progress.step, self.data.epochs
        is_turn = epochs.ends_with(step) and epochs.finished_after(step) % max(1, frequency) == 0
        return frequency > 0 and (is_turn or step == self.total_steps)

    def _rescue(self, error: Exception) -> None:
        """After an error in training, save a checkpoint of unsaved steps if that is safe, and log how to resume."""
        if isinstance(error, FolderLostError):
            return
        is_sound = not self.step.is_updating and not isinstance(error, NotFiniteError)
        if self._unsaved and is_sound and self.world.is_shared(error):
            try:
                self._finish_saving()
                log.info(self._saved(self.folder.kept()[0]))
                return
            except Exception as failure:
                log.error(f"Step {self.progress.step} cannot be saved: {failure}")
        # Ranks that write a sharded checkpoint wait for each other, perhaps for a lost rank, so there is a timeout.
        self.checkpoints.wait(self.world.timeout if self._writes_parts else math.inf)
        if self.folder.kept():
            log.info(f"The last checkpoint is {self.folder.kept()[0]}; {self._continuation}")

    def _finish_saving(self) -> None:
        """Save unsaved steps, and wait until their checkpoint is on the disk. A write that failed is tried once more.

        Raises:
            TrainingError, OSError: the weights are not finite, or cannot be written.
        """
        failed = self.world.on_main(lambda: self.checkpoints.wait() is not None)
        is_new = self.world.on_main(self.folder.hold)
        if self._unsaved or failed or is_new:
            self.save()
            self.world.on_main(self.checkpoints.finish)
        self.checkpoints.wait()  # every rank waits for its own writer, since each writes shards of a sharded checkpoint

    def _train_epoch(self, batches: Iterator[Batch], interruption: Interruption) -> bool:
        """Train until the epoch of the current step ends or the run is interrupted; return True if the epoch ended."""
        config, progress = self.config, self.progress
        last = self.data.epochs.after(progress.step).stop
        self.model.train()
        started = time.perf_counter()
        for batch in self.log.watch(batches, progress.step):
            self.log.step(self._train_step(batch), len(batch))
            if not self._has_begun:
                self.world.settle()
            self._has_begun = True
            progress.step += 1
            self._unsaved = True
            now = time.perf_counter()
            progress.seconds, started = progress.seconds + now - started, now
            self.skips(batch)
            self._count(batch, interruption)
            if self._is_logged(progress.step):
                shown = progress.step == last or progress.step % config.log_every_n_steps == 0
                self._record_skipped()
                lr, scale = self.schedule.at(progress.step - 1), self.model.logit_scale.exp()
                bias = getattr(self.model, "logit_bias", None)
                self.log.write(progress.step, lr, scale, bias, shown=shown, **self._figures)
            by_steps = config.save_every > 0 and progress.step % config.save_every == 0
            if progress.step < last and (by_steps or self._is_time_to_save):
                self.save()
            if self.signum is not None:
                break
        return progress.step == last

    def _is_logged(self, step: int) -> bool:
        """Return True if metrics are written after ``step`` training steps."""
        every = self.config.log_every_n_steps, self.config.log_metric_every_n_steps or self.total_steps
        return step == self.data.epochs.after(step - 1).stop or 0 in (step % every[0], step % every[1])

    def _count(self, batch: Batch, interruption: Interruption) -> None:
        """Count a training batch, and sum over all ranks: signals, votes to save, lost folders, and skipped pairs.

        Raises:
            TrainingError: too many pairs cannot be used.
        """
        self.budget.seen += len(batch) * self.world.size
        self._skipped += [(self.progress.step, sample) for sample in batch.skipped]
        is_lost = not self.folder.is_held()
        skipped, lost, due, *votes = self._news(
            [len(self._skipped), is_lost, self._vote_to_save(), *interruption.votes()]
        )
        if lost:
            self.world.on_main(self.folder.hold)
        self._is_time_to_save = due > 0
        if skipped > 0 and self.budget.is_exceeded_by(self.budget.skipped + skipped):
            self._record_skipped()
        self.signum = elected(votes)
        if self.signum is not None and self.world.size > 1:
            log.info(f"Stopping after step {self.progress.step}: {signal.Signals(self.signum).name} came to some rank.")

    def _vote_to_save(self) -> int:
        """Return 1 on rank 0 once after each ``--save-every-minutes``, and 0 otherwise."""
        minutes, now = self.config.save_every_minutes, time.monotonic()
        if not self.world.is_main or minutes == 0 or now - self.checkpoints.saved_at < 60 * minutes:
            return 0
        self.checkpoints.saved_at = now
        return 1

    def _record_skipped(self) -> None:
        """Record the skipped pairs of all ranks in the run's folder, and count them.

        Raises:
            TrainingError: too many pairs were skipped.
        """
        if self.world.sum([len(self._skipped)]) == [0]:
            return
        everyones = self.world.gather(self._skipped)
        self._skipped = []

        def record() -> dict[str, int]:
            """Record the skipped pairs of all ranks on rank 0; return how many the run has skipped, by reason."""
            for step, skipped in by_step(everyones):
                self.folder.record_skipped(step, skipped)
            self.budget.count([sample for mine in everyones for _, sample in mine])
            return dict(self.budget.kinds)

        self.budget.kinds = collections.Counter(self.world.on_main(record))

    def _train_step(self, batch: Batch) -> Tensor:
        """Run one training step on a batch, and return its metrics on the device, [4] as in ``guard.Figures``."""
        set_lr(self.optimizer, self.schedule.at(self.progress.step))
        size = at_once(self.step.micro_batch_size, self._longest, self.data.plan[self.progress.step].seq_len)
        images, texts = self.upload(batch, size)
        if self.distillation is not None:
            self.distillation.look(images, texts, size)
        if self.world.size > 1 and not self._has_begun and not self._is_sharded:
            self.step.rehearse(images, texts)
        # The seed depends only on --seed, the step and the rank, so a resumed run drops the same patches as one that
        # never stopped.
        seed_step(self.config.seed + self.progress.step, self.model, self.batch_size, self.world.rank)
        self._take_step(images, texts)
        if self.average is not None:
            self.step.is_updating = True
            self.average.update(self.progress.step + 1, self.step.guard.skipped)
            self.step.is_updating = False
        if self._fp8 is not None and isinstance(images, Tensor) and self._is_logged(self.progress.step + 1):
            self._figures = {"fp8": self._fp8(images, batch.texts.to(self.device))}
        return self.step.guard.figures.clone()

    def save(self) -> None:
        """Copy the state of the run and write it as a checkpoint in the background; ``epoch_N.pt`` are kept for good.

        With ``--fsdp-checkpoint sharded``, all ranks write their shards, but ``epoch_N.pt`` and the last checkpoint are
        full.

        Raises:
            TrainingError: the weights are not finite.
        """
        self._record_skipped()
        self.skips.settle()
        self.log.look(self.progress.step)
        if self._writes_parts and not self._is_milestone and self.progress.step < self.total_steps:
            parts, largest = self.state.parts(), list[float]()
            self.world.agree(lambda: largest.append(self.state.check(parts)))
            self._judge(parts, max(self.world.gather(largest[0]), default=0.0))
            self.checkpoints.save(parts, self.progress.step, good=self.progress.good_step, in_parts=True)
        else:
            content = self.state.state_dict(is_main=self.world.is_main)
            self.world.on_main(lambda: self._write(content))
        self._unsaved = False

    def _write(self, content: dict[str, Any]) -> None:
        """Begin to write a full checkpoint on rank 0, if its weights are finite."""
        self._judge(content, self.state.check(content))
        milestone = content["epoch"] if self._is_milestone else None
        self.checkpoints.save(content, self.progress.step, milestone=milestone, good=self.progress.good_step)

    def _judge(self, content: dict[str, Any], largest: float) -> None:
        """Set the last good step in the content of a checkpoint, or warn if its largest weight is far too large."""
        step, good = self.progress.step, self.progress.good_step
        if largest > SENSIBLE:
            last = "no step that was saved was better" if good is None else f"step {good} is the last good one"
            log.warning(
                f"The largest weight after step {step} is {largest:.1e}, beyond any sensible range: {last}; lower "
                "--lr, or set --grad-clip-norm"
            )
            self.folder.record(step=step, warning="weights", value=largest, usual=SENSIBLE)
        else:
            self.progress.good_step = (self.log.signs.has_fallen and self.log.signs.good) or step
        content["clipfast"]["progress"]["good_step"] = self.progress.good_step

    @property
    def _is_milestone(self) -> bool:
        """True if the checkpoint is kept as ``epoch_N.pt``. The last epoch may be cut short by the end of the run."""
        return self.data.epochs.ends_with(self.progress.step) and self._is_due(self.config.save_frequency)


def _loss_scale(config: TrainConfig, plan: BatchPlan, world: World) -> Callable[[int], float] | None:
    """Return the function from the pairs of a process to the factor on its gradients; None without a factor.

    A run that resumes with another number of processes keeps the factor of each batch.
    """
    processes = 1 if isinstance(plan, EqualBatches) else plan.budget.processes / world.size
    return loss_scale(config.naflex_loss_scale, config.batch_size * processes)

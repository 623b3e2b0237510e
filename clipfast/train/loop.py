"""The entry point of ``clipfast train``: check the options, train, and write the results of the finished run."""

import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import plain_names
from ..checkpoints.of_run import read_saved
from ..checkpoints.open_clip_folder import write_open_clip_folder
from ..checkpoints.preprocessing import preprocessing_of
from ..data import LOST, lost_parts
from ..distributed.dtensors import gather_full
from ..distributed.ending import Interrupted, Interruption
from ..distributed.world import ALONE, World
from ..evaluate.evaluate import Evaluation
from ..io.files import replace_text
from ..models.file_tokenizer import FileTokenizer
from ..runs.folder import RunFolder
from ..runs.lock import locked
from .logs import log, logging_to
from .option_checks import flag_name
from .preflight import preflight
from .recipes import describe
from .remote_sync import RemoteCopy
from .reports import Reports, check_wandb
from .train_config import TrainConfig
from .trainer import Trainer

SHOWN = 10  # the log names at most this many damaged parts of shards

PLACE = ("logs", "name")  # options for the run's folder, which may be moved; a resumed run may change them

OF_MODEL = ("model", "force_quick_gelu", "force_image_size", "force_context_length")  # options that change the model


def train(
    config: TrainConfig,
    resume: Path | None = None,
    origins: Mapping[str, str] | None = None,
    world: World = ALONE,
    warnings: Sequence[str] = (),
) -> tuple[RunFolder, int | None]:
    """Train a CLIP or SigLIP model as the options ``config`` say, and write the run to its folder.

    Args:
        config: all options.
        resume: checkpoint to continue from. If the checkpoint belongs to this run, the run continues in its folder.
        origins: the origin of each option that is not at its default, for ``params.txt``, which lists all options.
        world: the processes that train together; each of them calls this function.
        warnings: further lines for the log at the start.

    Returns:
        The run's folder, and the signal that interrupted the run if one did.

    Raises:
        ImportError: a package is missing that reads the data.
        ValueError: options, data or the checkpoint cannot be used, or another process writes to the folder. This is
            raised before the first step.
        TrainingError: losses, gradients or weights are not finite, or too many pairs cannot be decoded.
        DiskFullError: there is no space for the last checkpoint or the results.
        OSError: the last checkpoint or the results cannot be written for another reason.
    """
    # The default name contains the time. Rank 0 chooses it for all ranks, because their clocks may differ.
    name = world.on_main(lambda: config.name or f"{Path(config.model).stem}-{time.strftime('%Y_%m_%d-%H_%M_%S')}")
    folder = RunFolder(Path(config.logs) / name)
    world.write_to(folder.path / "stacks")
    is_own = resume is not None and resume.resolve().parent == folder.checkpoints.resolve()
    with locked(folder.path) if world.is_main else contextlib.nullcontext() as folder.lock:
        world.on_main(lambda: folder.refuse_other_run(resuming=is_own))
        world.on_main(lambda: check_wandb(config.report_to))
        checkpoint = read_saved(resume) if resume is not None else {}
        own = checkpoint.get("clipfast", {})
        with world.local_first():  # the first process of each machine indexes the shards, and the others read its index
            found = preflight(config, folder, own, world)
        trainer = Trainer(config, folder, checkpoint or None, world)
        del checkpoint  # frees its memory for training
        _check_steps(trainer)
        saved = own.get("config", {})
        options, changed = dataclasses.asdict(config), changed_options(saved, config)
        _refuse_changes(trainer, changed, own if is_own else None)
        step = trainer.progress.step if is_own else None
        remote = _remote_copy(trainer, step)
        if world.is_main:
            folder.create(after_step=step)
            trainer.checkpoints.begin(resume if is_own else None)
            folder.record_options(saved if is_own and saved else options, {key: options[key] for key in changed}, step)
            replace_text(folder.path / "params.txt", describe(config, origins or {}) + "\n")
        with (
            logging_to(folder, world, by_machine=config.log_local),
            Interruption(quiet=world.size > 1) as interruption,
            remote,  # the copy to remote storage exits after the reports, and so uploads their closed files
            Reports(config, folder) if world.is_main else contextlib.nullcontext() as trainer.log.reports,
        ):
            if world.is_main:
                for warning in warnings:
                    log.warning(warning)
                log.info(f"{sum(trainer.data.sizes):,} pairs in {len(trainer.data.shards):,} shard(s); {found}")
                _record_losses(trainer)
                _log_start(trainer, resume, changed)
            evaluation = trainer.fit(interruption)
            try:
                if trainer.signum is None:
                    _evaluate_and_finish(trainer, evaluation)
            except Interrupted:
                trainer.conclude(interruption)
    return folder, trainer.signum


def _refuse_changes(trainer: Trainer, changed: Mapping[str, str], own: Mapping[str, Any] | None) -> None:
    """Raise ValueError if an option of a resumed run differs from its checkpoint and cannot change any more.

    Args:
        trainer: the trainer, which has loaded the checkpoint.
        changed: the flags of the options that differ from the checkpoint, by option name.
        own: the entry ``clipfast`` of the checkpoint if the checkpoint belongs to this run; otherwise None.

    Raises:
        ValueError: the options change the model, or the run is finished.
    """
    other_model = ", ".join(changed[key] for key in OF_MODEL if key in changed)
    if other_model:
        raise ValueError(f"the weights of a checkpoint are those of its own model: {other_model}")
    if own is not None and changed and trainer.progress.step >= trainer.total_steps:
        length = "--epochs" if trainer.config.samples_seen is None else "--samples-seen"
        raise ValueError(
            f"the run has finished {own['progress']['step']} of {trainer.total_steps} steps, and its options cannot "
            f"change any more: {', '.join(changed.values())}; only more {length} would continue it"
        )


def _check_steps(trainer: Trainer) -> None:
    """Raise ValueError if the ranks have resumed from checkpoints of different steps.

    Raises:
        ValueError: the steps differ; raised on all ranks.
    """
    steps = trainer.world.gather(trainer.progress.step)

    def check() -> None:
        """Raise ValueError on rank 0 if the training ranks are at different steps."""
        if len(set(steps)) > 1:
            places = ", ".join(f"rank {rank} after step {step}" for rank, step in enumerate(steps))
            raise ValueError(
                f"the ranks would go on from different checkpoints: {places}; all machines must see the same --logs"
            )

    trainer.world.on_main(check)


def _remote_copy(trainer: Trainer, step: int | None) -> contextlib.AbstractContextManager[object]:
    """Return a context in which rank 0 uploads the files of a run to ``--remote-sync``, if that is given.

    ``step`` is the step from which the run resumes in its own folder, or None.

    Raises:
        ValueError: the URL cannot be used, or holds another run.
    """
    config, made = trainer.config, list[contextlib.AbstractContextManager[object]]([contextlib.nullcontext()])

    def make() -> None:
        """Set up the uploads on rank 0; raise ValueError if the URL holds another run."""
        remote = RemoteCopy(trainer.folder, config.remote_sync or "", config.remote_sync_frequency)
        remote.refuse_other_run(step)
        trainer.checkpoints.after_save = remote.notify
        made[0] = remote

    if config.remote_sync:
        trainer.world.on_main(make)
    return made[0]


def changed_options(saved: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """Return the training options that differ from those in a checkpoint, by name, as texts "--flag old -> new".

    An option that the checkpoint lacks had its default, since the checkpoint is from an older clipfast. Checkpoints of
    OpenCLIP have no options at all (``saved`` is {}), so nothing counts as changed.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    earlier, options = (json.loads(json.dumps(values)) for values in (defaults | saved, dataclasses.asdict(config)))
    return {
        key: f"{flag_name(key)} {earlier[key]} -> {now}"
        for key, now in options.items()
        if saved and key not in PLACE and now != earlier[key]
    }


def _log_start(trainer: Trainer, resume: Path | None, changed: dict[str, str]) -> None:
    """Log the start of a training run: model, steps, batch, folder, MFU, and the options that a resumed run changes."""
    config, total = trainer.config, trainer.total_steps
    ranks, most = trainer.world.size, " at most" if config.use_naflex else ""
    share = f" ({trainer.batch_size} on each of {ranks} processes{most})" if ranks > 1 else ""
    sizes = " or ".join(map(str, sorted(set(trainer.data.plan.sizes.values()))))
    log.info(
        f"{config.model} on {trainer.device}, {total} steps of {sizes} pairs{share} "
        f"from {len(trainer.data.shards)} shard(s); run folder {trainer.folder.path}, all options in params.txt"
    )
    is_kept = trainer.batch_size != config.batch_size and not config.use_naflex
    if config.global_batch_size is None and is_kept:
        log.info(f"The run keeps its batch of {trainer.data.batch_size} pairs; --global-batch-size is for another one.")
    if trainer.about_mfu is not None:
        log.info(trainer.about_mfu)
    if resume is not None:
        log.info(f"Resuming from {resume} at step {trainer.progress.step} of {total}.")
    if changed:
        log.info(f"Changed from here on: {', '.join(changed.values())}")
    if trainer.schedule.warmup >= total:
        reached = trainer.schedule.at(total - 1)
        log.warning(
            f"--warmup {config.warmup} is not shorter than the run of {total} steps: the learning rate only rises to "
            f"{reached:.2g} of {config.lr:g}; a tenth of the steps is usual, --warmup auto"
        )


def _record_losses(trainer: Trainer) -> None:
    """Log the damaged parts of training shards, and record them in ``skipped.tsv`` under step 0."""
    lost = lost_parts(trainer.data.damaged)
    for _, _, loss in lost[:SHOWN]:
        log.warning(loss)
    if len(lost) > SHOWN:
        log.warning(f"{len(lost) - SHOWN} more parts of shards are lost: {trainer.folder.skipped_path} lists them")
    trainer.folder.record_skipped(0, lost)


def _evaluate_and_finish(trainer: Trainer, evaluation: Evaluation | None) -> None:
    """Run the evaluations that are missing after the last training step, and let rank 0 write the run's results.

    All ranks must call it.
    """
    validation, step = trainer.validation, trainer.progress.step
    evaluation = evaluation or validation.evaluate(step)
    raw = validation.evaluate_last_weights()
    if not validation.imagenet.results:
        validation.evaluate_imagenet(step)
    with validation.averaged():
        weights = gather_full(trainer.model.state_dict(), keep=trainer.world.is_main)
        trainer.world.on_main(lambda: finish(trainer, evaluation, raw, weights))


def finish(
    trainer: Trainer, evaluation: Evaluation | None, raw: Evaluation | None, weights: Mapping[str, Tensor]
) -> None:
    """Write ``results.json``, the exported model and the pictures of a finished run into its folder.

    Args:
        trainer: the trainer of the run.
        evaluation: the evaluation of the exported weights, if there are validation data.
        raw: the evaluation of the last weights, if their average is exported.
        weights: the exported weights: the moving average, or the weights after the last step.
    """
    folder, config, model = trainer.folder, trainer.config, trainer.model
    folder.hold()
    write_open_clip_folder(folder.path, model.config, preprocessing_of(model), plain_names(weights))
    if isinstance(trainer.tokenizer, FileTokenizer):
        trainer.tokenizer.save(folder.path)
    losses = [line["loss"] for line in folder.metrics() if "loss" in line]
    lost = collections.Counter({LOST: sum(shard.lost for shard in trainer.data.damaged)})
    results = {
        "model": config.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trainer.progress.step,
        "samples_seen": trainer.budget.seen,
        "train_seconds": round(trainer.progress.seconds, 1),
        "train_loss": losses[-1] if losses else None,
        "skipped_steps": trainer.progress.skipped_steps,
        "skipped_pairs": (trainer.budget.kinds + lost).total(),
        "skipped_kinds": dict(trainer.budget.kinds + lost),
        "damaged_shards": {shard.name: shard.lost for shard in trainer.data.damaged},
        "device": str(trainer.device),
        "torch": torch.__version__,
        **(evaluation.results if evaluation else {}),
        **trainer.validation.imagenet.results,
    }
    if trainer.average is not None:
        # The accuracies above are those of the averaged weights, which are exported.
        results["ema"] = {"decay": trainer.average.decay}
    if raw is not None:
        results["raw"] = raw.results
    folder.write_json("results.json", results)
    made = ["results.json", *_pictures(trainer, evaluation)]
    log.info(f"Finished: {', '.join(made)} in {folder.path}; load the model as local-dir:{folder.path}")


def _pictures(trainer: Trainer, evaluation: Evaluation | None) -> list[str]:
    """Draw the learning curve and a contact sheet of a finished run, if matplotlib is there; return the file names."""
    try:
        from ..evaluate.pictures import contact_sheet, plot_runs
        from ..runs.status import read_history
    except ImportError:
        log.warning("No pictures: they need matplotlib, pip install 'clipfast[eval]'")
        return []
    folder = trainer.folder
    plot_runs([read_history(folder.path)], folder.path / "learning_curve.png")
    images = trainer.validation.labelled
    if evaluation is None or images is None:
        return ["learning_curve.png"]
    contact_sheet(images, evaluation, folder.path / "contact_sheet.png")
    return ["learning_curve.png", "contact_sheet.png"]

"""From options to a finished run: what ``clipfast train`` does."""

import dataclasses
import time
from pathlib import Path

import torch

from ..checkpoint import export_open_clip, read_checkpoint
from ..evaluation.evaluate import Evaluation
from .config import TrainConfig
from .interruption import Interruption
from .logs import log, logging_to
from .run import RunFolder
from .trainer import Trainer


def train(config: TrainConfig, resume: Path | None = None) -> tuple[RunFolder, int | None]:
    """Train a model as ``config`` says.

    Args:
        config: all options.
        resume: checkpoint to continue from. A run whose own checkpoint it is continues in its folder.

    Returns:
        The run's folder, and the signal that interrupted the run if one did.

    Raises:
        ImportError: a package is missing that reads the data or draws the pictures.
        ValueError: options, data or the checkpoint cannot be used; nothing has been trained then.
        TrainingError: loss or weights are not finite, or too many pairs cannot be decoded; the last checkpoint is left.
    """
    # Not at the top, where it would keep those without matplotlib from every other use of this module. Not in
    # ``finish``, where they would learn only after the training that it is missing.
    from ..evaluation import pictures  # noqa: F401

    name = config.name or f"{Path(config.model).stem}-{time.strftime('%Y_%m_%d-%H_%M_%S')}"
    folder = RunFolder(Path(config.logs) / name)
    is_own = resume is not None and resume.resolve().parent == folder.checkpoints.resolve()
    folder.refuse_other_run(resuming=is_own)
    trainer = Trainer(config, folder, read_checkpoint(resume) if resume is not None else None)
    folder.create(after_step=trainer.progress.step if is_own else None)
    folder.write_json("config.json", dataclasses.asdict(config))
    with logging_to(folder.path), Interruption() as interruption:
        log.info(
            f"{config.model} on {trainer.device}, {trainer.total_steps} steps of {config.batch_size} pairs "
            f"from {len(trainer.data.shards)} shard(s); run folder {folder.path}"
        )
        if resume is not None:
            log.info(f"Resuming from {resume} at step {trainer.progress.step} of {trainer.total_steps}.")
        evaluation = trainer.fit(interruption)
        if interruption.signum is None:
            finish(trainer, evaluation or trainer.evaluate())
    return folder, interruption.signum


def finish(trainer: Trainer, evaluation: Evaluation | None) -> None:
    """Write ``results.json``, the exported model and the pictures of a finished run into its folder."""
    from ..evaluation.pictures import contact_sheet, learning_curve

    folder, config = trainer.folder, trainer.config
    export_open_clip(trainer.model, folder.path)
    losses = [line["loss"] for line in folder.metrics() if "loss" in line]
    results = {
        "model": config.model,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.progress.step,
        "train_seconds": round(trainer.progress.seconds, 1),
        "train_loss": losses[-1] if losses else None,
        "skipped_pairs": trainer.budget.skipped,
        "device": str(trainer.device),
        "torch": torch.__version__,
        **(evaluation.results if evaluation else {}),
    }
    folder.write_json("results.json", results)
    title = f"{config.model} on {config.train_data}\nvalidated on {config.val_data or 'nothing'}"
    learning_curve(folder.metrics(), title, folder.path / "learning_curve.png")
    made = ["results.json", "learning_curve.png"]
    if evaluation is not None:
        contact_sheet(trainer.validation_images(), evaluation, folder.path / "contact_sheet.png")
        made.append("contact_sheet.png")
    log.info(f"Finished: {', '.join(made)} in {folder.path}; load the model as local-dir:{folder.path}")

"""The training loop: batches in, checkpoints and results out, and nothing lost in between."""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import CheckpointError, export_open_clip, load_weights, read_checkpoint, write_checkpoint
from ..data import Batch, PairStream, count_samples, expand_shards, pair_loader
from ..evaluation import Evaluation, encode_labelled, evaluate, read_labelled
from ..evaluation.pictures import contact_sheet, learning_curve
from ..factory import create_model
from ..images import augmentation, image_transform
from ..kernels import contrastive_loss
from ..models import add_model_config
from ..tokenizer import Tokenizer
from .config import TrainConfig
from .optim import adamw, cosine_lr
from .run import Interruption, Meter, RunFolder, log, logging_to

MIN_SEEN_FOR_BAD_FRACTION = 100
CHECKPOINT_VERSION = 1


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what is left of it."""


class Trainer:
    """One run: model, optimiser, position, and the folder that it lives in."""

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.device = torch.device(resolve_device(config.device))
        self.autocast = config.precision == "amp_bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.shards = expand_shards(config.train_data)
        self.num_samples = config.train_num_samples or count_samples(self.shards)
        self.steps_per_epoch = self.num_samples // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"the shards hold {self.num_samples} pairs, less than one batch of {config.batch_size}")
        self.total_steps = self.steps_per_epoch * config.epochs
        torch.manual_seed(config.seed)
        self.model = create_model(
            _model_name(config.model), config.pretrained, "pure_bf16" if config.precision == "pure_bf16" else "fp32",
            self.device, backend=config.backend,
        )  # fmt: skip
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        self.tokenizer = Tokenizer(self.model.context_length)
        is_vit = isinstance(self.model.config.vision.layers, int)
        betas = (config.beta1, config.beta2 or (0.98 if is_vit else 0.999))
        self.optimizer = adamw(self.model, config.lr, betas, config.eps or (1e-6 if is_vit else 1e-8), config.wd)
        self.step = 0
        self.seen = self.skipped = 0
        self.seconds = 0.0

    def resume(self, path: Path) -> None:
        """Take weights, optimiser and position from a checkpoint, of this package or of OpenCLIP.

        Raises:
            CheckpointError: it cannot be read, or does not fit.
        """
        checkpoint = read_checkpoint(path)
        if "optimizer" not in checkpoint:
            raise CheckpointError(
                f"{path} has no optimizer state, so training cannot go on from it: "
                "use --pretrained to start from its weights"
            )
        load_weights(self.model, checkpoint, path)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        position = checkpoint.get("clipfast", {})
        self.step = position.get("step", checkpoint["epoch"] * self.steps_per_epoch)
        self.seconds = position.get("seconds", 0.0)
        self.folder.forget_after(self.step)
        log.info(f"Resuming from {path} at step {self.step} of {self.total_steps}.")

    def save(self, *, keep: bool = False) -> Path:
        """Write ``epoch_latest.pt``, and with ``keep`` also ``epoch_N.pt``."""
        checkpoint = {
            "epoch": self.step // self.steps_per_epoch,
            "name": self.folder.path.name,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clipfast": {
                "version": CHECKPOINT_VERSION,
                "model_config": self.model.config.to_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "config": json.loads(json.dumps(dataclasses.asdict(self.config))),
            },
        }
        if keep:
            write_checkpoint(self.folder.checkpoints / f"epoch_{checkpoint['epoch']}.pt", checkpoint)
        write_checkpoint(self.folder.latest, checkpoint)
        return self.folder.latest

    def fit(self, interruption: Interruption) -> Evaluation | None:
        """Train to the end, or to an interruption; returns the last evaluation, if there is anything to evaluate on."""
        evaluation = None
        while self.step < self.total_steps and interruption.signum is None:
            self._train_epoch(interruption)
            if self.step % self.steps_per_epoch == 0:
                evaluation = self.evaluate()
                self._save_epoch()
        if interruption.signum is not None:
            log.info(f"Interrupted. Saved {self.save()}; go on with: clipfast train --resume {self.folder.path}")
        return evaluation

    def _save_epoch(self) -> None:
        epoch = self.step // self.steps_per_epoch
        frequency = self.config.save_frequency
        log.info(f"Saved {self.save(keep=frequency > 0 and epoch % frequency == 0)}")

    def _train_epoch(self, interruption: Interruption) -> None:
        epoch, first = divmod(self.step, self.steps_per_epoch)
        self.model.train()
        meter = Meter()
        started = time.perf_counter()
        losses: list[Tensor] = []
        for batch in self._batches(epoch, first, meter):
            losses.append(self._train_step(batch))
            meter.step(len(batch))
            self.step += 1
            self._count_skipped(batch)
            if self.step % self.config.log_every == 0 or self.step % self.steps_per_epoch == 0:
                self._log(torch.stack(losses), meter)
                losses.clear()
                meter.reset()
            if self.config.save_every and self.step % self.config.save_every == 0 and self.step % self.steps_per_epoch:
                _require_finite(losses, self.step)
                self.save()
            if interruption.signum is not None:
                _require_finite(losses, self.step)
                break
        self.seconds += time.perf_counter() - started

    def _batches(self, epoch: int, first: int, meter: Meter) -> Iterator[Batch]:
        config = self.config
        augment = augmentation(config.affine, config.color_jitter, config.hue, config.gray_prob)
        transform = image_transform(
            self.model.visual.image_size, train=True, scale=config.crop_scale, augment=augment, uint8=True
        )
        stream = PairStream(
            self.shards, transform, self.tokenizer, config.batch_size, self.steps_per_epoch, config.seed, epoch, first,
            config.unique_by, config.keyword_prob,
        )  # fmt: skip
        batches = iter(pair_loader(stream, config.workers, pin_memory=self.device.type == "cuda"))
        description = f"epoch {epoch + 1}/{config.epochs}"
        with tqdm(
            total=self.steps_per_epoch, initial=first, desc=description, unit="step", disable=None, leave=False
        ) as bar:
            for _ in range(first, self.steps_per_epoch):
                with meter.waiting():
                    batch = next(batches)
                yield batch
                bar.update()

    def _train_step(self, batch: Batch) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_lr(self.step, self.config.lr, self.config.warmup, self.total_steps)
        images = batch.images.to(self.device, non_blocking=True)
        texts = batch.texts.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            image_features, text_features, logit_scale = self.model(images, texts)
            loss = contrastive_loss(image_features, text_features, logit_scale, backend=self.config.backend)
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip_norm)
        self.optimizer.step()
        self.model.clamp_logit_scale()
        return loss.detach()

    def _count_skipped(self, batch: Batch) -> None:
        self.seen += len(batch) + len(batch.skipped)
        self.skipped += len(batch.skipped)
        if not batch.skipped:
            return
        self.folder.record_skipped(batch.skipped)
        limit = self.config.max_bad_fraction
        if self.seen >= MIN_SEEN_FOR_BAD_FRACTION and self.skipped > limit * self.seen:
            raise TrainingError(
                f"{self.skipped} of {self.seen} pairs could not be used, more than --max-bad-fraction {limit}; "
                f"they are listed in {self.folder.path / 'skipped.tsv'}; last: {': '.join(batch.skipped[-1])}"
            )

    def _log(self, losses: Tensor, meter: Meter) -> None:
        _require_finite(losses, self.step)
        rates = meter.read()
        last, mean = losses[-1].item(), losses.mean().item()
        scale = self.model.logit_scale.exp().item()
        lr = self.optimizer.param_groups[0]["lr"]
        epoch, within = divmod(self.step - 1, self.steps_per_epoch)
        pairs, total = (within + 1) * self.config.batch_size, self.steps_per_epoch * self.config.batch_size
        log.info(
            f"Train Epoch: {epoch} [{pairs:>{len(str(total))}}/{total} ({100 * pairs / total:.0f}%)] "
            f"Data (t): {rates['data_time']:.3f} Batch (t): {rates['batch_time']:.3f}, "
            f"{rates['pairs_per_second']:.6g}/s, {rates['pairs_per_second']:.6g}/s/gpu "
            f"LR: {lr:.6f} Logit Scale: {scale:.3f} "
            f"Contrastive_loss: {last:.5g} ({mean:.5g}) Loss: {last:.5g} ({mean:.5g}) "
            f"Data-wait: {100 * rates['data_wait']:.1f}%"
        )
        self.folder.record(step=self.step, epoch=epoch, loss=mean, lr=lr, logit_scale=scale, **rates)

    def evaluate(self) -> Evaluation | None:
        """Zero-shot accuracy and retrieval on ``val_data``, logged and recorded; None without any."""
        config = self.config
        if config.val_data is None:
            return None
        self.model.eval()
        transform = image_transform(self.model.visual.image_size, uint8=True)
        images = encode_labelled(
            self.model, read_labelled(config.val_data, config.val_group_by), transform, 256, self.device
        )
        evaluation = evaluate(self.model, self.tokenizer, images, leave_out=config.val_leave_out)
        results = evaluation.results
        log.info(
            f"Eval step {self.step}: zero-shot top-1 {results['zero_shot']['top1']:.4f}, "
            f"top-5 {results['zero_shot']['top5']:.4f}; "
            f"text to image R@1 {results['retrieval']['text_to_image']['R@1']:.4f}"
        )
        self.folder.record(step=self.step, eval=results)
        return evaluation


def train(config: TrainConfig, resume: Path | None = None) -> tuple[RunFolder, int | None]:
    """Train a model as ``config`` says.

    Args:
        config: all options.
        resume: checkpoint to go on from; the run's own goes on in its folder.

    Returns:
        The run's folder, and the signal that interrupted it, if one did.

    Raises:
        ValueError: options, data or a checkpoint that cannot be used; nothing has been trained then.
        TrainingError: the loss is not finite, or too many pairs cannot be decoded; the last checkpoint is left.
    """
    folder = RunFolder(
        Path(config.logs) / (config.name or f"{Path(config.model).stem}-{time.strftime('%Y_%m_%d-%H_%M_%S')}")
    )
    trainer = Trainer(config, folder)
    folder.create(resuming=resume is not None and resume.resolve().is_relative_to(folder.path.resolve()))
    folder.write_text("config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    with logging_to(folder.path), Interruption() as interruption:
        if resume is not None:
            trainer.resume(resume)
        log.info(
            f"{config.model} on {trainer.device}, {trainer.total_steps} steps of {config.batch_size} pairs "
            f"from {len(trainer.shards)} shard(s); run folder {folder.path}"
        )
        evaluation = trainer.fit(interruption)
        if interruption.signum is None:
            finish(trainer, evaluation or trainer.evaluate())
    return folder, interruption.signum


def finish(trainer: Trainer, evaluation: Evaluation | None) -> None:
    """Leave what a finished run is judged by: ``results.json``, the exported model, and the pictures."""
    folder = trainer.folder
    export_open_clip(trainer.model, folder.path)
    losses = [line["loss"] for line in folder.metrics() if "loss" in line]
    results = {
        "model": trainer.config.model,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.step,
        "train_seconds": round(trainer.seconds, 1),
        "train_loss": losses[-1] if losses else None,
        "skipped_pairs": trainer.skipped,
        "device": str(trainer.device),
        "torch": torch.__version__,
        **(evaluation.results if evaluation else {}),
    }
    folder.write_text("results.json", json.dumps(results, indent=2) + "\n")
    title = (
        f"{trainer.config.model} on {trainer.config.train_data}, validated on {trainer.config.val_data or 'nothing'}"
    )
    learning_curve(folder.metrics(), title, folder.path / "learning_curve.png")
    if evaluation is not None and trainer.config.val_data is not None:
        images = read_labelled(trainer.config.val_data, trainer.config.val_group_by)
        contact_sheet(images, evaluation, folder.path / "contact_sheet.png")
    log.info(
        f"Finished: {folder.path}/results.json, learning_curve.png, contact_sheet.png; "
        f"load the model with local-dir:{folder.path}"
    )


def _require_finite(losses: Tensor | list[Tensor], step: int) -> None:
    if not all(loss.isfinite() for loss in losses):
        raise TrainingError(
            f"the loss is not finite at step {step}: lower --lr, or set --grad-clip-norm; "
            "the last checkpoint is from before"
        )


def resolve_device(name: str) -> str:
    """``auto`` as cuda where there is a GPU, else cpu; any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _model_name(model: str) -> str:
    if not model.endswith(".json"):
        return model
    add_model_config(model)
    return Path(model).stem

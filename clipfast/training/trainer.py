"""One training run as an object: model, optimiser, position, and how they are saved and taken up again."""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..accumulation import largest_micro_batch
from ..checkpoint import CheckpointError, load_weights, write_checkpoint
from ..data import Batch, PairStream, count_samples, expand_shards, pair_loader
from ..evaluation import Evaluation, encode_labelled, evaluate, read_labelled
from ..factory import create_model
from ..images import augmentation, image_transform
from ..kernels import contrastive_loss
from ..models import CLIP, CLIPConfig, add_model_config
from ..tokenizer import Tokenizer
from .config import AUTO, TrainConfig, flag_name
from .optim import adamw, cosine_lr, set_lr
from .run import Interruption, Meter, RunFolder, log
from .step import GraphedStep, TrainingStep, Upload

MIN_SEEN_FOR_BAD_FRACTION = 100
CHECKPOINT_VERSION = 1
EVAL_BATCH_SIZE = 256
COMPILER = "inductor"
MOMENTS = 2  # of AdamW, each as large as the weights


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what is left of it."""


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    seen: int = 0  # pairs, with those that had to be left out
    skipped: int = 0
    seconds: float = 0.0  # spent training, over all sessions


class Trainer:
    """One run.

    Args:
        config: its options.
        folder: where it writes.
        checkpoint: what it goes on from, of this package or of OpenCLIP; its model configuration, where it has one,
            stands above ``config.model``.

    Raises:
        ValueError: options, data or a checkpoint that cannot be used.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, checkpoint: dict[str, Any] | None = None) -> None:
        self.config, self.folder = config, folder
        self.device = torch.device(resolve_device(config.device))
        if config.cuda_graphs and self.device.type != "cuda":
            raise ValueError(f"--cuda-graphs needs a GPU, and this run is on {self.device}")
        self.autocast = config.precision.startswith("amp") or (
            config.precision == "auto" and self.device.type == "cuda"
        )
        own: dict[str, Any] = (checkpoint or {}).get("clipfast", {})
        self.shards = expand_shards(config.train_data)
        self.num_samples = config.train_num_samples or self._known_samples(own) or count_samples(self.shards)
        self.steps_per_epoch = self.num_samples // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"the shards hold {self.num_samples} pairs, less than one batch of {config.batch_size}")
        self.total_steps = self.steps_per_epoch * config.epochs
        if config.val_data is not None:
            # what is wrong with it should show before an epoch has been spent
            next(read_labelled(config.val_data, config.val_group_by))
        torch.manual_seed(config.seed)
        self.model = self._build_model(own)
        self.tokenizer = Tokenizer(self.model.context_length)
        is_vit = isinstance(self.model.config.vision.layers, int)
        betas = (config.beta1, config.beta2 or (0.98 if is_vit else 0.999))
        eps = config.eps or (1e-6 if is_vit else 1e-8)
        self.optimizer = adamw(self.model, config.lr, betas, eps, config.wd, capturable=config.cuda_graphs)
        loss = functools.partial(contrastive_loss, backend=config.backend)
        self.step = TrainingStep(
            self.model, self.optimizer, loss, self._autocast, config.grad_clip_norm, self._first_micro_batch_size(own)
        )
        self.upload = Upload(self.device)
        self._take_step = GraphedStep(self.step, self.model.context_length) if config.cuda_graphs else self.step
        self.progress = Progress()
        if checkpoint is not None:
            self._take_up(checkpoint, own)

    def _known_samples(self, own: dict[str, Any]) -> int | None:
        stream = own.get("stream", {})
        return stream.get("num_samples") if stream.get("train_data") == self.config.train_data else None

    def _first_micro_batch_size(self, own: dict[str, Any]) -> int:
        """What is asked for. For "auto" what the run had, since BatchNorm depends on it, or else the whole batch; what
        does not fit is halved before the first step.
        """
        size, batch_size = self.config.micro_batch_size, self.config.batch_size
        if isinstance(size, int):
            return min(size, batch_size)
        was_same = own.get("config", {}).get("micro_batch_size") == size
        was_same &= own.get("stream", {}).get("batch_size") == batch_size
        return own.get("micro_batch_size", batch_size) if was_same else batch_size

    def _build_model(self, own: dict[str, Any]) -> CLIP:
        config = self.config
        if "model_config" in own:
            known = CLIPConfig.from_dict(own["model_config"]).with_vision(patch_dropout=config.force_patch_dropout)
            with self.device:
                model = CLIP(known)
            model.set_backend(config.backend)
            model.to(torch.bfloat16 if config.precision == "pure_bf16" else torch.float32)
        else:
            precision = "pure_bf16" if config.precision == "pure_bf16" else "fp32"
            name = _known_model(config.model)
            model = create_model(
                name, config.pretrained, precision=precision, device=self.device,
                force_patch_dropout=config.force_patch_dropout, backend=config.backend,
            )  # fmt: skip
        selective = config.selective_checkpointing
        model.set_grad_checkpointing(config.grad_checkpointing or selective, selective=selective)
        if config.torchcompile:
            model.compile(fullgraph=True, backend=COMPILER)
        return model

    def _take_up(self, checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
        """Weights, optimiser and position of ``checkpoint``; the options of this run stay its own."""
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            raise CheckpointError(
                "the checkpoint has no optimizer state, so training cannot go on from it: "
                "use --pretrained to start from its weights"
            )
        load_weights(self.model, checkpoint, "the checkpoint")
        state = checkpoint["optimizer"]
        for group, mine in zip(state["param_groups"], self.optimizer.param_groups, strict=False):
            group.update({key: value for key, value in mine.items() if key != "params"})
        try:
            self.optimizer.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint's optimizer state does not fit the model: {error}") from error
        self.progress = Progress(**own.get("progress", {"step": checkpoint["epoch"] * self.steps_per_epoch}))
        changed = {key: value for key, value in own.get("stream", {}).items() if value != self._stream()[key]}
        if not changed:
            return
        if self.progress.step % own["stream"]["steps_per_epoch"]:
            flags = ", ".join(
                f"{flag_name(key)} (was {value})" for key, value in changed.items() if hasattr(self.config, key)
            )
            raise ValueError(
                f"the checkpoint is from within an epoch, whose data cannot change: leave {flags} as it was"
            )
        self.progress.step = checkpoint["epoch"] * self.steps_per_epoch

    def _stream(self) -> dict[str, Any]:
        """What the order of the data depends on."""
        keys = ("train_data", "batch_size", "workers", "seed", "unique_by")
        own = {"num_samples": self.num_samples, "steps_per_epoch": self.steps_per_epoch}
        return own | {key: getattr(self.config, key) for key in keys}

    def save(self, *, keep: bool = False) -> Path:
        """Write ``epoch_latest.pt``, and with ``keep`` also ``epoch_N.pt``.

        Raises:
            TrainingError: the weights are not finite; the checkpoint that is there stays.
        """
        if not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            raise _not_finite("the weights are", self.progress.step)
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        checkpoint = {
            "epoch": self.progress.step // self.steps_per_epoch,
            "name": self.folder.path.name,
            "state_dict": self.model.state_dict(),
            "optimizer": optimizer,
            "clipfast": {
                "version": CHECKPOINT_VERSION,
                "model_config": self.model.config.to_dict(),
                "progress": dataclasses.asdict(self.progress),
                "stream": self._stream(),
                "micro_batch_size": self.step.micro_batch_size,
                "config": json.loads(json.dumps(dataclasses.asdict(self.config))),
            },
        }
        if keep:
            write_checkpoint(self.folder.checkpoints / f"epoch_{checkpoint['epoch']}.pt", checkpoint)
        write_checkpoint(self.folder.latest, checkpoint)
        return self.folder.latest

    def fit(self, interruption: Interruption) -> Evaluation | None:
        """Train to the end, or to an interruption; returns the last evaluation, if there was one."""
        evaluation = None
        if self.config.micro_batch_size == AUTO and self.progress.step < self.total_steps:
            self._fit_micro_batch()
        while self.progress.step < self.total_steps and interruption.signum is None:
            self._train_epoch(interruption)
            epoch, within = divmod(self.progress.step, self.steps_per_epoch)
            if within == 0:
                frequency = self.config.save_frequency
                log.info(f"Saved {self.save(keep=frequency > 0 and epoch % frequency == 0)}")
                evaluation = self.evaluate()
        if interruption.signum is not None:
            log.info(f"Interrupted. Saved {self.save()}; go on with: clipfast train --resume {self.folder.path}")
        return evaluation

    def _fit_micro_batch(self) -> None:
        """Halve the micro-batch until it fits, and say what became of it."""
        batch_size, how = self.config.batch_size, "a CPU does not say what fits: nothing was tried"
        if _can_run_out(self.device):
            size = self.model.visual.image_size
            images = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=self.device)
            texts = torch.zeros(batch_size, self.model.context_length, dtype=torch.long, device=self.device)
            weights = sum(parameter.nbytes for parameter in self.model.parameters())
            self.model.train()
            with self._autocast():
                self.step.micro_batch_size = largest_micro_batch(
                    self.model, images, texts, self.step.loss, start=self.step.micro_batch_size,
                    reserve=0 if self.optimizer.state else MOMENTS * weights,
                )  # fmt: skip
            how = "the most that was found to fit"
        found = self.step.micro_batch_size
        pairs = f"{found} of {batch_size} pairs" if found < batch_size else f"the whole batch of {batch_size} pairs"
        log.info(f"--micro-batch-size auto: {pairs} at a time ({how})")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def _train_epoch(self, interruption: Interruption) -> None:
        epoch, first = divmod(self.progress.step, self.steps_per_epoch)
        self.model.train()
        meter, losses = Meter(), list[Tensor]()
        started = time.perf_counter()
        for batch in self._batches(epoch, first, meter):
            losses.append(self._train_step(batch))
            meter.step(len(batch))
            self.progress.step += 1
            now = time.perf_counter()
            self.progress.seconds, started = self.progress.seconds + now - started, now
            self._count_skipped(batch)
            is_last = self.progress.step % self.steps_per_epoch == 0
            if is_last or self.progress.step % self.config.log_every_n_steps == 0:
                self._log(torch.stack(losses), meter)
                losses.clear()
                meter.reset()
            if not is_last and self.config.save_every and self.progress.step % self.config.save_every == 0:
                self.save()
            if interruption.signum is not None:
                break

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
        batches = pair_loader(stream, config.workers, pin_memory=self.device.type == "cuda")
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
        set_lr(self.optimizer, cosine_lr(self.progress.step, self.config.lr, self.config.warmup, self.total_steps))
        # what is drawn depends on the step alone: a run that was interrupted drops the patches that it would have
        torch.manual_seed(self.config.seed + self.progress.step)
        return self._take_step(*self.upload(batch))

    def _count_skipped(self, batch: Batch) -> None:
        progress, limit = self.progress, self.config.max_bad_fraction
        progress.seen += len(batch) + len(batch.skipped)
        progress.skipped += len(batch.skipped)
        if not batch.skipped:
            return
        self.folder.record_skipped(progress.step, batch.skipped)
        if progress.seen >= MIN_SEEN_FOR_BAD_FRACTION and progress.skipped > limit * progress.seen:
            raise TrainingError(
                f"{progress.skipped} of {progress.seen} pairs could not be used, more than --max-bad-fraction {limit}; "
                f"they are listed in {self.folder.skipped_path}; last: {': '.join(batch.skipped[-1])}"
            )

    def _log(self, losses: Tensor, meter: Meter) -> None:
        if not losses.isfinite().all():
            raise _not_finite("the loss is", self.progress.step)
        rates = meter.read()
        last, mean = losses[-1].item(), losses.mean().item()
        scale = self.model.logit_scale.exp().item()
        lr = float(self.optimizer.param_groups[0]["lr"])
        epoch, within = divmod(self.progress.step - 1, self.steps_per_epoch)
        pairs, total = (within + 1) * self.config.batch_size, self.steps_per_epoch * self.config.batch_size
        log.info(
            f"Train Epoch: {epoch} [{pairs:>{len(str(total))}}/{total} ({100 * pairs / total:.0f}%)] "
            f"Data (t): {rates['data_time']:.3f} Batch (t): {rates['batch_time']:.3f}, "
            f"{rates['pairs_per_second']:.6g}/s, {rates['pairs_per_second']:.6g}/s/gpu "
            f"LR: {lr:.6f} Logit Scale: {scale:.3f} "
            f"Contrastive_loss: {last:.5g} ({mean:.5g}) Loss: {last:.5g} ({mean:.5g}) "
            f"Data-wait: {100 * rates['data_wait']:.1f}%"
        )
        self.folder.record(step=self.progress.step, epoch=epoch, loss=mean, lr=lr, logit_scale=scale, **rates)

    def evaluate(self) -> Evaluation | None:
        """Zero-shot accuracy and retrieval on ``val_data``, logged and recorded; None without any."""
        config, step = self.config, self.progress.step
        if config.val_data is None:
            return None
        self.model.eval()
        transform = image_transform(self.model.visual.image_size, uint8=True)
        samples = read_labelled(config.val_data, config.val_group_by)
        images = encode_labelled(self.model, samples, transform, EVAL_BATCH_SIZE, self.device)
        evaluation = evaluate(self.model, self.tokenizer, images, leave_out=config.val_leave_out)
        results = evaluation.results
        log.info(
            f"Eval step {step}: zero-shot top-1 {results['zero_shot']['top1']:.4f}, "
            f"top-5 {results['zero_shot']['top5']:.4f}; "
            f"text to image R@1 {results['retrieval']['text_to_image']['R@1']:.4f}"
        )
        self.folder.record(step=step, eval=results)
        return evaluation


def _not_finite(what: str, step: int) -> TrainingError:
    return TrainingError(
        f"{what} not finite at step {step}: lower --lr, or set --grad-clip-norm; the last checkpoint is from before"
    )


def _can_run_out(device: torch.device) -> bool:
    """Whether there is an error to catch when memory runs out."""
    return device.type == "cuda"


def resolve_device(name: str) -> str:
    """``auto`` as cuda where there is a GPU, else cpu; any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _known_model(model: str) -> str:
    if not model.endswith(".json"):
        return model
    add_model_config(model)
    return Path(model).stem

"""Checks before a training run starts, which take seconds: options, disk, memory, validation data, and a few pairs.

The model is built only on PyTorch's "meta" device, and only a few training pairs are read. The indexes of their shards
are stored in the cache; nothing else is written.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.of_run import Checkpoints
from ..data import ANY_ORDER, PREFETCH, Batch, BatchPlan, EqualBatches, expand_shards, spread, try_pairs
from ..data.index import ShardError
from ..data.staging import is_direct
from ..distributed.world import ALONE, World
from ..host import SHARED_MEMORY, available_memory, free_bytes
from ..io.units import BYTES, scaled
from ..models import CLIP
from ..models.file_tokenizer import FileTokenizer
from ..models.images import SampleError
from ..models.tokenizer import Tokenizer
from ..runs.folder import RunFolder
from .batches import plan_of
from .build import Distillation, bare_model, build_device, build_loss, build_tokenizer
from .data import pair_batches, parts, sources_of, validation_set
from .ema import WeightAverage
from .fsdp import is_sharded
from .optim import make_optimizer
from .train_config import TrainConfig
from .validation import ImageNet

SHARDS, PAIRS = 4, 4  # number of training shards that are tried, and number of pairs that are read from each


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The results of the checks on a training run that can start; ``str`` gives them as text for the log.

    Attributes:
        tried: number of pairs that were tried.
        unusable: the tried pairs that cannot be used, each with the reason.
        checkpoint: bytes of a checkpoint.
        free: free bytes of the disk for checkpoints.
        loader: bytes of the batches that data workers prepare in advance.
    """

    tried: int
    unusable: list[str]
    checkpoint: int
    free: int
    loader: int

    def __str__(self) -> str:
        unusable = f", and {len(self.unusable)} of them cannot be used: {self.unusable[0]}" if self.unusable else ""
        return (
            f"a checkpoint takes {scaled(self.checkpoint, BYTES)} of {scaled(self.free, BYTES)} that are free, the "
            f"batches that are made ahead {scaled(self.loader, BYTES)} of memory; {self.tried} pairs were tried"
            f"{unusable}"
        )


def preflight(config: TrainConfig, folder: RunFolder, saved: dict[str, Any], world: World = ALONE) -> Preflight:
    """Check a training run before it starts for problems that would stop it later.

    Args:
        config: options of the run.
        folder: folder of the run, which exists on rank 0.
        saved: the entry ``clipfast`` of the checkpoint that the run continues, if there is one.
        world: the processes, each of which checks its own GPU, and the memory that all processes of its machine need.

    Raises:
        ValueError: the run cannot work; the message names the wrong value, and a value that would work.
        ImportError: a package is missing that reads the data.
    """
    device = build_device(config, world)
    plan = plan_of(config, world, saved)
    try:
        groups = [expand_shards(part) for part in parts(config)]
    except ValueError as error:
        raise ValueError(f"--train-data: {error}") from error
    model = bare_model(config, saved, torch.device("meta"))
    build_loss(config, model)
    if config.distill_model is not None:
        Distillation(config, model, torch.device("meta"))
    with contextlib.suppress(NotImplementedError):  # some optimizers read values, which "meta" tensors do not have
        make_optimizer(config, model)
    tokenizer = build_tokenizer(config, model)
    checkpoint, free = _check_disk(config, folder, model, world)
    loader = _check_loader(config, batch_bytes(plan, model) // world.size, world.local_size)
    if device.type == "cuda":
        _check_gpu(config, model, device, world)
    _check_validation(config)
    ImageNet(config)
    batches = [try_shards(config, names, model, tokenizer) for names in groups]
    unusable = [str(sample) for batch in batches for sample in batch.skipped]
    return Preflight(sum(map(len, batches)) + len(unusable), unusable, checkpoint, free, loader)


def _nbytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of tensors that a training run needs."""
    return sum(tensor.nbytes for tensor in tensors)


def _sizes(config: TrainConfig, model: CLIP) -> tuple[int, int, int]:
    """Return the bytes of a run's weights, of its trained weights, and of optimizer state and moving average.

    The optimizer state is that of AdamW or StableAdamW, two moments; that of other optimizers counts as zero.
    """
    parameters = list(model.parameters())
    weights = _nbytes([*parameters, *model.buffers()])
    trained = _nbytes([weight for weight in parameters if weight.requires_grad])
    average = 0 if config.ema_decay is None else WeightAverage(model, config.ema_decay).nbytes
    return weights, trained, (2 * trained if config.opt.lower() in ("adamw", "stableadamw") else 0) + average


def _check_disk(config: TrainConfig, folder: RunFolder, model: CLIP, world: World) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and the free bytes of the run's disk; rank 0 raises ValueError if it is full.

    There must be room for one checkpoint more than ``--keep-last``, since a new checkpoint is written before an old one
    is removed, and for the exported weights of the finished run.
    """
    weights, _, kept = _sizes(config, model)
    checkpoint, free = weights + kept, free_bytes(folder.path)
    there = min(config.keep_last, len(Checkpoints(folder.checkpoints).steps()))
    needed = checkpoint * (config.keep_last + 1 - there) + weights
    if world.is_main and free < needed:
        raise ValueError(
            f"--logs {config.logs} has {scaled(free, BYTES)} free, and the run needs {scaled(needed, BYTES)}: "
            f"{scaled(checkpoint, BYTES)} for each of --keep-last {config.keep_last} checkpoints of {config.model}, as "
            f"much again while one is written, and {scaled(weights, BYTES)} for the exported model; make room, give "
            "another folder to --logs, or keep fewer"
        )
    return checkpoint, free


def _check_loader(config: TrainConfig, batch: int, ranks: int) -> int:
    """Raise ValueError if the data workers' batches do not fit into memory; return the bytes of these batches.

    Args:
        config: options of the run.
        batch: bytes of a batch of one process.
        ranks: number of processes on this machine.
    """
    workers = ranks * config.workers
    shared = workers * PREFETCH * batch
    fix = "use fewer --workers, or a smaller "
    fix += "--naflex-max-tokens-per-batch" if config.use_naflex else "--batch-size"
    if config.workers and SHARED_MEMORY.is_dir():
        free = free_bytes(SHARED_MEMORY)
        if free < shared:
            raise ValueError(
                f"{SHARED_MEMORY} has {scaled(free, BYTES)} free, and {workers} data workers hold "
                f"{PREFETCH} batches each of {scaled(batch, BYTES)} there: {fix}, or make it larger (docker run "
                f"--shm-size={-(-shared // 2**30)}g)"
            )
    available = available_memory()
    held = workers * PREFETCH + ranks
    if available is not None and available < held * batch:
        raise ValueError(
            f"{scaled(available, BYTES)} of memory are available, and {held} batch(es) of "
            f"{scaled(batch, BYTES)} are held at a time: {fix}"
        )
    return shared or ranks * batch


def batch_bytes(plan: BatchPlan, model: CLIP) -> int:
    """Return the most bytes of a training batch of all processes: uint8 pixels, and int64 token ids."""
    text = model.context_length * torch.int64.itemsize
    if isinstance(plan, EqualBatches):
        return plan.largest * (3 * model.visual.image_size**2 + text)
    side = max(plan.budget.patch_sizes, default=model.config.vision.patch_size or 0)
    return plan.most_tokens * 3 * side**2 + plan.largest * text


def _check_gpu(config: TrainConfig, model: CLIP, device: torch.device, world: World) -> None:
    """Raise ValueError if weights, gradients and optimizer state of a training run do not fit on the GPU."""
    weights, trained, kept = _sizes(config, model)
    free, total = torch.cuda.mem_get_info(device)
    needed = weights + trained + kept
    if is_sharded(config, world):
        needed = 0 if config.fsdp_offload_cpu else needed // world.size
    if free < needed:
        raise ValueError(
            f"{device} has {scaled(free, BYTES)} of its {scaled(total, BYTES)} free, and weights, gradients and "
            f"the optimizer's state of {config.model} take {scaled(needed, BYTES)}: end other processes there (see "
            "nvidia-smi), take another GPU by --device cuda:N or a smaller --model, or halve it by --precision "
            "pure_bf16"
        )


def _check_validation(config: TrainConfig) -> None:
    """Raise ValueError if the validation data of a training run cannot be read."""
    validation = validation_set(config)
    try:
        if validation is not None:
            validation.check()
    except (ValueError, OSError) as error:
        raise ValueError(f"--val-data cannot be used: {error}") from error


def try_shards(config: TrainConfig, names: list[str], model: CLIP, tokenizer: Tokenizer | FileTokenizer) -> Batch:
    """Read a few pairs of a few training shards as a batch, to see whether they can be used.

    If one of these shards would have to be copied to the local disk as a whole first, only one shard is read.

    Raises:
        ValueError: a shard cannot be read, or not one of the pairs can be used.
    """
    unreadable = [name for name in names if os.path.exists(name) and not os.access(name, os.R_OK)]
    if unreadable:
        raise ValueError(
            f"--train-data: no permission to read {unreadable[0]} ({len(unreadable)} of {len(names)} shards): chmod "
            "a+r, or leave it out"
        )
    few = [names[number] for number in spread(len(names), SHARDS)]
    few = few if all(map(is_direct, few)) else few[:1]
    try:
        sources = [source for source in sources_of(config, few) if len(source)]
    except ShardError as error:
        raise ValueError(f"--train-data: {error}; make it anew, or leave it out") from error
    if not sources:
        return Batch(torch.empty(0), torch.empty(0), [])  # no error, as the shards that were not tried may hold pairs
    try:
        return try_pairs(pair_batches(config, sources, ANY_ORDER, model, tokenizer), PAIRS)
    except SampleError as error:
        raise ValueError(f"--train-data: {error}") from error

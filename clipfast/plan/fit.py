"""Predict the memory and time of a training step for any batch size, and find the largest batch that fits into a GPU.

:mod:`.probe` gives memory and time of the towers and the loss. An optimizer step of the whole model on fake tensors
gives the memory of weights, gradients, optimizer state and weight average. The communication follows from the sizes of
the parameters:

    DDP      one ring all-reduce of all gradients, in buckets of 25 MiB that are the gradients themselves
    FSDP2    for each block, ring all-gathers of its weights for the forward and again for the backward pass, and a ring
             reduce-scatter of its gradients, in float32; weights are gathered in the dtype that they have

It is assumed that communication and kernels do not slow each other down, and that DDP's buckets fill evenly during the
backward pass of the last micro-batch. In every micro-batch, FSDP2 gathers the next block while one computes, and never
holds more than two. Gradients take memory during the whole step.
"""

import dataclasses
import functools
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn

from ..host import cores
from ..kernels.hardware import Card, Cluster
from ..models import build
from ..train.fsdp import blocks_of
from .ledger import Ledger
from .loss import seconds
from .planned_step import (
    CHECKPOINTINGS,
    IMAGE_BACKWARD,
    IMAGE_FORWARD,
    INPUTS,
    LOSS,
    PARALLELS,
    TEXT_BACKWARD,
    TEXT_FORWARD,
    UPDATE,
    Problem,
    Setup,
)
from .probe import BACKWARD, FORWARD, held, loss_ledger, probe

# The published models in the table of ``clipfast plan`` if ``--model`` names none, from small to large.
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")
MOST_ROWS = 2**16  # the search for the largest batch tries at most this many pairs per GPU
MULTIPLE = 8  # the largest micro-batch is rounded down to a multiple of this, unless it is smaller
CONTEXT, SLACK = "CUDA and NCCL (assumed)", "allocator slack (assumed)"
SECONDS_PER_DAY = 86400.0
BUCKET_BYTES = 25 * 2**20  # DDP's default size of a gradient bucket


class Batch(NamedTuple):
    """The planned pairs of one rank, in micro-batches of ``micro_rows`` pairs whose activations are held at a time."""

    rows: int
    micro_rows: int

    @property
    def parts(self) -> list[int]:
        """The number of pairs in each planned micro-batch; the last one may be smaller."""
        full, rest = divmod(self.rows, self.micro_rows)
        return [self.micro_rows] * full + [rest] * (rest > 0)


class StepPlan:
    """The predicted memory and time of a training step, for any batch size.

    Args:
        setup: the model, optimizer and parallelism of the step.
        cluster: the GPUs.
        card: the GPU that kernels are recorded for; None runs the kernels of the CPU.
        kinds: the kinds of activation checkpointing for which plans of this model are made. All of them are probed
            together, and later plans use the stored result.
    """

    batches_held = 2  # input batches in GPU memory: that of this step, and the next one, which is uploaded meanwhile

    def __init__(self, setup: Setup, cluster: Cluster, card: Card | None, kinds: Sequence[str] = ()) -> None:
        self.setup, self.cluster, self.card = setup, cluster, card
        self._kinds = tuple(kinds) or (setup.checkpointing,)
        alone = dataclasses.replace(setup, checkpointing="none", gpus=1, parallel="ddp", reshards=True)
        each = dataclasses.replace(setup, checkpointing="none") if setup.is_sharded else alone
        self._plain, plain = (dataclasses.replace(one, has_ema=False, opt="adamw") for one in (alone, each))
        self.probe = probe(plain, card, self._kinds)[setup.checkpointing]
        self.held = held(each, cluster)
        self._is_half = setup.dtype.itemsize == 2
        self._count_weights()

    def _count_weights(self) -> None:
        """Count the weights in each unit of FSDP2: those of each block, and all others except scalars."""
        with torch.device("meta"):
            model = build(self.setup.config)
        ranks = self.setup.gpus if self.setup.is_sharded else 1

        def padded(parameters: Iterable[nn.Parameter]) -> int:
            """Return the number of planned weights, whose first dimension FSDP2 pads to a multiple of the ranks."""
            return sum(-(-len(p) // ranks) * ranks * p[0].numel() for p in parameters if p.ndim)

        texts = set(model.transformer.modules())
        blocks = blocks_of(model)
        self.image_blocks = [padded(block.parameters()) for block in blocks if block not in texts]
        self.text_blocks = [padded(block.parameters()) for block in blocks if block in texts]
        self.other_weights = padded(model.parameters()) - sum(self.image_blocks) - sum(self.text_blocks)
        self.all_weights = sum(p.numel() for p in model.parameters())

    def memory(self, batch: Batch, *, with_loss: bool = True) -> Counter[str]:
        """Return the predicted bytes of tensors by category, at the peak of the training step.

        ``with_loss=False`` leaves out the memory of the loss: its run on fake tensors takes nearly all of the time of
        this method.
        """
        config, has_parts = self.setup.config, len(batch.parts) > 1
        image_bytes = 3 * config.vision.image_size**2 + 8 * config.text.context_length
        base = self.held.bytes + Counter({INPUTS: self.batches_held * batch.rows * image_bytes})
        # Accumulation holds the features of the micro-batches, the joined features of the batch, and their gradients.
        features = 2 * batch.rows * config.embed_dim * self.setup.dtype.itemsize
        kept = base + Counter({"features": 3 * features if has_parts else 0})
        in_loss = Counter({LOSS: self._loss(batch).peak[LOSS] if with_loss else 0})
        peaks = {phase: self.probe.peak(phase, batch.micro_rows) for phase in (*FORWARD, LOSS, *BACKWARD)}
        phases = [kept + peaks[phase] for phase in (*FORWARD, *BACKWARD)]
        phases.append(kept + in_loss + (Counter() if has_parts else peaks[LOSS]))
        phases.append(base + Counter({"update scratch": self.held.update_bytes}))
        return max(phases, key=Counter.total)

    def sent(self, batch: Batch) -> dict[str, int]:
        """Return the predicted bytes that a rank sends in a step: "weights" and "gradients" of DDP or FSDP2, "loss"."""
        ranks, parts, width = self.setup.gpus, len(batch.parts), self.setup.weight_dtype.itemsize
        if ranks == 1:
            return {}
        loss = sum(event.bytes for event in self._loss(batch).events if event.messages)
        share = (ranks - 1) / ranks
        if not self.setup.is_sharded:
            return {"gradients": round(2 * share * self.all_weights * width), "loss": loss}
        # FSDP2 gathers a block's weights for each pass that needs them: one forward pass, or two with micro-batches,
        # and the backward pass. Weights outside of blocks stay gathered, so they are sent once.
        blocks = sum(self.image_blocks) + sum(self.text_blocks)
        passes = 2 + (parts > 1) if self.setup.reshards else 1
        weights = (passes * blocks + self.other_weights) * width
        gradients = (blocks + self.other_weights) * torch.float32.itemsize
        return {"weights": round(share * weights * parts), "gradients": round(share * gradients * parts), "loss": loss}

    def times(self, batch: Batch) -> dict[str, float]:
        """Return the predicted seconds of a step by phase; "exposed" is communication not hidden by computation."""
        forwards, parts = 1 + (len(batch.parts) > 1), Counter(batch.parts)
        silent, both = (
            sum(seconds(self._loss(batch).events, self.cluster, self.setup.gpus, is_half=self._is_half,
                        with_messages=on).values())
            for on in (False, True)
        )  # fmt: skip
        exposed = both - silent
        if self.setup.is_sharded:
            exposed += sum(count * self._exposed_sharded(rows, forwards) for rows, count in parts.items())
        elif self.setup.gpus > 1:
            exposed += self._exposed_reduction(self._seconds(BACKWARD, batch.parts[-1]))
        return {
            "forward": forwards * sum(count * self._seconds(FORWARD, rows) for rows, count in parts.items()),
            "loss": silent,
            "backward": sum(count * self._seconds(BACKWARD, rows) for rows, count in parts.items()),
            UPDATE: self.held.update_seconds,
            "exposed": exposed,
        }

    def model_flops(self, rows: int) -> float:
        """Return the model FLOPs of a training step, for MFU: three times those of the forward pass of the model.

        They do not include the FLOPs of activations that checkpointing computes a second time.
        """
        # The probe without FSDP2 is used: a last block that FSDP2 has wrapped also computes tokens that are not pooled.
        # Any kind of checkpointing gives the same result, because it changes only the backward pass.
        # A ledger divides the FLOPs of products in 8 bits by their speedup, so this probe has products in 16 bits.
        setup = dataclasses.replace(self._plain, precision=self.setup.precision.replace("fp8", "bf16"))
        plain = probe(setup, self.card, self._kinds)[self.setup.checkpointing]
        return 3 * sum(plain.flops(phase, rows) for phase in FORWARD)

    def _loss(self, batch: Batch) -> Ledger:
        """Return the ledger of the contrastive loss of a batch: its memory, kernels and communication."""
        setup = self.setup
        problem = Problem(batch.rows * setup.gpus, setup.gpus, setup.dtype, setup.config.embed_dim)
        return loss_ledger(problem, self.card, self.cluster.gpus_per_node)

    def _seconds(self, phases: Sequence[str], rows: int) -> float:
        """Return the predicted seconds that kernels take in these phases of a step with ``rows`` pairs."""
        return sum(self.probe.seconds(phase, rows, self.cluster, is_half=self._is_half)[0] for phase in phases)

    def _ring_time(self, whole_bytes: int) -> float:
        """Return the predicted seconds of a ring all-gather or reduce-scatter of ``whole_bytes`` over all ranks."""
        ranks = self.setup.gpus
        rate = self.cluster.bytes_per_s(ranks, is_ring=False)
        return whole_bytes * (ranks - 1) / ranks / rate + self.cluster.latency_s * (ranks - 1)

    def _exposed_reduction(self, backward: float) -> float:
        """Return the predicted seconds that DDP's all-reduce adds to a backward pass of ``backward`` seconds."""
        size = self.all_weights * self.setup.weight_dtype.itemsize
        buckets = math.ceil(size / BUCKET_BYTES)
        last = 2 * self._ring_time(size // buckets)
        return max(last, buckets * last - backward * (1 - 1 / buckets))

    def _exposed_sharded(self, rows: int, forwards: int) -> float:
        """Return the predicted seconds that FSDP2's communication adds to the passes over a micro-batch."""
        blocks = [*self.image_blocks, *self.text_blocks]
        width = self.setup.weight_dtype.itemsize
        gather = [self._ring_time(width * count) for count in blocks]
        reduce = [self._ring_time(torch.float32.itemsize * count) for count in blocks]
        root = self._ring_time(width * self.other_weights), self._ring_time(torch.float32.itemsize * self.other_weights)

        def of_blocks(*phases: str) -> list[float]:
            """Return the predicted seconds of each block of both towers, in a phase of images and a phase of texts."""
            images, texts = (
                self.probe.seconds(phase, rows, self.cluster, is_half=self._is_half)[1] for phase in phases
            )
            return [images] * len(self.image_blocks) + [texts] * len(self.text_blocks)

        # FSDP2 gathers the weights outside of blocks first. Their layers (embeddings and projections) compute before
        # and after the blocks, where no communication overlaps with them, so their computation counts as zero here.
        computing = [0.0, *of_blocks(IMAGE_FORWARD, TEXT_FORWARD)]
        forward = overlap([root[0], *gather], computing, [0.0] * len(computing))
        again = gather[::-1] if self.setup.reshards else [0.0] * len(gather)
        computing = [*reversed(of_blocks(IMAGE_BACKWARD, TEXT_BACKWARD)), 0.0]
        return forwards * forward + overlap([*again, 0.0], computing, [*reversed(reduce), root[1]])


def overlap(gather: Sequence[float], compute: Sequence[float], reduce: Sequence[float]) -> float:
    """Return the predicted seconds that communication adds to the computation of FSDP2's units, in their order.

    The weights of each unit are gathered before its computation, and its gradients are reduced after it, over one
    link. The gather of a unit may start when the unit before it starts to compute, because FSDP2 then frees the unit
    before that. A collective of zero seconds does not take place.

    Args:
        gather, compute, reduce: the seconds of each unit.
    """
    wire = arrived = gather[0]
    gpu = 0.0
    for needed, following, reducing in zip(compute, [*gather[1:], 0.0], reduce, strict=True):
        start = max(gpu, arrived)
        arrived = 0.0
        if following:
            arrived = wire = max(wire, start) + following
        gpu = start + needed
        if reducing:
            wire = max(wire, gpu) + reducing
    return max(gpu, wire) - sum(compute)


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """The assumptions of a plan: memory beyond tensors, and length and price of the training.

    Attributes:
        context_bytes: the CUDA context, the workspaces of cuBLAS and the buffers of NCCL.
        slack: the memory that the allocator holds beyond tensors, as a fraction of the tensors.
        samples_seen: the pairs of the whole training; with None, the length of the training is not predicted.
        price: the price for an hour of one GPU; with None, the cost is not predicted.
    """

    context_bytes: float = 1.5e9
    slack: float = 0.05
    samples_seen: int | None = None
    price: float | None = None


def memory_of(plan: StepPlan, batch: Batch, assumed: Assumptions, *, with_loss: bool = True) -> Counter[str]:
    """Return the predicted bytes on a GPU by category: those of tensors, and the assumed memory beyond tensors."""
    found = plan.memory(batch, with_loss=with_loss)
    return found + Counter({CONTEXT: round(assumed.context_bytes), SLACK: round(assumed.slack * found.total())})


def largest_rows(plan: StepPlan, assumed: Assumptions, micro_batches: int = 1) -> int:
    """Return the largest predicted number of pairs per GPU that fits; 0 if one pair in each micro-batch does not fit.

    The micro-batches are equally large. Their size is a multiple of 8 if that fits.
    """

    def fits(rows: int, *, with_loss: bool = True) -> bool:
        """Return whether a batch of ``rows`` pairs on each GPU is predicted to fit, with or without the loss."""
        found = memory_of(plan, Batch(rows, rows // micro_batches), assumed, with_loss=with_loss)
        return found.total() <= plan.cluster.card.memory_bytes

    def search(high: int, *, with_loss: bool) -> int:
        """Return the largest number below ``high`` for which this many times ``step`` pairs are predicted to fit."""
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * step, with_loss=with_loss) else (low, middle)
        return low

    step = MULTIPLE * micro_batches if fits(MULTIPLE * micro_batches) else micro_batches
    # The search without the loss is fast. The result is nearly always the same, which one call with the loss checks.
    most = search(MOST_ROWS // step + 1, with_loss=False)
    return step * (most if most == 0 or fits(most * step) else search(most, with_loss=True))


def describe(plan: StepPlan, batch: Batch, assumed: Assumptions) -> dict[str, Any]:
    """Return all predictions about a step and the training as a dictionary of plain keys and numbers, for JSON."""
    setup, card = plan.setup, plan.cluster.card
    memory, times, sent = memory_of(plan, batch, assumed), plan.times(batch), plan.sent(batch)
    seconds, pairs = sum(times.values()), batch.rows * setup.gpus
    found: dict[str, Any] = {
        **dataclasses.asdict(setup), "batch_per_gpu": batch.rows, "micro_batch": batch.micro_rows,
        "global_batch": pairs, "fits": memory.total() <= card.memory_bytes, "memory": memory.total(),
        "memory_by_category": dict(+memory), "time": seconds, "time_by_part": times, "sent": sum(sent.values()),
        "sent_by_part": sent, "pairs_per_s": pairs / seconds,
        "mfu": plan.model_flops(batch.rows) / seconds / card.peak(half=setup.dtype.itemsize == 2),
    }  # fmt: skip
    if assumed.samples_seen is not None:
        found["days"] = assumed.samples_seen / found["pairs_per_s"] / SECONDS_PER_DAY
        found["gpu_hours"] = found["days"] * 24 * setup.gpus
        if assumed.price is not None:
            found["cost"] = found["gpu_hours"] * assumed.price
    return found


def fit(setups: list[Setup], cluster: Cluster, assumed: Assumptions, micro_batches: int = 1) -> list[dict[str, Any]]:
    """Return the plan of the largest batch that fits for each setup; several models are planned in parallel processes.

    For each model, ``is_best`` marks the row with the most pairs/s among those that fit.
    """
    models = list(dict.fromkeys(setup.model for setup in setups))
    jobs = [[setup for setup in setups if setup.model == model] for model in models]
    one = functools.partial(_fit_model, cluster=cluster, assumed=assumed, micro_batches=micro_batches)
    if len(jobs) == 1:
        return one(jobs[0])
    with ProcessPoolExecutor(min(len(jobs), cores()), multiprocessing.get_context("forkserver")) as pool:
        return [row for rows in pool.map(one, jobs) for row in rows]


def _fit_model(setups: list[Setup], cluster: Cluster, assumed: Assumptions, micro_batches: int) -> list[dict[str, Any]]:
    """Return the plan of the largest batch that fits for each setup; all setups have the same model."""
    rows: list[dict[str, Any]] = []
    kinds = list(dict.fromkeys(setup.checkpointing for setup in setups))
    for setup in setups:
        plan = StepPlan(setup, cluster, cluster.card, kinds)
        most = largest_rows(plan, assumed, micro_batches)
        if most:
            rows.append(describe(plan, Batch(most, most // micro_batches), assumed))
        else:
            rows.append({**dataclasses.asdict(setup), "batch_per_gpu": 0, "fits": False})
    best = max(rows, key=lambda row: row.get("pairs_per_s", 0.0))
    return [row | {"is_best": row is best and row["fits"]} for row in rows]


def combinations(setup: Setup, models: list[str], parallel: str | None, checkpointing: str | None) -> list[Setup]:
    """Return the setups of a plan's table: every model with every value of the options that are None.

    On one GPU, "ddp" and "fsdp" are the same, so only "ddp" is in the table.
    """
    ways = [parallel] if parallel else PARALLELS if setup.gpus > 1 else PARALLELS[:1]
    kinds = [checkpointing] if checkpointing else CHECKPOINTINGS
    return [
        dataclasses.replace(setup, model=model, parallel=way, checkpointing=kind)
        for model in models
        for way in ways
        for kind in kinds
    ]

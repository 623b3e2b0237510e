"""Memory and time of a training step, put together from what was counted on fake tensors.

What the towers take comes from :mod:`.probe`, the loss from a step of the loss alone, weights, gradients, optimizer and
average from one update of the parts that a rank holds. What is sent follows from the sizes of the parameters:

    DDP      one ring all-reduce of all gradients, in buckets of 25 MiB that are the gradients themselves
    FSDP2    for each block, ring all-gathers of its weights for the forward and again for the backward pass, and a ring
             reduce-scatter of its gradients, in float32; weights are gathered in the dtype that they have

It is assumed that messages and kernels do not slow each other down. DDP's buckets fill evenly in the course of the
backward pass, of the last micro-batch if there are several. FSDP2 gathers the next block while one computes, but never
more than two at a time, and does so in every micro-batch. Gradients are counted as living through the whole step.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..kernels.contrastive.distributed import choose_mode
from ..kernels.hardware import Card, Cluster
from ..ledger import Ledger
from ..models import build
from ..training.ema import WeightAverage
from .predict import seconds
from .probe import BACKWARD, FORWARD, Probe, probe
from .setup import (
    CATEGORIES,
    IMAGE_BACKWARD,
    IMAGE_FORWARD,
    INPUTS,
    LOSS,
    TEXT_BACKWARD,
    TEXT_FORWARD,
    UPDATE,
    Setup,
    groups,
    local_shape,
)
from .step import Problem, run_step

BUCKET = 25 * 2**20  # bytes of DDP's buckets
STATIC = ("weights", "gradients", "optimizer state", "average of weights")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pairs of one rank, of which ``micro_rows`` have their activations in memory at a time."""

    rows: int
    micro_rows: int

    @property
    def micro_batches(self) -> int:
        """How many parts the batch has."""
        return math.ceil(self.rows / self.micro_rows)


@dataclasses.dataclass(frozen=True)
class Held:
    """What a rank holds from step to step, and its update."""

    bytes: Counter[str]
    update_bytes: int
    update_seconds: float


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Bytes of the weights that are gathered and of the gradients that are reduced: whole ones, by group.

    FSDP2's groups are the blocks of the images, those of the texts, and all others. DDP has only the others.
    """

    gathered: Sequence[int]
    reduced: Sequence[int]
    images: int = 0
    texts: int = 0


@functools.lru_cache(maxsize=64)
def held(setup: Setup, cluster: Cluster) -> Held:
    """Return what a rank holds, by taking an update on fake tensors of the sizes that it has."""
    with torch.device("meta"):
        model = build(setup.config).to(setup.weight_dtype)
    ranks = setup.gpus if setup.is_sharded else 1
    with FakeTensorMode(), Ledger(categories=CATEGORIES) as ledger:
        ledger.phase = "weights"
        model._apply(lambda meta: torch.zeros(meta.shape, dtype=meta.dtype))  # type: ignore[no-untyped-call]
        for module in model.modules():
            for name, whole in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.zeros(local_shape(whole.shape, ranks), dtype=whole.dtype)))
        del whole
        ledger.phase = "gradients"
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ledger.phase = "optimizer state"
        optimizer = setup.optimizer(model)
        optimizer.step()
        ledger.phase = "average of weights"
        average = WeightAverage(model, 0.999) if setup.has_ema else None
        ledger.begin()
        ledger.phase = UPDATE
        optimizer.step()
        if average is not None:
            average.update(1, torch.zeros(()))
        update = sum(seconds(ledger.events, Problem(1, dtype=setup.dtype), cluster).values())
        return Held(Counter({name: ledger.live[name] for name in STATIC}), ledger.peak["update scratch"], update)


@functools.lru_cache(maxsize=64)
def exchange(setup: Setup) -> Exchange:
    """Return what ranks send each other of weights and gradients."""
    with torch.device("meta"):
        model = build(setup.config)
    width = setup.weight_dtype.itemsize
    if not setup.is_sharded:
        return Exchange((), (sum(p.numel() for p in model.parameters()) * width,))
    images, texts, root = groups(model)
    padded = [
        sum(math.prod(local_shape(p.shape, setup.gpus)) * setup.gpus for p in group)
        for group in (*images, *texts, root)
    ]
    gathered, reduced = (tuple(size * each for size in padded) for each in (width, torch.float32.itemsize))
    return Exchange(gathered, reduced, len(images), len(texts))


@functools.lru_cache(maxsize=4096)
def loss_step(problem: Problem, card: Card | None) -> Ledger:
    """Return the ledger of the loss of all ranks and its backward pass, with features that are there already."""
    sizes = [problem.rows] * problem.gpus
    mode = "default" if problem.gpus == 1 else choose_mode(sizes, problem.embed_dim, problem.dtype)
    return run_step(problem, mode, card)


class StepPlan:
    """A training step: what it takes with any batch.

    Args:
        setup: what is trained.
        cluster: the GPUs.
        card: the GPU that kernels are recorded for, if it is not that of the cluster; None runs the kernels of the CPU.
        checkpointings: kinds that will be asked for with the same model: they are counted together.
    """

    def __init__(
        self, setup: Setup, cluster: Cluster, card: Card | None, checkpointings: tuple[str, ...] | None = None
    ) -> None:
        self.setup, self.cluster, self.card = setup, cluster, card
        plain = dataclasses.replace(setup, checkpointing="none", has_ema=False, opt="adamw")
        alone = dataclasses.replace(plain, gpus=1, parallel="ddp", reshards=True)
        kinds = checkpointings or (setup.checkpointing,)
        self.plain: Probe = probe(alone, card, kinds)[setup.checkpointing]
        self.probe: Probe = probe(plain, card, kinds)[setup.checkpointing] if setup.is_sharded else self.plain
        self.batches_held = 2  # the next batch is uploaded during a step
        self.held = held(dataclasses.replace(setup, checkpointing="none"), cluster)
        self.exchange = exchange(dataclasses.replace(setup, checkpointing="none", has_ema=False, opt="adamw"))

    def memory(self, batch: Batch, *, with_loss: bool = True) -> Counter[str]:
        """Return the bytes of tensors by category, at the peak of the step; of the step but the loss, if that is all.

        The loss is what takes time here: it is run for each batch.
        """
        config, probed = self.setup.config, self.probe.peaks(batch.micro_rows)
        image_bytes = 3 * config.vision.image_size**2 + 8 * config.text.context_length
        base = self.held.bytes + Counter({INPUTS: self.batches_held * batch.rows * image_bytes})
        # The features of the micro-batches, all in one, and their gradients.
        features = 2 * batch.rows * config.embed_dim * self.setup.dtype.itemsize
        kept = Counter({"features": 3 * features if batch.micro_batches > 1 else 0})
        in_loss = Counter({LOSS: self._loss(batch).peak[LOSS] if with_loss else 0})
        phases = [base + kept + probed[phase] for phase in (*FORWARD, *BACKWARD)]
        phases += [
            base + kept + in_loss + (Counter() if batch.micro_batches > 1 else probed[LOSS]),
            base + Counter({"update scratch": self.held.update_bytes}),
        ]
        return max(phases, key=Counter.total)

    def sent(self, batch: Batch) -> dict[str, int]:
        """Return the bytes that a rank sends in a step, by what they are."""
        ranks, parts = self.setup.gpus, batch.micro_batches
        if ranks == 1:
            return {}
        loss = sum(event.bytes for event in self._loss(batch).events if event.messages)
        *of_blocks, root = self.exchange.gathered or (0,)
        # The last group is not freed between the passes. With micro-batches, there are two forward passes.
        passes = 2 + (parts > 1) if self.setup.reshards else 1
        gathered, reduced = (passes * sum(of_blocks) + root) * parts, sum(self.exchange.reduced)
        share = (ranks - 1) / ranks
        if not self.setup.is_sharded:
            return {"gradients": round(2 * share * reduced), "loss": loss}
        return {"weights": round(share * gathered), "gradients": round(share * reduced * parts), "loss": loss}

    def times(self, batch: Batch) -> dict[str, float]:
        """Return seconds: of computing by phase, and of messages that computing does not hide."""
        full, rest = divmod(batch.rows, batch.micro_rows)
        sizes = [batch.micro_rows] * full + ([rest] if rest else [])
        parts = Counter(sizes)
        forwards = 2 if len(sizes) > 1 else 1
        found = {
            "forward": forwards * sum(count * self._seconds(FORWARD, rows) for rows, count in parts.items()),
            "loss": 0.0,
            "backward": sum(count * self._seconds(BACKWARD, rows) for rows, count in parts.items()),
            UPDATE: self.held.update_seconds,
        }
        events, problem = self._loss(batch).events, self._problem(batch)
        silent, both = (sum(seconds(events, problem, self.cluster, with_messages=on).values()) for on in (False, True))
        found["loss"] = silent
        exposed = both - silent
        if self.setup.is_sharded:
            exposed += sum(count * self._exposed_sharded(rows, forwards) for rows, count in parts.items())
        elif self.setup.gpus > 1:
            exposed += self._exposed_reduction(self._seconds(BACKWARD, sizes[-1]))
        return found | {"exposed": exposed}

    def model_flops(self, rows: int) -> float:
        """Return three times the FLOPs of a forward pass of one GPU's whole model, as utilisation counts a step.

        So it does not count what is computed again, nor the rows that FSDP2's blocks compute and nobody reads.
        """
        return 3 * sum(self.plain.flops(phase, rows) for phase in FORWARD)

    def _problem(self, batch: Batch) -> Problem:
        setup = self.setup
        return Problem(batch.rows * setup.gpus, setup.gpus, setup.dtype, None, setup.config.embed_dim)

    def _loss(self, batch: Batch) -> Ledger:
        return loss_step(self._problem(batch), self.card)

    @property
    def _is_half(self) -> bool:
        return self.setup.dtype.itemsize == 2

    def _seconds(self, phases: Sequence[str], rows: int) -> float:
        return sum(self.probe.seconds(phase, rows, self.cluster, is_half=self._is_half) for phase in phases)

    def _wire(self, whole_bytes: int) -> float:
        """Return the seconds of a ring all-gather or reduce-scatter of so many bytes."""
        ranks = self.setup.gpus
        rate = self.cluster.bytes_per_s(ranks, is_ring=False)
        return whole_bytes * (ranks - 1) / ranks / rate + self.cluster.latency_s * (ranks - 1)

    def _exposed_reduction(self, backward: float) -> float:
        """Return what the all-reduce of DDP adds to a backward pass of so many seconds."""
        (size,) = self.exchange.reduced
        buckets = math.ceil(size / BUCKET)
        last = 2 * self._wire(size // buckets)
        return max(last, buckets * last - backward * (1 - 1 / buckets))

    def _exposed_sharded(self, rows: int, forwards: int) -> float:
        """Return what FSDP2's messages add to the passes over a micro-batch."""
        images, texts = self.exchange.images, self.exchange.texts
        gather = [self._wire(size) for size in self.exchange.gathered]
        reduce = [self._wire(size) for size in self.exchange.reduced]

        def of_blocks(of_images: str, of_texts: str) -> list[float]:
            half = self._is_half
            both = [
                self.probe.block_seconds(phase, rows, self.cluster, is_half=half) for phase in (of_images, of_texts)
            ]
            return [both[0]] * images + [both[1]] * texts

        # The last group, which holds embeddings and projections, is gathered first, and computes around the blocks.
        forward = overlap(
            gather[-1:] + gather[:-1], [0.0, *of_blocks(IMAGE_FORWARD, TEXT_FORWARD)], [0.0] * len(gather)
        )
        again = gather[-2::-1] if self.setup.reshards else [0.0] * (len(gather) - 1)
        computing = [*reversed(of_blocks(IMAGE_BACKWARD, TEXT_BACKWARD)), 0.0]
        backward = overlap([*again, 0.0], computing, [*reduce[-2::-1], reduce[-1]])
        return forwards * forward + backward


def overlap(gather: Sequence[float], compute: Sequence[float], reduce: Sequence[float]) -> float:
    """Return how much longer groups take than to compute, if each is gathered before and reduced afterwards.

    There is one wire. A group may be gathered from when the one before it starts to compute, for then the one before
    that is freed. What takes no time is not sent.
    """
    wire = arrived = gather[0]
    gpu = 0.0
    for index, needed in enumerate(compute):
        start = max(gpu, arrived)
        following = gather[index + 1] if index + 1 < len(gather) else 0.0
        arrived = 0.0
        if following:
            arrived = wire = max(wire, start) + following
        gpu = start + needed
        if reduce[index]:
            wire = max(wire, gpu) + reduce[index]
    return max(gpu, wire) - sum(compute)

"""Extrapolate memory and time of the towers from training steps of a model with few blocks on fake tensors.

Bytes, FLOPs and kernels of a step are linear in the number of blocks of each tower and, for a given number of blocks,
in the batch. Therefore steps of towers with 3 and with 4 blocks, with two batches each, determine those of the whole
model with any batch. The peak of memory is extrapolated for each phase separately, because the phase with the highest
peak depends on the number of blocks and on the batch.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.contrastive.modes import choose_mode
from ..kernels.hardware import Card, Cluster
from ..models import CLIPConfig
from .ledger import GATHERED, Ledger
from .loss import seconds
from .planned_step import (
    EMBEDDING_BACKWARD,
    IMAGE_BACKWARD,
    IMAGE_FORWARD,
    IMAGES,
    LOSS,
    SCRATCH,
    TEXT_BACKWARD,
    TEXT_FORWARD,
    TEXTS,
    Problem,
    Setup,
    rank_of,
    run_loss,
)

DEPTHS = (3, 4)  # numbers of blocks: a first and a last block, and one or two middle blocks, which differ from those
BATCHES = (256, 512)  # pairs; large enough for activations to outweigh memory that does not depend on the batch
FEW = 2  # pairs whose activations hardly count: the peak memory with this batch is a lower limit for every batch
FORWARD = (IMAGE_FORWARD, TEXT_FORWARD)
BACKWARD = (TEXT_BACKWARD, EMBEDDING_BACKWARD, IMAGE_BACKWARD)
# Categories of memory: those that a step allocates and frees, and those that live from step to step (in ``Held``).
PROBED = (IMAGES, TEXTS, SCRATCH, GATHERED)
STATIC = ("weights", "gradients", "optimizer state", "average of weights")
Array = NDArray[np.float64]


class Sample(NamedTuple):
    """The memory and work of one training step, with one of ``DEPTHS`` and one of ``BATCHES``.

    Attributes:
        peaks: by phase, the bytes at its peak in each category of ``PROBED``, [4].
        kernels: by phase, the FLOPs and bytes of each kernel, [kernels, 2].
    """

    peaks: dict[str, Array]
    kernels: dict[str, Array]


def sample_of(ledger: Ledger) -> Sample:
    """Return the memory and work of the towers in a step, from its ledger."""
    kernels: dict[str, list[tuple[int, int]]] = {phase: [] for phase in (*FORWARD, LOSS, *BACKWARD)}
    for event in ledger.events:
        if not event.collective and event.phase in kernels:
            kernels[event.phase].append((event.flops, event.bytes))
    peaks = {phase: np.array([ledger.peaks[phase][name] for name in PROBED], float) for phase in kernels}
    return Sample(peaks, {phase: np.array(work, float).reshape(-1, 2) for phase, work in kernels.items()})


@dataclasses.dataclass(frozen=True)
class Probe:
    """Measured steps of a model with few blocks, from which memory and work of the whole model are extrapolated.

    Attributes:
        more_images, more_texts: the number of blocks that each tower of the whole model has beyond the first depth.
        samples: the samples of both ``BATCHES`` for each depth. There are one or two depths; the second has one more
            block in each tower.
        least: for each depth, the sample of a step with very few pairs, without checkpointing.
    """

    more_images: int
    more_texts: int
    samples: Sequence[Sequence[Sample]]
    least: Sequence[Sample]

    def peak(self, phase: str, rows: int) -> Counter[str]:
        """Return the predicted bytes at the peak of ``phase``, by category, for ``rows`` pairs."""
        more = np.array([self.more_images, self.more_texts, 0, 0])
        lines = [_at(rows, *(sample.peaks[phase] for sample in depth)) for depth in self.samples]
        least = [sample.peaks[phase] for sample in self.least]
        found = max((few[0] + more * (few[-1] - few[0]) for few in (lines, least)), key=np.sum)
        return Counter(dict(zip(PROBED, found.clip(0).round().astype(int).tolist(), strict=True)))

    def seconds(self, phase: str, rows: int, cluster: Cluster, *, is_half: bool) -> tuple[float, float]:
        """Return the predicted seconds of ``phase`` for ``rows`` pairs, and those of one middle block in the phase.

        Kernels run one after another. If the host takes longer to launch them, the time of the host is returned.
        """
        rates = np.array([cluster.card.reached(half=is_half), cluster.card.copied_bytes_per_s])
        found = []
        for depth in self.samples:
            small, large = (sample.kernels[phase] / rates for sample in depth)
            if len(small) == len(large):
                took = _at(rows, small, large).max(1).sum()
            else:  # batches of both sizes run different numbers of kernels, so only their sums are extrapolated
                took = _at(rows, small.max(1).sum(), large.max(1).sum())
            found.append(max(float(took), len(small) * cluster.launch_s))
        block = found[-1] - found[0]
        return found[0] + self._more(phase) * block, block

    def flops(self, phase: str, rows: int) -> float:
        """Return the extrapolated FLOPs of ``phase`` for ``rows`` pairs."""
        found = [_at(rows, *(sample.kernels[phase][:, 0].sum() for sample in depth)) for depth in self.samples]
        return float(found[0] + self._more(phase) * (found[-1] - found[0]))

    def _more(self, phase: str) -> int:
        """Return how many more blocks the tower of a phase has in the planned model than in the first probed one."""
        of_images, of_texts = (IMAGE_FORWARD, IMAGE_BACKWARD), (TEXT_FORWARD, TEXT_BACKWARD)
        return self.more_images if phase in of_images else self.more_texts if phase in of_texts else 0


def _at(rows: int, small: Any, large: Any) -> Any:
    """Extrapolate linearly from the probed values for both ``BATCHES`` to the value for ``rows`` pairs."""
    return small + (large - small) * (rows - BATCHES[0]) / (BATCHES[1] - BATCHES[0])


@functools.lru_cache(maxsize=64)
def probe(setup: Setup, card: Card | None, kinds: tuple[str, ...]) -> dict[str, Probe]:
    """Run training steps of a model with few blocks, and return a probe for each of these kinds of checkpointing.

    ``card`` is the GPU whose kernels are recorded; None runs the CPU paths.
    """
    config, least = setup.config, list[Sample]()
    layers = config.vision.layers if isinstance(config.vision.layers, int) else None, config.text.layers
    can_cut = all(count is None or count > max(DEPTHS) for count in layers)  # None for a ResNet, which is not cut
    samples: dict[str, list[list[Sample]]] = {kind: [] for kind in kinds}
    for depth in DEPTHS if can_cut else (None,):
        with rank_of(setup, _cut(config, depth), card) as rank:

            def sampled(rows: int, rank: Any = rank) -> Sample:
                """Run a training step of the small model with ``rows`` pairs, and return its memory and work."""
                rank.step(rows)
                return sample_of(rank.ledger)

            if setup.is_sharded:
                sampled(FEW)  # a first step that is not recorded, in which FSDP2 allocates memory that it keeps
            least.append(sampled(FEW))
            for kind in kinds:
                rank.set_checkpointing(kind)
                samples[kind].append([sampled(rows) for rows in BATCHES])
    more = [0 if count is None or not can_cut else count - DEPTHS[0] for count in layers]
    return {kind: Probe(more[0], more[1], samples[kind], least) for kind in kinds}


def _cut(config: CLIPConfig, depth: int | None) -> CLIPConfig:
    """Return the probed model's configuration: ``depth`` blocks in each transformer, or all if ``depth`` is None."""
    if depth is None:
        return config
    if isinstance(config.vision.layers, int):
        config = config.with_vision(layers=depth)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, layers=depth))


class Held(NamedTuple):
    """The memory that a rank holds from step to step, by category, and memory and time of its optimizer step."""

    bytes: Counter[str]
    update_bytes: int
    update_seconds: float


@functools.lru_cache(maxsize=64)
def held(setup: Setup, cluster: Cluster) -> Held:
    """Return the memory that a rank holds from step to step, from an optimizer step of the model on fake tensors."""
    with rank_of(setup, setup.config, None) as rank:
        ledger = rank.ledger
        ledger.begin()
        rank.update()
        took = sum(seconds(ledger.events, cluster, is_half=setup.dtype.itemsize == 2).values())
        return Held(Counter({name: ledger.live[name] for name in STATIC}), ledger.peak["update scratch"], took)


@functools.lru_cache(maxsize=4096)
def loss_ledger(problem: Problem, card: Card | None, gpus_per_node: int) -> Ledger:
    """Return the ledger of the loss in the mode that ``clipfast train`` chooses on nodes of ``gpus_per_node``.

    Its category "loss" leaves out the memory of the features, which the towers have allocated.
    """
    sizes = [problem.rows] * problem.gpus
    mode = "default" if problem.gpus == 1 else choose_mode(sizes, problem.embed_dim, problem.dtype, gpus_per_node)
    return run_loss(problem, mode, card)

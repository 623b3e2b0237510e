"""What the towers and the loss take, from steps of a model with few blocks on fake tensors.

Bytes, FLOPs and kernels of a step are linear in the number of blocks of each tower, and with a given number of blocks
in the batch: so the steps of towers of 3 and of 4 blocks with two batches tell those of the whole model with any batch.
The peak of memory is taken in each phase by itself, because which phase has the highest one depends on both.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.contrastive.distributed import choose_mode
from ..kernels.hardware import Card, Cluster
from ..models import CLIPConfig
from .ledger import GATHERED, Ledger
from .loss import seconds
from .planned_step import (
    CHECKPOINTINGS,
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

DEPTHS = (3, 4)  # a first, a last and a middle block, which differ; and one more in the middle
BATCHES = (256, 512)  # large enough for activations to outweigh what does not depend on the batch
FEW = 2  # small enough for the opposite: a phase never takes less than with so many pairs
FORWARD = (IMAGE_FORWARD, TEXT_FORWARD)
BACKWARD = (TEXT_BACKWARD, EMBEDDING_BACKWARD, IMAGE_BACKWARD)
PROBED = (IMAGES, TEXTS, SCRATCH, GATHERED)  # categories; what lives from step to step is counted elsewhere
STATIC = ("weights", "gradients", "optimizer state", "average of weights")
Array = NDArray[np.float64]


class Sample(NamedTuple):
    """A step with one depth and one batch.

    Attributes:
        peaks: memory at the peak of each phase, an element for each category of ``PROBED``.
        kernels: FLOPs and bytes of each kernel, by phase.
    """

    peaks: dict[str, Array]
    kernels: dict[str, Array]


def sample_of(ledger: Ledger) -> Sample:
    """Take from a ledger what the towers have to do with it."""
    kernels: dict[str, list[tuple[int, int]]] = {phase: [] for phase in (*FORWARD, LOSS, *BACKWARD)}
    for event in ledger.events:
        if not event.collective and event.phase in kernels:
            kernels[event.phase].append((event.flops, event.bytes))
    peaks = {phase: np.array([ledger.peaks[phase][name] for name in PROBED], float) for phase in kernels}
    return Sample(peaks, {phase: np.array(work, float).reshape(-1, 2) for phase, work in kernels.items()})


@dataclasses.dataclass(frozen=True)
class Probe:
    """Samples of few blocks, and what they say of all blocks.

    Attributes:
        more_images, more_texts: blocks that the towers have beyond those of the first depth.
        samples: for one depth, or for two of which the second has one block more in each tower: both ``BATCHES``.
        least: for each depth, a step with hardly any pairs, without checkpointing.
    """

    more_images: int
    more_texts: int
    samples: Sequence[Sequence[Sample]]
    least: Sequence[Sample]

    def peak(self, phase: str, rows: int) -> Counter[str]:
        """Return the bytes at the peak of ``phase``, by category, for ``rows`` pairs."""
        more = np.array([self.more_images, self.more_texts, 0, 0])
        lines = [_at(rows, *(sample.peaks[phase] for sample in depth)) for depth in self.samples]
        least = [sample.peaks[phase] for sample in self.least]
        found = max((few[0] + more * (few[-1] - few[0]) for few in (lines, least)), key=np.sum)
        return Counter(dict(zip(PROBED, found.clip(0).round().astype(int).tolist(), strict=True)))

    def seconds(self, phase: str, rows: int, cluster: Cluster, *, is_half: bool) -> tuple[float, float]:
        """Return how long ``phase`` takes, and how long each block of a tower takes in it.

        Kernels run one after another, unless the host that starts them takes longer.
        """
        rates = np.array([cluster.card.reached(half=is_half), cluster.card.memory_bytes_per_s])
        found = []
        for depth in self.samples:
            small, large = (sample.kernels[phase] / rates for sample in depth)
            if len(small) == len(large):
                took = _at(rows, small, large).max(1).sum()
            else:  # the number of kernels depends on the batch
                took = _at(rows, small.max(1).sum(), large.max(1).sum())
            found.append(max(float(took), len(small) * cluster.launch_s))
        block = found[-1] - found[0]
        return found[0] + self._more(phase) * block, block

    def flops(self, phase: str, rows: int) -> float:
        """Return the FLOPs of ``phase``."""
        found = [_at(rows, *(sample.kernels[phase][:, 0].sum() for sample in depth)) for depth in self.samples]
        return float(found[0] + self._more(phase) * (found[-1] - found[0]))

    def _more(self, phase: str) -> int:
        of_images, of_texts = (IMAGE_FORWARD, IMAGE_BACKWARD), (TEXT_FORWARD, TEXT_BACKWARD)
        return self.more_images if phase in of_images else self.more_texts if phase in of_texts else 0


def _at(rows: int, small: Any, large: Any) -> Any:
    """Return the value for ``rows`` pairs on the line through the values for both ``BATCHES``."""
    return small + (large - small) * (rows - BATCHES[0]) / (BATCHES[1] - BATCHES[0])


@functools.lru_cache(maxsize=64)
def probe(setup: Setup, card: Card | None) -> dict[str, Probe]:
    """Run the small steps, and return a probe for each kind of checkpointing, whatever that of ``setup`` is.

    ``card`` is the GPU that kernels are recorded for; None runs the kernels of the CPU.
    """
    config, least = setup.config, list[Sample]()
    layers = config.vision.layers if isinstance(config.vision.layers, int) else None, config.text.layers
    can_cut = all(count is None or count > max(DEPTHS) for count in layers)  # a ResNet has no count
    samples: dict[str, list[list[Sample]]] = {kind: [] for kind in CHECKPOINTINGS}
    for depth in DEPTHS if can_cut else (None,):
        with rank_of(setup, _cut(config, depth), card) as rank:

            def sampled(rows: int, rank: Any = rank) -> Sample:
                rank.step(rows)
                return sample_of(rank.ledger)

            sampled(FEW)  # FSDP2 allocates in the first step what it keeps
            least.append(sampled(FEW))
            for kind in CHECKPOINTINGS:
                rank.set_checkpointing(kind)
                samples[kind].append([sampled(rows) for rows in BATCHES])
    more = [0 if count is None or not can_cut else count - DEPTHS[0] for count in layers]
    return {kind: Probe(more[0], more[1], samples[kind], least) for kind in CHECKPOINTINGS}


def _cut(config: CLIPConfig, depth: int | None) -> CLIPConfig:
    """Return the configuration with ``depth`` blocks in each transformer; with as many as it has if that is None."""
    if depth is None:
        return config
    if isinstance(config.vision.layers, int):
        config = config.with_vision(layers=depth)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, layers=depth))


class Held(NamedTuple):
    """What a rank holds from step to step, by category, and what its update takes."""

    bytes: Counter[str]
    update_bytes: int
    update_seconds: float


@functools.lru_cache(maxsize=64)
def held(setup: Setup, cluster: Cluster) -> Held:
    """Return what a rank holds, by an update of the whole model."""
    with rank_of(setup, setup.config, None) as rank:
        ledger = rank.ledger
        ledger.begin()
        rank.update()
        took = sum(seconds(ledger.events, cluster, is_half=setup.dtype.itemsize == 2).values())
        return Held(Counter({name: ledger.live[name] for name in STATIC}), ledger.peak["update scratch"], took)


@functools.lru_cache(maxsize=4096)
def loss_ledger(problem: Problem, card: Card | None) -> Ledger:
    """Return the ledger of the loss in the mode that the trainer takes, with features that are there already."""
    sizes = [problem.rows] * problem.gpus
    mode = "default" if problem.gpus == 1 else choose_mode(sizes, problem.embed_dim, problem.dtype)
    return run_loss(problem, mode, card)

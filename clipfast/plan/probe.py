"""Memory and time of the towers, from steps on fake tensors of a model with few blocks.

Bytes, FLOPs and kernels of a step are linear in the number of blocks of each tower, and with a given number of blocks
in the batch: so the steps of towers of 3 and of 4 blocks with two batches tell those of the whole model with any batch.
The peak of memory is taken in each phase by itself, because which phase has the highest one depends on both.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence

from ..kernels.hardware import Card, Cluster
from ..ledger import Ledger
from ..models import CLIPConfig
from .setup import (
    EMBEDDING_BACKWARD,
    IMAGE_BACKWARD,
    IMAGE_FORWARD,
    IMAGES,
    LOSS,
    SCRATCH,
    TEXT_BACKWARD,
    TEXT_FORWARD,
    TEXTS,
    Setup,
    staged,
)

DEPTHS = (3, 4)  # a first, a last and a middle block, which differ; and one more in the middle
BATCHES = (256, 512)  # large enough for activations to outweigh what does not depend on the batch
FEW = 2  # small enough for the opposite: a phase never takes less than with so many pairs
FORWARD = (IMAGE_FORWARD, TEXT_FORWARD)
BACKWARD = (TEXT_BACKWARD, EMBEDDING_BACKWARD, IMAGE_BACKWARD)
OF_IMAGES = (IMAGE_FORWARD, IMAGE_BACKWARD, IMAGES)  # what grows with the blocks of the image tower
OF_TEXTS = (TEXT_FORWARD, TEXT_BACKWARD, TEXTS)
GATHERED = "gathered weights"
PROBED = (IMAGES, TEXTS, SCRATCH, GATHERED)  # categories; what lives from step to step is counted elsewhere
Work = tuple[int, int]  # FLOPs and bytes of a kernel


@dataclasses.dataclass(frozen=True)
class Sample:
    """A step with one depth and one batch: memory at the peak of each phase by category, and kernels by phase."""

    peaks: dict[str, Counter[str]]
    kernels: dict[str, list[Work]]

    @classmethod
    def of(cls, ledger: Ledger) -> "Sample":
        """Take from a ledger what the towers have to do with it."""
        phases = (*FORWARD, LOSS, *BACKWARD)
        kernels: dict[str, list[Work]] = {phase: [] for phase in phases}
        for event in ledger.events:
            if not event.collective and event.phase in kernels:
                kernels[event.phase].append((event.flops, event.bytes))
        peaks = {phase: Counter({name: ledger.peaks[phase][name] for name in PROBED}) for phase in phases}
        return cls(peaks, kernels)


@dataclasses.dataclass(frozen=True)
class Probe:
    """Samples by depth and batch.

    Attributes:
        more_images, more_texts: blocks that the towers have beyond those of the first samples.
        samples: for one depth, or for two of which the second has one block more in each tower; by batch.
        least: for each depth, a step with hardly any pairs, without checkpointing.
    """

    more_images: int
    more_texts: int
    samples: Sequence[dict[int, Sample]]
    least: Sequence[Sample]

    def peaks(self, rows: float) -> dict[str, Counter[str]]:
        """Return the bytes at the peak of each phase, by category, for ``rows`` pairs."""
        return {phase: self._peak(phase, rows) for phase in (*FORWARD, LOSS, *BACKWARD)}

    def seconds(self, phase: str, rows: float, cluster: Cluster, *, is_half: bool) -> float:
        """Return how long ``phase`` takes: by its kernels one after another, or by the host that starts them."""
        return self._whole(phase, [self._seconds(depth, phase, rows, cluster, is_half) for depth in self.samples])

    def block_seconds(self, phase: str, rows: float, cluster: Cluster, *, is_half: bool) -> float:
        """Return how long a block takes in ``phase``; of one whose blocks were not told apart, an even share."""
        both = [self._seconds(depth, phase, rows, cluster, is_half) for depth in self.samples]
        return both[1] - both[0] if len(both) == 2 else 0.0

    def flops(self, phase: str, rows: float) -> float:
        """Return the FLOPs of ``phase``."""
        totals = []
        for depth in self.samples:
            totals.append(_at(rows, {batch: sum(flops for flops, _ in s.kernels[phase]) for batch, s in depth.items()}))
        return self._whole(phase, totals)

    def _peak(self, phase: str, rows: float) -> Counter[str]:
        lines = {
            name: [_at(rows, {batch: s.peaks[phase][name] for batch, s in depth.items()}) for depth in self.samples]
            for name in PROBED
        }
        least = {name: [sample.peaks[phase][name] for sample in self.least] for name in PROBED}
        return max(
            (
                Counter({name: max(0, round(self._whole(name, found[name]))) for name in PROBED})
                for found in (lines, least)
            ),
            key=Counter.total,
        )

    def _whole(self, name: str, by_depth: Sequence[float]) -> float:
        """Return what the whole model takes of ``name``, a phase or a category, from what few blocks take."""
        more = self.more_images if name in OF_IMAGES else self.more_texts if name in OF_TEXTS else 0
        return by_depth[0] + more * (by_depth[-1] - by_depth[0])

    @staticmethod
    def _seconds(depth: dict[int, Sample], phase: str, rows: float, cluster: Cluster, is_half: bool) -> float:
        flops_per_s, bytes_per_s = cluster.card.reached(half=is_half), cluster.card.memory_bytes_per_s

        def together(kernels: Sequence[tuple[float, float]]) -> float:
            return sum(max(flops / flops_per_s, moved / bytes_per_s) for flops, moved in kernels)

        (first, small), (second, large) = [(batch, sample.kernels[phase]) for batch, sample in depth.items()]
        if len(small) == len(large):
            pairs = zip(small, large, strict=True)
            at = [[_at(rows, {first: few[i], second: many[i]}) for i in range(2)] for few, many in pairs]
            gpu = together([(flops, moved) for flops, moved in at])
        else:  # some kernel is of another number with another batch
            gpu = max(0.0, _at(rows, {first: together(small), second: together(large)}))
        return max(gpu, len(small) * cluster.launch_s)


@functools.lru_cache(maxsize=64)
def probe(setup: Setup, card: Card | None, checkpointings: tuple[str, ...]) -> dict[str, Probe]:
    """Run the small steps, and return a probe for each kind of checkpointing.

    Args:
        setup: what is trained; its own ``checkpointing`` has no effect. DistributedDataParallel changes nothing that
            is probed: its buckets are the gradients.
        card: the GPU that kernels are recorded for; None runs the kernels of the CPU.
        checkpointings: the kinds.
    """
    config, shallow, least = setup.config, _layers(setup.config), []
    samples: dict[str, list[dict[int, Sample]]] = {kind: [] for kind in checkpointings}
    can_cut = all(layers is None or layers > max(DEPTHS) for layers in shallow)
    alone = setup if setup.is_sharded else dataclasses.replace(setup, gpus=1)
    for depth in DEPTHS if can_cut else (None,):
        with staged(alone, _cut(config, depth), card) as rank:
            for _ in range(2):  # FSDP2 allocates in the first step what it keeps
                rank.step(FEW)
            least.append(Sample.of(rank.ledger))
            for kind in checkpointings:
                rank.set_checkpointing(kind)
                samples[kind].append({})
                for rows in BATCHES:
                    rank.step(rows)
                    samples[kind][-1][rows] = Sample.of(rank.ledger)
    more = [0 if layers is None or not can_cut else layers - DEPTHS[0] for layers in shallow]
    return {kind: Probe(more[0], more[1], samples[kind], least) for kind in checkpointings}


def _layers(config: CLIPConfig) -> tuple[int | None, int]:
    """Return the blocks of both towers, with None for a ResNet."""
    return config.vision.layers if isinstance(config.vision.layers, int) else None, config.text.layers


def _cut(config: CLIPConfig, depth: int | None) -> CLIPConfig:
    """Return the configuration with ``depth`` blocks in each transformer; with as many as it has if that is None."""
    if depth is None:
        return config
    if isinstance(config.vision.layers, int):
        config = config.with_vision(layers=depth)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, layers=depth))


def _at(rows: float, by_batch: dict[int, float]) -> float:
    """Return the value for ``rows`` pairs on the line through two points."""
    (first, low), (second, high) = by_batch.items()
    return low + (high - low) * (rows - first) / (second - first)

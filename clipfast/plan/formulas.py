"""Memory, FLOPs and bytes on the wire of each mode of the contrastive loss, for one of W GPUs that hold b pairs each.

The modes of many GPUs are those of :mod:`clipfast.kernels.contrastive.distributed`, the modes of one are the values of
``memory`` of :func:`clipfast.contrastive_loss`. "openclip" is OpenCLIP's ``ClipLoss(local_loss=True,
gather_with_grad=True)``, or on one GPU ``ClipLoss()``, under autocast where features have 16 bits.

Memory is what is allocated beyond the features of the rank, at the moment when it is most. It counts tensors, not what
a communication library takes for itself. Sent is what a rank hands on, as ring algorithms do it: all that is gathered,
but the rank's own, passes through every rank once.
"""

import dataclasses
from collections.abc import Callable

import torch

from ..kernels.contrastive.distributed import MODES
from .scratch import FLOAT, Scratch

MODES_OF_MANY = tuple(mode for mode in MODES if mode != "auto")
MODES_OF_ONE = ("default", "min")
OPENCLIP = "openclip"
FORWARD, BACKWARD = "forward", "backward"

GATHERED, TRANSIT, SUMS, GRADS = "gathered features", "texts in transit", "float32 gradients", "gradients returned"
COPIES, VECTORS, SCRATCH, LOGITS = "copies of operands", "vectors", "scratch", "logits"
# Products of b x N x D, each of 2 b N D FLOPs: logits forward; logits again and two gradients backward.
PRODUCTS = {
    "default": (1, 3), "min": (1, 4), "gather": (1, 3), "ring": (1, 3), "scalars": (2, 4), OPENCLIP: (2, 4),
}  # fmt: skip
# Kernels that the host starts, forward and backward: for a pass, and for a block of logits. Merging what W ranks say of
# columns takes 4 W; the ring merges rows as well, which is in its blocks. Counted, but OpenCLIP's few are a guess.
LAUNCHES = {
    "default": ((39, 32), (19, 7)), "min": ((39, 32), (18, 7)), "gather": ((55, 32), (30, 8)),
    "ring": ((51, 40), (29, 9)), "scalars": ((35, 32), (30, 7)), OPENCLIP: ((20, 0), (20, 0)),
}  # fmt: skip
# Bytes for each logit of [b, N] at OpenCLIP's peak, the same in either precision. Autocast: both logits in 16 bits, and
# in float32 both log-softmaxes and one copy of the logits; float32: both logits and both log-softmaxes.
OPENCLIP_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Problem:
    """A batch, and the GPUs that share it.

    Args:
        pairs: of all GPUs together; every GPU holds as many, so they are rounded up to a multiple of ``gpus``.
        embed_dim: D, of the features.
        gpus: W.
        dtype: of the features: float32, float16 or bfloat16.

    Raises:
        ValueError: a size below 1, or another dtype.
    """

    pairs: int
    embed_dim: int
    gpus: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("pairs", "embed_dim", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {self.dtype}")

    @property
    def rows(self) -> int:
        """b, pairs of one GPU."""
        return -(-self.pairs // self.gpus)

    @property
    def total(self) -> int:
        """N, pairs of all GPUs."""
        return self.rows * self.gpus

    @property
    def features(self) -> int:
        """Bytes of b rows."""
        return self.rows * self.embed_dim * self.dtype.itemsize

    @property
    def sums(self) -> int:
        """Bytes of b rows in float32."""
        return self.rows * self.embed_dim * FLOAT

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes that there are on so many GPUs."""
        return MODES_OF_ONE if self.gpus == 1 else MODES_OF_MANY


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes beyond the rank's own features, by what they are for, in the phase that needs most of them."""

    phase: str
    items: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.items.values())


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a rank sends in one kind of message: bytes and messages in all.

    Attributes:
        what: name of it.
        when: ``FORWARD`` or ``BACKWARD``.
        ring: from neighbour to neighbour by the loss itself; otherwise a collective of the communication library.
        hidden: travels while the next block is computed.
    """

    what: str
    when: str
    bytes: int
    messages: int
    ring: bool = False
    hidden: bool = False


def flops(problem: Problem, mode: str) -> tuple[int, int]:
    """FLOPs of a rank, forward and backward; a multiply-add is two."""
    product = 2 * problem.rows * problem.total * problem.embed_dim
    forward, backward = PRODUCTS[mode]
    return forward * product, backward * product


def blocks(problem: Problem, mode: str) -> tuple[int, int, int, int]:
    """Blocks of logits of a rank, forward and backward, and columns of a block, forward and backward."""
    b, n, w = problem.rows, problem.total, problem.gpus
    if mode == "gather":
        return 1, w, n, b
    if mode == "ring":
        return w, w, b, b
    return (2, 2, n, n) if mode in ("scalars", "min") else (1, 1, n, n)


def launches(problem: Problem, mode: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernels that the host starts forward and backward, each for the pass and for a block of logits. Blocks of more
    rows than a block of G has start more, but then the GPU takes longer than the host.
    """
    (forward, block), backward = LAUNCHES[mode]
    return (forward + (4 * problem.gpus if mode == "gather" else 0), block), backward


def traffic(problem: Problem, mode: str) -> list[Exchange]:
    """What a rank sends to others, in order."""
    w, b = problem.gpus, problem.rows
    if w == 1:
        return []
    others = w - 1
    texts, sums = problem.features, problem.sums
    sizes = Exchange("sizes", FORWARD, others * 3 * 8, others)
    statistics = Exchange("statistics of rows", FORWARD, others * 5 * b * FLOAT, others)
    partial = Exchange("statistics of columns", FORWARD, others * 2 * b * FLOAT, others)
    ends = [
        Exchange(what, BACKWARD, others * FLOAT, others) for what in ("weight of the loss", "gradient of the scale")
    ]
    if mode == "gather":
        return [
            sizes, Exchange("texts", FORWARD, others * texts, others), partial, statistics,
            ends[0], Exchange("text gradients", BACKWARD, others * sums, others, hidden=True), ends[1],
        ]  # fmt: skip
    if mode == "ring":
        return [
            sizes, Exchange("texts", FORWARD, others * texts, others, ring=True, hidden=True), partial, statistics,
            ends[0], Exchange("texts", BACKWARD, others * texts, others, ring=True, hidden=True),
            Exchange("text gradients", BACKWARD, w * sums, w, ring=True, hidden=True), ends[1],
        ]  # fmt: skip
    if mode == "scalars":
        both = Exchange("images and texts", FORWARD, 2 * others * texts, 2 * others)
        return [sizes, both, statistics, *ends]
    return [
        Exchange("images and texts", FORWARD, 2 * others * texts, 2 * others),
        Exchange("image and text gradients", BACKWARD, 2 * others * texts, 2 * others),
    ]


def memory(problem: Problem, mode: str, scratch: Scratch) -> Memory:
    """What a rank holds beyond its features when it holds most; ``scratch`` is that of the device."""
    phases = _PHASES[mode](problem, scratch)
    name, items = max(phases.items(), key=lambda phase: sum(phase[1].values()))
    return Memory(name, {item: size for item, size in items.items() if size})


Phases = dict[str, dict[str, int]]


def _of_one(problem: Problem, scratch: Scratch, *, save_memory: bool) -> Phases:
    n, operand = problem.total, scratch.operand(problem.total)
    strip = scratch.strip(n)
    strip_sums = FLOAT * strip * problem.embed_dim
    kept = 0 if save_memory else problem.sums
    copies = {COPIES: 2 * operand.kept}
    base = copies | {GRADS: 2 * problem.features, VECTORS: 7 * n * FLOAT}
    return {
        "forward": copies | {VECTORS: 5 * n * FLOAT, SCRATCH: scratch.stats(n, n)},
        "backward, operands": {COPIES: operand.kept + operand.making, VECTORS: 6 * n * FLOAT},
        "backward": base | {SUMS: kept + strip_sums, SCRATCH: scratch.gradients(strip, n)},
        "backward, next strip": base | {SUMS: kept + (2 if strip < n else 1) * strip_sums},
        "backward, end": base | {SUMS: kept + strip_sums, SCRATCH: scratch.finish(strip)},
        "backward, scale": base | {SUMS: kept, SCRATCH: _widened(problem, scratch, n)},
    }


def _default(problem: Problem, scratch: Scratch) -> Phases:
    return _of_one(problem, scratch, save_memory=False)


def _min(problem: Problem, scratch: Scratch) -> Phases:
    return _of_one(problem, scratch, save_memory=True)


def _backward_vectors(problem: Problem) -> int:
    # of all: five statistics, the share, and three weights of rows and of columns; of the rank: the miss
    return FLOAT * (12 * problem.total + problem.rows)


def _widened(problem: Problem, scratch: Scratch, pairs: int) -> int:
    # both sides in float32, and their products
    return 3 * FLOAT * min(pairs, scratch.widened_rows) * problem.embed_dim


def _end(problem: Problem, scratch: Scratch) -> dict[str, int]:
    most = max(scratch.finish(problem.rows), _widened(problem, scratch, problem.rows))
    return {SUMS: 2 * problem.sums, GRADS: 2 * problem.features, SCRATCH: most}


def _gather(problem: Problem, scratch: Scratch) -> Phases:
    b, n = problem.rows, problem.total
    own, all_rows = scratch.operand(b), scratch.operand(n)
    gathered = {GATHERED: problem.gpus * problem.features}
    copies = 2 * own.kept + b * scratch.packed_row
    base = gathered | {VECTORS: _backward_vectors(problem), COPIES: 2 * own.kept}
    # of images; of own texts; of the block that is being reduced, and of the one that is computed
    sums = {SUMS: (1 + min(3, problem.gpus)) * problem.sums}
    return {
        "forward, operands": gathered | {COPIES: copies + all_rows.making},
        "forward": gathered
        | {COPIES: copies + all_rows.kept, VECTORS: FLOAT * (3 * b + 2 * n), SCRATCH: scratch.stats(b, n)},
        "backward, operands": base | sums | {COPIES: 2 * own.kept + own.making},
        "backward": base | sums | {COPIES: 3 * own.kept, SCRATCH: scratch.gradients(b, b)},
        "backward, end": base | _end(problem, scratch),
    }


def _ring(problem: Problem, scratch: Scratch) -> Phases:
    b, n = problem.rows, problem.total
    own, packed = scratch.operand(b), b * scratch.packed_row
    # the block at work and the next; own texts are the rank's
    transit, handover = ({TRANSIT: min(count, problem.gpus - 1) * problem.features} for count in (2, 3))
    copies = 2 * own.kept + packed
    forward, backward = {VECTORS: FLOAT * 5 * n}, {VECTORS: _backward_vectors(problem)}
    # of images; of the block at work, of what goes on and of what comes
    sums = {SUMS: 4 * problem.sums}
    return {
        "forward, operands": transit | forward | {COPIES: copies + own.making},
        "forward": transit | forward | {COPIES: copies + own.kept, SCRATCH: scratch.stats(b, b)},
        "forward, next block": handover | forward | {COPIES: copies},
        "backward, operands": transit | backward | sums | {COPIES: copies + own.making},
        "backward": transit | backward | sums | {COPIES: copies + own.kept, SCRATCH: scratch.gradients(b, b)},
        "backward, sending on": transit | backward | {SUMS: 5 * problem.sums, COPIES: copies},
        "backward, end": backward | {COPIES: 2 * own.kept} | _end(problem, scratch),
    }


def _scalars(problem: Problem, scratch: Scratch) -> Phases:
    b, n = problem.rows, problem.total
    own, all_rows = scratch.operand(b), scratch.operand(n)
    gathered = {GATHERED: 2 * problem.gpus * problem.features}
    making = {COPIES: 2 * own.kept + all_rows.kept + all_rows.making}
    made = {COPIES: 2 * own.kept + 2 * all_rows.kept}
    backward = {VECTORS: _backward_vectors(problem)}
    return {
        "forward, operands": gathered | making,
        "forward": gathered | made | {VECTORS: FLOAT * (6 * b + 4 * n), SCRATCH: scratch.stats(b, n)},
        "backward, operands": gathered | making | backward,
        "backward": gathered | made | backward | {SUMS: 2 * problem.sums, SCRATCH: scratch.gradients(b, n)},
        "backward, end": gathered | backward | {COPIES: 2 * own.kept} | _end(problem, scratch),
    }


def _openclip(problem: Problem, _: Scratch) -> Phases:
    logits = OPENCLIP_BYTES * problem.rows * problem.total
    gathered = 2 * problem.gpus * problem.features if problem.gpus > 1 else 0
    return {"logits": {LOGITS: logits, GATHERED: gathered, COPIES: 2 * problem.features}}


_PHASES: dict[str, Callable[[Problem, Scratch], Phases]] = {
    "default": _default, "min": _min, "gather": _gather, "ring": _ring, "scalars": _scalars, OPENCLIP: _openclip,
}  # fmt: skip

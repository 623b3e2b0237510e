"""Times from counts and rates, and what fits.

A block of logits takes the longest of its FLOPs over the card's rate, its bytes over the memory's, and the host's time
to start its kernels. A message takes its bytes over the link's rate, and a latency. Of what is sent while the next
block is computed, only what that block does not cover adds to the time: with c per block and w per message, B blocks
take c + (B - 1) max(c, w), and the last message comes on top where nothing is left to compute.
"""

import dataclasses
from typing import Any

from ..kernels.contrastive.distributed import choose_mode
from .formulas import (
    BACKWARD,
    FORWARD,
    OPENCLIP,
    Exchange,
    Memory,
    Problem,
    blocks,
    flops,
    launches,
    memory,
    traffic,
)
from .machine import Machine
from .scratch import FLOAT

# Of a logit at OpenCLIP, bytes that pass through memory, both directions of the loss and both passes: each operation on
# the logits reads and writes them all.
OPENCLIP_TRAFFIC = {2: 84, 4: 72}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One mode of one problem on one machine; sizes in bytes, times in seconds, per rank.

    Attributes:
        mode: its name.
        is_auto: whether ``mode="auto"`` takes it, on several GPUs.
        memory: at its peak, beyond the rank's features.
        flops: forward and backward.
        sent: forward and backward.
        messages: of both passes, one after another.
        compute_s: of both passes.
        wire_s: of all messages, hidden or not.
        exposed_s: what messages add to the time of computing.
        fits: the peak and the features, in the memory that there is.
        largest_pairs: the most pairs of all GPUs with which it would fit.
    """

    mode: str
    is_auto: bool
    memory: Memory
    flops: tuple[int, int]
    sent: tuple[int, int]
    messages: int
    compute_s: float
    wire_s: float
    exposed_s: float
    fits: bool
    largest_pairs: int

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.compute_s + self.exposed_s

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        memory_bytes = {"total": self.memory.total, "phase": self.memory.phase, "items": self.memory.items}
        pair = {key: dict(zip((FORWARD, BACKWARD), found.pop(key), strict=True)) for key in ("flops", "sent")}
        del found["memory"]
        return found | {"seconds": self.seconds, "memory_bytes": memory_bytes} | {
            "flops": pair["flops"], "sent_bytes": pair["sent"]
        }  # fmt: skip


def predict_all(problem: Problem, machine: Machine) -> list[Prediction]:
    """Every mode that there is on so many GPUs, and OpenCLIP's loss."""
    return [predict(problem, mode, machine) for mode in (*problem.modes, OPENCLIP)]


def predict(problem: Problem, mode: str, machine: Machine) -> Prediction:
    """What ``mode`` will need.

    Raises:
        KeyError: not a mode of ``problem``, nor "openclip".
    """
    exchanges = traffic(problem, mode)
    counted = flops(problem, mode)
    peak = memory(problem, mode, machine.scratch(problem.embed_dim, problem.dtype))
    compute = total = 0.0
    for index, when in enumerate((FORWARD, BACKWARD)):
        computing, with_wire = _pass_seconds(problem, mode, machine, index, [e for e in exchanges if e.when == when])
        compute, total = compute + computing, total + with_wire
    return Prediction(
        mode,
        mode == auto_mode(problem),
        peak,
        counted,
        (sum(e.bytes for e in exchanges if e.when == FORWARD), sum(e.bytes for e in exchanges if e.when == BACKWARD)),
        sum(e.messages for e in exchanges),
        compute,
        sum(_wire_seconds(e, problem, machine) for e in exchanges),
        total - compute,
        _fits(problem, mode, machine),
        largest_pairs(problem, mode, machine),
    )


def auto_mode(problem: Problem) -> str | None:
    """What ``mode="auto"`` takes; None on one GPU, where there is no such choice."""
    if problem.gpus == 1:
        return None
    return choose_mode([problem.rows] * problem.gpus, problem.embed_dim, problem.dtype)


def largest_pairs(problem: Problem, mode: str, machine: Machine) -> int:
    """The most pairs of all GPUs with which ``mode`` fits, a multiple of the GPUs; 0 if none do."""

    def fits(rows: int) -> bool:
        return _fits(dataclasses.replace(problem, pairs=rows * problem.gpus), mode, machine)

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * problem.gpus


def _fits(problem: Problem, mode: str, machine: Machine) -> bool:
    peak = memory(problem, mode, machine.scratch(problem.embed_dim, problem.dtype))
    return peak.total + 2 * problem.features <= machine.memory_bytes


def _pass_seconds(
    problem: Problem, mode: str, machine: Machine, index: int, exchanges: list[Exchange]
) -> tuple[float, float]:
    """Of the forward (0) or backward (1) pass: seconds of computing, and with what messages add."""
    number, block = blocks(problem, mode)[index], _block_seconds(problem, mode, machine, index)
    rest = 1e-6 * machine.launch_us * launches(problem, mode)[index][0]
    hidden = [e for e in exchanges if e.hidden]
    exposed = sum(_wire_seconds(e, problem, machine) for e in exchanges if not e.hidden)
    computing = rest + number * block
    if not hidden:
        return computing, computing + exposed
    travel = sum(_wire_seconds(e, problem, machine) / e.messages for e in hidden)
    # gradients of the last block have nothing left to hide behind; texts of the next block always have this one
    last = sum(_wire_seconds(e, problem, machine) / e.messages for e in hidden if e.what == "text gradients")
    return computing, rest + block + (number - 1) * max(block, travel) + last + exposed


def _block_seconds(problem: Problem, mode: str, machine: Machine, index: int) -> float:
    number, columns = blocks(problem, mode)[index], blocks(problem, mode)[2 + index]
    computing = flops(problem, mode)[index] / number / machine.flops_per_s(problem.dtype)
    if mode == OPENCLIP:
        # one operation after another: what the logits take to pass through memory comes on top
        logits = problem.rows * problem.total * OPENCLIP_TRAFFIC[problem.dtype.itemsize] / 2
        return computing + logits / machine.bytes_per_s
    elements = (problem.rows + columns) * problem.embed_dim
    # features are read, in both passes; sums are made, read and written
    moved = elements * problem.dtype.itemsize if index == 0 else elements * (problem.dtype.itemsize + 3 * FLOAT)
    return max(computing, moved / machine.bytes_per_s, 1e-6 * machine.launch_us * launches(problem, mode)[index][1])


def _wire_seconds(exchange: Exchange, problem: Problem, machine: Machine) -> float:
    rate = machine.wire_bytes_per_s(problem.gpus, ring=exchange.ring)
    return exchange.bytes / rate + 1e-6 * machine.latency_us * exchange.messages

"""What fits: the largest batch of a model on so many GPUs, and what a step and a whole training then take."""

import dataclasses
from collections import Counter
from typing import Any

from ..kernels.hardware import Cluster
from .setup import CHECKPOINTINGS, PARALLELS, Setup
from .training import Batch, StepPlan

# What the published models were trained in, from small to large.
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")
MOST_ROWS = 2**16  # pairs of a GPU up to which the largest batch is searched
MULTIPLE = 8  # the largest batch is a multiple of this, if it is not smaller
CONTEXT, SLACK = "CUDA and NCCL (assumed)", "allocator slack (assumed)"
DAY = 86400.0


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no count of tensors can tell, and what the training is to be.

    Attributes:
        context_bytes: the CUDA context, the workspaces of cuBLAS and the buffers of NCCL.
        slack: what the allocator holds beyond tensors, as a share of them.
        samples_seen: pairs of the whole training; None leaves its length out.
        price: money for an hour of one GPU; None leaves the costs out.
    """

    context_bytes: float = 1.5e9
    slack: float = 0.05
    samples_seen: int | None = None
    price: float | None = None


def memory_of(plan: StepPlan, batch: Batch, assumed: Assumptions) -> Counter[str]:
    """Return the bytes of a GPU by category, with what is assumed on top of the tensors."""
    found = plan.memory(batch)
    return found + Counter({CONTEXT: round(assumed.context_bytes), SLACK: round(assumed.slack * found.total())})


def fits(plan: StepPlan, batch: Batch, assumed: Assumptions) -> bool:
    """Return whether a step fits into the memory of a GPU."""
    return memory_of(plan, batch, assumed).total() <= plan.cluster.card.memory_bytes


def largest_rows(plan: StepPlan, assumed: Assumptions, micro_batches: int = 1) -> int:
    """Return the most pairs of a GPU that fit: a multiple of 8, or less than 8, or 0 if not even one fits."""

    def does(rows: int) -> bool:
        return fits(plan, Batch(rows, -(-rows // micro_batches)), assumed)

    step = MULTIPLE * micro_batches if does(MULTIPLE * micro_batches) else micro_batches
    low, high = 0, MOST_ROWS // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if does(middle * step) else (low, middle)
    return low * step


def describe(plan: StepPlan, batch: Batch, assumed: Assumptions) -> dict[str, Any]:
    """Return everything that is predicted of a step and of the training, with plain keys and numbers."""
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
        found |= length(assumed, setup.gpus, pairs / seconds)
    return found


def length(assumed: Assumptions, gpus: int, pairs_per_s: float) -> dict[str, float]:
    """Return days, GPU-hours and, if there is a price, the costs of a training."""
    if assumed.samples_seen is None:
        raise ValueError("the length of a training needs samples_seen")
    days = assumed.samples_seen / pairs_per_s / DAY
    found = {"days": days, "gpu_hours": days * 24 * gpus}
    return found if assumed.price is None else found | {"cost": found["gpu_hours"] * assumed.price}


def fit(setups: list[Setup], cluster: Cluster, assumed: Assumptions, micro_batches: int = 1) -> list[dict[str, Any]]:
    """Return what the largest batch of each setup takes.

    Of each model, the row with the most pairs/s among those that fit has ``is_best``.
    """
    rows = []
    for setup in setups:
        plan = StepPlan(setup, cluster, cluster.card, CHECKPOINTINGS)
        most = largest_rows(plan, assumed, micro_batches)
        if most:
            rows.append(describe(plan, Batch(most, -(-most // micro_batches)), assumed))
        else:
            rows.append({**dataclasses.asdict(setup), "batch_per_gpu": 0, "fits": False})
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        best = max(of_model, key=lambda row: row.get("pairs_per_s", 0.0))
        for row in of_model:
            row["is_best"] = row is best and row["fits"]
    return rows


def combinations(setup: Setup, models: list[str], parallel: str | None, checkpointing: str | None) -> list[Setup]:
    """Return the setups of a table: every model with every way that is not fixed. On one GPU there is no other way."""
    ways = [parallel] if parallel else PARALLELS if setup.gpus > 1 else PARALLELS[:1]
    kinds = [checkpointing] if checkpointing else CHECKPOINTINGS
    return [
        dataclasses.replace(setup, model=model, parallel=way, checkpointing=kind)
        for model in models
        for way in ways
        for kind in kinds
    ]

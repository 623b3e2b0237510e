"""The largest batch of a model that fits on so many GPUs, and what a step and a whole training then take."""

import dataclasses
import functools
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from ..host import cores
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
    """Assumptions on what no count of tensors can tell, and what the training is to be.

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


def memory_of(plan: StepPlan, batch: Batch, assumed: Assumptions, *, with_loss: bool = True) -> Counter[str]:
    """Return the bytes of a GPU by category, with what is assumed on top of the tensors."""
    found = plan.memory(batch, with_loss=with_loss)
    return found + Counter({CONTEXT: round(assumed.context_bytes), SLACK: round(assumed.slack * found.total())})


def largest_rows(plan: StepPlan, assumed: Assumptions, micro_batches: int = 1) -> int:
    """Return the most pairs of a GPU that fit, or 0 if not even one in each micro-batch does.

    The micro-batches are equal, and multiples of 8 unless that is too much.
    """

    def does(rows: int, *, with_loss: bool = True) -> bool:
        found = memory_of(plan, Batch(rows, rows // micro_batches), assumed, with_loss=with_loss)
        return found.total() <= plan.cluster.card.memory_bytes

    def search(high: int, *, with_loss: bool) -> int:
        """Return the most steps, less than ``high``, that fit."""
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if does(middle * step, with_loss=with_loss) else (low, middle)
        return low

    step = MULTIPLE * micro_batches if does(MULTIPLE * micro_batches) else micro_batches
    most = search(MOST_ROWS // step + 1, with_loss=False)  # nearly always right, and at once
    return step * (most if most == 0 or does(most * step) else search(most, with_loss=True))


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
    """Return what the largest batch of each setup takes; several models are planned in processes of their own.

    Of each model, the row with the most pairs/s among those that fit has ``is_best``.
    """
    models = list(dict.fromkeys(setup.model for setup in setups))
    jobs = [[setup for setup in setups if setup.model == model] for model in models]
    one = functools.partial(_fit_model, cluster=cluster, assumed=assumed, micro_batches=micro_batches)
    workers = min(len(jobs), cores())
    if workers == 1:
        found = list(map(one, jobs))
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver")) as pool:
            found = list(pool.map(one, reversed(jobs)))[::-1]  # the largest first, which take longest
    return [row for rows in found for row in rows]


def _fit_model(setups: list[Setup], cluster: Cluster, assumed: Assumptions, micro_batches: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for setup in setups:
        plan = StepPlan(setup, cluster, cluster.card, tuple(dict.fromkeys(one.checkpointing for one in setups)))
        most = largest_rows(plan, assumed, micro_batches)
        if most:
            rows.append(describe(plan, Batch(most, most // micro_batches), assumed))
        else:
            rows.append({**dataclasses.asdict(setup), "batch_per_gpu": 0, "fits": False})
    best = max(rows, key=lambda row: row.get("pairs_per_s", 0.0))
    return [row | {"is_best": row is best and row["fits"]} for row in rows]


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

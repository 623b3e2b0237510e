"""The plan of a training step against real steps in gloo processes on this machine."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from ..kernels.hardware import CARDS, Cluster
from ..ledger import Ledger
from ..models import CLIPConfig
from ..ranks import run_ranks
from .predict import TIMEOUT_S, TOLERANCE
from .setup import CHECKPOINTINGS, PARALLELS, Setup, staged
from .training import STATIC, Batch, StepPlan

ROUNDING = 1e-4  # of what is sent: each message is rounded to whole bytes
COPIES = "copies of gloo"
PEAK, SENT = "memory", "sent"


def check_training(setup: Setup, batch: Batch) -> list[dict[str, Any]]:
    """Take real steps with DDP and FSDP2 and each kind of checkpointing, and return a row for each figure."""
    setups = [
        dataclasses.replace(setup, parallel=parallel, checkpointing=kind)
        for parallel in PARALLELS
        for kind in CHECKPOINTINGS
    ]
    with tempfile.TemporaryDirectory() as folder:
        waits = {"timeout": TIMEOUT_S, "collective_s": TIMEOUT_S}
        ranks = run_ranks(_measure_all, setup.gpus, setups, setup.config, batch, folder=Path(folder), **waits)
    rows = []
    for index, one in enumerate(setups):
        for what, predicted in _predict(one, batch).items():
            measured = max(rank[index][what] for rank in ranks)
            tolerance = {PEAK: TOLERANCE, SENT: ROUNDING}.get(what, 0.0)
            row = {"parallel": one.parallel, "checkpointing": one.checkpointing, "what": what}
            agrees = abs(measured - predicted) <= tolerance * predicted
            rows.append(row | {"predicted": predicted, "measured": measured, "agrees": agrees})
    return rows


def _predict(setup: Setup, batch: Batch) -> dict[str, int]:
    plan = StepPlan(setup, Cluster(CARDS["h100"]), None, CHECKPOINTINGS)
    plan.batches_held = 1
    memory = plan.memory(batch)
    return {name: memory[name] for name in STATIC} | {
        PEAK: memory.total(),
        SENT: sum(plan.sent(batch).values()),
    }


def _measure_all(_: int, setups: list[Setup], config: CLIPConfig, batch: Batch) -> list[dict[str, int]]:
    return [_measure(setup, config, batch) for setup in setups]


def _measure(setup: Setup, config: CLIPConfig, batch: Batch) -> dict[str, int]:
    with (
        staged(setup, config, None, is_fake=False, ledger_type=_WithoutCopies) as rank,
        _marking_copies(rank.ledger),
    ):
        rank.set_checkpointing(setup.checkpointing)
        # FSDP2 allocates in its first step what it keeps, and DDP makes its buckets the gradients.
        rank.step(batch.rows, batch.micro_rows, is_whole=True)
        if not setup.is_sharded:
            rank.ledger.phase = "gradients"
            rank.trained.reducer._rebuild_buckets()  # type: ignore[operator, union-attr]
        rank.step(batch.rows, batch.micro_rows, is_whole=True)
        ledger = rank.ledger
        sent = sum(event.bytes for event in ledger.events if event.collective)
        return {name: ledger.live[name] for name in STATIC} | {PEAK: ledger.peak.total(), SENT: sent}


class _WithoutCopies(Ledger):
    """A ledger that looks away while a copy of gloo lives, which copies what it reduces and scatters. NCCL does not."""

    def _update_peak(self) -> None:
        if not self.live[COPIES]:
            super()._update_peak()


@contextlib.contextmanager
def _marking_copies(ledger: Ledger) -> Iterator[None]:
    def marked(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        phase, ledger.phase = ledger.phase, COPIES
        try:
            return function(*args, **options)
        finally:
            ledger.phase = phase

    with contextlib.ExitStack() as stack:
        for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # the second is new in PyTorch 2.13
            if (function := getattr(dist, name, None)) is not None:
                stack.enter_context(mock.patch.object(dist, name, functools.partial(marked, function)))
        yield

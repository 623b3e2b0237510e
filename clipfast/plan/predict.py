"""What a training step takes: figures that are counted, times that follow from them, and a check of the figures."""

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..kernels.contrastive.distributed import choose_mode
from ..kernels.hardware import CARDS, Cluster
from ..ledger import Event, Ledger
from ..ranks import run_ranks
from .step import FORWARD, LOSS_FORWARD, OPENCLIP, Problem, run_step

MOST_ROWS = 16384  # pairs of a GPU up to which the largest batch is searched
TOLERANCE = 0.03  # of memory: a block that has been sent may live for a moment longer
TIMEOUT_S = 1800.0
# What a step is checked on: PyTorch's kernels for the CPU, and ours for an H100, which are recorded and not run.
PATHS = {"CPU path": None, "GPU path, kernels recorded": CARDS["h100"]}


def seconds(events: list[Event], problem: Problem, cluster: Cluster, *, with_messages: bool = True) -> dict[str, float]:
    """Return the seconds of each phase, by clocks of the host, of the GPU and of the wire.

    The host starts one kernel after another. A kernel runs when the one before it has ended and what it uses has
    arrived, for its FLOPs or its bytes, whichever takes longer. A message leaves when what it sends is there and the
    message before it has left.
    """
    host = gpu = wire = 0.0
    arrivals: dict[int, float] = {}
    ends = {"": 0.0}
    flops_per_s = cluster.card.reached(half=problem.dtype != torch.float32)
    for event in events:
        host += cluster.launch_s
        start = max([host, gpu, *(arrivals.pop(storage) for storage in event.uses & arrivals.keys())])
        if not event.collective:
            gpu = start + max(event.flops / flops_per_s, event.bytes / cluster.card.memory_bytes_per_s)
        elif with_messages:
            rate = cluster.bytes_per_s(problem.gpus, is_ring=event.collective == "send")
            wire = max(wire, start) + event.bytes / rate + cluster.latency_s * event.messages
            if event.collective != "send":
                arrivals |= dict.fromkeys(event.uses, wire)
        ends[event.phase] = max(host, gpu)
    ends[events[-1].phase] = max(host, gpu, wire)
    return {phase: end - start for (phase, end), start in zip([*ends.items()][1:], ends.values(), strict=False)}


def figures(ledger: Ledger) -> dict[str, int]:
    """Return what is counted of a step; bytes and messages are those that this rank sends."""
    sent = Counter[bool]()
    for event in ledger.events:
        sent[event.phase in (FORWARD, LOSS_FORWARD)] += event.bytes if event.collective else 0
    return {
        "memory": ledger.peak.total(),
        "FLOPs": sum(event.flops for event in ledger.events),
        "sent forward": sent[True],
        "sent backward": sent[False],
        "messages": sum(event.messages for event in ledger.events),
        "kernels": sum(not event.collective for event in ledger.events),
    }


def predict(problem: Problem, cluster: Cluster, *, searches: bool = False) -> list[dict[str, Any]]:
    """Return the figures of a step, its seconds, and what they consist of, for each mode and for OpenCLIP's loss.

    With ``searches``, also find the largest batch that fits, by running many steps.
    """
    auto = choose_mode([problem.rows] * problem.gpus, problem.embed_dim, problem.dtype) if problem.gpus > 1 else None
    rows = []
    for mode in (*problem.modes, OPENCLIP):
        ledger = run_step(problem, mode, cluster.card)
        sent: dict[str, Counter[str]] = {}
        for event in ledger.events:
            if event.messages:
                sent.setdefault(event.collective, Counter()).update(bytes=event.bytes, messages=event.messages)
        silent, phases = (seconds(ledger.events, problem, cluster, with_messages=on) for on in (False, True))
        compute, total = sum(silent.values()), sum(phases.values())
        times = {"compute": compute, "exposed": total - compute, "time": total}
        fits: dict[str, int] = {"fits": ledger.peak.total() <= cluster.card.memory_bytes}
        if searches:
            fits["max pairs"] = largest_pairs(problem, mode, cluster)
        parts = {"memory by category": dict(+ledger.peak), "time by phase": phases, "sent by collective": sent}
        rows.append({"mode": mode, "is_auto": mode == auto, **fits, **figures(ledger), **times} | parts)
    return rows


def largest_pairs(problem: Problem, mode: str, cluster: Cluster) -> int:
    """Return the most pairs whose step fits, to a percent, by running steps of up to ``MOST_ROWS`` pairs a GPU."""
    low, high = 0, MOST_ROWS + 1
    while high - low > 1 + low // 100:
        rows = (low + high) // 2
        ledger = run_step(dataclasses.replace(problem, pairs=rows * problem.gpus), mode, cluster.card)
        low, high = (rows, high) if ledger.peak.total() <= cluster.card.memory_bytes else (low, rows)
    return low * problem.gpus


def check(problem: Problem) -> list[dict[str, Any]]:
    """Run each mode on each path, on fake tensors and in real gloo processes, and return a row for each figure."""
    if problem.gpus == 1:
        ranks = [_measure(0, problem)]
    else:
        with tempfile.TemporaryDirectory() as folder:
            waits = {"timeout": TIMEOUT_S, "collective_s": TIMEOUT_S}
            ranks = run_ranks(_measure, problem.gpus, problem, folder=Path(folder), **waits)
    rows = []
    for (path, mode, what), predicted in _measure(0, problem, is_fake=True).items():
        measured = max(rank[path, mode, what] for rank in ranks)  # of the rank that has most of it
        agrees = abs(measured - predicted) <= (TOLERANCE * predicted if what == "memory" else 0)
        row = {"path": path, "mode": mode, "what": what, "predicted": predicted, "measured": measured}
        rows.append(row | {"agrees": agrees})
    return rows


def _measure(_: int, problem: Problem, is_fake: bool = False) -> dict[tuple[str, str, str], int]:
    found: dict[tuple[str, str, str], int] = {}
    for path, card in PATHS.items():
        for mode in problem.modes:
            ledger = run_step(problem, mode, card, is_fake=is_fake)
            found |= {(path, mode, what): count for what, count in figures(ledger).items()}
    return found

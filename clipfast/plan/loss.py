"""What the loss of all GPUs takes in each of its modes: figures that are counted, and times that follow from them."""

from collections import Counter
from typing import Any

from ..kernels.contrastive.distributed import choose_mode
from ..kernels.hardware import Cluster
from .ledger import Event, Ledger
from .planned_step import LOSS_FORWARD, OPENCLIP, Problem, run_loss


def seconds(
    events: list[Event], cluster: Cluster, gpus: int = 1, *, is_half: bool = True, with_messages: bool = True
) -> dict[str, float]:
    """Return the seconds of each phase, by clocks of the host, of the GPU and of the wire.

    The host starts one kernel after another. A kernel runs when the one before it has ended and what it uses has
    arrived, for its FLOPs or its bytes, whichever takes longer. A message leaves when what it sends is there and the
    message before it has left.
    """
    host = gpu = wire = 0.0
    arrivals: dict[int, float] = {}
    ends = {"": 0.0}
    flops_per_s = cluster.card.reached(half=is_half)
    for event in events:
        host += cluster.launch_s
        start = max([host, gpu, *(arrivals.pop(storage) for storage in event.uses & arrivals.keys())])
        if not event.collective:
            gpu = start + max(event.flops / flops_per_s, event.bytes / cluster.card.memory_bytes_per_s)
        elif with_messages:
            rate = cluster.bytes_per_s(gpus, is_ring=event.collective == "send")
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
        sent[event.phase == LOSS_FORWARD] += event.bytes if event.collective else 0
    return {
        "memory": ledger.peak.total(),
        "FLOPs": sum(event.flops for event in ledger.events),
        "sent forward": sent[True],
        "sent backward": sent[False],
        "messages": sum(event.messages for event in ledger.events),
        "kernels": sum(not event.collective for event in ledger.events),
    }


def predict(problem: Problem, cluster: Cluster) -> list[dict[str, Any]]:
    """Return figures, seconds, and what they consist of, for each mode and for OpenCLIP's loss."""
    auto = choose_mode([problem.rows] * problem.gpus, problem.embed_dim, problem.dtype) if problem.gpus > 1 else None
    rows = []
    for mode in (*problem.modes, OPENCLIP):
        ledger = run_loss(problem, mode, cluster.card)
        sent: dict[str, Counter[str]] = {}
        for event in ledger.events:
            if event.messages:
                sent.setdefault(event.collective, Counter()).update(bytes=event.bytes, messages=event.messages)
        silent, phases = (
            seconds(ledger.events, cluster, problem.gpus, is_half=problem.dtype.itemsize == 2, with_messages=on)
            for on in (False, True)
        )
        compute, total = sum(silent.values()), sum(phases.values())
        fits = ledger.peak.total() <= cluster.card.memory_bytes
        times = {"compute": compute, "exposed": total - compute, "time": total}
        parts = {"memory by category": dict(+ledger.peak), "time by phase": phases, "sent by collective": sent}
        rows.append({"mode": mode, "is_auto": mode == auto, "fits": fits, **figures(ledger), **times} | parts)
    return rows

"""Predict memory, communication and time of the distributed contrastive loss in each of its modes."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..kernels.contrastive.modes import choose_mode
from ..kernels.hardware import Cluster
from .ledger import Event, Ledger
from .planned_step import LOSS_FORWARD, OPENCLIP, Problem, run_loss


def seconds(
    events: list[Event], cluster: Cluster, gpus: int = 1, *, is_half: bool = True, with_messages: bool = True,
    took: Mapping[int, float] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return the predicted seconds of each phase of a ledger's ``events``, with separate clocks for host, GPU and link.

    The host launches one kernel after another. A kernel starts when the kernel before it has ended and its inputs have
    arrived. It takes the time of its FLOPs or of its bytes, whichever is longer; or, if ``took`` is given, the seconds
    that ``took`` has under the index of the kernel in ``events``. A collective starts when its data is ready and the
    collective before it has ended. ``with_messages=False`` leaves out the time of all communication.
    """
    host = gpu = wire = 0.0
    arrivals: dict[int, float] = {}
    ends = {"": 0.0}
    flops_per_s = cluster.card.reached(half=is_half)
    for number, event in enumerate(events):
        host += cluster.launch_s
        start = max([host, gpu, *(arrivals.pop(storage) for storage in event.uses & arrivals.keys())])
        if not event.collective:
            least = max(event.flops / flops_per_s, event.bytes / cluster.card.copied_bytes_per_s)
            gpu = start + (least if took is None else took[number])
        elif with_messages:
            wire = max(wire, start) + wire_seconds(event, cluster, gpus)
            if event.collective != "send":
                arrivals |= dict.fromkeys(event.uses, wire)
        ends[event.phase] = max(host, gpu)
    ends[events[-1].phase] = max(host, gpu, wire)
    return {phase: end - start for (phase, end), start in zip([*ends.items()][1:], ends.values(), strict=False)}


def wire_seconds(event: Event, cluster: Cluster, gpus: int) -> float:
    """Return the predicted seconds in which a rank sends the messages of a collective of the loss."""
    return cluster.message_s(gpus, event.bytes, event.messages, is_ring=event.collective == "send")


def figures(ledger: Ledger) -> dict[str, int]:
    """Return predicted totals of the loss and its backward pass: memory in bytes, FLOPs, kernels, and bytes sent."""
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
    """Return a row for each mode of the loss and for OpenCLIP's: predicted totals and seconds, and their breakdown."""
    sizes = [problem.rows] * problem.gpus
    auto = choose_mode(sizes, problem.embed_dim, problem.dtype, cluster.gpus_per_node) if problem.gpus > 1 else None
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

"""Processors, memory, and the limits that the system sets to a process."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..host import ROOT, SHARED_MEMORY, core_quota, cores, free_bytes, process_memory, processor
from ..units import BYTES, scaled
from .findings import NOTE, PROBLEM, Finding, judged

LEAST_MEMORY = 2 << 30  # bytes: PyTorch, a small model and its batches


class Limit(NamedTuple):
    """A limit of the system: its number, the least that clipfast needs, what ``ulimit`` calls it, and what for."""

    name: str
    number: int
    least: int
    flag: str
    purpose: str


LIMITS = (
    Limit("open files", resource.RLIMIT_NOFILE, 1024, "-n", "each process holds many shards open"),
    Limit("processes", resource.RLIMIT_NPROC, 256, "-u", "data workers and threads count"),
    Limit("size of a file", resource.RLIMIT_FSIZE, 16 << 30, "-f", "a checkpoint of a large model has gigabytes"),
    Limit("locked memory", resource.RLIMIT_MEMLOCK, 0, "-l", "NCCL over InfiniBand needs it unlimited"),
)


def processors(root: Path = ROOT) -> Iterator[Finding]:
    """Look at the processors that this process may use, and who else does."""
    usable, quota, there = cores(), core_quota(root), os.cpu_count() or 1
    yield Finding("name", processor(root))
    yield Finding("cores", f"{usable} of {there}" if usable < there else str(usable))
    if quota is not None:
        fix = f"a cgroup allows no more: use at most {max(int(quota), 1)} --workers"
        yield judged("quota", f"time of {quota:g} cores", NOTE, fix, applies=quota < usable)
    load = os.getloadavg()[0]
    fix = "other programs run too: timings will not be honest, and training is slower"
    yield judged("load", f"{load:.1f} in the last minute", NOTE, fix, applies=load > min(usable, quota or usable))


def memory(root: Path = ROOT) -> Iterator[Finding]:
    """Look at memory, and at the part of it that processes share."""
    found = process_memory(root)
    if found is None:
        yield Finding("memory", "unknown", NOTE, "there is no /proc/meminfo to read")
    else:
        value = f"{scaled(found.available, BYTES)} of {scaled(found.total, BYTES)} available"
        fix = "end other programs, or raise the limit of the container"
        yield judged("memory", value, PROBLEM, fix, applies=found.available < LEAST_MEMORY)
        if found.limit is not None and found.limit < found.total:
            value = f"a cgroup allows {scaled(found.limit, BYTES)}"
            yield Finding("limit", value, NOTE, "beyond it the system kills processes: mind --workers and --batch-size")
    yield _shared_memory()


def _shared_memory() -> Finding:
    from ..data import PREFETCH
    from ..models import get_model_config
    from ..training import TrainConfig
    from ..training.preflight import pair_bytes

    name = "shared memory"
    if not SHARED_MEMORY.is_dir():
        return Finding(
            name, f"there is no {SHARED_MEMORY}", PROBLEM, f"mount -t tmpfs tmpfs {SHARED_MEMORY}, or use --workers 0"
        )
    config = get_model_config(TrainConfig.model)
    batch = TrainConfig.batch_size * pair_bytes(config.vision.image_size, config.text.context_length)
    needed = PREFETCH * TrainConfig.workers * batch
    free = free_bytes(SHARED_MEMORY)
    value = f"{scaled(free, BYTES)} free in {SHARED_MEMORY}; a run with default options takes {scaled(needed, BYTES)}"
    fix = "make it larger (docker run --shm-size=8g), or use --workers 0"
    return judged(name, value, PROBLEM, fix, applies=free < needed)


def limits() -> Iterator[Finding]:
    """Look at the limits of this process."""
    for name, number, least, flag, purpose in LIMITS:
        soft, hard = resource.getrlimit(number)
        shown = " of ".join(_amount(name, value) for value in ((soft,) if soft == hard else (soft, hard)))
        if name == "locked memory":
            yield judged(name, shown, NOTE, purpose, applies=soft != resource.RLIM_INFINITY)
            continue
        is_low = soft != resource.RLIM_INFINITY and soft < least
        unit = 1024 if name == "size of a file" else 1  # in which the shell counts
        yield judged(name, shown, PROBLEM, f"ulimit {flag} {least // unit}: {purpose}", applies=is_low)


def _amount(name: str, value: int) -> str:
    if value == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{value:,}" if name in ("open files", "processes") else scaled(value, BYTES)

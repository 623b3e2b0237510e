"""The conditions of a measurement: machine, versions, commit, clocks, temperature, and the machine's measured rates."""

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from clipfast import __version__
from clipfast.host import gpu_state, proc_bytes, processor
from clipfast.verify.context import exact_float32

# Packages whose versions every result names, installed or not.
PACKAGES = (
    "torch", "triton", "numpy", "open_clip_torch", "memeff", "cut-cross-entropy", "liger-kernel",
    "siglip-kernel", "flash-attn",
)  # fmt: skip


SUSTAINED_S = 10.0


def versions() -> dict[str, str | None]:
    """Return for a benchmark result the versions of Python, this package and :data:`PACKAGES`; None if not
    installed.
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "clipfast": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def use(device: torch.device) -> torch.device:
    """Make ``device`` current for a benchmark, and return it with its index, which memory statistics need."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def busy(load: float, cores: int) -> str:
    """Return a note that other programs disturb a benchmark, if the load average is above a quarter of the cores."""
    if load <= cores / 4:
        return ""
    return f"the load average was {load:.1f} on {cores} cores: times and intervals mean little if others go on working"


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a benchmark finds free on the GPU, or available in the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return proc_bytes("meminfo", "MemAvailable")


def describe(device: torch.device) -> dict[str, Any]:
    """Return those properties of the machine that a timing depends on."""
    machine: dict[str, Any] = {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "arch": f"sm_{properties.major}{properties.minor}"}
        machine |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        machine["cuda"] = torch.version.cuda
    machine["cache_bytes"] = cache_bytes(device)
    return machine


def card(device: torch.device) -> str:
    """Return a folder name for the machine whose benchmarks are stored, such as ``nvidia-h100-80gb-hbm3``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory; a benchmark's sets of inputs must be larger."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 * 2**20)


def _cpu_name() -> str:
    """Return the processor's name and its number of cores, as results of benchmarks name a CPU."""
    return f"{processor()}, {os.cpu_count()} cores"


@exact_float32()
def measure_roofs(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the bytes per second of a large copy (read and written) and the FLOP/s of a large matrix product.

    This machine reaches these rates as it is now, so they are a fair limit for a kernel; those of a data sheet are not.
    """
    side, copied = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    # the factors are random numbers: zeros draw less power and run faster than data does
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return {
        "copy_bytes_per_s": 2 * copied / _shortest_s(lambda: target.copy_(source), device),
        "matmul_flops_per_s": 2 * side**3 / _shortest_s(lambda: torch.mm(a, b, out=out), device),
    }


@exact_float32()
def sustained_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of large matrix products in the last of ten seconds without a pause.

    The best of a few products (:func:`measure_roofs`) is computed by a cool GPU; training has the clocks of a warm one.
    """
    side, start, taken = 8192 if device.type == "cuda" else 1024, time.monotonic(), []
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def several() -> None:
        """Multiply a few times, so that the GPU does not wait for the host in between."""
        for _ in range(8):
            torch.mm(a, b, out=out)

    while (now := time.monotonic() - start) < SUSTAINED_S:
        taken.append((now, elapsed(several, device)))
    late = [spent for begun, spent in taken if begun >= SUSTAINED_S - 1] or [taken[-1][1]]
    return 8 * 2 * side**3 * len(late) / sum(late)


def _shortest_s(run: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of ``run`` in seconds over eight rounds, for the measured rates of the machine."""
    # The first runs create handles and workspaces, and raise the clocks.
    for _ in range(3):
        run()
    return min(elapsed(run, device) for _ in range(8))


def elapsed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``run`` takes: by CUDA events on a GPU, by the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def cpu_seconds() -> float:
    """Return the CPU time of the benchmark's process, and of the processes that it started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread for a benchmark, as in a data worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU before a benchmark reads the time. On a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def telemetry(device: torch.device) -> dict[str, Any]:
    """Read clocks, power, temperature and reasons for throttling from NVML, or ``{"available": False, "why": ...}``."""
    if device.type != "cuda":
        return {"available": False, "why": "no GPU"}
    try:
        return {"available": True, **gpu_state(device)}
    except ImportError:
        why = "nvidia-ml-py is not installed"
    except Exception as error:
        # A driver may lack NVML, or a sandbox may hide it. The measurement is useful without it.
        why = f"{type(error).__name__}: {error}"
    return {"available": False, "why": why}

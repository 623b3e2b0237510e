"""Facts about this machine: processors, memory and disks that this process may use, and GPUs through NVIDIA's NVML.

The functions read Linux's files below ``root``. Other systems lack these files: there, memory is None ("unknown").
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # functions import PyTorch where they use it, as the import takes longer than all other work here
    import torch

ROOT = Path("/")
SHARED_MEMORY = Path("/dev/shm")
UNLIMITED = 1 << 60  # bytes; a larger limit means none, because version 1 of cgroups writes "no limit" as almost 2**63
# Reasons for low clocks that make a GPU slower than usual, by their bits (nvml.h, nvmlClocksEventReasons). The power
# cap is not among them, since it is normal under load.
THROTTLES = {0x08: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}


def proc_bytes(file: str, name: str, root: Path = ROOT) -> int:
    """Return the value of the field ``name`` in a file of /proc, such as /proc/meminfo, in bytes.

    Raises:
        RuntimeError: the file has no such field.
    """
    found = re.search(rf"^{name}:\s+(\d+) kB", (root / "proc" / file).read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/{file} has no {name}")
    return 1024 * int(found[1])


def available_memory(root: Path = ROOT) -> int | None:
    """Return the bytes of memory that are available to this process on the machine and in its cgroups.

    Cached files count as available, because the system drops them when memory is short.
    """
    try:
        available = proc_bytes("meminfo", "MemAvailable", root)
    except (OSError, RuntimeError):
        return None
    for folder, is_v2 in _cgroups("memory", root):
        limit = _number(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
        if limit is not None and limit < UNLIMITED:
            available = min(available, max(limit - (used or 0) + _cached(folder, is_v2), 0))
    return available


def _cached(folder: Path, is_v2: bool) -> int:
    """Return the bytes of file caches in a cgroup, which count as used but are dropped when memory is short."""
    prefix = "" if is_v2 else "total_"
    with contextlib.suppress(OSError):
        text = (folder / "memory.stat").read_text()
        return sum(int(n) for n in re.findall(rf"^{prefix}(?:in)?active_file (\d+)", text, re.MULTILINE))
    return 0


def cores() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the cgroups that limit this process, and whether they are of version 2.

    The parents of the process's own cgroup limit it too. In a container, the root of the tree in /sys is its own
    cgroup, and /proc may give the path that this cgroup has outside of the container.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            is_v2 = number == "0" and not controllers
            if not is_v2 and controller not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("" if is_v2 else controller)
            own = top / path.lstrip("/")
            yield from ((folder, is_v2) for folder in (own, *own.parents) if folder.is_relative_to(top))


def _number(path: Path) -> int | None:
    """Return the number in a file of a cgroup, such as its memory limit; None if the file holds "max" or is missing."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def processor(root: Path = ROOT) -> str:
    """Return the model name of this machine's processor."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", (root / "proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.machine()


def free_bytes(path: Path) -> int:
    """Return the free disk space in bytes for ``path``, which need not exist yet."""
    return shutil.disk_usage(nearest(path)).free


def nearest(path: Path) -> Path:
    """Return the path itself if this machine's file system has it, else the nearest existing folder above it."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def nvml_card(device: "torch.device") -> tuple[Any, Any]:
    """Return the NVML module, for facts about a GPU that CUDA does not offer, and its handle of ``device``.

    Raises:
        ImportError: nvidia-ml-py is missing.
        pynvml.NVMLError: the driver has no NVML, or does not show the GPU.
    """
    import pynvml
    import torch

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def gpu_state(device: "torch.device") -> dict[str, Any]:
    """Return the clocks, the power and the temperature of a GPU, and NVML's reasons for lower clocks.

    Raises:
        ImportError: nvidia-ml-py is missing.
        pynvml.NVMLError: the driver does not give these values.
    """
    nvml, card = nvml_card(device)
    reasons = int(nvml.nvmlDeviceGetCurrentClocksEventReasons(card))
    return {
        "sm_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
        "memory_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM),
        "power_w": nvml.nvmlDeviceGetPowerUsage(card) / 1000,
        "temperature_c": nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
        "reasons": reasons,
        "throttled": any(reasons & bit for bit in THROTTLES),
    }


def throttles(reasons: int) -> list[str]:
    """Return the names of the limits that make a GPU slower than usual, from NVML's bits of clock event reasons."""
    return [name for bit, name in THROTTLES.items() if reasons & bit]


def commit(folder: Path | None = None) -> dict[str, Any]:
    """Return the commit of the checkout that clipfast lies in, and whether its files have changed since.

    In a copy without git history, the environment variable ``CLIPFAST_COMMIT`` names the commit.
    """
    # The path of the package is resolved, because the package may be a link to the checkout.
    folder = folder or Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        """Return the output of a git command in the checkout, or None if it fails."""
        try:
            run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return run.stdout.strip()

    sha, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"sha": sha or os.environ.get("CLIPFAST_COMMIT"), "dirty": bool(changed) if sha else None}

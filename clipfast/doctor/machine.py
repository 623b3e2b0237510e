"""The checks of ``clipfast doctor`` on a machine: packages, GPUs, processors, memory, folders, and a default run.

Each check imports the packages that it needs in its function, so that a missing package is reported and raises no
error.
"""

import dataclasses
import functools
import importlib.metadata
import os
import platform
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..host import ROOT, available_memory, cores, free_bytes, nearest, proc_bytes, processor
from ..io.units import BYTES, scaled

if TYPE_CHECKING:
    import torch

OK, NOTE, PROBLEM = "ok", "note", "problem"
INTERPRET = "TRITON_INTERPRET"
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME", "HF_HUB_OFFLINE")
PREFIXES = ("CLIPFAST_", "NCCL_", "TRITON_", "TORCH_")
OURS = ("CLIPFAST_CACHE", "CLIPFAST_CACHE_BYTES", "CLIPFAST_DISABLE", "CLIPFAST_COMMIT")
# Extras of clipfast: if one of their packages is missing, the report has a note and not a problem.
EXTRAS = ("data", "eval", "probe", "search", "train", "bench", "hub", "siglip", "ray", "app")
DRIVER = Path("proc/driver/nvidia/version")  # exists if NVIDIA's driver is loaded; relative to the root folder
OLDEST = (8, 0)  # the lowest compute capability for which the kernels are checked
LEAST_FREE = 1 << 30  # bytes that the cache and the folder of runs must have free
LIMITS = {  # maps a name to a limit of this process, its flag of ``ulimit``, and the least value that clipfast needs
    "open files": (resource.RLIMIT_NOFILE, "-n", 1024),
    "processes": (resource.RLIMIT_NPROC, "-u", 256),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report of ``clipfast doctor``.

    Attributes:
        name: the package, device, folder, limit or variable that was checked.
        value: its value on this machine.
        status: "ok", "note" (worth knowing) or "problem" (clipfast does not work, or not as it should).
        fix: the advice for a note or a problem.
    """

    name: str
    value: str
    status: str = OK
    fix: str = ""


def judged(name: str, value: str, status: str, fix: str, *, applies: bool) -> Finding:
    """Return a finding of ``clipfast doctor`` with this status and fix if the problem ``applies``, otherwise "ok"."""
    return Finding(name, value, status, fix) if applies else Finding(name, value)


def looks(logs: Path) -> dict[str, Callable[[], Iterable[Finding]]]:
    """Return the checks of ``clipfast doctor`` by their titles; ``logs`` is the folder that holds the runs."""
    return {
        "software": packages, "GPUs": gpus, "processors and memory": host,
        "folders": functools.partial(folders, logs), "environment": variables,
        "a run with default options": functools.partial(default_run, logs),
    }  # fmt: skip


def packages() -> Iterator[Finding]:
    """Report for ``clipfast doctor`` the versions of clipfast, Python, CUDA and required packages."""
    yield Finding("clipfast", __version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.platform()}")
    pattern = r"""([\w.-]+)(?:.*extra\s*==\s*['"](\w+))?"""
    seen: set[str] = set()
    for line in importlib.metadata.requires("clipfast") or ():
        found = re.match(pattern, line)
        if found is None or found[2] not in (None, *EXTRAS) or found[1] in seen:
            continue
        package, extra = found.groups()
        seen.add(package)
        try:
            yield Finding(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            wanted = f"clipfast[{extra}]" if extra else line.partition(";")[0]
            yield Finding(package, "not installed", NOTE if extra else PROBLEM, f"pip install '{wanted}'")
    import torch

    yield Finding("CUDA", torch.version.cuda or torch.version.hip or "none: PyTorch is built for CPUs")


def gpus(root: Path = ROOT) -> Iterator[Finding]:
    """Report for ``clipfast doctor`` each GPU and its free memory, and run a kernel on it; or why there is no GPU."""
    import torch

    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        capability = torch.cuda.get_device_capability(device)
        free, total = torch.cuda.mem_get_info(device)
        value = f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}, "
        value += f"{scaled(free, BYTES)} of {scaled(total, BYTES)} free"
        fix = "clipfast's kernels are checked for {}.{} and newer".format(*OLDEST)
        if torch.version.hip is not None:
            fix = "no GPU of AMD has run clipfast's kernels: begin with clipfast verify --quick"
        is_unchecked = capability < OLDEST or torch.version.hip is not None
        yield judged(str(device), value, NOTE, fix, applies=is_unchecked)
        yield try_kernel(device)
    if torch.cuda.device_count():
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not (root / DRIVER).exists():
        value = "none: there is no driver of NVIDIA, or CUDA_VISIBLE_DEVICES hides its GPUs"
        yield Finding("GPU", value, NOTE, "training runs on the CPU, which is slow but for small models")
        return
    fix = "install a PyTorch for CUDA: this one is built for CPUs (https://pytorch.org/get-started)"
    if torch.version.cuda:
        fix = f"nvidia-smi says whether the driver is new enough for CUDA {torch.version.cuda}"
    yield Finding("GPU", "NVIDIA's driver is there, and PyTorch sees no GPU", PROBLEM, fix)


def try_kernel(device: "torch.device") -> Finding:
    """Compile and run the bias-GELU kernel on a GPU, and compare its result with PyTorch's, for ``clipfast doctor``."""
    import torch

    from ..kernels import bias_gelu

    started = time.perf_counter()
    try:
        x, bias = torch.linspace(-4, 4, 4096, device=device).view(32, 128), torch.linspace(-1, 1, 128, device=device)
        ours, theirs = (bias_gelu(x, bias, backend=backend) for backend in ("triton", "torch"))
        error = (ours - theirs).abs().max().item()
    except Exception as failure:
        why = next(iter(str(failure).splitlines()), type(failure).__name__)
        fix = "Triton needs a C compiler and the headers of Python (apt install gcc python3-dev)"
        return Finding("  Triton", f"cannot run a kernel: {why}", PROBLEM, fix)
    value = f"compiled and ran a kernel in {time.perf_counter() - started:.1f} s, off by {error:.0e}"
    fix = "the kernel is wrong here: run clipfast verify --op bias_gelu, and report it"
    return judged("  Triton", value, PROBLEM, fix, applies=not error < 1e-5)


def host() -> Iterator[Finding]:
    """Report processors, memory and the limits of a process (``ulimit``), for ``clipfast doctor``."""
    yield Finding("cores", f"{cores()} of {os.cpu_count()}, {processor()}")
    available = available_memory()
    if available is not None:
        value = f"{scaled(available, BYTES)} available of {scaled(proc_bytes('meminfo', 'MemTotal'), BYTES)}"
        yield Finding("memory", value)
    for name, (number, flag, least) in LIMITS.items():
        soft, _ = resource.getrlimit(number)
        is_unlimited = soft == resource.RLIM_INFINITY
        value = "unlimited" if is_unlimited else f"{soft:,}"
        yield judged(name, value, PROBLEM, f"ulimit {flag} {least}", applies=not is_unlimited and soft < least)


def folders(logs: Path) -> Iterator[Finding]:
    """Check for ``clipfast doctor`` that the cache and the folder of runs can be written and have space."""
    from ..data.index import cache_folder

    for name, folder, other in (("cache", cache_folder(), "CLIPFAST_CACHE"), ("runs", logs, "--logs")):
        there, fix = nearest(folder), f"make room there, make it writable, or give another folder to {other}"
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            yield Finding(name, f"{folder} cannot be written: {error.strerror}", PROBLEM, fix)
            continue
        free = free_bytes(there)
        yield judged(name, f"{folder} has {scaled(free, BYTES)} free", PROBLEM, fix, applies=free < LEAST_FREE)


def variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Report for ``clipfast doctor`` the environment variables that change clipfast, PyTorch, NCCL or Triton."""
    known = {name: value for name, value in environment.items() if name in VARIABLES or name.startswith(PREFIXES)}
    if not known:
        yield Finding("none", "no variable that changes clipfast, PyTorch, NCCL or Triton is set")
    for name, value in sorted(known.items()):
        if name == INTERPRET and value not in ("", "0"):
            fix = f"unset {name}: it interprets kernels on the CPU, for tests"
            yield Finding(name, repr(value), PROBLEM, fix)
        else:
            unknown = name.startswith("CLIPFAST_") and name not in OURS
            fix = f"clipfast reads no such variable; it reads {', '.join(OURS)}"
            yield judged(name, repr(value), NOTE, fix, applies=unknown)


def default_run(logs: Path) -> Iterator[Finding]:
    """Check for ``clipfast doctor`` whether ``clipfast train`` with default options on synthetic pairs could start."""
    from ..runs.folder import RunFolder
    from ..train.preflight import preflight
    from ..train.train_config import TrainConfig

    config = TrainConfig(train_data="synthetic:65536", logs=str(logs))
    try:
        yield Finding("before it starts", str(preflight(config, RunFolder(logs / "doctor"), {})))
    except ValueError as error:
        yield Finding("before it starts", str(error), PROBLEM, "follow this message: a run refuses to start otherwise")


def looked(look: Callable[[], Iterable[Finding]], *, traceback: bool = False) -> list[Finding]:
    """Run a check of ``clipfast doctor``, return its findings; an exception becomes one too unless ``traceback``."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except ImportError as error:
        fix = "pip install 'clipfast[data,eval]' installs all that training needs"
        found.append(Finding("missing", f"the rest needs {error.name}, which is not there", PROBLEM, fix))
    except Exception as error:  # an error in one check must not hide the others
        if traceback:
            raise
        found.append(Finding("failed", f"{type(error).__name__}: {error}", PROBLEM, "see clipfast doctor --traceback"))
    return found

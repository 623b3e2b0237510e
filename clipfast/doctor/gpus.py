"""The GPUs that PyTorch sees, what their driver says of them, and whether Triton's kernels run there."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..host import ROOT, nvml_card
from ..units import BYTES, scaled
from .findings import NOTE, PROBLEM, Finding, judged

if TYPE_CHECKING:
    import torch

DRIVER = Path("proc/driver/nvidia/version")  # of NVIDIA; below the root
OLDEST = (8, 0)  # compute capability that the kernels are checked for
BUSY = 0.9  # of the memory: if less is free, somebody else uses the GPU


def gpus(root: Path = ROOT) -> Iterator[Finding]:
    """Look at every GPU."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from _gpu(torch.device("cuda", number))
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not (root / DRIVER).exists():
        why = "CUDA_VISIBLE_DEVICES hides them" if hidden else "there is no driver of NVIDIA"
        yield Finding("GPU", f"none: {why}", NOTE, "training runs on the CPU, which is slow but for small models")
        return
    builds = "https://pytorch.org/get-started: this PyTorch is built for CPUs, install one for CUDA"
    driver = f"nvidia-smi says whether the driver is new enough for CUDA {torch.version.cuda}, and the GPU there"
    why = "NVIDIA's driver is there, and PyTorch sees no GPU"
    yield Finding("GPU", why, PROBLEM, driver if torch.version.cuda else builds)


def _gpu(device: "torch.device") -> Iterator[Finding]:
    import torch

    name, capability = str(device), torch.cuda.get_device_capability(device)
    value = f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}"
    fix = "clipfast's kernels are checked for {}.{} and newer".format(*OLDEST)
    yield judged(name, value, NOTE, fix, applies=capability < OLDEST)
    free, total = torch.cuda.mem_get_info(device)
    value = f"{scaled(free, BYTES)} of {scaled(total, BYTES)} free"
    yield judged("  memory", value, NOTE, "nvidia-smi names who uses the rest", applies=free < BUSY * total)
    yield from _driver(device)
    yield _kernel(device)


def _driver(device: "torch.device") -> Iterator[Finding]:
    """Look at what NVML says of a GPU; a driver need not know all of it."""
    try:
        nvml, card = nvml_card(device)
    except ImportError:
        yield Finding("  driver", "unknown: it needs nvidia-ml-py", NOTE, "pip install 'clipfast[bench]'")
        return
    except Exception as error:
        yield Finding("  driver", "unknown", NOTE, f"NVML does not tell: {error}")
        return
    looks: tuple[Callable[[Any, Any], Finding], ...] = (_version, _power, _persistence, _errors)
    for look in looks:
        with contextlib.suppress(nvml.NVMLError):
            yield look(nvml, card)


def _version(nvml: Any, _: Any) -> Finding:
    return Finding("  driver", str(nvml.nvmlSystemGetDriverVersion()))


def _power(nvml: Any, card: Any) -> Finding:
    limit, usual = nvml.nvmlDeviceGetEnforcedPowerLimit(card), nvml.nvmlDeviceGetPowerManagementDefaultLimit(card)
    value = f"limited to {limit / 1000:g} W, by default {usual / 1000:g} W"
    return judged("  power", value, NOTE, f"nvidia-smi -pl {usual // 1000} takes the limit away", applies=limit < usual)


def _persistence(nvml: Any, card: Any) -> Finding:
    is_on = bool(nvml.nvmlDeviceGetPersistenceMode(card))
    fix = "nvidia-smi -pm 1: otherwise the driver starts anew for each process, which takes seconds"
    return judged("  persistence", "on" if is_on else "off", NOTE, fix, applies=not is_on)


def _errors(nvml: Any, card: Any) -> Finding:
    if not nvml.nvmlDeviceGetEccMode(card)[0]:
        return Finding("  ECC", "off", NOTE, "nvidia-smi -e 1: otherwise wrong bits in memory go unseen")
    wrong = nvml.nvmlDeviceGetTotalEccErrors(
        card, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    )  # fmt: skip
    value = f"on, {wrong} errors that it could not correct since the driver started"
    return judged("  ECC", value, PROBLEM, "reset the GPU (nvidia-smi -r) or have it replaced", applies=wrong > 0)


def _kernel(device: "torch.device") -> Finding:
    """Compile and run a small kernel of clipfast's on a GPU, and compare with PyTorch."""
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

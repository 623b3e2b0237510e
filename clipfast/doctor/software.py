"""Versions of packages, and environment variables."""

import dataclasses
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .. import __version__
from ..host import cores
from .findings import NOTE, PROBLEM, Finding, judged

# What the packages of each extra are for; those of other extras only concern work on clipfast itself.
EXTRAS = {
    "data": "reads pairs",
    "eval": "draws the pictures of a run",
    "train": "writes TensorBoard's files",
    "bench": "keeps and compares timings of kernels",
    "hub": "downloads published weights",
    "siglip": "tokenizes texts for SigLIP",
}
# These packages do something else than the rest of their extra.
PACKAGES = {"nvidia-ml-py": "tells power, clocks and errors of GPUs", "tqdm": "shows progress"}
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME", "HF_HUB_OFFLINE")
PREFIXES = ("CLIPFAST_", "NCCL_", "TRITON_", "TORCH_")
OURS = ("CLIPFAST_CACHE", "CLIPFAST_CACHE_BYTES", "CLIPFAST_DISABLE", "CLIPFAST_COMMIT")


class Requirement(NamedTuple):
    """A package that clipfast uses: its name, the oldest version that will do, and the extra that installs it."""

    package: str
    least: str
    extra: str


def requirements() -> list[Requirement]:
    """Return what the installed clipfast says that it needs; those of no extra are always needed."""
    pattern = r"""([\w.-]+)(?:\[.*?\])?\s*(?:[>=]=\s*([\d.]+))?[^;]*(?:;.*extra\s*==\s*['"](\w+)['"])?"""
    found = [re.match(pattern, line) for line in importlib.metadata.requires("clipfast") or ()]
    return [Requirement(one[1], one[2] or "", one[3] or "") for one in found if one]


def versions() -> Iterator[Finding]:
    """Look at clipfast, Python, the packages that are always needed, and the libraries in PyTorch."""
    yield Finding("clipfast", __version__)
    system = platform.system()
    yield judged("system", platform.platform(), PROBLEM, "clipfast runs on Linux", applies=system != "Linux")
    yield _version("Python", platform.python_version(), _oldest_python(), "install a newer Python")
    for package, least, extra in requirements():
        if not extra:
            yield _version(package, installed(package), least, f"pip install '{package}>={least}'")
    import torch

    if torch.version.hip:
        yield Finding("ROCm", str(torch.version.hip), NOTE, "clipfast's kernels were never run on it")
        return
    yield Finding("CUDA", torch.version.cuda or "none: PyTorch is built for CPUs")
    if torch.version.cuda:
        yield Finding("cuDNN", str(torch.backends.cudnn.version()))
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
        yield Finding("NCCL", ".".join(map(str, nccl)) or "none")


def _oldest_python() -> str:
    return str(importlib.metadata.metadata("clipfast")["Requires-Python"] or "").lstrip(">= ")


def _version(name: str, found: str | None, least: str, fix: str) -> Finding:
    if found is None:
        return Finding(name, "not installed", PROBLEM, fix)
    too_old = f"{found}, and clipfast needs {least} or newer"
    return Finding(name, too_old, PROBLEM, fix) if is_older(found, least) else Finding(name, found)


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_older(version: str, least: str) -> bool:
    """Return True if a version comes before another, by the numbers that they begin with."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])]

    return numbers(version) < numbers(least)


def packages() -> Iterator[Finding]:
    """Look at the packages that only some of clipfast needs."""
    wanted = {one.package: one for one in requirements() if one.extra in EXTRAS}  # some are in two extras
    for package, least, extra in wanted.values():
        purpose, fix = PACKAGES.get(package, EXTRAS[extra]), f"pip install 'clipfast[{extra}]'"
        if installed(package) is None:
            yield Finding(package, f"not installed; it {purpose}", NOTE, fix)
        else:
            found = _version(package, installed(package), least, fix)
            yield dataclasses.replace(found, value=f"{found.value}; it {purpose}")


def variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at the environment variables that change what clipfast or its libraries do."""
    named = [name for name in sorted(environment) if name in VARIABLES or name.startswith(PREFIXES)]
    if not named:
        yield Finding("none", "no variable is set that matters")
    for name in named:
        yield _variable(name, environment[name])


def _variable(name: str, value: str) -> Finding:
    shown = repr(value)
    if name == "TRITON_INTERPRET" and value not in ("", "0"):
        return Finding(name, shown, PROBLEM, f"unset {name}: it interprets kernels on the CPU, for tests")
    if name == "CLIPFAST_CACHE_BYTES":
        fix = f"give a number of bytes: {name}=68719476736, or unset it"
        return judged(name, shown, PROBLEM, fix, applies=not value.isdecimal())
    if name == "OMP_NUM_THREADS":
        most = cores()
        fix = f"at most {most}: more threads than cores are slower"
        return judged(name, shown, NOTE, fix, applies=not value.isdecimal() or not 0 < int(value) <= most)
    if name == "CUDA_VISIBLE_DEVICES":
        return judged(name, shown, NOTE, f"unset {name} to use GPUs", applies=value in ("", "-1"))
    if name == "CLIPFAST_DISABLE":
        return judged(name, shown, NOTE, "clipfast.run leaves these parts out", applies=bool(value))
    unknown = name.startswith("CLIPFAST_") and name not in OURS
    return judged(name, shown, NOTE, f"clipfast reads no such variable; it reads {', '.join(OURS)}", applies=unknown)

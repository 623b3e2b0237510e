"""The origin of the kernels of the validation: files of public repositories at one commit, and packages.

None of them is part of this repository. The files lie in one folder, each under its repository, commit and path;
:func:`how_to_fetch` says how to get them. The packages are installed in folders of their own, one for each version,
because a figure belongs to the version that was measured.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton

from clipfast.verify.stand_in import stand_in_gpu

from . import FOLDER


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a public repository with a kernel of the validation."""

    repository: str
    commit: str
    path: str
    sha256: str

    @property
    def url(self) -> str:
        """Return the address from which a validated kernel's source is downloaded."""
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.path}"

    @property
    def place(self) -> Path:
        """Return the path of a validated kernel's source in the folder of sources."""
        return Path(self.repository, self.commit, self.path)


# The names of Gluon's functions changed: one version of the tutorials is for Triton 3.6 to 3.8, another from 3.9 on.
FILES = {name: File(*row) for name, row in json.loads((FOLDER / "figures.json").read_text())["files"].items()}
# Packages in the versions that the figures were measured with.
PACKAGES = ("liger-kernel", "0.6.0"), ("liger-kernel", "0.8.0"), ("liger-kernel", "0.8.1"), ("siglip-kernel", "0.1.2")


class Missing(Exception):  # noqa: N818  (it is reported, and not a failure)
    """The error for a file or a package that the folder of sources lacks, or has in another version than the pinned
    one.
    """


def how_to_fetch(folder: Path) -> list[str]:
    """Return the shell commands that fill the folder of validated kernels' sources."""
    lines = [f"curl -fsSL --create-dirs -o {folder / file.place} {file.url}" for file in FILES.values()]
    for package, version in PACKAGES:
        target = folder / f"{package}-{version}"
        lines.append(f"pip install --no-deps --target {target} {package}=={version}")
    return lines


def module(folder: Path, name: str) -> ModuleType:
    """Return the module of a file in :data:`FILES`, as it is upstream.

    Raises:
        Missing: the file is missing, or differs from the pinned one.
    """
    return _module(folder.resolve(), name)


@functools.cache
def _module(folder: Path, name: str) -> ModuleType:
    """Import an upstream file from the folder of sources."""
    file = FILES[name]
    path = folder / file.place
    if not path.is_file():
        raise Missing(f"{path} is missing: get it from {file.url}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != file.sha256:
        raise Missing(f"{path} is not the pinned file: its SHA-256 is {found}, not {file.sha256}")
    for other in FILES.values():  # files of the same folder import each other
        if other.place.parent == file.place.parent and not (folder / other.place).is_file():
            raise Missing(f"{folder / other.place} is missing: get it from {other.url}")
    inside = path.stem if path.stem[0] != "_" else f"{path.parent.name}.{path.stem}"
    spec = importlib.util.spec_from_file_location(inside, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    if "." in inside:
        package_of = types.ModuleType(path.parent.name)
        package_of.__path__ = [str(path.parent)]
        sys.modules[path.parent.name] = package_of
    neighbours = mock.patch.object(sys, "path", [str(path.parent), *sys.path])  # tutorials import each other
    no_library = mock.patch.object(torch.cuda, "is_available", return_value=False)  # tutorials load cuBLAS if True
    with stand_in_gpu(), no_library, neighbours, _standing_in():
        spec.loader.exec_module(loaded)
    _bind_old_names()
    return loaded


def gluon(folder: Path, name: str) -> ModuleType:
    """Return the Gluon tutorial for the Triton that is installed."""
    new = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    return module(folder, f"gluon {name}" if new else f"gluon {name} 3.6")


@contextlib.contextmanager
def package(folder: Path, name: str, version: str) -> Iterator[Callable[[str], Any]]:
    """Yield a function that imports modules of a package from the folder of sources while the context is open.

    Raises:
        Missing: the package is not installed there.
    """
    path = folder.resolve() / f"{name}-{version}"
    if not path.is_dir():
        raise Missing(f"{path} is missing: pip install --no-deps --target {path} {name}=={version}")
    first = name.replace("-", "_")
    with mock.patch.object(sys, "path", [str(path), *sys.path]):
        try:
            yield importlib.import_module
        finally:
            for loaded in [one for one in sys.modules if one.split(".")[0] == first]:
                del sys.modules[loaded]


@triton.constexpr_function
def _capability_at_least(major: int, minor: int = 0) -> bool:
    """Answer for an H100 whether its compute capability is at least the given one."""
    return (major, minor) <= (9, 0)


@contextlib.contextmanager
def _standing_in() -> Iterator[None]:
    """Let the modules of :func:`_stand_ins` be imported while the context is open."""
    modules = _stand_ins()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _stand_ins() -> dict[str, ModuleType]:
    """Return stand-ins for the modules that the files import from their own projects, which ask about the GPU."""
    answers: dict[str, dict[str, Any]] = {
        "tritonbench.utils.env_utils": {"is_cuda": lambda: True},
        "triton_kernels.target_info": {"cuda_capability_geq": _capability_at_least},
        "verl.utils.device": {
            "get_device_capability": lambda: (9, 0), "get_device_name": lambda: "cpu", "is_cuda_available": True,
            "get_torch_device": lambda: None,
        },
    }  # fmt: skip
    modules: dict[str, ModuleType] = {}
    for name, values in answers.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            modules.setdefault(parent, types.ModuleType(parent))
        vars(modules[name]).update(values)
    return modules


def _bind_old_names() -> None:
    """Define the old name of a Gluon function that the tutorials use, if Triton has removed it."""
    from triton.experimental.gluon.language.nvidia.hopper import tma

    if hasattr(tma, "async_store"):
        tma.async_copy_shared_to_global = tma.async_store

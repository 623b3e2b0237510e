"""The kernels as a package for Hugging Face's kernels hub: ``python -m clipfast.bench.hub FOLDER``.

The folder gets a project for kernel-builder (``build.toml``, ``flake.nix``, ``torch-ext/``, ``CARD.md``,
``benchmarks/``) and the builds that kernel-builder would make of it (``build/torch-cpu``, ``-cuda``, ``-rocm``), which
the package ``kernels`` loads as they are. A build is the folder kernels/ with an ``__init__.py`` of its own, and with a
namespace for its ops that is named after the content of all files. So several builds run in one process, and beside an
installed clipfast.
"""

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

import clipfast.kernels
from clipfast.kernels.hardware import AMD, ARCHITECTURES, target_name

NAME = "clipfast"
VERSION = 0  # by the convention of the hub, the version of kernels that are not yet recommended for production
SOURCE = Path(clipfast.kernels.__file__).parent
FILES = Path(__file__).with_name("hub_files")
# The architectures that the metadata of each backend's build names; None if it names none.
BACKENDS = {
    "cpu": None,
    "cuda": [f"{arch / 10:.1f}" for arch in sorted(ARCHITECTURES)],
    "rocm": [target_name(arch) for arch in AMD],
}
FLAKE = """{
  description = "Triton kernels for CLIP";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
OPS = '''"""The namespace of PyTorch in which this build registers its ops."""

import torch

ops = getattr(torch.ops, "{id}")


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the name of an op with its namespace, as ``torch.library`` takes it."""
    return f"{id}::{{op_name}}"
'''


def lay_out(folder: Path, repo: str) -> list[Path]:
    """Write the package for the hub into ``folder``, and return its builds; an earlier package there is replaced.

    Args:
        folder: the folder; it is created.
        repo: the repository on the hub that it is meant for, ORG/NAME.

    Raises:
        ValueError: ``folder`` holds something else, or ``repo`` is no name of a repository.
    """
    if repo.count("/") != 1:
        raise ValueError(f"a repository of the hub is ORG/NAME, got {repo!r}")
    config = folder / "build.toml"
    is_ours = config.exists() and f'name = "{NAME}"' in config.read_text()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not is_ours:
        raise ValueError(f"{folder} is not empty, and holds no earlier package: give a folder of its own")
    for part in ("build", "torch-ext", "benchmarks"):
        shutil.rmtree(folder / part, ignore_errors=True)
    project = folder / "torch-ext" / NAME
    _copy_kernels(project)
    unique = hashlib.sha256(json.dumps(_digests(project)).encode()).hexdigest()[:7]
    names = ", ".join(f"`{name}`" for name in clipfast.kernels.__all__ if name != "reference")
    card = (FILES / "CARD.md").read_text().replace("REPO", repo).replace("FUNCTIONS", names)
    (folder / "CARD.md").write_text(card)
    config.write_text(_build_toml(repo))
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "benchmarks").mkdir()
    shutil.copy(FILES / "benchmark.py", folder / "benchmarks" / "benchmark.py")
    return [_build(folder, project, backend, f"_{NAME}_{backend}_{unique}") for backend in BACKENDS]


def _copy_kernels(project: Path) -> None:
    """Copy the folder kernels/ with its tables, without the namespace of clipfast's ops, which a build replaces."""
    shutil.copytree(SOURCE, project, ignore=shutil.ignore_patterns("__pycache__", "_ops.py"))
    imports: dict[str, list[str]] = {}
    for name in clipfast.kernels.__all__:
        module = getattr(getattr(clipfast.kernels, name), "__module__", "clipfast.kernels")  # modules lack __module__
        imports.setdefault(module.removeprefix("clipfast.kernels"), []).append(name)
    imports[""].append("hub_layers as layers")
    imports[".hub_layers"] = ["flash_attn_forward", "supports_flash_attn"]
    lines = ['"""Triton kernels for CLIP, with gradients, a path for CPUs and a reference in PyTorch."""', ""]
    lines += [f"from {module or '.'} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    public = sorted(name.split()[-1] for names in imports.values() for name in names)
    lines += ["", "__all__ = [", *(f'    "{name}",' for name in public), "]"]
    (project / "__init__.py").write_text("\n".join(lines) + "\n")


def _build_toml(repo: str) -> str:
    """Return the text of build.toml, from which kernel-builder makes the builds of the package for the hub."""
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "MIT"
backends = [{backends}]

[general.hub]
repo-id = "{repo}"

[torch-noarch]
pyext = ["py", "json"]
cuda_capabilities = {json.dumps(BACKENDS["cuda"])}
rocm_archs = {json.dumps(BACKENDS["rocm"])}
"""


def _build(folder: Path, project: Path, backend: str, unique: str) -> Path:
    """Write the build of a backend, whose ops and module are named ``unique``, and return its folder."""
    build = folder / "build" / f"torch-{backend}"
    shutil.copytree(project, build)
    (build / "_ops.py").write_text(OPS.format(id=unique))
    archs = BACKENDS[backend]
    metadata = {
        "name": NAME, "id": unique, "version": VERSION, "license": "MIT", "python-depends": [],
        "backend": {"type": backend} | ({} if archs is None else {"archs": archs}),
        "digest": {"algorithm": "sha256", "files": _digests(build)},
    }  # fmt: skip
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return build


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in ``folder``, in base64, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def main() -> int:
    """Write the package for the kernels hub to the folder of the command line, and print its builds."""
    parser = argparse.ArgumentParser("python -m clipfast.bench.hub", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder for the package")
    parser.add_argument("--repo", default="ORG/clipfast", help="its repository on the hub (default: ORG/clipfast)")
    args = parser.parse_args()
    try:
        builds = lay_out(args.folder, args.repo)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(map(str, builds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

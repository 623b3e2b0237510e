"""kernels <- clipfast <- bench <- tests: nothing imports upward, and importing touches no GPU."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each layer may import of this project; the command line may reach up, inside a subcommand.
ALLOWED = {"kernels": {"clipfast.kernels"}, "clipfast": {"clipfast"}, "bench": {"clipfast", "clipfast.bench"}}
FORBIDDEN = {"kernels": "clipfast", "clipfast": "clipfast.bench", "bench": "tests"}


def imports(source: str, package: str) -> list[str]:
    """Absolute names of the modules that ``source``, a module of ``package``, imports at module level."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            found.append(".".join([*parts, *([node.module] if node.module else [])]))
    return found


def violations(layer: str, source: str, package: str) -> list[str]:
    """Imports of ``source`` that its layer must not have."""
    upward = FORBIDDEN[layer]
    found = [name for name in imports(source, package) if name == upward or name.startswith(upward + ".")]
    return [
        name
        for name in found
        if not any(name == ok or name.startswith(ok + ".") for ok in ALLOWED[layer])
        or name.startswith("clipfast.bench")
    ]


def modules(layer: str) -> list[Path]:
    """Source files of a layer."""
    return sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", ALLOWED)
def test_nothing_imports_upward(layer):
    base = "clipfast" if layer == "clipfast" else f"clipfast.{layer}"
    assert modules(layer)
    for path in modules(layer):
        package = ".".join([base, *path.relative_to(ROOT / layer).parent.parts])
        wrong = violations(layer, path.read_text(), package)
        if layer == "bench":
            wrong = [name for name in wrong if not name.startswith("clipfast.bench")]
        assert wrong == [], f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize(
    ("layer", "source", "package", "name"),
    [
        ("kernels", "from clipfast.models import CLIP", "clipfast.kernels", "clipfast.models"),
        ("kernels", "from ..models import CLIP", "clipfast.kernels", "clipfast.models"),
        ("clipfast", "import clipfast.bench.offline", "clipfast", "clipfast.bench.offline"),
        ("bench", "from tests import numerics", "clipfast.bench", "tests"),
    ],
)
def test_planted_violation_is_seen(layer, source, package, name):
    assert violations(layer, source, package) == [name]


def test_import_touches_no_gpu_and_no_heavy_library():
    code = """
import sys, torch
def refuse(*args, **kwargs): raise AssertionError("importing asked for the GPU")
torch.cuda._lazy_init = torch.cuda.get_device_capability = torch.cuda.get_device_properties = refuse
import clipfast, clipfast.kernels, clipfast.bench.offline, clipfast.cli, clipfast.training.config
heavy = {"torchvision", "webdataset", "matplotlib", "open_clip"} & set(sys.modules)
assert not heavy, f"importing clipfast imports {heavy}"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

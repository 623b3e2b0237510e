"""kernels <- clipfast <- bench <- tests: nothing imports upward, and importing touches no GPU."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the lowest layer up: the folder, and the name that its modules are imported by.
LAYERS = {"kernels": "clipfast.kernels", "clipfast": "clipfast", "bench": "clipfast.bench", "tests": "tests"}


def layer_of(module: str) -> int | None:
    """Number of the layer that ``module`` is in; None for anybody else's."""
    for folder in ("kernels", "bench", "tests", "clipfast"):
        if module == LAYERS[folder] or module.startswith(LAYERS[folder] + "."):
            return list(LAYERS).index(folder)
    return None


def imports(source: str, package: str, *, lazily: bool) -> set[str]:
    """Absolute names of the modules that ``source``, in ``package``, imports; in functions too, unless ``lazily``."""
    tree = ast.parse(source)
    found: set[str] = set()
    for node in tree.body if lazily else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            # what is imported from a package may be a module of it
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def violations(layer: str, source: str, package: str, *, lazily: bool = False) -> set[str]:
    """Imports of ``source`` from a layer above its own."""
    own = list(LAYERS).index(layer)
    return {name for name in imports(source, package, lazily=lazily) if (layer_of(name) or 0) > own}


@pytest.mark.parametrize("layer", ["kernels", "clipfast", "bench"])
def test_nothing_imports_upward(layer):
    paths = sorted((ROOT / layer).rglob("*.py"))
    assert paths
    for path in paths:
        package = ".".join([LAYERS[layer], *path.relative_to(ROOT / layer).parent.parts])
        # the command line may reach up, inside a subcommand
        wrong = violations(layer, path.read_text(), package, lazily=path.name == "cli.py")
        assert wrong == set(), f"{path.relative_to(ROOT)} imports {wrong}"


def test_every_package_is_installed():
    # an editable install would find the others as well
    folders = [path.parent for layer in LAYERS for path in (ROOT / layer).rglob("__init__.py") if layer != "tests"]
    layers = {folder: folder.relative_to(ROOT).parts[0] for folder in folders}
    expected = {".".join([LAYERS[top], *folder.relative_to(ROOT / top).parts]) for folder, top in layers.items()}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted(expected)


@pytest.mark.parametrize(
    ("layer", "source", "package"),
    [
        ("kernels", "from clipfast.models import CLIP", "clipfast.kernels"),
        ("kernels", "from ..models import CLIP", "clipfast.kernels"),
        ("kernels", "def f():\n    from clipfast.models import CLIP", "clipfast.kernels"),
        ("kernels", "try:\n    import clipfast.tokenizer\nexcept ImportError:\n    pass", "clipfast.kernels"),
        ("kernels", "import tests.numerics", "clipfast.kernels"),
        ("clipfast", "import clipfast.bench.inspection.offline", "clipfast"),
        ("clipfast", "from clipfast import bench", "clipfast"),
        ("clipfast", "from . import bench", "clipfast"),
        ("clipfast", "from .. import bench", "clipfast.models"),
        ("bench", "from tests import numerics", "clipfast.bench"),
    ],
)
def test_planted_violation_is_seen(layer, source, package):
    assert violations(layer, source, package)


def test_what_is_allowed_is_not_a_violation():
    assert not violations("clipfast", "from .kernels import attention\nfrom ..models import CLIP", "clipfast.training")
    assert not violations("bench", "from clipfast import create_model\nfrom .offline import record", "clipfast.bench")
    assert not violations("clipfast", "def f():\n    from .bench import offline", "clipfast", lazily=True)


def test_import_touches_no_gpu_and_no_heavy_library():
    code = """
import sys, torch
def refuse(*args, **kwargs): raise AssertionError("importing asked for the GPU")
torch.cuda._lazy_init = torch.cuda.get_device_capability = torch.cuda.get_device_properties = refuse
import clipfast, clipfast.kernels, clipfast.bench.inspection.offline, clipfast.cli, clipfast.training.config
heavy = {"torchvision", "webdataset", "matplotlib", "open_clip"} & set(sys.modules)
assert not heavy, f"importing clipfast imports {heavy}"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

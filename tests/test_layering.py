"""kernels <- clipfast <- bench <- tests: nothing imports upward, and nothing is imported before it is needed."""

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from clipfast import api

ROOT = Path(__file__).parent.parent
# What pyproject.toml's extras install, what only some tests compare with, and what a machine that was made for PyTorch
# and Triton lacks.
OPTIONAL = [
    "accelerate", "braceexpand", "faiss", "ftfy", "gradio", "hypothesis", "jsonschema", "matplotlib", "open_clip",
    "open_clip_train", "peft", "pyarrow", "pynvml", "ray", "safetensors", "selenium", "sklearn", "tensorboard", "timm",
    "tokenizers", "torchvision", "tqdm", "transformers", "ttsem", "wandb", "wcwidth", "webdataset", "yaml",
]  # fmt: skip
# From the lowest layer up: the folder, and the name that its modules are imported by.
LAYERS = {"kernels": "clipfast.kernels", "clipfast": "clipfast", "bench": "clipfast.bench", "tests": "tests"}


def layer_of(module: str) -> int:
    """Number of the layer that ``module`` is in; -1 for anybody else's."""
    names = [name for name in LAYERS.values() if f"{module}.".startswith(f"{name}.")]
    return list(LAYERS.values()).index(max(names, key=len)) if names else -1


def imports(source: str, package: str) -> set[str]:
    """Absolute names of the modules that ``source``, in ``package``, imports; in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # what is imported from a package may be a module of it
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def violations(layer: str, source: str, package: str) -> set[str]:
    """Imports of ``source`` from a layer above its own."""
    own = list(LAYERS).index(layer)
    return {name for name in imports(source, package) if layer_of(name) > own}


@pytest.mark.parametrize("layer", ["kernels", "clipfast", "bench"])
def test_nothing_imports_upward(layer):
    paths = sorted((ROOT / layer).rglob("*.py"))
    assert paths
    for path in paths:
        package = ".".join([LAYERS[layer], *path.relative_to(ROOT / layer).parent.parts])
        wrong = violations(layer, path.read_text(), package)
        assert wrong == set(), f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_ops_are_registered_once():
    # transformers looks for a package "kernels", which the folder of that name in a checkout's root is not
    program = (
        "import sys; sys.path.insert(0, '.'); import torch, clipfast; x = torch.ones(1, 2, 24); clipfast.attention;"
        "import kernels; assert not hasattr(kernels, 'attention') and 'kernels.attention' not in sys.modules;"
        "clipfast.attention(x, num_heads=1)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_every_folder_is_installed():
    # An editable install would find packages that are not listed as well, and setuptools warns of unlisted data.
    elsewhere = {"__pycache__", "results", "gates", "ci"}
    expected = {
        ".".join([LAYERS[layer], *path.relative_to(ROOT / layer).parent.parts])
        for layer in ("kernels", "clipfast", "bench")
        for path in (ROOT / layer).rglob("*")
        if path.is_file() and not elsewhere & set(path.relative_to(ROOT).parts)
    }
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
        ("clipfast", "def f():\n    from .bench import offline", "clipfast"),
        ("bench", "from tests import numerics", "clipfast.bench"),
    ],
)
def test_planted_violation_is_seen(layer, source, package):
    assert violations(layer, source, package)


def test_what_is_allowed_is_not_a_violation():
    assert not violations("clipfast", "from .kernels import attention\nfrom ..models import CLIP", "clipfast.training")
    assert not violations("bench", "from clipfast import create_model\nfrom .offline import record", "clipfast.bench")


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, in the checkout."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **options)


ALONE = {
    "public names are imported when one is asked for, without the GPU and without heavy libraries": """
import sys, clipfast
assert "torch" not in sys.modules
import torch
def refuse(*args, **kwargs): raise AssertionError("importing asked for the GPU")
torch.cuda._lazy_init = torch.cuda.get_device_capability = torch.cuda.get_device_properties = refuse
assert not hasattr(clipfast, "no_such_name")
import clipfast.api
assert sorted(clipfast.api.__all__) == clipfast.__all__
assert set(clipfast.__all__) <= set(dir(clipfast))
assert "torch._dynamo" not in sys.modules, "importing clipfast imports PyTorch's compiler"
import clipfast.routes, clipfast.bench.inspection.offline, clipfast.cli, clipfast.training.config
assert callable(clipfast.report_kernels) and clipfast.kernels.attention is clipfast.attention
from clipfast import *
assert [name for name in clipfast.__all__ if globals()[name] is not getattr(clipfast.api, name)] == []
heavy = {"torchvision", "matplotlib", "open_clip", "timm"} & set(sys.modules)
assert not heavy, f"importing clipfast imports {heavy}"
absent = {"PIL", "ftfy", "regex", "safetensors"} & set(sys.modules)
assert not absent, f"importing clipfast imports {absent}, which a machine made for PyTorch and Triton may lack"
""",
    "a loss needs the kernels and nothing else": """
import sys, clipfast
assert callable(clipfast.contrastive_loss)
ours = {name for name in sys.modules if name.startswith("clipfast.")}
others = {name for name in ours if name.split(".")[1] != "kernels"}
assert not others, others
""",
    "names of version 0.1 still work, and name the present ones": """
import warnings, clipfast
for old, new in ("report", "report_kernels"), ("revert", "revert_model"), ("convert", "convert_checkpoint"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert getattr(clipfast, old) is getattr(clipfast, new)
    (warning,) = [each for each in caught if each.category is DeprecationWarning]
    assert f"clipfast.{new}" in str(warning.message)
    assert warning.filename == "<string>"
""",
    # That is what makes help fast: importing PyTorch alone takes longer than a user wants to wait.
    "help needs no heavy library": """
import sys
from clipfast.cli import main
for arguments in ["--help"], ["train", "--help"], ["eval", "zeroshot", "--help"], ["plan", "--help"]:
    try:
        main(arguments)
    except SystemExit as exit_:
        assert exit_.code == 0
    unwanted = {"torch", "triton", "PIL", "numpy", "clipfast.kernels", "clipfast.bench", "clipfast.api"}
    assert not unwanted & set(sys.modules), (arguments, unwanted & set(sys.modules))
""",
}


@pytest.mark.parametrize("code", ALONE.values(), ids=ALONE)
def test_in_a_process_of_its_own(code):
    run = python("-c", code)
    assert run.returncode == 0, run.stderr


def test_no_public_name_is_that_of_a_module():
    # importing the module would hide the name
    modules = {path.stem for path in (ROOT / "clipfast").iterdir()}
    assert not modules & (set(api.__all__) - {"kernels"})


def test_a_checkout_that_is_not_installed_says_so():
    # -S: without the site-packages, where the installation is
    run = python("-S", "-c", "import clipfast")
    assert run.returncode == 1
    expected = "ImportError: clipfast is not installed: run pip install -e . in the checkout"
    assert run.stderr.splitlines()[-1] == expected


def test_tests_can_be_collected_without_optional_packages():
    code = f"""
import sys, pytest
for name in {OPTIONAL}:
    sys.modules[name] = None
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"]))
"""
    run = python("-c", code, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert run.returncode == 0, run.stdout[-3000:]

"""Test the order of imports: of the layers (kernels <- clipfast <- bench <- tests), and of the rooms in clipfast."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from clipfast import api

ROOT = Path(__file__).parent.parent
# Packages that pyproject.toml's extras install, that only some tests compare with, or that a machine made for PyTorch
# and Triton lacks.
OPTIONAL = [
    "accelerate", "braceexpand", "faiss", "ftfy", "gradio", "hypothesis", "jsonschema", "matplotlib", "open_clip",
    "open_clip_train", "peft", "pyarrow", "pynvml", "ray", "safetensors", "selenium", "sklearn", "tensorboard", "timm",
    "tokenizers", "torchvision", "tqdm", "transformers", "ttsem", "wandb", "wcwidth", "webdataset", "yaml",
]  # fmt: skip
# The name under which the modules of each folder are imported.
LAYERS = {"kernels": "clipfast.kernels", "clipfast": "clipfast", "bench": "clipfast.bench"}
# A room, which is a package of clipfast, imports only rooms that stand before it in this list. The public names (api)
# and the command that runs OpenCLIP's programs with clipfast (run) stand before the command line (cli), which may
# import all of clipfast.
ROOMS = [
    "kernels", "io", "host", "losses", "models", "distributed", "data", "checkpoints", "factory", "adopt", "runs",
    "evaluate", "search", "train", "verify", "plan", "doctor", "api", "__init__", "run", "cli", "__main__", "bench",
    "tests",
]  # fmt: skip
# The first room of each pair does not import the second one either, although the second one stands before it.
BESIDE = [("train", "search"), ("verify", "search"), ("plan", "search")]
# The table of clipfast's commands may name those of bench, whose modules are imported only when a command is called.
TABLE = ("clipfast.cli.main", "bench")


def room_of(module: str) -> str | None:
    """Return the room (a package of clipfast, or tests) that ``module`` is in; None for another project's module."""
    top, _, rest = module.partition(".")
    return (rest.partition(".")[0] or "__init__") if top == "clipfast" else "tests" if top == "tests" else None


def imported(source: str, package: str) -> set[str]:
    """Return the absolute names of the modules that ``source``, the text of a module in ``package``, imports.

    Imports inside functions count, and so do strings that are the name of a module of clipfast.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # A name that is imported from a package may be one of its modules. __version__ is none, and every room may
            # import it.
            found |= {f"{module}.{alias.name}" for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^(clipfast(?:\.\w+)+)(?::\w+)?$", node.value))
    return found


def violations(module: str, source: str, package: str) -> set[str]:
    """Return the modules that ``source``, the text of ``module``, imports although its room may not."""
    own = room_of(module)
    wrong = set()
    for name in imported(source, package):
        room = room_of(name)
        late = room in ROOMS and ROOMS.index(room) > ROOMS.index(own)
        if (late and (module, room) != TABLE) or (own, room) in BESIDE:
            wrong.add(name)
    if own not in ("cli", "bench") and "argparse" in imported(source, package):
        wrong.add("argparse")
    return wrong


def modules():
    """Yield path, name and package of every module that clipfast installs."""
    for folder, name in LAYERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "gates" in path.parts:  # this folder holds tests, which are not installed
                continue
            package = ".".join([name, *path.relative_to(ROOT / folder).parent.parts])
            yield path, package if path.stem == "__init__" else f"{package}.{path.stem}", package


def test_nothing_imports_upward():
    wrong = {name: found for path, name, package in modules() if (found := violations(name, path.read_text(), package))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("clipfast.kernels.launch", "from ..models import CLIP"),
        ("clipfast.kernels.launch", "def f():\n    from clipfast.models import CLIP"),
        ("clipfast.losses.clip_loss", "try:\n    import clipfast.data.order\nexcept ImportError:\n    pass"),
        ("clipfast.evaluate.watch", "from ..train.reports import TensorBoard"),
        ("clipfast.train.trainer", "from ..search import embed"),
        ("clipfast.train.trainer", "import argparse"),
        ("clipfast.evaluate.suite", "from ..cli.arguments import COUNT"),
        ("clipfast.models.clip", "from .. import bench"),
        ("clipfast.models.clip", 'NAME = "clipfast.bench.inspection.offline"'),
        ("clipfast.cli.status", 'NAME = "clipfast.bench.inspection.offline:main"'),
        ("clipfast.io.files", "import tests.numerics"),
    ],
)
def test_a_planted_import_is_seen(module, source):
    assert violations(module, source, module.rpartition(".")[0])


def test_a_file_name_means_one_thing():
    # Every op's folder has files of these names, and a command has the name of the module that it runs.
    alike = {"__init__", "__main__", "op", "kernels", "launches", "cpu", "spec", "tiles"}
    names = Counter(path.stem for path, module, _ in modules() if room_of(module) not in ("cli", "bench"))
    assert {name for name, count in names.items() if count > 1} - alike == set()


def test_every_folder_is_installed():
    # In an editable install, packages that pyproject.toml does not list can be imported too, so other tests do not see
    # that one is missing there. Folders of data are listed as well, since setuptools warns of those that are not.
    elsewhere = {"__pycache__", "results", "gates", "ci"}
    expected = {
        ".".join([LAYERS[layer], *path.relative_to(ROOT / layer).parent.parts])
        for layer in ("kernels", "clipfast", "bench")
        for path in (ROOT / layer).rglob("*")
        if path.is_file() and not elsewhere & set(path.relative_to(ROOT).parts)
    }
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted(expected)


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, in the checkout."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **options)


ALONE = {
    "public names are imported when one is asked for, without the GPU and without heavy libraries": """
import sys, warnings, clipfast
assert "torch" not in sys.modules
import torch
def refuse(*args, **kwargs): raise AssertionError("importing asked for the GPU")
torch.cuda._lazy_init = torch.cuda.get_device_capability = torch.cuda.get_device_properties = refuse
assert not hasattr(clipfast, "no_such_name")
import clipfast.api
assert sorted(clipfast.api.__all__) == clipfast.__all__
assert set(clipfast.__all__) <= set(dir(clipfast))
assert "torch._dynamo" not in sys.modules, "importing clipfast imports PyTorch's compiler"
import clipfast.adopt.routes, clipfast.bench.inspection.offline, clipfast.cli.main, clipfast.train.train_config
assert callable(clipfast.report_kernels) and clipfast.kernels.attention is clipfast.attention
from clipfast import *
assert [name for name in clipfast.__all__ if globals()[name] is not getattr(clipfast.api, name)] == []
unwanted = {"torchvision", "matplotlib", "open_clip", "timm", "PIL", "ftfy", "regex", "safetensors"} & set(sys.modules)
assert not unwanted, f"importing clipfast imports {unwanted}"
# names of version 0.1 still work, and name the present ones
for old, new in ("report", "report_kernels"), ("revert", "revert_model"), ("convert", "convert_checkpoint"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert getattr(clipfast, old) is getattr(clipfast, new)
    (warning,) = [each for each in caught if each.category is DeprecationWarning]
    assert f"clipfast.{new}" in str(warning.message)
    assert warning.filename == "<string>"
""",
    # Importing PyTorch alone takes longer than a user wants to wait for help.
    "help needs no heavy library, and a loss the kernels and nothing else of ours": """
import sys
from clipfast.cli.main import main
for arguments in ["--help"], ["train", "--help"], ["eval", "zeroshot", "--help"], ["plan", "--help"]:
    try:
        main(arguments)
    except SystemExit as exit_:
        assert exit_.code == 0
    unwanted = {"torch", "triton", "PIL", "numpy", "clipfast.kernels", "clipfast.bench", "clipfast.api"}
    assert not unwanted & set(sys.modules), (arguments, unwanted & set(sys.modules))
before = set(sys.modules)
import clipfast
assert callable(clipfast.contrastive_loss)
others = {name for name in set(sys.modules) - before if name.startswith("clipfast.") and name[9:16] != "kernels"}
assert not others, others
# transformers looks for a package "kernels", which the folder of that name in a checkout's root is not
sys.path.insert(0, ".")
import torch, kernels
assert not hasattr(kernels, "attention") and "kernels.attention" not in sys.modules
clipfast.attention(torch.ones(1, 2, 24), num_heads=1)
""",
}


@pytest.mark.parametrize("code", ALONE.values(), ids=ALONE)
def test_in_a_process_of_its_own(code):
    run = python("-c", code)
    assert run.returncode == 0, run.stderr


def test_no_public_name_is_that_of_a_module():
    # Importing a module of clipfast sets an attribute of the package, which would hide a public name of the same name.
    modules = {path.stem for path in (ROOT / "clipfast").iterdir()}
    assert not modules & (set(api.__all__) - {"kernels"})


def test_a_checkout_that_is_not_installed_says_so():
    # -S hides the site-packages, where clipfast is installed
    run = python("-S", "-c", "import clipfast")
    assert run.returncode == 1
    expected = "ImportError: clipfast is not installed: run pip install -e . in the checkout"
    assert run.stderr.splitlines()[-1] == expected


def test_tests_can_be_collected_without_optional_packages():
    code = f"""
import sys, pytest
for name in {OPTIONAL}:
    sys.modules[name] = None
sys.exit(pytest.main(["--collect-only", "--assert=plain", "-q", "-p", "no:cacheprovider", "tests"]))
"""
    run = python("-c", code, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert run.returncode == 0, run.stdout[-3000:]

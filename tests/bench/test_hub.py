"""Test the package of kernels for the Hugging Face hub: plain Python loads it from its folder, and so does the package
``kernels`` if it is installed.
"""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest

from clipfast.bench import hub

PLAIN = """
import importlib.util, json
def get_local_kernel(folder):
    build = folder / "build" / "torch-cpu"
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
BY_KERNELS = """
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping
from kernels import replace_kernel_forward_from_hub
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
for folder in FOLDERS:
    Build.open(folder)
    build = folder / "build" / "torch-cpu"
    assert not list(build.rglob("__pycache__"))
    Metadata.read_from_file(build / "metadata.json").digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
"""
CHECKS = """
builds = [get_local_kernel(folder) for folder in FOLDERS]
assert builds[0].__name__ != builds[1].__name__
image, text, x = (F.normalize(torch.randn(70, 48), dim=-1).requires_grad_() for _ in range(3))
calls = (
    lambda lib: lib.contrastive_loss(image, text, torch.tensor(14.3)),
    lambda lib: lib.attention(x.view(2, 35, 48), 2, causal=True),
    lambda lib: lib.layer_norm(x, text[0], image[0]),
)
for call in calls:
    results = []
    for lib in (clipfast, *builds):
        result = call(lib)
        results.append((result, *torch.autograd.grad(result.sum(), (image, text, x), allow_unused=True)))
    for found in results[1:]:
        for a, b in zip(found, results[0]):
            assert a is b is None or torch.equal(a, b)
for build in builds:
    schema = getattr(torch.ops, build.__name__).layer_norm_fwd.default._schema
    assert schema.name == build.__name__ + "::layer_norm_fwd", schema
q, k, v = torch.randn(3, 2, 4, 9, 16)
for mask, causal in ((None, True), (None, False), (torch.ones(9, 9, dtype=torch.bool).tril(), None)):
    ours, _ = builds[0].flash_attn_forward(torch.nn.Identity(), q, k, v, mask, is_causal=causal)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=bool(causal))
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
"""
LAYERS = """
layer = torch.nn.LayerNorm
replace_kernel_forward_from_hub(layer, "LayerNorm")
model = torch.nn.Sequential(torch.nn.LayerNorm(48))
expected = model(x)
mapping = {"LayerNorm": {"cpu": LocalLayerRepository(repo_path=FOLDERS[0], layer_name="LayerNorm")}}
with use_kernel_mapping(mapping, inherit_mapping=False):
    model = kernelize(model, mode=Mode.TRAINING, device="cpu", use_fallback=False)
assert "hub_layers" in model[0].forward.__func__.__module__
torch.testing.assert_close(model(x), expected)
"""


def is_installed(package):
    """Return whether a package is installed; the folder kernels/ of a checkout is none."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


without_kernels = pytest.mark.skipif(not is_installed("kernels"), reason="the package kernels is not installed")


@pytest.mark.long
@pytest.mark.parametrize("loader", ["plain", pytest.param("kernels", marks=without_kernels)])
def test_two_builds_side_by_side_give_what_clipfast_gives(loader, tmp_path, monkeypatch):
    folders = tmp_path / "first", tmp_path / "second"
    hub.lay_out(folders[0], "org/clip")
    changed = tmp_path / "kernels"
    shutil.copytree(hub.SOURCE, changed, ignore=shutil.ignore_patterns("__pycache__"))
    (changed / "tuned" / "sm_86.json").write_text("{}")
    monkeypatch.setattr(hub, "SOURCE", changed)
    hub.lay_out(folders[1], "org/clip")
    code = f"import sys; from pathlib import Path; FOLDERS = {[*map(str, folders)]}; FOLDERS = [*map(Path, FOLDERS)]\n"
    code += "import torch, torch.nn.functional as F, clipfast\n"
    code += PLAIN + CHECKS if loader == "plain" else BY_KERNELS + CHECKS + LAYERS
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_package_is_laid_out_as_the_hub_asks(tmp_path):
    builds = hub.lay_out(tmp_path / "package", "org/clip")
    assert [build.name for build in builds] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    for build in builds:
        metadata = json.loads((build / "metadata.json").read_text())
        assert metadata["digest"]["files"].keys() == {
            path.relative_to(build).as_posix() for path in build.rglob("*.*") if path.name != "metadata.json"
        }
        assert "tuned/sm_90.json" in metadata["digest"]["files"]
        for path in build.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert {name.split(".")[0] for name in names} <= {"torch", "triton", *sys.stdlib_module_names}, path
    card = (tmp_path / "package" / "CARD.md").read_text()
    assert 'get_kernel("org/clip", version=0' in card
    assert "`contrastive_loss`" in card
    assert (tmp_path / "package" / "benchmarks" / "benchmark.py").exists()
    hub.lay_out(tmp_path / "package", "org/clip")  # an earlier package is replaced


@pytest.mark.parametrize(("repo", "message"), [("clip", "ORG/NAME"), ("org/clip", "holds no earlier package")])
def test_refused(repo, message, tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(ValueError, match=message):
        hub.lay_out(tmp_path, repo)
    with pytest.raises(ValueError, match=message):
        hub.lay_out(tmp_path / "precious", repo)
    assert (tmp_path / "precious").exists()

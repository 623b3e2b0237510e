"""Test the launches of every op through Triton's own launcher on the stub driver, which runs no kernel.

The stub replaces the driver of its process, so each test starts a new process. Shipped shapes are launched with the
kernels that ``test_offline.py`` compiles, and odd shapes with kernels without a body; ``--slow`` launches all of them.
``launches.json`` holds the numbers of launches and PyTorch ops; ``--update-resources`` writes it again.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast.bench.stub import build, counts
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import record_launches
from clipfast.kernels.spec import specs

from .test_offline import CASES, is_quick

needs_gcc = pytest.mark.skipif(
    build.missing_tool() is not None, reason=f"{build.missing_tool()}; the launches of all ops go UNCHECKED"
)

SNAPSHOT = Path(__file__).with_name("launches.json")
# Architectures whose launches differ on the host: with and without tensor maps, and the entries of consumer GPUs.
TELLING = (80, 90, 120)


def run(*command):
    """Run a Python program that loads the stub driver, check that its exit code is 0 or 1, and return its output."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def walk(arch, cases, *options):
    """Launch ``cases`` of every op on the stub driver, check that there is no fault, and return the counts."""
    printed = run("-m", "clipfast.bench.stub", "--json", "--arch", str(arch), "--cases", cases, *options)
    found = json.loads(printed.splitlines()[-1])
    assert found["faults"] == []
    assert set(found["by_op"]) == {name for name, spec in specs().items() if cases != "shipped" or spec.shipped}
    return found


def shipped_launches(arch, dtypes):
    """Return the number of kernels that the shipped calls launch, from recorded launches."""
    with record_launches(arch, ARCHITECTURES[arch].multiprocessors) as launches:
        for name, case in CASES.items():
            if name.split()[-1] in dtypes:
                case()
        return len(launches)


def quick_dtypes(arch):
    """Return the dtypes for which ``test_offline.py`` compiles kernels in every run."""
    return [dtype for dtype in DTYPES if is_quick(arch, f"any {dtype}")]


@needs_gcc
@pytest.mark.parametrize(
    ("arch", "dtypes"),
    [
        *((arch, quick_dtypes(arch)) for arch in ARCHITECTURES if quick_dtypes(arch)),
        *(
            pytest.param(arch, list(DTYPES), marks=pytest.mark.slow)
            for arch in ARCHITECTURES
            if len(quick_dtypes(arch)) < len(DTYPES)
        ),
    ],
)
def test_shipped_calls(arch, dtypes):
    found = walk(arch, "shipped", "--dtype", *dtypes)
    assert found["launches"] == shipped_launches(arch, dtypes)
    assert (found["maps"] > 0) == ARCHITECTURES[arch].multiplies_from_shared


@needs_gcc
@pytest.mark.parametrize("arch", TELLING)
def test_odd_shapes_and_layouts(arch):
    assert walk(arch, "quick", "--dtype", "bf16" if arch == 90 else "fp32")["launches"] > 500


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_case_in_every_dtype(arch):
    assert walk(arch, "odd")["launches"] > 5000


@needs_gcc
def test_calls_that_a_cuda_graph_captures():
    assert walk(90, "captured")["launches"] > 100


def test_without_gcc_the_reason_names_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "gcc is not installed" in build.missing_tool()
    with pytest.raises(RuntimeError, match="gcc is not installed"):
        build.build()


@needs_gcc
def test_planted_faults_are_caught():
    assert run(str(Path(__file__).with_name("launcher_faults.py")), "90").splitlines()[-1] == "{} 21"


def test_launches_and_pytorch_ops(request):
    found = {name: dataclasses.asdict(count) for name, count in counts.counts().items()}
    if request.config.getoption("--update-resources"):
        lines = [f" {json.dumps(name)}: {json.dumps(count)}" for name, count in found.items()]
        SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert found == json.loads(SNAPSHOT.read_text()), "run with --update-resources and read the difference"

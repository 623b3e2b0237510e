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

from clipfast.bench.inspection.shipped import compiles_for, shipped_calls
from clipfast.bench.stub import build, counts
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import record_launches
from clipfast.kernels.spec import specs

needs_gcc = pytest.mark.skipif(
    build.missing_tool() is not None, reason=f"{build.missing_tool()}; the launches of all ops go UNCHECKED"
)

SNAPSHOT = Path(__file__).with_name("launches.json")
# The dtype and the kinds of cases that every run launches, by architecture: sm_80 has no tensor maps, sm_90 has them,
# and sm_120 has the tuned configurations of consumer GPUs.
QUICK = {80: ("bf16", ["shipped"]), 90: ("bf16", ["shipped", "quick", "captured"]), 120: ("fp32", ["quick"])}
LEAST = {"quick": 500, "odd": 5000, "captured": 100}


def run(*command):
    """Run a Python program that loads the stub driver, check that its exit code is 0 or 1, and return its output."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def shipped_launches(arch, dtypes):
    """Return the number of kernels that the shipped calls launch, from recorded launches."""
    with record_launches(arch, ARCHITECTURES[arch].multiprocessors) as launches:
        for name, case in shipped_calls().items():
            if name.split()[-1] in dtypes and compiles_for(name, arch):
                case()
        return len(launches)


def check(arch, kinds, dtypes):
    """Launch all cases of some kinds of every op on the stub driver; check that none is refused or left out."""
    options = ["--arch", str(arch), "--cases", *kinds, "--dtype", *dtypes]
    for line in run("-m", "clipfast.bench.stub", "--json", *options)[-len(kinds) :]:
        found = json.loads(line)
        kind = found["cases"]
        assert found["faults"] == []
        assert set(found["by_op"]) == {
            name for name, spec in specs().items() if kind != "shipped" or (spec.shipped and spec.compiles_for(arch))
        }
        if kind == "shipped":
            assert found["launches"] == shipped_launches(arch, dtypes)
            assert (found["maps"] > 0) == ARCHITECTURES[arch].multiplies_from_shared
        else:
            assert found["launches"] > LEAST[kind]


@needs_gcc
@pytest.mark.parametrize("arch", QUICK)
def test_no_launch_is_refused(arch):
    """On sm_90 the shipped kernels are compiled, which takes a minute or two if no test has compiled them before."""
    dtype, kinds = QUICK[arch]
    check(arch, kinds, [dtype])


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_launch_is_refused_in_any_case_and_dtype(arch):
    check(arch, ["shipped", "odd"], list(DTYPES))


def test_without_gcc_the_reason_names_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "gcc is not installed" in build.missing_tool()
    with pytest.raises(RuntimeError, match="gcc is not installed"):
        build.build()


@needs_gcc
def test_planted_faults_are_caught():
    assert run(str(Path(__file__).with_name("launcher_faults.py")), "90")[-1] == "{} 24"


def test_launches_and_pytorch_ops(request):
    found = {name: dataclasses.asdict(count) for name, count in counts.counts().items()}
    if request.config.getoption("--update-resources"):
        lines = [f" {json.dumps(name)}: {json.dumps(count)}" for name, count in found.items()]
        SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert found == json.loads(SNAPSHOT.read_text()), "run with --update-resources and read the difference"

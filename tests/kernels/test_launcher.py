"""Triton's own launcher on a stub of the CUDA driver: every op as a GPU would be asked for it, and nothing runs.

The stub takes over the driver of its process, so each test starts one. Shipped shapes are launched with the kernels
that ``test_offline.py`` compiles, and odd ones with kernels without a body; ``--slow`` launches all. A change of the
launches or of the PyTorch ops beside them shows up in ``launches.json``, which ``--update-resources`` rewrites.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipfast.bench.stub import build, host
from clipfast.bench.stub.gpu import gpu_environment
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import record_launches
from clipfast.kernels.spec import specs

from ..conftest import INTERPRET, ON_GPU
from .test_offline import CASES, is_quick

pytestmark = pytest.mark.skipif(
    INTERPRET or ON_GPU, reason="the stub driver stands in for a GPU, with compiled kernels"
)
needs_gcc = pytest.mark.skipif(
    build.missing_tool() is not None, reason=f"{build.missing_tool()}; the launches of all ops go UNCHECKED"
)

SNAPSHOT = Path(__file__).with_name("launches.json")
# Architectures whose launches differ on the host: with and without tensor maps, and the entries of consumer GPUs.
TELLING = (80, 90, 120)
FAULTS = {
    "misaligned_base": "the base is not aligned to 16 bytes",
    "box_over_256": "box dimension 1 is 257",
    "box_of_nothing": "box dimension 1 is 0",
    "inner_box_wider_than_swizzle": "the inner box of 256 bytes is wider than its swizzle of 128",
    "inner_box_of_no_whole_16_bytes": "the inner box of 24 bytes is no multiple of 16",
    "box_over_shared_memory": "a box of 262144 bytes, 232448 fit",
    "stride_below_row": "stride 1008 is below its row of 1024 bytes",
    "stride_of_zero": "stride 0 is below its row",
    "stride_of_no_whole_16_bytes": "stride 1032 must be a multiple of 16",
    "stride_of_2_to_40": "stride 1099511627776 must be a multiple of 16 below 2^40",
    "dimension_of_zero": "dimension 1 is 0",
    "map_past_its_tensor": "it reaches 896 bytes past its tensor",
    "grid_y_over_65535": "grid (1, 65536, 1), allowed (2147483647, 65535, 65535)",
    "threads_over_the_kernels": "256 threads per block, 128 allowed",
    "threads_over_1024": "2048 threads per block, 128 allowed",
    "shared_memory_without_the_attribute": "60000 bytes of shared memory, 49152 allowed",
    "shared_memory_over_the_limit": "300000 bytes of shared memory, 232448 allowed on sm_90",
    "registers_over_the_limit": "76800 registers for a block, 65536 exist",
    "pointer_of_a_cpu_tensor": "cannot be accessed from Triton (cpu tensor?)",
    "arguments_in_another_order": "x_ptr reached the driver as",
    "scalar_of_another_value": "N reached the driver as e7030000, expected e8030000",
    "compiled_for_more_alignment": "compiled for multiples of 16",
    "copy_from_the_host_in_capture": "a constant is copied from the host",
    "value_read_by_the_host_in_capture": "waits for the GPU while a graph is captured",
    "size_read_by_the_host_in_capture": "index.Tensor with a mask waits for the GPU",
    "op_that_reads_in_capture": "waits for the GPU while a graph is captured",
    "kernel_loaded_in_capture": "a kernel is loaded while a stream is captured",
    "allocation_in_capture": "cuMemAlloc while a stream is captured",
    "no_device_guard": "argument 0 is memory of device 1, the current is 0",
    "guard_that_does_not_return": "device 1 is current after a call, device 0 was before",
}


def run(*command):
    """Run a Python program that loads the stub driver; what it prints, after its exit code was 0 or 1."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def walk(arch, cases, *options):
    """Launch ``cases`` of every op; the figures of what was launched, without a fault."""
    printed = run("-m", "clipfast.bench.stub", "--json", "--arch", str(arch), "--cases", cases, *options)
    found = json.loads(printed.splitlines()[-1])
    assert found["faults"] == []
    assert set(found["by_op"]) == {name for name, spec in specs().items() if cases != "shipped" or spec.shipped}
    return found


def shipped_launches(arch, dtypes):
    """How many kernels the shipped calls launch, without the launcher."""
    with record_launches(arch, ARCHITECTURES[arch].multiprocessors) as launches:
        for name, case in CASES.items():
            if name.split()[-1] in dtypes:
                case()
        return len(launches)


def quick_dtypes(arch):
    """The dtypes in which ``test_offline.py`` compiles in every run."""
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


@pytest.fixture(scope="module")
def raised():
    """What each planted fault raises, by name."""
    return json.loads(run(str(Path(__file__).with_name("launcher_faults.py")), "90"))


def test_without_gcc_the_reason_names_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "gcc is not installed" in build.missing_tool()
    with pytest.raises(RuntimeError, match="gcc is not installed"):
        build.build()


@needs_gcc
def test_without_a_fault_nothing_is_raised(raised):
    assert raised.pop("nothing") is None
    assert set(raised) == set(FAULTS)


@needs_gcc
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(raised, fault):
    assert FAULTS[fault] in (raised[fault] or "nothing was raised")


@needs_gcc
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of PyTorch, whose guards are to be seen")
def test_second_gpu_of_a_cuda_build():
    environment = gpu_environment(devices=2)
    program = str(Path(__file__).with_name("launcher_second_gpu.py"))
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["calls"] > 40
    assert "memory of device 1, the current is 0" in found["without a guard"]


def test_launches_and_pytorch_ops(request):
    found = {name: dataclasses.asdict(count) for name, count in host.counts().items()}
    if request.config.getoption("--update-resources"):
        lines = [f" {json.dumps(name)}: {json.dumps(count)}" for name, count in found.items()]
        SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert found == json.loads(SNAPSHOT.read_text()), "run with --update-resources and read the difference"


@needs_gcc
@pytest.mark.slow
def test_host_times_are_printed():
    table = run("-m", "clipfast.bench.stub", "--host").splitlines()
    assert len(table) == 1 + sum(len(spec.small) for spec in specs().values())
    assert all(float(line.split()[-2]) > 0 for line in table[1:])

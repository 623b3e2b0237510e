"""Test the support of AMD's GPUs: every shipped call compiles for an MI300 (gfx942), and a fake MI300 is recognised.

The kernels have never run on an MI300. Every run compiles one case of each op; ``--slow`` compiles all cases.
"""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast import create_model, report_kernels
from clipfast.bench.inspection import offline
from clipfast.bench.inspection.shipped import compiles_for, shipped_cases
from clipfast.kernels import launch
from clipfast.kernels.configs import RowConfig
from clipfast.kernels.fp8.support import check_fp8
from clipfast.kernels.hardware import AMD, target_name

ARCH = 942
CASES = [case for case in shipped_cases() if compiles_for(case, ARCH)]
# The last case in bfloat16 of each op: the names of cases begin with those of their ops.
QUICK = {name.split()[0]: name for name in CASES if name.endswith("bf16")}.values()


@pytest.mark.skipif("amd" not in triton.backends.backends, reason="this Triton has no compiler for AMD")
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES])
def test_shipped_call_compiles_for_amd(case, capfd):
    for key, recorded in offline.named(offline.record(ARCH, shipped_cases()[case])).items():
        assert not {"maxnreg"} & set(recorded.options)
        assert not any(isinstance(arg, TensorDescriptor) for arg in recorded.args.values())
        kernel = offline.compile_kernel(recorded, ARCH)
        assert "inline_asm" not in kernel.asm["ttir"]
        found = offline.problems(
            offline.resources(kernel), ARCH, half=not case.endswith("fp32"), multiplies=offline.multiplies(kernel)
        )
        assert found == [], f"{case} {key}"
    assert capfd.readouterr().err == "", "the compiler writes no message"


@pytest.fixture
def amd(monkeypatch):
    """Return a function that puts a fake GPU of AMD, of this name and capability 9.4, in the place of GPU 0."""

    def install(name: str) -> torch.device:
        properties = SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-", multi_processor_count=304)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        launch._arch_of_gpu.cache_clear()
        return torch.device("cuda", 0)

    yield install
    launch._arch_of_gpu.cache_clear()


def test_an_mi300_has_its_own_tables_and_no_limit_of_registers(amd):
    device = amd("gfx942")
    assert launch.arch_of(device) == ARCH
    config = RowConfig(1, 1024, num_warps=4, num_stages=1, max_registers=64)
    assert "maxnreg" not in launch.Plan(None, (1,), config=config, device=device)._options
    model = create_model("ViT-T-8-32")
    assert report_kernels(model).startswith("on gfx942 with bfloat16")


def test_an_mi300_is_refused_for_fp8_without_a_capability_that_it_has_not(amd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "MI300X")
    with pytest.raises(ValueError, match="and MI300X is one of AMD: compute in 16 bits"):
        check_fp8("fp8_linear", amd("gfx942"))


def test_another_gpu_of_amd_is_refused_in_one_line(amd):
    device = amd("gfx90a")
    with pytest.raises(RuntimeError, match=r"^of AMD's GPUs, .* gfx942 only, not for gfx90a: use backend='torch'$"):
        launch.arch_of(device)


@pytest.mark.parametrize("arch", AMD)
def test_planted_excess_is_seen_on_amd(arch):
    good = offline.Resources(registers=128, spill_bytes=0, shared_bytes=65536, tmem_columns=0, mma="v_mfma")
    assert offline.problems(good, arch, half=False, multiplies=True) == []
    for change in ({"shared_bytes": 65537}, {"spill_bytes": 4}, {"mma": "xf32"}, {"mma": "none"}):
        bad = offline.Resources(**(vars(good) | change))
        assert len(offline.problems(bad, arch, half=True, multiplies=True)) == 1, target_name(arch)

"""Every shipped configuration, compiled for GPUs that are not there: nothing spills, limits hold, tensor cores are
used.

``resources.json`` holds what was compiled, by Triton version, so that a change shows up as a difference to be read:
``pytest tests/kernels/test_offline.py --update-resources`` rewrites it.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import triton

from clipfast.bench.inspection import offline
from clipfast.bench.inspection.shipped import known_problems, shipped_cases
from clipfast.kernels import attention, configs

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(
    INTERPRET or ON_GPU, reason="compiles from recorded CPU calls, which the interpreter would execute"
)

SNAPSHOT = Path(__file__).with_name("resources.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
CASES = shipped_cases()
ARCHS = (80, 90, 100)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES)
def test_resources(case, arch, request):
    compiled = {}
    for key, launch in offline.named(offline.record(arch, CASES[case])).items():
        kernel = offline.compile_kernel(launch, arch)
        resources = offline.resources(kernel)
        compiled[key] = dataclasses.asdict(resources)
        found = offline.problems(resources, arch, half=not case.endswith("fp32"), multiplies=offline.multiplies(kernel))
        known = known_problems(VERSION, arch, case)
        assert [problem for problem in found if problem not in known] == [], f"{case} {key} sm_{arch}"
    snapshot = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
    if request.config.getoption("--update-resources"):
        snapshot.setdefault(VERSION, {}).setdefault(f"sm_{arch}", {})[case] = compiled
        SNAPSHOT.write_text(json.dumps(snapshot, indent=1, sort_keys=True) + "\n")
        return
    if VERSION not in snapshot:
        pytest.skip(
            f"resources.json has no entry for Triton {VERSION}: run with --update-resources and read the difference"
        )
    assert compiled == snapshot[VERSION][f"sm_{arch}"][case], (
        "resources changed: run with --update-resources and read the difference"
    )


def test_snapshot_holds_nothing_else():
    for version, archs in json.loads(SNAPSHOT.read_text()).items():
        assert sorted(archs) == sorted(f"sm_{arch}" for arch in ARCHS), version
        for arch, cases in archs.items():
            assert sorted(cases) == sorted(CASES), f"{version} {arch}"


def test_planted_spill_is_seen_as_the_assembler_reports_it(capsys, tmp_path):
    # 128 x 128 fp32 scores in the registers of one warp cannot fit.
    too_large = configs.LoopedConfig(128, 128, num_warps=1, num_stages=1)
    with configs.override(configs.config_key("attention_looped_fwd", torch.bfloat16, 64), too_large):
        (launch,) = offline.record(80, lambda: attention(torch.empty(1, 256, 3 * 64, dtype=torch.bfloat16), 1))
    with triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = str(tmp_path)  # so that the assembler runs
        triton.knobs.nvidia.dump_ptxas_log = True
        resources = offline.resources(offline.compile_kernel(launch, 80))
    log = capsys.readouterr().out
    assert f"{resources.spill_bytes} bytes spill stores" in log
    assert f"Used {resources.registers} registers" in log
    found = offline.problems(resources, 80, half=True, multiplies=True)
    assert any(problem.startswith("spills") for problem in found), found


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"shared_bytes": 300000}, "shared memory"),
        ({"tmem_columns": 576}, "tensor memory"),
        ({"mma": "mma.sync"}, "expected tcgen05.mma"),
    ],
)
def test_planted_excess_is_seen(changed, problem):
    good = offline.Resources(registers=128, spill_bytes=0, shared_bytes=100000, tmem_columns=256, mma="tcgen05.mma")
    assert offline.problems(good, 100, half=True, multiplies=True) == []
    (found,) = offline.problems(dataclasses.replace(good, **changed), 100, half=True, multiplies=True)
    assert problem in found

"""Compile every shipped configuration for GPUs that need not be present, and check the compiled kernels.

The kernels must not spill registers, must fit into the memory of a multiprocessor and must use the tensor cores, and
the assembler must not warn of them. ``resources.json`` holds the resources of the compiled kernels for each version of
Triton, so that a change is visible in a diff. ``pytest tests/kernels/test_offline.py --slow --update-resources`` writes
the entries of the installed version. Every run compiles bfloat16 for sm_80 and sm_90. After a change of a kernel,
``--slow`` compiles the other dtypes and architectures as well.
"""

import dataclasses
import fcntl
import functools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from clipfast.bench.inspection import offline, shipped
from clipfast.bench.inspection.command import ARCHS, VERSION
from clipfast.bench.inspection.shipped import KNOWN, SNAPSHOT, compiles_for, known_problems, shipped_cases
from clipfast.kernels import attention, configs
from clipfast.kernels.hardware import ARCHITECTURES, architecture
from clipfast.kernels.launch import Launch

CASES = shipped_cases()
STOOD_FOR = {int(arch[3:]): int(other[3:]) for arch, other in shipped.STANDS_FOR.items()}
# Kernels with 32-bit products of two sizes that cannot overflow: tiles of segments of 16,384 rows, row numbers of a
# descriptor, and indices of partial sums, of which fewer than 2^31 fit into memory.
NARROW = ("_stats_kernel", "_grad_tile_kernel", "_weight_sums_kernel", "_unfold_grad_kernel")
UPDATE = "run with --slow --update-resources and read the difference"


def is_quick(arch: int, case: str) -> bool:
    """Return whether a shipped case's kernels are compiled in every run, and not only with ``--slow``."""
    return arch in (80, 90) and case.endswith("bf16")


@functools.cache
def committed() -> shipped.Snapshot:
    """Return the committed resources of the shipped cases' compiled kernels."""
    return shipped.loads(SNAPSHOT.read_text())


def compare(request, arch, case, found):
    """Compare a shipped case's compiled resources with the snapshot; ``--update-resources`` writes them into it."""
    if request.config.getoption("--update-resources"):
        with SNAPSHOT.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # other test workers write the file too
            held = shipped.loads(SNAPSHOT.read_text())
            held.setdefault(VERSION, {}).setdefault(arch, {})[case] = found
            SNAPSHOT.write_text(shipped.dumps(held))
        return
    if VERSION not in committed():
        pytest.skip(f"resources.json has no entry for Triton {VERSION}: {UPDATE}")
    assert found == committed()[VERSION][arch][case], UPDATE


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, marks=[] if is_quick(arch, case) else pytest.mark.slow)
        for case in CASES
        for arch in ARCHS
        if compiles_for(case, arch)
    ],
)
def test_resources(case, arch, request):
    compiled = {}
    for key, launch in offline.named(offline.record(arch, CASES[case])).items():
        kernel = offline.compile_kernel(launch, arch)
        resources = offline.resources(kernel)
        compiled[key] = shipped.as_fields(resources)
        found = offline.problems(resources, arch, half=not case.endswith("fp32"), multiplies=offline.multiplies(kernel))
        known = known_problems(VERSION, arch, case)
        assert [problem for problem in found if problem not in known] == [], f"{case} {key} sm_{arch}"
        if launch.kernel.__name__ not in NARROW:
            narrow = offline.narrow_products(kernel)
            if case.startswith("attention "):  # attention copies a tensor if the offset of a head exceeds 32 bits
                narrow = [text for text in narrow if not re.search(r"%stride_[qkvg]h\b", text)]
            assert narrow == [], f"{case} {key}: widen one factor to 64 bits"
    compare(request, f"sm_{arch}", case, compiled)


def test_snapshot_holds_nothing_else():
    for version, archs in committed().items():
        assert sorted(archs) == sorted(f"sm_{arch}" for arch in ARCHS), version
        for arch, cases in archs.items():
            assert sorted(cases) == sorted(case for case in CASES if compiles_for(case, int(arch[3:]))), (
                f"{version} {arch}"
            )


def test_warnings_of_the_assembler_that_stay_are_known_and_those_that_are_known_stay():
    found = {
        (version, int(arch[3:]), case, f"the assembler warns of {code}")
        for version, archs in committed().items()
        for arch, cases in archs.items()
        for case, kernels in cases.items()
        for kernel in kernels.values()
        for code in kernel["warnings"]
    }
    known = {(*key, problem) for key, problems in KNOWN.items() for problem in problems}
    assert found == {one for one in known if "warns" in one[-1]}


def test_snapshot_is_written_as_it_is_read():
    assert shipped.dumps(committed()) == SNAPSHOT.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "other"), STOOD_FOR.items())
@pytest.mark.parametrize("case", ["attention N197 D64 bf16", "patch_embed P14 bytes bf16"])
def test_an_architecture_that_another_stands_for_has_the_same_code(case, arch, other):
    def code(arch: int) -> list[str]:
        """Return the PTX of a shipped case's kernels for an architecture."""
        kernels = [offline.compile_kernel(launch, arch) for launch in offline.record(arch, CASES[case])]
        # The text after the code names the folder of the checkout that compiled the kernel first.
        return [re.sub(rf"\.target sm_{arch}\b", "", kernel.asm["ptx"]).partition("\t.file")[0] for kernel in kernels]

    assert code(arch) == code(other)


def test_every_architecture_has_a_table_and_takes_no_entry_of_another_matrix_unit():
    for arch, limits in ARCHITECTURES.items():
        assert configs.table_path(arch).exists(), f"sm_{arch} has no table"
        assert limits.tables[0] == arch
        assert limits.tables[-1] == 80, "the table that has every entry"
        serving = [ARCHITECTURES[other] for other in limits.tables]
        assert {other.matrix_unit for other in serving} <= {limits.matrix_unit, "mma.sync", "wgmma.mma_async"}
        if not limits.multiplies_from_shared:
            assert not any(other.multiplies_from_shared for other in serving), f"sm_{arch}"


def test_an_architecture_between_two_counts_as_the_older_one():
    between = {87: 86, 103: 100, 110: 100, 121: 120, 130: 120}
    assert {arch: architecture(arch) for arch in between} == {a: ARCHITECTURES[b] for a, b in between.items()}
    with pytest.raises(ValueError, match=r"compute capability 7\.5 is too old"):
        architecture(75)


def test_an_entry_that_another_table_lacks_is_an_error_that_names_it():
    with pytest.raises(KeyError, match="no configuration of made_up 16-bit for sm_120"):
        configs.gemm_config("made_up", 120, torch.bfloat16)


def test_planted_spill_is_seen_as_the_assembler_reports_it():
    # 128 x 128 fp32 scores in the registers of one warp cannot fit.
    too_large = configs.LoopedConfig(128, 128, num_warps=1, num_stages=1)
    with configs.override(configs.config_key("attention_looped_fwd", torch.bfloat16, 64), too_large):
        (launch,) = offline.record(80, lambda: attention(torch.empty(1, 256, 3 * 64, dtype=torch.bfloat16), 1))
    kernel = offline.compile_kernel(launch, 80)
    resources = offline.resources(kernel)
    log = offline.assembler_log(kernel)
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
        ({"warnings": ("C7515",)}, "the assembler warns of C7515"),
    ],
)
def test_planted_excess_is_seen(changed, problem):
    good = offline.Resources(registers=128, spill_bytes=0, shared_bytes=100000, tmem_columns=256, mma="tcgen05.mma")
    assert offline.problems(good, 100, half=True, multiplies=True) == []
    (found,) = offline.problems(dataclasses.replace(good, **changed), 100, half=True, multiplies=True)
    assert problem in found


def test_planted_product_of_sizes_in_32_bits_is_seen():
    assert len(offline.narrow_products(product(2))) == 1  # only rows * K, since DIM is a constant in the other products


@triton.jit
def _product_kernel(x_ptr, y_ptr, out_ptr, K, DIM: tl.constexpr, STEP: tl.constexpr):
    """Multiply two matrices in a pipelined loop: a kernel for the offline compiler."""
    rows, cols, steps = tl.arange(0, DIM)[:, None], tl.arange(0, DIM)[None, :], tl.arange(0, STEP)
    acc = tl.zeros((DIM, DIM), tl.float32)
    for start in range(0, K, STEP):
        x = tl.load(x_ptr + rows * K + (start + steps)[None, :])
        y = tl.load(y_ptr + (start + steps)[:, None] * DIM + cols)
        acc = tl.dot(x, y, acc)
    tl.store(out_ptr + rows * DIM + cols, acc)


def product(stages: int) -> Any:
    """Return the kernel that multiplies two matrices, compiled offline for sm_90 with this number of stages."""
    x, out = torch.empty(128, 1024, dtype=torch.bfloat16), torch.empty(128, 128)
    args = {"x_ptr": x, "y_ptr": x, "out_ptr": out, "K": 1024}
    options = {"num_warps": 4, "num_stages": stages, "enable_fp_fusion": True}
    return offline.compile_kernel(Launch(_product_kernel, (1,), args, {"DIM": 128, "STEP": 64}, options), 90)


def test_planted_wait_that_the_assembler_injects_is_a_problem():
    good = product(3)
    assert offline.resources(good).warnings == ()
    # Without Triton's waits, the assembler inserts waits of its own between the products.
    ptx = re.sub(r"wgmma\.wait_group[^;]*;", "", good.asm["ptx"])
    bad = SimpleNamespace(hash="without waits", metadata=good.metadata, asm={**good.asm, "ptx": ptx})
    found = offline.resources(bad)
    assert found.warnings == ("C7517",)
    assert offline.problems(found, 90, half=True, multiplies=True) == ["the assembler warns of C7517"]

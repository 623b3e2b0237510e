"""Test ``clipfast inspect``: occupancy against values computed by hand, the ranking of configurations, the exit code.

The kernels are compiled by the tests, for GPUs that need not be present.
"""

import dataclasses
import json

import pytest
import torch
import triton
import triton.language as tl

from clipfast.bench.inspection import command as inspect
from clipfast.bench.inspection import offline
from clipfast.bench.inspection.offline import occupancy
from clipfast.bench.inspection.report import differences, table
from clipfast.bench.inspection.shipped import SNAPSHOT, as_fields, loads, shipped_cases
from clipfast.cli.main import main
from clipfast.kernels import configs
from clipfast.kernels.launch import Launch

from ..conftest import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="kernels are compiled from calls recorded on a CPU")

SMALL = "attention N17 D32 bf16"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run ``clipfast inspect`` in this process and return its exit code, stdout and stderr."""
    code = main(["inspect", "--jobs", "1", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def reports():
    """Return the inspection reports on the compiled kernels of a small case."""
    return inspect.inspect_case(90, SMALL)


# Cases in which registers, warps, blocks, shared memory or tensor memory limit the occupancy, with the values of CUDA's
# occupancy calculator.
@pytest.mark.parametrize(
    ("arch", "registers", "warps", "memory", "blocks", "limits"),
    [
        (90, 128, 8, {}, 2, "registers"),
        (80, 32, 8, {}, 8, "warps registers"),
        (120, 32, 8, {}, 6, "warps"),
        (86, 16, 1, {}, 16, "blocks"),
        # A warp takes 6,400 registers: the registers suffice for 10 warps, but each of the four sub-partitions holds
        # only 2.
        (90, 200, 5, {}, 1, "registers"),
        (80, 32, 4, {"shared_bytes": 166912}, 1, "shared"),
        (80, 32, 4, {"shared_bytes": 166913}, 0, "shared"),
        # Two blocks of 114 KiB fill 228 KiB; the system reserves 1 KiB of each block.
        (90, 32, 4, {"shared_bytes": 115712}, 2, "shared"),
        (90, 32, 4, {"shared_bytes": 115713}, 1, "shared"),
        (100, 64, 4, {"tmem_columns": 256}, 2, "tmem"),
        (100, 64, 4, {"tmem_columns": 257}, 1, "tmem"),  # columns of tensor memory are allocated in powers of two
        (100, 64, 4, {"tmem_columns": 576}, 0, "tmem"),
    ],
)
def test_occupancy(arch, registers, warps, memory, blocks, limits):
    found = occupancy(arch, registers=registers, warps=warps, **{"shared_bytes": 0, **memory})
    assert (found.blocks, " ".join(found.limits)) == (blocks, limits)
    assert found.warps == blocks * warps / (48 if arch in (86, 120) else 64)


def product(config: configs.GemmConfig) -> inspect.Report:
    """Return the inspection's report on the contrastive loss's product kernel on sm_90 with a configuration."""
    with configs.override(configs.config_key("contrastive_products", torch.bfloat16), config):
        launches = offline.named(offline.record(90, shipped_cases()["contrastive_loss N8192 D512 bf16"]))
    return inspect.inspect_launch(launches["_products_kernel 0"], 90)


def test_rank_orders_what_is_known():
    clean = product(configs.GemmConfig(128, 128, 64, num_warps=8, num_stages=3))
    # Tiles of 32 rows are too small for wgmma, which needs 64. 128 x 256 scores do not fit into the registers of one
    # warpgroup.
    narrow = product(configs.GemmConfig(32, 128, 64, num_warps=4, num_stages=3))
    spilling = product(configs.GemmConfig(128, 256, 64, num_warps=4, num_stages=3))
    assert (clean.problems, clean.mma) == ((), ("HGMMA.64x128x16.F32.BF16",))
    assert narrow.problems == ("multiplies with mma.sync, expected wgmma.mma_async",)
    assert spilling.problems[0].startswith("spills")
    assert min((narrow, spilling, clean), key=lambda report: report.rank) is clean
    # The predicted time with narrow tiles is longer as well.
    assert narrow.prediction.seconds > clean.prediction.seconds
    excused = dataclasses.replace(spilling, known=spilling.problems)
    assert excused.rank < spilling.rank
    homeless = dataclasses.replace(clean, occupancy=occupancy(90, registers=255, warps=64, shared_bytes=0))
    assert homeless.rank > dataclasses.replace(clean, prediction=None).rank


@triton.jit
def _descriptor_kernel(x_ptr, out_ptr, M, N, BLOCK: tl.constexpr, SPECIALISE: tl.constexpr):
    """Multiply tiles that are loaded by tensor descriptors: a kernel for the tests of the inspection."""
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, N, BLOCK, warp_specialize=SPECIALISE):
        tile = x.load([tl.program_id(0) * BLOCK, start])
        acc = tl.dot(tile, tile, acc)
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


def descriptor_launch(*, specialise: bool) -> Launch:
    """Return a launch of the kernel with tensor descriptors, which the inspection compiles."""
    x, out = torch.empty(1024, 1024, dtype=torch.bfloat16), torch.empty(128, 128)
    args = {"x_ptr": x, "out_ptr": out, "M": 1024, "N": 1024}
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    return Launch(_descriptor_kernel, (8,), args, {"BLOCK": 128, "SPECIALISE": specialise}, options)


def test_tma_is_seen_and_what_the_model_does_not_cover_is_said(reports, monkeypatch):
    assert inspect.inspect_launch(descriptor_launch(specialise=False), 90).tma
    assert not any(report.tma for report in reports)
    report = inspect.inspect_launch(descriptor_launch(specialise=True), 100)
    assert (report.prediction, report.unpredicted) == (None, "")  # the model covers sm_90 only
    assert report.warps > 4

    def refuse(compiled):
        """Refuse compiled code for which the inspection has no model."""
        raise inspect.NoModel("its warps run different code")

    monkeypatch.setattr(inspect, "load", refuse)
    (report, *_) = inspect.inspect_case(90, SMALL)
    assert report.prediction is None
    assert "its warps run different code" in table([report])


def test_processes_find_what_the_snapshot_has_in_order(capsys, tmp_path):
    path = tmp_path / "inspect.json"
    code = main(["inspect", "--jobs", "2", "--arch", "90", "80", "--case", SMALL, "--json", str(path)])
    assert code == 0
    assert "equal to the snapshot" in capsys.readouterr().out
    found = json.loads(path.read_text())["reports"]
    assert [record["arch"] for record in found] == [90, 90, 80, 80, 80]
    for arch in (90, 80):
        kernels = {record["kernel"]: record["resources"] for record in found if record["arch"] == arch}
        assert kernels == loads(SNAPSHOT.read_text())[inspect.VERSION][f"sm_{arch}"][SMALL]
    assert all((record["prediction"] is not None) == (record["arch"] == 90) for record in found)
    assert found[0]["prediction"]["guesses"] == 0
    assert found[0]["prediction"]["cycles"] > 1000


def test_spilling_kernel_fails(capsys):
    too_large = configs.ShortConfig(128, num_warps=1, num_stages=1)
    with configs.override(configs.config_key("attention_short_fwd", torch.bfloat16, 32, 17), too_large):
        code, out, _ = run(capsys, "--arch", "80", "--case", SMALL)
    assert code == 1
    assert f"sm_80 {SMALL}: _short_fwd_kernel 0: " in out  # the difference to the snapshot


def test_planted_difference_and_another_triton_are_shown(reports):
    name = "_short_fwd_kernel 0"
    kernels = {report.kernel: as_fields(report.resources) for report in reports}
    changes = {
        f"{name}: registers 7 -> ": {name: kernels[name] | {"registers": 7}},
        f"{name}: new": {name: None},
        "other: gone": {"other": {}},
        "": {},
    }
    for expected, change in changes.items():
        kept = {kernel: fields for kernel, fields in (kernels | change).items() if fields is not None}
        snapshot = {"3.x": {"sm_90": {SMALL: kept}}}
        found = differences(reports, snapshot, "3.x")
        assert len(found) == bool(expected)
        assert all(line.startswith(f"sm_90 {SMALL}: {expected}") for line in found)
        assert "4.0" in differences(reports, snapshot, "4.0")[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--arch", "75"], "75"),
        (["--case", "attentoin"], "'attentoin'"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, expected):
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("clipfast inspect: error: ")
    assert expected in err

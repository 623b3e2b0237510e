"""``clipfast inspect``: occupancy counted by hand, the order of kernels whose worth is known, and what it prints.

The kernels are compiled here, for GPUs that are not there.
"""

import dataclasses
import json
import sys
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from clipfast.bench.inspection import command as inspect
from clipfast.bench.inspection import offline, peer_kernels
from clipfast.bench.inspection.occupancy import occupancy
from clipfast.bench.inspection.report import differences, table
from clipfast.bench.inspection.shipped import shipped_cases
from clipfast.bench.inspection.snapshot import Snapshot, as_fields, loads
from clipfast.cli import main
from clipfast.kernels import configs
from clipfast.kernels.launch import Launch

from ..conftest import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="compiles from recorded CPU calls")

SMALL = "attention N17 D32 bf16"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``clipfast inspect``, in this process."""
    code = main(["inspect", "--jobs", "1", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def reports():
    return inspect.inspect_case(90, SMALL)


# Where registers, warps, blocks, shared memory or tensor memory end, as CUDA's occupancy calculator has it.
@pytest.mark.parametrize(
    ("arch", "registers", "warps", "memory", "blocks", "limits"),
    [
        (90, 128, 8, {}, 2, "registers"),
        (80, 255, 4, {}, 2, "registers"),
        (80, 32, 8, {}, 8, "warps registers"),
        (120, 32, 8, {}, 6, "warps"),
        (90, 16, 1, {}, 32, "blocks"),
        (86, 16, 1, {}, 16, "blocks"),
        (89, 16, 1, {}, 24, "blocks"),
        # 6,400 registers a warp: 10 warps in all, but only 2 in each of four parts
        (90, 200, 5, {}, 1, "registers"),
        (80, 32, 4, {"shared_bytes": 166912}, 1, "shared"),
        (80, 32, 4, {"shared_bytes": 166913}, 0, "shared"),
        # two blocks of 114 KiB fill 228 KiB, 1 KiB of each being the system's
        (90, 32, 4, {"shared_bytes": 115712}, 2, "shared"),
        (90, 32, 4, {"shared_bytes": 115713}, 1, "shared"),
        # one block of 99 KiB, or two of 49
        (120, 32, 4, {"shared_bytes": 101376}, 1, "shared"),
        (120, 32, 4, {"shared_bytes": 101377}, 0, "shared"),
        (86, 32, 4, {"shared_bytes": 50176}, 2, "shared"),
        (100, 64, 4, {"tmem_columns": 256}, 2, "tmem"),
        (100, 64, 4, {"tmem_columns": 257}, 1, "tmem"),  # handed out in powers of two
        (100, 64, 4, {"tmem_columns": 576}, 0, "tmem"),
    ],
)
def test_occupancy(arch, registers, warps, memory, blocks, limits):
    found = occupancy(arch, registers=registers, warps=warps, **{"shared_bytes": 0, **memory})
    assert (found.blocks, " ".join(found.limits)) == (blocks, limits)
    assert found.warps == blocks * warps / (48 if arch in (86, 89, 120) else 64)


def product(config: configs.GemmConfig) -> inspect.Report:
    """The contrastive loss's plain matrix product on sm_90, with another tile."""
    with configs.override(configs.config_key("contrastive_products", torch.bfloat16), config):
        launches = offline.named(offline.record(90, shipped_cases()["contrastive_loss N1024 D512 bf16"]))
    return inspect.inspect_launch(launches["_products_kernel 0"], 90)


def test_rank_orders_what_is_known():
    clean = product(configs.GemmConfig(128, 128, 64, num_warps=8, num_stages=3))
    # wgmma needs 64 rows; 128 x 256 scores in the registers of one warpgroup do not fit
    narrow = product(configs.GemmConfig(32, 128, 64, num_warps=4, num_stages=3))
    spilling = product(configs.GemmConfig(128, 256, 64, num_warps=4, num_stages=3))
    assert (clean.problems, clean.mma) == ((), ("HGMMA 64x128x16 bf16",))
    assert narrow.problems == ("multiplies with mma.sync, expected wgmma.mma_async",)
    assert narrow.mma == ("HMMA 16x8x16 bf16",)
    assert spilling.problems[0].startswith("spills")
    assert min((narrow, spilling, clean), key=lambda report: report.rank) is clean
    # not only because it is told of the problem: the model alone puts the narrow tile behind
    assert dataclasses.replace(narrow, problems=()).rank > clean.rank
    assert narrow.prediction.seconds > clean.prediction.seconds
    # without a model, warps decide
    fits = [occupancy(80, registers=registers, warps=8, shared_bytes=0) for registers in (255, 64)]
    few, many = (dataclasses.replace(clean, prediction=None, occupancy=one) for one in fits)
    assert many.rank < few.rank


@triton.jit
def _descriptor_kernel(x_ptr, out_ptr, M, N, BLOCK: tl.constexpr, SPECIALISE: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, N, BLOCK, warp_specialize=SPECIALISE):
        tile = x.load([tl.program_id(0) * BLOCK, start])
        acc = tl.dot(tile, tile, acc)
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


def descriptor_launch(*, specialise: bool) -> Launch:
    x, out = torch.empty(1024, 1024, dtype=torch.bfloat16), torch.empty(128, 128)
    args = {"x_ptr": x, "out_ptr": out, "M": 1024, "N": 1024}
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    return Launch(_descriptor_kernel, (8,), args, {"BLOCK": 128, "SPECIALISE": specialise}, options)


def test_tma_is_seen_and_a_warp_specialised_kernel_is_not_predicted(reports):
    assert inspect.inspect_launch(descriptor_launch(specialise=False), 90).tma
    assert not any(report.tma for report in reports)
    report = inspect.inspect_launch(descriptor_launch(specialise=True), 100)
    assert (report.prediction, report.unpredicted) == (None, "")  # the model is of sm_90
    assert report.warps > 4


def test_what_the_model_does_not_cover_is_said(monkeypatch):
    refuse = mock.Mock(side_effect=inspect.NoModel("its warps run different code"))
    monkeypatch.setattr(inspect, "predict", refuse)
    report = inspect.inspect_case(90, SMALL)[0]
    assert (report.prediction, report.unpredicted) == (None, "its warps run different code")
    assert "no prediction: its warps run different code" in table([report])


def test_report_is_that_of_the_snapshot(capsys, tmp_path):
    path = tmp_path / "inspect.json"
    code, out, _ = run(capsys, "--arch", "90", "--case", SMALL, "--json", str(path))
    assert code == 0
    assert "equal to the snapshot" in out
    found = json.loads(path.read_text())["reports"]
    assert [record["kernel"] for record in found] == ["_short_fwd_kernel 0", "_short_bwd_kernel 0"]
    for record in found:
        assert {"case", "arch", "occupancy", "mma", "tma", "problems"} <= record.keys()
        assert record["prediction"]["guesses"] == 0
        assert record["prediction"]["cycles"] > 1000
    snapshot = loads(inspect.SNAPSHOT.read_text()).resources[inspect.VERSION]["sm_90"][SMALL]
    assert snapshot == {record["kernel"]: record["resources"] for record in found}


def test_processes_find_the_same_in_the_same_order():
    one, two = (inspect.inspect_all([80, 90], substring=SMALL, jobs=jobs) for jobs in (1, 2))
    assert one == two
    archs = [report.arch for report in one[0]]
    assert (archs, set(archs)) == (sorted(archs), {80, 90})
    # there is no model of an A100
    assert {report.arch for report in one[0] if report.prediction} == {90}


def test_spilling_kernel_fails(capsys):
    too_large = configs.ShortConfig(128, num_warps=1, num_stages=1)
    with configs.override(configs.config_key("attention_short_fwd", torch.bfloat16, 32, 17), too_large):
        code, out, _ = run(capsys, "--arch", "80", "--case", SMALL)
    assert code == 1
    assert "spills" in out
    assert f"sm_80 {SMALL}: _short_fwd_kernel 0: " in out  # the difference to the snapshot


def test_known_problem_does_not_fail_and_what_does_not_fit_ranks_last(reports):
    spilling = dataclasses.replace(reports[0], problems=("spills 12 bytes",))
    excused = dataclasses.replace(spilling, known=("spills 12 bytes",))
    assert (spilling.failures, excused.failures) == (("spills 12 bytes",), ())
    assert "known: spills 12 bytes" in table([excused])
    assert reports[0].rank == excused.rank < spilling.rank
    homeless = dataclasses.replace(reports[0], occupancy=occupancy(90, registers=255, warps=64, shared_bytes=0))
    assert homeless.occupancy.blocks == 0
    assert homeless.rank > dataclasses.replace(reports[0], prediction=None).rank


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
        snapshot = Snapshot({"3.x": {"sm_90": {SMALL: kept}}})
        found = differences(reports, snapshot, "3.x")
        assert len(found) == bool(expected)
        assert all(line.startswith(f"sm_90 {SMALL}: {expected}") for line in found)
        (line,) = differences(reports, snapshot, "4.0")
        assert "no entry for Triton 4.0" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--arch", "75"], "unknown architecture 75: known are 80, 86, 89, 90, 100, 120"),
        (["--case", "attentoin"], "no case contains 'attentoin'; there are: bias_gelu N4096 bf16; "),
        (["--snapshot", "nowhere.json"], "nowhere.json"),
        (["--snapshot", __file__], "is not JSON"),
        (["--snapshot", str(configs.table_path(90))], "is not one: a snapshot has the fields of its lists at the top"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, expected):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("clipfast inspect: error: ")
    assert expected in err
    assert err.count("\n") == 1


def test_missing_peers_are_listed_with_how_to_get_them(capsys, monkeypatch):
    monkeypatch.setattr(peer_kernels.importlib.util, "find_spec", lambda name: None)
    code, out, _ = run(capsys, "--arch", "90", "--case", SMALL, "--peers")
    assert code == 0
    assert "pip install --no-deps memeff==" in out
    assert "pip install --no-deps inf-cl==" in out


PEER = """
import torch, triton, triton.language as tl

@triton.jit
def peer_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :], mask=offs[:, None] < n)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], tl.dot(x, x))

def loss(x):
    assert x.is_cuda
    major, _ = torch.cuda.get_device_capability(x.device)
    peer_kernel[lambda meta: (1,)](x, x, 7, BLOCK=16 * major, num_warps=2)
"""


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # a peer leaves it to its default
def test_peer_is_recorded_as_it_would_launch(capsys, monkeypatch, tmp_path):
    (tmp_path / "memeff.py").write_text(PEER)
    monkeypatch.syspath_prepend(tmp_path)

    def call() -> None:
        import memeff

        memeff.loss(torch.ones(128, 128, dtype=torch.bfloat16))

    fails = mock.Mock(side_effect=ImportError("no module named flash_attn"))
    monkeypatch.setattr(peer_kernels, "PEERS", {"memeff": ("memeff", {"fake good": call, "fake bad": fails})})
    (launch,) = peer_kernels.record_peer(80, call)
    assert (launch.constexprs, launch.options) == ({"BLOCK": 128}, {"num_warps": 2})
    assert sorted(launch.args) == ["n", "out_ptr", "x_ptr"]
    assert not torch.ones(1).is_cuda
    code, out, _ = run(capsys, "--arch", "80", "--case", "fake", "--peers")
    sys.modules.pop("memeff")
    assert code == 0
    assert "HMMA 16x8x16 bf16" in out
    assert "fake bad on sm_80: ImportError: no module named flash_attn" in out

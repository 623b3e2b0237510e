"""``clipfast inspect --predict``: what an op and a step run, what that takes, and measurements beside it."""

import dataclasses
import json

import pytest
import torch

from clipfast.bench import categories
from clipfast.bench.inspection import forecast, offline, sizes, workloads
from clipfast.bench.inspection.forecast import Forecast, Part
from clipfast.bench.inspection.model import H100, QUICK, predict_launch
from clipfast.cli import main
from clipfast.kernels import contrastive_loss
from clipfast.kernels.launch import record_launches
from clipfast.kernels.spec import specs
from clipfast.ledger import Event

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU or INTERPRET, reason="compiles from recorded CPU calls")
LAYER_NORM = "layer_norm rows=50432 width=768 bf16"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["inspect", "--predict", "--jobs", "1", "--quick", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_launches_on_fake_tensors_are_those_of_real_ones():
    spec = specs()["contrastive_loss"]
    shape = dataclasses.replace(spec.bench["cuda"][0], pairs=300, embed_dim=64)
    image, text = (torch.ones(300, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with record_launches(90, 132) as real:
        contrastive_loss(image, text, torch.tensor(10.0, requires_grad=True)).backward()
    fake = [launch for _, launch in workloads.op_work(spec, shape, "bf16").launches]
    assert [forecast._key(launch) for launch in fake] == [forecast._key(launch) for launch in real]
    assert [offline._specialise(launch) for launch in fake] == [offline._specialise(launch) for launch in real]


def test_the_kernels_of_a_step_are_those_of_its_ops():
    work = workloads.step_work("ViT-T-8-32", 64)
    names = {launch.kernel.__name__ for _, launch in work.launches}
    assert {"_tokens_kernel", "_short_bwd_kernel", "_layer_norm_fwd_kernel", "_stats_kernel"} <= names
    assert sum(op.flops for op in work.ops) > 0


def test_time_is_the_sum_of_its_parts(capsys, tmp_path):
    path = tmp_path / "forecast.json"
    code, out, _ = run(capsys, "--case", LAYER_NORM, "--json", str(path))
    assert code == 0
    (found,) = json.loads(path.read_text())["forecasts"]
    launches = sum(part["launches"] * part["prediction"]["seconds"] for part in found["parts"])
    assert found["seconds"] == pytest.approx(launches + found["torch_seconds"] + found["product_seconds"])
    assert sum(found["shares"].values()) == pytest.approx(found["seconds"])
    assert found["shares"].keys() <= {categories.NORM, categories.COPIES}
    # both passes move 2 and 3 tensors of 50,432 x 768 in bf16, at 3 TB/s
    least = 5 * 50432 * 768 * 2 / H100.hbm_rate
    assert least < found["seconds"] < 2 * least
    assert LAYER_NORM in out


def test_measured_times_stand_beside_predicted_ones(capsys, tmp_path):
    shape = {"rows": 50432, "width": 768}
    candidates = [{"name": "clipfast", "median_s": 1e-3}, {"name": "PyTorch", "median_s": 1.0}]
    case = {"op": "layer_norm.fwd_bwd", "shape": shape, "dtype": "bf16", "candidates": candidates}
    refused = case | {"shape": {"rows": 1, "width": 2}, "candidates": [{"name": "clipfast", "refused": "no memory"}]}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"cases": [case, refused]}))
    code, out, _ = run(capsys, "--case", LAYER_NORM, "--against", str(path))
    assert code == 0
    (row,) = [line.split() for line in out.splitlines() if line.startswith(LAYER_NORM)]
    assert row[-3:-1] == ["1.00", "ms"]
    assert 0 < float(row[-1]) < 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--case", "nothing of the kind"], "contains 'nothing of the kind'"),
        (["--against", __file__], "is not a result of clipfast bench"),
        (["--json", "no/such/folder.json"], "no folder no/such"),
        (["--tflops", "0"], "--tflops must be more than 0, got 0"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, expected):
    code, out, err = run(capsys, "--case", LAYER_NORM, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected in err


def part(seconds: float, launches: int = 1) -> Part:
    spec = specs()["bias_gelu"]
    _, launch = workloads.op_work(spec, spec.small[0], "bf16").launches[0]
    prediction = dataclasses.replace(predict_launch(launch, H100, QUICK), seconds=seconds)
    return Part("_some_kernel", launches, prediction)


def test_tables_show_pairs_and_what_is_not_predicted():
    missing = Part("_odd_kernel", 3, None, "its warps run different code")
    op = Forecast("attention", {"batch": 2}, "bf16", 2, ("memory",), (part(1e-3, 2), missing), 4, 1e-3, 0.0)
    step = Forecast("step", {"model": "ViT-B-32", "batch": 100}, "bf16", 100, (), (part(0.2),), 9, 0.1, 0.2)
    assert "not predicted: its warps run different code" in forecast.rows(op)
    assert op.seconds == pytest.approx(3e-3)
    assert forecast.rows(step).split()[:5] == ["ViT-B-32", "100", "500", "ms", "200"]
    for one in (op, step):  # a heading and rows that are printed one after another stand in the same columns
        head = forecast.heading(one is step)
        assert head.index("time") + 4 == forecast.rows(one).index("ms") + 2


def test_a_step_says_and_draws_where_its_time_goes(tmp_path):
    forward = Event("forward", 10, frozenset(), flops=1)
    ops = [forward, Event("update", 10, frozenset()), Event("forward", 1, frozenset())]
    parts = (dataclasses.replace(part(0.1), kernel="_key_bwd_kernel"), part(0.05))
    shares = forecast._shares(parts, ops, [0.3, 0.2, 0.1])
    assert shares == pytest.approx({
        categories.GEMM: 0.3, categories.ATTENTION: 0.1, categories.OPTIMIZER: 0.2, categories.COPIES: 0.1,
        categories.OTHER: 0.05,
    })  # fmt: skip
    step = Forecast("step", {"model": "ViT-B-32", "batch": 8}, "bf16", 8, (), parts, 3, 0.3, 0.3, shares)
    assert "GEMM 40.0%, optimizer 26.7%" in forecast.rows(step)
    plots = pytest.importorskip("clipfast.bench.plots", reason="pictures need matplotlib", exc_type=ImportError)
    plots.draw_steps({"card": "h100", "triton": "3.9", "forecasts": [forecast.to_json(step)]}, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 5000


def test_table_of_sizes_puts_the_time_over_the_floor(capsys):
    assert sizes.main(["--pairs", "256", "--widths", "64", "128", "--quick"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()[:3]
    assert head == "| pairs | D = 64 | D = 128 |"
    times = [float(cell.split("ms, ")[1].removesuffix("x ")) for cell in row.split("|")[2:4]]
    assert all(time > 1 for time in times)  # nothing is faster than its floor


def test_every_kind_has_a_published_error():
    for kind in {kind for kinds in forecast.KINDS.values() for kind in kinds} | {"memory"}:
        band = forecast.error_band((kind,))
        assert band.points >= 3, kind
        assert 0 < band.median <= band.p90 <= band.worst
    assert forecast.error_band(("nothing of the kind",)) is None

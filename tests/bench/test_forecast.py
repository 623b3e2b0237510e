"""Test ``clipfast inspect --predict``: the launches of ops and steps, their predicted times, and measured times."""

import dataclasses
import json
import math

import pytest
import torch

from clipfast.bench import categories
from clipfast.bench.inspection import __main__ as markdown
from clipfast.bench.inspection import eager, forecast, offline
from clipfast.bench.inspection.correction import kind_of
from clipfast.bench.inspection.forecast import Forecast, Part
from clipfast.bench.inspection.model import H100, QUICK, predict_launch
from clipfast.bench.inspection.validation import errors
from clipfast.cli.main import main
from clipfast.kernels import contrastive_loss
from clipfast.kernels.launch import record_launches
from clipfast.kernels.spec import specs

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU or INTERPRET, reason="kernels are compiled from calls recorded on a CPU")
LAYER_NORM = "layer_norm rows=50432 width=768 bf16"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the benchmarks' ``inspect --predict``, and return exit code, stdout and stderr."""
    code = main(["inspect", "--predict", "--jobs", "1", "--quick", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_launches_on_fake_tensors_are_those_of_real_ones():
    spec = specs()["contrastive_loss"]
    shape = dataclasses.replace(spec.bench["cuda"][0], pairs=300, embed_dim=64)
    image, text = (torch.ones(300, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with record_launches(90, 132) as real:
        contrastive_loss(image, text, torch.tensor(10.0, requires_grad=True)).backward()
    fake = forecast.op_work(spec, shape, "bf16").launches
    assert [forecast.key_of(launch) for launch in fake] == [forecast.key_of(launch) for launch in real]
    assert [offline.identity(launch) for launch in fake] == [offline.identity(launch) for launch in real]


def test_the_kernels_of_a_step_are_those_of_its_ops():
    work = forecast.step_work("ViT-T-8-32", 64)
    names = {launch.kernel.__name__ for launch in work.launches}
    assert {"_tokens_kernel", "_short_bwd_kernel", "_layer_norm_fwd_kernel", "_stats_kernel"} <= names
    assert sum(op.flops for op in work.ops) > 0


def test_a_step_on_captions_walks_the_keys_that_they_have():
    work = forecast.step_work("ViT-T-8-32", 64, captions=True)
    launch = next(launch for launch in work.launches if launch.kernel.__name__ == "_varlen_fwd_kernel")
    padded = 64 * 77
    assert launch.args["T"] < padded / 2
    found = predict_launch(launch, H100, QUICK)
    assert found.guesses == 0
    bounds = launch.args["bounds_ptr"]
    bounds[0], bounds[1] = 0, launch.args["T"]  # one sequence of all tokens
    assert predict_launch(launch, H100, QUICK).flops > 2 * found.flops


def test_time_is_the_sum_of_its_parts_beside_measured_ones(capsys, tmp_path):
    shape = {"rows": 50432, "width": 768}
    candidates = [{"name": "clipfast", "median_s": 1e-3}, {"name": "PyTorch", "median_s": 1.0}]
    case = {"op": "layer_norm.fwd_bwd", "shape": shape, "dtype": "bf16", "candidates": candidates}
    refused = case | {"shape": {"rows": 1, "width": 2}, "candidates": [{"name": "clipfast", "refused": "no memory"}]}
    bench, path = tmp_path / "bench.json", tmp_path / "forecast.json"
    bench.write_text(json.dumps({"cases": [case, refused]}))
    code, out, _ = run(capsys, "--case", LAYER_NORM, "--json", str(path), "--against", str(bench))
    assert code == 0
    (found,) = json.loads(path.read_text())["forecasts"]
    launches = sum(part["launches"] * part["prediction"]["seconds"] for part in found["parts"])
    assert found["seconds"] == pytest.approx(launches + found["torch_seconds"] + found["product_seconds"])
    corrected = found["corrected"]["seconds"]
    norms = [errors()[kind].middle for kind in ("norm forward", "norm backward")]
    forward, backward = (part["launches"] * part["prediction"]["seconds"] for part in found["parts"])
    others = found["torch_seconds"] + found["product_seconds"]
    assert corrected == pytest.approx(forward / math.exp(norms[0]) + backward / math.exp(norms[1]) + others)
    assert found["corrected"]["low"] < corrected < found["corrected"]["high"]
    assert sum(found["shares"].values()) == pytest.approx(found["seconds"])
    assert found["shares"].keys() <= {categories.NORM, categories.COPIES}
    # The two passes move 2 and 3 tensors of 50,432 x 768 in bf16, at 3 TB/s.
    least = 5 * 50432 * 768 * 2 / H100.hbm_rate
    assert least < found["seconds"] < 2 * least
    (row,) = [line.split() for line in out.splitlines() if line.startswith(LAYER_NORM)]
    assert row[-3:] == ["1.00", "ms", f"{corrected / 1e-3:.2f}"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--case", "nothing of the kind"], "nothing of the kind"),
        (["--against", __file__], "--against"),
        (["--json", "no/such/folder.json"], "no/such"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, expected):
    code, out, err = run(capsys, "--case", LAYER_NORM, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected in err


def test_tables_show_pairs_and_shares_and_what_is_not_predicted():
    spec = specs()["bias_gelu"]
    launch = forecast.op_work(spec, spec.small[0], "bf16").launches[0]
    prediction = dataclasses.replace(predict_launch(launch, H100, QUICK), seconds=1e-3)
    part, missing = Part("_some_kernel", 2, prediction), Part("_odd_kernel", 3, None, "its warps run different code")
    op = Forecast("attention", {"batch": 2}, "bf16", 2, (part, missing), 4, 1e-3, 0.0, 4e-3)
    assert (op.seconds, op.eager_seconds, op.binds) == (pytest.approx(3e-3), 4e-3, "host")
    assert op.corrected.seconds == pytest.approx(2e-3 / math.exp(errors()["memory"].middle) + 1e-3)
    assert "its warps run different code" in forecast.rows(op)
    shares = {categories.GEMM: 0.3, categories.ATTENTION: 0.198}
    shape = {"model": "ViT-B-32", "batch": 100}
    step = Forecast("step", shape, "bf16", 100, (part,), 9, 0.198, 0.3, 0.1, 32, shares)
    assert "longer than the host from 32 pairs on" in forecast.rows(step)
    assert "GEMM 60.0%" in forecast.rows(step)


def test_table_of_sizes_puts_the_time_over_the_floor(capsys):
    assert markdown.main(["--op", "sigmoid_loss", "--pairs", "256", "--widths", "64", "--quick"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()[:3]
    assert head == "| pairs | D = 64 |"
    assert float(row.split("ms, ")[1].partition("x")[0]) > 1  # nothing is faster than its floor


def test_the_host_takes_longer_for_more_kernels_than_were_measured(monkeypatch):
    short, long = {"rows": 3, "width": 4}, {"rows": 3, "width": 4, "residual": True}
    measured = [
        {"name": "norm", "shape": shape, "found": {"clipfast": {"forward": [9.0, 1], "both": [us, 4]}}}
        for shape, us in ((short, 40.0), (long, 60.0))
    ]
    measured.append({"name": "step", "shape": {}, "found": {"clipfast": {"both": [900.0, 30]}}})
    monkeypatch.setattr(eager, "measured", lambda: {"rows": measured})
    assert eager.host_seconds("norm", {"rows": 5000, "width": 768}, 4) == pytest.approx(40e-6)
    assert eager.host_seconds("norm", {"rows": 5000, "width": 768, "residual": True}, 8) == pytest.approx(
        60e-6 + 4e-6 * eager.FURTHER
    )
    assert eager.host_seconds("norm", {"rows": 5000, "width": 768}, 3) == pytest.approx(30e-6)
    assert eager.host_seconds("step", {"model": "ViT-B-32"}, 60) == pytest.approx(1800e-6)
    with pytest.raises(ValueError, match="no time of gelu"):
        eager.host_seconds("gelu", short, 1)


@pytest.mark.parametrize(("start", "turn"), [(0, 64), (40, 64), (64, 64), (5000, 64), (3, 1)])
def test_the_batch_from_which_the_gpu_binds_is_found_from_any_start(start, turn):
    assert eager.binds_from(lambda batch: batch >= turn, start) == turn


def test_the_host_of_every_op_and_step_is_known():
    for spec, shape in forecast.measured_shapes():
        assert eager.host_seconds(spec.name, shape.to_dict(), 1) > 0
    assert eager.host_seconds(eager.STEP, {"model": "RN50", "batch": 256}, 1) > 0


def test_the_kernels_of_every_op_have_a_published_error():
    for spec in specs().values():
        for kernel in spec.kernels:
            band = errors()[kind_of(kernel, spec.category)]
            assert band.points >= 3, kernel
            assert band.low <= band.middle <= band.high
            assert 0 < band.median <= band.p90 <= band.worst

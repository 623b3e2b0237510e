"""Test the rule for errors: it finds a kernel whose errors are too large, and does not fail a kernel by chance."""

import pytest
import torch

from clipfast.verify import CheckResult, judge
from clipfast.verify.context import exact_float32, poisoned
from clipfast.verify.report import FAIL, PASS, SKIP, results_of
from clipfast.verify.rule import judge_draws, judge_fairly

NAN, INF = float("nan"), float("inf")


def test_three_figures_of_two_errors():
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    same = torch.tensor([1.0 + 2e-6, -2.0])
    judgement = judge(torch.tensor([1.0, -2.0 + 1e-6]), same, truth, 2.0)
    assert judgement.passed
    largest, rms = judgement.figures
    assert (largest.kind, rms.kind) == ("max", "rms")
    eps = torch.finfo(torch.float32).eps
    assert largest.torch == pytest.approx((same.double() - truth).abs().max().item())
    assert largest.ours == pytest.approx(1e-6, rel=0.1)
    assert largest.allowed == pytest.approx(2 * largest.torch + 2 * eps)
    assert rms.allowed == pytest.approx(2 * rms.torch + eps * 2.5**0.5)


@pytest.mark.parametrize(
    ("ours", "truth", "fault"),
    [
        ([NAN, 1.0], [1.0, 1.0], "NaN in other places"),
        ([1.0, 1.0], [NAN, 1.0], "NaN in other places"),
        ([INF, 1.0], [1.0, 1.0], "infinity in other places"),
        ([-INF, 1.0], [INF, 1.0], "infinity in other places"),
        ([1.0, 1.0, 1.0], [1.0, 1.0], "shape"),
        ([2.0, 1.0], [1.0, 1.0], "max error"),
    ],
)
def test_faults(ours, truth, fault):
    exact = torch.tensor(truth, dtype=torch.float64)
    judgement = judge(torch.tensor(ours), exact.float(), exact, 2.0)
    assert not judgement.passed
    assert fault in judgement.reason


def test_nan_and_infinity_in_the_same_places_pass():
    truth = torch.tensor([NAN, INF, -INF, 1.0], dtype=torch.float64)
    judgement = judge(truth.float(), truth.float(), truth, 2.0)
    assert judgement.passed
    assert judgement.figures


@pytest.mark.parametrize("side", [0, 1, 2])
def test_an_output_that_one_side_lacks_fails(side):
    sides = [[{"value": torch.ones(2), "d_x": torch.ones(2)}] for _ in range(3)]
    assert judge_draws(*sides)["d_x"].passed
    del sides[side][0]["d_x"]
    assert not judge_draws(*sides)["d_x"].passed


def bad_luck(error: float):
    """Return a function that draws results for the rule, and the list of its calls.

    PyTorch's result, the yardstick, is exact in the first three draws and errs by 1e-5 later; ours errs by ``error``.
    """
    counted = []

    def draw(number):
        """Return our result, PyTorch's and the true one; in the first draws, PyTorch's is exact by chance."""
        counted.append(number)
        truth = torch.ones(1, dtype=torch.float64)
        return {"value": (truth + error).float()}, {"value": (truth + 1e-5 * (number > 2)).float()}, {"value": truth}

    return draw, counted


@pytest.mark.parametrize(
    ("error", "passes", "draws"),
    # The error of the last case is too large to be chance, so no further draws are judged.
    [(1e-5, True, 32), (3e-5, False, 32), (1e-2, False, 3)],
)
def test_bad_luck_is_judged_over_more_draws_and_a_fault_stays_one(error, passes, draws):
    draw, counted = bad_luck(error)
    judgements, _ = judge_fairly(draw, 3, 32)
    assert judgements["value"].passed == passes
    assert len(counted) == draws
    assert not passes or "32 draws" in judgements["value"].reason


def test_forgotten_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        assert torch.empty(7).isnan().all()
        assert torch.ones(3).new_empty(5).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def float32_settings():
    """Return PyTorch's new and old settings for products in float32; PyTorch raises an error if these disagree."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    new = [setting.fp32_precision for setting in (matmul, cudnn.conv, cudnn.rnn)]
    return new, [cudnn.allow_tf32, matmul.allow_tf32]


def test_float32_is_not_tf32_and_comes_back():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = float32_settings()
        with exact_float32():
            assert float32_settings() == (["ieee"] * 3, [False, False])
        assert float32_settings() == found
    finally:
        torch.set_float32_matmul_precision(before)


def test_rows_name_their_verdict():
    truth = torch.full((2,), 1e6, dtype=torch.float64)
    judgements = {
        "value": judge(truth.float(), truth.float(), truth, 2.0),
        "d_x": judge(truth.float() * 2, truth.float(), truth, 3.0),
        "other dtype": judge(truth.half(), truth.float(), truth, 2.0),
        "no yardstick": judge(truth.half().clamp(max=1), truth.half() * NAN, truth, 2.0),
    }
    rows = results_of(CheckResult("op", "cpu", "accuracy", "case"), judgements)
    assert [(row.output, row.verdict) for row in rows] == list(zip(judgements, (PASS, FAIL, FAIL, SKIP), strict=True))
    assert "dtype" in rows[2].reason
    assert "no yardstick" in rows[3].reason

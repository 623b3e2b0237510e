"""The losses of small batches on a CPU, whose matrix of logits is made as a whole."""

import pytest
import torch

from clipfast.kernels import contrastive_loss, sigmoid_loss
from clipfast.kernels.contrastive import whole

from ..conftest import LEG
from .conftest import Recorded
from .test_cases import MOST_ELEMENTS, hold, specs

pytestmark = pytest.mark.skipif(LEG != "cpu", reason="of the CPU path")
CASES = [
    (spec, case)
    for spec in (specs()[name] for name in ("contrastive_loss", "sigmoid_loss"))
    for case in spec.cases
    if LEG in case.legs and 0 < case.shape.elements <= MOST_ELEMENTS
]


@pytest.fixture(autouse=True)
def as_a_whole(monkeypatch, in_blocks):
    monkeypatch.setattr(whole, "MOST_LOGITS", MOST_ELEMENTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("spec", "case"), CASES, ids=[f"{number} {spec.name} {case.name}" for number, (spec, case) in enumerate(CASES)]
)
def test_case(spec, case, dtype):
    hold(spec, case, dtype)


def features(scale, rows=7):
    return *(torch.randn(rows, 8, requires_grad=True) for _ in range(2)), torch.tensor(scale, requires_grad=True)


@pytest.mark.parametrize(("scale", "is_whole"), [(0.0, True), (1e-4, True), (1.0, True), (100.0, False), (-1e4, False)])
def test_it_is_left_to_the_blocks_where_one_shift_is_not_exact(scale, is_whole):
    inputs = features(scale)
    with Recorded() as mode:
        loss = contrastive_loss(*inputs)
    assert any(op.namespace == "clipfast" for op, *_ in mode.calls) != is_whole
    loss.backward()
    found = [x.grad for x in inputs]
    expected = [x.detach().double().requires_grad_() for x in inputs]
    contrastive_loss(*expected, backend="torch").backward()
    for grad, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


def test_a_pair_whose_power_overflows_keeps_its_gradient():
    # e^90 is infinite in float32, while the sum of the other powers, six times e^81, is not.
    x = torch.eye(8)[:7].requires_grad_()
    y = torch.eye(8)[:7].mul(0.1).add(0.9).requires_grad_()
    scale = torch.tensor(90.0)
    contrastive_loss(x, y, scale).backward()
    exact = [side.detach().double().requires_grad_() for side in (x, y)]
    contrastive_loss(*exact, scale.double(), backend="torch").backward()
    for side, reference in zip((x, y), exact, strict=True):
        torch.testing.assert_close(side.grad.double(), reference.grad, rtol=1e-3, atol=1e-7)


LOSSES = {
    "contrastive_loss": contrastive_loss,
    "sigmoid_loss": lambda x, y, scale, **options: sigmoid_loss(x, y, scale, scale - 4, **options),
}


@pytest.mark.parametrize("op", LOSSES)
def test_the_graph_can_be_used_twice_and_has_no_second_derivative(op):
    inputs = features(2.0)
    loss = LOSSES[op](*inputs, normalize=True)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs, create_graph=True), once, rtol=0, atol=0)
    first = torch.autograd.grad(LOSSES[op](*inputs), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op} has no second derivative"):
        first[0].sum().backward()


@pytest.mark.parametrize("op", LOSSES)
def test_autocast_in_the_backward_pass_changes_nothing(op):
    inputs = features(2.0)
    loss = LOSSES[op](*inputs)
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), expected, rtol=0, atol=0)


def test_shapes_dtypes_and_devices_that_it_does_not_take():
    x, y, _ = features(1.0)
    assert whole.suits_whole(x, y, torch.float32)
    assert whole.suits_whole(x, y, torch.bfloat16)
    assert whole.suits_whole(x, y[:5], torch.float32)
    assert not whole.suits_whole(x[:0], y[:0], torch.float32)
    assert not whole.suits_whole(x, y, torch.float32, ranks=1 + int((MOST_ELEMENTS / len(x) / len(y)) ** 0.5))
    assert not whole.suits_whole(x.double(), y.double(), torch.float64)
    assert not whole.suits_whole(x.to("meta"), y.to("meta"), torch.float32)

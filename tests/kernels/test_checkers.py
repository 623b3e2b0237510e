"""Each checker catches the fault that it exists for: the rule on errors, registration, gradients, poison."""

import functools

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError
from torch.testing._internal.optests import OpCheckError

from clipfast.kernels import attention, contrastive_loss, reference
from clipfast.kernels.attention.spec import AttentionShape
from clipfast.kernels.contrastive.cases import LossShape

from ..conftest import INTERPRET
from ..numerics import as_good_as_torch, compare
from .conftest import inputs_of

pytestmark = pytest.mark.skipif(INTERPRET, reason="checks the checkers, once")


class Scaled(torch.autograd.Function):
    """Multiply the gradient by a number that is nearly 1."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def test_gradient_off_by_one_percent_fails():
    inputs = {"x": torch.randn(50)}
    compare(lambda x: x * 1, lambda x: x * 1, inputs, torch.randn(50))
    with pytest.raises(AssertionError, match="d_x: max error"):
        compare(lambda x: Scaled.apply(x, 1.01), lambda x: x * 1, {"x": torch.randn(50)}, torch.randn(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fault", [lambda y: 1.02 * y, lambda y: y.to(torch.float64)], ids=["two percent", "other dtype"]
)
def test_wrong_attention_fails(dtype, fault):
    # Through the same door as the ops, at the size of real outputs.
    def op(qkv):
        return fault(attention(qkv, 2))

    inputs, grad = inputs_of("attention", AttentionShape(2, 50, 2, 16, bias=False), dtype)
    with pytest.raises(AssertionError, match=r"value: (rms|max|dtype)"):
        compare(op, functools.partial(reference.attention, num_heads=2), inputs, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_wrong_small_gradient_fails(dtype):
    # Gradients of the loss are about 1 / N: an allowance that is absolute would let anything pass.
    def op(image, text, logit_scale):
        return contrastive_loss(Scaled.apply(image, 1.02), text, logit_scale)

    inputs, grad = inputs_of("contrastive_loss", LossShape(129, 72), dtype)
    with pytest.raises(AssertionError, match=r"d_image: (rms|max)"):
        compare(op, reference.contrastive_loss, inputs, grad)


def test_one_wrong_value_among_many_fails():
    truth = torch.randn(10000, dtype=torch.float64)
    ours = truth.float()
    ours[17] += 1e-5
    with pytest.raises(AssertionError, match="max error"):
        as_good_as_torch(ours, truth.float(), truth, 2.0, "x")


def test_constant_bias_fails():
    # Each value is within the largest error of the yardstick, all of them together are not.
    truth = torch.randn(10000, dtype=torch.float64)
    yardstick = truth.float()
    yardstick[0] += 1e-4
    with pytest.raises(AssertionError, match="rms error"):
        as_good_as_torch((truth + 5e-5).float(), yardstick, truth, 2.0, "x")


def test_unwritten_output_is_seen(poison):
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(3).new_empty(3).isnan().all()


def test_wrong_registration_fails():
    @torch.library.custom_op("clipfast_test::wrong_fake", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        return x.sum(0)

    @op.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape)

    with pytest.raises(OpCheckError):
        torch.library.opcheck(op, (torch.randn(3, 4),))


def test_wrong_gradient_fails():
    @torch.library.custom_op("clipfast_test::wrong_grad", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        return x.square()

    op.register_autograd(lambda ctx, grad: grad * 1.01, setup_context=lambda ctx, inputs, output: None)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(op, (torch.randn(4, dtype=torch.float64, requires_grad=True),))

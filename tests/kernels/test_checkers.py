"""Each checker catches the fault that it exists for: the rule on errors, registration, gradients, poison."""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError
from torch.testing._internal.optests import OpCheckError

from clipfast.kernels.attention.spec import AttentionShape
from clipfast.kernels.contrastive.cases import LossShape

from ..conftest import INTERPRET
from ..numerics import as_good_as_torch, compare
from .conftest import call_at

pytestmark = pytest.mark.skipif(INTERPRET, reason="checks the checkers, once")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@each_dtype
def test_a_value_off_by_two_percent_fails(dtype):
    call = call_at("attention", AttentionShape(2, 50, 2, 16, bias=False), dtype=dtype)
    compare(*call)
    with pytest.raises(AssertionError, match=r"value: (rms|max)"):
        compare(lambda qkv: 1.02 * call.op(qkv), *call[1:])


@each_dtype
def test_a_small_gradient_off_by_two_percent_fails(dtype):
    # Gradients of the loss are about 1 / N: an allowance that is absolute would let anything pass.
    call = call_at("contrastive_loss", LossShape(129, 72), dtype=dtype)

    def wrong(image, text, logit_scale):
        return call.op(image + 0.02 * (image - image.detach()), text, logit_scale)

    with pytest.raises(AssertionError, match=r"d_image: (rms|max)"):
        compare(wrong, *call[1:])


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

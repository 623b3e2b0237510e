"""The sigmoid loss: values and gradients, pairs anywhere or nowhere, extremes, and its logarithm."""

import functools

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from clipfast.kernels import launch, reference, sigmoid_loss
from clipfast.kernels.contrastive import cpu_blocks, triton_blocks
from clipfast.kernels.contrastive.sigmoid_kernels import _log_1p, _probability

from ..conftest import DTYPES, INTERPRET, LEG
from ..numerics import compare, value_and_grads
from .cases import LOSS_SHAPES, loss_inputs, strided

pytestmark = pytest.mark.usefixtures("poison")
ONE = torch.tensor(1.0)


@pytest.fixture(params=[80, 90] if INTERPRET else [0])
def arch(request, monkeypatch):
    """Take the kernels' configurations of sm_80, which load by pointers, and of sm_90, which load by descriptors."""
    if request.param:
        monkeypatch.setattr(launch, "CPU_ARCH", request.param)


def draws(shape):
    """Return how many draws to judge as one: many of few rows, since luck evens out only among many rows."""
    return range(30 if shape[0] < 10 else 2)


def sigmoid_inputs(shape, dtype, device, *, matched=0.3, scale=10.0, bias=-10.0):
    """Return the inputs of the contrastive loss, and a bias."""
    inputs = loss_inputs(shape, dtype, device, matched=matched, scale=scale)
    return {**inputs, "logit_bias": torch.tensor(bias, device=device)}


def in_double(inputs):
    return {name: x.double() for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
@pytest.mark.parametrize(("matched", "scale", "bias"), [(0.0, 10.0, -10.0), (0.3, 110.0, -16.0)], ids=["start", "end"])
def test_value_and_gradients(shape, dtype, matched, scale, bias, device, arch):
    inputs = [sigmoid_inputs(shape, dtype, device, matched=matched, scale=scale, bias=bias) for _ in draws(shape)]
    compare(sigmoid_loss, reference.sigmoid_loss, inputs, ONE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "offset"),
    [(5, 9, 2), (9, 5, -3), (70, 133, 60), (133, 70, -40), (1, 6, 5), (65, 64, -1), (40, 40, 40), (67, 70, -67)],
    ids=str,
)
def test_rectangular(m, n, offset, dtype, device, arch):
    # The last two have no pairs, like the texts of another process.
    inputs = [sigmoid_inputs((m, 24), dtype, device, scale=10.0, bias=-3.0) for _ in draws((m, n))]
    for draw in inputs:
        draw["text"] = F.normalize(torch.randn(n, 24), dim=-1).to(device, dtype)
    ours, expected = (functools.partial(fn, offset=offset) for fn in (sigmoid_loss, reference.sigmoid_loss))
    compare(ours, expected, inputs, ONE)


@pytest.mark.parametrize(
    ("scale", "bias"), [(0.0, 0.0), (1e4, -10.0), (-30.0, 2.0), (10.0, -60.0), (10.0, 1e4)], ids=str
)
def test_extreme_scale_and_bias(scale, bias, device):
    inputs = [sigmoid_inputs((37, 24), torch.float32, device, scale=scale, bias=bias) for _ in range(6)]
    compare(sigmoid_loss, reference.sigmoid_loss, inputs, ONE)


def test_normalize(device):
    inputs = [sigmoid_inputs((45, 24), torch.float32, device) for _ in range(6)]
    for draw in inputs:
        draw["image"] *= 30
        draw["text"] *= 0.1
    ours, expected = (functools.partial(fn, normalize=True) for fn in (sigmoid_loss, reference.sigmoid_loss))
    compare(ours, expected, inputs, ONE)


def test_blocks_add_up(device, arch, monkeypatch):
    inputs = sigmoid_inputs((150, 24), torch.float32, device, matched=0.5)
    expected = value_and_grads(sigmoid_loss, inputs, ONE)
    monkeypatch.setattr(triton_blocks, "STATS_EDGE", 64)
    monkeypatch.setattr(triton_blocks, "_block_edge", lambda x: 64)
    monkeypatch.setattr(cpu_blocks, "CHUNK_ELEMENTS", 17 * 150)
    monkeypatch.setattr(cpu_blocks, "PIECE_ELEMENTS", 4 * 150)
    for name, value in value_and_grads(sigmoid_loss, inputs, ONE).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_texts_in_parts_add_up(device):
    # A process that receives the texts of the others one after the other adds up these losses.
    inputs = sigmoid_inputs((20, 16), torch.float32, device)
    texts = F.normalize(torch.randn(60, 16), dim=-1).to(device)

    def in_parts(image, text, logit_scale, logit_bias):
        own, *others = text.split(20)
        parts = [sigmoid_loss(image, other, logit_scale, logit_bias, offset=20) for other in others]
        return sigmoid_loss(image, own, logit_scale, logit_bias) + sum(parts)

    # All texts at once must give the same. In the first order the own texts come first, so that pairs are (i, i).
    inputs["text"] = texts
    whole = value_and_grads(in_parts, inputs, ONE)
    turned = {**inputs, "text": texts.roll(20, 0)}
    again = value_and_grads(functools.partial(sigmoid_loss, offset=20), turned, ONE)
    again["d_text"] = again["d_text"].roll(-20, 0)
    for name, value in whole.items():
        torch.testing.assert_close(value, again[name], rtol=1e-5, atol=1e-7, msg=name)


def test_value_is_exact(device):
    # At the start of training the loss is a sum of many small terms log(1 + e). If 1 + e were rounded, they would lose
    # digits, and the sum with them.
    inputs = sigmoid_inputs((129, 72), torch.float32, device, matched=0.0)
    ours = value_and_grads(sigmoid_loss, inputs, ONE)
    truth = value_and_grads(reference.sigmoid_loss, in_double(inputs), ONE)
    for name, limit in (("value", 3e-7), ("d_logit_bias", 3e-7), ("d_image", 1e-6), ("d_text", 1e-6)):
        error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < limit, f"{name}: relative error {error:.2e}"


def test_late_training_keeps_every_pair(device):
    # The bias makes all other gradients vanish. What is left is the gradient of the pairs: exact in 16 bits too.
    dtype, grad = DTYPES[-1], torch.tensor(2.0**14)
    inputs = sigmoid_inputs((129, 72), dtype, device, matched=0.9, scale=100.0, bias=-80.0)
    ours = value_and_grads(sigmoid_loss, inputs, grad)
    truth = value_and_grads(reference.sigmoid_loss, in_double(inputs), grad)
    for name in ("d_image", "d_text"):
        size = truth[name].norm(dim=1)
        error = (ours[name].double() - truth[name]).norm(dim=1) / size
        worst = error[size > 1e-3 * size.max()].max()
        assert worst < 1e-2, f"{name}: worst row is off by {worst:.1%}"


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, device):
    inputs = sigmoid_inputs((67, 40), torch.float32, device)
    expected = value_and_grads(sigmoid_loss, inputs, torch.tensor(2.5))
    inputs |= {name: strided(inputs[name], layout) for name in ("image", "text")}
    for name, value in value_and_grads(sigmoid_loss, inputs, torch.tensor(2.5)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_features_are_not_hidden(bad, device):
    inputs = sigmoid_inputs((20, 16), torch.float32, device)
    inputs["image"][3, 5] = bad
    assert not sigmoid_loss(**inputs).isfinite()


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda x: torch.tensor([x])], ids=["float", "scalar", "vector"])
def test_kinds_of_scale_and_bias(kind, device):
    inputs = sigmoid_inputs((20, 16), torch.float32, device)
    expected = sigmoid_loss(**inputs)
    inputs |= {"logit_scale": kind(10.0), "logit_bias": kind(-10.0)}
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    assert torch.equal(sigmoid_loss(**inputs), expected)


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs one program after the other")
def test_same_bits_every_time(device, two_threads):
    inputs = sigmoid_inputs((129, 72), torch.float32, device)
    first = value_and_grads(sigmoid_loss, inputs, ONE)
    for _ in range(5):
        again = value_and_grads(sigmoid_loss, inputs, ONE)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@triton.jit
def _terms_kernel(x_ptr, loss_ptr, probability_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(x_ptr + offs)
    e = tl.exp(-tl.abs(logits))
    tl.store(loss_ptr + offs, tl.maximum(logits, 0.0) + _log_1p(e))
    tl.store(probability_ptr + offs, _probability(logits, e))


@pytest.mark.skipif(LEG == "cpu", reason="tests the kernels' own arithmetic")
def test_terms_keep_their_digits(device):
    # The range reaches from the logits of other rows to those of pairs.
    logits = torch.linspace(-70, 70, 4096, device=device)
    loss, probability = torch.empty_like(logits), torch.empty_like(logits)
    _terms_kernel[(4,)](logits, loss, probability, BLOCK=1024)
    exact = logits.double()
    # A GPU computes exponentials in base 2, where the logit of 70 is rounded by up to 4e-6.
    limit = 5e-7 if INTERPRET else 5e-6
    torch.testing.assert_close(loss.double(), F.softplus(exact, threshold=1e3), rtol=limit, atol=0)
    torch.testing.assert_close(probability.double(), exact.sigmoid(), rtol=limit, atol=0)
    assert loss[0] > 0

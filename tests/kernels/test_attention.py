"""Attention: values and gradients by every kernel, layouts, lengths, extremes."""

import functools

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import attention, attention_qkv, configs, floors, launch, reference
from clipfast.kernels.attention import launches
from clipfast.kernels.configs import ShortConfig

from ..conftest import DTYPES, INTERPRET, LEG
from ..numerics import GRADIENT, as_good_as_torch, compare, value_and_grads
from .cases import ATTENTION_SHAPES, ATTENTION_SIZES, attention_inputs, counted_bytes, huge_strides, strided

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=["short", "looped"] if LEG == "interpreter" else ["auto"])
def kernels(request, monkeypatch):
    """Kernels that hold a head, up to the lengths that they serve, and those that walk it."""
    if request.param == "short":
        by_length = lambda kernel, arch, dtype, head_dim, n: ShortConfig(32, 4, 1) if n <= 272 else None  # noqa: E731
        monkeypatch.setattr(launches, "short_config", by_length)
    elif request.param == "looped":
        monkeypatch.setattr(launches, "short_config", lambda *args: None)


def ops(shape):
    """The op and its reference for ``shape``."""
    options = {"num_heads": shape[2], "causal": shape[4]}
    return functools.partial(attention, **options), functools.partial(reference.attention, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_value_and_gradients(shape, dtype, device, kernels):
    op, expected = ops(shape)
    inputs, grad = attention_inputs(shape, dtype, device)
    compare(op, expected, inputs, grad)


def one_token(head_dim, causal, dtype, device):
    """The output is the value; gradients of query and key are zero, but for the rounding of two sums that cancel."""
    inputs, grad = attention_inputs((3, 1, 1, head_dim, causal), dtype, device)
    q, k, v = inputs["qkv"].chunk(3, dim=-1)
    result = value_and_grads(functools.partial(attention, num_heads=1, causal=causal), inputs, grad)
    dq, dk, dv = result["d_qkv"].chunk(3, dim=-1)
    assert torch.equal(result["value"], v)
    assert torch.equal(dv, grad)
    rounding = torch.finfo(torch.float32).eps * (grad * v).abs().sum(-1, dtype=torch.float32)
    for gradient, other in ((dq, k), (dk, q)):
        assert (gradient.abs().amax(-1) <= rounding * other.abs().amax(-1)).all()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    ("length", "head_dim"),
    [pytest.param(n, d, marks=[] if d == 64 or n in (50, 77) else pytest.mark.slow) for n, d in ATTENTION_SIZES],
)
def test_every_length(length, head_dim, causal, dtype, device, kernels):
    if length == 1:
        one_token(head_dim, causal, dtype, device)
        return
    # the heads lie apart and the gradient is expanded: no layout is easy
    shape = (1, length, 1, head_dim, causal)
    op, expected = ops(shape)
    draws = []
    # of few numbers, PyTorch's largest error is small by chance
    for _ in range(3 if head_dim == 8 else 1):
        inputs, grad = attention_inputs(shape, dtype, device)
        draws.append({"qkv": torch.cat([inputs["qkv"], inputs["qkv"]], -1)[..., : 3 * head_dim]})
    compare(op, expected, draws, grad[:, :, :1].expand(grad.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("m", "n"), [(2, 33), (50, 17), (17, 130)], ids=str)
def test_separate_queries_and_keys(m, n, causal, dtype, device, kernels):
    # every tensor has strides of its own: heads first, heads last, a slice of something wider
    inputs = {
        "q": torch.randn(2, 3, m, 24).transpose(1, 2),
        "k": torch.randn(2, n, 3, 24),
        "v": torch.randn(2, n, 3, 48)[..., ::2],
    }
    grad = torch.randn(2, m, 3, 24).to(device, dtype)
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
    op, expected = (functools.partial(fn, causal=causal) for fn in (attention_qkv, reference.attention_qkv))
    compare(op, expected, inputs, grad)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [50, 70])
def test_lengths_of_images(length, causal, device, kernels):
    seqlens = torch.tensor([length + 5, 1, 0, 37], device=device)
    shape = (4, length, 1, 16, causal)
    op, expected = (functools.partial(fn, seqlens=seqlens) for fn in ops(shape))
    inputs, grad = attention_inputs(shape, torch.float32, device)
    compare(op, expected, inputs, grad)
    result = value_and_grads(op, inputs, grad)
    assert result["value"][2].abs().max() == 0
    assert result["d_qkv"][2].abs().max() == 0
    # what lies behind the end has no influence, not even as NaN
    inputs["qkv"][3, 37:, 16:] = float("nan")
    poisoned = value_and_grads(op, inputs, grad)
    assert torch.equal(poisoned["value"][3, :37], result["value"][3, :37])
    assert poisoned["d_qkv"][3, 37:, 16:].abs().max() == 0


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(scale, device, kernels):
    shape = (2, 50, 2, 16, False)
    op, expected = (functools.partial(fn, scale=scale) for fn in ops(shape))
    inputs, grad = attention_inputs(shape, torch.float32, device)
    compare(op, expected, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 50, 2, 24, False), (2, 77, 1, 80, True), (1, 140, 1, 16, False)], ids=str)
def test_gradient_of_the_bias(shape, dtype, device, kernels):
    inputs, grad = attention_inputs(shape, dtype, device)
    inputs["bias"] = torch.randn(inputs["qkv"].shape[-1]).to(device)
    op, expected = ops(shape)
    plain = value_and_grads(op, {"qkv": inputs["qkv"]}, grad)
    result = value_and_grads(op, inputs, grad)
    assert all(torch.equal(result[name], value) for name, value in plain.items())
    of_q, of_k, of_v = result["d_bias"].chunk(3)
    assert of_k.abs().max() == 0
    truth = value_and_grads(expected, {name: x.double() for name, x in inputs.items()}, grad.double())
    same = value_and_grads(expected, inputs, grad)
    for ours, i in ((of_q, 0), (of_v, 2)):
        # added up in float32 from gradients that are not rounded yet
        as_good_as_torch(ours, same["d_bias"].chunk(3)[i], truth["d_bias"].chunk(3)[i], GRADIENT, f"d_bias {i}")


@pytest.mark.parametrize("size", [30.0, 1e-4], ids=["one-hot", "uniform"])
def test_large_and_small_values(size, device, kernels):
    shape = (1, 77, 1, 64, False)
    op, expected = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float32, device)
    compare(op, expected, {"qkv": inputs["qkv"] * size}, grad)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, causal, device, kernels):
    shape = (2, 70, 2, 32, causal)
    op, _ = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float32, device)
    expected = value_and_grads(op, inputs, grad)
    actual = value_and_grads(op, {"qkv": strided(inputs["qkv"], layout)}, strided(grad, layout))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_expanded_gradient(device, kernels):
    # What loss.sum().backward() sends: one number with every stride 0.
    op, expected = ops((2, 50, 2, 16, False))
    inputs, _ = attention_inputs((2, 50, 2, 16, False), torch.float32, device)
    compare(op, expected, inputs, torch.ones((), device=device).expand(2, 50, 32))


@pytest.mark.parametrize("size", [8.0, 1e-4], ids=["one-hot", "uniform"])
def test_extreme_scores(size, device, kernels):
    shape = (1, 77, 1, 64, True)
    op, expected = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float32, device)
    compare(op, expected, {"qkv": inputs["qkv"] * size}, grad)


def test_keys_beyond_the_end_have_no_weight(device, kernels):
    # Scores far below zero everywhere: padded keys, whose score is 0, would take all the weight if they were let in.
    qkv = torch.zeros(1, 50, 3 * 64, device=device)
    qkv[..., :64], qkv[..., 64:128], qkv[..., 128:] = 10.0, -10.0, 1.0
    result = value_and_grads(
        functools.partial(attention, num_heads=1), {"qkv": qkv}, torch.ones(1, 50, 64, device=device)
    )
    torch.testing.assert_close(result["value"], torch.ones_like(result["value"]))
    assert result["d_qkv"].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 50, 2, 16, False), (3, 0, 2, 16, True)], ids=["no images", "no tokens"])
def test_empty(shape, device, kernels):
    op, _ = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float32, device)
    result = value_and_grads(op, inputs, grad)
    assert result["value"].shape == grad.shape
    assert result["d_qkv"].shape == inputs["qkv"].shape


@pytest.mark.skipif(LEG == "cpu", reason="PyTorch's is the only route on a CPU")
def test_pytorch_serves_what_the_table_says(device, monkeypatch):
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or sdpa(*args, **kw))
    key = configs.config_key("attention_sdpa", torch.float32, 16)
    with configs.override(key, configs.SdpaConfig(min_keys=50, min_keys_causal=51)):
        for length, causal, expected in ((50, False, 1), (49, False, 0), (50, True, 0), (51, True, 1)):
            calls.clear()
            shape = (2, length, 2, 16, causal)
            inputs, grad = attention_inputs(shape, torch.float32, device)
            op, reference_op = ops(shape)
            compare(op, reference_op, inputs | {"bias": torch.randn(96, device=device)}, grad)
            assert len(calls) == expected
        calls.clear()
        attention(inputs["qkv"], 2, causal=True, backend="triton")
        attention(inputs["qkv"], 2, causal=True, seqlens=torch.tensor([3, 4], device=device))
        assert not calls


@pytest.mark.skipif(not INTERPRET, reason="a GPU has its own architecture")
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("shape", [(1, 77, 1, 64, True), (1, 65, 1, 80, False)], ids=str)
def test_configurations_of_other_architectures(shape, arch, device, monkeypatch):
    monkeypatch.setattr(launch, "CPU_ARCH", arch)
    op, expected = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float16, device)
    compare(op, expected, inputs, grad)


def test_scores_of_minus_infinity(device, kernels):
    # A whole first tile without weight: its maximum minus itself must not become NaN.
    qkv = torch.randn(1, 70, 3 * 16, device=device)
    qkv[..., :16].abs_()
    qkv[:, :40, 16:32] = float("-inf")
    op, expected = ops((1, 70, 1, 16, False))
    as_good_as_torch(op(qkv), expected(qkv), expected(qkv.double()), 2.0, "value")


@pytest.mark.skipif(not INTERPRET, reason="of the kernels' own addressing")
def test_offsets_beyond_32_bits(kernels):
    qkv = huge_strides((2, 5, 48))
    values = torch.randn(2, 5, 48).half()
    qkv.copy_(values)
    torch.testing.assert_close(attention(qkv, 2), attention(values, 2))


def test_causal_ignores_the_future(device, kernels):
    op, _ = ops((1, 77, 2, 32, True))
    inputs, _ = attention_inputs((1, 77, 2, 32, True), torch.float32, device)
    changed = inputs["qkv"].clone()
    changed[:, 40:] = 9.0
    assert torch.equal(op(**inputs)[:, :40], op(changed)[:, :40])


def test_nan_stays_in_its_image(device, kernels):
    op, _ = ops((2, 20, 1, 16, False))
    inputs, _ = attention_inputs((2, 20, 1, 16, False), torch.float32, device)
    inputs["qkv"][0, 3, 20] = float("nan")
    out = op(**inputs)
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("shape", [(2, 50, 3, 64, False), (1, 77, 2, 80, True), (1, 257, 1, 16, False)], ids=str)
@pytest.mark.parametrize("kernels", ["short"], indirect=True)
def test_whole_heads_are_read_and_written_once(shape, device, kernels, monkeypatch):
    moved = counted_bytes(monkeypatch)
    batch, length, heads, head_dim, causal = shape
    inputs, grad = attention_inputs(shape, torch.float16, device)
    qkv = inputs["qkv"].requires_grad_()
    op, _ = ops(shape)
    sizes = (batch, length, heads, head_dim, qkv.element_size())
    log_sums = 4 * batch * heads * length
    out = op(qkv)
    assert sum(moved) == floors.attention_floor(*sizes, causal=causal, backward=False).bytes + log_sums
    out.backward(grad)
    assert sum(moved) == floors.attention_floor(*sizes, causal=causal, backward=True).bytes + 2 * log_sums


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs one program after the other")
def test_same_bits_every_time(device, two_threads):
    shape = (2, 77, 2, 64, True)
    op, _ = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float32, device)
    first = value_and_grads(op, inputs, grad)
    for _ in range(5):
        again = value_and_grads(op, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())

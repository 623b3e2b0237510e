"""Attention pooling: values and gradients, and the ResNets' pool against the projections of every token."""

import functools

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import attention_pool, reference
from clipfast.models.resnet import AttentionPool2d

from ..conftest import DTYPES
from ..numerics import compare, value_and_grads
from .cases import strided

pytestmark = pytest.mark.usefixtures("poison")


def inputs_of(shape, dtype, device):
    batch, heads, tokens, width = shape
    query = torch.randn(batch, heads, width) / width**0.5
    x = torch.randn(batch, tokens, width)
    grad = torch.randn(batch, heads, width).to(device, dtype)
    return {"query": query.to(device, dtype), "tokens": x.to(device, dtype)}, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 8), (2, 3, 50, 72), (2, 32, 50, 128), (1, 40, 82, 40), (1, 3, 577, 24)], ids=str
)
def test_value_and_gradients(shape, dtype, device):
    inputs, grad = inputs_of(shape, dtype, device)
    compare(attention_pool, reference.attention_pool, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(dtype, device):
    # none, one, some, all, and more than there are; what is beyond must not count, whatever it is
    inputs, grad = inputs_of((5, 3, 17, 24), dtype, device)
    seqlens = torch.tensor([0, 1, 9, 17, 99], device=device)
    inputs["tokens"][2, 9:] = float("inf")
    ours, plain = (functools.partial(op, seqlens=seqlens) for op in (attention_pool, reference.attention_pool))
    compare(ours, plain, inputs, grad)
    result = value_and_grads(ours, inputs, grad)
    assert not result["value"][0].any()
    assert not result["d_query"][0].any()
    assert not result["d_tokens"][2, 9:].any()
    cut = {"query": inputs["query"][2:3], "tokens": inputs["tokens"][2:3, :9]}
    expected = value_and_grads(attention_pool, cut, grad[2:3])
    torch.testing.assert_close(result["value"][2:3], expected["value"])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, device):
    inputs, grad = inputs_of((2, 3, 17, 24), torch.float32, device)
    inputs = {name: strided(x, layout) for name, x in inputs.items()}
    compare(attention_pool, reference.attention_pool, inputs, grad[:, :1].expand(grad.shape))


def test_folding_the_projections_changes_nothing(device):
    pool = AttentionPool2d(3, 32, 4, 24).double()
    for bias in (pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias):
        torch.nn.init.normal_(bias)
    images = torch.randn(2, 32, 3, 3, dtype=torch.float64)
    x = images.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding
    q, k, v = (
        layer(t).unflatten(-1, (4, -1)).transpose(1, 2)
        for layer, t in ((pool.q_proj, x[:, :1]), (pool.k_proj, x), (pool.v_proj, x))
    )
    every_token = pool.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
    pool.backend = "torch"
    result = pool(images)
    torch.testing.assert_close(result, every_token, rtol=1e-12, atol=1e-12)
    # none, and DistributedDataParallel would wait for it
    result.sum().backward()
    assert pool.k_proj.bias.grad.abs().max() == 0

"""Attention pooling: lengths, the ResNets' pool against the projections of every token, and its own errors."""

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import attention_pool
from clipfast.kernels.attention_pool.spec import PoolShape
from clipfast.models.resnet import AttentionPool2d

from ..conftest import DTYPES
from ..numerics import compare
from .conftest import call_at

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_behind_the_end_counts(dtype, device):
    # none, one, some, all, and more than there are, which 32 bits would not hold
    seqlens = torch.tensor([0, 1, 9, 17, 2**63 - 1], device=device)
    call = call_at("attention_pool", PoolShape(5, 3, 17, 24), device, dtype, seqlens=seqlens)
    call.inputs["tokens"][2, 9:] = float("inf")
    compare(*call)
    result = call.results()
    assert not result["value"][0].any()
    assert not result["d_query"][0].any()
    assert not result["d_tokens"][2, 9:].any()


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


X = torch.zeros(1, 4, 8)


@pytest.mark.parametrize(
    ("tokens", "seqlens", "message"),
    [
        (X[..., :5], None, r"tokens \[B, N, C\] with at least one token, got \(1, 4, 8\) and \(1, 4, 5\)"),
        (X[:, :0], None, "at least one token"),
        (torch.zeros(1, 1100, 8), None, "at most 64 queries and 1024 tokens, got 4 and 1100"),
        (X, torch.ones(2, dtype=torch.int64), r"seqlens must be \[1\] on cpu, got \(2,\) on cpu"),
    ],
)
def test_errors(tokens, seqlens, message):
    with pytest.raises(ValueError, match=f"^attention_pool: .*{message}"):
        attention_pool(X, tokens, seqlens=seqlens)

"""Test attention pooling beyond its cases: lengths of sequences, and errors."""

import pytest
import torch

from clipfast.kernels import attention_pool
from clipfast.kernels.attention_pool.spec import PoolShape

from ..conftest import DTYPES
from ..numerics import compare
from .conftest import call_at

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_behind_the_end_counts(dtype, device):
    # Lengths: no token, one, some, all 17, and a number above 17 that does not fit into 32 bits.
    seqlens = torch.tensor([0, 1, 9, 17, 2**63 - 1], device=device)
    call = call_at("attention_pool", PoolShape(5, 3, 17, 24), device, dtype, seqlens=seqlens)
    call.inputs["tokens"][2, 9:] = float("inf")
    compare(*call)
    result = call.results()
    assert not result["value"][0].any()
    assert not result["d_query"][0].any()
    assert not result["d_tokens"][2, 9:].any()


X = torch.zeros(1, 4, 8)


@pytest.mark.parametrize(
    ("tokens", "seqlens", "message"),
    [
        (X[..., :5], None, r"got \(1, 4, 8\) and \(1, 4, 5\)"),
        (X[:, :0], None, "at least one token"),
        (torch.zeros(1, 1100, 8), None, "got 4 and 1100"),
        (X, torch.ones(2, dtype=torch.int64), r"seqlens must be \[1\]"),
    ],
)
def test_errors(tokens, seqlens, message):
    with pytest.raises(ValueError, match=f"^attention_pool: .*{message}"):
        attention_pool(X, tokens, seqlens=seqlens)

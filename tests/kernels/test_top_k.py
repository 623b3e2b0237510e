"""Test top_k beyond its cases: the right items in the right order, ties, independent queries, autocast, errors."""

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import top_k
from clipfast.kernels.top_k.cpu import GROUP, best_places
from clipfast.kernels.top_k.spec import SearchShape

from ..conftest import DTYPES
from .conftest import call_at

pytestmark = pytest.mark.usefixtures("poison")


def same(ours, expected):
    """Return whether two results of top_k are equal."""
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 40])
def test_features_of_any_value(k, dtype, device):
    # Rounding may decide the order of nearly equal scores, so an item may replace one with a slightly higher score.
    query, items = (F.normalize(torch.randn(n, 96), dim=-1).to(device, dtype) for n in (33, 411))
    scores, indices = top_k(query, items, k)
    exact = query.double() @ items.double().T
    torch.testing.assert_close(scores.double(), exact.sort(dim=1, descending=True).values[:, :k], atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.double(), exact.gather(1, indices), atol=1e-6, rtol=0)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("best", [0, GROUP - 1, GROUP, 200])
def test_the_best_item_anywhere(best, device):
    items = torch.zeros(201, 4, device=device)
    items[best], items[(best + 101) % 201] = 2.0, 1.0
    assert top_k(torch.ones(1, 4, device=device), items, 2)[1].tolist() == [[best, (best + 101) % 201]]


def test_all_of_the_best_in_one_group(device):
    items = torch.ones(10 * GROUP, 1, device=device)
    items[3 * GROUP : 4 * GROUP] = torch.arange(2.0, 2.0 + GROUP, device=device)[:, None]
    found = top_k(torch.ones(1, 1, device=device), items, GROUP + 2)[1]
    assert found.tolist() == [[*range(4 * GROUP - 1, 3 * GROUP - 1, -1), 0, 1]]


def test_the_first_of_equal_scores():
    scores = torch.randint(0, 3, (40, 50)).float()
    scores[scores == 0] = float("-inf")
    for k in (1, 13, 49, 50):
        expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(best_places(scores, k), expected)


def test_queries_do_not_depend_on_each_other(device):
    op, _, inputs, _ = call_at("top_k", SearchShape(9, 500, 24), device)
    together = op(**inputs)
    for row in range(9):
        alone = op(**inputs | {"query": inputs["query"][row : row + 1]})
        assert same(alone, [x[row : row + 1] for x in together])


def test_autocast_changes_nothing(device):
    # In bfloat16 these two scores would tie.
    items = torch.tensor([[1.0], [1.001]], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert top_k(torch.ones(1, 1, device=device), items, 2)[1].tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 0}, "k .*got 0"),
        ({"k": 2.0}, "k .*got 2.0"),
        ({"k": True}, "k .*got True"),
        ({"items": torch.zeros(5, 4)}, "same width"),
        ({"items": torch.zeros(5)}, "items .*2 dimensions"),
        ({"allowed": torch.ones(4, dtype=torch.bool)}, r"allowed must be a bool tensor \[5\]"),
        ({"allowed": torch.ones(5)}, "allowed .*got torch.float32"),
        ({"allowed": [True] * 5}, "allowed .*got list"),
    ],
    ids=str,
)
def test_wrong_input(changed, message):
    with pytest.raises((ValueError, TypeError), match=f"top_k: .*{message}"):
        top_k(**{"query": torch.zeros(2, 3), "items": torch.zeros(5, 3), "k": 1} | changed)

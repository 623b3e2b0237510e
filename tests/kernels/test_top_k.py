"""The search: the right items in the right order, ties, and what no case of the specification has."""

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import reference, top_k
from clipfast.kernels.spec import Draw, specs
from clipfast.kernels.top_k.select import GROUP, best_places
from clipfast.kernels.top_k.spec import SearchShape

from ..conftest import DTYPES
from .conftest import leaves_of

pytestmark = pytest.mark.usefixtures("poison")


def inputs_at(shape, device, values=""):
    call = specs()["top_k"].call(shape, values, Draw(3, device), torch.float32)
    return call.inputs | call.options


def same(ours, expected):
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_by_hand(device):
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0]], device=device)
    items = torch.tensor([[0.5, 1.0], [0.9, 0.25], [0.5, -1.0]], device=device)
    scores, indices = top_k(query, items, 2)
    assert scores.tolist() == [[pytest.approx(0.9), 0.5], [2.0, 0.5]]
    assert indices.tolist() == [[1, 0], [0, 1]]
    scores, indices = top_k(query, items, 2, allowed=torch.tensor([False, True, False], device=device))
    assert scores.tolist() == [[pytest.approx(0.9), float("-inf")], [0.5, float("-inf")]]
    assert indices.tolist() == [[1, -1], [1, -1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 40])
def test_features_of_any_value(k, dtype, device):
    # Where rounding decides, an item may take the place of one that is a little better.
    query, items = (F.normalize(torch.randn(n, 96), dim=-1).to(device, dtype) for n in (33, 411))
    scores, indices = top_k(query, items, k)
    exact = query.double() @ items.double().T
    torch.testing.assert_close(scores.double(), exact.sort(dim=1, descending=True).values[:, :k], atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.double(), exact.gather(1, indices), atol=1e-6, rtol=0)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("best", [0, GROUP - 1, GROUP, 3 * GROUP, 200])
def test_the_best_item_anywhere(best, device):
    items = torch.zeros(201, 4, device=device)
    items[best], items[(best + 101) % 201] = 2.0, 1.0
    assert top_k(torch.ones(1, 4, device=device), items, 2)[1].tolist() == [[best, (best + 101) % 201]]


def test_all_of_the_best_in_one_group(device):
    items = torch.ones(10 * GROUP, 1, device=device)
    items[3 * GROUP : 4 * GROUP] = torch.arange(2.0, 2.0 + GROUP, device=device)[:, None]
    found = top_k(torch.ones(1, 1, device=device), items, GROUP + 2)[1]
    assert found.tolist() == [[*range(4 * GROUP - 1, 3 * GROUP - 1, -1), 0, 1]]


@pytest.mark.parametrize("seed", range(8))
def test_the_first_of_equal_scores(seed):
    torch.manual_seed(seed)
    scores = torch.randint(0, 3, (5, 50)).float()
    scores[scores == 0] = float("-inf")
    for k in (1, 13, 49, 50):
        expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(best_places(scores, k), expected)


def test_queries_do_not_depend_on_each_other(device):
    inputs = inputs_at(SearchShape(9, 500, 24), device)
    together = top_k(**inputs)
    for row in range(9):
        alone = top_k(**inputs | {"query": inputs["query"][row : row + 1]})
        assert same(alone, [x[row : row + 1] for x in together])


def test_features_that_require_gradients(device):
    inputs = inputs_at(SearchShape(7, 110, 6, 3), device)
    expected = top_k(**inputs)
    tensors = {name: x for name, x in inputs.items() if name != "k"}
    for backend in ("auto", "torch"):
        found = top_k(**leaves_of(tensors), k=3, backend=backend)
        assert same(found, expected)
        assert not any(x.requires_grad for x in found)


def test_autocast_changes_nothing(device):
    # In bfloat16 these would tie.
    items = torch.tensor([[1.0], [1.001]], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert top_k(torch.ones(1, 1, device=device), items, 2)[1].tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"k": 2.0}, "k must be an integer of at least 1, got 2.0"),
        ({"k": True}, "k must be an integer of at least 1, got True"),
        ({"items": torch.zeros(5, 4)}, r"must have the same width, got \(2, 3\) and \(5, 4\)"),
        ({"items": torch.zeros(5)}, r"items must have 2 dimensions, got shape \(5,\)"),
        ({"items": torch.zeros(5, 3).half()}, "items is float16, but query is float32"),
        ({"query": torch.zeros(2, 3).long()}, "query must be one of"),
        ({"allowed": torch.ones(4, dtype=torch.bool)}, r"allowed must be a bool tensor \[5\], one per item, got"),
        ({"allowed": torch.ones(5)}, r"allowed must be a bool tensor \[5\], one per item, got torch.float32"),
        ({"allowed": [True] * 5}, r"allowed must be a bool tensor \[5\], one per item, got list"),
        ({"backend": "numpy"}, "backend must be one of auto, triton, torch, got 'numpy'"),
    ],
    ids=str,
)
def test_wrong_input(changed, message):
    with pytest.raises((ValueError, TypeError), match=f"top_k: .*{message}"):
        top_k(**{"query": torch.zeros(2, 3), "items": torch.zeros(5, 3), "k": 1} | changed)


def test_compiled(device):
    inputs = inputs_at(SearchShape(7, 110, 6, 3), device)
    found = torch.compile(top_k, fullgraph=True, backend="aot_eager")(**inputs)
    assert same(found, reference.top_k(**inputs))

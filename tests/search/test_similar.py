"""Pairs of similar features: edges of blocks, ties, thresholds that are met exactly, and groups of chains."""

import pytest
import torch
import torch.nn.functional as F

from clipfast.search import similar
from clipfast.search.similar import linked, similar_pairs


def brute_force(features, threshold):
    """All pairs by the whole matrix of cosines, in float64."""
    x = features.double()
    gram = x @ x.T
    cosines = gram / (gram.diagonal()[:, None] * gram.diagonal()).sqrt()
    return ((cosines >= threshold).triu(1)).nonzero().tolist()


def planted(count, width=16, seed=0, dtype=torch.float32):
    """Features of which some are equal, some scaled, and some nearly equal, in all parts."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=random)
    sources, targets = torch.randint(0, count, (2, count // 3), generator=random)
    noise = torch.randn(len(sources), width, generator=random) * torch.linspace(0, 0.5, len(sources))[:, None]
    x[targets] = x[sources] * torch.rand(len(sources), 1, generator=random).add(0.5) + noise
    return F.normalize(x, dim=1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 23, 24, 25, 100])
def test_equal_to_brute_force_at_every_edge_of_blocks(count, dtype, monkeypatch):
    monkeypatch.setattr(similar, "ROWS", 24)
    monkeypatch.setattr(similar, "COLUMNS", 8)
    monkeypatch.setattr(similar, "RESCORED", 100)
    features = planted(count, dtype=dtype)
    for threshold in (0.2, 0.9, 0.99):
        found = similar_pairs(features, threshold)
        assert found.places.tolist() == brute_force(features, threshold)
        assert (found.similarity >= threshold).all()


def test_a_threshold_that_is_met_exactly():
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [3.0, 4.0]])  # cosines of 0.6, 0.8 and 1
    assert similar_pairs(x, 0.8).places.tolist() == [[1, 2], [1, 3], [2, 3]]
    assert similar_pairs(x, 0.8 + 1e-12).places.tolist() == [[1, 3]]
    assert similar_pairs(x, 0.6).similarity.tolist() == [0.6, 0.6, 0.8, 1.0, 0.8]


def test_equal_features_have_a_similarity_of_one():
    x = F.normalize(torch.randn(50, 512), dim=1).half().repeat(2, 1)
    found = similar_pairs(x, 1.0)
    assert found.places.tolist() == [[i, i + 50] for i in range(50)]
    assert (found.similarity == 1).all()


def test_products_in_bfloat16_change_nothing():
    features, before = planted(200), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = similar_pairs(features, 0.9).places.tolist()
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == brute_force(features, 0.9)


def test_too_many_pairs(monkeypatch):
    monkeypatch.setattr(similar, "MOST_PAIRS", 3)
    with pytest.raises(ValueError, match=r"more than 3 pairs have a similarity of 0.5 or more: raise the threshold"):
        similar_pairs(torch.ones(4, 2), 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_random_pairs_and_of_a_chain(seed):
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    random = torch.Generator().manual_seed(seed)
    pairs, chain = torch.randint(0, 300, (170, 2), generator=random), torch.randperm(2000, generator=random) + 300
    pairs = torch.cat([pairs, torch.stack([chain[:-1], chain[1:]], 1)])
    _, expected = connected_components(coo_matrix((torch.ones(len(pairs)), pairs.T.numpy()), (2300, 2300)), False)
    first = {}
    assert linked(pairs, 2300).tolist() == [
        first.setdefault(group, place) for place, group in enumerate(expected.tolist())
    ]
    assert linked(pairs[:0], 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("features", "threshold", "message"),
    [
        (torch.tensor([[1.0], [float("nan")]]), 0.5, r"feature 1 contains NaN or infinity \(1 of 2 "),
        (torch.tensor([[1.0], [0.0]]), 0.5, r"feature 1 has no length \(1 of 2 "),
        (torch.ones(3), 0.5, r"must be \[N, D\] of floats, got \[3\]"),
        (torch.ones(3, 2).long(), 0.5, "of torch.int64"),
        (torch.ones(3, 2), 1.5, "from -1 to 1, got 1.5"),
        (torch.ones(3, 2), float("nan"), "from -1 to 1, got nan"),
    ],
)
def test_wrong_input(features, threshold, message):
    with pytest.raises(ValueError, match=message):
        similar_pairs(features, threshold)

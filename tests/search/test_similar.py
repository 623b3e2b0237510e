"""Search for pairs of similar features: edges of blocks, ties, and cosines that equal the threshold."""

import pytest
import torch
import torch.nn.functional as F

from clipfast.cli.filter import best_share
from clipfast.search import similar
from clipfast.search.similar import cosines, similar_pairs


def brute_force(features, threshold):
    """Return all similar pairs by the whole matrix of their features' cosines, in float64."""
    x = features.double()
    gram = x @ x.T
    return (gram / (gram.diagonal()[:, None] * gram.diagonal()).sqrt() >= threshold).triu(1).nonzero().tolist()


def planted(count, dtype=torch.float32):
    """Return features of which each is similar to another one: equal up to its length, or nearly so."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count // 2 + 1, 16, generator=random).repeat(2, 1)[:count]
    noise = 0.5 * torch.randn(count, 16, generator=random) * torch.linspace(0, 1, count)[:, None]
    return ((x + noise) * torch.linspace(1, 2, count)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_equal_to_brute_force_at_every_edge_of_blocks(dtype, monkeypatch):
    for name, size in (("ROWS", 24), ("COLUMNS", 8), ("RESCORED", 100)):
        monkeypatch.setattr(similar, name, size)
    for count in (1, 2, 7, 8, 9, 23, 24, 25, 100):
        features = planted(count, dtype)
        for threshold in (0.2, 0.9, 0.99):
            found = similar_pairs(features, threshold)
            assert found.places.tolist() == brute_force(features, threshold)
            assert (found.similarity >= threshold).all()


def test_a_threshold_that_is_met_exactly():
    # The cosines of these features are 0.6, 0.8 and 1.
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [3e-30, 4e-30]])
    assert similar_pairs(x, 0.8).places.tolist() == [[1, 2], [1, 3], [2, 3]]
    assert similar_pairs(x, 0.8 + 1e-12).places.tolist() == [[1, 3]]
    x = F.normalize(torch.randn(50, 512), dim=1).half().repeat(2, 1)
    assert similar_pairs(x, 1.0).places.tolist() == [[i, i + 50] for i in range(50)]


def test_products_in_bfloat16_change_nothing():
    features, before = planted(200), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = similar_pairs(features, 0.9).places.tolist()
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == brute_force(features, 0.9)


def test_too_many_pairs_and_features_without_direction(monkeypatch):
    monkeypatch.setattr(similar, "MOST_PAIRS", 3)
    for features, message in (
        (torch.ones(4, 2), "more than 3 pairs have a similarity of 0.5 or more: raise the threshold"),
        (torch.tensor([[1.0], [float("nan")]]), "feature 1 contains NaN or infinity"),
        (torch.tensor([[1.0], [0.0]]), "feature 1 has no length"),
    ):
        with pytest.raises(ValueError, match=message):
            similar_pairs(features, 0.5)


def test_the_best_share_of_pairs_is_rounded_up_and_takes_the_first_of_equal_scores():
    images, texts = torch.randn(2, 100, 8)
    scores = cosines(images, texts)
    torch.testing.assert_close(scores, torch.cosine_similarity(images.double(), texts.double()))
    for top, count in ((0.07, 7), (0.29, 29), (0.001, 1), (0.305, 31), (1.0, 100)):
        assert best_share(scores, top).nonzero().squeeze(1).tolist() == sorted(scores.argsort()[-count:].tolist())
    assert best_share(torch.tensor([0.5, 0.25, 0.5, 0.5]), 0.5).tolist() == [True, False, True, False]

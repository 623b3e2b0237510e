"""Exact nearest neighbours of features, without the whole similarity matrix."""

import math

import pytest
import torch

from clipfast.evaluate import neighbours
from clipfast.evaluate.neighbours import nearest


def test_the_best_are_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(neighbours, "QUERIES", 13)
    for queries, gallery, k in ((50, 300, 1), (7, 101, 10), (33, 5, 5), (1, 1, 1)):
        x, y = torch.randn(queries, 24), torch.randn(gallery, 24)
        scores, places = nearest(x, y, k)
        expected = (x @ y.T).topk(k, dim=1)
        torch.testing.assert_close(scores, expected.values, rtol=1e-5, atol=1e-5)
        assert torch.equal(places, expected.indices)
    assert nearest(x, y, 5)[1].shape == (1, 1)  # the gallery has one item, fewer than k = 5
    assert nearest(x[:0], y)[0].shape == (0, 1)


def test_features_that_are_no_numbers_are_refused():
    good = torch.rand(40, 3) + 0.1
    for value in (math.nan, -math.inf):
        bad = good.clone()
        bad[30, 1] = value
        for queries, gallery in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match="features contain NaN or infinity"):
                nearest(queries, gallery)

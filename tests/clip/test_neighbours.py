"""Exact nearest neighbours without the whole matrix."""

import math

import pytest
import torch

from clipfast.evaluation import neighbours
from clipfast.evaluation.neighbours import nearest


@pytest.mark.parametrize(("queries", "gallery", "k"), [(50, 300, 1), (7, 101, 10), (33, 5, 5), (1, 1, 1), (20, 64, 64)])
def test_the_best_are_those_of_the_whole_matrix(queries, gallery, k, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERIES", 13)
    x, y = torch.randn(queries, 24), torch.randn(gallery, 24)
    scores, places = nearest(x, y, k)
    expected = (x @ y.T).topk(k, dim=1)
    torch.testing.assert_close(scores, expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(places, expected.indices)


def test_fewer_items_than_wanted_and_none():
    assert nearest(torch.ones(2, 3), torch.ones(2, 3), 5)[1].shape == (2, 2)
    assert nearest(torch.ones(0, 3), torch.ones(2, 3))[0].shape == (0, 1)


def test_progress_sees_each_block(monkeypatch):
    monkeypatch.setattr(neighbours, "QUERIES", 16)
    seen = []

    def progress(blocks):
        for block in blocks:
            seen.append(len(block))
            yield block

    nearest(torch.randn(40, 3), torch.randn(9, 3), progress=progress)
    assert seen == [16, 16, 8]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_no_numbers_are_refused(value):
    good, bad = torch.rand(40, 3) + 0.1, torch.rand(40, 3) + 0.1
    bad[30, 1] = value
    with pytest.raises(ValueError, match="features contain NaN or infinity"):
        nearest(bad, good)
    with pytest.raises(ValueError, match="features contain NaN or infinity"):
        nearest(good, bad)

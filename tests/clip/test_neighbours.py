"""Exact nearest neighbours without the whole matrix."""

import math

import pytest
import torch

from clipfast.evaluation import neighbours
from clipfast.evaluation.neighbours import nearest


@pytest.mark.parametrize(("queries", "gallery", "k"), [(50, 300, 1), (7, 101, 10), (33, 5, 5), (1, 1, 1), (20, 64, 64)])
def test_the_best_are_those_of_the_whole_matrix(queries, gallery, k, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERIES", 13)
    monkeypatch.setattr(neighbours, "GALLERY", 32)
    x, y = torch.randn(queries, 24), torch.randn(gallery, 24)
    scores, places = nearest(x, y, k)
    expected = (x @ y.T).topk(k, dim=1)
    torch.testing.assert_close(scores, expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(places, expected.indices)


def test_rising_and_falling_similarities_are_all_seen(monkeypatch):
    """The best come in the last block, or in the first: what a block adds must be neither lost nor taken twice."""
    monkeypatch.setattr(neighbours, "GALLERY", 16)
    rising = torch.arange(100.0)[:, None]
    for sign in (1, -1):
        scores, places = nearest(torch.tensor([[1.0], [-1.0]]), sign * rising, 3)
        best, worst = [99, 98, 97], [0, 1, 2]
        assert places.tolist() == ([best, worst] if sign == 1 else [worst, best])
        assert torch.equal(scores, torch.tensor([[1.0], [-1.0]]) * sign * rising[places][..., 0])


def test_a_tie_takes_each_item_once(monkeypatch):
    monkeypatch.setattr(neighbours, "GALLERY", 4)
    scores, places = nearest(torch.ones(2, 3), torch.ones(11, 3), 6)
    assert scores.unique().tolist() == [3.0]
    assert all(len(set(row)) == 6 for row in places.tolist())


def test_fewer_items_than_wanted_and_none():
    assert nearest(torch.ones(2, 3), torch.ones(2, 3), 5)[1].shape == (2, 2)
    assert nearest(torch.ones(0, 3), torch.ones(2, 3))[0].shape == (0, 1)


def test_only_a_block_of_similarities_is_held(monkeypatch):
    monkeypatch.setattr(neighbours, "QUERIES", 16)
    monkeypatch.setattr(neighbours, "GALLERY", 32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for one in result if isinstance(result, tuple | list) else [result]:
                if isinstance(one, torch.Tensor) and not one._is_view():
                    largest = max(largest, one.numel())
            return result

    x, y = torch.randn(200, 2), torch.randn(3000, 2)
    with Watch():
        nearest(x, y, 3)
    assert 16 * 32 <= largest <= 200 * 3  # the latter is what the results take


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
    if value != -math.inf:  # which is never nearest
        with pytest.raises(ValueError, match="features contain NaN or infinity"):
            nearest(good, bad)


def test_shapes_and_counts_that_cannot_be():
    with pytest.raises(ValueError, match=r"must be \[N, D\] and \[M, D\], got \[2, 3\] and \[2, 4\]"):
        nearest(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        nearest(torch.ones(2, 3), torch.ones(2, 3), 0)

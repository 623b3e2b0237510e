"""Scores of pairs, and which are kept: shares, ties, and what cannot be scored."""

import pytest
import torch

from clipfast.search import filtering
from clipfast.search.filtering import chosen, pair_scores


def test_scores_are_cosines_in_any_blocks(monkeypatch):
    images, texts = torch.randn(2, 23, 8)
    expected = torch.cosine_similarity(images.double(), texts.double()).float()
    monkeypatch.setattr(filtering, "BLOCK", 5)
    torch.testing.assert_close(pair_scores(images, texts), expected)
    torch.testing.assert_close(pair_scores(images.half(), texts.half()), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("top", "count"), [(0.07, 7), (0.29, 29), (0.001, 1), (0.305, 31), (1.0, 100)])
def test_a_share_of_the_pairs(top, count):
    scores = torch.randn(100)
    kept = chosen(scores, top=top)
    assert int(kept.sum()) == count
    assert count == 100 or scores[kept].min() >= scores[~kept].max()


def test_ties_and_the_least_score():
    scores = torch.tensor([0.5, 0.25, 0.5, 0.5])
    assert chosen(scores, top=0.5).tolist() == [True, False, True, False]
    assert chosen(scores, min_score=0.5).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    "options", [{}, {"top": 0.1, "min_score": 0.1}, {"top": 0.0}, {"top": 1.1}, {"min_score": float("nan")}]
)
def test_wrong_choice(options):
    with pytest.raises(ValueError, match=r"score|share"):
        chosen(torch.ones(3), **options)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_pair_that_cannot_be_scored(value):
    images = torch.ones(3, 2)
    images[1] = value
    with pytest.raises(ValueError, match="pair 1 has a feature with NaN or infinity, or without length"):
        pair_scores(images, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"must both be \[N, D\], got \[3, 2\] and \[2, 2\]"):
        pair_scores(images, torch.ones(2, 2))

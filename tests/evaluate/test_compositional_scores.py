"""Compositional scores: the captions that a model prefers, by definition, and captions with shuffled words."""

import pytest
import torch
import torch.nn.functional as F

from clipfast.evaluate.compositional_scores import (
    SHUFFLES,
    Case,
    by_group,
    by_wrong,
    figures,
    judge,
    mean_of_groups,
    order_case,
    shuffled,
)
from clipfast.evaluate.pages import chosen


def scored(cases, features, captions):
    """Judge compositional cases by random features of images and captions."""
    texts = {text: row for row, text in enumerate(dict.fromkeys(text for case in cases for text in case.captions))}
    rows = {image: image for case in cases for image in case.images}
    return judge(cases, features, rows, texts, captions[: len(texts)])


def drawn(count, captions):
    """Return compositional cases: ``count`` of one image and ``captions`` captions, ``count`` of two images and two."""
    ones = [Case(f"{n}", (n,), tuple(f"{n} {k}" for k in range(captions))) for n in range(count)]
    twos = [Case(f"{n}", (2 * n, 2 * n + 1), (f"{n} a", f"{n} b")) for n in range(count)]
    return ones, twos


def unit(*size):
    """Return random features of unit length for compositional scores."""
    return F.normalize(torch.randn(*size), dim=-1)


@pytest.mark.parametrize("captions", [2, 5])
def test_one_image_a_random_model_scores_chance_a_perfect_one_all_and_a_constant_one_nothing(captions):
    cases, _ = drawn(2000, captions)
    features = unit(2000, 32)
    found = figures(scored(cases, features, unit(2000 * captions, 32)))
    assert found["chance"] == {"acc": 1 / captions}
    assert found["metrics"]["acc"] == pytest.approx(1 / captions, abs=0.05)
    right = unit(2000 * captions, 32)
    right[::captions] = features
    assert figures(scored(cases, features, right))["metrics"] == {"acc": 1.0}
    assert figures(scored(cases, features, unit(1, 32).expand(2000 * captions, -1)))["metrics"] == {"acc": 0.0}


def test_two_images_the_same():
    _, cases = drawn(3000, 2)
    features, texts = unit(6000, 64), unit(6000, 64)
    found = figures(scored(cases, features, texts))
    assert found["chance"] == {"text_acc": 1 / 4, "image_acc": 1 / 4, "acc": 1 / 6}
    assert found["metrics"] == pytest.approx(found["chance"], abs=0.04)
    assert set(figures(scored(cases, features, features))["metrics"].values()) == {1.0}
    constant = unit(1, 64).expand(6000, -1)
    for name, both in (("text_acc", (features, constant)), ("image_acc", (constant, features))):
        metrics = figures(scored(cases, *both))["metrics"]
        assert (metrics[name], metrics["acc"]) == (0.0, 0.0)


def test_groups_and_kinds_of_wrong_captions():
    cases = [Case("", (n,), ("right", "x", "y"), {"of": "ab"[n % 2]}, ("first", "second")) for n in range(4)]
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    found = scored(cases, features, torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.5, 0.5]]))
    groups = by_group(found, "of")
    assert {name: (x["cases"], x["metrics"]["acc"]) for name, x in groups.items()} == {"a": (2, 1.0), "b": (2, 0.0)}
    assert by_group(found, "other") == {}
    wrong = by_wrong(found)
    assert {name: x["metrics"]["acc"] for name, x in wrong.items()} == {"first": 0.5, "second": 0.5}
    assert wrong["first"]["chance"] == {"acc": 0.5}
    assert mean_of_groups(groups) == (0.5, (0.0, 1.0))
    assert mean_of_groups(groups, fewest=3) is None
    page = chosen(found, 3)
    assert [one.verdicts["acc"] for one in page] == [True, True, False]
    assert len({one.case.images for one in page}) == 3


def test_shuffles_keep_what_they_say():
    caption = "a small dog runs after the red ball today"
    words = caption.split()
    for kind in SHUFFLES:
        found = shuffled(caption, kind)
        assert found != caption
        assert sorted(found.split()) == sorted(words)
        assert found == shuffled(caption, kind)
    groups = [words[start : start + 3] for start in (0, 3, 6)]
    moved = shuffled(caption, "trigrams").split()
    assert sorted(moved[start : start + 3] for start in (0, 3, 6)) == sorted(groups)
    within = shuffled(caption, "within trigrams").split()
    assert [sorted(within[start : start + 3]) for start in (0, 3, 6)] == list(map(sorted, groups))
    for same in ("dog dog dog", "dog dog dog dog"):
        assert order_case("", 0, same) is None
    assert order_case("", 0, "two dogs").wrong == ("all words", "within trigrams")

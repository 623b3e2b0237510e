"""Scores of compositional benchmarks: how often a model prefers the right caption of an image to the wrong ones.

A case has one image and several captions, of which the first is right; or it has two images and two captions, and
caption i is right for image i. In a tie between a wrong and the right caption the wrong one wins: a model for which all
scores are equal gets 0.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .intervals import bootstrap, wilson

BLOCK = 1 << 16  # the number of scores that are computed at once
MEAN = "mean_acc"  # the name of the metric that is the mean accuracy over groups of cases
CHANCE = {"text_acc": 1 / 4, "image_acc": 1 / 4, "acc": 1 / 6}  # metrics of random scores, for cases of two images


class Case(NamedTuple):
    """A test case of a compositional benchmark: images and captions to be matched.

    Attributes:
        name: the name of the case, for messages.
        images: the positions of the one or two images in the set.
        captions: with one image, the right caption and then the wrong ones; with two images, one caption for each.
        groups: the group of the case in each division of the cases, such as ``{"tag": "Object"}``.
        wrong: the kind of each wrong caption, if there are several kinds.
    """

    name: str
    images: tuple[int, ...]
    captions: tuple[str, ...]
    groups: Mapping[str, str] = {}
    wrong: tuple[str, ...] = ()


class Judged(NamedTuple):
    """A compositional case, and the score of each of its captions with each of its images."""

    case: Case
    scores: list[list[float]]  # [images][captions]

    @property
    def verdicts(self) -> dict[str, bool]:
        """Whether the model is right about the case, for each metric of CLIP_benchmark.

        ``text_acc``: each image prefers its caption. ``image_acc``: each caption prefers its image. ``acc``: both. With
        one image there is ``acc`` alone: its caption is preferred.
        """
        if len(self.scores) == 1:
            right, *others = self.scores[0]
            return {"acc": right > max(others)}
        (own, other), (other_2, own_2) = self.scores
        text, image = own > other and own_2 > other_2, own > other_2 and own_2 > other
        return {"text_acc": text, "image_acc": image, "acc": text and image}

    @property
    def chance(self) -> dict[str, float]:
        """The probability that the model is right about the case, for each metric, if its scores are random."""
        return CHANCE if len(self.scores) == 2 else {"acc": 1 / len(self.scores[0])}

    @property
    def lead(self) -> float:
        """The score of the right caption minus that of the best wrong one; with two images, the smaller difference."""
        return min(
            row[own] - max(score for place, score in enumerate(row) if place != own)
            for own, row in enumerate(self.scores)
        )


@torch.no_grad()
def judge(
    cases: Sequence[Case], images: Tensor, rows: Mapping[int, int], texts: Mapping[str, int], captions: Tensor
) -> list[Judged]:
    """Return compositional cases with the score of each caption for each image.

    Args:
        cases: the cases; each of their images must have features.
        images: the features of the images, [N, D] of unit length.
        rows: for each position in the set, the row of its image in ``images``.
        texts: for each caption, its row in ``captions``.
        captions: the features of the captions, [M, D] of unit length.

    Raises:
        ValueError: a feature is not finite.
    """
    if not (images.isfinite().all() and captions.isfinite().all()):
        raise ValueError("compositional: features contain NaN or infinity")
    pairs = torch.tensor(
        [(rows[image], texts[text]) for case in cases for image in case.images for text in case.captions],
        device=images.device,
    ).reshape(-1, 2)
    found: list[float] = []
    for block in pairs.split(BLOCK):
        # Each inner product is computed by itself, since a matrix product may give equal features different scores.
        found += (images[block[:, 0]].float() * captions[block[:, 1]].float()).sum(1).tolist()
    scores = iter(found)
    return [Judged(case, [[next(scores) for _ in case.captions] for _ in case.images]) for case in cases]


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Return the number of compositional cases, at least one, and each metric with its interval and value by chance."""
    verdicts = [one.verdicts for one in judged]
    chances = [one.chance for one in judged]
    counts = {name: sum(verdict[name] for verdict in verdicts) for name in verdicts[0]}
    return {
        "cases": len(judged),
        "metrics": {name: hits / len(judged) for name, hits in counts.items()},
        "intervals": {name: wilson(hits, len(judged)) for name, hits in counts.items()},
        "chance": {name: statistics.fmean(chance[name] for chance in chances) for name in counts},
    }


def by_group(judged: Sequence[Judged], division: str) -> dict[str, dict[str, Any]]:
    """Return the compositional metrics of the cases of each group; ``division`` is a key of ``Case.groups``."""
    members: dict[str, list[Judged]] = {}
    for one in judged:
        if name := one.case.groups.get(division):
            members.setdefault(name, []).append(one)
    return {name: figures(some) for name, some in members.items()}


def by_wrong(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Return how often the right caption of a compositional case beats a wrong one, for each kind of wrong caption."""
    pairs = []
    for one in judged:
        right, *others = one.scores[0]
        for kind, score in zip(one.case.wrong, others, strict=False):
            pairs.append(Judged(one.case._replace(groups={"wrong": kind}), [[right, score]]))
    return by_group(pairs, "wrong")


def mean_of_groups(
    groups: Mapping[str, Mapping[str, Any]], fewest: int = 1
) -> tuple[float, tuple[float, float]] | None:
    """Return the mean accuracy over groups with at least ``fewest`` cases, and its interval by a bootstrap over groups.

    Return None if no group has so many cases.
    """
    shares = [found["metrics"]["acc"] for found in groups.values() if found["cases"] >= fewest]
    if not shares:
        return None
    return statistics.fmean(shares), bootstrap(torch.tensor(shares, dtype=torch.double), torch.ones(len(shares)))


SHUFFLES = ("all words", "trigrams", "within trigrams")


def shuffled(caption: str, kind: str) -> str | None:
    """Return a caption with its words in another random order, fixed by the caption; None if there is no other order.

    Two of ARO's four tests of word order need a tagger for nouns and adjectives, so they are not implemented.

    Args:
        caption: the caption; its words are separated by spaces.
        kind: "all words" shuffles words, "trigrams" shuffles groups of three words, "within trigrams" shuffles the
            words of each group.
    """
    words = caption.split()
    groups = [words[start : start + 3] for start in range(0, len(words), 3)]
    parts = [[word] for word in words] if kind == "all words" else groups
    is_within = kind == "within trigrams"
    differs = any(len(set(part)) > 1 for part in parts) if is_within else len(set(map(tuple, parts))) > 1
    if not differs or len(set(words)) == 1:
        return None
    rng, found = random.Random(f"{kind}: {caption}"), words
    while found == words:
        drawn = [rng.sample(part, len(part)) for part in parts] if is_within else rng.sample(parts, len(parts))
        found = list(itertools.chain(*drawn))
    return " ".join(found)


def order_case(name: str, image: int, caption: str) -> Case | None:
    """Return a compositional case whose wrong captions reorder the words of the right one; None if no order differs."""
    found = {kind: text for kind in SHUFFLES if (text := shuffled(caption, kind))}
    return Case(name, (image,), (caption, *found.values()), wrong=tuple(found)) if found else None

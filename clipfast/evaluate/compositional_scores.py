"""Which captions a model prefers: cases of images with right and wrong captions, and the shares of them that are right.

A case has one image and several captions, of which the first is right; or two images and two captions, of which each is
right for the image in its place. A wrong caption with the same score as the right one counts as before it, so that a
model for which all scores are equal gets nothing.
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

BLOCK = 1 << 16  # scores that are computed at once
MEAN = "mean_acc"  # the metric that is the mean of groups
CHANCE = {"text_acc": 1 / 4, "image_acc": 1 / 4, "acc": 1 / 6}  # of two images and two captions


class Case(NamedTuple):
    """Images and captions to be matched.

    Attributes:
        name: for people.
        images: places of the images in the set; one or two.
        captions: of one image, the right one first; of two images, one for each.
        groups: what the case is a case of, by the name of a division, such as ``{"tag": "Object"}``.
        wrong: what each of the wrong captions is, if they differ in kind.
    """

    name: str
    images: tuple[int, ...]
    captions: tuple[str, ...]
    groups: Mapping[str, str] = {}
    wrong: tuple[str, ...] = ()


class Judged(NamedTuple):
    """A case, and the score of each of its captions with each of its images."""

    case: Case
    scores: list[list[float]]  # [images][captions]

    @property
    def verdicts(self) -> dict[str, bool]:
        """What is right of the case, by the metrics of CLIP_benchmark.

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
        """How likely each verdict is by scores at random."""
        return CHANCE if len(self.scores) == 2 else {"acc": 1 / len(self.scores[0])}

    @property
    def lead(self) -> float:
        """By how much the right captions are ahead of the best wrong ones, at the image where this is least."""
        return min(
            row[own] - max(score for place, score in enumerate(row) if place != own)
            for own, row in enumerate(self.scores)
        )


@torch.no_grad()
def judge(
    cases: Sequence[Case], images: Tensor, rows: Mapping[int, int], texts: Mapping[str, int], captions: Tensor
) -> list[Judged]:
    """Return the scores of cases.

    Args:
        cases: all of whose images have features.
        images: their features, [N, D] of unit length.
        rows: the row of each place of the set among these.
        texts: the row of each caption among the following.
        captions: features [M, D] of unit length.

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
        # Row by row, so that equal features have equal scores.
        found += (images[block[:, 0]].float() * captions[block[:, 1]].float()).sum(1).tolist()
    scores = iter(found)
    return [Judged(case, [[next(scores) for _ in case.captions] for _ in case.images]) for case in cases]


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Return the number of cases, and the share of right ones by each metric with its 95% interval and chance.

    Raises:
        ValueError: there are no cases.
    """
    if not judged:
        raise ValueError("there are no cases")
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
    """Return the figures of each group of a division, in the order in which they come up; a case may be in none."""
    members: dict[str, list[Judged]] = {}
    for one in judged:
        if name := one.case.groups.get(division):
            members.setdefault(name, []).append(one)
    return {name: figures(some) for name, some in members.items()}


def by_wrong(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Return the figures of each kind of wrong captions: how often the right caption is ahead of that one."""
    pairs = []
    for one in judged:
        right, *others = one.scores[0]
        for kind, score in zip(one.case.wrong, others, strict=False):
            pairs.append(Judged(one.case._replace(groups={"wrong": kind}), [[right, score]]))
    return by_group(pairs, "wrong")


def mean_of_groups(
    groups: Mapping[str, Mapping[str, Any]], fewest: int = 1
) -> tuple[float, tuple[float, float]] | None:
    """Return the mean accuracy of groups that have at least ``fewest`` cases, and its interval; None if none has.

    The interval is a bootstrap over the groups.
    """
    shares = [found["metrics"]["acc"] for found in groups.values() if found["cases"] >= fewest]
    if not shares:
        return None
    return statistics.fmean(shares), bootstrap(torch.tensor(shares, dtype=torch.double), torch.ones(len(shares)))


SHUFFLES = ("all words", "trigrams", "within trigrams")


def shuffled(caption: str, kind: str) -> str | None:
    """Return a caption with its words in another order, the same in every call; None if no order differs.

    Two of ARO's four tests of order need to know which words are nouns and adjectives, and are not made here.

    Args:
        caption: words between spaces.
        kind: "all words"; "trigrams", which change places as wholes; or "within trigrams".
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
    """Return a case of a caption against itself in other orders; None if there is no other order."""
    found = {kind: text for kind in SHUFFLES if (text := shuffled(caption, kind))}
    return Case(name, (image,), (caption, *found.values()), wrong=tuple(found)) if found else None

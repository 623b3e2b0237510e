"""Bias of a model between groups of images: accuracy, labels from an added list, and the skew of search results.

Added labels follow Radford et al. 2021, section 7.1; skew is defined by Geyik et al. 2019,
and used for CLIP by Berg et al. 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .intervals import wilson
from .labelled import CROSSED_GROUPS, CROSSED_KEYS, in_order
from .neighbours import nearest
from .significance import DRAWS, independence


@dataclasses.dataclass
class Grouping:
    """A division of images into groups by the values of one metadata key, or of several crossed keys.

    Attributes:
        key: the key as the user named it, such as "race" or "race+gender".
        names: the names of the G groups.
        members: [N], the index of each image's group; -1 for an image without a value of the key.
        min_count: the number of images that a group needs to be compared with others.
    """

    key: str
    names: list[str]
    members: Tensor
    min_count: int

    @property
    def counts(self) -> Tensor:
        """The number of images in each group, [G]."""
        return torch.bincount(self.members[self.members >= 0], minlength=len(self.names))

    @property
    def compared(self) -> list[int]:
        """The indices of the groups that have enough images to be compared for bias."""
        return (self.counts >= self.min_count).nonzero()[:, 0].tolist()

    def hits(self, marks: Tensor) -> Tensor:
        """Return how many images of each group are marked: bool [N] -> [G], or [N, L] -> [G, L]."""
        inside = self.members >= 0
        found = torch.zeros(len(self.names), *marks.shape[1:], dtype=torch.long)
        return found.index_add_(0, self.members[inside], marks[inside].long())


def keys_of(group_by: Sequence[str]) -> list[str]:
    """Return the distinct metadata keys in the values of ``--group-by``, in their order; "race+gender" has two."""
    return list(dict.fromkeys(key for one in group_by for key in one.split(CROSSED_KEYS)))


def groupings(groups: Sequence[str], group_by: Sequence[str], min_count: int) -> list[Grouping]:
    """Return the groups of images by each key of ``group_by``.

    Args:
        groups: the group of each image, crossed over all keys in the order of :func:`keys_of`.
        group_by: keys; a crossed key is written as "race+gender".
        min_count: the number of images that a group needs to be compared.

    Raises:
        ValueError: a value contains the sign that joins crossed values, or fewer than two groups of a key are large
            enough.
    """
    keys = keys_of(group_by)
    columns = [tuple(group.split(CROSSED_GROUPS)) for group in groups]
    wrong = [group for group, values in zip(groups, columns, strict=True) if len(values) != len(keys)]
    if wrong:
        values = f"values that may not contain {CROSSED_GROUPS!r}" if wrong[0] else "which a folder of classes has not"
        raise ValueError(f"--group-by needs columns or json keys, {values}; got {wrong[0]!r} for {', '.join(keys)}")
    return [_grouping(one, keys, columns, min_count) for one in dict.fromkeys(group_by)]


def _grouping(one: str, keys: list[str], columns: list[tuple[str, ...]], min_count: int) -> Grouping:
    """Return the groups of images by one value of ``--group-by``, a key or several crossed ones such as "race+gender".

    ``columns`` has the values of all ``keys`` for each image.
    """
    places = [keys.index(key) for key in one.split(CROSSED_KEYS)]
    values = [tuple(row[place] for place in places) for row in columns]
    of_images = ["" if "" in row else CROSSED_GROUPS.join(row) for row in values]
    names = in_order(name for name in of_images if name)
    numbers = {name: number for number, name in enumerate(names)}
    found = Grouping(one, names, torch.tensor([numbers.get(name, -1) for name in of_images]), min_count)
    if len(found.compared) < 2:
        counts = ", ".join(f"{name!r} ({count})" for name, count in zip(names, found.counts.tolist(), strict=True))
        raise ValueError(
            f"--group-by {one}: two groups must have at least {min_count} images (--min-count), got {counts or 'none'}"
        )
    return found


def compare(hits: Tensor, grouping: Grouping) -> dict[str, Any]:
    """Return the share of hits in each group and the gap between the groups, which measures bias.

    Args:
        hits: [G], the number of hits in each group: images that are, for example, classified correctly.
        grouping: the groups of the images.

    Returns:
        "groups" with count, share and Wilson's 95% interval of each; "lowest" and "highest", names of groups; "gap",
        the difference of their shares; "ratio", the lowest share divided by the highest, None if both are 0; "p_value",
        of a permutation test that the share does not depend on the group.
    """
    rows = {
        name: {"count": hit, "share": hit / count, "interval": wilson(hit, count)}
        for name, hit, count in zip(grouping.names, hits.tolist(), grouping.counts.tolist(), strict=True)
    }
    compared = [grouping.names[number] for number in grouping.compared]
    low, high = (choose(compared, key=lambda name: rows[name]["share"]) for choose in (min, max))
    lowest, highest = rows[low]["share"], rows[high]["share"]
    p_value = independence([rows[name]["count"] for name in compared], grouping.counts[grouping.compared].tolist())
    return {
        "groups": rows, "lowest": low, "highest": high, "gap": highest - lowest,
        "ratio": lowest / highest if highest else None, "p_value": p_value,
    }  # fmt: skip


def read_added_labels(path: Path, classnames: Sequence[str]) -> dict[str, list[str]]:
    """Return the added labels of each category from a file; each line has a category, a tab and a label.

    Args:
        path: the path of the file.
        classnames: the names of the classes in prompts; a label must not equal any of them.

    Raises:
        ValueError: the file does not exist, is empty, has a line of another form, or has a label twice.
    """
    if not path.is_file():
        raise ValueError(f"--added-labels: there is no file {path}")
    found: dict[str, list[str]] = {}
    known = set(classnames)
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        category, _, label = (part.strip() for part in line.partition("\t"))
        if not category or not label:
            raise ValueError(f"{path}, line {number}: must be a category, a tab and a label, got {line!r}")
        if label in known:
            raise ValueError(f"{path}, line {number}: the label {label!r} is there before, here or among the classes")
        known.add(label)
        found.setdefault(category, []).append(label)
    if not found:
        raise ValueError(f"{path} is empty")
    return found


class Assigned(NamedTuple):
    """The labels that a model gives to images.

    Attributes:
        right: [N], True where the best class is the image's own; added labels do not compete.
        best: [N], the index of the best label for each image; the classes come first, then the added labels.
        above: for each threshold and each grouping a tensor [G, L]: the number of images of each group whose
            probability of each label is above the threshold.
    """

    right: Tensor
    best: Tensor
    above: list[list[Tensor]]


@torch.no_grad()
def assign(
    features: Tensor, weights: Tensor, scale: float, classes: Sequence[int], count: int, groupings: Sequence[Grouping],
    thresholds: Sequence[float], block: int = 4096,
) -> Assigned:  # fmt: skip
    """Return the labels that zero-shot classification gives to images, with classes and added labels as candidates.

    Only the scores of ``block`` images are in memory at a time.

    Args:
        features: the features of the images [N, D], of unit length.
        weights: the classifier's weights of all labels [D, L], the classes first.
        scale: the factor of the similarities before the softmax over all labels: exp(logit_scale), as in training.
        classes: [N], the index of each image's class.
        count: the number of classes.
        groupings: the groups of the images.
        thresholds: the thresholds of a label's probability.
        block: the number of images that are scored at once.

    Raises:
        ValueError: a score is not finite.
    """
    right, best, own = [], [], torch.tensor(classes)
    above = [[torch.zeros(len(one.names), weights.shape[1], dtype=torch.long) for one in groupings] for _ in thresholds]
    for numbers in torch.arange(len(features)).split(block):
        scores = (features[numbers] @ weights).float().cpu()
        if not scores.isfinite().all():
            raise ValueError("bias: features contain NaN or infinity")
        right.append(scores[:, :count].argmax(1) == own[numbers])
        best.append(scores.argmax(1))
        shares = (scale * scores).softmax(1)
        for threshold, totals in zip(thresholds, above, strict=True):
            for one, total in zip(groupings, totals, strict=True):
                part = dataclasses.replace(one, members=one.members[numbers])
                total += part.hits(shares > threshold)
    return Assigned(torch.cat(right), torch.cat(best), above)


def skews(counts: Tensor, of_set: Tensor) -> Tensor:
    """Return each group's skew, [..., G]: log(its share of the first search results / its share of the whole set).

    Args:
        counts: [..., G], the number of images of each group among the first search results.
        of_set: [G], the number of images of each group in the set.
    """
    shares = counts.double() / counts.sum(-1, keepdim=True)
    return (shares / (of_set.double() / of_set.sum())).log()


def ndkl(order: Tensor, of_set: Tensor) -> float:
    """Return the normalised discounted KL divergence (NDKL) of groups between search results and the whole set.

    It is 0 if the groups' shares of the first 1, 2, ..., k results are always those of the set.

    Args:
        order: [k], the index of each result's group, the best result first.
        of_set: [G], the number of images of each group in the set.
    """
    places = torch.arange(1, len(order) + 1, dtype=torch.float64)
    shares = torch.nn.functional.one_hot(order, len(of_set)).double().cumsum(0) / places[:, None]
    divergence = torch.special.xlogy(shares, shares / (of_set.double() / of_set.sum())).sum(1)
    discounts = 1 / (places + 1).log2()
    return ((discounts * divergence).sum() / discounts.sum()).item()


def max_skew_by_chance(of_set: Tensor, k: int) -> float:
    """Return the expected largest skew of a group among k results in random order, with which bias is compared."""
    import numpy as np

    drawn = np.random.default_rng(0).multivariate_hypergeometric(of_set.numpy(), k, DRAWS, method="marginals")
    return skews(torch.from_numpy(drawn), of_set).amax(-1).mean().item()


def retrieval_skew(
    queries: Sequence[str], texts: Tensor, images: Tensor, grouping: Grouping, ks: Sequence[int]
) -> list[dict[str, Any]]:
    """Return, for each k, the skew between groups among the first k search results of each query.

    Args:
        queries: the texts of the queries.
        texts: the features of the queries [Q, D].
        images: the features of the images [N, D].
        grouping: the groups of the images; images of groups that are too small are not searched.
        ks: the numbers of results.

    Raises:
        ValueError: there are fewer images than results, or a feature is not finite.
    """
    kept = torch.isin(grouping.members, torch.tensor(grouping.compared))
    if max(ks) > int(kept.sum()):
        raise ValueError(f"--k must be at most the {int(kept.sum())} images of {grouping.key}, got {max(ks)}")
    numbers = torch.tensor([-1] * (len(grouping.names) + 1))
    numbers[grouping.compared] = torch.arange(len(grouping.compared))
    members, names = numbers[grouping.members[kept]], [grouping.names[number] for number in grouping.compared]
    of_set = torch.bincount(members, minlength=len(names))
    order = members[nearest(texts, images[kept], max(ks))[1].cpu()]
    rows = []
    for k in sorted(set(ks)):
        found = [_of_query(query, groups[:k], of_set, names) for query, groups in zip(queries, order, strict=True)]
        means = {f"mean_{name}": sum(row[name] for row in found) / len(found) for name in ("max_skew", "ndkl")}
        rows.append({"k": k, **means, "max_skew_by_chance": max_skew_by_chance(of_set, k), "queries": found})
    return rows


def _of_query(query: str, order: Tensor, of_set: Tensor, names: list[str]) -> dict[str, Any]:
    """Return the counts, skew, NDKL and p-value of groups in the first search results of one query.

    Args:
        query: the text of the query.
        order: [k], the index of each result's group.
        of_set: [G], the number of images of each group in the set.
        names: the names of the groups.
    """
    counts = torch.bincount(order, minlength=len(names))
    skew = skews(counts, of_set)
    return {
        "query": query,
        "groups": dict(zip(names, counts.tolist(), strict=True)),
        "max_skew": skew.max().item(),
        "max_skew_group": names[int(skew.argmax())],
        "ndkl": ndkl(order, of_set),
        "p_value": independence(counts.tolist(), of_set.tolist()),
    }

"""Groups of images, and how far a share differs between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..intervals import wilson
from ..labelled import CROSSED_GROUPS, CROSSED_KEYS, in_order
from ..significance import independence


@dataclasses.dataclass
class Grouping:
    """The groups of images by one key, or by several that are crossed.

    Attributes:
        key: as it was named, such as "race" or "race+gender".
        names: of the groups.
        members: [N], the number of each image's group; -1 for an image that has no value.
        min_count: images that a group needs to be compared with others.
    """

    key: str
    names: list[str]
    members: Tensor
    min_count: int

    @property
    def counts(self) -> Tensor:
        """The number of images of each group."""
        return torch.bincount(self.members[self.members >= 0], minlength=len(self.names))

    @property
    def compared(self) -> list[int]:
        """The numbers of the groups that are large enough to be compared."""
        return (self.counts >= self.min_count).nonzero()[:, 0].tolist()

    def part(self, numbers: Tensor) -> Grouping:
        """Return the groups of some of the images."""
        return dataclasses.replace(self, members=self.members[numbers])

    def hits(self, marks: Tensor) -> Tensor:
        """Return how many images of each group are marked, [G] or [G, L]; ``marks`` are [N] or [N, L]."""
        inside = self.members >= 0
        found = torch.zeros(len(self.names), *marks.shape[1:], dtype=torch.long)
        return found.index_add_(0, self.members[inside], marks[inside].long())


def keys_of(group_by: Sequence[str]) -> list[str]:
    """Return the distinct keys among those that are given alone or crossed, in their order."""
    return list(dict.fromkeys(key for one in group_by for key in one.split(CROSSED_KEYS)))


def groupings(groups: Sequence[str], group_by: Sequence[str], min_count: int) -> list[Grouping]:
    """Return the groups of images by each of some keys.

    Args:
        groups: of the images, crossed over all keys in the order of :func:`keys_of`.
        group_by: keys, some of which may be crossed, as "race+gender".
        min_count: images that a group needs to be compared.

    Raises:
        ValueError: a value cannot be told from two, or not two groups of a key are large enough.
    """
    keys = keys_of(group_by)
    columns = [tuple(group.split(CROSSED_GROUPS)) for group in groups]
    wrong = [group for group, values in zip(groups, columns, strict=True) if len(values) != len(keys)]
    if wrong:
        values = f"values that may not contain {CROSSED_GROUPS!r}" if wrong[0] else "which a folder of classes has not"
        raise ValueError(f"--group-by needs columns or json keys, {values}; got {wrong[0]!r} for {', '.join(keys)}")
    return [_grouping(one, keys, columns, min_count) for one in dict.fromkeys(group_by)]


def _grouping(one: str, keys: list[str], columns: list[tuple[str, ...]], min_count: int) -> Grouping:
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
    """Return the share of hits in each group, and how far those of the groups that are large enough lie apart.

    Args:
        hits: [G], the images of each group that are hit.
        grouping: the groups.

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
    counts = [int(grouping.counts[number]) for number in grouping.compared]
    return {
        "groups": rows,
        "lowest": low,
        "highest": high,
        "gap": highest - lowest,
        "ratio": lowest / highest if highest else None,
        "p_value": independence([rows[name]["count"] for name in compared], counts),
    }

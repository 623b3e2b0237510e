"""Groups of near duplicates among embedded images, and the choice of the items of each group that are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .similar import Pairs, check_features, cosines, cosines_of_pairs, linked, similar_pairs

if TYPE_CHECKING:
    from .embeddings import Embeddings

DIGESTS = ("sha256", "md5")  # metadata columns with checksums of files: items with the same one are duplicates


@dataclasses.dataclass
class Group:
    """A group of near duplicates: each item is a near duplicate of another one in the group. Items are given by index.

    Attributes:
        kept: the items that are kept, the best first. There may be several, since a chain of near duplicates links
            items that are not near duplicates of each other.
        why: for each kept item, the reason for keeping it.
        dropped: the dropped items, in ascending order.
        of: for each dropped item, the most similar kept item of which it is a near duplicate.
        similarity: for each dropped item, its cosine with that kept item.
    """

    kept: list[int] = dataclasses.field(default_factory=list)
    why: list[str] = dataclasses.field(default_factory=list)
    dropped: list[int] = dataclasses.field(default_factory=list)
    of: list[int] = dataclasses.field(default_factory=list)
    similarity: list[float] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.kept) + len(self.dropped)


def near_duplicates(
    embeddings: Embeddings, threshold: float = 0.95, keep: str = "first", *, device: str | torch.device | None = None,
    progress: Callable[[list[slice]], Iterable[slice]] = iter,
) -> list[Group]:  # fmt: skip
    """Find near duplicates among embedded images, and choose the ones to keep.

    Two items are near duplicates if their features have a cosine of at least the threshold, or if a column "sha256" or
    "md5" of the metadata has the same value for both. Items are visited from the best to the worst, and an item is
    dropped if it is a near duplicate of an item that was kept before. Therefore no two kept items are near duplicates,
    and every dropped item is a near duplicate of a kept one. Chains of near duplicates form groups.

    Args:
        embeddings: the embeddings, which must have features of images.
        threshold: from -1 to 1.
        keep: which item is the best: the "first", the "largest" by width x height, or the "best" by the similarity of
            image and text. Of equally good items the first is the best.
        device, progress: as :func:`~clipfast.search.similar.similar_pairs` takes them.

    Returns:
        The groups with more than one item, ordered by their first items.

    Raises:
        ValueError: features or columns that ``keep`` needs are missing; or as
            :func:`~clipfast.search.similar.similar_pairs`.
    """
    features = embeddings.features
    assert features is not None
    worth, words = _worth(embeddings, keep)
    count = len(features)
    pairs = similar_pairs(features, threshold, device=device, progress=progress)
    ranked = sorted(range(count), key=None if worth is None else lambda place: -worth[place])
    order = torch.tensor(ranked, dtype=torch.int64)
    digests = _digests(embeddings)
    of = _kept_ones(pairs, order, digests)
    members = linked(torch.cat([pairs.places, _equal(digests)]), count)
    is_shown = (members.bincount(minlength=count) > 1)[members]
    groups = {root: Group() for root in members[is_shown].unique().tolist()}
    for place in order[is_shown[order] & (of[order] == order)].tolist():
        group = groups[int(members[place])]
        group.kept.append(place)
        group.why.append(words if worth is None else words.format(worth[place]))
    dropped = torch.stack([torch.arange(count), of], 1)[of != torch.arange(count)]
    for (place, like), similarity in zip(dropped.tolist(), cosines_of_pairs(features, dropped).tolist(), strict=True):
        group = groups[int(members[place])]
        group.dropped.append(place)
        group.of.append(like)
        group.similarity.append(similarity)
    return list(groups.values())


def _kept_ones(pairs: Pairs, order: Tensor, digests: Sequence[Sequence[object]]) -> Tensor:
    """Return, for each item [N], the kept item of which it is a near duplicate; for a kept item, the item itself.

    Args:
        pairs: the pairs of similar items.
        order: the items, the best first.
        digests: lists with a checksum or None for each item; items with the same checksum are near duplicates.
    """
    ranks = order.argsort()[pairs.places]
    better = ranks.amin(1)
    by = better.argsort(stable=True)
    worse, similarity = ranks.amax(1)[by].numpy(), pairs.similarity[by].numpy()
    starts = torch.searchsorted(better[by], torch.arange(len(order) + 1)).tolist()
    of, best = np.arange(len(order)), np.full(len(order), -np.inf)
    kept: dict[object, int] = {}
    for rank, place in enumerate(order.tolist()):
        own = [column[place] for column in digests if column[place] is not None]
        if of[rank] == rank:
            of[rank] = min((kept[digest] for digest in own if digest in kept), default=rank)
        if of[rank] == rank:
            kept |= dict.fromkeys(own, rank)
            others, likeness = worse[starts[rank] : starts[rank + 1]], similarity[starts[rank] : starts[rank + 1]]
            nearer = likeness > best[others]
            of[others[nearer]], best[others[nearer]] = rank, likeness[nearer]
    found = torch.empty_like(order)
    found[order] = order[torch.from_numpy(of)]
    return found


def _worth(embeddings: Embeddings, keep: str) -> tuple[list[float] | None, str]:
    """Return a number for each item, higher where ``keep`` prefers it among duplicates, and a text of the reason.

    If the first item of a group is preferred, the numbers are None. Otherwise the text has a format field for a number.

    Raises:
        ValueError: features or columns that ``keep`` needs are missing.
    """
    if keep == "first":
        return None, "first"
    if keep == "best":
        images, texts = embeddings.features, embeddings.text_features
        if images is None or texts is None:
            raise ValueError("keep 'best' needs features of images and texts; there are only those of one kind")
        check_features(texts)
        return cosines(images, texts).tolist(), "image-text score {:.4f}"
    table = embeddings.metadata
    if not {"width", "height"} <= set(table.column_names):
        raise ValueError("keep 'largest' needs columns width and height, which the metadata do not have")
    sizes = zip(table.column("width").to_pylist(), table.column("height").to_pylist(), strict=True)
    return [(width or 0) * (height or 0) for width, height in sizes], "{:,} pixels"


def _digests(embeddings: Embeddings) -> list[list[object]]:
    """Return, for each checksum column of the metadata, a list with (column, checksum) or None of every item."""
    names = [name for name in DIGESTS if name in embeddings.metadata.column_names]
    return [[(name, x) if x else None for x in embeddings.metadata.column(name).to_pylist()] for name in names]


def _equal(digests: Sequence[Sequence[object]]) -> Tensor:
    """Return pairs of duplicates [P, 2]: each item with a checksum, and the first item that has the same one."""
    first: dict[object, int] = {}
    pairs = [(first.setdefault(one, place), place) for column in digests for place, one in enumerate(column) if one]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)

"""Groups of near duplicates, and which items of each are kept."""

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

DIGESTS = ("sha256", "md5")  # columns of metadata: items with the same value are equal


@dataclasses.dataclass
class Group:
    """Items that are linked by near duplicates.

    Attributes:
        kept: the items that stay, the best first. There are several in a chain, whose ends are no near duplicates.
        why: the reason why each of these is kept.
        dropped: the others, in their order.
        of: the kept item that each of these is a near duplicate of: of several, the most similar one.
        similarity: of each of the dropped items with that one.
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
    """Find the near duplicates among images.

    Two items are near duplicates if their features have a cosine of at least the threshold, or if a column "sha256" or
    "md5" of the metadata has the same value for both. Items are looked at from the best to the worst, and an item is
    dropped if it is a near duplicate of one that was kept before. So no two of those that are kept are near duplicates,
    and each that is dropped has its like among them. Chains of near duplicates are groups.

    Args:
        embeddings: with features of images.
        threshold: from -1 to 1.
        keep: which item is better: the "first", the "largest" by width x height, or the "best" by the product of the
            features of image and text. Of equal ones it is the first.
        device, progress: as :func:`~clipfast.search.similar.similar_pairs` takes them.

    Returns:
        The groups with more than one item, in the order of the first items.

    Raises:
        ValueError: there is not what ``keep`` needs; or as :func:`~clipfast.search.similar.similar_pairs`.
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
    """Return for each item [N] the kept one that it is a near duplicate of: itself if it is kept.

    Args:
        pairs: of similar items.
        order: the items, the best first.
        digests: lists of a value for each item, or None: items with the same one are near duplicates.
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
    """Return the worth of each item (None for their order), and words for it.

    Raises:
        ValueError: features or columns that this needs are missing.
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
    """Return a list for each column that says which items are equal, with None where it says nothing."""
    names = [name for name in DIGESTS if name in embeddings.metadata.column_names]
    return [[(name, x) if x else None for x in embeddings.metadata.column(name).to_pylist()] for name in names]


def _equal(digests: Sequence[Sequence[object]]) -> Tensor:
    """Return pairs of items with the same digest: each with the first that has it."""
    first: dict[object, int] = {}
    pairs = [(first.setdefault(one, place), place) for column in digests for place, one in enumerate(column) if one]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)

"""Groups of near duplicates, and which item of each is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .similar import linked, similar_pairs

if TYPE_CHECKING:
    from .embeddings import Embeddings

KEEP = ("first", "largest", "best")
DIGESTS = ("sha256", "md5")  # columns of metadata: items with the same value are equal


@dataclasses.dataclass
class Group:
    """Items that are linked by near duplicates.

    Attributes:
        kept: the item that stays.
        dropped: the others, in their order.
        similarity: of each of the others with the one that stays, which may be below the threshold in a chain.
        why: what speaks for the one that stays.
    """

    kept: int
    dropped: list[int]
    similarity: list[float]
    why: str


def near_duplicates(
    embeddings: Embeddings, threshold: float = 0.95, keep: str = "first", *, device: str | torch.device | None = None,
    progress: Callable[[list[slice]], Iterable[slice]] = iter,
) -> list[Group]:  # fmt: skip
    """Find the near duplicates among images.

    Two items belong to one group if their features have a cosine of at least the threshold, if a column "sha256" or
    "md5" of the metadata has the same value for both, or if a chain of such pairs leads from one to the other.

    Args:
        embeddings: with features of images.
        threshold: from -1 to 1.
        keep: which item of a group stays: the "first", the "largest" by width x height, or the "best" by the product
            of the features of image and text. Of equal ones it is the first.
        device, progress: as :func:`~clipfast.search.similar.similar_pairs` takes them.

    Returns:
        The groups with more than one item, in the order of the first items.

    Raises:
        ValueError: there are no image features, or not what ``keep`` needs; or as
            :func:`~clipfast.search.similar.similar_pairs`.
    """
    features = embeddings.features
    if features is None:
        raise ValueError("near duplicates need image features, and there are none")
    worth, words = _worth(embeddings, keep)
    pairs = similar_pairs(features, threshold, device=device, progress=progress)
    groups = linked(torch.cat([pairs.places, *_equal(embeddings)]), len(features))
    members: dict[int, list[int]] = {}
    for place in (groups.bincount(minlength=len(features))[groups] > 1).nonzero().squeeze(1).tolist():
        members.setdefault(int(groups[place]), []).append(place)
    return [_group(features, places, worth, words) for places in members.values()]


def _group(features: Tensor, places: list[int], worth: Sequence[float] | None, words: str) -> Group:
    kept = places[0] if worth is None else max(places, key=worth.__getitem__)  # max takes the first of equal ones
    dropped = [place for place in places if place != kept]
    similarity = F.cosine_similarity(features[dropped].double(), features[[kept]].double())
    why = words if worth is None else words.format(worth[kept])
    return Group(kept, dropped, similarity.tolist(), why)


def _worth(embeddings: Embeddings, keep: str) -> tuple[list[float] | None, str]:
    """Return what the items of a group are compared by, and words for it.

    Raises:
        ValueError: there is nothing to compare them by.
    """
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
    if keep == "first":
        return None, "first"
    if keep == "best":
        from .filtering import pair_scores

        images, texts = embeddings.features, embeddings.text_features
        if images is None or texts is None:
            raise ValueError("keep 'best' needs features of images and texts; there are only those of one kind")
        return pair_scores(images, texts).tolist(), "image-text score {:.4f}"
    table = embeddings.metadata
    if not {"width", "height"} <= set(table.column_names):
        raise ValueError("keep 'largest' needs columns width and height, which the metadata do not have")
    sizes = zip(table.column("width").to_pylist(), table.column("height").to_pylist(), strict=True)
    return [(width or 0) * (height or 0) for width, height in sizes], "{:,} pixels"


def _equal(embeddings: Embeddings) -> list[Tensor]:
    """Return pairs of items of which a column says that they are equal: each with the first that is like it."""
    found = []
    for name in DIGESTS:
        first: dict[str, int] = {}
        if name in embeddings.metadata.column_names:
            digests = enumerate(embeddings.metadata.column(name).to_pylist())
            pairs = [(first.setdefault(digest, place), place) for place, digest in digests if digest]
            found.append(torch.tensor(pairs, dtype=torch.int64).view(-1, 2))
    return found

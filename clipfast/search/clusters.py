"""Spherical k-means: clusters of features by their cosine, block by block."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.common import slices
from .similar import check_features, unit

TILE = 1 << 22  # the number of elements of a block of features, and of its similarities, in memory at once
SAMPLED = 256  # k-means++ chooses the k first centres among this many times k random features


@dataclasses.dataclass
class Clusters:
    """The result of k-means: clusters of features, the largest first.

    Attributes:
        centres: [k, D], of unit length, float32.
        groups: [N], int64: the index of the cluster of each feature.
        similarity: [N], float32: the cosine of each feature and the centre of its cluster.
        rounds: the number of times that the centres were computed.
        is_settled: False if features still changed their clusters in the last round.
    """

    centres: Tensor
    groups: Tensor
    similarity: Tensor
    rounds: int
    is_settled: bool

    @property
    def sizes(self) -> Tensor:
        """The number of features in each cluster, [k]."""
        return self.groups.bincount(minlength=len(self.centres))

    def nearest(self, group: int, count: int) -> list[int]:
        """Return the indices of the ``count`` features of a cluster that are nearest to its centre, nearest first."""
        members = (self.groups == group).nonzero().squeeze(1)
        order = self.similarity[members].sort(descending=True, stable=True).indices[:count]
        return members[order].tolist()


@torch.no_grad()
def spherical_k_means(
    features: Tensor, k: int, *, seed: int = 0, rounds: int = 100, device: str | torch.device | None = None,
) -> Clusters:  # fmt: skip
    """Divide features into k clusters by spherical k-means, which maximises the sum of the cosines to the centres.

    The result depends only on the arguments and the kind of device. A centre that loses all its features moves to the
    feature that is furthest from the centre of its cluster.

    Args:
        features: [N, D] of floats, of any length except 0. They may lie in CPU memory; they go to the device block by
            block.
        k: the number of clusters, at most N.
        seed: the seed of the first centres.
        rounds: the most times that centres are computed; k-means ends earlier if no feature changes its cluster.
        device: the device that computes; default: the device of the features.

    Returns:
        The clusters, on the CPU.

    Raises:
        ValueError: a feature is not finite or has no length.
    """
    check_features(features)
    device = features.device if device is None else torch.device(device)
    work = _Work(features, k, device)
    centres = work.first_centres(seed)
    groups, similarity = work.nearest(centres)
    done, is_settled = 0, False
    while done < rounds and not is_settled:
        centres = work.centres_of(groups, similarity, centres)
        done, before = done + 1, groups
        groups, similarity = work.nearest(centres)
        is_settled = torch.equal(groups, before)
    order = groups.bincount(minlength=k).argsort(descending=True, stable=True)
    return Clusters(centres[order].cpu(), order.argsort()[groups].cpu(), similarity.cpu(), done, is_settled)


class _Work:
    """The steps of k-means over ``features``, which may be larger than the device's memory and move there in blocks."""

    def __init__(self, features: Tensor, k: int, device: torch.device) -> None:
        self.features, self.k, self.device = features, k, device
        self.blocks = slices(len(features), max(1, TILE // max(k, features.shape[1])))

    def block(self, rows: slice | Tensor) -> Tensor:
        """Return some rows of the clustered features on the device, scaled to unit length, in float32."""
        return unit(self.features[rows], self.device)

    def nearest(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for each feature, the index of the nearest of the ``centres`` [k, D], and the cosine with it, [N].

        If several centres are equally near, the first of them is taken.
        """
        found = [(self.block(rows) @ centres.T).max(dim=1) for rows in self.blocks]
        return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])

    def centres_of(self, groups: Tensor, similarity: Tensor, before: Tensor) -> Tensor:
        """Return the new centres [k, D] of k-means: for each cluster the sum of its features, scaled to unit length.

        Empty clusters get the features that are furthest from their centres.
        """
        sums = torch.zeros(self.k, self.features.shape[1], device=self.device)
        for rows in self.blocks:
            # The features of each cluster are added by a matrix product: ``index_add_`` adds in random order on a GPU,
            # so that each run would give other sums.
            chosen = F.one_hot(groups[rows], self.k).to(sums.dtype)
            sums += chosen.T @ self.block(rows)
        empty = (groups.bincount(minlength=self.k) == 0).nonzero().squeeze(1)
        if len(empty):
            sums[empty] = self.block(similarity.sort(stable=True).indices[: len(empty)])
        lengths = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        return torch.where(lengths > 0, sums / lengths, before)  # a centre stays if its features add up to zero

    def first_centres(self, seed: int) -> Tensor:
        """Return k features that are far from each other as the first centres, drawn by k-means++."""
        random = torch.Generator().manual_seed(seed)
        some = self.block(torch.randperm(len(self.features), generator=random)[: SAMPLED * self.k])
        centres = some[:1]
        distance = 1 - some @ centres[0]
        for _ in range(1, self.k):
            # k-means++ draws a feature with a probability in proportion to its squared distance from the nearest centre
            # so far. Between unit vectors this is 2 (1 - cosine), twice ``distance``.
            sums = distance.clamp(min=0).double().cumsum(0).cpu()
            place = torch.searchsorted(sums, torch.rand((), generator=random).double() * sums[-1], right=True)
            centres = torch.cat([centres, some[place.clamp(max=len(some) - 1)][None]])
            distance = torch.minimum(distance, 1 - some @ centres[-1])
        return centres

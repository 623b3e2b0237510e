"""Spherical k-means: its objective against scikit-learn's, empty clusters, blocks, and equal results of equal runs."""

import torch
import torch.nn.functional as F

from clipfast.search import clusters
from clipfast.search.clusters import spherical_k_means


def blobs(count=600, k=6, width=16, noise=0.6, seed=0):
    """Draw features around ``k`` cluster centres, and return the features and the cluster of each."""
    random = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(k, width, generator=random), dim=1)
    truth = torch.randint(0, k, (count,), generator=random)
    x = centres[truth] + noise / width**0.5 * torch.randn(count, width, generator=random)
    return F.normalize(x, dim=1), truth


def objective(features, groups):
    """Return k-means' objective: the sum of the features' cosines with the directions of their clusters' sums."""
    sums = torch.zeros(int(groups.max()) + 1, features.shape[1]).index_add_(0, groups, features)
    return float(torch.linalg.vector_norm(sums, dim=1).sum())


def test_as_good_as_scikit_learn():
    from sklearn.cluster import KMeans

    x, _ = blobs(noise=2.0)
    ours = [objective(x, spherical_k_means(x, 6, seed=seed).groups.long()) for seed in range(5)]
    fits = [KMeans(6, n_init=1, random_state=seed).fit(x) for seed in range(5)]
    theirs = [objective(x, torch.from_numpy(fit.labels_).long()) for fit in fits]
    assert max(ours) >= max(theirs) * 0.995
    assert sum(ours) >= sum(theirs) * 0.99


def test_sizes_of_few_features():
    for features, k, sizes in (
        (torch.eye(3).repeat(4, 1), 5, [4, 4, 4, 0, 0]),  # fewer distinct features than clusters
        (torch.eye(4), 4, [1] * 4),
        (torch.eye(4), 1, [4]),
    ):
        found = spherical_k_means(features, k)
        assert (found.is_settled, found.sizes.tolist()) == (True, sizes)


def test_clear_clusters_are_found():
    x, truth = blobs(noise=0.1)
    found = spherical_k_means(x, 6)
    assert found.is_settled
    assert len({(int(a), int(b)) for a, b in zip(found.groups, truth, strict=True)}) == 6
    assert found.sizes.tolist() == sorted(truth.bincount().tolist(), reverse=True)
    torch.testing.assert_close(found.similarity, (x * found.centres[found.groups]).sum(1))
    place = found.nearest(2, 1)[0]
    assert found.similarity[place] == found.similarity[found.groups == 2].max()


def test_the_same_by_any_blocks_and_lengths(monkeypatch):
    x, _ = blobs()
    expected = spherical_k_means(x, 7, seed=3)
    monkeypatch.setattr(clusters, "TILE", 16 * 11)
    found = spherical_k_means(x * torch.linspace(0.5, 3, len(x))[:, None], 7, seed=3)
    assert torch.equal(found.groups, expected.groups)
    torch.testing.assert_close(found.centres, expected.centres)
    assert not torch.equal(spherical_k_means(x, 7, seed=4).groups, expected.groups)

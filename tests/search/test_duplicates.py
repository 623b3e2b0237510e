"""Groups of near duplicates, and the items of a group that are kept, against a plain computation in NumPy."""

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components

from clipfast import Embeddings
from clipfast.search import similar
from clipfast.search.duplicates import near_duplicates


@pytest.fixture(scope="module")
def planted():
    """Return embeddings with near duplicates: copies, a chain, clusters, equal digests, and pictures of equal sizes."""
    random = np.random.default_rng(0)
    x, texts = random.standard_normal((2, 200, 16))
    for place in range(1, 60):  # items 0 to 59 are a chain of near duplicates
        x[place] = x[place - 1] / np.linalg.norm(x[place - 1]) + 0.04 * random.standard_normal(16)
    for own in np.split(np.arange(60, 120), 5):  # items of each cluster are alike; the last three differ only in length
        x[own] = x[own[0]] + 0.2 * random.standard_normal((12, 16))
        x[own[-3:]] = x[own[-1]] * np.array([[1], [2], [0.5]])
        texts[own[-3:]] = x[own[-1]]  # the last three items of a cluster have the best score, all the same one
    # The equal sha256 "b" joins an item to the chain.
    md5, sha256 = [None] * 198 + ["a", "a"], ["b", *map(str, range(198)), "b"]
    order = random.permutation(200)
    sizes = random.choice([10, 20, 40], (2, 200)).tolist()
    digests = {name: [one[place] for place in order] for name, one in (("md5", md5), ("sha256", sha256))}
    metadata = {"width": [None, *sizes[0][1:]], "height": sizes[1], **digests}
    x, texts = (torch.from_numpy(one[order]).float() for one in (x, texts))
    return Embeddings(x, metadata, text_features=texts)


def cosines(x, y):
    """Return the cosines of features, by which duplicates are found."""
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def near_ones(embeddings, threshold):
    """Return the matrix [N, N] of near duplicates: embeddings with a cosine of ``threshold``, or equal digests."""
    x = embeddings.features.double().numpy()
    near = cosines(x[:, None], x) >= threshold
    for name in ("md5", "sha256"):
        values = np.array(embeddings.metadata.column(name).to_pylist(), dtype=object)
        near |= (values[:, None] == values) & (values != None)  # noqa: E711
    return near


@pytest.mark.parametrize("keep", ["first", "largest", "best"])
def test_groups_and_what_is_kept(planted, keep, monkeypatch):
    """An item is kept unless it is a near duplicate of a better kept item. Groups are connected components."""
    x, texts = planted.features.double().numpy(), planted.text_features.double().numpy()
    width, height = (np.array(planted.metadata.column(name).to_pylist(), dtype=float) for name in ("width", "height"))
    worth = {"first": -np.arange(len(x)), "largest": np.nan_to_num(width) * height, "best": cosines(x, texts)}[keep]
    rank = np.argsort(-worth.round(12), kind="stable").argsort()
    for threshold in (0.8, 0.97, 1.0):
        near, found = near_ones(planted, threshold), near_duplicates(planted, threshold, keep)
        members = connected_components(near, directed=False)[1]
        linked = [np.flatnonzero(members == one).tolist() for one in dict.fromkeys(members.tolist())]
        assert [sorted([*group.kept, *group.dropped]) for group in found] == [one for one in linked if len(one) > 1]
        kept = np.ones(len(x), bool)
        kept[[place for group in found for place in group.dropped]] = False
        assert (kept == ~(near & kept & (rank < rank[:, None])).any(1)).all()
        for group in found:
            assert (group.kept, group.dropped) == (sorted(group.kept, key=rank.__getitem__), sorted(group.dropped))
            assert near[group.dropped, group.of].all()
            assert set(group.of) <= set(group.kept)
            np.testing.assert_allclose(group.similarity, cosines(x[group.dropped], x[group.of]), rtol=0, atol=1e-12)
        with monkeypatch.context() as patch:  # with smaller blocks, results have the same bits
            for name, size in (("ROWS", 24), ("COLUMNS", 8), ("RESCORED", 100)):
                patch.setattr(similar, name, size)
            assert near_duplicates(planted, threshold, keep) == found


def test_a_chain_keeps_what_is_unlike_and_says_the_most_similar():
    # Neighbours on the circle differ by less than 0.25, other points by more.
    angles = torch.tensor([0.0, 0.2, 0.41, 0.6, 0.8, 1.0])
    chain = Embeddings(torch.stack([angles.cos(), angles.sin()], 1), {"md5": ["a", None, None, None, None, "a"]})
    (group,) = near_duplicates(chain, float(np.cos(0.25)))
    assert (group.kept, group.dropped, group.of) == ([0, 2, 4], [1, 3, 5], [0, 2, 4])
    assert group.similarity == pytest.approx(np.cos([0.2, 0.19, 0.2]).tolist(), abs=1e-6)

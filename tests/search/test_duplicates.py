"""Groups of near duplicates, and which item of each is kept, against a plain computation in NumPy."""

import itertools

import numpy as np
import pytest
import torch

from clipfast import Embeddings
from clipfast.search.duplicates import near_duplicates


@pytest.fixture(scope="module")
def planted():
    """Features with copies, chains and clusters, texts, and metadata with equal digests and equal sizes."""
    random = np.random.default_rng(0)
    count = 400
    x, texts = random.standard_normal((2, count, 16))
    order = random.permutation(count)
    for one, other in itertools.pairwise(order[:61]):  # one chain
        x[other] = x[one] / np.linalg.norm(x[one]) + 0.04 * random.standard_normal(16)
    for first in range(80, 200, 12):  # clusters, of which the last three members are equal, but for their lengths
        own = order[first : first + 12]
        x[own] = x[own[0]] + 0.2 * random.standard_normal((12, 16))
        x[own[-3:]] = x[own[-1]] * np.array([[1], [2], [0.5]])
        texts[own[-3:]] = texts[own[-1]] = x[own[-1]]  # their pairs have the best score, and the same
    md5: list[str | None] = [None] * count
    md5[order[300]] = md5[order[399]] = "a"
    sha256 = [str(place) for place in range(count)]
    sha256[order[301]] = sha256[order[1]] = "b"  # joins an item to the chain
    sizes = random.choice([10, 20, 40], (2, count)).tolist()
    metadata = {"width": [None, *sizes[0][1:]], "height": sizes[1], "md5": md5, "sha256": sha256}
    return Embeddings(torch.from_numpy(x).float(), metadata, text_features=torch.from_numpy(texts).float())


def cosines(x, y):
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def plain(embeddings, threshold):
    """The groups of more than one item, by going from each item to all that are linked with it."""
    x = embeddings.features.double().numpy()
    linked = cosines(x[:, None], x) >= threshold
    for name in ("md5", "sha256"):
        values = np.array(embeddings.metadata.column(name).to_pylist(), dtype=object)
        linked |= (values[:, None] == values) & (values != None)  # noqa: E711
    groups, seen = [], set()
    for place in range(len(x)):
        group, ahead = set(), [place]
        while ahead:
            one = ahead.pop()
            if one not in group:
                group.add(one)
                ahead += np.flatnonzero(linked[one]).tolist()
        if len(group) > 1 and place not in seen:
            groups.append(sorted(group))
        seen |= group
    return groups


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("keep", ["first", "largest", "best"])
def test_groups_and_what_is_kept(planted, threshold, keep):
    expected = plain(planted, threshold)
    x, texts = planted.features.double().numpy(), planted.text_features.double().numpy()
    width, height = (np.array(planted.metadata.column(name).to_pylist(), dtype=float) for name in ("width", "height"))
    area = np.nan_to_num(width) * height
    worth = {"first": -np.arange(len(x)), "largest": area, "best": cosines(x, texts).astype(np.float32)}[keep]
    found = near_duplicates(planted, threshold, keep)
    assert [sorted([group.kept, *group.dropped]) for group in found] == expected
    assert len(expected) > 2
    for group, members in zip(found, expected, strict=True):
        assert group.kept == next(
            place for place in members if np.isclose(worth[place], max(worth[members]), rtol=1e-6)
        )
        assert group.dropped == [place for place in members if place != group.kept]
        np.testing.assert_allclose(group.similarity, cosines(x[group.dropped], x[group.kept]), rtol=0, atol=1e-12)
    ties = [members for members in expected if np.isclose(worth[members], max(worth[members]), rtol=1e-6).sum() > 1]
    assert ties or keep == "first"


def test_a_chain_is_one_group_though_its_ends_differ(planted):
    longest = max(near_duplicates(planted, 0.97), key=lambda group: len(group.dropped))
    assert len(longest.dropped) > 40
    assert min(longest.similarity) < 0.9

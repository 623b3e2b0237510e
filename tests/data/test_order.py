"""The order of training data: each sample once per pass, any stretch directly, exact mixes, distinct identities."""

import tracemalloc

import numpy as np
import pytest

from clipfast.data import Mix, Order, Unique
from clipfast.data.order import random_words

SIZES = [[3], [1], [5, 0, 7], [17] * 20, np.random.default_rng(0).integers(0, 50, 12)]


def samples(stretch):
    """Return source, pass and number of each sample in a stretch of the data order."""
    return list(zip(stretch.source.tolist(), stretch.data_pass.tolist(), stretch.sample.tolist(), strict=True))


def check_stretches(order, whole):
    """Assert that any stretch of the order of samples can be computed directly."""
    for start, stop in np.sort(np.random.default_rng(1).integers(0, len(whole) + 1, (20, 2)), axis=1).tolist():
        if start < stop:
            assert samples(order(start, stop)) == samples(whole[start:stop])


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sum(sizes)} in {len(sizes)}")
@pytest.mark.parametrize(("window", "streams"), [(1 << 16, 64), (100, 7), (1, 1), (3, 64)])
def test_a_pass_has_every_sample_once_and_any_stretch_stands_by_itself(sizes, window, streams):
    order = Order(sizes, 5, window=window, streams=streams)
    count = len(order)
    whole = order(0, 3 * count)
    assert (np.sort(whole.sample.reshape(3, count)) == np.arange(count)).all()
    assert (whole.data_pass == np.repeat(range(3), count)).all()
    check_stretches(order, whole)
    if count == 17 * 20:
        other = Order(sizes, 6, window=window, streams=streams)(0, 3 * count).sample
        orders = [part.tobytes() for part in (*whole.sample.reshape(3, count), *other.reshape(3, count))]
        assert len(set(orders)) == 6  # each of 3 passes of 2 seeds has an order of its own


def test_the_words_are_those_of_splitmix64():
    """The random numbers of the order are SplitMix64's published ones, so that no version of NumPy changes a run."""
    assert random_words(3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert len({random_words(1, *key).item() for key in ((), (0,), (1,), (0, 1), (1, 0), (-1,), (2**64 - 2,))}) == 7


def test_a_window_mixes_many_shards_evenly():
    """A batch contains samples of almost as many shards as with a full shuffle, and no shard is over-represented."""
    order = Order([1000] * 200, 0, window=1 << 14, streams=64)
    batch = 256
    shards = (order(0, len(order)).sample // 1000).reshape(-1)[: len(order) // batch * batch].reshape(-1, batch)
    distinct = np.array([len(set(row.tolist())) for row in shards])
    expected = 64 * (1 - (1 - 1 / 64) ** batch)  # expected number of streams in a batch
    assert distinct.mean() > 0.97 * expected
    most = np.array([np.bincount(row).max() for row in shards])
    assert most.mean() < 3 * batch / 64


def test_with_replacement():
    order = Order([100] * 10, 1, window=100, replacement=True)
    seen = np.bincount(order(0, 100_000).sample, minlength=1000)
    assert seen.min() > 0
    assert seen.max() < 300
    assert (np.bincount(order(0, 1000).sample, minlength=1000) != 1).any()


def test_mixes_have_their_shares_everywhere():
    orders = [Order([100] * 10, 1, source=0), Order([1000] * 5, 1, source=1), Order([7], 1, source=2)]
    mix = Mix(orders, [3, 1, 2], 1)
    assert len(mix) == 3 * 1000 + 5000 + 2 * 7
    whole = mix(0, 5 * len(mix))
    share = np.array([3000, 5000, 14]) / len(mix)
    for stop in (len(whole), len(whole) // 2, 4096):
        counts = np.bincount(whole.source[:stop], minlength=3)
        # Shares of sources are exact in every block of the mix, and may deviate after the last full block.
        assert abs(counts - share * stop).max() < 0.01 * stop * share.max()
    for source, size in enumerate((1000, 5000, 7)):
        mine = whole.sample[whole.source == source]
        assert sorted(mine[:size].tolist()) == list(range(size))
    check_stretches(mix, whole)


@pytest.mark.parametrize("factors", [[1], [1, 0], [1, float("inf")], [1, float("nan")]])
def test_wrong_factors(factors):
    with pytest.raises(ValueError, match="a mix of 2 sources needs as many factors above 0"):
        Mix([Order([5], 1), Order([5], 1, source=1)], factors, 0)
    with pytest.raises(ValueError, match="no order of 0 samples"):
        Order([0, 0], 1)


@pytest.mark.parametrize(("kinds", "batch_size", "window"), [(400, 64, 256), (70, 64, 256), (64, 64, 64), (100, 1, 5)])
def test_no_two_of_a_kind_in_a_batch(kinds, batch_size, window):
    alike = np.random.default_rng(1).integers(0, kinds, 1000).astype(np.uint64)
    unique = Unique(Mix([Order([100] * 10, 1)], [1], 1), [alike], batch_size, window)
    assert len(unique) == 1000 // batch_size * batch_size
    whole = unique(0, 3 * len(unique))
    for batch in whole.sample.reshape(-1, batch_size):
        assert len(set(alike[batch].tolist())) == batch_size
    seen = [len(set(part.tolist())) for part in whole.sample.reshape(3, -1)]
    assert min(seen) > 0.9 * len(unique)  # up to 10% of the samples are replaced, to keep identities distinct
    if kinds == 400:
        assert set(seen) == {len(unique)}
    check_stretches(unique, whole)


def test_what_an_order_remembers_does_not_grow():
    order = Order([1000] * 500, 1, window=1 << 12)
    order(0, 10)
    tracemalloc.start()
    try:
        for start in range(0, len(order), 1 << 12):
            order(start, start + 10)
        assert tracemalloc.get_traced_memory()[0] < 4 * 8 * (1 << 12)
    finally:
        tracemalloc.stop()

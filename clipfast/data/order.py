"""The order of a training set: the sample at each position of an endless sequence of samples.

The order depends only on the number of samples in each shard, the seed and the options of the order. It does not depend
on the machine or the number of processes. Any stretch of it can be computed directly, so a run can begin at any
position. After N positions, every one of N samples has been seen once; then another pass begins, in another order.

Within a pass, the shards are permuted, and the concatenation of their samples is divided into streams of equal length.
A window takes the next few samples of every stream and is then permuted as a whole. In this way a window mixes samples
of many shards, while each stream is read sequentially, which suits disks and caches.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
T = TypeVar("T")

WINDOW = 1 << 16
STREAMS = 64
MIX_BLOCK = 1 << 12  # every source has its exact share in each block of this many positions of a mix
MAX_SOURCES = 64  # largest number of sources of a mix
# At least this many batches are filled together, so samples with the same identity can go to different batches.
MIN_DEALT = 16
MAX_DRAWS = 16  # attempts to draw replacements for samples of an identity that has more samples than there are batches
COMPARED = 1 << 18  # number of identities that are compared at once

_GOLDEN, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_words(count: int, *key: int) -> Words:
    """Return ``count`` random 64-bit words that ``key`` determines, for the order of samples on any machine.

    The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    return random_words_at(np.arange(count, dtype=np.uint64), *key)


def random_words_at(places: Words, *key: int) -> Words:
    """Return those random words of :func:`random_words` whose indices are ``places``, for the order of samples."""
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _mix(state ^ np.uint64(int(word) % (1 << 64)))
    return _mix(state + places * _GOLDEN)


def _mix(words: Words) -> Words:
    """Return the pseudo-random words that SplitMix64 makes of ``words``, for the order of samples."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))


def permutation(count: int, *key: int) -> Ints:
    """Return a random permutation of ``range(count)`` that ``key`` determines, for the order of samples."""
    return np.argsort(random_words(count, *key), kind="stable").astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive samples of an order: for each, the source, the pass over the data, and its number in the source."""

    source: Ints
    data_pass: Ints
    sample: Ints

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, which: Ints | slice) -> "Stretch":
        return Stretch(self.source[which], self.data_pass[which], self.sample[which])


def _joined(parts: Sequence[Stretch]) -> Stretch:
    """Concatenate stretches of the order of samples."""
    columns = ("source", "data_pass", "sample")
    return Stretch(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))


class LastTwo(Generic[T]):
    """Caches the last two results of a function: a sequential reader of an order needs at most two windows at once."""

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._made: dict[tuple[int, ...], T] = {}

    def __call__(self, *key: int) -> T:
        """Return the function's result for the arguments ``key``, which may be cached."""
        made = self._made  # the thread that reads ahead may replace self._made meanwhile
        if key not in made:
            self._made = made = dict([*made.items()][-1:]) | {key: self._make(*key)}
        return made[key]


class Order:
    """The order of the samples of one source, as a function of the position.

    Args:
        sizes: the number of samples in each shard.
        seed: seed of all random choices.
        source: number of this source in a mix.
        window: approximate number of samples that are permuted together.
        streams: number of streams, the places of the data from which a window takes its samples.
        replacement: let each stream of a window begin at a random place. A pass may then have a sample several times or
            not at all.

    Raises:
        ValueError: there are no samples, or a number is not positive.
    """

    def __init__(
        self,
        sizes: Sequence[int] | Ints,
        seed: int,
        *,
        source: int = 0,
        window: int = WINDOW,
        streams: int = STREAMS,
        replacement: bool = False,
    ) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.length = int(self.sizes.sum())
        if self.length == 0 or window < 1 or streams < 1:
            raise ValueError(f"no order of {self.length} samples in windows of {window} from {streams} streams")
        self.seed, self.source, self.replacement = seed, source, replacement
        self.streams = min(streams, self.length)
        self.windows = -(-self.length // window)
        self._first = np.concatenate([[0], self.sizes.cumsum()])  # number of the first sample of each shard
        self._cuts = np.arange(self.streams + 1) * self.length // self.streams  # begin of each stream, end of the last
        self._passes, self._windows = LastTwo(self._shards), LastTwo(self._window)

    def __len__(self) -> int:
        """Return the number of samples in a pass over the source."""
        return self.length

    def __call__(self, start: int, stop: int) -> Stretch:
        """Return the samples of the source at positions ``start`` to ``stop - 1`` of this order."""
        parts = []
        while start < stop:
            data_pass, at = divmod(start, self.length)
            number = self._window_at(at)
            begin, end = self._begin(number), self._begin(number + 1)
            samples = self._windows(data_pass, number)[at - begin : stop - start + at - begin]
            parts.append(Stretch(np.full(len(samples), self.source), np.full(len(samples), data_pass), samples))
            start += min(end - at, stop - start)
        return _joined(parts) if parts else Stretch(*(np.empty(0, np.int64),) * 3)

    def _takes(self, number: int) -> Ints:
        """Return the number of samples that the windows before window ``number`` take from each stream."""
        return np.diff(self._cuts) * number // self.windows

    def _begin(self, number: int) -> int:
        """Return the position at which a window of shuffled samples begins within a pass."""
        return int(self._takes(number).sum())

    def _window_at(self, position: int) -> int:
        """Return the number of the window of shuffled samples that contains ``position`` of a pass."""
        number = min(position * self.windows // self.length, self.windows - 1)
        while self._begin(number) > position:
            number -= 1
        while self._begin(number + 1) <= position:
            number += 1
        return number

    def _shards(self, data_pass: int) -> tuple[Ints, Ints]:
        """Return the permutation of the shards in a pass, and the offset of each among all samples of the pass."""
        shards = permutation(len(self.sizes), self.seed, self.source, data_pass)
        return shards, np.concatenate([[0], self.sizes[shards].cumsum()])

    def _window(self, data_pass: int, number: int) -> Ints:
        """Return the samples of a window in their permuted order."""
        shards, begins = self._passes(data_pass)
        low, high = self._takes(number), self._takes(number + 1)
        key = (self.seed, self.source, data_pass, number + 1)
        if self.replacement:
            places = (random_words(self.streams, *key, 1) % np.uint64(self.length)).astype(np.int64)
        else:
            places = self._cuts[:-1] + low
        counts = high - low
        steps = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        row = (np.repeat(places, counts) + steps) % self.length  # positions in the concatenation of all samples
        row = row[permutation(len(row), *key, 0)]
        at = np.searchsorted(begins, row, side="right") - 1
        return self._first[shards[at]] + row - begins[at]


class Mix:
    """Interleaves the orders of several sources; each has its exact share in every block of a few thousand positions.

    Args:
        orders: the order of each source.
        factors: how often a sample of each source is seen, relative to a source with factor 1.

    Raises:
        ValueError: there is not one positive factor for each order, or there are too many orders.
    """

    def __init__(self, orders: Sequence[Order], factors: Sequence[float], seed: int) -> None:
        if len(factors) != len(orders) or not all(0 < factor < float("inf") for factor in factors):
            raise ValueError(f"a mix of {len(orders)} sources needs as many factors above 0, got {list(factors)}")
        if len(orders) > MAX_SOURCES:
            raise ValueError(f"a mix has at most {MAX_SOURCES} sources, got {len(orders)}")
        self.orders, self.seed = list(orders), seed
        weights = np.array([len(order) * factor for order, factor in zip(orders, factors, strict=True)])
        self.shares = weights / weights.sum()
        self.length = round(float(weights.sum()))
        self._blocks = LastTwo(self._block)

    def __len__(self) -> int:
        """Return the length of a pass of the mix, in which each sample is seen ``factor`` times on average."""
        return self.length

    def __call__(self, start: int, stop: int) -> Stretch:
        """Return the samples of the mixed sources at positions ``start`` to ``stop - 1``."""
        if len(self.orders) == 1:
            return self.orders[0](start, stop)
        parts = []
        while start < stop:
            block, at = divmod(start, MIX_BLOCK)
            end = min(stop - start + at, MIX_BLOCK)
            parts.append(self._blocks(block)[at:end])
            start += end - at
        return _joined(parts)

    def _taken(self, blocks: int) -> Ints:
        """Return the number of samples of each source in the first ``blocks`` blocks of a mix."""
        taken = np.floor(self.shares * (blocks * MIX_BLOCK)).astype(np.int64)
        taken[self.shares.argmax()] += blocks * MIX_BLOCK - taken.sum()
        return taken

    def _block(self, block: int) -> Stretch:
        """Return the samples of a block of the mix."""
        low, high = self._taken(block), self._taken(block + 1)
        parts = [order(int(a), int(b)) for order, a, b in zip(self.orders, low, high, strict=True)]
        turns = np.repeat(np.arange(len(parts)), high - low)[permutation(MIX_BLOCK, self.seed, block, 2)]
        # The samples of a source keep their order: its places in the permuted block take its samples one after the
        # other.
        places = np.empty(MIX_BLOCK, np.int64)
        places[np.argsort(turns, kind="stable")] = np.arange(MIX_BLOCK)
        return _joined(parts)[places]


class Unique:
    """An order in which no two samples of a batch have the same identity.

    The samples in each stretch of about ``window`` positions are reassigned to the batches of the stretch. If an
    identity has more samples than the stretch has batches, surplus samples are replaced by others, drawn from the whole
    set. The samples after the last full batch of a pass are left out; they differ from pass to pass.

    Args:
        order: the order that determines the samples of each stretch.
        identities: one 64-bit number for each sample of each source; samples with equal numbers have the same identity.
        batch_size: number of samples in the batch of all ranks together.
        window: approximate number of positions that are reassigned together.

    Raises:
        ValueError: the order is shorter than a batch.
    """

    def __init__(self, order: Mix, identities: Sequence[Words], batch_size: int, window: int = WINDOW) -> None:
        if len(order) < batch_size:
            raise ValueError(f"{len(order)} samples are less than one batch of {batch_size}")
        self.order, self.identities, self.batch_size = order, identities, batch_size
        self.batches = len(order) // batch_size  # number of batches in a pass
        self.group = min(max(MIN_DEALT, window // batch_size), self.batches)  # batches that are filled together
        self._groups = LastTwo(self._dealt)

    def __len__(self) -> int:
        """Return the number of positions in a pass, a multiple of the batch size."""
        return self.batches * self.batch_size

    def __call__(self, start: int, stop: int) -> Stretch:
        """Return the samples at positions ``start`` to ``stop - 1`` of the order without equal samples in a batch.

        Raises:
            ValueError: there are too few different identities for batches of this size.
        """
        parts = []
        while start < stop:
            data_pass, at = divmod(start, len(self))
            group, within = divmod(at, self.group * self.batch_size)
            dealt = self._groups(data_pass, group)
            end = min(within + stop - start, len(dealt))
            parts.append(dealt[within:end])
            start += end - within
        return _joined(parts)

    def _dealt(self, data_pass: int, group: int) -> Stretch:
        """Return the samples of a group of batches, without two of the same identity in a batch."""
        begin = group * self.group * self.batch_size
        size = min(len(self) - begin, self.group * self.batch_size)
        batches = size // self.batch_size
        rest = len(self.order) - len(self) if begin + size == len(self) else 0
        first = data_pass * len(self.order) + begin
        stretch = self.order(first, first + size + rest)
        key = (self.order.seed, data_pass, group)
        for attempt in range(MAX_DRAWS):
            alike = self.identities_of(stretch)
            places = at_most(alike, batches)[:size]
            if len(places) == size:
                return stretch[places[deal(alike[places], batches, *key)]]
            stretch = _joined([stretch, self._drawn(16 * (size - len(places)) + 256, data_pass, *key, attempt)])
        raise ValueError(
            f"cannot fill {batches} batches of {self.batch_size} with different samples: only {len(places)} were found "
            f"among {len(stretch)}; lower the batch size"
        )

    def identities_of(self, stretch: Stretch) -> Words:
        """Return the identity of each sample in a stretch of an order."""
        found = np.empty(len(stretch), np.uint64)
        for source, identities in enumerate(self.identities):
            mine = stretch.source == source
            found[mine] = identities[stretch.sample[mine]]
        return found

    def alike(self, source: int, sample: int) -> Ints:
        """Return all samples of a source with the identity of ``sample``, including ``sample``."""
        identities = self.identities[source]
        parts = [
            begin + np.flatnonzero(identities[begin : begin + COMPARED] == identities[sample])
            for begin in range(0, len(identities), COMPARED)  # a mask of the whole source could fill the memory
        ]
        return np.concatenate(parts)

    def _drawn(self, count: int, data_pass: int, *key: int) -> Stretch:
        """Draw replacement samples from all sources, from each in proportion to its share."""
        turns, numbers = random_words(count, *key, 8), random_words(count, *key, 9)
        bounds = self.order.shares.cumsum()[:-1]
        source = np.searchsorted(bounds, turns / 2.0**64, side="right")
        sizes = np.array([len(order) for order in self.order.orders], np.uint64)
        return Stretch(source, np.full(count, data_pass), (numbers % sizes[source]).astype(np.int64))


def at_most(identities: Words, count: int) -> Ints:
    """Keep the first ``count`` samples of each identity; return the indices of the kept samples in ascending order."""
    order = np.argsort(identities, kind="stable")
    _, begins, counts = np.unique(identities[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(begins, counts)
    return np.sort(order[rank < count])


def deal(identities: Words, batches: int, *key: int) -> Ints:
    """Assign samples to batches without a repeated identity; return the indices of the samples, batch after batch.

    The samples are sorted by identity and dealt to the batches like cards, one to each batch in turn. Two samples of
    one identity are in different batches as long as no identity has more than ``batches`` samples.
    """
    unique, which = np.unique(identities, return_inverse=True)
    row = np.argsort(random_words(len(unique), *key, 4)[which], kind="stable")
    batch_of = permutation(batches, *key, 6)[np.arange(len(row)) % batches]
    shuffled = permutation(len(row), *key, 7)
    return row[shuffled[np.argsort(batch_of[shuffled], kind="stable")]]

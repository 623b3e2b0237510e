"""The plan of a run's batches: the place of each batch in the order of the samples, and the sizes of its images.

The batches of a run have equal numbers of pairs, or a budget of tokens. With a budget, each batch draws the largest
number of patches of its images (a sequence-length schedule, as NaFlex has it), and has as many pairs as fit. The
number of a batch and the seed determine its draws, so that the plan is the same on any number of processes.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from .order import Ints, LastTwo, Words, random_words_at

Unit = Literal["pairs", "tokens"]
BLOCK = 1 << 12  # number of batches of a budget that are planned together
MOST_BATCHES = 1 << 31  # the most batches of a budget in a run; they are counted one by one, which takes minutes


class PlannedBatch(NamedTuple):
    """A batch of all ranks together: the position of its first sample in the order, and the number of its pairs.

    For NaFlex, no image has more than ``seq_len`` patches, whose side is ``patch_size``, or the model's own if it is
    None.
    """

    first: int
    pairs: int
    seq_len: int | None = None
    patch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class EqualBatches:
    """A plan of training batches of ``largest`` pairs each."""

    largest: int

    @property
    def sizes(self) -> dict[int | None, int]:
        """The number of pairs of a batch, as the only value of a dict; its key is a number of patches, None here."""
        return {None: self.largest}

    def __getitem__(self, number: int) -> PlannedBatch:
        """Return the plan of batch ``number`` of the run, counted from 0."""
        return PlannedBatch(number * self.largest, self.largest)

    def before(self, number: int, unit: Unit = "pairs") -> int:
        """Return the pairs of all batches before batch ``number``.

        Raises:
            ValueError: ``unit`` is not "pairs".
        """
        _refuse_tokens(unit)
        return number * self.largest

    def batches_for(self, amount: int, unit: Unit = "pairs") -> int:
        """Return the least number of batches that have ``amount`` pairs together.

        Raises:
            ValueError: ``unit`` is not "pairs".
        """
        _refuse_tokens(unit)
        return -(-amount // self.largest)


def _refuse_tokens(unit: Unit) -> None:
    """Refuse to count equal batches of pairs in tokens: without a budget of tokens, images have unknown lengths."""
    if unit != "pairs":
        raise ValueError(f"batches of equal numbers of pairs are counted in pairs, not in {unit}")


@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """A budget of tokens for each batch. The names and meanings are those of OpenCLIP's flags for NaFlex.

    Attributes:
        seq_lens: numbers of patches; each batch draws one, and none of its images has more.
        seq_len_probs: the weight of each of ``seq_lens`` in the draw; empty for equal weights.
        patch_sizes: sides of a patch in pixels, of which each batch draws one; empty for the model's own.
        patch_size_probs: the weight of each of ``patch_sizes`` in the draw; empty for equal weights.
        max_tokens: the most tokens of a batch of one process, if each image has the number that was drawn.
        divisor: the pairs of one process are a multiple of this, where so many fit; otherwise as many as fit.
        processes: number of processes with which the run began; a batch has that many times the pairs of one process.

    Raises:
        ValueError: there is no number of patches, weights do not fit the numbers, or not a single image fits.
    """

    seq_lens: tuple[int, ...]
    seq_len_probs: tuple[float, ...] = ()
    patch_sizes: tuple[int, ...] = ()
    patch_size_probs: tuple[float, ...] = ()
    max_tokens: int = 16384
    divisor: int = 8
    processes: int = 1

    def __post_init__(self) -> None:
        for numbers, weights in ((self.seq_lens, self.seq_len_probs), (self.patch_sizes, self.patch_size_probs)):
            if weights and (len(weights) != len(numbers) or min(weights) < 0 or not 0 < sum(weights) < float("inf")):
                raise ValueError(f"a draw of one of {list(numbers)} needs a weight for each, got {list(weights)}")
        if not self.seq_lens or min(*self.seq_lens, *self.patch_sizes, self.divisor, self.processes) < 1:
            raise ValueError(f"the numbers of a budget of tokens must be at least 1, got {self}")
        if max(self.seq_lens) > self.max_tokens:
            raise ValueError(f"a budget of {self.max_tokens} tokens has no room for an image of {max(self.seq_lens)}")

    def pairs(self, seq_len: int) -> int:
        """Return the pairs of a batch of all processes together whose images have up to ``seq_len`` patches."""
        fitting = self.max_tokens // seq_len
        return self.processes * (fitting // self.divisor * self.divisor or fitting)

    def refuse_ranks(self, ranks: int) -> None:
        """Refuse a number of ranks among which the pairs of some batches cannot be divided.

        Raises:
            ValueError: as above.
        """
        for seq_len in self.seq_lens:
            if self.pairs(seq_len) % ranks:
                raise ValueError(
                    f"a batch of {self.pairs(seq_len)} pairs, whose images have up to {seq_len} patches, cannot be "
                    f"divided among {ranks} processes: start a number that divides it"
                )


class BudgetedBatches:
    """A plan of batches that keep to a budget of tokens; ``seed`` determines their draws of patch counts and sizes."""

    def __init__(self, budget: TokenBudget, seed: int) -> None:
        self.budget, self.seed = budget, seed
        self.sizes: dict[int | None, int] = {seq_len: budget.pairs(seq_len) for seq_len in budget.seq_lens}
        self.largest = max(self.sizes.values())
        self.most_tokens = max(seq_len * budget.pairs(seq_len) for seq_len in budget.seq_lens)
        self._draws = LastTwo(self._drawn)
        # The sums of pairs and of tokens before each block of batches, as far as they were asked for. Two threads may
        # store the same sum, which changes nothing.
        self._sums: dict[Unit, dict[int, int]] = {"pairs": {0: 0}, "tokens": {0: 0}}

    def __getitem__(self, number: int) -> PlannedBatch:
        """Return the plan of batch ``number`` of the run, counted from 0."""
        block, within = divmod(number, BLOCK)
        seq_lens, patch_sizes = self._draws(block)
        seq_len = self.budget.seq_lens[seq_lens[within]]
        patch_size = self.budget.patch_sizes[patch_sizes[within]] if self.budget.patch_sizes else None
        return PlannedBatch(self.before(number), self.sizes[seq_len], seq_len, patch_size)

    def before(self, number: int, unit: Unit = "pairs") -> int:
        """Return the pairs or tokens of all batches before batch ``number``; images count ``seq_len`` tokens each."""
        block, within = divmod(number, BLOCK)
        while len(self._sums[unit]) <= block:
            self._add_sum(unit)
        return self._sums[unit][block] + int(self._amounts(block, unit)[:within].sum())

    def batches_for(self, amount: int, unit: Unit = "pairs") -> int:
        """Return the least number of batches that have ``amount`` pairs or tokens together.

        Raises:
            ValueError: they are too many to be counted.
        """
        if amount <= 0:
            return 0
        if amount > MOST_BATCHES * (self.most_tokens if unit == "tokens" else self.largest):
            raise ValueError(f"a run of {amount} {unit} has more than {MOST_BATCHES} batches: let it be shorter")
        sums = self._sums[unit]
        while sums[len(sums) - 1] < amount:
            self._add_sum(unit)
        block = bisect.bisect_left(range(len(sums)), amount, key=sums.__getitem__) - 1
        within = np.searchsorted(self._amounts(block, unit).cumsum(), amount - sums[block])
        return block * BLOCK + int(within) + 1

    def _add_sum(self, unit: Unit) -> None:
        """Store the sum of pairs or tokens before the first block of batches for which it is not stored yet."""
        sums = self._sums[unit]
        block = len(sums)
        sums[block] = sums[block - 1] + int(self._amounts(block - 1, unit).sum())

    def _amounts(self, block: int, unit: Unit) -> Ints:
        """Return the pairs or tokens of each batch of a block."""
        amounts = [self.sizes[n] * (n if unit == "tokens" else 1) for n in self.budget.seq_lens]
        return np.array(amounts, np.int64)[self._draws(block)[0]]

    def _drawn(self, block: int) -> tuple[Ints, Ints]:
        """Draw for each batch of a block an index into ``seq_lens`` and an index into ``patch_sizes``."""
        places = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.uint64)
        # The -1 makes these random words differ from those for samples, whose keys have no negative numbers.
        budget, key = self.budget, (self.seed, -1)
        seq_lens = _draw(random_words_at(places, *key, 0), len(budget.seq_lens), budget.seq_len_probs)
        return seq_lens, _draw(random_words_at(places, *key, 1), len(budget.patch_sizes), budget.patch_size_probs)


def _draw(words: Words, count: int, weights: tuple[float, ...]) -> Ints:
    """Draw a number below ``count`` for each batch by its random word; without ``weights``, all are equally likely."""
    ends = np.cumsum(weights or (1.0,) * count)
    return np.searchsorted(ends[:-1] / ends[-1:], (words >> np.uint64(11)) * 2.0**-53, side="right").astype(np.int64)


BatchPlan = EqualBatches | BudgetedBatches

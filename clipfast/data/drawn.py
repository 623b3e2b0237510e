"""Pairs without files: what is in a pair follows from its number."""

from __future__ import annotations

from typing import ClassVar, Self

from .index import IndexCache, ShardIndex
from .keys import DEFAULT_KEYS, Keys
from .samples import RawSample, synthetic_pairs


class DrawnSource:
    """Pairs that follow from their numbers, as one shard without a file.

    Args:
        count: of the pairs.
        seed: the pairs of another seed are all different.
        index: keeps the identities of the pairs; by default that in the user's cache folder.

    Attributes:
        prefix: with which names of such sets begin.
        stamp: as of a file; it changes when pairs do.
    """

    prefix: ClassVar[str]
    stamp: ClassVar[str]

    def __init__(self, count: int, seed: int = 0, index: IndexCache | None = None) -> None:
        self.seed, self.index = seed, index or IndexCache()
        self.url = f"{self.prefix}{count}" + (f"@{seed}" if seed else "")
        self.shards = [ShardIndex(self.url, self.stamp, 0, count, {})]
        self.sizes, self.bytes_read = [count], 0

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.sizes[0]

    @classmethod
    def named(cls, name: str, index: IndexCache | None = None) -> Self:
        """Return the pairs that a name with this prefix, N, and perhaps @SEED stands for.

        Raises:
            ValueError: as :func:`clipfast.data.samples.synthetic_pairs`.
        """
        return cls(*synthetic_pairs(name), index)

    def name(self, number: int) -> str:
        """Return the name of the source and the number of the pair."""
        return f"{self.url}, sample {number}"

    def close(self) -> None:
        """Do nothing, as nothing is open."""

    def read(self, number: int, keys: Keys = DEFAULT_KEYS) -> RawSample:
        """Return a pair; its image is only drawn if ``keys`` name it."""
        raise NotImplementedError

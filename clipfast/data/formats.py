"""Formats of shards: how the samples of a shard are found in its file, and made from their bytes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .samples import RawSample

LENGTH_BITS = 24
MAX_BEGIN, MAX_LENGTH = 1 << (64 - LENGTH_BITS), 1 << LENGTH_BITS
Extents = NDArray[np.uint64]  # begin and length of each sample in its shard, packed by ``extents``


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format of shards: how samples are found, and how they are parsed.

    Attributes:
        unit: number of bytes in which begins and lengths of extents are counted.
        scan: takes an uncompressed shard and its name, and returns the extents of its samples, and how many samples
            are estimated to be lost in each damaged part of it; raises ValueError if it is not of this format.
        parser: takes the shard's name and a descriptor of it, and returns a function that makes a sample of the bytes
            of its extent; that function raises SampleError if the sample cannot be used, and ValueError if there is
            none. In place of files, the sample may have their names, as :class:`clipfast.data.samples.Links`.
    """

    unit: int
    scan: Callable[[BinaryIO, str], tuple[Extents, dict[str, int]]]
    parser: Callable[[str, int], Callable[[bytes], RawSample]]


def extents(begins: Sequence[int], lengths: Sequence[int]) -> Extents:
    """Pack begins and lengths of samples into 64 bits each, for the index of a shard.

    Raises:
        ValueError: an extent is too long or too far from the beginning.
    """
    if max(begins, default=0) >= MAX_BEGIN or max(lengths, default=0) >= MAX_LENGTH:
        raise ValueError(f"a sample begins at {max(begins):,} and one has {max(lengths):,} units, which is too much")
    return np.array(begins, np.uint64) << np.uint64(LENGTH_BITS) | np.array(lengths, np.uint64)


def unpacked(extent: np.uint64) -> tuple[int, int]:
    """Unpack the begin and the length of a sample from an extent in the index."""
    begin, length = divmod(int(extent), MAX_LENGTH)
    return begin, length

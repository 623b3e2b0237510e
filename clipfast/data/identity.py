"""By what samples count as the same: a number for each, kept beside the index of its shard."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from ..images import SampleError
from .samples import RawSample, caption, field
from .source import ShardSource


def identities(source: ShardSource, unique_by: str) -> NDArray[np.uint64]:
    """Return a 64-bit number for each sample, which two samples share if they have the same value of ``unique_by``.

    Every sample is read once; after that, the numbers are in the cache.

    Args:
        source: the samples.
        unique_by: "caption", or a key of the samples' json. A sample that lacks it is like no other.

    Raises:
        ShardError: a shard cannot be read.
    """
    from tqdm import tqdm

    parts, first = [], 0
    for number, shard in enumerate(tqdm(source.shards, f"reading every {unique_by}", unit="shard", disable=None)):
        known = source.index.column(shard, unique_by)
        if known is None:
            numbers = range(first, first + shard.count)
            known = np.array([_identity(source, sample, unique_by, shard.name) for sample in numbers], np.uint64)
            source.index.keep_column(shard, unique_by, known)
        parts.append(known)
        first += source.sizes[number]
    return np.concatenate(parts)


def _identity(source: ShardSource, number: int, unique_by: str, shard: str) -> int:
    sample = source.read(number)
    try:
        text = f"value/{_value(sample, unique_by)}"
    except SampleError:
        text = f"sample/{shard}/{number}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def _value(sample: RawSample, unique_by: str) -> str:
    return caption(sample) if unique_by == "caption" else field(sample, unique_by)

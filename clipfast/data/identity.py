"""By what samples count as the same: a number for each, kept beside the index of its shard."""

import dataclasses
import hashlib

import numpy as np
from numpy.typing import NDArray

from ..images import SampleError
from ..progress import each
from .index import ShardError
from .keys import DEFAULT_KEYS, Keys
from .samples import caption, field, is_folder
from .source import Source

CAPTION = "caption"


def identities(source: Source, unique_by: str, keys: Keys = DEFAULT_KEYS) -> NDArray[np.uint64]:
    """Return a 64-bit number for each sample, which two samples share if they have the same value of ``unique_by``.

    Every sample is read once; after that, the numbers are in the cache, unless the shard is a folder.

    Args:
        source: the samples.
        unique_by: "caption", or a key of the samples' json. A sample that lacks it is like no other.
        keys: say what the caption is; of several captions of a sample, the first counts.

    Raises:
        ShardError: a shard cannot be read.
    """
    keys = dataclasses.replace(keys, images=())  # no image is read
    column = f"{unique_by} by {keys.texts}, {keys.is_json}" if unique_by == CAPTION else unique_by
    found, first = np.empty(len(source), np.uint64), 0
    for number, shard in enumerate(each(source.shards, f"reading every {unique_by}", "shards")):
        is_kept = not is_folder(shard.name)  # whose stamp stays as it is when its texts change
        known = source.index.column(shard, column) if is_kept else None
        if known is None:
            numbers = range(first, first + shard.count)
            known = np.array([_identity(source, sample, unique_by, keys, shard.name) for sample in numbers], np.uint64)
            if is_kept:
                source.index.keep_column(shard, column, known)
        found[first : first + shard.count] = known
        first += source.sizes[number]
    source.close()  # data workers would inherit what is open, and keep its space
    return found


def _identity(source: Source, number: int, unique_by: str, keys: Keys, shard: str) -> int:
    try:
        sample = source.read(number, keys)
        text = f"value/{caption(sample, keys=keys) if unique_by == CAPTION else field(sample, unique_by)}"
    except ShardError:
        raise
    except SampleError:
        text = f"sample/{shard}/{number}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest())

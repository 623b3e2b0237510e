"""Sets of pairs of which any sample can be read by its number."""

import collections
import io
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .index import Blocks, ShardError, ShardIndex, TarIndex
from .samples import RawSample, group_members
from .tar import BLOCK, Member, read_tar

MAX_OPEN = 256  # shards that a process holds open for all its sources


class Source(Protocol):
    """A set of pairs in shards, of which any sample can be read."""

    @property
    def sizes(self) -> Sequence[int]:
        """The number of samples in each shard; a sample's number counts through all shards."""

    @property
    def bytes_read(self) -> int:
        """How many bytes this process has read."""

    def read(self, number: int) -> RawSample:
        """Return a sample, undecoded.

        Raises:
            SampleError: it cannot be read.
        """

    def name(self, number: int) -> str:
        """Return shard and place of a sample, for a person who looks for it; nothing is read."""


def open_shards(
    names: Sequence[str], workers: int = 0, index: TarIndex | None = None, max_open: int = MAX_OPEN
) -> "TarSource":
    """Return the samples of shards, which are indexed first unless they have been before.

    Args:
        names: as :func:`clipfast.data.expand_shards` gives them.
        workers: processes that make indices; with 0, this one does.
        index: to use in place of that in the user's cache folder.
        max_open: shards that a process holds open.

    Raises:
        ShardError: a shard is missing, or is not a tar file.
    """
    from tqdm import tqdm

    index = index or TarIndex()
    found = index.shards(names, workers)
    shards = list(tqdm(found, "index", len(names), unit="shard", disable=None, leave=False, delay=1))
    return TarSource(index, shards, max_open)


class TarSource:
    """The samples of indexed tar files.

    Args:
        index: that the shards are in.
        shards: in order.
        max_open: shards that a process holds open.
    """

    def __init__(self, index: TarIndex, shards: Sequence[ShardIndex], max_open: int = MAX_OPEN) -> None:
        self.index, self.shards, self.max_open = index, list(shards), max_open
        self.sizes = [shard.count for shard in self.shards]
        self.bytes_read = 0
        self._first: NDArray[np.int64] = np.cumsum([0, *self.sizes])
        self._open: collections.OrderedDict[int, tuple[int, Blocks]] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": collections.OrderedDict()}  # another process opens files of its own

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return shard, number - int(self._first[shard])

    def name(self, number: int) -> str:
        """Return the shard's name and the number of the sample in it."""
        shard, within = self._place(number)
        return f"{os.path.basename(self.shards[shard].name)}, sample {within}"

    def read(self, number: int) -> RawSample:
        """Return ``__key__``, ``__url__`` and bytes by file extension, by one call to the system.

        Raises:
            ShardError: the shard is missing, or was changed; or no sample is where the index says.
        """
        shard, within = self._place(number)
        descriptor, blocks = self._opened(shard)
        first, count = (int(n) for n in blocks[within])
        name = self.shards[shard].name
        try:
            data = os.pread(descriptor, count * BLOCK, first * BLOCK)
        except OSError as error:
            self._close(shard)
            raise ShardError(f"the shard cannot be read: {error.strerror}", "unreadable shard") from error
        self.bytes_read += len(data)
        if len(data) < count * BLOCK - BLOCK + 1:
            self._close(shard)
            raise ShardError(f"the shard ends inside sample {within}", "truncated shard")
        members = (part for part in read_tar(io.BytesIO(data)) if isinstance(part, Member))
        try:
            return next(group_members(name, members))
        except (StopIteration, ValueError) as error:
            raise ShardError(
                f"sample {within} is not where it was when the shard was indexed", "replaced shard"
            ) from error

    def _opened(self, shard: int) -> tuple[int, Blocks]:
        found = self._open.get(shard)
        if found is None:
            if len(self._open) >= self.max_open:
                self._close(next(iter(self._open)))
            blocks = self.index.blocks(self.shards[shard].name)
            found = self._open[shard] = self.index.open(self.shards[shard]), blocks
        self._open.move_to_end(shard)
        return found

    def _close(self, shard: int) -> None:
        os.close(self._open.pop(shard)[0])

    def __del__(self) -> None:
        for shard in list(self._open):
            self._close(shard)

"""Sets of pairs of which any sample can be read by its number."""

import collections
import dataclasses
import hashlib
import logging
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ..io.progress import each
from ..models.images import SampleError
from .formats import Extents, unpacked
from .index import IndexCache, ShardError, ShardIndex
from .keys import DEFAULT_KEYS, Keys
from .names import is_folder, is_synthetic, synthetic_pairs
from .order import STREAMS
from .samples import RawSample, caption, field, load_links

MAX_OPEN = 256  # shards that a process holds open for all its sources, unless a mix of them needs more
OTHER_FILES = 512  # that a process may have open beside shards
IDLE = 1024  # reads of others after which a shard is done: each of an order's 64 streams is read from far more often

CAPTION = "caption"  # by which samples can count as the same

log = logging.getLogger("clipfast")


class Source(Protocol):
    """A set of pairs in shards, of which any sample can be read."""

    @property
    def index(self) -> IndexCache:
        """The cache in which numbers of the samples are kept."""

    @property
    def shards(self) -> Sequence[ShardIndex]:
        """The index of each shard, or only its count."""

    @property
    def sizes(self) -> Sequence[int]:
        """The number of samples in each shard; a sample's number counts through all shards."""

    def __len__(self) -> int:
        """Return the number of samples."""

    @property
    def bytes_read(self) -> int:
        """How many bytes this process has read."""

    def read(self, number: int, keys: Keys = DEFAULT_KEYS) -> RawSample:
        """Return a sample, undecoded, with the files that it names and ``keys`` ask for.

        Raises:
            SampleError: it cannot be read.
        """

    def name(self, number: int) -> str:
        """Return shard and place of a sample, for a person who looks for it; nothing is read."""

    def close(self) -> None:
        """Let go of what is open; it is opened again when it is read."""


@dataclasses.dataclass
class _OpenShard:
    descriptor: int
    extents: Extents
    unit: int
    parse: Callable[[bytes], RawSample]
    last: int = 0  # the number of the last read from it


def open_sources(
    names: Sequence[str],
    workers: int = 0,
    index: IndexCache | None = None,
    max_open: int = MAX_OPEN,
    *,
    whole: bool = False,
) -> list[Source]:
    """Return the sources of pairs: one of all shards, if there are any, and one for each name of synthetic pairs.

    Args:
        names: as :func:`clipfast.data.expand_shards` gives them.
        workers, index, max_open, whole: as :func:`clipfast.data.open_shards` takes them.

    Raises:
        ShardError: a shard is missing, or is not of its format.
    """
    from .drawn_shapes import ShapesSource
    from .synthetic import SyntheticSource

    shards = [name for name in names if not is_synthetic(name)]
    found: list[Source] = [open_shards(shards, workers, index, max_open, whole=whole)] if shards else []
    for name in filter(is_synthetic, names):
        kind = SyntheticSource if name.startswith(SyntheticSource.prefix) else ShapesSource
        found.append(kind(*synthetic_pairs(name), index))
    return found


def open_shards(
    names: Sequence[str],
    workers: int = 0,
    index: IndexCache | None = None,
    max_open: int = MAX_OPEN,
    *,
    whole: bool = False,
) -> "ShardSource":
    """Return the samples of shards, which are indexed first unless they have been before, or can be counted.

    Args:
        names: as :func:`clipfast.data.expand_shards` gives them.
        workers: processes that make indices; fewer than two mean that this one does.
        index: to use in place of that in the user's cache folder.
        max_open: shards that a process holds open.
        whole: index every shard, as :meth:`IndexCache.shards` says.

    Raises:
        ShardError: a shard is missing, or is not of its format.
    """
    index = index or IndexCache()
    found = index.shards(names, workers, whole=whole)
    shards = list(each(found, "index", "shards", len(names)))
    return ShardSource(index, shards, max_open)


def open_limit(sources: int) -> int:
    """Return how many shards of each source of a mix a process holds open, as a reader of its order needs them.

    For that, the process's limit of open files is raised if need be and as far as it may be. Data workers inherit it.
    """
    wanted = max(MAX_OPEN // sources, 2 * STREAMS)  # a stream is seldom in more than two shards within a window
    needed = wanted * sources + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return min(wanted, max((limit - OTHER_FILES) // sources, MAX_OPEN // sources, 1))


class ShardSource:
    """The samples of indexed shards.

    Args:
        index: that the shards are in.
        shards: in order.
        max_open: shards that a process holds open.
    """

    def __init__(self, index: IndexCache, shards: Sequence[ShardIndex], max_open: int = MAX_OPEN) -> None:
        self.index, self.shards, self.max_open = index, list(shards), max_open
        self.sizes = [shard.count for shard in self.shards]
        self.bytes_read = self._reads = 0
        self._first: NDArray[np.int64] = np.cumsum([0, *self.sizes])
        self._open: collections.OrderedDict[int, _OpenShard] = collections.OrderedDict()
        self._refused: dict[int, tuple[str, str]] = {}  # why shards that were only counted before cannot be used

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, object]:
        # Pickling leaves the open files out; a forked worker inherits them.
        return self.__dict__ | {"_open": collections.OrderedDict()}

    def shards_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which shard each of the samples with these numbers is in."""
        return np.searchsorted(self._first, numbers, side="right") - 1

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(self.shards_of(np.asarray(number)))
        return shard, number - int(self._first[shard])

    def name(self, number: int) -> str:
        """Return the shard's name and the number of the sample in it."""
        shard, within = self._place(number)
        return f"{Path(self.shards[shard].name).name}, sample {within}"

    def read(self, number: int, keys: Keys = DEFAULT_KEYS) -> RawSample:
        """Return ``__key__``, ``__url__`` and bytes by file extension, by one call to the system if it holds its image.

        Args:
            number: of the sample.
            keys: say which of the files are read that a sample names in place of holding them.

        Raises:
            ShardError: the shard is missing, or was changed; no sample is where the index says; or it has not as many
                samples as was said.
            SampleError: the sample is broken, or a file that it names cannot be read.
        """
        shard, within = self._place(number)
        opened = self._opened(shard)
        begin, length = unpacked(opened.extents[within])
        try:
            data = os.pread(opened.descriptor, length * opened.unit, begin * opened.unit)
            self.bytes_read += len(data)
            if len(data) <= (length - 1) * opened.unit:
                self._close(shard)
                raise ShardError(f"the shard ends inside sample {within}", "truncated shard")
            sample = opened.parse(data)
        except OSError as error:
            self._close(shard)
            raise ShardError(f"the shard cannot be read: {error.strerror}", "unreadable shard") from error
        except SampleError:
            raise
        except ValueError as error:
            raise ShardError(
                f"sample {within} is not where it was when the shard was indexed", "replaced shard"
            ) from error
        self.bytes_read += load_links(sample, keys)
        sample.setdefault("__key__", f"sample {within}")
        return sample

    def _opened(self, shard: int) -> "_OpenShard":
        found = self._open.get(shard)
        if found is None:
            if len(self._open) >= self.max_open:
                self._close(next(iter(self._open)))
            self._close_removed()
            index = self._index(shard)
            form, extents = self.index.format_of(index.name), self.index.extents(index.name)
            descriptor = self.index.open(index)
            found = _OpenShard(descriptor, extents, form.unit, form.parser(index.name, descriptor))
            self._open[shard] = found
        self._open.move_to_end(shard)
        self._reads += 1
        found.last = self._reads
        return found

    def _close_removed(self) -> None:
        """Let go of the space of copies that have made room for others, and are not read from any more."""
        for shard, opened in list(self._open.items()):
            if self._reads - opened.last > IDLE and os.fstat(opened.descriptor).st_nlink == 0:
                self._close(shard)

    def _index(self, shard: int) -> ShardIndex:
        """Return the index of a shard, which is made now if its samples were only counted."""
        if self.shards[shard].counted_in is not None:
            if shard in self._refused:
                raise ShardError(*self._refused[shard])
            try:
                self.shards[shard] = self._completed(self.shards[shard])
            except ShardError as error:
                if error.kind != "missing shard":  # it may be there again later
                    self._refused[shard] = str(error), error.kind
                raise
        return self.shards[shard]

    def _completed(self, counted: ShardIndex) -> ShardIndex:
        """Return the index of a shard that was only counted."""
        index = self.index.complete(counted)
        for loss in index.losses():
            log.warning(loss)
        if index.count != counted.count:
            raise ShardError(
                f"shard {index.name} has {index.count} samples, but {counted.count} by {counted.counted_in}: correct "
                "or remove that, or replace the shard",
                "miscounted shard",
            )
        return index

    def _close(self, shard: int) -> None:
        os.close(self._open.pop(shard).descriptor)

    def close(self) -> None:
        """Close all shards; those that are read from are opened again."""
        for shard in list(self._open):
            self._close(shard)

    def __del__(self) -> None:
        self.close()


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

    def name(self, number: int) -> str:
        """Return the name of the source and the number of the pair."""
        return f"{self.url}, sample {number}"

    def close(self) -> None:
        """Do nothing, as nothing is open."""

    def read(self, number: int, keys: Keys = DEFAULT_KEYS) -> RawSample:
        """Return a pair; its image is only drawn if ``keys`` name it."""
        raise NotImplementedError


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

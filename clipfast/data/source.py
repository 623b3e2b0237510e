"""Sources: sets of pairs in which any sample can be read by its number."""

import collections
import dataclasses
import hashlib
import io
import json
import logging
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

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

if TYPE_CHECKING:
    from PIL import Image

MAX_OPEN = 256  # number of shards that a process holds open for all its sources, unless a mix needs more
OTHER_FILES = 512  # number of files that a process may have open beside shards
# A shard whose copy was removed from the cache is closed after this many reads of other shards. Each of the 64 streams
# of an order of samples is read more often than that.
IDLE = 1024

CAPTION = "caption"  # value of --unique-by: samples with equal captions have the same identity

log = logging.getLogger("clipfast")


class Source(Protocol):
    """A set of pairs in shards, in which any sample can be read by its number."""

    @property
    def index(self) -> IndexCache:
        """The cache of indices, which can also keep a number for each sample."""

    @property
    def shards(self) -> Sequence[ShardIndex]:
        """The index of each shard, or only its sample count."""

    @property
    def sizes(self) -> Sequence[int]:
        """The number of samples in each shard; samples are numbered through all shards."""

    def __len__(self) -> int:
        """Return the number of samples."""

    @property
    def bytes_read(self) -> int:
        """The number of bytes that this process has read from a source of samples."""

    def read(self, number: int, keys: Keys = DEFAULT_KEYS) -> RawSample:
        """Read an undecoded sample, with the files that it names and ``keys`` ask for.

        Raises:
            SampleError: the sample cannot be read.
        """

    def name(self, number: int) -> str:
        """Return the shard of a sample and its number there as text for a person, without reading the sample."""

    def close(self) -> None:
        """Close all open shards; they are opened again when they are read."""


@dataclasses.dataclass
class _OpenShard:
    descriptor: int
    extents: Extents
    unit: int
    parse: Callable[[bytes], RawSample]
    last: int = 0  # the count of the source's reads when this shard was last read


def open_sources(
    names: Sequence[str],
    workers: int = 0,
    index: IndexCache | None = None,
    max_open: int = MAX_OPEN,
    *,
    whole: bool = False,
) -> list[Source]:
    """Open sources of pairs: one for all shards, if there are any, and one for each name of synthetic pairs.

    Args:
        names: names of shards, from :func:`clipfast.data.expand_shards`.
        workers, index, max_open, whole: arguments of :func:`clipfast.data.open_shards`.

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
    """Open shards as a source of samples; shards without an index are indexed first, unless they can be counted.

    Args:
        names: names of shards, from :func:`clipfast.data.expand_shards`.
        workers: number of processes that make indices; with fewer than two, this process makes them.
        index: cache of indices in place of the user's cache folder.
        max_open: number of shards that a process holds open.
        whole: index every shard, see :meth:`IndexCache.shards`.

    Raises:
        ShardError: a shard is missing, or is not of its format.
    """
    index = index or IndexCache()
    found = index.shards(names, workers, whole=whole)
    shards = list(each(found, "index", "shards", len(names)))
    return ShardSource(index, shards, max_open)


def open_limit(sources: int) -> int:
    """Return how many shards of each source a process should hold open to read a mix of ``sources`` in its order.

    If necessary, the process's limit of open files is raised as far as the system allows. Data workers inherit the
    limit.
    """
    wanted = max(MAX_OPEN // sources, 2 * STREAMS)  # a stream is seldom in more than two shards within a window
    needed = wanted * sources + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return min(wanted, max((limit - OTHER_FILES) // sources, MAX_OPEN // sources, 1))


class ShardSource:
    """A source of the samples in indexed shards, which are opened when they are read.

    Args:
        index: cache with the indices of the shards.
        shards: indices of the shards in order.
        max_open: number of shards that a process holds open.
    """

    def __init__(self, index: IndexCache, shards: Sequence[ShardIndex], max_open: int = MAX_OPEN) -> None:
        self.index, self.shards, self.max_open = index, list(shards), max_open
        self.sizes = [shard.count for shard in self.shards]
        self.bytes_read = self._reads = 0
        self._first: NDArray[np.int64] = np.cumsum([0, *self.sizes])
        self._open: collections.OrderedDict[int, _OpenShard] = collections.OrderedDict()
        # This maps shards that were counted first, and then could not be indexed, to the reason.
        self._refused: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, object]:
        # Pickling leaves the open files out; a forked worker inherits them.
        return self.__dict__ | {"_open": collections.OrderedDict()}

    def shards_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the shard that holds each of these samples."""
        return np.searchsorted(self._first, numbers, side="right") - 1

    def _place(self, number: int) -> tuple[int, int]:
        """Return the shard of a sample, and the number of the sample in the shard."""
        shard = int(self.shards_of(np.asarray(number)))
        return shard, number - int(self._first[shard])

    def name(self, number: int) -> str:
        """Return the name of the shard and the number of the sample in it, as text for a person."""
        shard, within = self._place(number)
        return f"{Path(self.shards[shard].name).name}, sample {within}"

    def read(self, number: int, keys: Keys = DEFAULT_KEYS) -> RawSample:
        """Read a sample: ``__key__``, ``__url__`` and bytes by file extension; one system call, unless it names files.

        Args:
            number: number of the sample.
            keys: keys of the image and the captions; they select the files to read of those that the sample names.

        Raises:
            ShardError: the shard is missing or has changed; no sample is at the place in the index; or the shard's
                number of samples differs from the count.
            SampleError: the sample is damaged, or a file that it names cannot be read.
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
        """Return an open shard; it is opened first if necessary."""
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
        """Close copies of shards that were removed from the cache and are no longer read, to free their disk space."""
        for shard, opened in list(self._open.items()):
            if self._reads - opened.last > IDLE and os.fstat(opened.descriptor).st_nlink == 0:
                self._close(shard)

    def _index(self, shard: int) -> ShardIndex:
        """Return the index of a shard for a read; a shard that was only counted is indexed now."""
        if self.shards[shard].counted_in is not None:
            if shard in self._refused:
                raise ShardError(*self._refused[shard])
            try:
                self.shards[shard] = self._completed(self.shards[shard])
            except ShardError as error:
                if error.kind != "missing shard":  # a missing shard may be there later, and is tried again
                    self._refused[shard] = str(error), error.kind
                raise
        return self.shards[shard]

    def _completed(self, counted: ShardIndex) -> ShardIndex:
        """Index a shard that was only counted before, and refuse it if the count was wrong."""
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
        """Close one shard."""
        os.close(self._open.pop(shard).descriptor)

    def close(self) -> None:
        """Close all shards; they are opened again when they are read."""
        for shard in list(self._open):
            self._close(shard)

    def __del__(self) -> None:
        self.close()


class DrawnSource:
    """A source of pairs that are determined by their numbers, as one shard without a file.

    Args:
        count: number of pairs.
        seed: seed of the pairs, which are all different for another seed.
        index: cache for the identities of the pairs; by default in the user's cache folder.

    Attributes:
        prefix: the beginning of the names of these sources.
        stamp: stamp as of a file, which changes when the content of pairs changes.
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
        """Return the name of the source and the number of the pair, as text for a person."""
        return f"{self.url}, sample {number}"

    def close(self) -> None:
        """Do nothing, since a source of synthetic pairs holds no file open."""

    def pair(self, number: int) -> "tuple[dict[str, str], Callable[[], Image.Image]]":
        """Return the facts about a pair, with its caption as ``label``, and a function that draws its picture."""
        raise NotImplementedError

    def read(self, number: int, keys: Keys = DEFAULT_KEYS) -> RawSample:
        """Return a pair: the caption as ``txt``, the facts as ``json``, and the picture as ``png``.

        Args:
            number: number of the pair.
            keys: the picture is only drawn if ``png`` is among its names.
        """
        facts, draw = self.pair(number)
        text, fields = facts["label"].encode(), json.dumps(facts).encode()
        sample = {"__key__": str(number), "__url__": self.url, "txt": text, "json": fields}
        if "png" in keys.images:
            stream = io.BytesIO()
            draw().save(stream, "PNG", compress_level=1)
            sample["png"] = stream.getvalue()
        return sample


def identities(source: Source, unique_by: str, keys: Keys = DEFAULT_KEYS) -> NDArray[np.uint64]:
    """Return a 64-bit identity for each sample, which is equal for samples with the same value of ``unique_by``.

    This reads every sample once. After that, the identities are in the cache, unless the shard is a folder.

    Args:
        source: the source of the samples.
        unique_by: "caption", or a key of the samples' json. A sample that lacks it gets an identity of its own.
        keys: keys of the caption; of several captions of a sample, the first counts.

    Raises:
        ShardError: a shard cannot be read.
    """
    keys = dataclasses.replace(keys, images=())  # no keys of images: images are not read for identities
    column = f"{unique_by} by {keys.texts}, {keys.is_json}" if unique_by == CAPTION else unique_by
    found, first = np.empty(len(source), np.uint64), 0
    for number, shard in enumerate(each(source.shards, f"reading every {unique_by}", "shards")):
        is_kept = not is_folder(shard.name)  # the stamp of a folder does not change with its texts
        known = source.index.column(shard, column) if is_kept else None
        if known is None:
            numbers = range(first, first + shard.count)
            known = np.array([_identity(source, sample, unique_by, keys, shard.name) for sample in numbers], np.uint64)
            if is_kept:
                source.index.keep_column(shard, column, known)
        found[first : first + shard.count] = known
        first += source.sizes[number]
    source.close()  # data workers would inherit open shards, and so keep their disk space
    return found


def _identity(source: Source, number: int, unique_by: str, keys: Keys, shard: str) -> int:
    """Return the 64-bit identity of a sample; samples with the same value of ``unique_by`` have the same."""
    try:
        sample = source.read(number, keys)
        text = f"value/{caption(sample, keys=keys) if unique_by == CAPTION else field(sample, unique_by)}"
    except ShardError:
        raise
    except SampleError:
        text = f"sample/{shard}/{number}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest())

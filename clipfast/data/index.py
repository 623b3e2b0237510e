"""The index of a shard: the position of each sample in it, which one pass finds. It is cached outside of the data.

Each shard has one entry in the cache. The entry holds the shard's size and modification time, by which a replaced shard
is noticed, and eight bytes for each sample: the extent that holds it. Any sample can then be read with one call. For a
shard that is compressed, remote, or made of rows, :mod:`clipfast.data.staging` makes a copy, and the copy is indexed.
If :mod:`clipfast.data.counts` knows the number of samples of such a shard, training can begin with this number, and the
shard is indexed when it is first opened.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..io.files import open_regular, replace_file
from ..models.images import SampleError
from .counts import Counts
from .formats import Extents, Format
from .names import is_remote
from .remote import EXHAUSTED, FetchError, Found, if_there
from .staging import (  # fmt: skip
    copy_path,
    exclusive,
    file_name,
    file_stamp,
    format_of,
    is_direct,
    max_bytes,
    room,
    staged,
    stamp,
)

VERSION = 3
LOST = "damaged shard"  # the kind of skipped samples that were in a damaged part of a shard
CACHE_VARIABLE = "CLIPFAST_CACHE"
LOOKUPS = 16  # number of index entries that are looked up at the same time
QUEUED = 4096  # names that are queued for threads or processes at the same time
SHARED = 1 << 22  # bytes; larger entries are memory-mapped, so processes share them; each mapping holds the file open
Words = NDArray[np.uint64]


class ShardError(SampleError):
    """A shard that is missing, cannot be read, or has changed since it was indexed."""


def cache_folder() -> Path:
    """Return the folder of shards' indices and copies: CLIPFAST_CACHE, or ``clipfast`` in the user's cache."""
    own = os.environ.get(CACHE_VARIABLE)
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(shared) / "clipfast"


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The index entry of one shard: its stamp, its number of samples, and its damaged parts.

    Attributes:
        name: name of the shard.
        stamp: a text that changes when the shard does.
        size: size of the uncompressed shard in bytes.
        count: the number of samples.
        damage: the estimated number of lost samples in each damaged part, or 0 if it is unknown. The key says where the
            part begins and why it cannot be read.
        counted_in: the file from which ``count`` was taken, if the shard was not read. Its size is 0 then, and its
            damage is unknown.
    """

    name: str
    stamp: str
    size: int
    count: int
    damage: dict[str, int]
    counted_in: str | None = None

    @property
    def is_copied(self) -> bool:
        """Return True if the shard is read from a copy: then its size differs from the size in the stamp."""
        return self.counted_in is not None or is_remote(self.name) or self.stamp.split("/")[0] != str(self.size)

    @property
    def lost(self) -> int:
        """The estimated number of samples that the shard has lost."""
        return sum(self.damage.values())

    def losses(self) -> list[str]:
        """Return a sentence about each damaged part of the shard."""
        return [
            f"{f'about {count} pair(s)' if count else 'parts'} of shard {self.name} are lost: {place}"
            for place, count in self.damage.items()
        ]


class IndexCache:
    """The indices of shards in a cache folder.

    Args:
        folder: the cache folder; by default, :func:`cache_folder`.
        separator: field separator of CSV files, if their header contains it; see :func:`.tables.csv_format`.

    Raises:
        ValueError: the variable with the size limit for copies of shards is not a number.
    """

    def __init__(self, folder: Path | None = None, separator: str | None = None) -> None:
        self.folder, self.separator = folder or cache_folder(), separator
        max_bytes()  # refuses a wrong CLIPFAST_CACHE_BYTES already here, and not in a data worker

    def format_of(self, name: str) -> Format:
        """Return the file format of a shard by its name."""
        return format_of(name, self.separator)

    def shards(self, names: Sequence[str], workers: int = 0, *, whole: bool = False) -> Iterator[ShardIndex]:
        """Yield the index of each shard in order; missing indices are made and put into the cache.

        Args:
            names: names of the shards, as :func:`clipfast.data.expand_shards` returns them.
            workers: number of processes that make indices; with fewer than two, this process makes them.
            whole: also index shards that can only be read from a copy, even if their samples can be counted without a
                copy; otherwise such a shard is only counted, and its ``counted_in`` is set.

        Raises:
            ShardError: a shard is missing, or is not of its format.
            DiskFullError: there is no space for the cache.
        """
        known = self.known(names, whole=whole)
        missing = dict.fromkeys(name for name, found in zip(names, known, strict=True) if found is None)
        made, done = self._made(list(missing), workers), dict[str, ShardIndex]()
        for name, found in zip(names, known, strict=True):
            if found is None and name not in done:
                done[name] = next(made)
            yield found or done[name]

    def known(self, names: Sequence[str], *, whole: bool = True) -> list[ShardIndex | None]:
        """Return the cached index of each shard, and None for shards that are not in the cache.

        Without ``whole``, this includes shards whose samples can be counted without reading them.

        Raises:
            ShardError: the file with the sample count of a shard cannot be read.
        """
        counts = Counts()
        with ThreadPoolExecutor(LOOKUPS) as pool:  # the threads mostly wait for the file system
            return list(_in_slices(pool, self._known if whole else lambda name: self._counted(name, counts), names))

    def _made(self, names: Sequence[str], workers: int) -> Iterator[ShardIndex]:
        """Index shards that are not in the cache, in several processes if there are several shards."""
        if workers < 2 or len(names) < 2:
            yield from map(self._make, names)
            return
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield from _in_slices(pool, self._make, names)

    def _counted(self, name: str, counts: Counts) -> ShardIndex | None:
        """Return the cached index of a shard, or only its sample count from a file beside it; None without either."""
        known = self._known(name)
        if known is not None:
            return known
        try:
            now = if_there(name, lambda: stamp(name))
            found = None if now is None else counts.of(name)
        except FetchError as error:
            raise ShardError(str(error), error.kind) from error
        return None if now is None or found is None else ShardIndex(name, now, 0, found[0], {}, found[1])

    def complete(self, shard: ShardIndex) -> ShardIndex:
        """Index a shard that was only counted before, unless another process has done so, and return the index.

        The index is not cached if its number of samples differs from the count: every start of a run must use the same
        counts, and so the same order, no matter which shards were read before.

        Raises:
            ShardError: the shard is missing, is not of its format, or was changed after it was counted.
        """
        index = self._make(shard.name, shard.count)
        if index.stamp != shard.stamp:
            raise ShardError("the shard was replaced after its samples were counted", "replaced shard")
        return index

    def bring(self, name: str) -> int:
        """Copy a shard that cannot be read in place into the cache, and return the size of the copy.

        Raises:
            FetchError, DiskFullError: see :func:`clipfast.data.staging.staged`.
        """
        descriptor, _ = staged(name, self._copies)
        with os.fdopen(descriptor) as copy:
            return os.fstat(copy.fileno()).st_size

    def room(self) -> int:
        """Return the number of bytes that all copies of shards in the cache may take together."""
        self._copies.mkdir(parents=True, exist_ok=True)
        return room(self._copies)

    def touch(self, name: str) -> None:
        """Mark the copy of this shard as just used, so that other copies are removed first."""
        with contextlib.suppress(OSError):  # the shard has no local copy, or its time cannot be set
            os.utime(copy_path(name, self._copies))

    @property
    def _copies(self) -> Path:
        """Return the folder of the cached copies of shards."""
        return self.folder / "shards"

    def extents(self, name: str) -> Extents:
        """Return begin and length of each sample of a shard, from its index."""
        with self._entry(name).open("rb") as file:
            file.readline()
            if os.fstat(file.fileno()).st_size < SHARED:
                return np.frombuffer(file.read(), "<u8")
            return np.memmap(file, "<u8", "r", file.tell())

    def column(self, shard: ShardIndex, name: str) -> Words | None:
        """Return the cached column ``name`` of a shard: a 64-bit number for each sample; None if there is none."""
        try:
            with self._column(shard, name).open("rb") as file:
                is_current = file.readline() == self._mark(shard, name)
                return np.frombuffer(file.read(), "<u8") if is_current else None
        except FileNotFoundError:
            return None

    def keep_column(self, shard: ShardIndex, name: str, numbers: Words) -> None:
        """Cache a column of a shard, a 64-bit number for each sample, under ``name``."""
        content = self._mark(shard, name) + numbers.astype("<u8").tobytes()
        path = self._column(shard, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path):
            replace_file(path, lambda temporary: temporary.write_bytes(content), len(content))

    def _column(self, shard: ShardIndex, name: str) -> Path:
        """Return the path of a column of a shard in the cache."""
        return self._entry(shard.name).with_suffix("." + hashlib.sha256(name.encode()).hexdigest()[:8])

    def _mark(self, shard: ShardIndex, name: str) -> bytes:
        """Return the line by which the file of a cached column is recognised as the shard's own."""
        return json.dumps([VERSION, shard.name, shard.stamp, name]).encode() + b"\n"

    def open(self, shard: ShardIndex) -> int:
        """Open an indexed shard, or its copy, and return the descriptor of its uncompressed bytes.

        Raises:
            ShardError: the shard is missing, or has changed since it was indexed.
        """
        descriptor, now = self._descriptor(shard.name, shard.stamp)
        size = os.fstat(descriptor).st_size
        if (size, now) == (shard.size, shard.stamp):
            return descriptor
        os.close(descriptor)
        if size < shard.size:
            raise ShardError(f"the shard has {size} bytes, and had {shard.size} when it was indexed", "truncated shard")
        raise ShardError("the shard was replaced after it was indexed", "replaced shard")

    def _descriptor(self, name: str, stamped: str | None = None) -> tuple[int, str]:
        """Open a shard or its copy; return the descriptor of its uncompressed bytes, and its stamp.

        A copy with the stamp ``stamped`` is accepted without a look at the original shard.

        Raises:
            ShardError: the shard cannot be opened or copied.
        """
        try:
            if not is_direct(name):
                return staged(name, self._copies, stamped=stamped)
        except FetchError as error:
            raise ShardError(str(error), error.kind) from error
        try:
            with open_regular(name) as file:
                descriptor = os.dup(file.fileno())
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            raise ShardError(f"shard {name} cannot be opened: {error.strerror}", "missing shard") from error
        return descriptor, file_stamp(os.fstat(descriptor))

    def _entry(self, name: str) -> Path:
        """Return the path of a shard's entry in the cache."""
        entry = file_name(name if self.separator is None else f"{name}\0{self.separator}")
        return self.folder / "index" / entry[:2] / entry

    def _known(self, name: str) -> ShardIndex | None:
        """Return the cached index of a shard; None if it is missing, or the shard has changed since."""
        try:
            with self._entry(name).open("rb") as file:
                header: dict[str, Any] = json.loads(file.readline())
            now = stamp(name)
        except Exception:  # indexing the shard will raise any error of a file system again
            return None
        if header.pop("version", None) != VERSION or (header["name"], header["stamp"]) != (name, now):
            return None
        return ShardIndex(**header)

    def _make(self, name: str, counted: int | None = None) -> ShardIndex:
        """Index a shard, and put the index into the cache, unless another process has just done so.

        With ``counted``, an index with a different number of samples is not cached.
        """
        entry = self._entry(name)
        entry.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(entry):
            known = self._known(name)
            if known is not None:
                return known
            descriptor, now = self._descriptor(name)
            with os.fdopen(descriptor, "rb") as file:
                try:
                    found, damage = self.format_of(name).scan(file, name)
                except ValueError as error:
                    raise ShardError(f"shard {name} cannot be read: {error}", "unreadable shard") from error
                index = ShardIndex(name, now, os.fstat(descriptor).st_size, len(found), damage)
            if counted not in (None, index.count):
                return index
            kept = {"version": VERSION, **dataclasses.asdict(index)}
            del kept["counted_in"]  # always None for an index, and absent from entries of earlier versions
            header = json.dumps(kept).encode() + b"\n"
            content = header + found.astype("<u8").tobytes()
            replace_file(entry, lambda temporary: temporary.write_bytes(content), len(content))
        return index


def _in_slices(pool: Executor, function: Callable[[str], Found], names: Sequence[str]) -> Iterator[Found]:
    """Map a function over names of shards in slices, since ``map`` of a pool would queue all names at once."""
    for first in range(0, len(names), QUEUED):
        yield from pool.map(function, names[first : first + QUEUED])

"""The index of a shard says where each sample lies. It is made in one pass, and kept outside of the data.

Each shard has one entry in the cache. The entry keeps the shard's size and time of change, by which a replaced shard is
noticed, and eight bytes for each sample: the extent that holds it. A sample is then read with one call, whatever its
place. A shard that is compressed, is no file of this machine or holds rows is indexed as the copy that
:mod:`clipfast.data.staging` makes of it. If :mod:`clipfast.data.counts` knows how many samples such a shard has, that
is enough to begin with, and the shard is indexed when it is first opened.
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
LOST = "damaged shard"  # the kind of samples that lie where a shard cannot be read
CACHE_VARIABLE = "CLIPFAST_CACHE"
LOOKUPS = 16  # entries that are looked up at the same time
QUEUED = 4096  # names that are queued for threads or processes at the same time
SHARED = 1 << 22  # bytes of an entry from which on processes map it, and so share it; a mapping holds the file open
Words = NDArray[np.uint64]


class ShardError(SampleError):
    """A shard that is missing, cannot be read, or is not what it was when it was indexed."""


def cache_folder() -> Path:
    """Return the folder for what can be made anew: CLIPFAST_CACHE, or ``clipfast`` in the user's cache folder."""
    own = os.environ.get(CACHE_VARIABLE)
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(shared) / "clipfast"


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The index of one shard.

    Attributes:
        name: of the shard.
        stamp: a text that changes when the shard does.
        size: bytes of the uncompressed shard.
        count: the number of samples.
        damage: how many samples are estimated to be lost in each damaged part, of which the key says where it
            begins and why it cannot be read; 0 if nobody can tell.
        counted_in: the file that says how many samples there are, if the shard was not read: its size is 0 then, and
            its damage is unknown.
    """

    name: str
    stamp: str
    size: int
    count: int
    damage: dict[str, int]
    counted_in: str | None = None

    @property
    def is_copied(self) -> bool:
        """Return True if it is read from a copy, as its size, which is not that in the stamp, tells."""
        return self.counted_in is not None or is_remote(self.name) or self.stamp.split("/")[0] != str(self.size)

    @property
    def lost(self) -> int:
        """The number of samples that are estimated to be lost."""
        return sum(self.damage.values())

    def losses(self) -> list[str]:
        """Return a sentence for each damaged part."""
        return [
            f"{f'about {count} pair(s)' if count else 'parts'} of shard {self.name} are lost: {place}"
            for place, count in self.damage.items()
        ]


class IndexCache:
    """The indices of shards in a cache folder.

    Args:
        folder: by default, that of :func:`cache_folder`.
        separator: of the fields of CSV files, in place of what their names and headers say.

    Raises:
        ValueError: the limit for copies of shards is no number.
    """

    def __init__(self, folder: Path | None = None, separator: str | None = None) -> None:
        self.folder, self.separator = folder or cache_folder(), separator
        max_bytes()  # refused now, and not by a data worker

    def format_of(self, name: str) -> Format:
        """Return the format of a shard."""
        return format_of(name, self.separator)

    def shards(self, names: Sequence[str], workers: int = 0, *, whole: bool = False) -> Iterator[ShardIndex]:
        """Yield the index of each shard in order; those that are not in the cache are made and put there.

        Args:
            names: of the shards, as :func:`clipfast.data.expand_shards` gives them.
            workers: so many processes make indices; this one does if they are fewer than two.
            whole: also make those of shards that would have to be copied, even if their samples can be counted without
                that; otherwise their ``counted_in`` is set.

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
        """Return the index of each shard that is in the cache, and None for the others.

        Without ``whole``, shards whose samples can be counted without reading them are known too.

        Raises:
            ShardError: a file that says how many samples it has cannot be read.
        """
        counts = Counts()
        with ThreadPoolExecutor(LOOKUPS) as pool:  # each waits for its file system
            return list(_in_slices(pool, self._known if whole else lambda name: self._counted(name, counts), names))

    def _made(self, names: Sequence[str], workers: int) -> Iterator[ShardIndex]:
        if workers < 2 or len(names) < 2:
            yield from map(self._make, names)
            return
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield from _in_slices(pool, self._make, names)

    def _counted(self, name: str, counts: Counts) -> ShardIndex | None:
        """Return what is known of a shard without reading it: its index, or its count; None if nothing is known."""
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
        """Return the index of a shard that was only counted, which is made if another process has not done so.

        It is not kept if the count is another: every start has to come to the same order, whatever was read before.

        Raises:
            ShardError: it is missing, is not of its format, or was changed after it was counted.
        """
        index = self._make(shard.name, shard.count)
        if index.stamp != shard.stamp:
            raise ShardError("the shard was replaced after its samples were counted", "replaced shard")
        return index

    def bring(self, name: str) -> int:
        """Bring a shard that cannot be read where it is into the cache, and return the size of its copy.

        Raises:
            FetchError, DiskFullError: as :func:`clipfast.data.staging.staged`.
        """
        descriptor, _ = staged(name, self._copies)
        with os.fdopen(descriptor) as copy:
            return os.fstat(copy.fileno()).st_size

    def room(self) -> int:
        """Return how many bytes copies of shards may take together."""
        self._copies.mkdir(parents=True, exist_ok=True)
        return room(self._copies)

    def touch(self, name: str) -> None:
        """Let other copies than that of this shard make room."""
        with contextlib.suppress(OSError):  # it is not there, or the file system refuses
            os.utime(copy_path(name, self._copies))

    @property
    def _copies(self) -> Path:
        return self.folder / "shards"

    def extents(self, name: str) -> Extents:
        """Return where each sample of a shard lies."""
        with self._entry(name).open("rb") as file:
            file.readline()
            if os.fstat(file.fileno()).st_size < SHARED:
                return np.frombuffer(file.read(), "<u8")
            return np.memmap(file, "<u8", "r", file.tell())

    def column(self, shard: ShardIndex, name: str) -> Words | None:
        """Return the numbers that were kept for the samples of a shard under ``name``; None if there are none."""
        try:
            with self._column(shard, name).open("rb") as file:
                is_current = file.readline() == self._mark(shard, name)
                return np.frombuffer(file.read(), "<u8") if is_current else None
        except FileNotFoundError:
            return None

    def keep_column(self, shard: ShardIndex, name: str, numbers: Words) -> None:
        """Keep a 64-bit number for each sample of a shard under ``name``."""
        content = self._mark(shard, name) + numbers.astype("<u8").tobytes()
        path = self._column(shard, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path):
            replace_file(path, lambda temporary: temporary.write_bytes(content), len(content))

    def _column(self, shard: ShardIndex, name: str) -> Path:
        return self._entry(shard.name).with_suffix("." + hashlib.sha256(name.encode()).hexdigest()[:8])

    def _mark(self, shard: ShardIndex, name: str) -> bytes:
        return json.dumps([VERSION, shard.name, shard.stamp, name]).encode() + b"\n"

    def open(self, shard: ShardIndex) -> int:
        """Return a descriptor of a shard's uncompressed bytes.

        Raises:
            ShardError: it is missing, or is not what it was when it was indexed.
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
        """Return a descriptor of a shard's uncompressed bytes, and the stamp of the shard.

        A copy that has the stamp ``stamped`` is good enough, whatever the shard is by now.

        Raises:
            ShardError: it cannot be opened or brought here.
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
        entry = file_name(name if self.separator is None else f"{name}\0{self.separator}")
        return self.folder / "index" / entry[:2] / entry

    def _known(self, name: str) -> ShardIndex | None:
        """Return the index in the cache; None if there is none of the shard as it is now."""
        try:
            with self._entry(name).open("rb") as file:
                header: dict[str, Any] = json.loads(file.readline())
            now = stamp(name)
        except Exception:  # every file system has errors of its own; making the index meets them again
            return None
        if header.pop("version", None) != VERSION or (header["name"], header["stamp"]) != (name, now):
            return None
        return ShardIndex(**header)

    def _make(self, name: str, counted: int | None = None) -> ShardIndex:
        """Index a shard, and put the index into the cache, unless another process has just done so.

        With ``counted``, an index of another number of samples is not kept.
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
            del kept["counted_in"]  # which is None, and was not there in earlier entries
            header = json.dumps(kept).encode() + b"\n"
            content = header + found.astype("<u8").tobytes()
            replace_file(entry, lambda temporary: temporary.write_bytes(content), len(content))
        return index


def _in_slices(pool: Executor, function: Callable[[str], Found], names: Sequence[str]) -> Iterator[Found]:
    """Yield the results of a function in order. (A pool's own ``map`` queues all names at once.)"""
    for first in range(0, len(names), QUEUED):
        yield from pool.map(function, names[first : first + QUEUED])

"""The index of a tar file says where each sample lies. It is made in one pass, and kept outside of the data.

Each shard has one entry in the cache. The entry keeps the shard's size and time of change, by which a replaced shard is
noticed, and eight bytes for each sample: the first block and the number of blocks of the stretch that holds all its
members. A sample is then read with one call, whatever its place. A shard that is compressed
or is no file of this machine is indexed as the copy that :mod:`clipfast.data.staging` makes of it.
"""

import dataclasses
import hashlib
import json
import mmap
import multiprocessing
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..files import replace_file
from ..images import SampleError
from .samples import group_members
from .staging import FetchError, exclusive, file_name, file_stamp, is_direct, staged, stamp
from .tar import BLOCK, MAX_MEMBER, Damage, Member, pax_records, read_tar

VERSION = 1
CACHE_VARIABLE = "CLIPFAST_CACHE"
LOOKUPS = 16  # entries that are looked up at the same time
Words = NDArray[np.uint64]
Blocks = NDArray[np.uint32]  # [samples, 2]: first block and number of blocks


class ShardError(SampleError):
    """A shard that is missing, is not a tar file, or is not what it was when it was indexed."""


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
        damage: how many samples are estimated to be lost in each damaged stretch, of which the key says where it
            begins and why it cannot be read; 0 if nobody can tell.
    """

    name: str
    stamp: str
    size: int
    count: int
    damage: dict[str, int]


class TarIndex:
    """The indices of shards in a cache folder, in place of which :func:`cache_folder` is taken if it is None."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder()

    def shards(self, names: Sequence[str], workers: int = 0) -> Iterator[ShardIndex]:
        """Yield the index of each shard in order; those that are not in the cache are made and put there.

        Args:
            names: of the shards, as :func:`clipfast.data.expand_shards` gives them.
            workers: so many processes make indices; with 0, this one does.

        Raises:
            ShardError: a shard is missing, or is not a tar file.
            DiskFullError: there is no space for the cache.
        """
        with ThreadPoolExecutor(LOOKUPS) as pool:  # each waits for its file system
            known = list(pool.map(self._known, names))
        missing = dict.fromkeys(name for name, found in zip(names, known, strict=True) if found is None)
        made, done = self._made(list(missing), workers), dict[str, ShardIndex]()
        for name, found in zip(names, known, strict=True):
            if found is None and name not in done:
                done[name] = next(made)
            yield found or done[name]

    def _made(self, names: Sequence[str], workers: int) -> Iterator[ShardIndex]:
        if workers == 0 or len(names) < 2:
            yield from map(self._make, names)
            return
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(self._make, names)

    def blocks(self, name: str) -> Blocks:
        """Return first block and number of blocks of each sample of a shard: [count, 2]."""
        with self._entry(name).open("rb") as file:
            file.readline()
            return np.frombuffer(file.read(), "<u4").reshape(-1, 2)

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
        descriptor, now = self._descriptor(shard.name)
        size = os.fstat(descriptor).st_size
        if (size, now) == (shard.size, shard.stamp):
            return descriptor
        os.close(descriptor)
        if size < shard.size:
            raise ShardError(f"the shard has {size} bytes, and had {shard.size} when it was indexed", "truncated shard")
        raise ShardError("the shard was replaced after it was indexed", "replaced shard")

    def _descriptor(self, name: str) -> tuple[int, str]:
        """Return a descriptor of a shard's uncompressed bytes, and the stamp of the shard.

        Raises:
            ShardError: it cannot be opened or brought here.
        """
        try:
            if not is_direct(name):
                return staged(name, self.folder / "shards")
            descriptor = os.open(name, os.O_RDONLY)
        except FetchError as error:
            raise ShardError(str(error), "missing shard") from error
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise ShardError(f"shard {name} cannot be opened: {error.strerror}", "missing shard") from error
        return descriptor, file_stamp(os.fstat(descriptor))

    def _entry(self, name: str) -> Path:
        entry = file_name(name)
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

    def _make(self, name: str) -> ShardIndex:
        """Index a shard, and put the index into the cache, unless another process has just done so."""
        entry = self._entry(name)
        entry.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(entry):
            known = self._known(name)
            if known is not None:
                return known
            descriptor, now = self._descriptor(name)
            with os.fdopen(descriptor, "rb") as file:
                try:
                    blocks, damage = scan(file, name)
                except ValueError as error:
                    raise ShardError(f"shard {name} cannot be read: {error}", "not a tar file") from error
                index = ShardIndex(name, now, os.fstat(descriptor).st_size, len(blocks), damage)
            header = json.dumps({"version": VERSION, **dataclasses.asdict(index)}).encode() + b"\n"
            content = header + blocks.astype("<u4").tobytes()
            replace_file(entry, lambda temporary: temporary.write_bytes(content), len(content))
        return index


def scan(file: BinaryIO, name: str = "") -> tuple[Blocks, dict[str, int]]:
    """Return the blocks of each sample of a tar file, and its damage, as :class:`ShardIndex` has it.

    Of a file that is whole and plain, only the headers are read.

    Raises:
        ValueError: it is not a tar file.
    """
    blocks: list[tuple[int, int]] = []
    damage: dict[str, int] = {}

    def watched(parts: Iterable[Member | Damage]) -> Iterator[Member | Damage]:
        for part in parts:
            if isinstance(part, Damage):
                damage.setdefault(f"byte {part.offset}: {part.reason}", 0)
            yield part

    plain = _plain_members(file.fileno())
    for sample in group_members(name, watched(read_tar(file)) if plain is None else plain):
        if "__damage__" in sample:
            damage[f"{sample['__key__'].partition(',')[0]}: {sample['__damage__']}"] += 1
        else:
            blocks.append(_blocks(*sample["__span__"]))
    return np.array(blocks, np.uint32).reshape(-1, 2), damage


def _blocks(begin: int, end: int) -> tuple[int, int]:
    """Return first block and number of blocks of a stretch of bytes, which need not begin with a block."""
    return begin // BLOCK, -(-end // BLOCK) - begin // BLOCK


def _plain_members(descriptor: int) -> list[Member] | None:
    """Return the members of a tar file by its headers alone, without their data.

    It is None if there is anything in the file but plain members.
    """
    size = os.fstat(descriptor).st_size
    if size < BLOCK or size % BLOCK:
        return None
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as view:
        parts: list[Member] = []
        at, start, extended = 0, 0, dict[str, str]()
        while at < size:
            header = view[at : at + BLOCK]
            if not header[0]:
                rest = view[at : at + tarfile.RECORDSIZE + 2 * BLOCK + 1]
                is_end = at + len(rest) == size and rest.count(0) == len(rest) and not extended
                return parts if is_end and len(rest) >= 2 * BLOCK else None
            length = _length(header)
            kind = header[156]
            if length is None or length > MAX_MEMBER or kind not in b"0\0x5":
                return None
            if kind == ord("x"):
                extended = pax_records(view[at + BLOCK : at + BLOCK + length])
                if "size" in extended or any(name.startswith("GNU.sparse") for name in extended):
                    return None
            at += BLOCK + -(-length // BLOCK) * BLOCK
            if kind == ord("x"):
                continue
            if kind != ord("5"):
                parts.append(Member(extended.get("path") or _name(header), b"", start, at - start))
            start, extended = at, {}
    return None


def _length(header: bytes) -> int | None:
    """Return the number of bytes behind a header; None if its checksum is wrong, or it is not in octal digits."""
    try:
        stated = int(header[148:156].split(b"\0", 1)[0], 8)
        length = int(header[124:136].rstrip(b" \0") or b"0", 8)
    except ValueError:
        return None
    return length if sum(header) - sum(header[148:156]) + 8 * 32 == stated else None


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    whole = prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name
    return whole.decode("utf-8", "surrogateescape")

"""Staging: shards without random access are first copied, whole and uncompressed, to a cache of limited size.

These shards are compressed files, commands (``pipe:``), and everything with a URL, through fsspec. The copy of a
Parquet or Arrow file is a tar file of its rows, and the copy of a folder of images is a list of its files. A shard that
has a copy is not copied again. When the cache is full, the copies that were opened longest ago are removed. A process
that still reads a removed copy can go on; its disk space is freed when that process closes it. The limit does not count
such copies, nor unfinished ones.
"""

import bz2
import contextlib
import fcntl
import gzip
import hashlib
import logging
import lzma
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, cast

from ..io.files import DiskFullError, open_regular, replace_file
from ..io.text import DELIMITERS
from .contained import Writable, copy_rows
from .folders import FOLDER, folder_stamp, write_list
from .formats import Format
from .names import PIPE, has_rows, is_folder, is_remote, without_query
from .remote import FetchError, file_system_of, opened, retried
from .rows import ContentError
from .tables import JSONL, csv_format
from .tar import BLOCK, CHUNK, TAR, read_header

MAX_BYTES_VARIABLE = "CLIPFAST_CACHE_BYTES"
MAX_BYTES = 64 << 30
LOCKS = "locks"  # sub-folder of the cache with the locks of the copies
FORGET = 300.0  # seconds after a failure in which a shard is not fetched again
BEGIN = time.time()  # start of this process, or of its parent before a fork: failures of earlier runs do not count
JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".bz2", ".xz")
COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file), b"BZh": bz2.BZ2File, b"\xfd7zXZ": lzma.LZMAFile
}  # fmt: skip
BZ2_ERROR = "Invalid data stream"  # the text by which bz2's OSError is recognised, because it has no errno
MARKS = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "Content-MD5", "updated")

NEVER = threading.Event()
# An event of the thread that copies: once it is set, the copy ends with an error at its next piece of data.
cancelled = ContextVar("cancelled", default=NEVER)

log = logging.getLogger("clipfast")


def format_of(name: str, separator: str | None = None) -> Format:
    """Return the file format of a shard by its name; ``separator`` is CSV's, as :func:`csv_format` takes it."""
    if is_folder(name):
        return FOLDER
    stem, suffix = os.path.splitext(without_query(name))
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    if suffix in DELIMITERS:
        return csv_format(DELIMITERS[suffix], separator)
    return JSONL if suffix in JSON_LINES else TAR


def is_compressed(start: bytes) -> bool:
    """Return True if a shard that begins with ``start``, one block or the whole file, is compressed.

    A tar file begins with the name of its first member, and so it counts as uncompressed even if this name looks like
    the begin of a compressed file.
    """
    return start.startswith(tuple(COMPRESSIONS)) and read_header(start[:BLOCK]) is None


def is_direct(name: str) -> bool:
    """Return True if a shard can be read in place: it is a local file, and not compressed."""
    if is_remote(name) or is_folder(name) or has_rows(name):
        return False
    try:
        with open_regular(name) as file:
            return not is_compressed(file.read(BLOCK))
    except OSError:
        return True  # opening the shard will raise the error again


def stamp(name: str) -> str:
    """Return the stamp of a shard: a text that changes with the shard, as far as its server can tell.

    Raises:
        OSError: there is no such shard.
    """
    if name.startswith(PIPE):
        return ""
    if is_folder(name):
        return folder_stamp(name)
    if not is_remote(name):
        return file_stamp(os.stat(name))
    file_system, path = file_system_of(name)
    info: dict[str, Any] = file_system.info(path)
    return "/".join(str(info[mark]) for mark in MARKS if mark in info)


def file_stamp(status: os.stat_result) -> str:
    """Return the stamp of a local shard, by its size and modification time."""
    return f"{status.st_size}/{status.st_mtime_ns}"


def file_name(shard: str) -> str:
    """Return the file name under which the index or the copy of a shard is cached."""
    return hashlib.sha256(shard.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def staged(name: str, folder: Path, stamped: str | None = None) -> tuple[int, str]:
    """Open the uncompressed copy of a shard, which is first made if necessary; return its descriptor and its stamp.

    Args:
        name: name of the shard.
        folder: folder of the copies.
        stamped: a copy with this stamp is used without a look at the shard; otherwise the shard is checked for changes.

    Raises:
        FetchError: the shard cannot be fetched, after several attempts with growing waits between them.
        DiskFullError: there is no space.
    """
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    path = copy_path(name, folder)
    note, failure = path.with_suffix(".stamp"), _lock(path).with_suffix(".failed")
    with exclusive(_lock(path)):
        known = note.read_text() if path.exists() and note.exists() else None
        if known is None:
            _refuse_again(failure)
        now = _stamp_or_none(name) if known is None or known != stamped else known
        if known is None or now not in (None, known):
            note.unlink(missing_ok=True)
            try:
                known = _fetch(name, path, now, failure)
            except DiskFullError:  # other files have filled the disk, or the shard is large
                _make_room(folder, 0.5)
                known = _fetch(name, path, now, failure)
            note.write_text(known)
            _make_room(folder)
        descriptor = os.open(path, os.O_RDONLY)
        os.utime(descriptor)
    return descriptor, known


def copy_path(name: str, folder: Path) -> Path:
    """Return the path of the copy of a shard, which need not exist."""
    return folder / f"{file_name(name)}.tar"


def _lock(path: Path) -> Path:
    """Return the path of the lock of a shard's copy. Locks are never removed, and have a folder of their own."""
    return path.parent / LOCKS / path.name


def max_bytes() -> int:
    """Return how many bytes the copies of shards may take: CLIPFAST_CACHE_BYTES, or 64 GiB.

    Raises:
        ValueError: the variable is not a number.
    """
    given = os.environ.get(MAX_BYTES_VARIABLE, str(MAX_BYTES))
    if not given.isdecimal():
        raise ValueError(f"{MAX_BYTES_VARIABLE} is {given!r}, and not a number of bytes such as {MAX_BYTES}")
    return int(given)


def room(folder: Path) -> int:
    """Return how many bytes the copies of shards may take in a folder; a tenth of the space is left for other files.

    Raises:
        ValueError: see :func:`max_bytes`.
    """
    taken = sum(size for _, size, _ in _copies(folder))
    return min(max_bytes(), (taken + shutil.disk_usage(folder).free) * 9 // 10)


def _stamp_or_none(name: str) -> str | None:
    """Return the stamp of a shard; None if its server does not answer now."""
    with contextlib.suppress(Exception):  # fetching the shard will raise any error of a file system again
        return stamp(name)
    return None


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a file of the shard cache, so only one process at a time writes it.

    Args:
        path: the file to write; the lock is a file beside it.
        wait: wait until no other process holds the lock; otherwise the context's value is False if another process
            holds it.
    """
    with path.with_suffix(".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:  # closing would not unlock it, if a process forked meanwhile has the file open
            fcntl.flock(file, fcntl.LOCK_UN)


def _refuse_again(failure: Path) -> None:
    """Raise the error of a recent attempt to fetch a shard, which another process may have made."""
    if failure.exists() and max(BEGIN, time.time() - FORGET) < failure.stat().st_mtime:
        kind, _, reason = failure.read_text("utf-8").partition("\n")
        raise FetchError(f"{reason}; this was a moment ago, and it is not asked for again so soon", kind)


def _fetch(name: str, path: Path, now: str | None, failure: Path) -> str:
    """Copy a shard to ``path`` and return its stamp, a text that changes when the shard changes.

    ``now`` is its stamp if the caller has just read it; None lets this function read it.

    If the shard cannot be fetched, the reason is written to the file ``failure``, unless the copy was cancelled.
    """

    def attempt() -> str:
        """Copy a shard once, and return its stamp."""
        nonlocal now
        known, now = stamp(name) if now is None else now, None  # the next attempt reads the shard's stamp again

        def write(temporary: Path) -> None:
            """Write the copy of a shard, and refuse it if the shard was changed meanwhile."""
            _copy(name, temporary)
            if not is_folder(name) and stamp(name) != known:
                raise OSError("it was changed while it was read")

        replace_file(path, write)
        return known

    try:
        return retried(name, attempt)
    except FetchError as error:
        if not cancelled.get().is_set():  # a cancelled copy fails too, although its shard may be good
            failure.write_text(f"{error.kind}\n{error}", "utf-8", "replace")
        raise


class _Limited:
    """A file that refuses to grow beyond the limit of all copies: a few compressed bytes may expand without end."""

    def __init__(self, file: Writable) -> None:
        self._file, self._written, self._limit = file, 0, max_bytes()

    def write(self, data: bytes, /) -> object:
        """Write bytes of a decompressed shard, up to the largest size of a copy."""
        if cancelled.get().is_set():
            raise ContentError("nobody needs its copy any more")
        self._written += len(data)
        if self._written > self._limit:
            raise ContentError(
                f"it has more than the {self._limit:,} bytes that copies of shards may take: split it, or set "
                f"{MAX_BYTES_VARIABLE} higher"
            )
        return self._file.write(data)


class _Joined:
    """A stream of a shard: the bytes that were already read from it, and then the rest."""

    def __init__(self, start: bytes, rest: IO[bytes]) -> None:
        self._start, self._rest = start, rest

    def read(self, size: int = -1, /) -> bytes:
        """Read up to ``size`` bytes of a compressed shard; none at the end."""
        data, self._start = self._start[:size], self._start[size:]
        return data or self._rest.read(size)

    read1 = read


def _copy(name: str, path: Path) -> None:
    """Copy a shard to the cache. A damaged tar file is copied as far as it is readable; its index states the loss."""
    if is_folder(name):
        write_list(name, path)
        return
    with opened(name) as source, path.open("wb") as file:
        if not has_rows(name):
            _copy_decompressed(name, source, file)
        elif not is_remote(name):
            copy_rows(source, name, _Limited(file), Path(name).parent)
        else:  # a remote Parquet or Arrow file is first downloaded unchanged
            with tempfile.TemporaryFile(dir=path.parent) as whole:
                shutil.copyfileobj(source, _Limited(whole), CHUNK)
                whole.flush()
                copy_rows(whole, name, _Limited(file))


def _copy_decompressed(name: str, source: IO[bytes], file: IO[bytes]) -> None:
    """Copy a shard, which is decompressed if it is compressed."""
    start = b""
    while len(start) < BLOCK and (more := source.read(BLOCK - len(start))):
        start += more
    stream, target, written, content = _Joined(start, source), _Limited(file), 0, 0
    if is_compressed(start):
        decompress = next(found for magic, found in COMPRESSIONS.items() if start.startswith(magic))
        stream = decompress(cast(IO[bytes], stream))
    try:
        while data := stream.read1(CHUNK):  # ``read`` would lose the bytes before an error, ``read1`` does not
            target.write(data)
            kept = len(data.rstrip(b"\0"))
            content = written + kept if kept else content
            written += len(data)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and str(error) != BZ2_ERROR:
            raise
        broken = f"its compression is broken: {error}"
        if format_of(name) is not TAR:
            raise ContentError(f"{broken}; copy or write it again") from error
        log.warning(f"shard {name}: {broken}")
        file.truncate(content)  # zeros would look like the end of a tar file
    while source.read(CHUNK):  # a ``pipe:`` command would fail if its output were not read to the end
        pass


def _make_room(folder: Path, share: float = 1.0) -> None:
    """Remove the copies of shards that were opened longest ago, until the others fit into ``share`` of the room.

    Unfinished copies of killed processes are removed too.
    """
    for path in folder.glob(".*.tmp"):
        with exclusive(_lock(folder / path.name[1:-4]), wait=False) as is_mine:
            if is_mine:
                path.unlink(missing_ok=True)
    limit, found = room(folder) * share, _copies(folder)
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        # If another process holds the lock, it is opening the copy, which then stays.
        with exclusive(_lock(path), wait=False) as is_mine:
            if is_mine:
                path.unlink(missing_ok=True)
                path.with_suffix(".stamp").unlink(missing_ok=True)
                total -= size


def _copies(folder: Path) -> list[tuple[int, int, Path]]:
    """List the copies of shards: the time of the last opening, the size, and the path of each."""
    found = []
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # another process may be removing copies
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    return found

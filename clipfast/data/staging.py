"""A shard that cannot be read from the middle is first copied, whole and uncompressed, to a folder with a limit.

These are compressed files, commands (``pipe:``), and whatever has a URL, through fsspec. The copy of a Parquet or Arrow
file is a tar file of its rows, and that of a folder of images a list of its files. A shard that is already there is not
brought again. When the folder is full, the shards that were opened longest ago make room. A process that still reads
one of them can go on, and its space is free as soon as that process has closed it: it comes on top of the limit, as
does what is being copied.
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
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from ..io.files import DiskFullError, open_regular, replace_file
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
LOCKS = "locks"  # a folder in that of the copies
FORGET = 300.0  # seconds after which a shard that could not be brought here is asked for again
BEGIN = time.time()  # of this process, or of the one that it was forked from: failures of earlier runs do not count
SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".bz2", ".xz")
COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file), b"BZh": bz2.BZ2File, b"\xfd7zXZ": lzma.LZMAFile
}  # fmt: skip
BZ2_ERROR = "Invalid data stream"  # of an OSError without a number, as errors of pipes are
MARKS = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "Content-MD5", "updated")

log = logging.getLogger("clipfast")


def format_of(name: str, separator: str | None = None) -> Format:
    """Return the format of a shard by its name; ``separator`` is that of CSV files, as :func:`csv_format` takes it."""
    if is_folder(name):
        return FOLDER
    stem, suffix = os.path.splitext(without_query(name))
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    if suffix in SEPARATORS:
        return csv_format(SEPARATORS[suffix], separator)
    return JSONL if suffix in JSON_LINES else TAR


def is_compressed(start: bytes) -> bool:
    """Return True if a file that begins with these bytes is compressed; ``start`` has a block, or the whole file.

    The name of a member of a tar file may begin like a compressed file.
    """
    return start.startswith(tuple(COMPRESSIONS)) and read_header(start[:BLOCK]) is None


def is_direct(name: str) -> bool:
    """Return True if a shard can be read where it is: it is a file of this machine, and not compressed."""
    if is_remote(name) or is_folder(name) or has_rows(name):
        return False
    try:
        with open_regular(name) as file:
            return not is_compressed(file.read(BLOCK))
    except OSError:
        return True  # whoever opens it will say what is wrong


def stamp(name: str) -> str:
    """Return a text that changes when the shard does, as far as its source can tell.

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
    """Return the stamp of a file of this machine."""
    return f"{status.st_size}/{status.st_mtime_ns}"


def file_name(shard: str) -> str:
    """Return the name that what is kept of a shard has in the cache."""
    return hashlib.sha256(shard.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def staged(name: str, folder: Path, stamped: str | None = None) -> tuple[int, str]:
    """Return a descriptor of the whole, uncompressed shard, brought to ``folder`` if need be, and its stamp.

    Args:
        name: of the shard.
        folder: of the copies.
        stamped: a stamp of which a copy is good enough; without it, the shard is asked whether it has changed.

    Raises:
        FetchError: it cannot be brought here, after several attempts with growing waits between them.
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
            except DiskFullError:  # others have filled the disk, or the shard is a large one
                _make_room(folder, 0.5)
                known = _fetch(name, path, now, failure)
            note.write_text(known)
            _make_room(folder)
        descriptor = os.open(path, os.O_RDONLY)
        os.utime(descriptor)
    return descriptor, known


def copy_path(name: str, folder: Path) -> Path:
    """Return where the copy of a shard is, if there is one."""
    return folder / f"{file_name(name)}.tar"


def _lock(path: Path) -> Path:
    """Return a path for the lock of a copy. Locks are never removed, and are not among what is looked through."""
    return path.parent / LOCKS / path.name


def max_bytes() -> int:
    """Return how many bytes the copies may take: CLIPFAST_CACHE_BYTES, or 64 GiB.

    Raises:
        ValueError: the variable is no number.
    """
    given = os.environ.get(MAX_BYTES_VARIABLE, str(MAX_BYTES))
    if not given.isdecimal():
        raise ValueError(f"{MAX_BYTES_VARIABLE} is {given!r}, and not a number of bytes such as {MAX_BYTES}")
    return int(given)


def room(folder: Path) -> int:
    """Return how many bytes the copies in a folder may take, so that other files have a tenth of what space there is.

    Raises:
        ValueError: as :func:`max_bytes`.
    """
    taken = sum(size for _, size, _ in _copies(folder))
    return min(max_bytes(), (taken + shutil.disk_usage(folder).free) * 9 // 10)


def _stamp_or_none(name: str) -> str | None:
    """Return the stamp of a shard; None if it cannot be asked for now."""
    with contextlib.suppress(Exception):  # every file system has errors of its own, and fetching will meet them again
        return stamp(name)
    return None


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Let one process at a time write ``path``. The system releases the lock of a process that ends.

    Args:
        path: the file that is written; the lock is a file beside it.
        wait: until the other process has finished; otherwise the context's value is False if there is one.
    """
    with path.with_suffix(".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:  # a process that was forked meanwhile has the file open too, and closing it would not release the lock
            fcntl.flock(file, fcntl.LOCK_UN)


def _refuse_again(failure: Path) -> None:
    """Raise the error of another attempt of a moment ago, perhaps by a process that this one has waited for."""
    if failure.exists() and max(BEGIN, time.time() - FORGET) < failure.stat().st_mtime:
        kind, _, reason = failure.read_text("utf-8").partition("\n")
        raise FetchError(f"{reason}; this was a moment ago, and it is not asked for again so soon", kind)


def _fetch(name: str, path: Path, now: str | None, failure: Path) -> str:
    """Copy a shard to ``path``, and return its stamp: ``now``, or, if that is None, what it is asked for here.

    The reason why it cannot be brought is written to ``failure``.
    """

    def attempt() -> str:
        nonlocal now
        known, now = stamp(name) if now is None else now, None  # a further attempt asks again

        def write(temporary: Path) -> None:
            _copy(name, temporary)
            if not is_folder(name) and stamp(name) != known:
                raise OSError("it was changed while it was read")

        replace_file(path, write)
        return known

    try:
        return retried(name, attempt)
    except FetchError as error:
        failure.write_text(f"{error.kind}\n{error}", "utf-8", "replace")
        raise


class _Limited:
    """A file that becomes no larger than all copies may get together, as a few bytes might that are decompressed."""

    def __init__(self, file: Writable) -> None:
        self._file, self._written, self._limit = file, 0, max_bytes()

    def write(self, data: bytes, /) -> object:
        self._written += len(data)
        if self._written > self._limit:
            raise ContentError(
                f"it has more than the {self._limit:,} bytes that copies of shards may take: split it, or set "
                f"{MAX_BYTES_VARIABLE} higher"
            )
        return self._file.write(data)


class _Joined:
    """Bytes that were read already, and then the rest of their source."""

    def __init__(self, start: bytes, rest: IO[bytes]) -> None:
        self._start, self._rest = start, rest

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes; none at the end."""
        data, self._start = self._start[:size], self._start[size:]
        return data or self._rest.read(size)

    read1 = read


def _copy(name: str, path: Path) -> None:
    """Copy what can be read of a tar file, as the end that is missing shows when the copy is indexed; others whole."""
    if is_folder(name):
        write_list(name, path)
        return
    with opened(name) as source, path.open("wb") as file:
        if not has_rows(name):
            _copy_decompressed(name, source, file)
        elif not is_remote(name):
            copy_rows(source, name, _Limited(file), Path(name).parent)
        else:  # it is first brought here as it is
            with tempfile.TemporaryFile(dir=path.parent) as whole:
                shutil.copyfileobj(source, _Limited(whole), CHUNK)
                whole.flush()
                copy_rows(whole, name, _Limited(file))


def _copy_decompressed(name: str, source: IO[bytes], file: IO[bytes]) -> None:
    start = b""
    while len(start) < BLOCK and (more := source.read(BLOCK - len(start))):
        start += more
    stream, target, written, content = _Joined(start, source), _Limited(file), 0, 0
    if is_compressed(start):
        decompress = next(found for magic, found in COMPRESSIONS.items() if start.startswith(magic))
        stream = decompress(cast(IO[bytes], stream))
    try:
        while data := stream.read1(CHUNK):  # read would lose the bytes before an error
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
        file.truncate(content)  # zeros would be taken for the end of a tar file
    while source.read(CHUNK):  # a command that cannot write would fail
        pass


def _make_room(folder: Path, share: float = 1.0) -> None:
    """Remove the copies that were opened longest ago, until the rest fits into a share of the room for them.

    What a process that was killed has left of a copy is removed too.
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
        with exclusive(_lock(path), wait=False) as is_mine:  # whoever has it is opening it
            if is_mine:
                path.unlink(missing_ok=True)
                path.with_suffix(".stamp").unlink(missing_ok=True)
                total -= size


def _copies(folder: Path) -> list[tuple[int, int, Path]]:
    """Return of each copy when it was opened last, its size, and its path."""
    found = []
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # another process makes room
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    return found

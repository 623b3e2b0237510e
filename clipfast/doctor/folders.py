"""The folders that clipfast writes to: whether it can, how much, and how fast."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..host import free_bytes, nearest
from ..units import BYTES, scaled
from .findings import NOTE, PROBLEM, Finding, judged

TRIED = 64 << 20  # bytes that are written and read
CHUNK = 8 << 20  # after so many they are forced onto the disk
PATIENCE = 1.0  # seconds after which a slow disk gets no further chunk
SLOW = 20e6  # bytes per second: a checkpoint of ViT-B-32 takes a minute and a half
LEAST_FREE = 1 << 30


def folders(logs: Path) -> Iterator[Finding]:
    """Look at the cache folder, and at the folder ``logs`` of runs; one that does not exist is not made."""
    from ..data.index import cache_folder

    measured: dict[int, str] = {}  # the folder by whose name the speed of each disk is known
    yield from _folder("cache", cache_folder(), "set CLIPFAST_CACHE to another folder", measured)
    yield from _folder("runs", logs, "give another folder to --logs of clipfast train", measured)


def _folder(name: str, folder: Path, other: str, measured: dict[int, str]) -> Iterator[Finding]:
    there = nearest(folder)
    shown = str(folder) if there == folder.absolute() else f"{folder}, to be made in {there},"
    if not there.is_dir():
        yield Finding(name, f"{folder} cannot be made: {there} is a file", PROBLEM, other)
        return
    disk = there.stat().st_dev
    try:
        speeds = None if disk in measured else disk_speed(there)
        if speeds is None:
            tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        yield Finding(name, f"{shown} cannot be written: {error.strerror}", PROBLEM, f"{other}, or make it writable")
        return
    free = free_bytes(there)
    is_full = free < LEAST_FREE
    yield judged(name, f"{shown} has {scaled(free, BYTES)} free", PROBLEM, f"make room, or {other}", applies=is_full)
    if speeds is None:
        yield Finding(f"{name}, speed", f"the same disk as of {measured[disk]}")
        return
    measured[disk] = name
    value = "writes {}/s, reads {}/s".format(*(scaled(speed, BYTES) for speed in speeds))
    yield judged(f"{name}, speed", value, NOTE, f"it is slow: {other}", applies=min(speeds) < SLOW)


def disk_speed(folder: Path) -> tuple[float, float]:
    """Return the bytes per second at which a file in ``folder`` is written, onto the disk, and read.

    The file has no name, so that nothing is left of it, whatever happens.

    Raises:
        OSError: no file can be written there.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        chunk = os.urandom(CHUNK)  # which no disk can compress

        def write() -> int:
            written = file.write(chunk)
            os.fsync(file.fileno())
            return written

        writing = _rate(write)
        file.seek(0)
        return writing, read_speed(file.fileno())


def read_speed(descriptor: int) -> float:
    """Return the bytes per second at which the next part of a file is read, from its disk if the system allows it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what is in memory would be faster
    return _rate(lambda: len(os.read(descriptor, CHUNK)))


def _rate(transfer: Callable[[], int]) -> float:
    """Call ``transfer`` until enough bytes are through, there are no more, or it takes too long."""
    started, done, count = time.perf_counter(), 0, 1
    while count and done < TRIED and time.perf_counter() - started < PATIENCE:
        count = transfer()
        done += count
    return done / (time.perf_counter() - started)

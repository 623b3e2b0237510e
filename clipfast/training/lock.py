"""The lock of a run's folder: one process at a time may write to it."""

import errno
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = "run.lock"


@contextmanager
def locked(folder: Path, flag: str = "--logs") -> Iterator[None]:
    """Make ``folder`` if need be, and hold it for as long as the context lasts.

    On exit, the lock file and the folders that were made are removed if nothing else is in them.

    The system releases the lock when the process ends, however it ends, so a lock file left by a killed run blocks
    nobody. Data workers do not inherit the lock. It also works between machines, if the network file system supports
    locks; otherwise nothing is locked.

    Args:
        folder: to hold.
        flag: that named the folder, for errors.

    Raises:
        ValueError: the folder cannot be written, or another process holds it; the message says which, and since when.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        _remove(made)
        raise ValueError(
            f"the folder {folder} cannot be written: {error.strerror}: {error.filename}; give a folder to {flag} that "
            "can be"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(
                    f"{folder} is in use by {_holder(file.read())}: wait until it ends, or stop it"
                ) from None
        if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise ValueError(f"{folder} was removed by another process just now: start again")
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}) + "\n")
        file.flush()
        try:
            yield
        finally:
            if folder.is_dir() and [entry.name for entry in folder.iterdir()] == [LOCK_NAME]:
                path.unlink()
                _remove(made)


def holder(folder: Path) -> str | None:
    """Return which process holds the folder of a run; None if none does, or the file system knows no locks.

    Nothing is taken, so a run can start meanwhile. A process that holds the folder itself must not ask: it would
    release it.
    """
    question = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
    try:
        with (folder / LOCK_NAME).open() as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
            return None if struct.unpack("hhqqi0q", answer)[0] == fcntl.F_UNLCK else _holder(file.read())
    except OSError:
        return None


def _remove(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def _holder(content: str) -> str:
    """Return the process that a lock file names."""
    try:
        return "process {process} on {host} since {since}".format(**json.loads(content))
    except (ValueError, KeyError, TypeError):
        return "another process"

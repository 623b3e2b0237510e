"""The lock of a run's folder: one process at a time may write to it."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..distributed.ending import TrainingError

log = logging.getLogger("clipfast")

LOCK_NAME = "run.lock"


class FolderLostError(TrainingError):
    """A run's folder was removed or renamed, and another run uses its path now."""


class Lock:
    """The lock of a folder, held by this process: only one process at a time may write to the folder.

    The system releases it when the process ends, however it ends, so a lock file left by a killed run blocks nobody.
    Data workers do not inherit it. It also works between machines if the network file system supports locks; otherwise
    there is no protection.

    Args:
        folder: the folder to lock; it is made if necessary.
        flag: the flag that named the folder, for error messages.

    Raises:
        ValueError: the folder cannot be written, or another process holds its lock; the message says which one, and
            since when.
    """

    def __init__(self, folder: Path, flag: str = "--logs") -> None:
        self.folder, self.path, self._flag = folder, folder / LOCK_NAME, flag
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._file = self._taken()

    def is_held(self) -> bool:
        """Return False if the run's locked folder was removed or renamed; its path may belong to another run now."""
        with contextlib.suppress(OSError):
            return os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        return False

    def hold(self) -> bool:
        """Make and lock the run's folder again if it was removed or renamed, and return True in that case.

        Raises:
            FolderLostError: another run uses the path now.
        """
        if self.is_held():
            return False
        place = os.readlink(f"/proc/self/fd/{self._file.fileno()}").removesuffix(f"/{LOCK_NAME}")
        where = f"now {place}" if Path(place).is_dir() else "gone"
        try:
            self._refuse_another()
            before, self._file = self._file, self._taken()
        except ValueError as error:
            raise FolderLostError(
                f"{self.folder} was renamed or removed while the run wrote to it, and cannot be made again: {error}; "
                f"the earlier folder is {where}"
            ) from error
        before.close()
        log.warning(f"{self.folder} was renamed or removed: it is made again; the earlier folder is {where}")
        return True

    def _refuse_another(self) -> None:
        """Raise ValueError if the path of the run's folder now leads to another folder that is not empty."""
        if self.folder.exists() and not os.path.samestat(self.folder.stat(), self._status):
            found = set(os.listdir(self.folder)) - {LOCK_NAME}
            if found:
                raise ValueError(f"there is another folder of that name by now, with {min(found)}")

    def release(self) -> None:
        """Release the lock of a run's folder.

        If the folder has no other files, the lock file is removed, and the folder too if the lock has made it.
        """
        if self.is_held() and os.listdir(self.folder) == [LOCK_NAME]:
            self.path.unlink()
            _remove(self._made)
        self._file.close()

    def _taken(self) -> IO[str]:
        """Take the lock of a run's folder, and return its file."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
        except OSError as error:
            _remove(self._made)
            raise ValueError(
                f"the folder {self.folder} cannot be written: {error.strerror}: {error.filename}; give a folder to "
                f"{self._flag} that can be"
            ) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                with file:
                    raise ValueError(
                        f"{self.folder} is in use by {_holder(file.read())}: wait until it ends, or stop it"
                    ) from None
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(file.fileno())):
            file.close()
            raise ValueError(f"{self.folder} was removed by another process just now: start again")
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}) + "\n")
        file.flush()
        self._status = self.folder.stat()
        return file


@contextlib.contextmanager
def locked(folder: Path, flag: str = "--logs") -> Iterator[Lock]:
    """Hold the lock of a run's ``folder`` while the context lasts, see :class:`Lock`."""
    lock = Lock(folder, flag)
    try:
        yield lock
    finally:
        lock.release()


def holder(folder: Path) -> str | None:
    """Return a text about the process that holds the lock of a run's folder; None if nobody does, or locks fail.

    This takes no lock, so a run can start meanwhile. A process that holds the lock itself must not call it, since
    closing the file would release the lock.
    """
    question = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # the C struct flock of 64-bit Linux
    try:
        with (folder / LOCK_NAME).open() as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
            return None if struct.unpack("hhqqi0q", answer)[0] == fcntl.F_UNLCK else _holder(file.read())
    except OSError:
        return None


def _remove(folders: list[Path]) -> None:
    """Remove folders that were made for a run's lock, the innermost first, until one is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def _holder(content: str) -> str:
    """Return a text about the process that the ``content`` of a run's lock file names."""
    try:
        return "process {process} on {host} since {since}".format(**json.loads(content))
    except (ValueError, KeyError, TypeError):
        return "another process"

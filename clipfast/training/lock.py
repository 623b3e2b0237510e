"""The lock of a run's folder: one process at a time may write to it."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = "run.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` if need be, and hold it for as long as the context lasts.

    On exit, the lock file and the folders that were made are removed if nothing else is in them.

    The system releases the lock when the process ends, however it ends, so a lock file left by a killed run blocks
    nobody. Data workers do not inherit the lock. It also works between machines, if the network file system supports
    locks; otherwise nothing is locked.

    Raises:
        ValueError: another process holds the folder; the message says which, and since when.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    with path.open("a+") as file:
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
            if [entry.name for entry in folder.iterdir()] == [LOCK_NAME]:
                path.unlink()
                for empty in made:
                    try:
                        empty.rmdir()
                    except OSError:
                        break


def _holder(content: str) -> str:
    """Return the process that a lock file names."""
    try:
        return "process {process} on {host} since {since}".format(**json.loads(content))
    except (ValueError, KeyError, TypeError):
        return "another process"

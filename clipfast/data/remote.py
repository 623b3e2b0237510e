"""Remote shards and files: they are opened through fsspec, and retried after errors for a limited time."""

import contextlib
import errno
import itertools
import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar, cast

from ..io.files import DiskFullError, open_regular
from .names import PIPE, is_remote
from .rows import ContentError

ATTEMPTS = 5
FIRST_WAIT = 0.5  # seconds before the second attempt; each further wait is twice as long

# errors that mean this process's limits, and not a fault of the file
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
PATIENCE = 120.0  # seconds after which no third or later attempt is made
CONNECT, READ = 10.0, 20.0  # seconds that a web server may take to accept a connection, and to send the next bytes
WEB = ("http://", "https://")
BUSY = (408, 429)  # HTTP status codes after which another attempt may succeed

log = logging.getLogger("clipfast")
Found = TypeVar("Found")


class FetchError(ValueError):
    """A shard that could not be fetched or read, after several attempts.

    Attributes:
        kind: "unreadable shard" if the shard was fetched but cannot be used; otherwise "missing shard".
    """

    def __init__(self, message: str, kind: str = "missing shard") -> None:
        super().__init__(message)
        self.kind = kind


def file_system_of(name: str) -> tuple[Any, str]:
    """Return fsspec's file system for the URL of a shard, and the shard's path in it."""
    from fsspec import get_filesystem_class
    from fsspec.core import url_to_fs

    if not name.startswith(WEB):
        return url_to_fs(name)
    get_filesystem_class("http")  # without aiohttp, this raises an ImportError that names the missing package
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=READ)
    return url_to_fs(name, client_kwargs={"timeout": timeout})


def retried(name: str, attempt: Callable[[], Found], what: str = "shard") -> Found:
    """Call ``attempt``, which reads a shard, and return its result; retry after errors of a remote one.

    Args:
        name: name or URL of the file.
        attempt: a function that reads the file.
        what: kind of file, for the error message.

    Raises:
        FetchError: the last attempt failed, or another attempt would be useless.
        DiskFullError, ImportError: raised by ``attempt``.
    """
    waits = [FIRST_WAIT * 2**number for number in range(ATTEMPTS - 1)] if is_remote(name) else []
    begin = time.monotonic()
    for number in itertools.count(1):
        try:
            return attempt()
        except (DiskFullError, ImportError):
            raise
        except ContentError as error:
            raise FetchError(f"{what} {name} cannot be read: {error}", "unreadable shard") from error
        except Exception as error:  # file systems have errors of their own; some report an outage as "not found"
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            # A second attempt to read the shard follows even if the first one took very long.
            if not waits or (number > 1 and time.monotonic() - begin > PATIENCE):
                tried = f" ({number} attempts)" if number > 1 else ""
                raise FetchError(f"{what} {name} cannot be read: {reason}{tried}") from error
            log.warning(f"{what} {name}: attempt {number} has failed ({reason}); the next one is in {waits[0]:g} s")
            time.sleep(waits.pop(0))
    raise AssertionError("unreachable")


def if_there(name: str, attempt: Callable[[], Found], what: str = "shard") -> Found | None:
    """Read a shard by ``attempt`` with retries like :func:`retried`; return None if the file does not exist."""

    def attempt_or_none() -> Found | None:
        """Call ``attempt``, and return None if the file of the shard does not exist."""
        try:
            return attempt()
        except Exception as error:  # fsspec's file systems have error classes of their own
            if _is_absent(name, error):
                return None
            raise

    return retried(name, attempt_or_none, what)


def _is_absent(name: str, error: Exception) -> bool:
    """Return True if an error means that a shard does not exist or may not be read, and not that the server failed."""
    if name.startswith(WEB):  # fsspec reports every failure as "not found"; the cause has the server's answer
        status = getattr(error.__cause__ or error, "status", 0)
        return 400 <= status < 500 and status not in BUSY
    return isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError)


@contextlib.contextmanager
def opened(name: str, *, whole: bool = True) -> Iterator[IO[bytes]]:
    """Open a shard, or a file beside it, to read it from begin to end or, without ``whole``, from any position."""
    if not name.startswith(PIPE):
        if not is_remote(name):
            with open_regular(name) as file:
                yield file
            return
        file_system, path = file_system_of(name)
        # With block_size 0 the file is read from a single response: it cannot change meanwhile, and some servers cannot
        # send parts.
        options = {"block_size": 0} if whole and name.startswith(WEB) else {}
        with file_system.open(path, "rb", **options) as remote:
            yield remote
        return
    command = name.removeprefix(PIPE)
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        try:
            yield cast(IO[bytes], process.stdout)
        except BaseException:
            process.kill()  # else Popen would wait, and a loop in a shell runs on without a reader
            raise
    if process.returncode:
        raise OSError(f"the command ended with status {process.returncode}")

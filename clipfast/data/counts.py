"""How many samples a shard has, by what says so without the whole shard being brought here.

That is the footer of a Parquet file; an Arrow file of this machine; and for other shards ``sizes.json`` beside them, as
WebDataset and OpenCLIP know it, or the file in which img2dataset notes how many images of a shard it could download.
"""

import json
import logging
import threading
from collections.abc import Callable
from typing import IO, Any

from .contained import count_rows
from .names import PIPE, has_footer, has_rows, is_remote
from .remote import FetchError, Found, if_there, opened
from .rows import ContentError
from .staging import is_direct

SIZES = "sizes.json"  # {"00000.tar": 10000, ...}
STATS = "_stats.json"  # of img2dataset, which notes under "successes" how many samples a shard has
MAX_DIGITS = 15

log = logging.getLogger("clipfast")


class Counts:
    """Counts of shards. What is said about many of them is read once."""

    def __init__(self) -> None:
        self._sizes: dict[str, dict[str, Any] | FetchError] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> tuple[int, str] | None:
        """Return the number of samples of a shard, and the file that says so.

        It is None if nothing says so, and if the shard is a tar file that can be read where it is.

        Raises:
            FetchError: the file that may say so cannot be read, or the shard is a Parquet or Arrow file that is
                damaged, or has no images in it.
        """
        if name.startswith(PIPE) or is_direct(name):
            return None
        if has_rows(name):
            rows = (
                None if is_remote(name) and not has_footer(name) else _read(name, _rows_of(name), "shard", whole=False)
            )
            return None if rows is None else (rows, name)
        folder, slash, file = name.rpartition("/")
        path = folder + slash + SIZES
        said = self._sizes_in(path).get(file)
        if said is None:
            path = folder + slash + file.partition(".")[0] + STATS
            said = _object(path).get("successes")
        digits = str(said)
        return (int(digits), path) if digits.isdecimal() and len(digits) <= MAX_DIGITS else None

    def _sizes_in(self, path: str) -> dict[str, Any]:
        with self._lock:
            if path not in self._sizes:
                try:
                    self._sizes[path] = _object(path)
                except FetchError as error:  # the other threads that wait for it do not ask again
                    self._sizes[path] = error
            found = self._sizes[path]
        if isinstance(found, FetchError):
            raise found
        return found


def _rows_of(name: str) -> Callable[[IO[bytes]], int | None]:
    """Return a function that counts the rows of a file; it returns None if a server sends nothing but whole files."""

    def count(file: IO[bytes]) -> int | None:
        try:
            return count_rows(file, name)
        except ContentError:
            raise
        except ValueError:  # as fsspec says that it cannot read from the middle
            return None

    return count


def _object(path: str) -> dict[str, Any]:
    """Return the object in a file; it is empty if there is no such file.

    Raises:
        FetchError: nobody says whether there is one: without it, all shards would be copied to count them.
    """
    try:
        data = _read(path, lambda file: file.read(), "file")
    except FetchError as error:
        raise FetchError(f"{error}; try again, or let clipfast index count the samples without it") from error
    try:
        parsed = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        log.warning(f"{path} is left out of account, as it is not JSON: {error}")
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _read(path: str, read: Callable[[IO[bytes]], Found], what: str, *, whole: bool = True) -> Found | None:
    """Return what ``read`` does with a file, from its beginning if ``whole``; None if there is no such file."""

    def attempt() -> Found:
        with opened(path, whole=whole) as file:
            return read(file)

    return if_there(path, attempt, what)

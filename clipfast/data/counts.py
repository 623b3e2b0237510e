"""Sample counts of shards from small files and footers, without a copy of the whole shard.

The count of a Parquet file is in its footer. A local Arrow file is counted directly. Counts of other shards are read
from ``sizes.json`` beside them, as WebDataset and OpenCLIP write it, or from the statistics of img2dataset, which say
how many images of a shard it could download.
"""

import io
import json
import logging
import threading
from collections.abc import Callable
from typing import IO, Any

from .contained import count_rows
from .names import PIPE, has_footer, has_rows, is_remote
from .remote import FetchError, Found, if_there, opened
from .staging import is_direct

SIZES = "sizes.json"  # the file with the counts of a folder's shards: {"00000.tar": 10000, ...}
STATS = "_stats.json"  # suffix of img2dataset's statistics, whose entry "successes" is the number of samples
MAX_DIGITS = 15

log = logging.getLogger("clipfast")


class Counts:
    """Looks up sample counts of shards. A file with the counts of many shards is read once."""

    def __init__(self) -> None:
        self._sizes: dict[str, dict[str, Any] | FetchError] = {}
        self._whole = set[str]()  # folders on servers that send nothing but whole files
        self._lock = threading.Lock()

    def of(self, name: str) -> tuple[int, str] | None:
        """Return the number of samples of a shard, and the name of the file with this count.

        Return None if no file has the count, and for a tar file that can be read in place.

        Raises:
            FetchError: the file with the count cannot be read, or the shard is a Parquet or Arrow file that is damaged
                or has no images.
        """
        if name.startswith(PIPE) or is_direct(name):
            return None
        folder, slash, file = name.rpartition("/")
        if has_rows(name):
            if is_remote(name) and (not has_footer(name) or folder in self._whole):
                return None
            rows = _read(name, lambda shard: self._rows(shard, name), "shard", whole=False)
            return None if rows is None else (rows, name)
        path = folder + slash + SIZES
        said = self._sizes_in(path).get(file)
        if said is None:
            path = folder + slash + file.partition(".")[0] + STATS
            said = _object(path).get("successes")
        digits = str(said)
        return (int(digits), path) if digits.isdecimal() and len(digits) <= MAX_DIGITS else None

    def _rows(self, shard: IO[bytes], name: str) -> int | None:
        """Return the number of rows of a Parquet shard; None if its server sends nothing but whole files."""
        try:
            return count_rows(shard, name)
        except io.UnsupportedOperation:
            self._whole.add(name.rpartition("/")[0])
            return None

    def _sizes_in(self, path: str) -> dict[str, Any]:
        """Return the sample counts in a file beside the shards, which is read only once."""
        with self._lock:
            if path not in self._sizes:
                try:
                    self._sizes[path] = _object(path)
                except FetchError as error:  # kept, since other threads that need this file shall get the error too
                    self._sizes[path] = error
            found = self._sizes[path]
        if isinstance(found, FetchError):
            raise found
        return found


def _object(path: str) -> dict[str, Any]:
    """Return the JSON object in a file with sample counts; {} if there is no such file.

    Raises:
        FetchError: the server did not say whether the file exists. To go on without it would copy all shards to count
            them.
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
    """Open a file with sample counts and return what ``read`` finds in it; None if there is no such file.

    With ``whole``, it is read from its beginning to its end, which every server allows.
    """

    def attempt() -> Found:
        """Open the file with a shard's sample count once, and read it."""
        with opened(path, whole=whole) as file:
            return read(file)

    return if_there(path, attempt, what)

"""How many samples a shard has, by what says so without the whole shard being brought here.

That is the footer of a Parquet file; an Arrow file of this machine; and for other shards ``sizes.json`` beside them, as
WebDataset and OpenCLIP know it, or the file in which img2dataset notes how many images of a shard it could download.
"""

import json
import logging
import threading
from typing import Any

from .rows import ContentError, count, has_footer, has_rows, mapped
from .samples import PIPE, is_remote
from .staging import is_direct, opened

SIZES = "sizes.json"  # {"00000.tar": 10000, ...}
STATS = "_stats.json"  # of img2dataset, which notes under "successes" how many samples a shard has

log = logging.getLogger("clipfast")


class Counts:
    """Counts of shards. What is said about many of them is read once."""

    def __init__(self) -> None:
        self._sizes: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> tuple[int, str] | None:
        """Return the number of samples of a shard, and the file that says so.

        It is None if nothing says so, and if the shard is a tar file that can be read where it is.

        Raises:
            ContentError: it is a Parquet or Arrow file that cannot be read, or has no images in it.
        """
        if name.startswith(PIPE) or is_direct(name):
            return None
        try:
            return self._of_rows(name) if has_rows(name) else self._of_notes(name)
        except (ContentError, ImportError):
            raise
        except Exception:  # every file system has errors of its own; indexing the shard meets them again
            return None

    def _of_rows(self, name: str) -> tuple[int, str] | None:
        if has_footer(name):
            with opened(name) as file:
                return count(file, name), name
        if is_remote(name):
            return None
        with mapped(name) as file:
            return count(file, name), name

    def _of_notes(self, name: str) -> tuple[int, str] | None:
        folder, slash, file = name.rpartition("/")
        sizes, stats = folder + slash + SIZES, folder + slash + file.partition(".")[0] + STATS
        with self._lock:
            if sizes not in self._sizes:
                self._sizes[sizes] = _object(sizes)
        path, said = sizes, self._sizes[sizes].get(file)
        if said is None:
            path, said = stats, _object(stats).get("successes")
        return (int(str(said)), path) if str(said).isdecimal() else None


def _object(path: str) -> dict[str, Any]:
    """Return the object in a file; it is empty if there is no such file."""
    try:
        with opened(path) as file:
            parsed = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        log.warning(f"{path} is left out of account, as it is not JSON: {error}")
        return {}
    except Exception:  # every file system has errors of its own for a file that is not there
        return {}
    return parsed if isinstance(parsed, dict) else {}

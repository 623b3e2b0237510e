"""Which format a shard has, by its name."""

import os

from .folders import FOLDER
from .formats import Format
from .samples import is_folder, is_remote
from .tables import JSONL, csv_format
from .tar_format import TAR

SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".bz2", ".xz")


def format_of(name: str, separator: str | None = None) -> Format:
    """Return the format of a shard; ``separator`` is that of CSV files, as :func:`csv_format` takes it."""
    if is_folder(name):
        return FOLDER
    suffix = _suffix(name)
    if suffix in SEPARATORS:
        return csv_format(SEPARATORS[suffix], separator)
    return JSONL if suffix in JSON_LINES else TAR


def _suffix(name: str) -> str:
    """Return the suffix of a shard, without that of its compression or what follows the path in a URL."""
    path = (name.partition("?")[0] if is_remote(name) else name).lower()
    stem, suffix = os.path.splitext(path)
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix

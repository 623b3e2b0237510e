"""The names of shards: expansion of patterns, and the kind of shard that a name stands for."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path

from ..io.files import read_json
from ..io.text import meant

BUNDLED_PREFIX = "bundled:"
SYNTHETIC_PREFIX = "synthetic:"
SHAPES_PREFIX = "shapes:"
DRAWN = (SYNTHETIC_PREFIX, SHAPES_PREFIX)
PIPE = "pipe:"
PARQUET = ".parquet"
ARROW = ".arrow"
FOLDER_TABLES = ("metadata.jsonl", "metadata.csv")  # a folder with one of these is read as a table
NO_SHARDS = (".json", ".txt")
MAX_SHARDS = 1 << 22  # largest number of shards that one pattern may name
MAX_NESTED = 9  # largest depth of nested braces
MAX_SYNTHETIC = 1 << 40  # largest number of synthetic pairs


def expand_shards(pattern: str | Iterable[str]) -> list[str]:
    """Expand a pattern to the names of its shards.

    Args:
        pattern: paths with braces (``{000..099}``) or wildcards (``*.tar``, in sorted order), joined by ``::``. A
            folder stands for the tar files in it, or else its Parquet files, or for the dataset that
            ``datasets.save_to_disk`` wrote there, or for its ``metadata.jsonl`` or ``metadata.csv``; any other folder
            is one shard of images, and its name ends with a slash. ``bundled:emoji/noto`` is a shard of this package.
            Names with a scheme (``https:``, ``pipe:``) stay as they are, and so do ``synthetic:N``, ``shapes:N``, and
            both with ``@SEED``.

    Raises:
        ValueError: a local file does not exist, is a pipe or a device, or is no shard by its name, a name of synthetic
            pairs has another form, or no shard is named.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    named = [_bundled(shard) for one in patterns for part in one.split("::") for shard in _named_by(part)]
    shards = [path for shard in named for path in _matches(shard)]
    # one os.stat for each shard, as there may be many
    modes = [0 if ":" in shard else _mode(shard) for shard in shards]
    missing = [shard for shard, mode in zip(shards, modes, strict=True) if ":" not in shard and not mode]
    if missing:
        what = "shard" if not missing[0] or Path(missing[0]).suffix else "folder or shard"
        count = f" ({len(missing)} of {len(shards)} are missing)" if len(shards) > 1 else ""
        raise ValueError(f"no such {what}: {missing[0]}{count}")
    if not shards:
        raise ValueError("no shards given")
    return list(map(_checked, shards, modes))


def _mode(path: str) -> int:
    """Return type and permissions of a path that names shards, as :mod:`stat` reads them; 0 if there is no file."""
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):  # os.stat raises ValueError for a name that no file can have
        return 0


def _named_by(pattern: str) -> Iterator[str]:
    """Expand the braces in a pattern of shard names.

    Raises:
        ValueError: the pattern stands for too many names. They are counted before the list is made.
    """
    from braceexpand import braceexpand

    most, left = 1, pattern

    def count(group: re.Match[str]) -> str:
        """Count the names of shards for which a brace stands."""
        nonlocal most
        ends = re.fullmatch(r"(-?\d+|[a-zA-Z])\.\.(-?\d+|[a-zA-Z])(?:\.\.-?(\d+))?", group[1])
        if ends and most <= MAX_SHARDS:
            first, last = (ord(end) if end.isalpha() else int(end) for end in (ends[1], ends[2]))
            most *= abs(last - first) // max(int(ends[3] or 1), 1) + 1
        else:
            most *= group[1].count(",") + 1
        return ""

    found = 0
    for _ in range(MAX_NESTED):  # braces are removed from the innermost outward
        left, found = re.subn(r"\{([^{}]*)\}", count, left)
    if most > MAX_SHARDS or found:
        raise ValueError(f"{pattern:.80} may name more than {MAX_SHARDS:,} shards: use wildcards, or name a folder")
    return iter(braceexpand(pattern))


def _bundled(shard: str) -> str:
    """Return the path of a shard that ships with clipfast for its ``bundled:`` name; return other names unchanged."""
    if not shard.startswith(BUNDLED_PREFIX):
        return shard
    name = shard.removeprefix(BUNDLED_PREFIX)
    folder = files("clipfast").joinpath("assets", "emoji")
    known = sorted("emoji/" + path.name.removesuffix(".tar.gz") for path in folder.iterdir())
    if name not in known:
        raise ValueError(f"no bundled shard {name!r}{meant(name, known)}; there are: {', '.join(known)}")
    return str(folder.joinpath(name.removeprefix("emoji/") + ".tar.gz"))


def _matches(shard: str) -> list[str]:
    """Expand a local name with wildcards, or the name of a folder, to names of shards; return other names unchanged."""
    if not shard or ":" in shard:
        return [shard]
    if Path(shard).is_dir():
        return _shards_in(Path(shard)) or [shard]
    if not glob.has_magic(shard) or Path(shard).exists():
        return [shard]
    found = sorted(glob.glob(shard))
    if not found:
        raise ValueError(f"no such shard: nothing matches {shard}")
    return found


def _shards_in(folder: Path) -> list[str]:
    """Return the names of the shards in a folder, in order.

    The shards are the Arrow files of a dataset that ``datasets.save_to_disk`` wrote; or all tar files; or, if there is
    no tar file, all Parquet files.

    Raises:
        ValueError: the dataset has several splits, or does not say which files it has.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = [path.parent.name for path in sorted(folder.glob("*/state.json"))]
        raise ValueError(
            f"{folder} holds the splits {', '.join(splits)}: name one of them, as {folder / (*splits, 'train')[0]}"
        )
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        try:
            listed = read_json(folder / "state.json")["_data_files"]
            return [str(folder / Path(file["filename"]).name) for file in listed]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{folder / 'state.json'} does not list the files of a dataset: {error!r}") from error
    return [str(path) for path in sorted(folder.glob("*.tar")) or sorted(folder.glob(f"*{PARQUET}"))]


def _checked(shard: str, mode: int) -> str:
    """Check the name of a shard and return it; for a folder, return its table, or its name with a slash at the end.

    ``mode`` is that of the file, as :func:`_mode` returns it.

    Raises:
        ValueError: the name cannot be a shard.
    """
    if ":" in shard:
        if is_synthetic(shard):
            synthetic_pairs(shard)
        return shard
    path = Path(shard)
    if stat.S_ISDIR(mode):
        tables = (str(path / name) for name in FOLDER_TABLES if (path / name).is_file())
        return next(tables, shard.rstrip("/") + "/")
    if not stat.S_ISREG(mode):  # for example a pipe from <(cat a.tar), whose bytes can be read only once
        raise ValueError(
            f"{shard} is neither a file nor a folder: shards are read from any place in them, so write it to a "
            "file, or name the command that makes it, as in 'pipe:cat a.tar'"
        )
    if path.suffix.lower() in NO_SHARDS:
        raise ValueError(
            f"{shard} is no shard: pairs come from tar, Parquet and Arrow files, from tables (.csv, .tsv, .jsonl) "
            "with an image in each line, and from folders of images with a text beside each (7.jpg, 7.txt)"
        )
    return shard


def is_remote(shard: str) -> bool:
    """Return True if the name of a shard is not a local file: a URL or a ``pipe:`` command."""
    return shard.startswith(PIPE) or "://" in shard


def is_folder(shard: str) -> bool:
    """Return True if the name of a shard is that of a folder of images: it ends with a slash."""
    return shard.endswith("/") and not is_remote(shard)


def without_query(shard: str) -> str:
    """Return the name of a shard in lower case, without query and fragment of a URL."""
    return (shard.partition("?")[0] if is_remote(shard) else shard).lower()


def has_footer(shard: str) -> bool:
    """Return True if a shard is a Parquet file by its name, so its footer holds the number of samples."""
    return without_query(shard).endswith(PARQUET)


def has_rows(shard: str) -> bool:
    """Return True if a shard is a Parquet or Arrow file by its name."""
    return without_query(shard).endswith((PARQUET, ARROW))


def is_local(pattern: str) -> bool:
    """Return True if ``pattern`` names only local shards; names with a scheme may be opened by a shell command."""
    own = "|".join((BUNDLED_PREFIX, *DRAWN))
    return all(":" not in re.sub(f"^({own})", "", part) for part in pattern.split("::"))


def is_synthetic(shard: str) -> bool:
    """Return True if the name of a shard stands for synthetic pairs, which need no files."""
    return shard.startswith(DRAWN)


def synthetic_pairs(name: str) -> tuple[int, int]:
    """Parse a name such as ``synthetic:N`` or ``synthetic:N@SEED``; return the number of synthetic pairs and the seed.

    Raises:
        ValueError: the name has another form, or N is 0 or too large.
    """
    prefix = name.partition(":")[0]
    found = re.fullmatch(r"[a-z]+:([0-9]+)(?:@([0-9]+))?", name)
    if found is None:
        raise ValueError(f"{name!r} is neither {prefix}:N nor {prefix}:N@SEED, with whole numbers N and SEED")
    count = int(found[1])
    if not 0 < count <= MAX_SYNTHETIC:
        raise ValueError(f"there must be from 1 to {MAX_SYNTHETIC} synthetic pairs, got {count}")
    return count, int(found[2] or 0)

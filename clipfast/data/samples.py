"""Samples of shards: how the shards are named, and what is in a sample. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import glob
import json
import random
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import meant
from ..images import ImageError, SampleError, open_image
from .keys import DEFAULT_KEYS, Keys
from .rows import shards_in
from .tar import BLOCK, Damage, Member

if TYPE_CHECKING:
    from PIL import Image

BUNDLED_PREFIX = "bundled:"
SYNTHETIC_PREFIX = "synthetic:"
SHAPES_PREFIX = "shapes:"
DRAWN = (SYNTHETIC_PREFIX, SHAPES_PREFIX)
PIPE = "pipe:"
FOLDER_TABLES = ("metadata.jsonl", "metadata.csv")  # either makes its folder a table
NO_SHARDS = (".json", ".txt")
MAX_SHARDS = 1 << 22  # that are named at once
MAX_NESTED = 9  # braces within braces
MAX_SYNTHETIC = 1 << 40  # pairs
SMALLEST_PAIR = 4 * BLOCK  # bytes of an image and a caption in a tar file, each with its header

RawSample = dict[str, Any]


def expand_shards(pattern: str | Iterable[str]) -> list[str]:
    """Return the shards that ``pattern`` names.

    Args:
        pattern: paths with braces (``{000..099}``) or wildcards (``*.tar``, in sorted order), joined by ``::``. A
            folder stands for the tar files in it, or else its Parquet files, or for the dataset that
            ``datasets.save_to_disk`` wrote there, or for its ``metadata.jsonl`` or ``metadata.csv``; any other is one
            shard of images, whose name ends with a slash. ``bundled:emoji/noto`` is a shard of this package. Names with
            a scheme (``https:``, ``pipe:``) stay as they are, and so do ``synthetic:N``, ``shapes:N``, and both with
            ``@SEED``.

    Raises:
        ValueError: a local file does not exist, is a pipe or a device, or is no shard by its name, a name of synthetic
            pairs has another form, or no shard is named.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    named = [_bundled(shard) for one in patterns for part in one.split("::") for shard in _named_by(part)]
    shards = [path for shard in named for path in _matches(shard)]
    local = [shard for shard in shards if ":" not in shard]
    files = {shard for shard in local if Path(shard).is_file()}  # there may be many: one look at each
    folders = {shard for shard in local if shard and shard not in files and Path(shard).is_dir()}
    others = [shard for shard in local if shard not in files and shard not in folders]
    missing = [shard for shard in others if not shard or not Path(shard).exists()]
    if missing:
        what = "shard" if not missing[0] or Path(missing[0]).suffix else "folder or shard"
        count = f" ({len(missing)} of {len(shards)} are missing)" if len(shards) > 1 else ""
        raise ValueError(f"no such {what}: {missing[0]}{count}")
    if others:  # as <(cat a.tar) names: a first look would take its bytes
        raise ValueError(
            f"{others[0]} is neither a file nor a folder: shards are read from any place in them, so write it to a "
            "file, or name the command that makes it, as in 'pipe:cat a.tar'"
        )
    for shard in local:
        if Path(shard).suffix.lower() in NO_SHARDS and shard in files:
            raise ValueError(
                f"{shard} is no shard: pairs come from tar, Parquet and Arrow files, from tables (.csv, .tsv, .jsonl) "
                "with an image in each line, and from folders of images with a text beside each (7.jpg, 7.txt)"
            )
    for shard in filter(is_synthetic, shards):
        synthetic_pairs(shard)
    if not shards:
        raise ValueError("no shards given")
    return [_in_folder(shard) if shard in folders else shard for shard in shards]


def _named_by(pattern: str) -> Iterator[str]:
    """Return the names that a pattern with braces stands for.

    Raises:
        ValueError: they may be too many; they are counted before they are written down.
    """
    from braceexpand import braceexpand

    most, left = 1, pattern

    def count(group: re.Match[str]) -> str:
        nonlocal most
        ends = re.fullmatch(r"(-?\d+|[a-zA-Z])\.\.(-?\d+|[a-zA-Z])(?:\.\.-?(\d+))?", group[1])
        if most > MAX_SHARDS:
            return ""
        if ends:
            first, last = (ord(end) if end.isalpha() else int(end) for end in (ends[1], ends[2]))
            most *= abs(last - first) // max(int(ends[3] or 1), 1) + 1
        else:
            most *= group[1].count(",") + 1
        return ""

    found = 0
    for _ in range(MAX_NESTED):  # from the innermost on
        left, found = re.subn(r"\{([^{}]*)\}", count, left)
    if most > MAX_SHARDS or found:
        raise ValueError(f"{pattern:.80} may name more than {MAX_SHARDS:,} shards: use wildcards, or name a folder")
    return iter(braceexpand(pattern))


def _in_folder(folder: str) -> str:
    """Return the table of a folder that has one, and otherwise the name of the folder as a shard."""
    tables = (str(path) for name in FOLDER_TABLES if (path := Path(folder, name)).is_file())
    return next(tables, folder.rstrip("/") + "/")


def _matches(shard: str) -> list[str]:
    """Return the files that a local name with wildcards or of a folder means, and any other name as it is."""
    if shard and ":" not in shard and Path(shard).is_dir():
        return shards_in(Path(shard)) or [shard]
    if ":" in shard or not glob.has_magic(shard) or Path(shard).exists():
        return [shard]
    found = sorted(glob.glob(shard))
    if not found:
        raise ValueError(f"no such shard: nothing matches {shard}")
    return found


def is_remote(shard: str) -> bool:
    """Return True if a shard is not a file of this machine."""
    return shard.startswith(PIPE) or "://" in shard


def is_folder(shard: str) -> bool:
    """Return True if a shard is a folder of images, by its name."""
    return shard.endswith("/") and not is_remote(shard)


def is_local(pattern: str) -> bool:
    """Return True if ``pattern`` names only files: a name with a scheme may be opened by a shell command."""
    parts = pattern.split("::")
    own = "|".join((BUNDLED_PREFIX, *DRAWN))
    return all(":" not in re.sub(f"^({own})", "", part) for part in parts)


def is_synthetic(shard: str) -> bool:
    """Return True if a name stands for synthetic pairs, which need no files."""
    return shard.startswith(DRAWN)


def synthetic_pairs(name: str) -> tuple[int, int]:
    """Return how many pairs a name such as ``synthetic:N`` or ``synthetic:N@SEED`` stands for, and their seed.

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


def _bundled(shard: str) -> str:
    """Return the path of a bundled shard, and any other shard as it is."""
    if not shard.startswith(BUNDLED_PREFIX):
        return shard
    name = shard.removeprefix(BUNDLED_PREFIX)
    folder = files("clipfast").joinpath("assets", "emoji")
    known = sorted("emoji/" + path.name.removesuffix(".tar.gz") for path in folder.iterdir())
    if name not in known:
        raise ValueError(f"no bundled shard {name!r}{meant(name, known)}; there are: {', '.join(known)}")
    return str(folder.joinpath(name.removeprefix("emoji/") + ".tar.gz"))


def split_name(name: str) -> tuple[str, str] | None:
    """Return the key and the extension in the name of a member; None for a member that belongs to no sample."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot or extension.startswith("__"):
        return None
    return folder + slash + stem, extension.lower()


class _Hole:
    """A damaged stretch, and how many samples beside it have lost a part to it."""

    def __init__(self, damage: Damage) -> None:
        self.damage, self.cropped = damage, 0

    def lost(self, smallest: int) -> int:
        """Return how many pairs are lost altogether, if none takes less than ``smallest`` bytes."""
        return max(((self.damage.size or 0) - self.cropped * 2 * BLOCK) // smallest, 0 if self.cropped else 1)


def group_members(shard: str, parts: Iterable[Member | Damage]) -> Iterator[RawSample]:
    """Yield the samples that the members of a shard make, and at its end those that are lost.

    ``__span__`` of a sample is where its first member begins and its last one ends in the uncompressed shard.
    """
    sample: RawSample = {}
    size, smallest = 0, 0
    holes: list[_Hole] = []
    beside: list[_Hole] = []  # the holes directly before and after the sample
    before = 0  # number of holes before the last member

    def close() -> Iterator[RawSample]:
        nonlocal smallest
        if sample:
            if is_pair(sample):
                smallest = min(smallest or size, size)
            else:
                for hole in beside:
                    hole.cropped += 1
            yield sample

    for part in parts:
        if isinstance(part, Damage):
            holes.append(_Hole(part))
            beside.append(holes[-1])
            continue
        named = split_name(part.name)
        if named is None:
            continue
        key, extension = named
        if key != sample.get("__key__") or extension in sample:
            yield from close()
            sample, size = {"__key__": key, "__url__": shard, "__span__": (part.offset, part.offset)}, 0
            beside = holes[before:]
        sample[extension] = part.data
        sample["__span__"] = sample["__span__"][0], part.offset + part.size
        size, before = size + part.size, len(holes)
    yield from close()
    for hole in holes:
        for number in range(hole.lost(smallest or SMALLEST_PAIR)):
            key = f"byte {hole.damage.offset}, pair {number + 1}"
            yield {"__key__": key, "__url__": shard, "__damage__": hole.damage.reason}


def is_pair(sample: RawSample) -> bool:
    """Return True if a sample has an image and what its caption may be in."""
    texts, images = (*DEFAULT_KEYS.texts, "json"), DEFAULT_KEYS.images
    return any(key in sample for key in texts) and any(key in sample for key in images)


def sample_name(sample: RawSample) -> str:
    """Return the file name of the shard and the key of the sample, as a person would look for it."""
    return f"{Path(sample['__url__']).name}/{sample['__key__']}"


def decode_image(sample: RawSample, keys: Keys = DEFAULT_KEYS) -> Image.Image:
    """Return the image of a sample.

    Raises:
        ImageError: the sample has no image, or the image cannot be decoded.
    """
    return open_image(image_bytes(sample, keys))


def image_bytes(sample: RawSample, keys: Keys = DEFAULT_KEYS) -> bytes:
    """Return the member of a sample that is its image.

    Raises:
        ImageError: the sample has no image.
    """
    for key in keys.images:
        if key in sample:
            data: bytes = sample[key]
            return data
    raise ImageError(
        f"sample has no image ({', '.join(keys.images)}), only {_found(sample)}; --image-key names others",
        "no image",
    )


def _found(sample: RawSample) -> str:
    """Return what a sample has, and what may be wrong with the shard, for errors."""
    extensions = sorted(key for key in sample if not key.startswith("__"))
    with contextlib.suppress(SampleError):
        fields = ", ".join(metadata(sample)) or "nothing"
        extensions = [f"json with {fields}" if key == "json" else key for key in extensions]
    if len(extensions) == 1 and "json" not in sample:
        return (
            f"{extensions[0]} (a pair's files, as 7.jpg, 7.txt, must lie side by side: tar --sort=name packs them so)"
        )
    return ", ".join(extensions) or "parts that are damaged"


def metadata(sample: RawSample) -> dict[str, Any]:
    """Return the ``json`` of a sample, or an empty dict if it has none.

    Raises:
        SampleError: it is not valid JSON, or not an object.
    """
    try:
        parsed = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"json cannot be read: {error}", "broken json") from error
    if not isinstance(parsed, dict):
        raise SampleError(f"json is not an object but a {type(parsed).__name__}", "broken json")
    return parsed


def field(sample: RawSample, key: str) -> str:
    """Return the value of ``key`` in the ``json`` of a sample.

    Raises:
        SampleError: there is no such key, and the message lists those that there are; or as :func:`metadata`.
    """
    fields = metadata(sample)
    if key not in fields:
        there = ", ".join(sorted(fields)) or "nothing"
        raise SampleError(f"sample has no {key!r} in its json; it has {there}", "no such field")
    return str(fields[key])


def caption(
    sample: RawSample, keyword_prob: float = 0.0, rng: random.Random | None = None, keys: Keys = DEFAULT_KEYS
) -> str:
    """Return the caption of a sample, one of several if it has a list of them: ``rng`` draws it, or it is the first.

    With probability ``keyword_prob``, from one to three of the ``keywords`` in its ``json`` are appended, drawn by
    ``rng``.

    Raises:
        SampleError: there is no caption, it is not UTF-8, or the keywords are not a list of strings.
    """
    texts = captions(sample, rng, keys)
    text = texts[0] if rng is None or len(texts) == 1 else rng.choice(texts)
    if rng is None or keyword_prob == 0 or rng.random() >= keyword_prob:
        return text
    keywords = metadata(sample).get("keywords", [])
    if not isinstance(keywords, list) or not all(isinstance(word, str) for word in keywords):
        raise SampleError(f"keywords are not a list of strings: {keywords!r:.80}", "broken json")
    chosen = rng.sample(keywords, min(len(keywords), rng.randint(1, 3)))
    return ", ".join([text, *chosen])


def captions(sample: RawSample, rng: random.Random | None = None, keys: Keys = DEFAULT_KEYS) -> list[str]:
    """Return the captions of a sample: its member, or the first that is not empty of the values in its ``json``.

    ``rng`` draws which of the keys of the json comes first, if there are probabilities for that.

    Raises:
        SampleError: there is none, or it is not UTF-8.
    """
    member = None if keys.is_json else next((key for key in keys.texts if key in sample), None)
    values: list[Any]
    if member is None:
        fields = metadata(sample)
        values = [fields[key] for key in keys.ordered_texts(rng) if key in fields]
    else:
        try:
            values = [sample[member].decode("utf-8")]
        except UnicodeDecodeError as error:
            raise SampleError(f"caption is not UTF-8: {error}", "broken caption") from error
    others: list[Any] = []
    for value in values:
        found = value if isinstance(value, list) else [value]
        texts = [text.strip() for text in found if isinstance(text, str)]
        if any(texts):
            return [text for text in texts if text]
        others += [one for one in found if not isinstance(one, str | None)]
    if others:
        raise SampleError(f"caption is no text: {others[0]!r:.80}", "no caption")
    if values:
        raise SampleError("caption is empty", "no caption")
    names = ", ".join(keys.texts)
    raise SampleError(f"sample has no caption ({names}), only {_found(sample)}; --text-key names others", "no caption")

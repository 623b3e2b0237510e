"""Samples of WebDataset shards: their names, how they are read, and what is in them. Nothing is unpickled."""

from __future__ import annotations

import glob
import json
import random
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..images import ImageError, SampleError, open_image
from .tar import BLOCK, Damage, Member, read_tar

if TYPE_CHECKING:
    from PIL import Image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
BUNDLED_PREFIX = "bundled:"
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
PACKING = "a shard holds an image and a caption of each pair under one name (7.jpg, 7.txt): tar --sort=name -cf x.tar ."
SMALLEST_PAIR = 4 * BLOCK  # bytes of an image and a caption in a tar file, each with its header

RawSample = dict[str, Any]


def expand_shards(pattern: str | Iterable[str]) -> list[str]:
    """Return the shards that ``pattern`` names.

    Args:
        pattern: paths with braces (``{000..099}``) or wildcards (``*.tar``, in sorted order), joined by ``::``.
            ``bundled:emoji/noto`` is a shard of this package. Names with a scheme (``https:``, ``pipe:``) stay as they
            are.

    Raises:
        ValueError: a local file does not exist or is no tar file by its name, or no shard is named.
    """
    from webdataset.shardlists import expand_urls

    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    try:
        named = [_bundled(shard) for one in patterns for shard in expand_urls(one)]
    except AssertionError as error:  # a variable ${NAME} that is not set
        raise ValueError(f"shards {pattern!r} cannot be expanded: {error}") from error
    shards = [path for shard in named for path in _matches(shard)]
    local = [shard for shard in shards if ":" not in shard]
    missing = [shard for shard in local if not Path(shard).exists()]
    if missing:
        raise ValueError(f"no such shard: {missing[0]} ({len(missing)} of {len(shards)} are missing)")
    for shard in local:
        if Path(shard).is_dir():
            raise ValueError(f"{shard} is a folder: name the shards in it, as '{Path(shard) / '*.tar'}'")
        if Path(shard).suffix.lower() in TABLES:
            raise ValueError(f"{shard} is a table, not a tar file: {PACKING}")
    if not shards:
        raise ValueError("no shards given")
    return shards


def _matches(shard: str) -> list[str]:
    """Return the files that a local name with wildcards means, and any other name as it is."""
    if ":" in shard or not glob.has_magic(shard) or Path(shard).exists():
        return [shard]
    found = sorted(glob.glob(shard))
    if not found:
        raise ValueError(f"no such shard: nothing matches {shard}")
    return found


def is_local(pattern: str) -> bool:
    """Return True if ``pattern`` names only files: a name with a scheme may be opened by a shell command."""
    return all(":" not in part.removeprefix(BUNDLED_PREFIX) for part in pattern.split("::"))


def _bundled(shard: str) -> str:
    """Return the path of a bundled shard, and any other shard as it is."""
    if not shard.startswith(BUNDLED_PREFIX):
        return shard
    name = shard.removeprefix(BUNDLED_PREFIX)
    folder = files("clipfast").joinpath("assets", "emoji")
    known = sorted("emoji/" + path.name.removesuffix(".tar.gz") for path in folder.iterdir())
    if name not in known:
        raise ValueError(f"no bundled shard {name!r}; there are: {', '.join(known)}")
    return str(folder.joinpath(name.removeprefix("emoji/") + ".tar.gz"))


def read_samples(shards: Iterable[str]) -> Iterator[RawSample]:
    """Yield the samples of tar files in order, undecoded: ``__key__``, ``__url__``, and bytes by file extension.

    Consecutive members whose names agree up to the first dot form a sample. For each pair that is known to be lost
    where a shard is damaged, there is a sample whose ``__damage__`` says why and whose key says where: it cannot be
    decoded, and is thus counted and named as other samples that cannot be used. The number of lost pairs is estimated
    from the smallest pair of the shard, so it is rather too high than too low.

    Raises:
        ValueError: a shard cannot be opened, or is not a tar file.
    """
    from webdataset.gopen import gopen

    for shard in shards:
        try:
            with gopen(shard) as stream:
                yield from group_members(shard, read_tar(stream))
        except (ValueError, OSError) as error:
            raise ValueError(f"shard {shard} cannot be read: {error}") from error


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
    """Return True if a sample has an image and a caption."""
    return "txt" in sample and any(extension in sample for extension in IMAGE_EXTENSIONS)


def sample_name(sample: RawSample) -> str:
    """Return the file name of the shard and the key of the sample, as a person would look for it."""
    return f"{Path(sample['__url__']).name}/{sample['__key__']}"


def decode_image(sample: RawSample) -> Image.Image:
    """Return the image of a sample.

    Raises:
        ImageError: the sample has no image, or the image cannot be decoded.
    """
    return open_image(image_bytes(sample))


def image_bytes(sample: RawSample) -> bytes:
    """Return the file of a sample that is its image.

    Raises:
        ImageError: the sample has no image.
    """
    _check_damage(sample)
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            data: bytes = sample[extension]
            return data
    raise ImageError(f"sample has no image ({', '.join(IMAGE_EXTENSIONS)}), only {_found(sample)}", "no image")


def _found(sample: RawSample) -> str:
    """Return the extensions of a sample and what may be wrong with the shard, for errors."""
    extensions = sorted(key for key in sample if not key.startswith("__"))
    if "json" in extensions and "txt" not in extensions:
        return f"{', '.join(extensions)}; clipfast reads captions from .txt files, not from json"
    if len(extensions) == 1:
        return f"{extensions[0]}; the files of a pair must lie one behind the other: tar --sort=name"
    return ", ".join(extensions) or "parts that are damaged"


def _check_damage(sample: RawSample) -> None:
    """Refuse a sample that stands for a pair that is lost."""
    if "__damage__" in sample:
        raise SampleError(f"a pair is lost: {sample['__damage__']}", "damaged shard")


def metadata(sample: RawSample) -> dict[str, Any]:
    """Return the ``json`` of a sample, or an empty dict if it has none.

    Raises:
        SampleError: it is not valid JSON, or not an object.
    """
    _check_damage(sample)
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


def caption(sample: RawSample, keyword_prob: float = 0.0, rng: random.Random | None = None) -> str:
    """Return the caption of a sample, its ``txt``.

    With probability ``keyword_prob``, from one to three of the ``keywords`` in its ``json`` are appended, drawn by
    ``rng``.

    Raises:
        SampleError: there is no caption, it is not UTF-8, or the keywords are not a list of strings.
    """
    _check_damage(sample)
    if "txt" not in sample:
        raise SampleError(f"sample has no caption (txt), only {_found(sample)}", "no caption")
    try:
        text: str = sample["txt"].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise SampleError(f"caption is not UTF-8: {error}", "broken caption") from error
    if not text:
        raise SampleError("caption is empty", "no caption")
    if rng is None or keyword_prob == 0 or rng.random() >= keyword_prob:
        return text
    keywords = metadata(sample).get("keywords", [])
    if not isinstance(keywords, list) or not all(isinstance(word, str) for word in keywords):
        raise SampleError(f"keywords are not a list of strings: {keywords!r:.80}", "broken json")
    chosen = rng.sample(keywords, min(len(keywords), rng.randint(1, 3)))
    return ", ".join([text, *chosen])

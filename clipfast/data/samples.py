"""Samples of WebDataset shards: their names, how they are read, and what is in them. Nothing is unpickled."""

import json
import random
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from ..images import ImageError, open_image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
BUNDLED_PREFIX = "bundled:"

RawSample = dict[str, Any]


def expand_shards(pattern: str | Iterable[str]) -> list[str]:
    """Return the shards that ``pattern`` names.

    Args:
        pattern: paths with braces (``{000..099}``), joined by ``::``. ``bundled:emoji/noto`` is a shard of this
            package, and webdataset opens names with a scheme (``https:``, ``pipe:``).

    Raises:
        ValueError: a local file does not exist, or no shard is named.
    """
    from webdataset.shardlists import expand_urls

    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    shards = [_bundled(shard) for one in patterns for shard in expand_urls(one)]
    missing = [shard for shard in shards if ":" not in shard and not Path(shard).is_file()]
    if missing:
        raise ValueError(f"no such shard: {missing[0]} ({len(missing)} of {len(shards)} are missing)")
    if not shards:
        raise ValueError("no shards given")
    return shards


def is_local(pattern: str) -> bool:
    """Return True if ``pattern`` names only files: webdataset opens a name with a scheme by a shell command."""
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

    Raises:
        ValueError: a shard is not a readable tar file.
    """
    from webdataset.tariterators import tarfile_samples

    for shard in shards:
        try:
            yield from tarfile_samples([{"url": shard}])
        except Exception as error:
            raise ValueError(f"shard {shard} cannot be read: {error}") from error


def count_samples(shards: Iterable[str]) -> int:
    """Return the number of samples; every shard is read once."""
    return sum(1 for _ in read_samples(shards))


def sample_name(sample: RawSample) -> str:
    """Return the file name of the shard and the key of the sample, as a person would look for it."""
    return f"{Path(sample['__url__']).name}/{sample['__key__']}"


def decode_image(sample: RawSample) -> Image.Image:
    """Return the image of a sample.

    Raises:
        ImageError: the sample has no image, or the image cannot be decoded.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return open_image(sample[extension])
    found = sorted(key for key in sample if not key.startswith("__"))
    raise ImageError(f"sample has no image ({', '.join(IMAGE_EXTENSIONS)}), only {', '.join(found)}")


def metadata(sample: RawSample) -> dict[str, Any]:
    """Return the ``json`` of a sample, or an empty dict if it has none.

    Raises:
        ValueError: it is not valid JSON, or not an object.
    """
    try:
        parsed = json.loads(sample.get("json", b"{}"))
    except ValueError as error:
        raise ValueError(f"json cannot be read: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"json is not an object but a {type(parsed).__name__}")
    return parsed


def field(sample: RawSample, key: str) -> str:
    """Return the value of ``key`` in the ``json`` of a sample.

    Raises:
        KeyError: there is no such key; the message lists those that there are.
        ValueError: as :func:`metadata`.
    """
    fields = metadata(sample)
    if key not in fields:
        raise KeyError(f"sample {sample_name(sample)} has no {key!r} in its json; it has {', '.join(sorted(fields))}")
    return str(fields[key])


def caption(sample: RawSample, keyword_prob: float = 0.0, rng: random.Random | None = None) -> str:
    """Return the caption of a sample, its ``txt``.

    With probability ``keyword_prob``, from one to three of the ``keywords`` in its ``json`` are appended, drawn by
    ``rng``.

    Raises:
        ValueError: there is no caption, it is not UTF-8, or the keywords are not a list of strings.
    """
    if "txt" not in sample:
        raise ValueError("sample has no txt")
    text: str = sample["txt"].decode("utf-8").strip()
    if rng is None or keyword_prob == 0 or rng.random() >= keyword_prob:
        return text
    keywords = metadata(sample).get("keywords", [])
    if not isinstance(keywords, list) or not all(isinstance(word, str) for word in keywords):
        raise ValueError(f"keywords are not a list of strings: {keywords!r:.80}")
    chosen = rng.sample(keywords, min(len(keywords), rng.randint(1, 3)))
    return ", ".join([text, *chosen])

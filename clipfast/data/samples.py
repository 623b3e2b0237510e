"""The content of a sample: its image, its captions, and the files that it names. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import MAX_MEMBER, read_regular
from ..models.images import ImageError, SampleError, open_image
from .keys import DEFAULT_KEYS, Keys
from .names import is_remote

if TYPE_CHECKING:
    from PIL import Image


LINKS = "__links__"  # the key of a sample under which it holds the names of files until they are read

RawSample = dict[str, Any]


def is_pair(sample: RawSample) -> bool:
    """Return True if a sample has an image, and a member that may hold a caption."""
    texts, images = (*DEFAULT_KEYS.texts, "json"), DEFAULT_KEYS.images
    return any(key in sample for key in texts) and any(key in sample for key in images)


def sample_name(sample: RawSample) -> str:
    """Return a name by which a person can find a sample: the file name of its shard, and its key."""
    return f"{Path(sample['__url__']).name}/{sample['__key__']}"


def decode_image(sample: RawSample, keys: Keys = DEFAULT_KEYS) -> Image.Image:
    """Decode the image of a sample.

    Raises:
        ImageError: the sample has no image, or the image cannot be decoded.
    """
    return open_image(image_bytes(sample, keys))


def image_bytes(sample: RawSample, keys: Keys = DEFAULT_KEYS) -> bytes:
    """Return the undecoded bytes of a sample's image.

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
    """Describe the members of a sample, and likely mistakes in the shard, for error messages."""
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
        SampleError: the member is not valid JSON, or not an object.
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
        SampleError: there is no such key; the message lists the existing keys. Or as for :func:`metadata`.
    """
    fields = metadata(sample)
    if key not in fields:
        there = ", ".join(sorted(fields)) or "nothing"
        raise SampleError(f"sample has no {key!r} in its json; it has {there}", "no such field")
    return str(fields[key])


def caption(
    sample: RawSample, keyword_prob: float = 0.0, rng: random.Random | None = None, keys: Keys = DEFAULT_KEYS
) -> str:
    """Return a caption of a sample; from a list of several, ``rng`` draws one, or without ``rng`` it is the first.

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
    """Return all captions of a sample: its text member, or the first value in its ``json`` that is not empty.

    If the keys have weights, ``rng`` draws the order in which the keys of the json are tried.

    Raises:
        SampleError: there is no caption, or it is not UTF-8.
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


@dataclasses.dataclass(frozen=True)
class Links:
    """The names of files that a sample refers to; when they are read, they become members of the sample.

    Attributes:
        folder: the folder in which relative names are looked for first; after that, in the working folder.
        images: values that may name images, by key; a value that is not text names none.
        texts: names of side-car files.
    """

    folder: str
    images: Mapping[str, Any]
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load_links(sample: RawSample, keys: Keys) -> int:
    """Read the files that a sample names (json, image and texts in ``keys``) into it; return their bytes in total.

    The key ``__path__`` of the sample is set to the path of its image.

    Raises:
        SampleError: a file is missing, is no regular file, or is too large; or no key of an image names a file.
    """
    links: Links | None = sample.pop(LINKS, None)
    if links is None:
        return 0
    wanted = {key: links.texts[key] for key in (*keys.texts, "json") if key in links.texts}
    sample |= {key: _read(links.folder, name, "caption")[1] for key, name in wanted.items()}
    size = sum(len(sample[key]) for key in wanted)
    named = {key: links.images[key] for key in keys.images if links.images.get(key) is not None}
    for key, name in named.items():
        if isinstance(name, str) and name.strip():
            sample["__path__"], sample[key] = _read(links.folder, name.strip(), "image")
            sample.setdefault("__key__", name.strip())
            return size + len(sample[key])
    others = [f"{key} is no file name: {value!r:.80}" for key, value in named.items() if not isinstance(value, str)]
    if others:
        raise SampleError(f"{others[0]}; --image-key names others", "no image")
    return size


def _read(folder: str, name: str, what: str) -> tuple[str, bytes]:
    """Return the path and the content of a file that a sample names."""
    for path in dict.fromkeys((os.path.join(folder, name), name)):
        try:
            return path, read_regular(path, MAX_MEMBER)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            reason, is_huge = getattr(error, "strerror", None) or error, getattr(error, "errno", 0) == errno.EFBIG
            raise SampleError(
                f"{path!r:.200} cannot be read: {reason}", f"{'huge' if is_huge else 'missing'} {what}"
            ) from error
    where = f", neither in {folder} nor in the working folder" if folder else ""
    hint = "; single images are not read from the network" if is_remote(name) or is_remote(folder) else ""
    raise SampleError(f"there is no file {name!r:.200}{where}{hint}", f"missing {what}")

"""Files that a sample names instead of holding them: images of tables, and images and texts of folders."""

import dataclasses
import errno
import os
from collections.abc import Mapping
from typing import Any

from ..files import read_regular
from ..images import SampleError
from .keys import Keys
from .samples import RawSample, is_remote
from .tar import MAX_MEMBER

LINKS = "__links__"  # the key under which a sample has them until they are read


@dataclasses.dataclass(frozen=True)
class Links:
    """The names of files that may become members of a sample, by their keys.

    Attributes:
        folder: where a name that is not absolute is looked for first; after that, it is in the working folder.
        images: names of images; values that are no text name none.
        texts: names of side-car files.
    """

    folder: str
    images: Mapping[str, Any]
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load_links(sample: RawSample, keys: Keys) -> int:
    """Read into a sample its side-cars that ``keys`` name, its json and its image; return how many bytes these have.

    ``__path__`` of the sample is that of its image.

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
    """Return the path and the content of a file."""
    for path in dict.fromkeys((os.path.join(folder, name), name)):
        try:
            return path, read_regular(path, MAX_MEMBER)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason, is_huge = getattr(error, "strerror", None) or error, getattr(error, "errno", 0) == errno.EFBIG
            raise SampleError(
                f"{path!r:.200} cannot be read: {reason}", f"{'huge' if is_huge else 'missing'} {what}"
            ) from error
    where = f", neither in {folder} nor in the working folder" if folder else ""
    hint = "; single images are not read from the network" if is_remote(name) or is_remote(folder) else ""
    raise SampleError(f"there is no file {name!r:.200}{where}{hint}", f"missing {what}")

"""Folders of images with text files beside them. Samples are found by a list of the folder's images.

The list is a file that :mod:`clipfast.data.staging` keeps in the cache. It has a line of JSON for each image: an object
that maps file extensions to the files with the image's name.
"""

import collections
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .formats import Extents, Format
from .keys import DEFAULT_KEYS, IMAGE_EXTENSIONS, Keys
from .samples import LINKS, Links, RawSample, metadata
from .tables import JSONL

IMAGE_KINDS = frozenset(IMAGE_EXTENSIONS)
MOST_KINDS = 8  # a message names at most this many file extensions of unused files


def write_list(folder: str, path: Path) -> None:
    """Write the list of the images in a folder, which serves as its index, to ``path``.

    Raises:
        OSError: a folder cannot be read.
    """
    with path.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(files) + "\n" for files in images_in(folder))


def images_in(folder: str) -> Iterator[dict[str, str]]:
    """Yield the files of each image-text pair in a folder and its sub-folders: their names by extension.

    A pair consists of the files of one folder whose names agree up to the last dot. Images are in the order of their
    names; the images of sub-folders come last. Names that begin with a dot are left out.
    """
    for named in _alike(folder):
        files = dict(named)
        images = [(extension, name) for extension, name in named if extension in IMAGE_EXTENSIONS]
        if images:
            yield files
        # 7.jpg and 7.JPG are two images with one text.
        yield from (files | {extension: name} for extension, name in images if files[extension] != name)


def others_in(folder: str, keys: Keys) -> str:
    """Return a text such as "2 heic, 1 pdf": how many files of a folder of images belong to no pair, by file extension.

    Sub-folders are included. Names that begin with a dot are left out.
    """
    kinds = collections.Counter[str]()
    for named in _alike(folder):
        extensions = [extension for extension, _ in named]
        is_pair = not IMAGE_KINDS.isdisjoint(extensions)
        taken = IMAGE_KINDS.union(keys.texts, ["json"]) if is_pair else frozenset()
        kinds.update(extension for extension in extensions if extension not in taken)
    most = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    said = [f"{kinds[kind]:,} {kind or 'without extension'}" for kind in most[:MOST_KINDS]]
    rest = sum(kinds[kind] for kind in most[MOST_KINDS:])
    return ", ".join([*said, *([f"{rest:,} of other kinds"] if rest else [])])


def _alike(folder: str) -> Iterator[list[tuple[str, str]]]:
    """Group the file names of a folder that agree up to the last dot; yield each group as (extension, name) pairs."""
    for inside, names in _walk(folder):
        parts = [name.rpartition(".") for name in names]
        yield from ([("", os.path.join(inside, name))] for stem, _, name in parts if not stem)
        # The names are sorted with a zero byte in place of the dot, so that the files of a group are next to each
        # other. No name has a zero byte.
        row = sorted(f"{stem}\0{extension}" for stem, _, extension in parts if stem)
        for stem, group in itertools.groupby(row, key=lambda name: name.partition("\0")[0]):
            extensions = [name.partition("\0")[2] for name in group]
            yield [(extension.lower(), os.path.join(inside, f"{stem}.{extension}")) for extension in extensions]


def has_texts(folder: str, keys: Keys) -> bool:
    """Return True if any image of a folder has a text file or a json with captions beside it."""
    return any(key in files for files in images_in(folder) for key in (*keys.texts, "json"))


def folder_stamp(folder: str) -> str:
    """Return the stamp of a folder of images: a text that changes when files are added, removed or renamed.

    It does not depend on the content of the files, which is read again with every pair.

    Raises:
        OSError: the folder cannot be read.
    """
    content = hashlib.sha256()
    for inside, names in _walk(folder):
        if any(name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for name in names):
            content.update("\0".join([inside, *sorted(names), ""]).encode("utf-8", "surrogateescape"))
    return content.hexdigest()


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder of images and all folders in it: the path relative to ``root``, and the names of the files."""
    pending, seen = [""], set[tuple[int, int]]()
    while pending:
        inside = pending.pop()
        folder = os.path.join(root, inside)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # links between folders can make a loop
            continue
        seen.add((status.st_dev, status.st_ino))
        names, folders = list[str](), list[str]()
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if _is_folder(entry) else names).append(entry.name)
        yield inside, names
        pending += [os.path.join(inside, name) for name in sorted(folders, reverse=True)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True if an entry of a folder of images is a folder itself."""
    try:
        return entry.is_dir()
    except OSError:  # for instance, the entry is a link to itself
        return False


def _scan(file: BinaryIO, name: str) -> tuple[Extents, dict[str, int]]:
    """Return begin and length of each line in the list of a folder's images, as ``Format.scan``.

    Raises:
        ValueError: there are no lines.
    """
    found, damage = JSONL.scan(file, name)
    if not len(found):
        others = others_in(name, DEFAULT_KEYS)
        raise ValueError(f"the folder has no images ({', '.join(IMAGE_EXTENSIONS)}){others and f', but {others}'}")
    return found, damage


def _parser(folder: str, _: int) -> Callable[[bytes], RawSample]:
    """Return a function that makes a sample of the bytes of a line in the list of a folder's images."""

    def parse(data: bytes) -> RawSample:
        """Return the paths of a sample's files from its line in the list of a folder's images."""
        files: dict[str, str] = metadata({"json": data})
        paths = {extension: os.path.join(folder, name) for extension, name in files.items()}
        key = next(iter(files.values())).rpartition(".")[0]
        return {"__key__": key, "__url__": folder, LINKS: Links("", paths, paths)}

    return parse


FOLDER = Format(1, _scan, _parser)

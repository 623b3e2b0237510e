"""Labelled image sets for evaluation, from class folders or shards, whose images can be read in any order."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import LOST, IndexCache, Keys, Skipped, Source, decode_image, expand_shards, open_sources
from ..data.folders import has_texts
from ..data.keys import DEFAULT_KEYS, IMAGE_EXTENSIONS
from ..data.names import is_folder
from ..data.samples import RawSample, captions, field, sample_name
from ..data.staging import file_stamp
from ..models.images import SampleError, open_image

if TYPE_CHECKING:
    from PIL import Image

CHECKED = 64  # ``LabelledSet.check`` raises an error if none of this many first images is usable
CROSSED_KEYS, CROSSED_GROUPS = "+", " + "  # the key "race+gender" makes groups such as "White + Male"


@dataclasses.dataclass
class LabelledImage:
    """One image of an evaluation set.

    Attributes:
        image: the image.
        label: the name of its class.
        captions: the captions of the image, at least one.
        group: the name of the group of the image; "" without groups.
        number: the position of the image in the set.
    """

    image: Image.Image
    label: str
    captions: tuple[str, ...]
    group: str = ""
    number: int = 0

    @property
    def caption(self) -> str:
        """The first caption of a labelled image."""
        return self.captions[0]


# A loader is the name of an image, and a function that decodes the image.
Loader = tuple[str, Callable[[], LabelledImage]]
# A place is a function that reads the sample at one position of a labelled set, and returns the image's loader.
Place = Callable[[], Loader]


@dataclasses.dataclass
class LabelledSet:
    """The images of a folder with one sub-folder per class, or of shards; each iteration reads them anew.

    A folder in which text or JSON files lie beside the images counts as a shard.

    Attributes:
        data: a folder, or shards as :func:`clipfast.data.expand_shards` takes them.
        group_by: the JSON key or column of the shards whose value is the group of an image; several keys that are
            joined by "+" give crossed groups.
        label_by: the JSON key or column of the shards whose value is the class; without it, the caption is the class.
        keys: the names under which a sample has its image and its caption.
        separator: the separator of CSV files, as :class:`clipfast.data.IndexCache` takes it.
        numbers: the positions of the images that are read, in ascending order; None for all.
        classes: the names of the class folders that are read; None for all.
        left_out: the images that could not be used in the last iteration, by their positions in the set.
    """

    data: str
    group_by: str | None = None
    label_by: str | None = None
    keys: Keys = DEFAULT_KEYS
    separator: str | None = None
    numbers: Sequence[int] | None = None
    classes: frozenset[str] | None = None
    left_out: dict[int, Skipped] = dataclasses.field(default_factory=dict)

    @property
    def skipped(self) -> list[Skipped]:
        """The images of the set that could not be used in the last iteration, with the reasons."""
        return list(self.left_out.values())

    def only(self, numbers: Sequence[int]) -> LabelledSet:
        """Return the subset of a labelled set with the images at the positions ``numbers``, which must ascend."""
        return dataclasses.replace(self, left_out={}, numbers=numbers)

    def __iter__(self) -> Iterator[LabelledImage]:
        """Yield the labelled images in their order.

        Raises:
            ValueError: there are no images, or none of them can be used. A subset of a set may be empty.
        """
        yield from self._usable()

    def check(self) -> None:
        """Raise ValueError if a labelled set has no images, or no usable image among the first 64."""
        next(self._usable(CHECKED))

    def _usable(self, most: int | None = None) -> Iterator[LabelledImage]:
        """Yield the usable images of a labelled set among the first ``most``, and record the others in ``left_out``."""
        self.left_out.clear()
        places, usable = self.places(), 0
        for number in itertools.islice(range(len(places)) if self.numbers is None else self.numbers, most):
            found = load(places[number], number)
            if isinstance(found, Skipped):
                self.left_out[number] = found
            else:
                usable += 1
                yield found
        if self.numbers is None and not usable:
            if not self.left_out:
                raise ValueError(f"{self.data} holds no images")
            first = "" if most is None else f"first {len(self.left_out)} "
            raise ValueError(f"not one of the {first}images of {self.data} can be used; first: {self.skipped[0]}")

    def places(self) -> list[Place]:
        """Return, for each position of the labelled set, a function that reads its image; ``numbers`` is ignored.

        Raises:
            ValueError: the set cannot be read, or a class has no images.
        """
        root = self._root_of_classes()
        if root is not None:
            return [
                functools.partial(loader, str(path), _from_file, path)
                for path in _images_of_classes(root, self.classes)
            ]
        shards = expand_shards(self.data)
        return [place for source in self._sources(shards) for place in self._samples(source)]

    def names(self, numbers: Iterable[int]) -> list[str]:
        """Return the names of the images at some positions of a labelled set; images are read, but not decoded."""
        places = self.places()
        return [places[number]()[0] for number in numbers]

    def stamp(self) -> str:
        """Return a text that changes whenever images, labels or captions of the labelled set change.

        Raises:
            ValueError: the set cannot be read, or a class has no images.
        """
        root = self._root_of_classes()
        if root is not None:
            files = [(str(path), file_stamp(os.stat(path))) for path in _images_of_classes(root, self.classes)]
        else:
            sources = self._sources(expand_shards(self.data))
            files = [(shard.name, shard.stamp) for source in sources for shard in source.shards]
        return repr((self.data, self.group_by, self.label_by, self.keys, self.separator, files))

    def digest(self) -> str:
        """Return the SHA-256 of :meth:`stamp`, by which the feature store identifies the set; raise the same errors."""
        return hashlib.sha256(self.stamp().encode()).hexdigest()

    def _root_of_classes(self) -> Path | None:
        """Return the folder whose sub-folders are the classes of a labelled set; None if the set consists of shards."""
        shards = expand_shards(self.data)
        is_classes = len(shards) == 1 and is_folder(shards[0]) and not has_texts(shards[0], self.keys)
        return Path(shards[0]) if is_classes else None

    def folder_labels(self) -> list[str] | None:
        """Return the labels of a set of class folders in their order, without reading images; None for shards."""
        root = self._root_of_classes()
        return None if root is None else in_order(path.name for path in root.iterdir() if path.is_dir())

    def _sources(self, names: Sequence[str]) -> list[Source]:
        """Open the shards of a labelled set."""
        return open_sources(names, index=IndexCache(separator=self.separator))

    def _samples(self, source: Source) -> Iterator[Place]:
        """Yield a function for each image of a source's shards that returns its loader, which fails for a lost pair."""
        numbers = itertools.count()
        for shard in source.shards:
            for number in itertools.islice(numbers, shard.count):
                yield functools.partial(self._read, source, number)
            for damage, count in shard.damage.items():
                place, _, reason = damage.partition(": ")
                lost = SampleError(f"a pair is lost: {reason}", LOST)
                for pair in range(count):
                    name = f"{Path(shard.name).name}/{place}, pair {pair + 1}"
                    yield functools.partial(loader, name, _fail, lost)

    def _read(self, source: Source, number: int) -> Loader:
        """Read a sample of a labelled set; return its loader, which decodes the image or raises the reading error."""
        try:
            sample = source.read(number, self.keys)
        except SampleError as error:
            return loader(source.name(number), _fail, error)
        return loader(sample_name(sample), self._from_sample, sample)

    def _from_sample(self, sample: RawSample) -> LabelledImage:
        """Return the image of a sample with its label, captions and group for an evaluation."""
        texts = tuple(captions(sample, keys=self.keys))
        label = texts[0] if self.label_by is None else field(sample, self.label_by)
        keys = [] if self.group_by is None else self.group_by.split(CROSSED_KEYS)
        group = CROSSED_GROUPS.join(field(sample, key) for key in keys)
        return LabelledImage(decode_image(sample, self.keys), label, texts, group)


def in_order(labels: Iterable[str]) -> list[str]:
    """Return a labelled set's distinct labels in sorted order; if all are numbers, they are sorted by value."""
    names = set(labels)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def load(place: Place, number: int) -> LabelledImage | Skipped:
    """Read and decode the labelled image at one position; return it, or the reason why it cannot be used."""
    name, decode = place()
    try:
        return dataclasses.replace(decode(), number=number)
    except ValueError as error:
        return Skipped(name, getattr(error, "kind", "unusable sample"), str(error))


def _images_of_classes(root: Path, classes: frozenset[str] | None) -> list[Path]:
    """Return the images of each class folder in ``root``; the name of the folder is the label and the caption.

    Raises:
        ValueError: there are no class folders, or one of them has no images.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir() and (classes is None or path.name in classes))
    if not folders:
        raise ValueError(f"{root} has no sub-folders; an image folder has one per class")
    found = {folder: sorted(path for path in folder.iterdir() if _is_image(path)) for folder in folders}
    empty = [folder for folder, paths in found.items() if not paths]
    if empty:
        raise ValueError(f"{empty[0]} has no images ({', '.join(IMAGE_EXTENSIONS)})")
    return list(itertools.chain(*found.values()))


def _is_image(path: Path) -> bool:
    """Return True if a file in a folder of classes is an image by its name."""
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def loader(name: str, load: Callable[..., LabelledImage], *of: Any) -> Loader:
    """Return the name of a labelled image, and ``load`` with its arguments as the function that decodes it."""
    return name, functools.partial(load, *of)


def _fail(error: SampleError) -> LabelledImage:
    """Raise ``error``: the loader of a labelled image that could not be read calls this in place of a decoder."""
    raise error


def _from_file(path: Path) -> LabelledImage:
    """Decode an image file whose folder is its class."""
    return LabelledImage(open_image(path), path.parent.name, (path.parent.name,))

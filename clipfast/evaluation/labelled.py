"""Labelled image sets: reading them, and encoding them into the features that every evaluation starts from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..data import IndexCache, Keys, Skipped, Source, caption, decode_image, expand_shards, open_sources
from ..data.folders import has_texts
from ..data.keys import DEFAULT_KEYS, IMAGE_EXTENSIONS
from ..data.samples import RawSample, field, is_folder, sample_name
from ..images import SampleError, open_image
from ..models import CLIP

if TYPE_CHECKING:
    from PIL import Image


@dataclasses.dataclass
class LabelledImage:
    """One image of an evaluation set."""

    image: Image.Image
    label: str
    caption: str
    group: str
    number: int = 0  # its place in the set


T = TypeVar("T")
CHECKED = 64  # images of a set of which one must be usable
Loader = tuple[str, Callable[[], LabelledImage]]  # the name of an image, and what decodes it


@dataclasses.dataclass
class LabelledFeatures:
    """Features of an image set, and what is known of each image.

    ``twins`` numbers images by their pixels: images that are equal to the last bit have the same number. No model can
    tell such images apart, so the label of each is right for all of them.
    """

    features: Tensor  # [N, embed_dim], unit length
    labels: list[str]
    captions: list[str]
    groups: list[str]
    twins: list[int]
    numbers: list[int] = dataclasses.field(default_factory=list)  # places in the set
    digests: list[bytes] = dataclasses.field(default_factory=list)  # of the pixels

    @property
    def classnames(self) -> list[str]:
        """The distinct labels, sorted; by value if all of them are numbers."""
        labels = set(self.labels)
        return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)

    def accepted(self) -> list[set[str]]:
        """Return, for each image, the labels that are right for it: its own and those of its twins."""
        by_twin: dict[int, set[str]] = {}
        for twin, label in zip(self.twins, self.labels, strict=True):
            by_twin.setdefault(twin, set()).add(label)
        return [by_twin[twin] for twin in self.twins]


@dataclasses.dataclass
class LabelledSet:
    """The images of a folder with one sub-folder per class, or of shards; each iteration reads them anew.

    A folder in which a text or a json lies beside an image is a shard.

    Attributes:
        data: a folder, or shards as :func:`clipfast.data.expand_shards` takes them.
        group_by: key of the shards' json that names the group of an image.
        label_by: key of the shards' json that names the class; without it the caption does.
        keys: under which names a sample has its image and its caption.
        separator: of CSV files, as :class:`clipfast.data.IndexCache` takes it.
        left_out: every image that the last iteration had to leave out, by its place in the set.
        is_mine: says by its place whether an image is looked at.
    """

    data: str
    group_by: str | None = None
    label_by: str | None = None
    keys: Keys = DEFAULT_KEYS
    separator: str | None = None
    left_out: dict[int, Skipped] = dataclasses.field(default_factory=dict)
    is_mine: Callable[[int], bool] | None = None

    @property
    def skipped(self) -> list[Skipped]:
        """Every image that the last iteration had to leave out."""
        return list(self.left_out.values())

    def part(self, rank: int, ranks: int, block: int) -> LabelledSet:
        """Return the part of one of several ranks, which take blocks of so many images in turn."""
        return dataclasses.replace(self, left_out={}, is_mine=lambda number: number // block % ranks == rank)

    def __iter__(self) -> Iterator[LabelledImage]:
        """Yield the images in their order.

        Raises:
            ValueError: there are no images, or not one of them can be used; a part may be empty.
        """
        yield from self._usable()

    def check(self) -> None:
        """Refuse a set that has no images, or of whose first images not one can be used.

        Raises:
            ValueError: as above.
        """
        next(self._usable(CHECKED))

    def _usable(self, most: int | None = None) -> Iterator[LabelledImage]:
        """Yield the images that can be used among the first ``most``, and note the others."""
        self.left_out.clear()
        usable = False
        shards = expand_shards(self.data)
        is_classes = len(shards) == 1 and is_folder(shards[0]) and not has_texts(shards[0], self.keys)
        places = self._folder(Path(shards[0])) if is_classes else self._shards(shards)
        for number, read in enumerate(itertools.islice(places, most)):
            if self.is_mine is not None and not self.is_mine(number):
                continue
            name, load = read()
            try:
                image = dataclasses.replace(load(), number=number)
            except ValueError as error:
                self.left_out[number] = Skipped(name, getattr(error, "kind", "unusable sample"), str(error))
                continue
            usable = True
            yield image
        if usable or self.is_mine is not None:
            return
        if not self.skipped:
            raise ValueError(f"{self.data} holds no images")
        first = "" if most is None else f"first {len(self.skipped)} "
        raise ValueError(f"not one of the {first}images of {self.data} can be used; first: {self.skipped[0]}")

    def _shards(self, names: Sequence[str]) -> Iterator[Callable[[], Loader]]:
        for source in open_sources(names, index=IndexCache(separator=self.separator)):
            yield from self._samples(source)

    def _samples(self, source: Source) -> Iterator[Callable[[], Loader]]:
        """Yield what reads each image of each shard, and after them what stands for each that is lost."""
        numbers = itertools.count()
        for shard in source.shards:
            for number in itertools.islice(numbers, shard.count):
                yield functools.partial(self._read, source, number)
            for damage, count in shard.damage.items():
                place, _, reason = damage.partition(": ")
                lost = SampleError(f"a pair is lost: {reason}", "damaged shard")
                for pair in range(count):
                    name = f"{Path(shard.name).name}/{place}, pair {pair + 1}"
                    yield functools.partial(_loader, name, _fail, lost)

    def _read(self, source: Source, number: int) -> Loader:
        try:
            sample = source.read(number, self.keys)
        except SampleError as error:
            return _loader(source.name(number), _fail, error)
        return _loader(sample_name(sample), self._from_sample, sample)

    def _from_sample(self, sample: RawSample) -> LabelledImage:
        text = caption(sample, keys=self.keys)
        label = text if self.label_by is None else field(sample, self.label_by)
        group = "" if self.group_by is None else field(sample, self.group_by)
        return LabelledImage(decode_image(sample, self.keys), label, text, group)

    def _folder(self, root: Path) -> Iterator[Callable[[], Loader]]:
        """Yield the images of each sub-folder, whose name is their label and caption."""
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        if not folders:
            raise ValueError(f"{root} has no sub-folders; an image folder has one per class")
        found = {folder: sorted(path for path in folder.iterdir() if _is_image(path)) for folder in folders}
        empty = [folder for folder, paths in found.items() if not paths]
        if empty:
            raise ValueError(f"{empty[0]} has no images ({', '.join(IMAGE_EXTENSIONS)})")
        for path in itertools.chain(*found.values()):
            yield functools.partial(_loader, str(path), _from_file, path)


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def _loader(name: str, load: Callable[[T], LabelledImage], of: T) -> Loader:
    return name, functools.partial(load, of)


def _fail(error: SampleError) -> LabelledImage:
    raise error


def _from_file(path: Path) -> LabelledImage:
    return LabelledImage(open_image(path), path.parent.name, path.parent.name, "")


def encode_labelled(
    model: CLIP,
    images: Iterable[LabelledImage],
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    device: str | torch.device,
) -> LabelledFeatures:
    """Encode images in batches with ``model``, which must be in evaluation mode; only the features stay in memory.

    Raises:
        ValueError: there are no images, or the batch size is below 1.
    """
    return join_parts([encode_part(model, images, transform, batch_size, device)])


def join_parts(parts: Sequence[LabelledFeatures]) -> LabelledFeatures:
    """Return the features of a whole set, in its order, from those of its parts.

    Raises:
        ValueError: there are none.
    """
    numbers = [number for part in parts for number in part.numbers]
    if not numbers:
        raise ValueError("the evaluation set has no images")
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    lists: list[list[Any]] = []
    for name in ("labels", "captions", "groups", "numbers", "digests"):
        column = [value for part in parts for value in getattr(part, name)]
        lists.append([column[place] for place in order])
    labels, captions, groups, numbers, digests = lists
    first: dict[bytes, int] = {}
    twins = [first.setdefault(digest, len(first)) for digest in digests]
    features = torch.cat([part.features for part in parts])[order]
    return LabelledFeatures(features, labels, captions, groups, twins, numbers, digests)


@torch.no_grad()
def encode_part(
    model: CLIP,
    images: Iterable[LabelledImage],
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    device: str | torch.device,
) -> LabelledFeatures:
    """Encode some images of a set as :func:`encode_labelled` does, without ``twins``; there may be none.

    A batch holds what is usable among ``batch_size`` places of the set, so that a part has batches of the whole.

    Raises:
        ValueError: the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    found = LabelledFeatures(torch.empty(0), [], [], [], [])
    features: list[Tensor] = []
    pending: list[Tensor] = []

    def flush() -> None:
        if pending:
            features.append(model.encode_image(torch.stack(pending).to(device), normalize=True))
            pending.clear()

    for item in images:
        if found.numbers and item.number // batch_size != found.numbers[-1] // batch_size:
            flush()
        found.numbers.append(item.number)
        found.digests.append(hashlib.sha256(repr(item.image.size).encode() + item.image.tobytes()).digest())
        found.labels.append(item.label)
        found.captions.append(item.caption)
        found.groups.append(item.group)
        pending.append(transform(item.image))
        if len(pending) == batch_size:
            flush()
    flush()
    if features:
        found.features = torch.cat(features)
    return found

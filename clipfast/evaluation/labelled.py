"""Labelled image sets: reading them, and encoding them into the features that every evaluation starts from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


CHECKED = 64  # images of a set of which one must be usable
Loader = tuple[str, Callable[[], LabelledImage]]  # the name of an image, and what reads it


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
        skipped: every image that the last iteration had to leave out.
    """

    data: str
    group_by: str | None = None
    label_by: str | None = None
    keys: Keys = DEFAULT_KEYS
    separator: str | None = None
    skipped: list[Skipped] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[LabelledImage]:
        """Yield the images in their order.

        Raises:
            ValueError: there are no images, or not one of them can be used.
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
        self.skipped.clear()
        usable = False
        shards = expand_shards(self.data)
        is_classes = len(shards) == 1 and is_folder(shards[0]) and not has_texts(shards[0], self.keys)
        loaders = self._folder(Path(self.data)) if is_classes else self._shards(shards)
        for name, load in itertools.islice(loaders, most):
            try:
                image = load()
            except ValueError as error:
                self.skipped.append(Skipped(name, getattr(error, "kind", "unusable sample"), str(error)))
                continue
            usable = True
            yield image
        if not usable and not self.skipped:
            raise ValueError(f"{self.data} holds no images")
        if not usable:
            first = "" if most is None else f"first {len(self.skipped)} "
            raise ValueError(f"not one of the {first}images of {self.data} can be used; first: {self.skipped[0]}")

    def _shards(self, names: Sequence[str]) -> Iterator[Loader]:
        for source in open_sources(names, index=IndexCache(separator=self.separator)):
            yield from self._samples(source)

    def _samples(self, source: Source) -> Iterator[Loader]:
        """Yield the images of each shard, and after them what stands for each that is lost."""
        numbers = itertools.count()
        for shard in source.shards:
            for number in itertools.islice(numbers, shard.count):
                try:
                    sample = source.read(number, self.keys)
                except SampleError as error:
                    yield source.name(number), functools.partial(_fail, error)
                else:
                    yield sample_name(sample), functools.partial(self._from_sample, sample)
            for damage, count in shard.damage.items():
                place, _, reason = damage.partition(": ")
                lost = SampleError(f"a pair is lost: {reason}", "damaged shard")
                for pair in range(count):
                    yield f"{Path(shard.name).name}/{place}, pair {pair + 1}", functools.partial(_fail, lost)

    def _from_sample(self, sample: RawSample) -> LabelledImage:
        text = caption(sample, keys=self.keys)
        label = text if self.label_by is None else field(sample, self.label_by)
        group = "" if self.group_by is None else field(sample, self.group_by)
        return LabelledImage(decode_image(sample, self.keys), label, text, group)

    def _folder(self, root: Path) -> Iterator[Loader]:
        """Yield the images of each sub-folder, whose name is their label and caption."""
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        if not folders:
            raise ValueError(f"{root} has no sub-folders; an image folder has one per class")
        found = {folder: sorted(path for path in folder.iterdir() if _is_image(path)) for folder in folders}
        empty = [folder for folder, paths in found.items() if not paths]
        if empty:
            raise ValueError(f"{empty[0]} has no images ({', '.join(IMAGE_EXTENSIONS)})")
        for path in itertools.chain(*found.values()):
            yield str(path), functools.partial(_from_file, path)


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def _fail(error: SampleError) -> LabelledImage:
    raise error


def _from_file(path: Path) -> LabelledImage:
    return LabelledImage(open_image(path), path.parent.name, path.parent.name, "")


@torch.no_grad()
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
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    found = LabelledFeatures(torch.empty(0), [], [], [], [])
    features: list[Tensor] = []
    pending: list[Tensor] = []
    twins: dict[bytes, int] = {}

    def flush() -> None:
        if pending:
            features.append(model.encode_image(torch.stack(pending).to(device), normalize=True))
            pending.clear()

    for item in images:
        digest = hashlib.sha256(repr(item.image.size).encode() + item.image.tobytes()).digest()
        found.twins.append(twins.setdefault(digest, len(twins)))
        found.labels.append(item.label)
        found.captions.append(item.caption)
        found.groups.append(item.group)
        pending.append(transform(item.image))
        if len(pending) == batch_size:
            flush()
    flush()
    if not features:
        raise ValueError("the evaluation set has no images")
    found.features = torch.cat(features)
    return found

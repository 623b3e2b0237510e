"""Features of labelled image sets, from which evaluations are computed. All ranks share the encoding, by blocks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import Skipped, made_by_workers
from ..distributed.world import ALONE, World
from ..io.progress import Progress, progress
from ..models.packed_images import PackedImages, batch_images
from .encoder import Encoder
from .labelled import LabelledSet, in_order, load
from .store import FeatureStore, Section

if TYPE_CHECKING:
    from PIL import Image

BLOCK = 256  # the number of neighbouring images that are encoded, and stored, together
COLUMNS = ("labels", "captions", "groups", "numbers", "digests")  # fields of LabelledFeatures with a value per image


@dataclasses.dataclass
class LabelledFeatures:
    """The features of an image set, with the label, captions, group and pixel checksum of each image.

    ``twins`` has an integer for each image, which is the same for images with equal pixels. No model can tell such
    images apart, so the label of each is right for all of them.
    """

    features: Tensor  # [N, embed_dim], unit length
    labels: list[str]
    captions: list[tuple[str, ...]]
    groups: list[str]
    twins: list[int] = dataclasses.field(default_factory=list)
    numbers: list[int] = dataclasses.field(default_factory=list)  # the positions of the images in the set
    digests: list[bytes] = dataclasses.field(default_factory=list)  # the checksums of the pixels
    left_out: dict[int, Skipped] = dataclasses.field(default_factory=dict)  # the unusable images by their positions

    @classmethod
    def empty(cls) -> LabelledFeatures:
        """Return features of a labelled set without images."""
        return cls(torch.empty(0), [], [], [])

    def to(self, device: str | torch.device) -> LabelledFeatures:
        """Return the labelled features with the tensor on another device."""
        return dataclasses.replace(self, features=self.features.to(device))

    @property
    def classnames(self) -> list[str]:
        """The distinct labels of a labelled set in sorted order; labels that are all numbers are sorted by value."""
        return in_order(self.labels)

    def accepted(self) -> list[set[str]]:
        """Return the labels that an evaluation accepts for each image: its own and those of equal images."""
        by_twin: dict[int, set[str]] = {}
        for twin, label in zip(self.twins, self.labels, strict=True):
            by_twin.setdefault(twin, set()).add(label)
        return [by_twin[twin] for twin in self.twins]


def join_parts(parts: Sequence[LabelledFeatures]) -> LabelledFeatures:
    """Join the features of several blocks of a labelled set, in the order of the set.

    Raises:
        ValueError: no image of the set can be used.
    """
    left_out = dict(sorted(item for part in parts for item in part.left_out.items()))
    numbers = [number for part in parts for number in part.numbers]
    if not numbers:
        first = next(iter(left_out.values()))
        raise ValueError(f"not one of the {len(left_out)} images of the evaluation set can be used; first: {first}")
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    columns: dict[str, list[Any]] = {}
    for name in COLUMNS:
        column = [value for part in parts for value in getattr(part, name)]
        columns[name] = [column[place] for place in order]
    first_with: dict[bytes, int] = {}
    twins = [first_with.setdefault(digest, len(first_with)) for digest in columns["digests"]]
    features = torch.cat([part.features for part in parts if part.numbers])[order]
    return LabelledFeatures(features, twins=twins, left_out=left_out, **columns)


@dataclasses.dataclass
class _Block:
    """A block of transformed images to be encoded: ``pixels`` has a batch for each distinct transform of the models."""

    pixels: list[Tensor | PackedImages]
    found: LabelledFeatures  # labels and other metadata; its tensor of features is empty


class _Blocks(Dataset[_Block]):
    """A dataset of a labelled set's blocks: indexing it by positions reads, decodes and transforms the images there.

    Encoders with equal transforms share the transformed images.
    """

    def __init__(self, images: LabelledSet, encoders: Sequence[Encoder]) -> None:
        places = images.places()
        self.places = places if images.numbers is None else [places[number] for number in images.numbers]
        self.transforms: list[Callable[[Image.Image], Tensor]] = []
        self.for_gpu = any(torch.device(encoder.device).type != "cpu" for encoder in encoders)
        for encoder in encoders:
            if encoder.transform not in self.transforms:
                self.transforms.append(encoder.transform)

    def __getitem__(self, numbers: Sequence[int]) -> _Block:
        found, images = LabelledFeatures.empty(), []
        for number in numbers:
            image = load(self.places[number], number)
            if isinstance(image, Skipped):
                found.left_out[number] = image
                continue
            pixels = image.image
            images.append(pixels)
            found.numbers.append(number)
            found.digests.append(hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).digest())
            found.labels.append(image.label)
            found.captions.append(image.captions)
            found.groups.append(image.group)
        transforms = self.transforms if images else []
        batches = [batch_images([f(image) for image in images], f, for_gpu=self.for_gpu) for f in transforms]
        return _Block(batches, found)


def encode_set(
    encoders: Sequence[Encoder],
    images: LabelledSet,
    *,
    batch_size: int = BLOCK,
    workers: int = 0,
    store: FeatureStore | None = None,
    world: World = ALONE,
    show: Progress | None = None,
) -> list[LabelledFeatures]:
    """Encode a labelled set by several models, and return its features by each; every image is decoded only once.

    Several ranks share the work; all of them must call this function. Blocks that are in ``store`` are not computed
    again: after a kill, the next call continues with the first missing block.

    Args:
        encoders: the models.
        images: the set. Afterwards its ``left_out`` on rank 0 has the unusable images of all ranks.
        batch_size: the number of images to encode at once. A batch holds the usable images among ``batch_size``
            neighbours of the set, whatever the number of ranks, and so features do not depend on that number.
        workers: the number of data worker processes of this rank; with 0, this process reads and decodes.
        store: the store that keeps the features, or None. Several machines must see the same files.
        world: the ranks.
        show: shows the progress of each rank; default: on rank 0.

    Returns:
        The features on the CPU, one element for each encoder, on rank 0; nothing on other ranks.

    Raises:
        ValueError: the set cannot be read, or none of its images can be used.
    """
    with world.local_first():  # one process of each machine indexes the set; the others read its index
        blocks = _Blocks(images, encoders)
    count = len(blocks.places)
    ranges = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    sections = world.on_main(lambda: _sections(encoders, images, batch_size, store))
    numbers = range(len(ranges)) if sections else ()
    kept = world.on_main(lambda: [n for n in numbers if all(section.holds(_name(n)) for section in sections)])
    missing = sorted(set(range(len(ranges))) - set(kept))
    mine = missing[world.rank :: world.size]
    parts: list[list[LabelledFeatures]] = []
    show = show or functools.partial(progress, shown=world.is_main)

    def encode() -> None:
        """Encode and store the blocks of the labelled set that this rank has to encode."""
        with (
            world.phase("evaluation"),
            show(sum(len(ranges[n]) for n in mine), f"images of {images.data}", "images") as advance,
            made_by_workers(blocks, [ranges[n] for n in mine], min(workers, len(mine))) as made,
        ):
            for number, part in zip(mine, _encode(encoders, blocks, made), strict=True):
                for section, found in zip(sections, part, strict=False):
                    section.save(_name(number), *_for_store(found))
                parts.append(part)
                advance(len(ranges[number]))

    world.agree(encode)
    everyones = [part for theirs in world.gather(parts) for part in theirs]
    whole: list[LabelledFeatures] = []

    def join() -> None:
        """Join the features of all blocks, encoded or stored, on rank 0."""
        if not ranges:
            raise ValueError(f"{images.data} holds no images")
        read = [[_unpacked(*section.load(_name(number))) for section in sections] for number in kept]
        whole.extend(join_parts(list(of_one)) for of_one in zip(*everyones, *read, strict=True))
        images.left_out = dict(whole[0].left_out)

    world.on_main(join)  # if rank 0 raises an error (no usable images), all ranks do
    return whole


def _encode(encoders: Sequence[Encoder], blocks: _Blocks, made: Iterable[_Block]) -> Iterator[list[LabelledFeatures]]:
    """Encode blocks of a labelled set by each encoder, and yield for each block the features on the CPU."""
    inputs = [blocks.transforms.index(encoder.transform) for encoder in encoders]
    for block in made:
        features = [torch.empty(0)] * len(encoders)
        if block.pixels:
            features = [encoder.images(block.pixels[i]) for encoder, i in zip(encoders, inputs, strict=True)]
        yield [dataclasses.replace(block.found, features=x.cpu()) for x in features]


def _sections(
    encoders: Sequence[Encoder], images: LabelledSet, batch_size: int, store: FeatureStore | None
) -> list[Section]:
    """Return the feature store's section for a labelled set and each encoder; [] without a store."""
    if store is None:
        return []
    data = {"data": images.data, "stamp": images.digest(), "block": batch_size}
    part = {} if images.numbers is None else {"numbers": [*images.numbers]}
    return [store.section("images", {**encoder.about(), **data, **part}) for encoder in encoders]


def _name(number: int) -> str:
    """Return the name under which the feature store keeps a block of a labelled set."""
    return f"block_{number:06}"


def _for_store(found: LabelledFeatures) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split labelled features into tensors and plain values, the two kinds that a feature store saves."""
    columns: dict[str, Any] = {name: getattr(found, name) for name in COLUMNS}
    columns["digests"] = [digest.hex() for digest in found.digests]
    return {"features": found.features}, {**columns, "left_out": {str(n): x for n, x in found.left_out.items()}}


def _unpacked(tensors: dict[str, Tensor], columns: dict[str, Any]) -> LabelledFeatures:
    """Restore labelled features from the tensors and values of :func:`_for_store`, read from the feature store."""
    left_out = {int(number): Skipped(*skipped) for number, skipped in columns.pop("left_out").items()}
    columns["digests"] = [bytes.fromhex(digest) for digest in columns["digests"]]
    columns["captions"] = [tuple(texts) for texts in columns["captions"]]
    return LabelledFeatures(tensors["features"], left_out=left_out, **columns)

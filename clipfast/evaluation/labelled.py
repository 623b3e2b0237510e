"""A labelled image set as features: what every evaluation of a checkpoint starts from."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data import IMAGE_EXTENSIONS, caption, decode_image, expand_shards, metadata, read_samples
from ..images import open_image
from ..models import CLIP


@dataclasses.dataclass
class LabelledImage:
    """One image of an evaluation set."""

    image: Image.Image
    label: str
    caption: str
    group: str


@dataclasses.dataclass
class LabelledFeatures:
    """Features of an image set, and what is known of each image.

    ``twins`` numbers images by their pixels: images that are equal to the last bit have the same number. Nothing can
    tell them apart, so the label of any of them is right for all.
    """

    features: Tensor  # [N, embed_dim], unit length
    labels: list[str]
    captions: list[str]
    groups: list[str]
    twins: list[int]

    @property
    def classnames(self) -> list[str]:
        """Distinct labels, in order of appearance."""
        return list(dict.fromkeys(self.labels))

    def accepted(self) -> list[set[str]]:
        """For each image, the labels that are right for it: its own and those of its twins."""
        by_twin: dict[int, set[str]] = {}
        for twin, label in zip(self.twins, self.labels, strict=True):
            by_twin.setdefault(twin, set()).add(label)
        return [by_twin[twin] for twin in self.twins]


def read_labelled(data: str, group_by: str | None = None, label_by: str | None = None) -> Iterator[LabelledImage]:
    """Images of a folder with one sub-folder per class, or of WebDataset shards.

    Args:
        data: a folder, or shards as :func:`clipfast.data.expand_shards` takes them.
        group_by: key of the shards' json to report results by.
        label_by: key of the shards' json that names the class; without it the caption does.

    Raises:
        ValueError: nothing there, or a sample without the key.
        ImageError: an image that cannot be decoded.
    """
    if Path(data).is_dir():
        folders = sorted(path for path in Path(data).iterdir() if path.is_dir())
        if not folders:
            raise ValueError(f"{data} has no sub-folders; an image folder has one per class")
        for folder in folders:
            for path in sorted(folder.iterdir()):
                if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
                    yield LabelledImage(open_image(path), folder.name, folder.name, "")
        return
    for sample in read_samples(expand_shards(data)):
        text = caption(sample)
        fields = metadata(sample)
        for key in (group_by, label_by):
            if key is not None and key not in fields:
                raise ValueError(f"sample {sample['__key__']} has no {key!r} in its json; it has {sorted(fields)}")
        label = text if label_by is None else str(fields[label_by])
        yield LabelledImage(decode_image(sample), label, text, "" if group_by is None else str(fields[group_by]))


@torch.no_grad()
def encode_labelled(
    model: CLIP,
    images: Iterable[LabelledImage],
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    device: str | torch.device,
) -> LabelledFeatures:
    """Encode an image set batch by batch; only features stay in memory. ``model`` is in evaluation mode.

    Raises:
        ValueError: no images.
    """
    features: list[Tensor] = []
    labels: list[str] = []
    captions: list[str] = []
    groups: list[str] = []
    twins: dict[bytes, int] = {}
    twin_of: list[int] = []
    pending: list[Tensor] = []

    def flush() -> None:
        if pending:
            features.append(model.encode_image(torch.stack(pending).to(device), normalize=True))
            pending.clear()

    for item in images:
        digest = hashlib.sha256(repr(item.image.size).encode() + item.image.tobytes()).digest()
        twin_of.append(twins.setdefault(digest, len(twins)))
        labels.append(item.label)
        captions.append(item.caption)
        groups.append(item.group)
        pending.append(transform(item.image))
        if len(pending) == batch_size:
            flush()
    flush()
    if not features:
        raise ValueError("the evaluation set has no images")
    return LabelledFeatures(torch.cat(features), labels, captions, groups, twin_of)

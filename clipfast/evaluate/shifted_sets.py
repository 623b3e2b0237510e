"""The folders of ImageNet's shifted versions (ImageNet-V2, -A, -R, -Sketch and ObjectNet), and their classes.

ImageNet-A, ImageNet-R and ImageNet-Sketch name their folders by WordNet ids, as ImageNet does, and each folder is a
class. ImageNet-V2 numbers its folders. ObjectNet has files beside its images that map its classes to ImageNet's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .class_subsets import ClassMap, read_json
from .imagenet import V2_FOLDERS
from .labelled import LabelledSet
from .zero_shot import IMAGENET_CLASSNAMES

if TYPE_CHECKING:
    from PIL import Image

OBJECTNET = "objectnet"
# This maps the name of a shift to the names that its image folder has in the published archive or after a download
# script.
FOLDERS: dict[str, tuple[str, ...]] = {
    "imagenet-v2": V2_FOLDERS,
    "imagenet-a": ("imagenet-a",),
    "imagenet-r": ("imagenet-r",),
    "imagenet-sketch": ("sketch", "imagenet-sketch"),
}


@dataclasses.dataclass(frozen=True)
class CutBorder:
    """A function that crops a border, such as ObjectNet's red one, from an image; a too small image stays unchanged."""

    pixels: int

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image without its border."""
        if min(image.size) <= 2 * self.pixels:
            return image
        return image.crop((self.pixels, self.pixels, image.width - self.pixels, image.height - self.pixels))


@dataclasses.dataclass(frozen=True)
class ShiftedSet:
    """A shifted version of a base set, such as ImageNet-R of ImageNet.

    Attributes:
        name: the name of the shift.
        images: the images.
        change: a function that changes each image before it is encoded, or None.
        class_map: the classes of the base that each label means, or None if the labels are those of the base.
    """

    name: str
    images: LabelledSet
    change: CutBorder | None = None
    class_map: ClassMap | None = None


def shifted_set(name: str, source: str, read: Callable[[str], LabelledSet], class_map: ClassMap | None) -> ShiftedSet:
    """Open a shifted set. For ImageNet's shifted versions, images and classes are found in the unpacked archive.

    Args:
        name: the name of the shift.
        source: data in any form that the base may have, or the folder of an unpacked archive of ImageNet's shifted
            version.
        read: opens the labelled set of a source.
        class_map: the user's class map, or None.

    Raises:
        ValueError: a file or folder of ObjectNet is missing.
    """
    if name == OBJECTNET and class_map is None:
        return _objectnet(source, read)
    found = next((path for folder in FOLDERS.get(name, ()) if (path := Path(source, folder)).is_dir()), None)
    change = CutBorder(1) if name == OBJECTNET else None
    return ShiftedSet(name, read(source if found is None else str(found)), change, class_map)


def _objectnet(source: str, read: Callable[[str], LabelledSet]) -> ShiftedSet:
    """Return ObjectNet's images of the classes that ImageNet has, without the red border around each image."""
    nested = Path(source, "objectnet-1.0")
    root = nested if nested.is_dir() else Path(source)
    images, mappings = root / "images", root / "mappings"
    lacking = next((path for path in (images, mappings) if not path.is_dir()), None)
    if lacking is not None:
        raise ValueError(
            f"there is no folder {lacking}: --shift objectnet=FOLDER takes the folder of its archive, with images and "
            "mappings; give images alone another name, and --class-map"
        )
    class_map = _objectnet_classes(mappings)
    wanted = frozenset(label for label, numbers in class_map.items() if numbers)
    return ShiftedSet(OBJECTNET, dataclasses.replace(read(str(images)), classes=wanted), CutBorder(1), class_map)


def _objectnet_classes(mappings: Path) -> dict[str, list[int]]:
    """Return the indices of ImageNet's classes for each image folder of ObjectNet.

    ``imagenet_to_label_2012_v2`` has the names of the classes, one a line, in the order of the ImageNet challenge of
    2012. ``pytorch_to_imagenet_2012_id.json`` has the line of each class, by its index in the order of WordNet ids.

    Raises:
        ValueError: a file is missing, or names a class that another file lacks.
    """
    names = mappings / "imagenet_to_label_2012_v2"
    if not names.is_file():
        raise ValueError(f"there is no file {names}")
    places = _object(mappings / "pytorch_to_imagenet_2012_id.json")
    number_at = {int(place): int(number) for number, place in places.items()}
    lines = names.read_text(encoding="utf-8-sig").splitlines()
    numbers = {line.strip(): number_at.get(place) for place, line in enumerate(lines)}
    overlap = _object(mappings / "objectnet_to_imagenet_1k.json")
    found: dict[str, list[int]] = {}
    for folder, label in _object(mappings / "folder_to_objectnet_label.json").items():
        meant = [numbers.get(name) for name in overlap[label].split("; ")] if label in overlap else []
        found[folder] = [number for number in meant if number is not None and number < len(IMAGENET_CLASSNAMES)]
        if len(found[folder]) != len(meant):
            raise ValueError(f"{mappings}: {label!r} means {overlap[label]!r}, which {names.name} does not have")
    return found


def _object(path: Path) -> dict[str, str]:
    """Return the object in one of ObjectNet's JSON files as a dict of texts."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, not {type(content).__name__}")
    return {str(key): str(value) for key, value in content.items()}

"""Reads the JSON files of compositional benchmarks (ARO, SugarCrepe, Winoground) and their image folders as cases."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.keys import IMAGE_EXTENSIONS, Keys
from ..data.samples import LINKS, Links, RawSample, decode_image, load_links
from ..data.staging import file_stamp
from ..models.images import MAX_PIXELS, SampleError
from .compositional_scores import Case, order_case
from .labelled import LabelledImage, LabelledSet, Place, loader

BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
WRONG_KEYS = ("negative_caption", "negative_captions", "false_caption", "false_captions")
# NAMES are patterns for the names of the benchmarks' published files, and IMAGE_FOLDERS the names of the folders with
# their images (SugarCrepe uses COCO's val2017).
NAMES = (
    "visual_genome_*.json", "add_*.json", "replace_*.json", "swap_*.json", "examples.jsonl", "*_karpathy_*.json",
    "flickr30k_*.json",
)  # fmt: skip
IMAGE_FOLDERS = ("images", "val2017")
Record = dict[str, Any]


class Layout(NamedTuple):
    """The keys of a record in a file of one compositional benchmark.

    Attributes:
        images: the keys whose values are names of image files.
        captions: the keys of the right captions, one for each image; in the format "order", one image has a list of
            them.
        wrong: the key of the wrong caption, or of a list of them.
        groups: the keys that divide the cases into groups; the mean accuracy is taken over the groups of the first key.
    """

    images: tuple[str, ...]
    captions: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that every compositional record of this format has."""
        return (*self.images, *self.captions, *self.wrong)


# A record has the first of these formats whose keys are all in the record. The key "category" is not in SugarCrepe's
# files: ``read_cases`` adds it to each record, with the name of the file as its value.
LAYOUTS = {
    "winoground": Layout(
        ("image_0", "image_1"), ("caption_0", "caption_1"), (), ("collapsed_tag", "tag", "secondary_tag")
    ),
    "aro": Layout(("image_path",), ("true_caption",), ("false_caption",), ("relation_name", "attributes")),
    "sugarcrepe": Layout(("filename",), ("caption",), ("negative_caption",), ("category",)),
    "order": Layout(("image",), ("caption",)),
}  # fmt: skip


class Picture(NamedTuple):
    """An image file of a compositional set, or the part of the image inside ``box``."""

    name: str
    box: tuple[float, ...] | None = None  # left, top, width and height


@dataclasses.dataclass
class Pictures(LabelledSet):
    """The images that the records of a compositional set name; each image is there once.

    Attributes:
        folder: the folder of the image files.
        pictures: the images.
    """

    folder: str = ""
    pictures: Sequence[Picture] = ()

    def places(self) -> list[Place]:
        """Return the functions that read the images of a compositional set."""
        return [functools.partial(loader, picture.name, _load, self.folder, picture) for picture in self.pictures]

    def stamp(self) -> str:
        """Return a text that changes when the images of a compositional set do."""
        return repr((self.folder, [(*picture, _stamp(Path(self.folder, picture.name))) for picture in self.pictures]))


def _stamp(path: Path) -> str:
    """Return a text with size and time of an image file, which changes with the file; "missing" if there is none."""
    try:
        return file_stamp(os.stat(path))
    except (OSError, ValueError):
        return "missing"


def _load(folder: str, picture: Picture) -> LabelledImage:
    """Decode an image of a compositional set, and crop it to its box if it has one."""
    sample: RawSample = {LINKS: Links(folder, {"image": picture.name})}
    keys = Keys(images=("image",))
    load_links(sample, keys)
    image = decode_image(sample, keys)
    if picture.box is not None:
        left, top, width, height = picture.box
        is_sane = all(abs(value) <= MAX_PIXELS for value in picture.box)  # False also for NaN and infinity
        if not (is_sane and width > 0 and height > 0 and width * height <= MAX_PIXELS):
            box = f"the box of {width:g}x{height:g} pixels at {left:g}, {top:g}"
            raise SampleError(f"{box} cannot be cut out", "broken box")
        image = image.crop((left, top, left + width, top + height))
    return LabelledImage(image, "", ("",))


def files_of(data: str) -> list[Path]:
    """Return the files of compositional benchmarks at a path, which is a file or a folder; [] for any other data.

    Raises:
        ValueError: a file cannot be read.
    """
    path = Path(data)
    if os.path.isdir(data):  # unlike ``Path.is_dir``, this is False for a list of shards that is too long for a path
        return sorted(file for name in NAMES for file in path.glob(name) if file.is_file())
    # A .jsonl file in none of these formats, or only in the format "order", holds image-text pairs as for training.
    is_ours = path.suffix.lower() == ".json" or (
        path.suffix.lower() == ".jsonl" and os.path.isfile(data) and layout_of(path) not in (None, "order")
    )
    return [path] if is_ours and os.path.isfile(data) else []


def _read_records(path: Path, most: int | None = None) -> list[Record]:
    """Read the records of a compositional benchmark's file: JSON lines (the first ``most``), a list, or an object.

    Raises:
        ValueError: the file is not JSON, is empty, or has an element that is not an object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix.lower() == ".jsonl":
                found: Any = [json.loads(line) for line in itertools.islice(filter(str.strip, file), most)]
            else:
                found = json.load(file)
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    found = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds no records")
    for number, record in enumerate(found):
        if not isinstance(record, dict):
            raise ValueError(f"record {number} of {path} is no object but {record!r:.40}")
    return found


def layout_of(path: Path) -> str | None:
    """Return the format of a compositional benchmark's file by its first record; None if the format is unknown."""
    first = set(_read_records(path, 1)[0])
    known = [name for name, layout in LAYOUTS.items() if set(layout.keys) <= first]
    return None if not known or (known[0] == "order" and first & set(WRONG_KEYS)) else known[0]


def read_cases(files: Sequence[Path], form: str, folder: str | None) -> tuple[Pictures, list[Case]]:
    """Read the images and the test cases from compositional files of one format.

    Args:
        files: the paths of the files.
        form: the format.
        folder: the folder of the images; by default ``images`` or ``val2017`` beside a file, or else the file's own
            folder.

    Raises:
        ValueError: a file cannot be read, a record lacks a value, or the folder does not exist.
    """
    beside = [files[0].parent / name for name in IMAGE_FOLDERS]
    root = Path(folder) if folder else next((path for path in beside if path.is_dir()), files[0].parent)
    if not root.is_dir():
        raise ValueError(f"--images {folder}: there is no such folder")
    pictures: dict[Picture, int] = {}
    cases: list[Case] = []
    for path in files:
        for number, record in enumerate(_read_records(path)):
            try:
                own = {"category": path.stem} if form == "sugarcrepe" else {}
                cases += _cases({**record, **own}, f"{path.name}, record {number}", form, root, pictures)
            except ValueError as error:
                raise ValueError(f"record {number} of {path} {error}") from error
    return Pictures(os.fspath(files[0].parent), folder=os.fspath(root), pictures=list(pictures)), cases


def _cases(record: Record, name: str, form: str, root: Path, pictures: dict[Picture, int]) -> Iterator[Case]:
    """Yield the compositional cases of a record, and add its new images to ``pictures`` with their positions there."""
    layout, box = LAYOUTS[form], _box(record)
    named = [Picture(_image_file_of(root, _text(record, key)), box) for key in layout.images]
    images = tuple(pictures.setdefault(picture, len(pictures)) for picture in named)
    if form == "order":
        captions = _captions_of(record, layout.captions[0])
        yield from filter(None, (order_case(name, images[0], caption) for caption in captions))
        return
    texts = [_text(record, key) for key in layout.captions]
    texts += [text for key in layout.wrong for text in _captions_of(record, key)]
    groups = {}
    for key in layout.groups:
        if value := record.get(key):
            groups[key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    yield Case(name, images, tuple(texts), groups)


def _box(record: Record) -> tuple[float, ...] | None:
    """Return left, top, width and height of the crop box in a compositional record; None if it has none."""
    values = [record.get(key) for key in BOX]
    if values == [None] * len(BOX):
        return None
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"has no numbers in {', '.join(BOX)}, but {values}")
    return tuple(float(record[key]) for key in BOX)


def _captions_of(record: Record, key: str) -> list[str]:
    """Return the captions under a key of a compositional record, whose value is one text or a list of texts."""
    values = record.get(key)
    if not values or not isinstance(values, list):  # for an empty list, ``_text`` raises an error
        return [_text(record, key)]
    return [_text({key: value}, key) for value in values]


def _text(record: Record, key: str) -> str:
    """Return the text under a key of a compositional record."""
    if key not in record:
        raise ValueError(f"has no {key!r}, only {', '.join(map(repr, record))}")
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"has no text as {key!r} but {value!r:.40}")
    return value


def _image_file_of(root: Path, name: str) -> str:
    """Return the file name of an image of a compositional record; Winoground's names lack the suffix."""
    if "." in Path(name).name:
        return name
    found = (f"{name}.{suffix}" for suffix in IMAGE_EXTENSIONS)
    return next((file for file in found if (root / file).is_file()), name)

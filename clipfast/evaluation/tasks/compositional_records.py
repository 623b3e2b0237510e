"""Cases in the files that ARO, SugarCrepe and Winoground are published in, beside a folder of images."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...data.keys import IMAGE_EXTENSIONS, Keys
from ...data.samples import LINKS, Links, RawSample, decode_image, load_links
from ...data.staging import file_stamp
from ...images import MAX_PIXELS, SampleError
from ..labelled import LabelledImage, LabelledSet, Loader, Place
from .compositional_order import order_case
from .compositional_scores import Case

Record = dict[str, Any]
BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
WRONG_KEYS = ("negative_caption", "negative_captions", "false_caption", "false_captions")
# What the files are called in a folder of theirs.
NAMES = (
    "visual_genome_*.json", "add_*.json", "replace_*.json", "swap_*.json", "examples.jsonl", "*_karpathy_*.json",
    "flickr30k_*.json",
)  # fmt: skip
IMAGE_FOLDERS = ("images", "val2017")  # ARO's and Winoground's, and that of COCO's images for SugarCrepe


class Layout(NamedTuple):
    """The keys of a record of one format.

    Attributes:
        images: name the files of its images.
        captions: hold the right captions, one for each image; with one image and no ``wrong``, a list of them.
        wrong: holds the wrong captions, one or a list.
        groups: hold what the record is a case of; the first that there is divides the cases for their mean.
    """

    images: tuple[str, ...]
    captions: tuple[str, ...]
    wrong: str | None = None
    groups: tuple[str, ...] = ()


# A record is of the first format whose keys it has.
LAYOUTS = {
    "winoground": Layout(
        ("image_0", "image_1"), ("caption_0", "caption_1"), None, ("collapsed_tag", "tag", "secondary_tag")
    ),
    "aro": Layout(("image_path",), ("true_caption",), "false_caption", ("relation_name", "attributes")),
    "sugarcrepe": Layout(("filename",), ("caption",), "negative_caption"),
    "order": Layout(("image",), ("caption",)),
}  # fmt: skip
FILE = "category"  # the division by the names of the files


class Picture(NamedTuple):
    """An image in a file, or a part of it."""

    name: str
    box: tuple[float, ...] | None = None  # left, top, width and height


@dataclasses.dataclass
class Pictures(LabelledSet):
    """The images that cases name, each once.

    Attributes:
        folder: that they lie in.
        pictures: the images.
    """

    folder: str = ""
    pictures: Sequence[Picture] = ()

    def places(self) -> list[Place]:
        """Return what reads each image."""
        return [functools.partial(_loader, self.folder, picture) for picture in self.pictures]

    def stamp(self) -> str:
        """Return a text that changes when the images do."""
        return repr((self.folder, [(*picture, _stamp(Path(self.folder, picture.name))) for picture in self.pictures]))


def _stamp(path: Path) -> str:
    try:
        return file_stamp(os.stat(path))
    except (OSError, ValueError):
        return "missing"


def _loader(folder: str, picture: Picture) -> Loader:
    return picture.name, functools.partial(_load, folder, picture)


def _load(folder: str, picture: Picture) -> LabelledImage:
    sample: RawSample = {LINKS: Links(folder, {"image": picture.name})}
    keys = Keys(images=("image",))
    load_links(sample, keys)
    image = decode_image(sample, keys)
    if picture.box is not None:
        left, top, width, height = picture.box
        is_sane = all(abs(value) <= MAX_PIXELS for value in picture.box)  # neither NaN nor infinite
        if not (is_sane and width > 0 and height > 0 and width * height <= MAX_PIXELS):
            raise SampleError(
                f"the box of {width:g}x{height:g} pixels at {left:g}, {top:g} cannot be cut out", "broken box"
            )
        image = image.crop((left, top, left + width, top + height))
    return LabelledImage(image, "", ("",))


def files_of(data: str) -> list[Path]:
    """Return the files of records that a name stands for: itself, or those in a folder; none if it is something else.

    Raises:
        ValueError: a file cannot be read.
    """
    path = Path(data)
    if os.path.isdir(data):  # which a list of shards may be too long a name for
        return sorted(file for name in NAMES for file in path.glob(name) if file.is_file())
    suffix = path.suffix.lower()
    # Other lines are pairs, as for training.
    is_ours = os.path.isfile(data) and (
        suffix == ".json" or (suffix == ".jsonl" and layout_of(path) not in (None, "order"))
    )
    return [path] if is_ours else []


def read_records(path: Path, most: int | None = None) -> list[Record]:
    """Return the records of a file: lines, of which no more than ``most`` are read, a list, or an object of them.

    Raises:
        ValueError: it is not JSON, is empty, or something in it is no record.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix.lower() == ".jsonl":
                lines = (line for line in file if line.strip())
                found = [json.loads(line) for line in itertools.islice(lines, most)]
            else:
                parsed = json.load(file)
                found = list(parsed.values()) if isinstance(parsed, dict) else parsed
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds no records")
    wrong = next((number for number, record in enumerate(found) if not isinstance(record, dict)), None)
    if wrong is not None:
        raise ValueError(f"record {wrong} of {path} is no object but {found[wrong]!r:.40}")
    return found


def layout_of(path: Path) -> str | None:
    """Return the format of a file by its first record; None if it has none of them.

    Raises:
        ValueError: as :func:`read_records`.
    """
    first = set(read_records(path, 1)[0])
    for name, layout in LAYOUTS.items():
        wrong = {layout.wrong} if layout.wrong else set()
        if {*layout.images, *layout.captions, *wrong} <= first and (name != "order" or not first & set(WRONG_KEYS)):
            return name
    return None


def read_cases(files: Sequence[Path], form: str, folder: str | None) -> tuple[Pictures, list[Case]]:
    """Return the images of files of one format, and the cases that name them.

    Args:
        files: of records.
        form: the format.
        folder: of the images; by default ``images`` or ``val2017`` beside a file, or else its own folder.

    Raises:
        ValueError: a file cannot be read, a record lacks something, or the folder does not exist.
    """
    beside = [files[0].parent / name for name in IMAGE_FOLDERS]
    root = Path(folder) if folder else next((path for path in beside if path.is_dir()), files[0].parent)
    if not root.is_dir():
        raise ValueError(f"--images {folder}: there is no such folder")
    pictures: dict[Picture, int] = {}
    cases: list[Case] = []
    for path in files:
        for number, record in enumerate(read_records(path)):
            try:
                cases += _cases(record, f"{path.name}, record {number}", form, path.stem, root, pictures)
            except ValueError as error:
                raise ValueError(f"record {number} of {path} {error}") from error
    return Pictures(os.fspath(files[0].parent), folder=os.fspath(root), pictures=list(pictures)), cases


def _cases(record: Record, name: str, form: str, stem: str, root: Path, pictures: dict[Picture, int]) -> Iterator[Case]:
    layout = LAYOUTS[form]
    box = _box(record)
    images = tuple(
        pictures.setdefault(Picture(_file(root, _text(record, key)), box), len(pictures)) for key in layout.images
    )
    groups = {key: value for key in layout.groups if (value := _group(record.get(key)))}
    if form == "order":
        for caption in _texts(record, layout.captions[0]):
            case = order_case(name, images[0], caption)
            if case is not None:
                yield case
        return
    right = tuple(_text(record, key) for key in layout.captions)
    wrong = () if layout.wrong is None else tuple(_texts(record, layout.wrong))
    if form == "sugarcrepe":
        groups[FILE] = stem
    yield Case(name, images, (*right, *wrong), groups)


def _box(record: Record) -> tuple[float, ...] | None:
    values = [record.get(key) for key in BOX]
    if values == [None] * len(BOX):
        return None
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"has no numbers in {', '.join(BOX)}, but {values}")
    return tuple(float(value) for value in values if value is not None)


def _group(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _text(record: Record, key: str) -> str:
    if key not in record:
        raise ValueError(f"has no {key!r}, only {', '.join(map(repr, record))}")
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"has no text as {key!r} but {value!r:.40}")
    return value


def _texts(record: Record, key: str) -> list[str]:
    value = record.get(key)
    if not isinstance(value, list):
        return [_text(record, key)]
    if not value:
        raise ValueError(f"has no text in {key!r}")
    return [_text({key: one}, key) for one in value]


def _file(root: Path, name: str) -> str:
    """Return the name of an image's file; Winoground's come without their suffix."""
    if "." in Path(name).name:
        return name
    found = (f"{name}.{suffix}" for suffix in IMAGE_EXTENSIONS)
    return next((file for file in found if (root / file).is_file()), name)

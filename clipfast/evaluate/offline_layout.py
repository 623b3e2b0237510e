"""Evaluation sets in the offline layout of CLIP_benchmark, which its exporter ``clip_benchmark_export_wds`` writes.

``ROOT/wds_NAME/`` has a folder for each split with ``nshards.txt`` and the shards ``0.tar``, ``1.tar``, and so on.
Beside these folders lie ``classnames.txt`` (line i is the name of class i), ``zeroshot_classification_templates.txt``
(``{c}`` stands for the name) and ``dataset_type.txt`` ("classification" if there is none). A sample has an image
and its class number (``.cls``), a row with 0 or 1 for each class (``.npy``, in a "multilabel" set), or a caption in
each line of its text (``.txt``, in a "retrieval" set). In the name of a folder, "-" replaces the "/" of the set's name.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.samples import RawSample, decode_image
from ..io.files import MAX_SETTINGS, read_regular
from ..models.images import SampleError
from .labelled import LabelledImage, LabelledSet

CLASSIFICATION, MULTILABEL, RETRIEVAL = "classification", "multilabel", "retrieval"
KINDS = (CLASSIFICATION, MULTILABEL, RETRIEVAL)
PREFIX = "wds_"

VTAB = tuple(
    f"vtab/{name}"
    for name in (
        "caltech101", "cifar100", "clevr_count_all", "clevr_closest_object_distance", "diabetic_retinopathy", "dmlab",
        "dsprites_label_orientation", "dsprites_label_x_position", "dtd", "eurosat", "kitti_closest_vehicle_distance",
        "flowers", "pets", "pcam", "resisc45", "smallnorb_label_azimuth", "smallnorb_label_elevation", "svhn",
    )
)  # fmt: skip
SHIFTED = ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet")
OTHERS = (
    "fer2013", "voc2007", "voc2007_multilabel", "sun397", "cars", "fgvc_aircraft", "mnist", "stl10", "gtsrb",
    "country211", "renderedsst2",
)  # fmt: skip
# The names that CLIP_benchmark gives to groups of sets, and the sets in each.
COLLECTIONS = {
    "vtab": (*VTAB, "sun397"),
    "vtab+": ("imagenet1k", *SHIFTED, *OTHERS, "vtab/cifar10", *VTAB),
    "retrieval": ("mscoco_captions", "flickr8k", "flickr30k"),
    "imagenet_robustness": SHIFTED,
}
KNOWN = (*COLLECTIONS["vtab+"], "imagenet-o", "vtab/dsprites_label_y_position", *COLLECTIONS["retrieval"])


@dataclasses.dataclass
class BenchmarkSet(LabelledSet):
    """The images of one split of a CLIP_benchmark set.

    The label of an image is its class number. In a multi-label set it is a text with "0" or "1" for each class, and in
    a retrieval set it is empty.

    Attributes:
        kind: the kind of the set, one of ``KINDS``.
    """

    kind: str = CLASSIFICATION

    def stamp(self) -> str:
        """Return a text that changes whenever images or labels of the CLIP_benchmark split change."""
        return repr((self.kind, super().stamp()))

    def _from_sample(self, sample: RawSample) -> LabelledImage:
        """Return the image of a CLIP_benchmark sample with its label or captions."""
        if self.kind == RETRIEVAL:
            label, texts = "", _captions(sample)
        else:
            label = _row(sample) if self.kind == MULTILABEL else _number(sample)
            texts = (label,)
        return LabelledImage(decode_image(sample, self.keys), label, texts)


def _member(sample: RawSample, extension: str) -> bytes:
    """Return the bytes of a CLIP_benchmark sample's file with an extension, such as "cls"."""
    if extension not in sample:
        there = ", ".join(sorted(key for key in sample if not key.startswith("__")))
        raise SampleError(f"sample has no .{extension}, only {there}", "no label")
    found: bytes = sample[extension]
    return found


def _captions(sample: RawSample) -> tuple[str, ...]:
    """Return the captions of a sample of a CLIP_benchmark retrieval set, one from each line of its text."""
    try:
        texts = tuple(_member(sample, "txt").decode().splitlines())
    except UnicodeDecodeError as error:
        raise SampleError(f"caption is not UTF-8: {error}", "broken caption") from error
    if not texts:
        raise SampleError("sample has no captions: its text is empty", "no caption")
    return texts


def _number(sample: RawSample) -> str:
    """Return the class number of a CLIP_benchmark sample as text."""
    text = _member(sample, "cls")
    if not text.strip().isdigit():
        raise SampleError(f"class is no number from 0: {text!r:.40}", "broken label")
    return str(int(text))


def _row(sample: RawSample) -> str:
    """Return the labels of a sample of a multi-label set as a text with "0" or "1" for each class."""
    import numpy as np

    try:
        row = np.load(io.BytesIO(_member(sample, "npy")), allow_pickle=False)
    except Exception as error:  # NumPy reads the header by Python's tokenizer, which has errors of its own
        raise SampleError(f"row of labels cannot be read: {error}", "broken label") from error
    if row.ndim != 1 or not np.isin(row, (0, 1)).all():
        raise SampleError("row of labels is not a row of 0 and 1", "broken label")
    return "".join("1" if is_there else "0" for is_there in row.tolist())


class OfflineSet(NamedTuple):
    """A complete CLIP_benchmark set, which can be evaluated.

    Attributes:
        name: the name of the set in CLIP_benchmark, without "wds/".
        kind: one of ``KINDS``.
        shards: the shards of each split that exists, as :func:`clipfast.data.expand_shards` takes them.
        classnames: the class names by class number; empty for retrieval.
        templates: the prompt templates, with ``{}`` for the name; empty for retrieval.
    """

    name: str
    kind: str
    shards: dict[str, str]
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def images(self, split: str) -> BenchmarkSet:
        """Return the images of a split of a CLIP_benchmark set."""
        return BenchmarkSet(self.shards[split], kind=self.kind)


class Problem(NamedTuple):
    """A CLIP_benchmark set, or a task on it, that cannot be evaluated, with the reason."""

    name: str
    reason: str


class Layout(NamedTuple):
    """The content of a folder in CLIP_benchmark's offline layout.

    Attributes:
        sets: the sets that can be evaluated.
        problems: the incomplete sets, with the reasons.
        missing: the names of the wanted sets that the folder lacks; by default, all known sets are wanted.
    """

    sets: list[OfflineSet]
    problems: list[Problem]
    missing: list[str]


def find_sets(root: Path, wanted: Sequence[str] = (), split: str = "test") -> Layout:
    """Find the sets of CLIP_benchmark's offline layout in a folder. No image is read.

    Args:
        root: the folder.
        wanted: the names of sets, as CLIP_benchmark or their folders spell them, or of its groups of sets; [] for all.
        split: the split that is evaluated, which every set must have.

    Raises:
        ValueError: the folder does not exist, or holds none of the wanted sets, or only incomplete ones.
    """
    if not root.is_dir():
        raise ValueError(f"--root {root}: there is no such folder")
    if (root / split / "nshards.txt").exists():
        raise ValueError(f"--root {root} is one set: give the folder that it is in, and its name by --sets")
    there = {folder.name: folder for folder in sorted(root.glob(f"{PREFIX}*")) if folder.is_dir()}
    asked = [name for one in wanted for name in COLLECTIONS.get(one, (one,))]
    folders = dict.fromkeys(map(_folder, asked)) if wanted else there
    missing = [_name(folder) for folder in folders if folder not in there]
    if not wanted:
        missing = [name for name in dict.fromkeys(KNOWN) if _folder(name) not in there]
    chosen = [there[folder] for folder in folders if folder in there]
    if not chosen:
        what = f"none of the sets {', '.join(missing)}" if wanted else f"no folder {PREFIX}NAME"
        found = f"; it has {', '.join(map(_name, there)) or 'none'}" if wanted else ""
        raise ValueError(f"--root {root} has {what}{found}")
    sets, problems = [], []
    for folder in chosen:
        try:
            sets.append(_read(folder, split))
        except (ValueError, OSError) as error:
            problems.append(Problem(_name(folder.name), str(error)))
    if not sets:
        raise ValueError(f"--root {root}: no set is whole; first: {problems[0].name}: {problems[0].reason}")
    return Layout(sets, problems, missing)


def _folder(name: str) -> str:
    """Return the folder name of a CLIP_benchmark set: "vtab/dtd" -> "wds_vtab-dtd"."""
    short = name.removeprefix("wds/").removeprefix(PREFIX)
    return PREFIX + short.replace("/", "-")


def _name(folder: str) -> str:
    """Return the CLIP_benchmark name of the set in a folder: "wds_vtab-dtd" -> "vtab/dtd".

    A "-" in the name of a folder stands for "/" or for itself. For known sets, their names decide; for other sets, only
    the "-" after "vtab" stands for "/".
    """
    known = {_folder(name): name for name in KNOWN}
    short = folder.removeprefix(PREFIX)
    return known.get(folder, short.replace("vtab-", "vtab/", 1) if short.startswith("vtab-") else short)


def _read(folder: Path, split: str) -> OfflineSet:
    """Read the description of a CLIP_benchmark set from its folder.

    Raises:
        ValueError: a file is missing or wrong.
    """
    name, type_file = _name(folder.name), folder / "dataset_type.txt"
    kind = _text(type_file).strip().lower() if type_file.exists() else CLASSIFICATION
    if kind not in KINDS:
        raise ValueError(f"dataset_type.txt says {kind!r:.40}, and not one of {', '.join(KINDS)}")
    shards = {path.parent.name: _shards(path) for path in sorted(folder.glob("*/nshards.txt"))}
    if split not in shards:
        raise ValueError(f"{split}/nshards.txt is missing")
    if kind == RETRIEVAL:
        return OfflineSet(name, kind, shards)
    classnames = _lines(folder / "classnames.txt")
    templates = _lines(folder / "zeroshot_classification_templates.txt")
    lacking = [template for template in templates if "{c}" not in template]
    if lacking:
        raise ValueError(f"template {lacking[0]!r} has no {{c}} for the class name")
    return OfflineSet(name, kind, shards, classnames, tuple(text.replace("{c}", "{}") for text in templates))


def _shards(path: Path) -> str:
    """Return the shards of a CLIP_benchmark split as a pattern such as ".../test/{0..3}.tar", by its ``nshards.txt``.

    Raises:
        ValueError: ``nshards.txt`` holds no number, or shards are missing.
    """
    folder, text = path.parent, _text(path).strip()
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{folder.name}/nshards.txt holds no number from 1: {text!r:.40}")
    count = int(text)
    numbers = {int(file.stem) for file in folder.glob("*.tar") if file.stem.isdecimal()}
    absent = count - sum(number < count for number in numbers)
    if absent:
        first = next(number for number in range(count) if number not in numbers)
        raise ValueError(f"{folder.name}/{first}.tar is missing: {absent} of the {count} shards that nshards.txt says")
    if max(numbers) >= count:
        raise ValueError(f"{folder.name}/nshards.txt says {count} shards, but {max(numbers)}.tar is there too")
    return f"{folder}/{{0..{count - 1}}}.tar"


def _text(path: Path) -> str:
    """Return the text of a file that describes a CLIP_benchmark set."""
    try:
        return read_regular(path, MAX_SETTINGS).decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error


def _lines(path: Path) -> tuple[str, ...]:
    """Return the lines of a text file of a CLIP_benchmark set, with empty ones, since the name of a class may be empty.

    Raises:
        ValueError: the file does not exist, or is empty.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    lines = tuple(line.strip() for line in _text(path).splitlines())
    if not any(lines):
        raise ValueError(f"{path.name} is empty")
    return lines


def about(one: OfflineSet) -> dict[str, Any]:
    """Return kind, class names and templates of a CLIP_benchmark set, on which its results depend, as plain values."""
    return {"kind": one.kind, "classnames": one.classnames, "templates": one.templates}

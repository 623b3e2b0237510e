"""Opens the sets of ``clipfast eval compositional``: recognises the format of data, and reads images and test cases."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..data import IndexCache, Keys, expand_shards, metadata, open_sources
from ..data.drawn_shapes import STAMP, held_out_scene
from ..data.names import SHAPES_PREFIX, synthetic_pairs
from ..data.samples import RawSample, captions
from ..models.images import SampleError
from .compositional_records import LAYOUTS, WRONG_KEYS, files_of, layout_of, read_cases
from .compositional_scores import Case, order_case
from .features import LabelledFeatures
from .labelled import LabelledImage, LabelledSet, Place, loader

SHAPES = SHAPES_PREFIX.rstrip(":")
DEFAULT_SCENES = 1200
LOOKED_AT = 64  # the format of shards is recognised by the first readable sample among this many


class CaseSet(NamedTuple):
    """The images of a compositional benchmark, and a function that makes its test cases.

    Attributes:
        form: the format.
        images: the images.
        cases: a function that returns the cases, given the metadata of the encoded images.
        divisions: the names of the keys that divide the cases into groups.
    """

    form: str
    images: LabelledSet
    cases: Callable[[LabelledFeatures], list[Case]]
    divisions: tuple[str, ...] = ()


def format_of(images: LabelledSet) -> str:
    """Return the format of a compositional benchmark's data, such as "winoground", "sugarcrepe" or "pairs".

    Raises:
        ValueError: the format cannot be told.
    """
    data = images.data
    if data == SHAPES or data.startswith(SHAPES_PREFIX):
        return SHAPES
    files = files_of(data)
    if files:
        return _format_of_files(files)
    fields = _fields_of(images)
    if set(LAYOUTS["winoground"].captions) <= fields:
        return "winoground"
    if set(WRONG_KEYS) & fields:
        return "pairs"
    raise ValueError(
        f"{data} has no wrong captions: none of {', '.join(WRONG_KEYS)} is in its json or columns, only "
        f"{', '.join(sorted(fields)) or 'nothing'}; --format order makes wrong captions by changing the order of words"
    )


def _fields_of(images: LabelledSet) -> set[str]:
    """Return the metadata keys of the first readable sample of a compositional benchmark's data."""
    source = open_sources(expand_shards(images.data), index=IndexCache(separator=images.separator))[0]
    for number in range(min(len(source), LOOKED_AT)):
        with contextlib.suppress(SampleError):
            return set(metadata(source.read(number, Keys((), ()))))
    return set()


def _format_of_files(files: Sequence[Path]) -> str:
    """Return the format of a compositional benchmark's files; raise ValueError if they have none or several."""
    found = {path: form for path in files if (form := layout_of(path)) is not None}
    if not found:
        wanted = "; ".join(f"{name} has {', '.join(layout.keys)}" for name, layout in LAYOUTS.items())
        raise ValueError(f"{files[0]} has the keys of no known format: {wanted}")
    if len(set(found.values())) > 1:
        named = ", ".join(f"{path.name} ({form})" for path, form in found.items())
        raise ValueError(f"{files[0].parent} holds files of several formats: {named}; name one of them")
    return next(iter(found.values()))


def open_cases(images: LabelledSet, form: str, folder: str | None) -> CaseSet:
    """Open a compositional set.

    Args:
        images: the data source of the set, and how it is read.
        form: the format, as :func:`format_of` returns it.
        folder: the folder of the images, for files of records, which only name their images.

    Raises:
        ValueError: the set cannot be read.
    """
    files = files_of(images.data)
    if folder is not None and not files:
        raise ValueError(f"--images is for files that name images (.json, .jsonl), which {images.data} is not")
    if form == SHAPES:
        count, seed = (DEFAULT_SCENES, 0) if images.data == SHAPES else synthetic_pairs(images.data)
        scenes = _Scenes(images.data, count=count, seed=seed)
        return CaseSet(
            form, scenes, functools.partial(_pair_cases, label="kind", group="relation"), ("kind", "relation")
        )
    if files and form in LAYOUTS:
        chosen = [path for path in files if len(files) == 1 or layout_of(path) == form]
        if form != "sugarcrepe" and len(chosen) > 1:
            raise ValueError(f"{images.data} holds several sets: name one of {', '.join(path.name for path in chosen)}")
        pictures, cases = read_cases(chosen, form, folder)
        return CaseSet(form, pictures, lambda _: cases, LAYOUTS[form].groups)
    if form == "winoground":
        both = _Winoground(images.data, separator=images.separator)
        return CaseSet(form, both, lambda found: _winoground_cases(len(both.places()), found), LAYOUTS[form].groups[:2])
    if form == "order":
        return CaseSet(form, images, _order_cases)
    if form == "pairs":
        with_wrong = _WithWrong(**{field.name: getattr(images, field.name) for field in dataclasses.fields(images)})
        division = images.group_by
        cases_of = functools.partial(_pair_cases, group=division)
        return CaseSet(form, with_wrong, cases_of, (division,) if division else ())
    raise ValueError(f"--format {form} is for files of records (.json, .jsonl), which {images.data} is not")


def _left_out(found: LabelledFeatures) -> list[Case]:
    """Return a compositional case without captions, which counts as left out, for each image that could not be read."""
    return [Case(skipped.name, (number,), ()) for number, skipped in found.left_out.items()]


def _order_cases(found: LabelledFeatures) -> list[Case]:
    """Return a compositional case for each caption, whose wrong captions are other orders of its words."""
    cases = _left_out(found)
    for number, texts in zip(found.numbers, found.captions, strict=True):
        made = (order_case(f"image {number}", number, caption) for caption in texts)
        cases += [case for case in made if case is not None]
    return cases


def _pair_cases(found: LabelledFeatures, group: str | None, label: str | None = None) -> list[Case]:
    """Return a compositional case for each image, with its right caption and its wrong ones.

    ``label`` and ``group`` name the divisions of cases by the labels and by the groups of the images; None leaves them
    out.
    """
    cases, divisions = _left_out(found), {label: found.labels, group: found.groups}
    for row, number in enumerate(found.numbers):
        groups = {name: column[row] for name, column in divisions.items() if name and column[row]}
        cases.append(Case(f"image {number}", (number,), found.captions[row], groups))
    return cases


@dataclasses.dataclass
class _WithWrong(LabelledSet):
    """Images of a compositional set, each with its right caption first and the wrong captions after it."""

    def stamp(self) -> str:
        """Return a text that changes with images or captions, and differs from that of a set without wrong captions."""
        return f"with wrong captions: {super().stamp()}"

    def _from_sample(self, sample: RawSample) -> LabelledImage:
        """Return the image of a sample with its caption, followed by its wrong captions."""
        image = super()._from_sample(sample)
        wrong = captions(sample, keys=Keys(texts=WRONG_KEYS, is_json=True))
        return dataclasses.replace(image, captions=(image.caption, *wrong))


@dataclasses.dataclass
class _Scenes(LabelledSet):
    """Synthetic scenes of drawn shapes as a compositional set; ``count`` scenes are drawn from ``seed``."""

    count: int = 0
    seed: int = 0

    def places(self) -> list[Place]:
        """Return a function for each synthetic scene that draws its image."""
        return [functools.partial(loader, f"scene {number}", _draw, number, self.seed) for number in range(self.count)]

    def stamp(self) -> str:
        """Return a text that changes when the synthetic scenes change."""
        return f"{STAMP}, {self.count} test scenes, seed {self.seed}"


def _draw(number: int, seed: int) -> LabelledImage:
    """Draw a synthetic scene; return its image with the right and the wrong caption."""
    scene = held_out_scene(number, seed)
    return LabelledImage(scene.picture(), scene.kind, (scene.caption, scene.wrong), scene.relation)


@dataclasses.dataclass
class _Winoground(LabelledSet):
    """Winoground's table as images: the first image of every row, and after these the second image of every row."""

    def halves(self) -> list[LabelledSet]:
        """Return Winoground's first images with their captions, and then its second ones, as two sets."""
        layout = LAYOUTS["winoground"]
        return [
            LabelledSet(self.data, "tag", "collapsed_tag", Keys((image,), (caption,), is_json=True), self.separator)
            for image, caption in zip(layout.images, layout.captions, strict=True)
        ]

    def places(self) -> list[Place]:
        """Return the functions that read Winoground's images."""
        return [place for half in self.halves() for place in half.places()]

    def stamp(self) -> str:
        """Return a text that changes when Winoground's images change."""
        return repr([half.stamp() for half in self.halves()])


def _winoground_cases(count: int, found: LabelledFeatures) -> list[Case]:
    """Return Winoground's cases, of two images and two captions each."""
    rows = {number: row for row, number in enumerate(found.numbers)}
    cases = []
    for first in range(count // 2):
        case = Case(f"row {first}", (first, first + count // 2), ())
        if all(image in rows for image in case.images):
            texts = tuple(found.captions[rows[image]][0] for image in case.images)
            groups = {"collapsed_tag": found.labels[rows[first]], "tag": found.groups[rows[first]]}
            case = case._replace(captions=texts, groups=groups)
        cases.append(case)
    return cases

"""Synthetic image-text pairs, which need no files: pictures of one coloured shape, with captions that describe them.

The content of a pair is determined by its number. ``synthetic:65536`` names 65536 pairs, and ``synthetic:65536@1``
names 65536 other ones. They can be read one by one like samples of any other source. If a run trains on synthetic pairs
alone, the device draws the pictures of a whole batch at once, at the image size of the model
(:mod:`clipfast.data.drawing`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .drawing import COLUMNS, SHAPES, SIDE, WIDTH, Drawings
from .loader import Batch, PairBatches
from .names import SYNTHETIC_PREFIX
from .order import Ints, Words, random_words_at
from .source import DrawnSource

if TYPE_CHECKING:
    from PIL import Image

READ_SIZE = 224  # side in pixels of pictures that are read one by one
STAMP = "0/1"  # takes the place of a file's size and time of change; the second number changes when pairs do
COLOURS = {
    "red": (215, 40, 40), "orange": (245, 135, 25), "yellow": (240, 220, 45), "green": (40, 160, 70),
    "blue": (40, 85, 215), "purple": (125, 50, 170), "pink": (245, 160, 195), "brown": (115, 70, 40),
    "black": (20, 20, 20), "white": (238, 238, 238), "grey": (130, 130, 130),
}  # fmt: skip
SHADE = 10  # how far each channel of a colour may differ from the colour of its name
SIZES = {"small": 120, "medium": 190, "large": 270}  # radii; this and the lengths below are 1024ths of the image's side
SPREAD = 12  # how far a radius may differ from the radius of its name
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
STEP, SHIFT = 195, 25  # distance between two named places, and how far a shape's centre may be from its place
NO_FRAME = "none"
WORDS = {
    "shape": tuple(SHAPES), "colour": tuple(COLOURS), "background": tuple(COLOURS), "frame": tuple(COLOURS),
    "size": tuple(SIZES), "place": PLACES,
}  # fmt: skip
CHOICES = 18  # number of random 64-bit words for each pair


@dataclasses.dataclass(frozen=True)
class Scenes:
    """The content of synthetic pairs: for each, the indices of its shape, colours, size and place in ``WORDS``.

    ``frame`` is the index of the background's colour for pictures without a frame.
    """

    shape: Ints
    colour: Ints
    background: Ints
    frame: Ints
    size: Ints
    place: Ints
    words: Words  # random 64-bit words for details that captions do not mention


class SyntheticSource(DrawnSource):
    """A source of synthetic pairs: one shard without a file, in which the number determines the pair."""

    prefix, stamp = SYNTHETIC_PREFIX, STAMP

    def scenes(self, numbers: Sequence[int] | Ints) -> Scenes:
        """Return the content of the synthetic pairs with these numbers."""
        places = np.asarray(numbers, np.int64)[:, None] * CHOICES + np.arange(CHOICES)
        words = random_words_at(places.astype(np.uint64), self.seed)
        drawn = functools.partial(_drawn, words)
        colour = drawn(1, len(COLOURS))
        background = (colour + 1 + drawn(2, len(COLOURS) - 1)) % len(COLOURS)
        other = (background + 1 + drawn(3, len(COLOURS) - 1)) % len(COLOURS)
        frame = np.where(drawn(4, 2) == 0, background, other)
        size, place = drawn(5, len(SIZES)), drawn(6, len(PLACES))
        return Scenes(drawn(0, len(SHAPES)), colour, background, frame, size, place, words[:, 7:])

    def pair(self, number: int) -> tuple[dict[str, str], Callable[[], Image.Image]]:
        """Return the words of a synthetic pair, and a function that draws its picture, 224 pixels a side."""
        from PIL import Image

        scenes = self.scenes([number])

        def draw() -> Image.Image:
            """Draw the picture of a synthetic pair."""
            pixels = drawings(scenes, READ_SIZE).on(torch.device("cpu"))[0]
            return Image.fromarray(pixels.permute(1, 2, 0).numpy())

        return {key: value[0] for key, value in _named(scenes).items()} | {"label": captions(scenes)[0]}, draw


def _drawn(words: Words, column: int, count: int) -> Ints:
    """Map a column of random words to integers below ``count``, which choose the details of synthetic pairs."""
    return (words[:, column] % np.uint64(count)).astype(np.int64)


def _named(scenes: Scenes) -> dict[str, list[str]]:
    """Return the words of the captions for the content of each synthetic pair."""
    named = {}
    for key, table in WORDS.items():
        named[key] = [table[number] for number in getattr(scenes, key).tolist()]
    framed = (scenes.frame != scenes.background).tolist()
    named["frame"] = [
        colour if is_framed else NO_FRAME for colour, is_framed in zip(named["frame"], framed, strict=True)
    ]
    return named


def captions(scenes: Scenes) -> list[str]:
    """Return captions of synthetic pairs: "a small red triangle on a blue background, top left, in a white frame"."""
    named = _named(scenes)
    columns = (named[key] for key in ("size", "colour", "shape", "background", "place", "frame"))
    return [
        f"a {size} {colour} {shape} on {_with_article(background)} background, {place}"
        + ("" if frame == NO_FRAME else f", in {_with_article(frame)} frame")
        for size, colour, shape, background, place, frame in zip(*columns, strict=True)
    ]


def _with_article(word: str) -> str:
    """Return a word of a synthetic caption with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def drawings(scenes: Scenes, image_size: int) -> Drawings:
    """Return the pictures of synthetic pairs as drawings for the device, at this size."""
    drawn = functools.partial(_drawn, scenes.words)
    numbers = np.empty((len(scenes.words), WIDTH), np.int32)
    numbers[:, COLUMNS.shape] = scenes.shape
    for column, axis, word in ((COLUMNS.x, scenes.place % 3, 0), (COLUMNS.y, scenes.place // 3, 1)):
        numbers[:, column] = SIDE // 2 + STEP * (axis - 1) + drawn(word, 2 * SHIFT + 1) - SHIFT
    numbers[:, COLUMNS.radius] = np.array(list(SIZES.values()))[scenes.size] + drawn(2, 2 * SPREAD + 1) - SPREAD
    numbers[:, COLUMNS.degrees] = drawn(3, 360)
    table = np.array(list(COLOURS.values()))
    shades = np.stack([drawn(word, 2 * SHADE + 1) - SHADE for word in range(4, 10)], axis=1)
    numbers[:, COLUMNS.colour] = table[scenes.colour] + shades[:, :3]
    numbers[:, COLUMNS.background] = table[scenes.background] + shades[:, 3:]
    is_framed = (scenes.frame != scenes.background)[:, None]
    numbers[:, COLUMNS.frame] = np.where(is_framed, table[scenes.frame], numbers[:, COLUMNS.background])
    return Drawings(torch.from_numpy(numbers), image_size)


@dataclasses.dataclass
class SyntheticBatches(PairBatches):
    """Training batches of synthetic pairs alone, whose images the device draws.

    Neither ``transform`` nor ``keys`` is used.

    Attributes:
        image_size: side of the images in pixels.
    """

    image_size: int = READ_SIZE

    def __getitem__(self, number: int) -> Batch:
        """Return batch ``number`` of the run, counted from 0; its images are drawn later, on the device."""
        started = time.perf_counter()
        pairs = self.samples(number)
        numbers = torch.empty(len(pairs), WIDTH, dtype=torch.int32)
        texts = np.empty(len(pairs), object)
        for place, source in enumerate(self.sources):
            assert isinstance(source, SyntheticSource)
            mine = np.flatnonzero(pairs.source == place)
            scenes = source.scenes(pairs.sample[mine])
            numbers[torch.from_numpy(mine)] = drawings(scenes, self.image_size).numbers
            texts[mine] = captions(scenes)
        described = time.perf_counter()
        ids = self.token_ids(texts.tolist())
        seconds = {"describe": described - started, "tokenize": time.perf_counter() - described}
        return Batch(Drawings(numbers, self.image_size), ids, [], seconds)

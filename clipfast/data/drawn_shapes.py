"""Scenes of coloured shapes with captions about composition (colour, number, position), for training and for tests.

``shapes:20000`` names 20000 scenes for training, and ``shapes:20000@1`` names 20000 other ones. The content of a scene
is determined by its number. A test scene (:func:`held_out_scene`) has a second caption that is wrong in one respect,
which is called its kind.

Some combinations of colours and shapes are kept for tests: a third of the combinations of one colour and one shape, and
a fifth of the combinations of two colours and two shapes. If tests draw a red circle beside a blue square, training
draws neither this scene nor a blue circle beside a red square. Therefore a trained model knows neither of the two
captions of a test better than the other. Every colour and every shape occurs in training and in tests.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .names import SHAPES_PREFIX
from .source import DrawnSource

if TYPE_CHECKING:
    from PIL import Image

SIDE = 64  # side of the pictures in pixels
FINER = 4  # pictures are drawn at this many times their size, and averaged
STAMP = "0/1"  # takes the place of a file's size and time of change; the second number changes when scenes do
COLOURS = {
    "red": (215, 35, 35), "yellow": (245, 205, 30), "green": (30, 150, 65), "blue": (40, 85, 220),
    "purple": (150, 55, 185), "black": (25, 25, 25),
}  # fmt: skip
SHADE = 12  # how far each channel of a shape may differ from the named colour
LIGHTEST, DARKEST = 250, 222  # the range of the grey levels of backgrounds
TURN = 12  # shapes are turned by up to this many degrees to either side
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# The kinds of test scenes; the number of a scene modulo 6 is the index of its kind.
KINDS = ("colour", "shape", "binding", "relation", "count", "order")
TRAINED = {"one": 1, "two": 4, "relation": 4, "count": 2}  # kinds of training scenes, and how often each is drawn


def _regular(corners: int, inner: float = 1.0, first: float = -90.0) -> tuple[tuple[float, float], ...]:
    """Return the corners of a drawn polygon around the origin, every second one at the distance ``inner``."""
    angles = (math.radians(first + 360 * number / corners) for number in range(corners))
    return tuple(
        (math.cos(angle) * (inner if number % 2 else 1), math.sin(angle) * (inner if number % 2 else 1))
        for number, angle in enumerate(angles)
    )


def _scaled(points: Sequence[tuple[float, float]], factor: float) -> tuple[tuple[float, float], ...]:
    """Return the corners of a drawn shape, scaled about its centre."""
    return tuple((factor * x, factor * y) for x, y in points)


# The corners of a cross, in units of which its arms are two wide and six long.
_CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]
# Corners of a shape around its centre, in radii; none for round shapes.
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": _scaled(_regular(4, first=45), 1.2),
    "triangle": _scaled(_regular(3), 1.2),
    "star": _scaled(_regular(10, 0.42), 1.2),
    "cross": _scaled(_CROSS, 0.34),
    "ring": (),
}
HOLE = 0.55  # radius of the hole of a ring, in radii of the ring

Pair = tuple[str, str]
# These are the combinations of colours and shapes in scenes for training, and in scenes for tests.
ONES: tuple[list[Pair], list[Pair]] = ([], [])
TWOS: tuple[list[tuple[Pair, Pair]], list[tuple[Pair, Pair]]] = ([], [])
for (_c, _colour), (_s, _shape) in itertools.product(enumerate(COLOURS), enumerate(SHAPES)):
    ONES[(_c + _s) % 3 == 0].append((_colour, _shape))
for (_c, _colours), (_s, _shapes) in itertools.product(
    enumerate(itertools.combinations(COLOURS, 2)), enumerate(itertools.combinations(SHAPES, 2))
):
    TWOS[(_c + _s) % 5 == 0].append((_colours, _shapes))


class Thing(NamedTuple):
    """A coloured shape in a drawn scene; lengths are in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    degrees: float
    rgb: tuple[int, int, int]


class Scene(NamedTuple):
    """The content of a drawn picture, with its captions.

    Attributes:
        kind: the kind of statement that the captions make, one of ``KINDS`` or ``TRAINED``.
        things: the shapes.
        grey: grey level of the background.
        caption: the right caption.
        wrong: a caption that is wrong in one respect; "" in training.
        relation: the position of the first shape of the caption, such as "left of"; "" if the caption names none.
    """

    kind: str
    things: tuple[Thing, ...]
    grey: int
    caption: str
    wrong: str = ""
    relation: str = ""

    def picture(self) -> Image.Image:
        """Draw the picture of a synthetic pair's scene, 64 pixels a side."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (FINER * SIDE, FINER * SIDE), (self.grey,) * 3)
        draw = ImageDraw.Draw(image)
        for thing in self.things:
            x, y, radius = FINER * thing.x, FINER * thing.y, FINER * thing.radius
            cos, sin = math.cos(math.radians(thing.degrees)), math.sin(math.radians(thing.degrees))
            corners = SHAPES[thing.shape]
            if corners:
                draw.polygon(
                    [(x + radius * (cos * a - sin * b), y + radius * (sin * a + cos * b)) for a, b in corners],
                    thing.rgb,
                )
                continue
            draw.circle((x, y), radius, thing.rgb)
            if thing.shape == "ring":
                draw.circle((x, y), HOLE * radius, (self.grey,) * 3)
        return image.reduce(FINER)


def training_scene(number: int, seed: int = 0) -> Scene:
    """Return a scene of coloured shapes for training, which ``number`` and ``seed`` determine."""
    rng = random.Random(f"shapes {seed} {number}")
    (kind,) = rng.choices(list(TRAINED), list(TRAINED.values()))
    return _DRAWN_BY[kind](rng, kind, is_test=False)


def held_out_scene(number: int, seed: int = 0) -> Scene:
    """Return a scene of coloured shapes for tests, with a right and a wrong caption; the number determines its kind.

    Except for the kind "order", each form of a caption is the right one as often as the wrong one. Therefore a model
    that does not see the picture is right about half of the time.
    """
    kind = KINDS[number % len(KINDS)]
    rng = random.Random(f"test of shapes {seed} {number}")
    if kind != "order":
        return _DRAWN_BY[kind](rng, kind, is_test=True)
    scene = rng.choice((_two, _related))(rng, kind, is_test=True)
    return scene._replace(wrong=_shuffled(rng, scene.caption), relation="")


def _one(rng: random.Random, kind: str, *, is_test: bool) -> Scene:
    """Draw a synthetic scene of one shape."""
    colour, shape = rng.choice(ONES[is_test])
    radius = rng.uniform(9, 17)
    x, y = (rng.uniform(radius + 6, SIDE - radius - 6) for _ in range(2))
    thing = _thing(rng, colour, shape, x, y, radius)
    # The wrong caption differs only in colour or shape. Its combination too is kept for tests: training never draws it.
    near = {
        "colour": [(other, shape) for other in COLOURS if (other, shape) in ONES[is_test] and other != colour],
        "shape": [(colour, other) for other in SHAPES if (colour, other) in ONES[is_test] and other != shape],
    }
    wrong = "a {} {}".format(*rng.choice(near[kind])) if is_test else ""
    return Scene(kind, (thing,), _grey(rng), f"a {colour} {shape}", wrong)


def _two(rng: random.Random, kind: str, *, is_test: bool) -> Scene:
    """Draw a synthetic scene of two shapes at random places."""
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(30, 36)
    first, second = _couple(rng, math.cos(angle) * distance, math.sin(angle) * distance, is_test=is_test)
    caption = f"a {first.colour} {first.shape} and a {second.colour} {second.shape}"
    wrong = f"a {second.colour} {first.shape} and a {first.colour} {second.shape}"
    return Scene(kind, (first, second), _grey(rng), caption, wrong if is_test else "")


def _related(rng: random.Random, kind: str, *, is_test: bool) -> Scene:
    """Draw a synthetic scene of two shapes, of which one is beside, above or below the other."""
    relation, (right, down) = rng.choice(list(RELATIONS.items()))
    along, across = rng.uniform(30, 36), rng.uniform(-6, 6)
    # Seen from the second shape of the caption, the first one lies in the direction of the relation.
    first, second = _couple(rng, -along * right + across * down, -along * down + across * right, is_test=is_test)
    caption = f"a {first.shape} {relation} a {second.shape}"
    wrong = f"a {second.shape} {relation} a {first.shape}"
    return Scene(kind, (first, second), _grey(rng), caption, wrong if is_test else "", relation)


def _counted(rng: random.Random, kind: str, *, is_test: bool) -> Scene:
    """Draw a synthetic scene of several equal shapes, each in one of nine cells."""
    colour, shape = rng.choice(ONES[is_test])
    fewer = rng.choice([number for number in COUNTS if number + 1 in COUNTS])
    count, other = rng.sample((fewer, fewer + 1), 2)  # each number is right as often as it is wrong
    radius, cell = rng.uniform(5.5, 7.5), SIDE / 3
    things = []
    for place in rng.sample(range(9), count):
        x, y = (cell * (axis + 0.5) + rng.uniform(-1, 1) for axis in divmod(place, 3))
        things.append(_thing(rng, colour, shape, x, y, radius))
    right, wrong = (f"{COUNTS[number]} {_plural(shape)}" for number in (count, other))
    return Scene(kind, tuple(things), _grey(rng), right, wrong if is_test else "")


_DRAWN_BY = {
    "one": _one, "colour": _one, "shape": _one, "two": _two, "binding": _two, "relation": _related, "count": _counted,
}  # fmt: skip


def _couple(rng: random.Random, x: float, y: float, *, is_test: bool) -> tuple[Thing, Thing]:
    """Return two unequal shapes of a synthetic scene; the second is (x, y) away from the first."""
    colours, shapes = (rng.sample(both, 2) for both in rng.choice(TWOS[is_test]))
    radii = [rng.uniform(9, 12) for _ in range(2)]
    first = []
    for offset in (x, y):
        # Both shapes keep a distance from the edges of the picture.
        low, high = max(14, 14 - offset), min(SIDE - 14, SIDE - 14 - offset)
        first.append(rng.uniform(low, high))
    places = ((first[0], first[1]), (first[0] + x, first[1] + y))
    one, other = (
        _thing(rng, colour, shape, *place, radius)
        for colour, shape, place, radius in zip(colours, shapes, places, radii, strict=True)
    )
    return one, other


def _thing(rng: random.Random, colour: str, shape: str, x: float, y: float, radius: float) -> Thing:
    """Return a shape of a synthetic scene with a random shade and a random rotation."""
    red, green, blue = (min(255, max(0, value + rng.randint(-SHADE, SHADE))) for value in COLOURS[colour])
    return Thing(colour, shape, x, y, radius, rng.uniform(-TURN, TURN), (red, green, blue))


def _grey(rng: random.Random) -> int:
    """Draw the grey level of a synthetic scene's background."""
    return rng.randint(DARKEST, LIGHTEST)


def _plural(shape: str) -> str:
    """Return the plural of a shape's name for a synthetic caption."""
    return shape + ("es" if shape.endswith("s") else "s")


def _shuffled(rng: random.Random, caption: str) -> str:
    """Return the words of a synthetic caption in an order that does not make a caption."""

    def classes(words: Sequence[str]) -> list[str]:
        """Return the words of a synthetic caption with "colour" for each colour, and "shape" for each shape."""
        return ["colour" if word in COLOURS else "shape" if word in SHAPES else word for word in words]

    words = caption.split()
    shuffled = words
    while classes(shuffled) == classes(words):
        shuffled = rng.sample(words, len(words))
    return " ".join(shuffled)


class ShapesSource(DrawnSource):
    """A source of drawn scenes for training: one shard without a file, in which the number determines the scene."""

    prefix, stamp = SHAPES_PREFIX, STAMP

    def pair(self, number: int) -> tuple[dict[str, str], Callable[[], Image.Image]]:
        """Return caption and kind of a scene, and a function that draws its picture."""
        scene = training_scene(number, self.seed)
        return {"label": scene.caption, "kind": scene.kind}, scene.picture

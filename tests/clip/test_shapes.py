"""Generated scenes of shapes: captions that are true and wrong ones that are not, and nothing of a test in training."""

import collections
import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image

from clipfast.data import Keys, caption, expand_shards, identities, metadata, open_sources
from clipfast.data.samples import decode_image
from clipfast.data.shapes import (
    COLOURS,
    COUNTS,
    DARKEST,
    KINDS,
    RELATIONS,
    SHADE,
    SHAPES,
    SIDE,
    TRAINED,
    ShapesSource,
    Thing,
    held_out_scene,
    training_scene,
)
from clipfast.evaluation.labelled import LabelledSet
from clipfast.training.loop import train

from .test_training import config

TRAINING = [training_scene(number, seed) for seed in (0, 7) for number in range(3000)]
TESTS = [held_out_scene(number, seed) for seed in (0, 7) for number in range(3000)]


def combination(scene):
    return frozenset(thing.colour for thing in scene.things), frozenset(thing.shape for thing in scene.things)


def is_true(text, scene):
    """Whether a caption says what is in a scene, and nothing else; None if it is no caption."""
    words = text.replace("left of", "left").replace("right of", "right").split()
    things = scene.things
    match words:
        case ["a", colour, shape] if colour in COLOURS and shape in SHAPES:
            return [(thing.colour, thing.shape) for thing in things] == [(colour, shape)]
        case ["a", c, s, "and", "a", c2, s2] if {c, c2} <= set(COLOURS) and {s, s2} <= set(SHAPES):
            return {(c, s), (c2, s2)} == {(thing.colour, thing.shape) for thing in things}
        case ["a", first, relation, "a", second] if {first, second} <= set(SHAPES):
            by_shape = {thing.shape: thing for thing in things}
            if set(by_shape) != {first, second}:
                return False
            one, other = by_shape[first], by_shape[second]
            right, down = one.x - other.x, one.y - other.y
            far = {"left": -right, "right": right, "above": -down, "below": down}[relation]
            return far > 2 * (abs(right) + abs(down) - far) and far > one.radius + other.radius
        case [number, shapes] if number in COUNTS.values():
            (shape,) = {thing.shape for thing in things}
            return COUNTS.get(len(things)) == number and shapes in (shape + "s", shape + "es")
    return None


def test_captions_are_true_and_wrong_ones_are_not():
    assert collections.Counter(scene.kind for scene in TESTS) == dict.fromkeys(KINDS, 1000)
    assert {scene.kind for scene in TRAINING} == set(TRAINED)
    for scene in (*TRAINING, *TESTS):
        assert is_true(scene.caption, scene), scene
    for scene in TESTS:
        expected = None if scene.kind == "order" else False
        assert is_true(scene.wrong, scene) is expected, scene
        if scene.kind in ("binding", "relation", "order"):
            assert sorted(scene.wrong.split()) == sorted(scene.caption.split())
        else:
            changed = [a != b for a, b in zip(scene.caption.split(), scene.wrong.split(), strict=True)]
            assert sum(changed) == 1
    assert not any(scene.wrong for scene in TRAINING)
    assert {scene.relation for scene in TESTS if scene.kind == "relation"} == set(RELATIONS)


def test_training_draws_no_combination_of_a_test():
    trained, tested = ({combination(scene) for scene in scenes} for scenes in (TRAINING, TESTS))
    assert not trained & tested
    assert (len(trained), len(tested)) == (24 + 180, 12 + 45)
    for some in (trained, tested):  # neither lacks a colour or a shape
        assert frozenset().union(*(colours for colours, _ in some)) == set(COLOURS)
        assert frozenset().union(*(shapes for _, shapes in some)) == set(SHAPES)


def test_which_caption_is_right_is_even():
    """So that it cannot be told from the captions alone."""
    seen = collections.Counter((scene.caption, scene.wrong) for scene in TESTS if scene.kind != "order")
    for (right, wrong), count in seen.items():
        other = seen[wrong, right]
        assert abs(count - other) < 5 * math.sqrt(count + other), (right, wrong)
    by_kind = collections.defaultdict(list)  # of two captions, how often the one that sorts first is right
    for scene in TESTS:
        by_kind[scene.kind].append(scene.caption < scene.wrong)
    for kind in KINDS[:-1]:
        assert abs(sum(by_kind[kind]) - 500) < 5 * math.sqrt(250), kind


def test_things_do_not_touch_and_are_whole():
    for scene in (*TRAINING, *TESTS):
        for one, other in itertools.combinations(scene.things, 2):
            # 1.2 radii reach to the corners of the largest shapes
            assert math.hypot(one.x - other.x, one.y - other.y) > 1.2 * (one.radius + other.radius) + 1, scene
        for thing in scene.things:
            reach = 1.2 * thing.radius
            assert min(thing.x, thing.y) > reach - 1, scene
            assert max(thing.x, thing.y) < SIDE - reach + 1, scene


def test_pictures_show_what_their_scenes_say():
    """The colours of all pixels are those of the things or of the background, and each thing is where it is said."""
    for scene in TESTS[:24]:
        pixels = np.asarray(scene.picture()).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        for thing in scene.things:
            near = np.abs(pixels - np.array(COLOURS[thing.colour])).max(2) <= SHADE
            y, x = np.nonzero(near)
            inside = np.hypot(x + 0.5 - thing.x, y + 0.5 - thing.y) < 1.25 * thing.radius
            assert inside.sum() > 0.6 * thing.radius**2, thing
        background = (pixels.min(2) >= DARKEST - 1) & (np.ptp(pixels, axis=2) <= 1)
        assert background.mean() > 0.5


def test_colours_and_shapes_can_be_told_apart():
    for one, other in itertools.combinations(COLOURS.values(), 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 4 * SHADE
    pictures = []
    for shape in SHAPES:
        scene = TESTS[0]._replace(things=(Thing("red", shape, 32, 32, 12, 0, (200, 30, 30)),))
        pictures.append(np.asarray(scene.picture().resize((32, 32), Image.Resampling.BOX)).astype(int))
    for one, other in itertools.combinations(pictures, 2):
        assert (np.abs(one - other).max(2) > 60).sum() > 20


def test_pairs_follow_from_their_numbers():
    (source,) = open_sources(expand_shards("shapes:5000@3"))
    assert (len(source), source.seed, source.shards[0].name) == (5000, 3, "shapes:5000@3")
    for number in (0, 4999):
        sample, scene = source.read(number), training_scene(number, 3)
        assert decode_image(sample).tobytes() == scene.picture().tobytes()
        assert caption(sample) == metadata(sample)["label"] == scene.caption
        assert metadata(sample)["kind"] == scene.kind
        assert "png" not in source.read(number, Keys(images=("jpg",)))
    assert ShapesSource(10, 3).read(9)["png"] == source.read(9)["png"] != ShapesSource(10).read(9)["png"]
    texts = [training_scene(number).caption for number in range(300)]
    numbers = identities(ShapesSource(300), "caption").tolist()
    assert len(set(numbers)) == len(set(texts)) < 300
    images = list(LabelledSet("shapes:8", group_by="kind"))
    assert [image.group for image in images] == [training_scene(number).kind for number in range(8)]


@pytest.mark.parametrize(
    ("name", "message"), [("shapes:", "neither shapes:N nor shapes:N@SEED"), ("shapes:0", "from 1 to")]
)
def test_wrong_names(name, message):
    with pytest.raises(ValueError, match=message):
        expand_shards(name)


@pytest.mark.long
def test_training_on_shapes(tmp_path):
    options = {"unique_by": "caption", "batch_size": 16, "epochs": 1, "workers": 0}
    folder, _ = train(config("shapes:256", tmp_path, **options))
    results = json.loads((folder.path / "results.json").read_text())
    assert (results["skipped_pairs"], results["steps"]) == (0, 2)

"""Synthetic pairs: pictures with the same bits on every device, true captions, and wrong captions that are false."""

import collections
import functools
import itertools
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch

from clipfast.data import (
    Keys,
    Mix,
    Order,
    SyntheticBatches,
    SyntheticSource,
    Unique,
    caption,
    drawing,
    expand_shards,
    identities,
    metadata,
    open_sources,
)  # fmt: skip
from clipfast.data.drawing import COLUMNS, Drawings
from clipfast.data.drawn_shapes import (
    COLOURS,
    COUNTS,
    DARKEST,
    KINDS,
    RELATIONS,
    SHADE,
    SHAPES,
    SIDE,
    TRAINED,
    held_out_scene,
    training_scene,
)  # fmt: skip
from clipfast.data.names import is_local
from clipfast.data.samples import decode_image
from clipfast.data.synthetic import COLOURS as PAINTS
from clipfast.data.synthetic import PLACES, captions, drawings
from clipfast.data.synthetic import SIZES as RADII
from clipfast.doctor.dataset import dataset
from clipfast.doctor.machine import OK
from clipfast.evaluate.labelled import LabelledSet
from clipfast.models.tokenizer import Tokenizer
from clipfast.train.data import TrainingData
from clipfast.train.loop import train

from ..small_runs import output_of
from ..train.test_training import config
from .tables import texts_of

CPU = torch.device("cpu")


@functools.cache
def scenes(make):
    """Return 6,000 scenes of synthetic pairs, made by ``make`` for training or for tests."""
    return [make(number, seed) for seed in (0, 7) for number in range(3000)]


def pictures(numbers, size, seed=0):
    """Return the pictures of synthetic pairs with these numbers."""
    return drawings(SyntheticSource(1 << 20, seed).scenes(numbers), size).on(CPU)


def test_names(shards):
    for name, count, seed in (("synthetic:1", 1, 0), ("synthetic:65536@7", 65536, 7), (f"shapes:{2**40}", 2**40, 0)):
        (source,) = open_sources(expand_shards(name))
        assert (source.sizes, len(source), source.seed, source.shards[0].name) == ([count], count, seed, name)
        assert decode_image(source.read(count - 1)).size == ((64, 64) if "shapes" in name else (224, 224))
    sources = open_sources(expand_shards(f"synthetic:8::{shards}::synthetic:{{5..6}}@1"))
    assert [source.sizes for source in sources[1:]] == [[8], [5], [6]]
    assert is_local("synthetic:8::synthetic:9@1::a.tar")
    assert not is_local("synthetic:pipe:touch owned")


@pytest.mark.parametrize("prefix", ["synthetic", "shapes"])
def test_wrong_names(prefix):
    for rest in ("", "x", "-1", "5@", "5@a", "٣", "pipe:touch owned"):
        with pytest.raises(ValueError, match=f"is neither {prefix}:N nor {prefix}:N@SEED"):
            expand_shards(f"{prefix}:{rest}")
    for count in (0, 2**40 + 1):
        with pytest.raises(ValueError, match=f"from 1 to 1099511627776 synthetic pairs, got {count}"):
            expand_shards(f"{prefix}:{count}")


@pytest.mark.parametrize("size", [1, 7, 32])
def test_a_picture_depends_on_its_number_alone(size, two_threads):
    together = pictures(range(300, 320), size)
    assert (together.shape, together.dtype) == ((20, 3, size, size), torch.uint8)
    backwards = pictures(range(319, 299, -1), size).flip(0)
    torch.set_num_threads(1)
    with mock.patch.object(drawing, "PIXELS_ON_CPU", 1):
        alone = torch.cat([pictures([number], size) for number in range(300, 320)])
    assert torch.equal(together, backwards)
    assert torch.equal(together, alone)
    assert not torch.equal(together, pictures(range(300, 320), size, seed=1))
    images = drawings(SyntheticSource(9).scenes(range(9)), size).on(torch.device("meta"))
    # The pictures are drawn on the given device.
    assert (images.device.type, images.shape) == ("meta", (9, 3, size, size))


def test_reading_gives_the_pixels_of_the_batch():
    source, numbers = SyntheticSource(1000, 3), range(990, 1000)
    texts = captions(source.scenes(numbers))
    for number, image, text in zip(numbers, pictures(numbers, 224, seed=3), texts, strict=True):
        raw = source.read(number)
        assert np.array_equal(np.asarray(decode_image(raw)), image.permute(1, 2, 0).numpy())
        assert caption(raw) == metadata(raw)["label"] == text
    assert "png" not in source.read(0, Keys(images=("jpg",)))
    # a synthetic pair does not depend on the number of pairs in its set
    assert SyntheticSource(10, 3).read(9) | {"__url__": ""} == source.read(9) | {"__url__": ""}


AREAS = {
    "circle": math.pi * 0.9**2, "ring": math.pi * (1 - 0.55**2), "half circle": math.pi / 2,
    "triangle": 3 * math.sqrt(3) * 0.5**2, "square": 1.5**2, "bar": 1.9 * 0.6, "cross": 2 * 1.9 * 0.6 - 0.6**2,
    "star": 10 * math.sin(math.radians(36)) * math.sin(math.radians(18)) / math.sin(math.radians(126)) / 2,
}  # fmt: skip


@pytest.mark.parametrize("shape", drawing.SHAPES)
def test_shapes_have_their_areas_and_turn(shape):
    """Drawn shapes have their areas (in units of the radius squared), and an eighth turn changes all but round ones."""
    numbers = torch.zeros(3, drawing.WIDTH, dtype=torch.int32)
    numbers[:, COLUMNS.shape] = list(drawing.SHAPES).index(shape)
    numbers[:, COLUMNS.degrees] = torch.tensor([0, 45, 0])
    numbers[:, COLUMNS.x], numbers[:, COLUMNS.y], numbers[:, COLUMNS.radius] = 480, 560, torch.tensor([300, 300, 150])
    numbers[:, COLUMNS.colour] = 255
    found = Drawings(numbers, 128).on(CPU)[:, 0].double() / 255
    areas = found.sum((1, 2)) / (numbers[:, COLUMNS.radius] / 8) ** 2
    torch.testing.assert_close(areas, torch.full_like(areas, AREAS[shape]), rtol=0.02, atol=0)
    assert ((found[0] - found[1]).abs().max() > 0.5) == (shape not in ("circle", "ring"))


def test_captions_say_what_can_be_seen():
    source, size = SyntheticSource(2000), 128
    for number, image in enumerate(pictures(range(200), size)):
        says, pixels = metadata(source.read(number, Keys(images=()))), image.permute(1, 2, 0).numpy().astype(int)

        def near(name, pixels=pixels):
            """Return which pixels of a synthetic picture have the colour of this name."""
            return np.abs(pixels - np.array(PAINTS[name])).max(-1) <= 15

        inner = np.zeros((size, size), bool)
        inner[8:-8, 8:-8] = True
        assert near(says["background"])[inner].mean() > 0.5
        frame = says["background"] if says["frame"] == "none" else says["frame"]
        assert near(frame)[[0, 0, -1, -1], [0, -1, 0, -1]].all()
        rows, columns = np.nonzero(near(says["colour"]) & inner)
        # Half circles, triangles and stars are not centred in their bounding boxes.
        if says["shape"] not in ("half circle", "triangle", "star"):
            middle = [(some.max() + some.min() + 1) / 2 / size for some in (rows, columns)]
            row, column = (int((x - 0.5) / 0.19 + 1.5) for x in middle)
            assert PLACES[3 * row + column] == says["place"]
        assert max(np.ptp(rows), np.ptp(columns)) / size < {"small": 0.27, "medium": 0.41, "large": 0.56}[says["size"]]
        assert all(says[key] in says["label"] for key in ("size", "colour", "shape", "background", "place"))
        assert ("frame" in says["label"]) == (says["frame"] != "none")


def batches(sources, batch_size=16, **options):
    """Return training batches of synthetic pairs."""
    mix = Mix([Order(source.sizes, 0, source=n) for n, source in enumerate(sources)], [1.0] * len(sources), 0)
    return SyntheticBatches(sources, mix, decode_image, Tokenizer(32), batch_size, image_size=24, **options)


def test_a_batch_is_integers_until_it_is_drawn():
    sources = [SyntheticSource(100), SyntheticSource(50, 1)]
    made = batches(sources)
    batch, pairs = made[4], made.order(64, 80)
    assert set(pairs.source.tolist()) == {0, 1}
    assert (batch.images.numbers.shape, batch.images.numbers.dtype) == ((16, 14), torch.int32)
    images = batch.images.pin_memory().on(CPU)
    for place, (source, number) in enumerate(zip(pairs.source, pairs.sample, strict=True)):
        assert torch.equal(images[place], pictures([number], 24, seed=int(source))[0])
        text = Tokenizer(32)([caption(sources[source].read(number))])[0]
        assert torch.equal(batch.texts[place], text[: batch.texts.shape[1]])
        assert not text[batch.texts.shape[1] :].any()
    assert batches(sources, keeps_padding=True)[0].texts.shape == (16, 32)
    ranks = [batches(sources, rank=rank, world_size=2)[4] for rank in range(2)]
    assert torch.equal(torch.cat([part.images.numbers for part in ranks]), batch.images.numbers)


def test_no_caption_twice_in_a_batch():
    source = SyntheticSource(3000)
    known = identities(source, "caption")
    assert len(np.unique(known)) == len(set(captions(source.scenes(range(3000))))) < 3000
    # The identities are cached, so that no pair is read.
    with mock.patch.object(SyntheticSource, "read", side_effect=AssertionError):
        assert np.array_equal(identities(SyntheticSource(3000), "caption"), known)
    made = batches([source], 1000)
    made.order = Unique(made.order, [known], 1000)
    assert len(set(texts_of(made[0]))) == 1000


SYNTHETIC = {"unique_by": None, "train_num_samples": None, "epochs": 1, "batch_size": 8}


def test_pairs_mix_with_shards(shards, tmp_path):
    first = shards.split("::")[0]
    options = {"val_data": f"synthetic:9@1::{first}", "train_data_upsampling_factors": (1.0, 2.0), "unique_by": "label"}
    folder, _ = train(config(f"{first}::synthetic:24", tmp_path, **SYNTHETIC | options))
    results = json.loads((folder.path / "results.json").read_text())
    assert (results["images"], results["samples_seen"]) == (24 + 9, 24 + 2 * 24)
    data = TrainingData(
        config("synthetic:{8..9}::synthetic:24@1", tmp_path, **SYNTHETIC | options | {"unique_by": None})
    )
    assert [len(order) for order in data.order.orders] == [8, 9, 24]
    assert len(data.order) == 8 + 9 + 2 * 24  # a factor of 2 repeats all pairs of its source


def test_options_that_change_drawn_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--gray-prob, --json-text-key: synthetic pairs are drawn on the device"):
        train(config("synthetic:64", tmp_path, **SYNTHETIC, json_text_key=("colour",), gray_prob=0.2))
    assert not (tmp_path / "run").exists()


def test_other_commands(tmp_path, capsys):
    images = list(LabelledSet("synthetic:20@1", "place", "shape"))
    assert len(images) == 20
    assert {item.label for item in images} <= set(drawing.SHAPES)
    assert {item.group for item in images} <= set(PLACES)
    assert {item.caption for item in LabelledSet("synthetic:9", keys=Keys(texts=("size",), is_json=True))} <= set(RADII)
    assert [image.group for image in LabelledSet("shapes:8", group_by="kind")] == [
        scene.kind for scene in scenes(training_scene)[:8]
    ]
    output_of(capsys, "index", "synthetic:300", "--unique-by", "colour", "--json", tmp_path / "i.json")
    found = json.loads((tmp_path / "i.json").read_text())
    assert (found["samples"], found["different"], found["shards"], found["lost"]) == (300, len(PAINTS), 1, 0)
    assert {finding.status for finding in dataset("synthetic:64", {})} == {OK}


def combination(scene):
    """Return the colours and shapes that occur in the scene of a synthetic pair."""
    return frozenset(thing.colour for thing in scene.things), frozenset(thing.shape for thing in scene.things)


def is_true(text, scene):
    """Return whether a synthetic caption describes its scene truthfully, or None if the text is no caption."""
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


def test_captions_of_scenes_are_true_and_wrong_ones_are_not():
    assert collections.Counter(scene.kind for scene in scenes(held_out_scene)) == dict.fromkeys(KINDS, 1000)
    assert {scene.kind for scene in scenes(training_scene)} == set(TRAINED)
    for scene in (*scenes(training_scene), *scenes(held_out_scene)):
        assert is_true(scene.caption, scene), scene
    for scene in scenes(held_out_scene):
        expected = None if scene.kind == "order" else False
        assert is_true(scene.wrong, scene) is expected, scene
        if scene.kind in ("binding", "relation", "order"):
            assert sorted(scene.wrong.split()) == sorted(scene.caption.split())
        else:
            assert sum(a != b for a, b in zip(scene.caption.split(), scene.wrong.split(), strict=True)) == 1
    assert not any(scene.wrong for scene in scenes(training_scene))
    assert {scene.relation for scene in scenes(held_out_scene) if scene.kind == "relation"} == set(RELATIONS)


def test_training_draws_no_combination_of_a_test():
    trained, tested = (set(map(combination, scenes(make))) for make in (training_scene, held_out_scene))
    assert not trained & tested
    for some in (trained, tested):  # training and held-out scenes both have every colour and every shape
        assert frozenset().union(*(colours for colours, _ in some)) == set(COLOURS)
        assert frozenset().union(*(shapes for _, shapes in some)) == set(SHAPES)


def test_which_caption_is_right_is_even():
    """Of two captions, each is the right one equally often, so captions without their images do not tell the answer."""
    seen = collections.Counter(
        (scene.caption, scene.wrong) for scene in scenes(held_out_scene) if scene.kind != "order"
    )
    for (right, wrong), count in seen.items():
        other = seen[wrong, right]
        assert abs(count - other) < 5 * math.sqrt(count + other), (right, wrong)
    by_kind = collections.Counter(scene.kind for scene in scenes(held_out_scene) if scene.caption < scene.wrong)
    assert all(abs(by_kind[kind] - 500) < 5 * math.sqrt(250) for kind in KINDS[:-1])


def test_things_do_not_touch_and_are_whole():
    for scene in (*scenes(training_scene), *scenes(held_out_scene)):
        for one, other in itertools.combinations(scene.things, 2):
            # The corners of every shape are within 1.2 radii of its centre, so that shapes do not overlap.
            assert math.hypot(one.x - other.x, one.y - other.y) > 1.2 * (one.radius + other.radius) + 1, scene
        for thing in scene.things:
            assert 1.2 * thing.radius - 1 < min(thing.x, thing.y), scene
            assert max(thing.x, thing.y) < SIDE - 1.2 * thing.radius + 1, scene


def test_pictures_show_what_their_scenes_say():
    """In a synthetic picture, pixels have a colour of a thing or of the background, and things are at their places."""
    for scene in scenes(held_out_scene)[:24]:
        pixels = np.asarray(scene.picture()).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        for thing in scene.things:
            y, x = np.nonzero(np.abs(pixels - np.array(COLOURS[thing.colour])).max(2) <= SHADE)
            is_inside = np.hypot(x + 0.5 - thing.x, y + 0.5 - thing.y) < 1.25 * thing.radius
            assert is_inside.sum() > 0.6 * thing.radius**2, thing
        background = (pixels.min(2) >= DARKEST - 1) & (np.ptp(pixels, axis=2) <= 1)
        assert background.mean() > 0.5


def test_scenes_are_read_by_their_numbers():
    (source,) = open_sources(expand_shards("shapes:5000@3"))
    for number in (0, 4999):
        raw, scene = source.read(number), training_scene(number, 3)
        assert decode_image(raw).tobytes() == scene.picture().tobytes()
        assert (caption(raw), metadata(raw)["kind"]) == (scene.caption, scene.kind)

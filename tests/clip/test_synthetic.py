"""Synthetic pairs: pictures with the same bits everywhere, captions that say what is in them, and training."""

import io
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.cli import main
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
)
from clipfast.data.drawing import COLUMNS, SHAPES, Drawings
from clipfast.data.samples import decode_image, is_local
from clipfast.data.synthetic import COLOURS, PLACES, SHADE, SIZES, STEP, captions, drawings
from clipfast.doctor.dataset import dataset
from clipfast.doctor.machine import OK
from clipfast.evaluation.labelled import LabelledSet
from clipfast.tokenizer import Tokenizer
from clipfast.training import TrainConfig
from clipfast.training.data import TrainingData
from clipfast.training.loop import train

from .conftest import TINY, run_command
from .test_training import config, losses, same, stopped_after

CPU = torch.device("cpu")


def pictures(numbers, size, seed=0):
    return drawings(SyntheticSource(1 << 20, seed).scenes(numbers), size).on(CPU)


@pytest.mark.parametrize(
    ("name", "count", "seed"),
    [("synthetic:1", 1, 0), ("synthetic:65536@7", 65536, 7), (f"synthetic:{2**40}", 2**40, 0)],
)
def test_names(name, count, seed):
    (source,) = open_sources(expand_shards(name))
    assert (source.sizes, source.seed, source.shards[0].name) == ([count], seed, name)
    assert len(source) == count
    assert not source.shards[0].is_copied
    assert decode_image(source.read(count - 1)).size == (224, 224)


def test_names_among_others(shards):
    names = expand_shards(f"synthetic:8::{shards}::synthetic:{{5..6}}@1")
    sources = open_sources(names)
    assert [len(source.shards) for source in sources] == [2, 1, 1, 1]
    assert [source.sizes for source in sources[1:]] == [[8], [5], [6]]


@pytest.mark.parametrize(
    "name", ["synthetic:", "synthetic:x", "synthetic:-1", "synthetic:5@", "synthetic:5@a", "synthetic:٣"]
)
def test_wrong_names(name):
    with pytest.raises(ValueError, match="is neither synthetic:N nor synthetic:N@SEED"):
        expand_shards(name)


@pytest.mark.parametrize("count", [0, 2**40 + 1])
def test_wrong_counts(count):
    with pytest.raises(ValueError, match=f"from 1 to 1099511627776 synthetic pairs, got {count}"):
        expand_shards(f"synthetic:{count}")


def test_only_synthetic_names_are_local():
    assert is_local("synthetic:8::synthetic:9@1::a.tar")
    assert not is_local("synthetic:pipe:touch owned")
    with pytest.raises(ValueError, match="neither"):
        expand_shards("synthetic:pipe:touch owned")


@pytest.mark.parametrize("size", [1, 7, 32, 224])
def test_a_picture_depends_on_its_number_alone(size, two_threads):
    together = pictures(range(300, 340), size)
    assert together.shape == (40, 3, size, size)
    assert together.dtype == torch.uint8
    backwards = pictures(range(339, 299, -1), size).flip(0)
    torch.set_num_threads(1)
    with mock.patch.object(drawing, "PIXELS_ON_CPU", 1):
        alone = torch.cat([pictures([number], size) for number in range(300, 340)])
    assert torch.equal(together, backwards)
    assert torch.equal(together, alone)
    assert not torch.equal(together, pictures(range(300, 340), size, seed=1))


def test_reading_gives_the_pixels_of_the_batch():
    source = SyntheticSource(1000, 3)
    batch = pictures(range(990, 1000), 224, seed=3)
    texts = captions(source.scenes(range(990, 1000)))
    for number, image, text in zip(range(990, 1000), batch, texts, strict=True):
        sample = source.read(number)
        assert np.array_equal(np.asarray(decode_image(sample)), image.permute(1, 2, 0).numpy())
        assert caption(sample) == metadata(sample)["label"] == text
    assert Image.open(io.BytesIO(sample["png"])).format == "PNG"
    assert "png" not in source.read(0, Keys(images=("jpg",)))
    # a pair is the same in a larger set
    assert SyntheticSource(10, 3).read(9) | {"__url__": ""} == source.read(9) | {"__url__": ""}


def inside(shape, u, v):
    """Whether points, turned back and in units of the radius, are in a shape; its first edge looks to +u."""
    r = np.hypot(u, v)

    def polygon(*lengths):
        angles = [2 * math.pi * k / len(lengths) for k in range(len(lengths))]
        return sum(math.cos(a) * u + math.sin(a) * v <= n for a, n in zip(angles, lengths, strict=True))

    return {
        "circle": lambda: r <= 0.9,
        "ring": lambda: (r <= 1) & (r >= 0.55),
        "half circle": lambda: (r <= 1) & (u <= 0),
        "triangle": lambda: polygon(0.5, 0.5, 0.5) == 3,
        "square": lambda: (abs(u) <= 0.75) & (abs(v) <= 0.75),
        "bar": lambda: (abs(u) <= 0.95) & (abs(v) <= 0.3),
        "cross": lambda: ((abs(u) <= 0.95) & (abs(v) <= 0.3)) | ((abs(u) <= 0.3) & (abs(v) <= 0.95)),
        "star": lambda: polygon(*[math.cos(math.radians(72))] * 5) >= 4,
    }[shape]()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("degrees", [0, 37, 300])
def test_shapes_are_what_geometry_says(shape, degrees):
    """Against 16 by 16 points in each pixel, in float64."""
    size, fine, (x, y, radius) = 96, 16, (480, 560, 300)
    numbers = torch.zeros(1, drawing.WIDTH, dtype=torch.int32)
    numbers[0, COLUMNS.shape], numbers[0, COLUMNS.degrees] = list(SHAPES).index(shape), degrees
    numbers[0, COLUMNS.x], numbers[0, COLUMNS.y], numbers[0, COLUMNS.radius] = x, y, radius
    numbers[0, COLUMNS.colour] = 255
    found = Drawings(numbers, size).on(CPU)[0, 0].double() / 255
    points = (np.arange(size * fine) + 0.5) / (size * fine) * 1024
    dx, dy = np.meshgrid((points - x) / radius, (points - y) / radius)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    exact = inside(shape, cos * dx + sin * dy, cos * dy - sin * dx).reshape(size, fine, size, fine).mean((1, 3))
    error = (found - torch.from_numpy(exact)).abs()
    assert exact.sum() > 0.1 * size**2 * 0.3
    assert error.mean() < 0.002  # a pixel at a corner can be further off than one at an edge
    assert error.quantile(0.99) < 0.1
    assert error.max() < 0.6


def test_captions_say_what_can_be_seen():
    source, size = SyntheticSource(2000), 128
    images = pictures(range(300), size)
    close = 1.5 * SHADE
    for number, image in enumerate(images):
        says = metadata(source.read(number))
        pixels = image.permute(1, 2, 0).numpy().astype(int)
        is_shape = np.abs(pixels - np.array(COLOURS[says["colour"]])).max(-1) <= close
        inner = np.zeros_like(is_shape)
        inner[8:-8, 8:-8] = True
        is_background = np.abs(pixels - np.array(COLOURS[says["background"]])).max(-1) <= close
        assert is_background[inner].mean() > 0.5
        frame = says["background"] if says["frame"] == "none" else says["frame"]
        assert np.abs(pixels[[0, 0, -1, -1], [0, -1, 0, -1]] - np.array(COLOURS[frame])).max() <= close
        rows, columns = np.nonzero(is_shape & inner)
        if says["shape"] not in ("half circle", "triangle", "star"):  # whose middle is not their centre
            middle = [(some.max() + some.min() + 1) / 2 / size for some in (rows, columns)]
            row, column = (int((x - 0.5) / 0.19 + 1.5) for x in middle)
            assert PLACES[3 * row + column] == says["place"]
        extent = max(np.ptp(rows), np.ptp(columns)) / size
        assert extent < {"small": 0.27, "medium": 0.41, "large": 0.56}[says["size"]]
        words = says["size"], says["colour"], says["shape"], says["background"], says["place"]
        assert all(word in says["label"] for word in words)
        assert ("frame" in says["label"]) == (says["frame"] != "none")


def test_pairs_of_a_batch_are_mostly_different():
    texts = captions(SyntheticSource(1 << 20).scenes(range(4096)))
    assert len(set(texts)) > 0.97 * len(texts)
    assert abs(sum("frame" in text for text in texts) / len(texts) - 0.5) < 0.02
    assert len({image.numpy().tobytes() for image in pictures(range(512), 32)}) == 512


def test_choices_do_not_depend_on_each_other():
    count = 20000
    scenes = SyntheticSource(count).scenes(range(count))
    numbers = drawings(scenes, 1).numbers.numpy()
    chosen = [getattr(scenes, key) for key in ("shape", "colour", "size", "place")]
    chosen += [(scenes.background - scenes.colour) % len(COLOURS), scenes.frame == scenes.background]
    shades = numbers[:, 5:11] - np.array(list(COLOURS.values()))[
        np.stack([scenes.colour, scenes.background], 1)
    ].reshape(-1, 6)
    places = numbers[:, [COLUMNS.x, COLUMNS.y]] - np.stack([scenes.place % 3, scenes.place // 3], 1) * STEP
    radii = numbers[:, COLUMNS.radius] - np.array(list(SIZES.values()))[scenes.size]
    drawn = np.stack([*chosen, *shades.T, *places.T, radii, numbers[:, COLUMNS.degrees]])
    correlations = np.corrcoef(drawn.astype(float)) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 0.04
    assert all(np.ptp(row) > 0 for row in drawn)


def test_everything_but_the_numbers_is_on_the_device():
    images = drawings(SyntheticSource(9).scenes(range(9)), 16).on(torch.device("meta"))
    assert (images.device.type, images.shape) == ("meta", (9, 3, 16, 16))


def batches(sources, batch_size=16, **options):
    mix = Mix([Order(source.sizes, 0, source=n) for n, source in enumerate(sources)], [1.0] * len(sources), 0)
    return SyntheticBatches(sources, mix, decode_image, Tokenizer(32), batch_size, image_size=24, **options)


def test_a_batch_is_integers_until_it_is_drawn():
    sources = [SyntheticSource(100), SyntheticSource(50, 1)]
    made = batches(sources)
    batch = made[4]
    pairs = made.order(64, 80)
    assert set(pairs.source.tolist()) == {0, 1}
    assert len(batch) == 16
    assert (batch.images.numbers.shape, batch.images.numbers.dtype) == ((16, 14), torch.int32)
    images = batch.images.pin_memory().on(CPU)
    for place, (source, number) in enumerate(zip(pairs.source, pairs.sample, strict=True)):
        assert torch.equal(images[place], pictures([number], 24, seed=int(source))[0])
        text = Tokenizer(32)([caption(sources[source].read(number))])[0]
        assert torch.equal(batch.texts[place], text[: batch.texts.shape[1]])
        assert not text[batch.texts.shape[1] :].any()
    assert batches(sources, reads_padding=True)[0].texts.shape == (16, 32)
    ranks = [batches(sources, rank=rank, world_size=2)[4] for rank in range(2)]
    assert torch.equal(torch.cat([part.images.numbers for part in ranks]), batch.images.numbers)


def test_no_caption_twice_in_a_batch():
    source = SyntheticSource(3000)
    known = identities(source, "caption")
    texts = captions(source.scenes(range(3000)))
    assert len(np.unique(known)) == len(set(texts)) < 3000
    with mock.patch.object(SyntheticSource, "read", side_effect=AssertionError):  # they are kept
        assert np.array_equal(identities(SyntheticSource(3000), "caption"), known)
    assert len(np.unique(identities(source, "place"))) == 9
    made = batches([source], 1000)
    made.order = Unique(made.order, [known], 1000)
    assert len({tuple(row.tolist()) for row in made[0].texts}) == 1000


SYNTHETIC = {"unique_by": None, "train_num_samples": None, "epochs": 1, "batch_size": 8}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_to_the_last_bit(tmp_path, workers):
    options = config("synthetic:64@2", tmp_path / "part", **SYNTHETIC, workers=workers, save_every=3)
    whole, _ = train(config("synthetic:64@2", tmp_path / "whole", **SYNTHETIC, workers=1))
    with stopped_after(3):
        train(options)
    part = tmp_path / "part" / "run"
    assert main(["train", "--resume", str(part)]) == 0  # --train-data need not be given again
    assert same(whole.path, part)


def test_other_pairs_are_another_run(tmp_path):
    first, _ = train(config("synthetic:64", tmp_path / "a", **SYNTHETIC))
    other, _ = train(config("synthetic:64@1", tmp_path / "b", **SYNTHETIC))
    assert losses(first) != losses(other)


@pytest.mark.parametrize(
    "options", [{"affine": 0.1}, {"train_data_upsampling_factors": (1.0, 2.0)}, {"unique_by": "label"}]
)
def test_pairs_mix_with_shards(shards, tmp_path, options):
    first = shards.split("::")[0]
    mixed = config(f"{first}::synthetic:24", tmp_path, **SYNTHETIC | {"val_data": "synthetic:9@1::" + first} | options)
    folder, signum = train(mixed)
    assert signum is None
    results = json.loads((folder.path / "results.json").read_text())
    assert results["images"] == 24 + 9
    assert results["samples_seen"] == results["steps"] * 8 == (72 if "train_data_upsampling_factors" in options else 48)


def test_what_drawing_cannot_do_is_refused(tmp_path):
    message = "--gray-prob, --json-text-key: synthetic pairs are drawn on the device as they are: leave it out"
    with pytest.raises(ValueError, match=message):
        train(config("synthetic:64", tmp_path, **SYNTHETIC, json_text_key=("colour",), gray_prob=0.2))
    assert not (tmp_path / "run").exists()


def test_evaluation_and_index(tmp_path, capsys):
    images = list(LabelledSet("synthetic:20@1", "place", "shape"))
    assert len(images) == 20
    assert {item.label for item in images} <= set(SHAPES)
    assert {item.group for item in images} <= set(PLACES)
    assert len(list(LabelledSet("synthetic:3::synthetic:4@1"))) == 7
    assert {item.caption for item in LabelledSet("synthetic:9", keys=Keys(texts=("size",), is_json=True))} <= set(SIZES)
    code, _, _ = run_command(capsys, "index", "synthetic:300", "--unique-by", "colour", "--json", tmp_path / "i.json")
    assert code == 0
    found = json.loads((tmp_path / "i.json").read_text())
    assert (found["samples"], found["different"], found["shards"], found["lost"]) == (300, len(COLOURS), 1, 0)


def test_a_factor_counts_for_all_pairs_of_its_part(tmp_path):
    options = SYNTHETIC | {"train_data_upsampling_factors": (1.0, 2.0)}
    data = TrainingData(config("synthetic:{8..9}::synthetic:24@1", tmp_path, **options))
    assert [len(order) for order in data.order.orders] == [8, 9, 24]
    assert len(data.order) == 8 + 9 + 2 * 24


def test_doctor():
    found = {finding.name: finding for finding in dataset("synthetic:64", {})}
    assert {finding.status for finding in found.values()} == {OK}
    assert found["pairs"].value.startswith("4 of 4 that were tried are usable")


@pytest.mark.long
def test_shapes_are_learned(tmp_path, two_threads):
    torch.set_num_threads(1)
    options = {"batch_size": 64, "samples_seen": 64 * 150, "lr": 4e-3, "warmup": 20, "workers": 0, "save_frequency": 0}
    folder, _ = train(
        TrainConfig(train_data="synthetic:65536", val_data="synthetic:128@1", model=TINY, logs=str(tmp_path), **options)
    )
    results = json.loads((folder.path / "results.json").read_text())
    assert results["classes"] > 120
    assert results["zero_shot"]["top1"] > 0.1  # chance: 0.008
    assert results["zero_shot"]["top5"] > 0.4

"""Synthetic shifts of images: strength, noise, JPEG and occlusion as stated, reproducible, alike at every size."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.evaluate.encoder import PreparedEncoder
from clipfast.evaluate.features import encode_set
from clipfast.evaluate.labelled import LabelledSet
from clipfast.evaluate.shifts import AMOUNTS, SHIFTS, STRENGTHS, Shift
from clipfast.evaluate.store import FeatureStore

from ..small_runs import sample, write_shard
from .test_features import encoder_of


def scene(size, seed=0):
    """Draw smooth coloured blobs on white, alike at every size, to which a synthetic shift is applied."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    x, y = (x + 0.5) / width, (y + 0.5) / height
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 255.0)
    for _ in range(4):
        cx, cy = rng.uniform(0.25, 0.75, 2)
        weight = 1 / (1 + np.exp(60 * (np.hypot(x - cx, y - cy) - 0.15)))
        pixels += weight[..., None] * (rng.uniform(0, 255, 3) - pixels)
    return Image.fromarray(pixels.round().astype(np.uint8))


def distance(first, second):
    """Return the root mean square difference of two images, before and after a synthetic shift; white is 1."""
    return np.sqrt(np.mean((np.asarray(first, float) - np.asarray(second, float)) ** 2)) / 255


SIZES = ((1, 1), (1, 9), (2, 400), (31, 47), (300, 225))


@pytest.mark.parametrize("name", SHIFTS)
def test_size_and_mode_stay_and_the_image_is_not_touched(name):
    for size in SIZES:
        image = scene(size)
        before = image.tobytes()
        for strength in STRENGTHS:
            shifted = Shift(name, strength)(image)
            assert (shifted.size, shifted.mode) == (size, "RGB")
            assert Shift(name, strength)(image).tobytes() == shifted.tobytes()
        assert image.tobytes() == before


@pytest.mark.parametrize("name", SHIFTS)
def test_a_larger_strength_changes_more(name):
    for size in ((32, 32), (300, 225)):
        changes = [distance(Shift(name, strength)(scene(size)), scene(size)) for strength in STRENGTHS]
        assert changes == sorted(changes)
        assert changes[4] > 1.5 * max(changes[0], 0.01)


@pytest.mark.parametrize("name", ["blur", "hue", "rotation"])
def test_a_small_and_a_large_image_are_changed_alike(name):
    # A shift's random draws depend on the pixels, and may differ between the two sizes. For some seed they agree.
    small, large = scene((48, 48)), scene((480, 480))
    expected = Shift(name, 4)(small)
    shifted = [Shift(name, 4, seed)(large).resize((48, 48), Image.Resampling.BOX) for seed in range(8)]
    assert min(distance(one, expected) for one in shifted) < 0.25 * distance(expected, small) + 0.02


def test_noise_has_the_spread_that_is_stated():
    grey = {side: Image.new("RGB", (side, side), (128, 128, 128)) for side in (32, 224, 448)}
    spread = {side: np.asarray(Shift("noise", 1)(image), float).std() / 255 for side, image in grey.items()}
    expected = {224: 0.08, 448: 0.08, 32: 0.08 * (32 / 224) ** 0.5}
    assert spread == {side: pytest.approx(value, rel=0.1 if side == 32 else 0.02) for side, value in expected.items()}
    blocks = np.asarray(Shift("noise", 1)(grey[448])).reshape(224, 2, 224, 2, 3)
    # Noise is that of an image of 224 pixels, so here it has squares of two pixels.
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_jpeg_is_that_of_pillow_at_224_pixels():
    image = scene((224, 224))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=10)
    assert Shift("jpeg", 4)(image).tobytes() == Image.open(stream).tobytes()


def test_hue_turns_colours_and_leaves_grey():
    red = Image.new("RGB", (4, 4), (200, 40, 40))
    assert Shift("hue", 5)(red).getpixel((0, 0)) == pytest.approx((40, 200, 200), abs=3)
    grey = Image.new("RGB", (4, 4), (77, 77, 77))
    assert all(Shift("hue", strength)(grey).getpixel((1, 1)) == (77, 77, 77) for strength in STRENGTHS)


def test_rotation_turns_and_fills_with_the_border():
    image = Image.new("RGB", (41, 41), (250, 240, 10))
    image.paste((0, 0, 0), (15, 5, 25, 20))
    both = {np.rot90(np.asarray(image), k).tobytes() for k in (1, 3)}
    assert {Shift("rotation", 5, seed)(image).tobytes() for seed in range(10)} == both
    assert Shift("rotation", 3)(image).getpixel((0, 0)) == (250, 240, 10)


def test_occlusion_covers_its_share_at_places_that_differ():
    """An occlusion covers its share of an image, at a place that depends on the seed and on the image's pixels."""
    places = set()
    for number in range(20):
        size = (60, 40) if number % 4 < 2 else (400, 600)
        image, before = Image.new("RGB", size, (254 + number % 2,) * 3), False
        for strength, share in zip(STRENGTHS, AMOUNTS["occlusion"], strict=True):
            covered = (np.asarray(Shift("occlusion", strength, number // 2)(image)) == 128).all(2)
            assert covered.mean() == pytest.approx(share, abs=0.03)
            assert (covered >= before).all()  # a larger strength covers the area of a smaller one, too
            before = covered
        places.add(tuple(np.argwhere(covered)[0]))
    assert len(places) > 15


def test_features_of_shifts_are_the_same_with_workers_and_kept_apart(tmp_path):
    encoder, images = (
        encoder_of(),
        LabelledSet(str(write_shard(tmp_path / "a.tar", [sample(index) for index in range(9)]))),
    )
    shifts = [Shift("noise", 2), Shift("noise", 3), Shift("noise", 3, seed=1)]
    encoders = [encoder, *(PreparedEncoder.of(encoder, shift) for shift in shifts)]
    store = FeatureStore(tmp_path / "kept")
    for more in ({"workers": 1}, {"store": store}, {"store": store}):
        found = encode_set(encoders, images, batch_size=9, **more)
        for shift, one in zip((lambda image: image, *shifts), found, strict=True):
            assert torch.equal(
                one.features, encoder.images(torch.stack([encoder.transform(shift(x.image)) for x in images]))
            )
            assert one.digests == found[0].digests  # the digests are those of the images before the shift
    assert len({str(one.features) for one in found}) == len(list(store.folder.glob("images/*"))) == 4

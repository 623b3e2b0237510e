"""Features of labelled sets: equal on any number of ranks and data workers, and stored by model and data."""

import dataclasses
import itertools
import json
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from clipfast import create_model
from clipfast.data.source import ShardSource
from clipfast.distributed.world import World
from clipfast.evaluate.encoder import Encoder
from clipfast.evaluate.features import encode_set
from clipfast.evaluate.labelled import LabelledSet
from clipfast.evaluate.store import ABOUT, FeatureStore
from clipfast.factory import get_tokenizer, transform_of

from ..processes import run_ranks
from ..small_runs import picture, sample, write_shard
from ..train.faults import faulty_samples


def encoder_of(seed=0):
    """Return an encoder with random weights, whose features the evaluation stores."""
    torch.manual_seed(seed)
    model = create_model("ViT-T-8-32").eval()
    return Encoder("ViT-T-8-32", model, get_tokenizer("ViT-T-8-32"), transform_of(model, uint8=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write a labelled set in two shards, with some unusable images."""
    folder = tmp_path_factory.mktemp("features")
    write_shard(folder / "a.tar", [*faulty_samples(), *(sample(index) for index in range(20))])
    write_shard(folder / "b.tar", [sample(index, png=picture(100 + index)) for index in range(17)])
    return f"{folder}/a.tar::{folder}/b.tar"


def plain(found):
    """Return labelled features as plain values, which can be compared and sent to another process."""
    values = vars(found) | {"features": found.features.tolist()}
    return values | {"left_out": {number: tuple(skipped) for number, skipped in found.left_out.items()}}


def test_features_are_those_of_a_plain_loop(data):
    encoders, plainly, images = [encoder_of(), encoder_of(1)], LabelledSet(data), LabelledSet(data)
    everything = list(plainly)
    blocks = [list(block) for _, block in itertools.groupby(everything, key=lambda image: image.number // 8)]
    pixels = [(image.image.size, image.image.tobytes()) for image in everything]
    for workers in (0, 2):
        everyones = encode_set(encoders, images, batch_size=8, workers=workers)
        for encoder, found in zip(encoders, everyones, strict=True):
            rows = [encoder.images(torch.stack([encoder.transform(image.image) for image in x])) for x in blocks]
            assert torch.equal(found.features, torch.cat(rows))
            assert found.labels == [image.label for image in everything]
            assert found.captions == [image.captions for image in everything]
            assert found.twins == [list(dict.fromkeys(pixels)).index(one) for one in pixels]
            assert found.left_out == images.left_out == plainly.left_out
    assert len(plainly.left_out) > 5


def work(rank, data, folder):
    """Encode a set and texts on one of several ranks, with and without a feature store."""
    world = World(rank, 3, rank, 3, hosts=dist.new_group(backend="gloo"))
    encoder, images, store = encoder_of(), LabelledSet(data), FeatureStore(folder)
    found, reads = [], []
    for size, kept in ((8, None), (8, store), (8, store), (64, None)):
        with mock.patch.object(ShardSource, "read", autospec=True, side_effect=ShardSource.read) as reading:
            parts = encode_set([encoder], images, batch_size=size, store=kept, world=world)
        found.append([plain(x) for x in parts])
        reads.append(reading.call_count)
    texts = [f"text {number % 300}" for number in range(400)] if rank == 0 else []
    with mock.patch("clipfast.evaluate.encoder.TEXTS", 64):  # five batches
        text_features = [encoder.texts(texts, kept, world).tolist() for kept in (None, store, store)]
    return found, text_features, encoder.texts([], None, world).tolist(), reads


def test_any_number_of_ranks_gives_the_same(data, tmp_path):
    """Features do not depend on the number of ranks, even if one batch of 64 images leaves two ranks without images."""
    encoder, images = encoder_of(), LabelledSet(data)
    small, large = (plain(encode_set([encoder], images, batch_size=size)[0]) for size in (8, 64))
    with mock.patch("clipfast.evaluate.encoder.TEXTS", 64):
        texts = encoder.texts([f"text {number % 300}" for number in range(400)]).tolist()
    first, *others = run_ranks(work, 3, data, tmp_path / "kept", folder=tmp_path)
    assert first[:3] == ([[small], [small], [small], [large]], [texts] * 3, [])
    assert all(other[:3] == ([[]] * 4, [[]] * 3, []) for other in others)
    places = len(small["numbers"]) + len(small["left_out"])
    reads = torch.tensor([first[-1], *(other[-1] for other in others)])
    assert reads.sum(0).tolist() == [places, places, 0, places]  # each image is read by one rank
    assert reads[:, 0].max() <= 8 * -(-places // 24)


def test_a_run_that_was_killed_goes_on(data, tmp_path, monkeypatch):
    encoder, images, store = encoder_of(), LabelledSet(data), FeatureStore(tmp_path)
    expected = plain(encode_set([encoder], images, batch_size=8)[0])
    calls, original = [], Encoder.images

    def counted(self, pixels):
        """Count the image features that are computed, and stop the evaluation at the fourth batch."""
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(Encoder, "images", counted)
    with pytest.raises(KeyboardInterrupt):
        encode_set([encoder], images, batch_size=8, store=store)
    in_all = -(-(len(expected["numbers"]) + len(expected["left_out"])) // 8) + 1
    for more in (0, 0, 1):  # in the last turn, a stored block of features is damaged
        if more:
            (part,) = tmp_path.glob("images/*/block_000002.safetensors")
            part.write_bytes(part.read_bytes()[:-100])
        assert plain(encode_set([encoder], images, batch_size=8, store=store)[0]) == expected
        assert len(calls) == in_all + more


def test_what_is_kept_is_never_taken_for_something_else(tmp_path):
    data = str(write_shard(tmp_path / "a.tar", [sample(index) for index in range(6)]))
    store, encoder, images = FeatureStore(tmp_path / "kept"), encoder_of(), LabelledSet(data)
    quick = create_model("ViT-T-8-32", force_quick_gelu=True).eval()
    quick.load_state_dict(encoder.model.state_dict())
    for number, (one, own) in enumerate((
        (encoder, images),
        (encoder_of(1), images),
        (dataclasses.replace(encoder, model=quick), images),
        *((encoder, LabelledSet(data, **{key: own})) for key, own in (("label_by", "label"), ("group_by", "category"))),
        (encoder, LabelledSet(data, numbers=[1, 3])),
    ), 1):  # fmt: skip
        encode_set([one], own, store=store)
        assert len(list(store.folder.glob(f"images/*/{ABOUT}"))) == number
    write_shard(tmp_path / "a.tar", [sample(index) for index in range(7)])
    assert len(encode_set([encoder], images, store=store)[0].labels) == 7
    abouts = [json.loads(path.read_text()) for path in store.folder.glob(f"images/*/{ABOUT}")]
    assert [about["data"] for about in abouts] == [data] * 7

"""Features of labelled sets: the same on any number of ranks and data workers, and kept with what made them."""

import itertools
import json
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from clipfast import create_model
from clipfast.data.source import ShardSource
from clipfast.distributed.world import World
from clipfast.evaluate import encoder as encoder_module
from clipfast.evaluate.encoder import Encoder
from clipfast.evaluate.features import encode_set
from clipfast.evaluate.labelled import LabelledSet
from clipfast.evaluate.store import ABOUT, FeatureStore
from clipfast.evaluate.zero_shot import OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier
from clipfast.factory import get_tokenizer, transform_of

from .. import processes
from ..processes import run_ranks
from ..small_runs import picture, sample, write_shard
from ..train.faults import faulty_samples

processes.PRELOAD.append("clipfast.evaluate.encoder")


def encoder_of(seed=0):
    torch.manual_seed(seed)
    model = create_model("ViT-T-8-32").eval()
    return Encoder("ViT-T-8-32", model, get_tokenizer("ViT-T-8-32"), transform_of(model, uint8=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A labelled set in two shards, with some unusable images."""
    folder = tmp_path_factory.mktemp("features")
    write_shard(folder / "a.tar", [*faulty_samples(), *(sample(index) for index in range(20))])
    write_shard(folder / "b.tar", [sample(index, png=picture(100 + index)) for index in range(17)])
    return f"{folder}/a.tar::{folder}/b.tar"


def plain(found):
    """Return features as a tensor, and labels and other metadata as plain values."""
    names = ("labels", "captions", "groups", "twins", "numbers", "digests")
    left_out = {number: tuple(skipped) for number, skipped in found.left_out.items()}
    return found.features, [getattr(found, name) for name in names], left_out


def same(first, second):
    (mine, *known), (theirs, *expected) = plain(first), plain(second)
    assert torch.equal(mine, theirs), (mine - theirs).abs().max()
    assert known == expected


def test_features_are_those_of_a_plain_loop(data):
    encoder, other, plainly, images = encoder_of(), encoder_of(1), LabelledSet(data), LabelledSet(data)
    blocks = [list(block) for _, block in itertools.groupby(plainly, key=lambda image: image.number // 8)]
    everything = list(itertools.chain(*blocks))
    expected = [
        torch.cat([one.images(torch.stack([one.transform(image.image) for image in block])) for block in blocks])
        for one in (encoder, other)
    ]
    for workers in (0, 2):
        everyones = encode_set([encoder, other], images, batch_size=8, workers=workers)
        for found, features in zip(everyones, expected, strict=True):
            assert torch.equal(found.features, features)
            assert found.labels == [image.label for image in everything]
            assert found.captions == [image.captions for image in everything]
            pixels = [(image.image.size, image.image.tobytes()) for image in everything]
            assert found.twins == [list(dict.fromkeys(pixels)).index(one) for one in pixels]
            assert found.left_out == images.left_out == plainly.left_out
    assert len(plainly.left_out) > 5


def work(rank, data, folder):
    """Encode a set and texts on one of several ranks, with and without a feature store."""
    world = World(rank, 3, rank, 3, hosts=dist.new_group(backend="gloo"))
    encoder, images = encoder_of(), LabelledSet(data)
    found, reads = [], []
    for size, store in ((8, None), (8, FeatureStore(folder)), (8, FeatureStore(folder)), (64, None)):
        with mock.patch.object(ShardSource, "read", autospec=True, side_effect=ShardSource.read) as reading:
            parts = encode_set([encoder], images, batch_size=size, store=store, world=world)
        found.append([list(plain(x)) for x in parts])
        reads.append(reading.call_count)
    texts = [f"text {number % 700}" for number in range(1000)] if rank == 0 else []
    text_features = [encoder.texts(texts, store, world) for store in (None, FeatureStore(folder), FeatureStore(folder))]
    nothing = [encoder.texts([], None, world)]
    return found, text_features, nothing, reads


def test_any_number_of_ranks_gives_the_same(data, tmp_path):
    """With 64 images a batch there is one block, so that two of three ranks have none."""
    encoder, images = encoder_of(), LabelledSet(data)
    small, large = (encode_set([encoder], images, batch_size=size)[0] for size in (8, 64))
    texts = encoder.texts([f"text {number % 700}" for number in range(1000)])
    first, *others = run_ranks(work, 3, data, tmp_path / "kept", folder=tmp_path)
    for ((features, *known),), expected in zip(first[0], (small, small, small, large), strict=True):
        assert torch.equal(features, plain(expected)[0])
        assert known == list(plain(expected)[1:])
    assert all(torch.equal(found, texts) for found in first[1])
    assert all(found == [[]] * 4 and not any(map(len, features)) for found, features, *_ in others)
    places = len(small.numbers) + len(small.left_out)
    reads = torch.tensor([first[-1], *(other[-1] for other in others)])
    assert reads.sum(0).tolist() == [places, places, 0, places]  # each place is read by one rank
    assert reads[:, 0].max() <= 8 * -(-places // 24)


def test_a_run_that_was_killed_goes_on(data, tmp_path, monkeypatch):
    encoder, images, store = encoder_of(), LabelledSet(data), FeatureStore(tmp_path)
    expected = encode_set([encoder], images, batch_size=8)[0]
    calls = []
    original = Encoder.images

    def counted(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(Encoder, "images", counted)
    with pytest.raises(KeyboardInterrupt):
        encode_set([encoder], images, batch_size=8, store=store)
    same(encode_set([encoder], images, batch_size=8, store=store)[0], expected)
    in_all = len(calls)
    same(encode_set([encoder], images, batch_size=8, store=store)[0], expected)
    assert len(calls) == in_all
    assert in_all == -(-(len(expected.labels) + len(expected.left_out)) // 8) + 1
    (part,) = tmp_path.glob("images/*/block_000002.safetensors")
    part.write_bytes(part.read_bytes()[:-100])
    same(encode_set([encoder], images, batch_size=8, store=store)[0], expected)
    assert len(calls) == in_all + 1


def test_what_is_kept_is_never_taken_for_something_else(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(index) for index in range(6)])
    store = FeatureStore(tmp_path / "kept")
    encoder = encoder_of()

    def sections():
        return {path.parent.name for path in store.folder.glob(f"images/*/{ABOUT}")}

    encode_set([encoder], LabelledSet(f"{tmp_path}/a.tar"), store=store)
    known = sections()
    quick = create_model("ViT-T-8-32", force_quick_gelu=True).eval()
    quick.load_state_dict(encoder.model.state_dict())
    changed = [
        (encoder_of(1), LabelledSet(f"{tmp_path}/a.tar")),
        (Encoder("ViT-T-8-32", quick, encoder.tokenizer, encoder.transform), LabelledSet(f"{tmp_path}/a.tar")),
        (encoder, LabelledSet(f"{tmp_path}/a.tar", label_by="label")),
        (encoder, LabelledSet(f"{tmp_path}/a.tar", group_by="category")),
        (encoder, LabelledSet(f"{tmp_path}/a.tar", numbers=[1, 3])),
    ]
    for number, (other, images) in enumerate(changed):
        encode_set([other], images, store=store)
        assert len(sections()) == len(known) + 1, number
        known = sections()
    write_shard(tmp_path / "a.tar", [sample(index) for index in range(7)])
    assert len(encode_set([encoder], LabelledSet(f"{tmp_path}/a.tar"), store=store)[0].labels) == 7
    assert len(sections()) == len(known) + 1
    (about,) = [path for path in store.folder.glob(f"images/*/{ABOUT}") if path.parent.name not in known]
    assert json.loads(about.read_text())["data"] == f"{tmp_path}/a.tar"


def test_texts_are_encoded_once(tmp_path, monkeypatch):
    encoder, store = encoder_of(), FeatureStore(tmp_path)
    names, templates = ["cat", "dog", "cat"], OPENAI_IMAGENET_TEMPLATES[:5]
    expected = build_zero_shot_classifier(encoder.model, encoder.tokenizer, names, templates)
    torch.testing.assert_close(encoder.classifier(names, templates), expected, rtol=0, atol=1e-6)
    kept = encoder.classifier(names, templates, store)
    monkeypatch.setattr(encoder_module, "encode_texts", None)
    assert torch.equal(encoder.classifier(names, templates, store), kept)
    with pytest.raises(TypeError):
        encoder.classifier([*names, "cow"], templates, store)
    with pytest.raises(ValueError, match="got 0 and 1"):
        encoder.classifier([], ["{}"])

"""The data stream: order, uniqueness, resumption, and samples that cannot be used."""

import itertools
import json
import random
from collections import Counter

import pytest
import torch

from clipfast.data import PairStream, caption, count_samples, expand_shards, pair_loader, read_samples
from clipfast.data.stream import MAX_HELD_BATCHES, shuffle, unique_batches
from clipfast.images import image_transform
from clipfast.tokenizer import Tokenizer, tokenize, trim_padding

from .conftest import sample, write_shard


def stream(shards, **options):
    """A stream of 6 batches of 8 with training augmentation."""
    options = {"batch_size": 8, "num_batches": 6, "seed": 3} | options
    return PairStream(expand_shards(shards), image_transform(16, train=True, uint8=True), Tokenizer(16), **options)


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.texts, b.texts)


def test_shards_expand(tmp_path):
    for name in ("x-0.tar", "x-1.tar", "y.tar"):
        write_shard(tmp_path / name, [sample(0)])
    found = expand_shards(f"{tmp_path}/x-{{0..1}}.tar::{tmp_path}/y.tar")
    assert [shard.split("/")[-1] for shard in found] == ["x-0.tar", "x-1.tar", "y.tar"]
    assert count_samples(expand_shards("bundled:emoji/noto")) == 1852
    with pytest.raises(ValueError, match="no bundled shard 'emoji/klingon'; there are: emoji/fluent, emoji/noto, emoj"):
        expand_shards("bundled:emoji/klingon")


def test_not_a_tar_file(tmp_path):
    path = tmp_path / "bad.tar"
    path.write_bytes(b"nothing like a tar file" * 100)
    with pytest.raises(ValueError, match=r"bad\.tar cannot be read"):
        list(read_samples([str(path)]))


def test_pickles_in_a_shard_stay_bytes(tmp_path):
    shard = write_shard(tmp_path / "p.tar", [sample(0, pyd=b"cos\nsystem\n(S'echo owned'\ntR.", pth=b"x")])
    (only,) = read_samples([str(shard)])
    assert isinstance(only["pyd"], bytes)


def test_order_is_a_function_of_the_seed(shards):
    first, again, other = (list(stream(shards, seed=seed)) for seed in (3, 3, 4))
    assert all(equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(equal(*pair) for pair in zip(first, other, strict=True))
    assert not any(equal(*pair) for pair in zip(first, stream(shards, epoch=1), strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_skipped_batches_change_nothing_after_them(shards, workers):
    whole = list(pair_loader(stream(shards), workers))
    assert len(whole) == 6
    for first in range(1, 6):
        rest = list(pair_loader(stream(shards, first_batch=first), workers))
        assert len(rest) == 6 - first
        assert all(equal(*pair) for pair in zip(whole[first:], rest, strict=True)), f"from batch {first}"


def test_an_epoch_may_be_several_passes(shards):
    texts = [tuple(row.tolist()) for batch in stream(shards, num_batches=12) for row in batch.texts]
    # 96 samples from 48 pairs: each twice
    assert set(Counter(texts).values()) == {4}


@pytest.mark.parametrize(("samples", "size"), [(0, 4), (3, 4), (4, 4), (50, 1), (50, 7), (50, 8), (50, 1000)])
def test_the_order_is_webdatasets(samples, size):
    filters = pytest.importorskip("webdataset.filters")
    theirs = filters.shuffle(size, initial=size, rng=random.Random(1))(iter(range(samples)))
    assert list(shuffle(range(samples), size, random.Random(1))) == list(theirs)


def test_no_two_of_a_kind_in_a_batch(shards):
    for batch in stream(shards, batch_size=20, num_batches=10, unique_by="label"):
        assert len({tuple(row.tolist()) for row in batch.texts}) == 20
    # without the rule, both drawings of a thing do meet
    free = stream(shards, batch_size=20, num_batches=10)
    assert any(len({tuple(row.tolist()) for row in batch.texts}) < 20 for batch in free)


def test_unique_batches_lose_nothing():
    keys = random.Random(0).choices(range(30), k=600)
    batches = list(unique_batches(iter(keys), 10, identity=int))
    assert all(len(set(batch)) == 10 for batch in batches)
    used = Counter(itertools.chain.from_iterable(batches))
    # all but a last batch's worth, and what waits for the like of it to be used up
    assert not used - Counter(keys)
    assert sum(used.values()) > 600 - 60


def test_what_is_too_frequent_is_dropped_and_the_rest_goes_on():
    # One in five is the same: a batch of ten can hold only one of them.
    rng = random.Random(0)
    keys = (0 if rng.random() < 0.2 else rng.randrange(1, 10**9) for _ in range(40 * MAX_HELD_BATCHES * 10))
    batches = list(unique_batches(keys, 10, identity=int))
    assert all(len(set(batch)) == 10 for batch in batches)
    assert len(batches) > 30 * MAX_HELD_BATCHES


@pytest.mark.parametrize("workers", [0, 1])
def test_impossible_batch(shards, workers):
    for options, message in (
        ({"batch_size": 30, "unique_by": "label"}, "^cannot fill a batch of 30 with different samples: only 24 "),
        (
            {"unique_by": "breed"},
            r"^not one of 48 samples can be used; first: .*/0\d\d: sample has no 'breed' in its json",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            list(pair_loader(stream(shards, **options), workers))


def test_captions_with_keywords(shards):
    raw = next(read_samples(expand_shards(shards)))
    assert caption(raw) == "a red thing 0"
    seen = {caption(raw, 1.0, random.Random(seed)) for seed in range(100)}
    assert seen == {f"a red thing 0, {words}" for words in ("red", "noise", "red, noise", "noise, red")}
    assert caption(raw, 0.0, random.Random(0)) == "a red thing 0"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"png": b"broken"}, "not an image in one of the formats"),
        ({"txt": b"\xff\xfe\xff"}, "can't decode"),
        ({"json": b"{"}, "json cannot be read: Expecting property name"),
        ({"json": b"[]"}, "json is not an object but a list"),
        ({"json": b'{"keywords": [1, 2]}'}, "keywords are not a list of strings: [1, 2]"),
        ({"json": b'{"keywords": "abc"}'}, "keywords are not a list of strings: 'abc'"),
    ],
)
def test_bad_samples_are_left_out_and_named(tmp_path, changes, reason):
    write_shard(tmp_path / "s.tar", [sample(index, **(changes if index == 3 else {})) for index in range(8)])
    (batch,) = stream(f"{tmp_path}/s.tar", num_batches=1, keyword_prob=1.0)
    assert len(batch) == 7
    ((name, why),) = batch.skipped
    assert name == "s.tar/003"
    assert reason in why


def test_samples_that_lack_something_are_left_out(tmp_path):
    samples = [sample(index) for index in range(8)]
    del samples[2]["png"], samples[5]["txt"]
    samples[3]["json"] = b"{"  # and the json decides which samples are alike
    write_shard(tmp_path / "s.tar", samples)
    (batch,) = stream(f"{tmp_path}/s.tar", num_batches=1, unique_by="label")
    assert sorted(name for name, _ in batch.skipped) == ["s.tar/002", "s.tar/003", "s.tar/005"]


def test_a_batch_of_which_nothing_is_usable_is_empty(tmp_path):
    write_shard(tmp_path / "s.tar", [sample(0), sample(1, txt=b" \n")])
    batches = list(stream(f"{tmp_path}/s.tar", batch_size=1, num_batches=2))
    assert sorted(map(len, batches)) == [0, 1]
    assert [skipped for batch in batches for skipped in batch.skipped] == [("s.tar/001", "caption is empty")]


def test_nothing_usable(tmp_path):
    write_shard(tmp_path / "s.tar", [sample(index, png=b"x") for index in range(8)])
    with pytest.raises(ValueError, match=r"not one of 100 samples can be used; first: s\.tar/.*: not an image"):
        list(stream(f"{tmp_path}/s.tar", batch_size=4, num_batches=100))
    write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match="shards hold no samples"):
        next(iter(stream(f"{tmp_path}/empty.tar")))


def test_trimming_keeps_every_token():
    for texts in (["a"], ["a cat on a mat", "a"], ["x " * 100]):
        ids = tokenize(texts)
        trimmed = trim_padding(ids)
        assert trimmed.shape[1] % 4 == 0 or trimmed.shape[1] == 77
        assert not ids[:, trimmed.shape[1] :].any()


def test_bundled_shards_are_what_the_notice_says():
    names = {}
    for style in ("noto", "twemoji", "fluent"):
        samples = list(read_samples(expand_shards(f"bundled:emoji/{style}")))
        assert {json.loads(raw["json"])["style"] for raw in samples} == {style}
        names[style] = [raw["__key__"] for raw in samples]
    assert all(sorted(a) == sorted(b) for a, b in itertools.combinations(names.values(), 2))

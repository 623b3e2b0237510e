"""Batches of pairs: order, uniqueness, resumption anywhere, and samples that cannot be used."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from clipfast.data import (
    Batch,
    CroppedImages,
    Mix,
    Order,
    PairBatches,
    Unique,
    caption,
    expand_shards,
    identities,
    open_shards,
    pair_loader,
)
from clipfast.files import DiskFullError
from clipfast.tokenizer import Tokenizer, tokenize, trim_padding

from .conftest import picture, sample, write_shard
from .faults import faults, faulty_samples


def batches(shards, batch_size=8, seed=3, unique_by=None, **options):
    """Batches of small images with training augmentation."""
    source = open_shards(expand_shards(shards))
    order = Mix([Order(source.sizes, seed)], [1], seed)
    if unique_by is not None:
        order = Unique(order, [identities(source, unique_by)], batch_size)
    return PairBatches(
        [source], order, CroppedImages(16), Tokenizer(16), batch_size, seed, unique_by=unique_by, **options
    )


def texts_of(batch):
    return [tuple(row.tolist()) for row in batch.texts]


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.texts, b.texts)


def test_shards_expand(tmp_path):
    for name in ("x-0.tar", "x-1.tar", "y.tar"):
        write_shard(tmp_path / name, [sample(0)])
    found = expand_shards(f"{tmp_path}/x-{{0..1}}.tar::{tmp_path}/y.tar")
    assert [shard.split("/")[-1] for shard in found] == ["x-0.tar", "x-1.tar", "y.tar"]
    assert sum(open_shards(expand_shards("bundled:emoji/noto")).sizes) == 1852
    with pytest.raises(ValueError, match=r"no such shard:  \(1 of 2 are missing\)"):
        expand_shards(f"{tmp_path}/y.tar::")  # and not the working folder
    with pytest.raises(ValueError, match=r"no bundled shard 'emoji/klingon'.*; there are: emoji/fluent, emoji/noto"):
        expand_shards("bundled:emoji/klingon")
    os.mkfifo(tmp_path / "z.tar")  # which would be waited for, or lose the bytes that are looked at
    with pytest.raises(ValueError, match=r"z\.tar is neither a file nor a folder: .* 'pipe:cat a\.tar'"):
        expand_shards(f"{tmp_path}/*.tar")


def test_pickles_in_a_shard_stay_bytes(tmp_path):
    shard = write_shard(tmp_path / "p.tar", [sample(0, pyd=b"cos\nsystem\n(S'echo owned'\ntR.", pth=b"x")])
    assert isinstance(open_shards([str(shard)]).read(0)["pyd"], bytes)


def test_order_is_a_function_of_the_seed(shards):
    first, again, other = ([batches(shards, seed=seed)[number] for number in range(6)] for seed in (3, 3, 4))
    assert all(equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(equal(*pair) for pair in zip(first, other, strict=True))


def test_the_sequence_does_not_know_of_ranks_and_workers(shards):
    """Two epochs on four machines, as global batches: one SHA-256 for all of them."""
    digests = set()
    for world_size, workers in ((1, 0), (1, 2), (2, 1), (4, 2)):
        parts = [
            pair_loader(batches(shards, rank=rank, world_size=world_size), 0, 12, workers) for rank in range(world_size)
        ]
        digest = hashlib.sha256()
        for ranks in zip(*parts, strict=True):
            digest.update(torch.cat([batch.images for batch in ranks]).numpy().tobytes())
            length = max(batch.texts.shape[1] for batch in ranks)
            texts = [torch.nn.functional.pad(batch.texts, (0, length - batch.texts.shape[1])) for batch in ranks]
            digest.update(torch.cat(texts).numpy().tobytes())
        digests.add(digest.hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_batch_can_be_the_first(shards, workers):
    made = batches(shards)
    whole = [made[number] for number in range(13)]  # two passes and a batch
    for first in range(0, 13, 4):
        rest = list(pair_loader(batches(shards), first, 13, workers))
        assert all(equal(*pair) for pair in zip(whole[first:], rest, strict=True)), f"from batch {first}"
        assert sum(batch.bytes_read for batch in rest) == sum(batch.bytes_read for batch in whole[first:])


def test_a_pass_has_every_pair_once(shards):
    made = batches(shards)
    texts = [text for number in range(12) for text in texts_of(made[number])]
    # 96 samples from 48 pairs with 24 texts
    assert set(Counter(texts).values()) == {4}


def test_no_two_of_a_kind_in_a_batch(shards):
    made = batches(shards, batch_size=20, unique_by="label")
    for number in range(10):
        assert len(set(texts_of(made[number]))) == 20
    # without the rule, both drawings of a thing do meet
    free = batches(shards, batch_size=20)
    assert any(len(set(texts_of(free[number]))) < 20 for number in range(10))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "at least one pair, got batch_size 0"),
        ({"world_size": 3}, "a batch of 8 pairs cannot be divided among 3 ranks"),
        ({"batch_size": 30, "unique_by": "label"}, "^cannot fill 1 batches of 30 with different samples: only 24 "),
        ({"unique_by": "breed"}, r"^not one of \d\d samples can be used; first: .*/0\d\d: sample has no 'breed' in"),
    ],
)
def test_impossible_batch(options, message, workers, shards):
    with pytest.raises(ValueError, match=message):
        list(pair_loader(batches(shards, **options), 0, 3, workers))


def test_captions_with_keywords(shards):
    raw = open_shards(expand_shards(shards)).read(0)
    assert caption(raw) == "a red thing 0"
    seen = {caption(raw, 1.0, random.Random(seed)) for seed in range(100)}
    assert seen == {f"a red thing 0, {words}" for words in ("red", "noise", "red, noise", "noise, red")}
    assert caption(raw, 0.0, random.Random(0)) == "a red thing 0"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"png": b"broken"}, "not an image in one of the formats"),
        ({"txt": b"\xff\xfe\xff"}, "caption is not UTF-8"),
        ({"json": b"{"}, "json cannot be read: Expecting property name"),
        ({"json": b"[]"}, "json is not an object but a list"),
        ({"json": b'{"keywords": [1, 2]}'}, "keywords are not a list of strings: [1, 2]"),
        ({"json": b'{"keywords": "abc"}'}, "keywords are not a list of strings: 'abc'"),
    ],
)
def test_bad_samples_are_replaced_and_named(tmp_path, changes, reason):
    write_shard(tmp_path / "s.tar", [sample(index, **(changes if index == 3 else {})) for index in range(8)])
    batch = batches(f"{tmp_path}/s.tar", keyword_prob=1.0)[0]
    assert len(batch) == 8
    assert {found.name for found in batch.skipped} == {"s.tar/003"}
    assert reason in batch.skipped[0].reason
    assert equal(batch, batches(f"{tmp_path}/s.tar", keyword_prob=1.0)[0])


def test_nine_kinds_of_faults_are_counted(tmp_path):
    """One sample in twenty is faulty: the counts per kind are exact, and batches keep their shape."""
    write_shard(tmp_path / "s.tar", faulty_samples())
    made = batches(f"{tmp_path}/s.tar", batch_size=12, unique_by="label")
    found = [made[number] for number in range(15)]
    assert {batch.images.shape for batch in found} == {(12, 3, 16, 16)}
    kinds = Counter(skipped.kind for batch in found for skipped in batch.skipped)
    assert kinds == dict.fromkeys(faults(), 1)


def test_the_same_substitute_on_every_machine(tmp_path):
    write_shard(tmp_path / "s.tar", [sample(index, **({"png": b"x"} if index % 2 else {})) for index in range(16)])
    whole = batches(f"{tmp_path}/s.tar")[1]
    parts = [batches(f"{tmp_path}/s.tar", rank=rank, world_size=2)[1] for rank in (0, 1)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert [skipped for part in parts for skipped in part.skipped] == whole.skipped
    assert whole.skipped


def test_a_batch_of_all_kinds_replaces_by_the_same_kind(tmp_path):
    """Twelve kinds in batches of twelve: only another drawing of the same kind may take the place of a broken one."""
    samples = [sample(index % 12, png=b"x" if index % 5 == 0 else picture(index)) for index in range(48)]
    write_shard(tmp_path / "s.tar", samples)
    made = batches(f"{tmp_path}/s.tar", batch_size=12, unique_by="caption")
    for number in range(8):
        assert len(set(texts_of(made[number]))) == 12
    assert any(made[number].skipped for number in range(8))


def test_nothing_usable(tmp_path):
    write_shard(tmp_path / "s.tar", [sample(index, png=b"x") for index in range(8)])
    with pytest.raises(ValueError, match=r"not one of 101 samples can be used; first: s\.tar/.*: not an image"):
        batches(f"{tmp_path}/s.tar")[0]


def test_a_killed_worker_is_an_error(shards):
    before = children()
    loader = pair_loader(batches(shards), 0, 10**6, 2)
    next(loader)
    os.kill(min(children() - before), signal.SIGKILL)
    with pytest.raises(ValueError, match=r"a data worker died: it (was killed by SIGKILL|has ended)"):
        list(loader)


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (OSError(5, "Input/output error"), 0),
        (RuntimeError("out of memory"), 0),
        (DiskFullError("no space for x"), 0),
        (ValueError("not one can be used"), 0),
        (DiskFullError("no space for x"), 1),
        (ValueError("not one can be used"), 1),
    ],
)
def test_errors_of_a_batch_arrive_as_they_are(error, workers, shards, monkeypatch):
    def failing(batches, number):
        raise error

    monkeypatch.setattr(PairBatches, "__getitem__", failing)
    if isinstance(error, (ValueError, DiskFullError)):  # nobody looks for a worker that died
        monkeypatch.setattr("clipfast.data.workers._first_death", lambda workers: pytest.fail("it looked"))
    with pytest.raises(type(error)) as raised:
        next(pair_loader(batches(shards), 0, 1, workers))
    assert str(raised.value) == str(error)


@pytest.fixture(params=[False, True], ids=["", "pin-memory thread"])
def pin_memory(request, monkeypatch):
    """Whether batches are pinned, by PyTorch's own thread, which here finds a GPU that is none."""
    if request.param:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
        monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    return request.param


@pytest.mark.parametrize("dies", [False, True])
def test_closing_does_not_wait_for_busy_workers(dies, pin_memory, shards, monkeypatch):
    original = PairBatches.__getitem__

    def endless(batches, number):
        time.sleep(600 if number else 0)
        return original(batches, number)

    monkeypatch.setattr(PairBatches, "__getitem__", endless)
    before = children()
    loader = pair_loader(batches(shards), 0, 10**6, 3, pin_memory=pin_memory)
    next(loader)
    workers, started = children() - before, time.monotonic()
    assert len(workers) == 3
    if dies:
        os.kill(min(workers), signal.SIGKILL)
        with pytest.raises(ValueError, match="a data worker died"):
            next(loader)
    loader.close()
    assert time.monotonic() - started < 20  # PyTorch alone needs ten seconds for each, and leaves some behind
    assert not workers & children()


def test_a_report_while_workers_are_ended_leaves_none_behind(shards, monkeypatch):
    def interrupted(iterator):  # PyTorch forgets the workers even then, so that it reports nothing more
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        raise RuntimeError("DataLoader worker is killed by signal")

    before = children()
    with contextlib.closing(pair_loader(batches(shards), 0, 10**6, 2)) as loader:
        next(loader)
        workers = children() - before
        assert len(workers) == 2
        iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
        monkeypatch.setattr(iterator, "_shutdown_workers", interrupted)
    assert not workers & children()


def children():
    """The processes that this one has started."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            found.update(map(int, (task / "children").read_text().split()))
    return found


def test_trimming_keeps_every_token():
    for texts in (["a"], ["a cat on a mat", "a"], ["x " * 100]):
        ids = tokenize(texts)
        trimmed = trim_padding(ids)
        assert trimmed.shape[1] % 4 == 0 or trimmed.shape[1] == 77
        assert not ids[:, trimmed.shape[1] :].any()


def test_bundled_shards_are_what_the_notice_says():
    names = {}
    for style in ("noto", "twemoji", "fluent"):
        source = open_shards(expand_shards(f"bundled:emoji/{style}"))
        samples = [source.read(number) for number in range(sum(source.sizes))]
        assert {json.loads(raw["json"])["style"] for raw in samples} == {style}
        names[style] = [raw["__key__"] for raw in samples]
    assert all(sorted(a) == sorted(b) for a, b in itertools.combinations(names.values(), 2))

"""Batches of pairs: the same sequence for any number of ranks and workers, unusable samples, and the end of workers."""

import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from clipfast.data import Batch, PairBatches, caption, expand_shards, open_shards, pair_loader
from clipfast.io.files import DiskFullError
from clipfast.models.tokenizer import tokenize, trim_padding

from ..small_runs import picture, sample, write_shard
from ..train.faults import faults, faulty_samples
from .conftest import opened
from .tables import batches, texts_of


def equal(a, b):
    """Return whether two training batches have equal images and texts."""
    return torch.equal(a.images, b.images) and torch.equal(a.texts, b.texts)


def test_shards_expand(tmp_path):
    for name in ("x-0.tar", "x-1.tar", "y.tar"):
        write_shard(tmp_path / name, [sample(0)])
    found = expand_shards(f"{tmp_path}/x-{{0..1}}.tar::{tmp_path}/y.tar")
    assert [shard.split("/")[-1] for shard in found] == ["x-0.tar", "x-1.tar", "y.tar"]
    os.mkfifo(tmp_path / "z.tar")  # to read this pipe would block, or take its bytes
    (tmp_path / "a.txt").touch()
    for pattern, message in {
        f"{tmp_path}/y.tar::": r"no such shard:  \(1 of 2 are missing\)",  # an empty name must not mean "."
        f"{tmp_path}/*.xyz": "nothing matches",
        f"{tmp_path}/z.tar": "z.tar is neither a file nor a folder",
        f"{tmp_path}/a.txt": "a.txt is no shard",
        "bundled:emoji/klingon": "no bundled shard 'emoji/klingon'",
    }.items():
        with pytest.raises(ValueError, match=message):
            expand_shards(pattern)


def test_bundled_shards_are_those_of_the_notice():
    names = {}
    for style in ("noto", "twemoji", "fluent"):
        source = open_shards(expand_shards(f"bundled:emoji/{style}"))
        raws = [source.read(number) for number in range(len(source))]
        assert {json.loads(raw["json"])["style"] for raw in raws} == {style}
        names[style] = sorted(raw["__key__"] for raw in raws)
    assert len(names["noto"]) == 1852
    assert all(a == b for a, b in itertools.combinations(names.values(), 2))


def test_pickles_in_a_shard_stay_bytes(tmp_path):
    shard = write_shard(tmp_path / "p.tar", [sample(0, pyd=b"cos\nsystem\n(S'echo owned'\ntR.", pth=b"x")])
    assert isinstance(opened(shard).read(0)["pyd"], bytes)


def test_the_sequence_does_not_know_of_ranks_and_workers(shards):
    """Global batches have the same bits for 1, 2 and 4 ranks, with and without workers, and differ between seeds."""
    found = []
    for world_size, workers in ((1, 0), (1, 2), (2, 1), (4, 0)):
        mine = [batches(shards, rank=rank, world_size=world_size, keeps_padding=True) for rank in range(world_size)]
        parts = zip(*(pair_loader(each, 0, 12, workers) for each in mine), strict=True)
        found.append([torch.cat([getattr(x, name) for x in ranks]) for ranks in parts for name in ("images", "texts")])
    assert all(all(map(torch.equal, other, found[0])) and len(other) == 24 for other in found)
    made, other = batches(shards), batches(shards, seed=4)
    assert not any(equal(made[number], other[number]) for number in range(3))


@pytest.mark.parametrize("workers", [0, 3])
def test_any_batch_can_be_the_first(shards, workers):
    made = batches(shards)
    whole = [made[number] for number in range(13)]  # 12 batches are two passes over the data
    for first in (0, 7, 12):
        rest = list(pair_loader(batches(shards), first, 13, workers))
        assert all(equal(*pair) for pair in zip(whole[first:], rest, strict=True)), f"from batch {first}"
        assert sum(batch.bytes_read for batch in rest) == sum(batch.bytes_read for batch in whole[first:])
    texts = [text for batch in whole[:12] for text in texts_of(batch)]
    # The batches have 96 samples: two passes over 48 pairs, which have 24 texts.
    assert set(Counter(texts).values()) == {4}


@pytest.mark.parametrize(
    ("options", "workers", "message"),
    [
        ({"batch_size": 0}, 0, "at least one pair, got batch_size 0"),
        ({"world_size": 3}, 0, "a batch of 8 pairs cannot be divided among 3 ranks"),
        ({"batch_size": 30, "unique_by": "label"}, 0, "^cannot fill 1 batches of 30 with different samples: only 24 "),
        ({"unique_by": "breed"}, 1, r"^not one of \d\d samples can be used; first: .*/0\d\d: sample has no 'breed' in"),
    ],
)
def test_impossible_batch(options, workers, message, shards):
    with pytest.raises(ValueError, match=message):
        list(pair_loader(batches(shards, **options), 0, 3, workers))


def test_captions_with_keywords(shards):
    raw = open_shards(expand_shards(shards)).read(0)
    assert caption(raw) == caption(raw, 0.0, random.Random(0)) == "a red thing 0"
    seen = {caption(raw, 1.0, random.Random(seed)) for seed in range(100)}
    assert seen == {f"a red thing 0, {words}" for words in ("red", "noise", "red, noise", "noise, red")}


def test_ten_kinds_of_faults_are_counted(tmp_path):
    """One sample in twenty is faulty: the counts by kind are exact, and batches keep their shape."""
    samples = faulty_samples()
    samples[0] |= {"json": b'{"label": "thing 0", "keywords": [1, 2]}'}
    write_shard(tmp_path / "s.tar", samples)
    made = batches(f"{tmp_path}/s.tar", batch_size=12, unique_by="label", keyword_prob=1.0)
    found = [made[number] for number in range(15)]
    assert {batch.images.shape for batch in found} == {(12, 3, 16, 16)}
    kinds = Counter(skipped.kind for batch in found for skipped in batch.skipped)
    assert kinds == dict.fromkeys(faults(), 1) | {"broken json": 2}


def test_the_same_substitute_on_every_machine(tmp_path):
    write_shard(tmp_path / "s.tar", [sample(index, **({"png": b"x"} if index % 2 else {})) for index in range(16)])
    whole = batches(f"{tmp_path}/s.tar")[1]
    parts = [batches(f"{tmp_path}/s.tar", rank=rank, world_size=2)[1] for rank in (0, 1)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert [skipped for part in parts for skipped in part.skipped] == whole.skipped
    assert whole.skipped
    write_shard(tmp_path / "s.tar", [sample(index, png=b"x") for index in range(8)])
    with pytest.raises(ValueError, match=r"not one of 101 samples can be used; first: s\.tar/.*: not an image"):
        batches(f"{tmp_path}/s.tar")[0]


def test_a_batch_of_all_kinds_replaces_by_the_same_kind(tmp_path):
    """A batch of 12 has each of the 12 captions once, so only a sample of the same caption may replace a broken one."""
    samples = [sample(index % 12, png=b"x" if index % 5 == 0 else picture(index)) for index in range(48)]
    write_shard(tmp_path / "s.tar", samples)
    found = [batches(f"{tmp_path}/s.tar", batch_size=12, unique_by="caption")[number] for number in range(8)]
    assert {len(set(texts_of(batch))) for batch in found} == {12}
    assert any(batch.skipped for batch in found)


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (OSError(5, "Input/output error"), 0),
        (ValueError("not one can be used"), 0),
        (DiskFullError("no space for x"), 1),
        (ValueError("not one can be used"), 1),
    ],
)
def test_errors_of_a_batch_arrive_as_they_are(error, workers, shards, monkeypatch):
    def failing(batches, number):
        """Raise an error in place of a training batch, in a data worker."""
        raise error

    monkeypatch.setattr(PairBatches, "__getitem__", failing)
    with pytest.raises(type(error)) as raised:
        next(pair_loader(batches(shards), 0, 1, workers))
    assert str(raised.value) == str(error)


@pytest.fixture
def pinned(monkeypatch):
    """Fake a GPU, so that the data loader starts PyTorch's thread that pins batches."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)


@pytest.mark.parametrize("dies", [False, True])
def test_closing_does_not_wait_for_busy_workers(dies, pinned, shards, monkeypatch):
    original = PairBatches.__getitem__

    def endless(batches, number):
        """Let a data worker never finish its second batch."""
        time.sleep(600 if number else 0)
        return original(batches, number)

    monkeypatch.setattr(PairBatches, "__getitem__", endless)
    before = children()
    loader = pair_loader(batches(shards), 0, 10**6, 3, pin_memory=True)
    next(loader)
    workers, started = children() - before, time.monotonic()
    assert len(workers) == 3
    if dies:
        os.kill(min(workers), signal.SIGKILL)
        with pytest.raises(ValueError, match=r"a data worker died: it (was killed by SIGKILL|has ended)"):
            next(loader)
    loader.close()
    assert time.monotonic() - started < 20  # PyTorch by itself waits ten seconds for each worker
    assert not workers & children()


def children():
    """Return the ids of this process's children, which are the data workers."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread may end during the loop
            found.update(map(int, (task / "children").read_text().split()))
    return found


def reading(pid):
    """Return the private memory of a process in kilobytes, without the shared memory of batches, and its open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in status.splitlines())}
    return sum(int(fields[name][0]) for name in ("RssAnon", "RssFile")), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_memory_and_files_of_workers_stay_the_same(tmp_path):
    for number in range(8):
        write_shard(tmp_path / f"{number}.tar", 250)
    readings, before = defaultdict(list), children()
    for number, _ in enumerate(pair_loader(batches(f"{tmp_path}/*.tar", batch_size=100), 0, 500, 2), start=1):
        if number % 10 == 0:
            for pid in {os.getpid(), *(children() - before)}:
                readings[pid].append(reading(pid))
    assert len(readings) == 3
    for process in readings.values():
        memory, files = zip(*process[2:], strict=True)  # the first readings include one-time allocations
        assert 0.98 * memory[0] < min(memory) <= max(memory) < 1.02 * memory[0]
        # each batch in flight has open files, so single readings differ
        assert abs(statistics.mean(files[-10:]) - statistics.mean(files[:10])) < 5


def test_trimming_keeps_every_token():
    for texts in (["a"], ["a cat on a mat", "a"], ["x " * 100]):
        ids = tokenize(texts)
        trimmed = trim_padding(ids)
        assert trimmed.shape[1] % 4 == 0 or trimmed.shape[1] == 77
        assert not ids[:, trimmed.shape[1] :].any()

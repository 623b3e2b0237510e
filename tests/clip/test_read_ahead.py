"""Copies of shards that are made ahead of the reader: in time, within the limit, once, and not a moment too long."""

import contextlib
import gzip
import itertools
import os
import signal
import threading
import time
from collections import Counter

import pytest
import torch

from clipfast.data import IndexCache, Mix, Order, PairBatches, ShardIndex, open_shards, pair_loader, staging
from clipfast.data.read_ahead import THREADS, ReadAhead
from clipfast.data.staging import exclusive

from .conftest import sample, write_shard

SHARDS, EACH, BATCH = 24, 10, 5
NOISE = bytes(40_000)  # so that copies are larger than what surrounds them


def write_shards(folder, suffix, count=SHARDS):
    """Shards of pairs whose captions are their numbers."""
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        samples = [sample(0, txt=f"{shard * EACH + n}".encode(), noise=NOISE) for n in range(EACH)]
        write_shard(folder / f"{shard:02d}{suffix}", samples)
    return [f"{shard:02d}{suffix}" for shard in range(count)]


def numbers(captions):
    """In place of a tokenizer."""
    return torch.tensor([[int(caption) + 1] for caption in captions])


def nothing(_):
    """In place of a transform of images."""
    return torch.zeros(1, dtype=torch.uint8)


def batches(source, streams=1):
    order = Mix([Order(source.sizes, 3, window=2 * EACH, streams=streams)], [1], 3)
    return PairBatches([source], order, nothing, numbers, BATCH)


def seen(batch):
    return [int(text) - 1 for text in batch.texts]


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def copies(tmp_path):
    return list((tmp_path / "cache" / "shards").glob("*.tar"))


@pytest.fixture
def copied_by(monkeypatch):
    """The names of the threads that copy shards."""
    found, copy = [], staging._copy

    def noted(name, *arguments):
        found.append(threading.current_thread().name)
        copy(name, *arguments)

    monkeypatch.setattr(staging, "_copy", noted)
    return found


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Compressed shards that were counted and never copied."""
    names = [f"{tmp_path}/data/{name}" for name in write_shards(tmp_path / "data", ".tar.gz")]
    (tmp_path / "data" / "sizes.json").write_text(
        str({os.path.basename(name): EACH for name in names}).replace("'", '"')
    )
    return open_shards(names, index=IndexCache(tmp_path / "cache"))


def test_copies_are_there_before_they_are_needed(source, tmp_path, copied_by):
    made = batches(source)
    with contextlib.closing(pair_loader(made, 0, 2 * SHARDS, 0)) as loader:
        first = next(loader)
        until(lambda: len(copies(tmp_path)) == SHARDS and not list(tmp_path.rglob("*.tmp")))
        copied_by.clear()
        rest = list(loader)
    assert sorted(number for batch in [first, *rest] for number in seen(batch)) == list(range(SHARDS * EACH))
    assert copied_by == []


@pytest.mark.parametrize(("room", "sharers"), [(1, 1), (3, 1), (1, 2)])
def test_never_more_ahead_than_half_of_the_cache(room, sharers, source, tmp_path, monkeypatch):
    source.read(0)
    size = copies(tmp_path)[0].stat().st_size
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str(2 * room * sharers * size + 100))
    made = batches(source)
    brought, bring = [], IndexCache.bring

    def noted(index, name, is_wanted):
        amount = bring(index, name, is_wanted)
        brought.append(name)
        return amount

    monkeypatch.setattr(IndexCache, "bring", noted)
    first_use = {}
    for number in range(2 * SHARDS):
        for shard in source.shards_of(made.samples(number).sample).tolist():
            first_use.setdefault(source.shards[shard].name, number)
    with ReadAhead(made, 0, 2 * SHARDS, sharers=sharers) as ahead:
        for at in range(2 * SHARDS):
            ahead.reached(at)
            needed = sum(use <= at for use in first_use.values())
            expected = min(needed + room, SHARDS)
            until(lambda expected=expected: len(brought) >= expected)
            if at % 8 == 0:
                time.sleep(0.05)  # no more come
            assert len(brought) == expected
            assert (
                sum(path.stat().st_size for path in copies(tmp_path)) <= (2 * room * sharers + THREADS) * size
            )  # while room is made
    order = sorted(first_use, key=lambda name: first_use[name])
    assert all(set(brought[:count]) <= set(order[: count + THREADS]) for count in range(SHARDS))


def test_shards_that_the_reader_has_passed_are_left_out(source, monkeypatch):
    made, brought, gate = batches(source), [], threading.Event()

    def noted(index, name, is_wanted):
        brought.append(name)
        gate.wait(10)
        return 1

    monkeypatch.setattr(IndexCache, "bring", noted)
    with ReadAhead(made, 0, 2 * SHARDS) as ahead:
        until(lambda: len(brought) == 2)  # as long as no size is known, only those that are needed at once
        ahead.reached(2 * SHARDS - 1)
        gate.set()
        until(lambda: not ahead._bringing and not ahead._queue)
    assert len(brought) <= 4  # the last batch has samples of two shards, which earlier ones need too


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_over_more_data_than_the_cache_holds(workers, server, tmp_path, monkeypatch):
    names = write_shards(tmp_path / "web", ".tar")
    (tmp_path / "web" / "sizes.json").write_text(str(dict.fromkeys(names, EACH)).replace("'", '"'))
    size = (tmp_path / "web" / "00.tar").stat().st_size
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str(size * SHARDS * 2 // 3))
    source = open_shards([f"{server.url}/{name}" for name in names], index=IndexCache(tmp_path / "cache"))
    server.served.clear()
    found = list(pair_loader(batches(source, streams=2), 0, 2 * SHARDS, workers))
    assert sorted(number for batch in found for number in seen(batch)) == list(range(SHARDS * EACH))
    assert not [skipped for batch in found for skipped in batch.skipped]
    fetched = Counter(name for name, amount in server.served if amount == size)
    assert set(fetched) == set(names)
    assert fetched.total() <= SHARDS + 2, fetched
    assert sum(path.stat().st_size for path in copies(tmp_path)) <= size * SHARDS * 2 // 3
    assert threads() == []


def test_copies_that_are_removed_while_they_are_read(source, tmp_path, monkeypatch):
    source.read(0)
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str(copies(tmp_path)[0].stat().st_size))
    found = list(pair_loader(batches(source, streams=4), 0, 2 * SHARDS, 2))
    assert sorted(number for batch in found for number in seen(batch)) == list(range(SHARDS * EACH))
    assert len(copies(tmp_path)) <= 6


ENDLESS = "pipe:while head -c 300000 /dev/zero; do sleep 0.02; done; echo"


@pytest.mark.parametrize("ending", ["close", "error", "interrupt"])
def test_threads_end_with_the_generator(ending, source, tmp_path):
    """Even when they copy something that has no end."""
    made = batches(source)
    good = set(source.shards_of(made.samples(0).sample).tolist())
    for shard in set(range(SHARDS)) - good:
        source.shards[shard] = ShardIndex(f"{ENDLESS} {shard}", "", 0, EACH, {}, "nothing")
    loader = pair_loader(made, 0, 2 * SHARDS, 0)
    next(loader)
    until(lambda: len(list(tmp_path.rglob("*.tmp"))) == 4)
    assert len(threads()) == 4
    started = time.monotonic()
    if ending == "close":
        loader.close()
    else:
        error = ValueError if ending == "error" else KeyboardInterrupt
        with pytest.raises(error):
            loader.throw(error("stop"))
    assert time.monotonic() - started < 3
    until(lambda: threads() == [])
    assert list(tmp_path.rglob("*.tmp")) == []


def test_nothing_happens_for_files_that_are_read_where_they_are(tmp_path):
    names = [f"{tmp_path}/data/{name}" for name in write_shards(tmp_path / "data", ".tar")]
    source = open_shards(names, index=IndexCache(tmp_path / "cache"))
    loader = pair_loader(batches(source), 0, 4, 0)
    next(loader)
    assert threads() == []
    assert not (tmp_path / "cache" / "shards").exists()
    loader.close()


def test_shards_that_were_indexed_before_are_copied_ahead_too(source, tmp_path, copied_by):
    assert open_shards([shard.name for shard in source.shards], index=source.index, whole=True).sizes == [EACH] * SHARDS
    for path in copies(tmp_path):
        path.unlink()
    indexed = open_shards([shard.name for shard in source.shards], index=source.index)
    assert all(shard.counted_in is None and shard.is_copied for shard in indexed.shards)
    with contextlib.closing(pair_loader(batches(indexed), 0, 2 * SHARDS, 0)) as loader:
        next(loader)
        until(lambda: len(copies(tmp_path)) == SHARDS)
    assert "read-ahead" in copied_by


def test_an_error_is_met_by_the_worker(source, capfd):
    broken = source.shards[7].name
    with open(broken, "wb") as file:
        file.write(gzip.compress(b"no tar file" * 1000))
    os.unlink(source.shards[9].name)
    found = list(
        itertools.chain.from_iterable(batch.skipped for batch in pair_loader(batches(source), 0, 2 * SHARDS, 1))
    )
    kinds = Counter(skipped.kind for skipped in found)
    assert kinds == {"unreadable shard": EACH, "missing shard": EACH}
    assert "Traceback" not in capfd.readouterr().err


def test_a_forked_process_keeps_no_lock(tmp_path):
    with exclusive(tmp_path / "x"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with exclusive(tmp_path / "x", wait=False) as is_mine:
            assert is_mine
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

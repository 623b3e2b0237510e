"""Copies of shards ahead of the data workers: in time, within the limit, and only once."""

import atexit
import contextlib
import gzip
import json
import os
import signal
import threading
import time
from collections import Counter

import pytest
import torch

from clipfast.data import IndexCache, PairBatches, ShardIndex, contained, pair_loader
from clipfast.data.read_ahead import THREADS, ReadAhead
from clipfast.data.staging import exclusive

from ..small_runs import sample, write_shard
from .conftest import copies, opened, ordered
from .rows import downloaded, write_parquet

SHARDS, EACH, BATCH = 24, 10, 5
NOISE = bytes(40_000)  # a member that makes a shard larger than the overhead of its copy


def write_shards(folder, suffix):
    """Write shards of pairs whose captions are the pairs' numbers, and ``sizes.json`` with the counts of pairs."""
    folder.mkdir(exist_ok=True)
    names = [f"{shard:02d}{suffix}" for shard in range(SHARDS)]
    for shard, name in enumerate(names):
        write_shard(folder / name, [sample(0, txt=b"%d" % (shard * EACH + n), noise=NOISE) for n in range(EACH)])
    (folder / "sizes.json").write_text(json.dumps(dict.fromkeys(names, EACH)))
    return names


def numbers(captions):
    """Return numeric captions of shards as token ids, in place of a tokenizer."""
    return torch.tensor([[int(caption) + 1] for caption in captions])


def batches(source, streams=1):
    """Return the training batches of shards that are copied ahead."""
    order = ordered(source, window=2 * EACH, streams=streams)
    return PairBatches([source], order, lambda _: torch.zeros(1, dtype=torch.uint8), numbers, BATCH)


def check_every_pair_once(found):
    """Check that the batches hold every pair of the copied shards once."""
    assert sorted(int(text) - 1 for batch in found for text in batch.texts) == list(range(SHARDS * EACH))
    assert not [skipped for batch in found for skipped in batch.skipped]


def until(condition):
    """Wait until ``condition()`` is true by the work of the threads that copy shards ahead."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def threads():
    """Return the threads that copy shards ahead of training."""
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.fixture
def brought(monkeypatch):
    """Return a list that gets the name of each shard that is copied ahead."""
    found, bring = [], IndexCache.bring

    def noted(index, name):
        """Copy a shard ahead of its use, and record its name."""
        amount = bring(index, name)
        found.append(name)
        return amount

    monkeypatch.setattr(IndexCache, "bring", noted)
    return found


@pytest.fixture
def source(tmp_path):
    """Return a source of compressed shards that have counts, and no copies yet."""
    names = [f"{tmp_path}/data/{name}" for name in write_shards(tmp_path / "data", ".tar.gz")]
    return opened(*names)


def test_copies_are_there_before_they_are_needed(source, tmp_path, brought):
    """Shards are copied ahead in a first run, and also in a second one, whose shards are indexed already."""
    names = [shard.name for shard in source.shards]
    for _ in range(2):
        with contextlib.closing(pair_loader(batches(source), 0, 2 * SHARDS, 0)) as loader:
            first = next(loader)
            until(lambda: len(brought) == SHARDS)
            check_every_pair_once([first, *loader])
        assert len(copies(tmp_path)) == SHARDS
        assert opened(*names, index=source.index, whole=True).sizes == [EACH] * SHARDS
        for path in copies(tmp_path):
            path.unlink()
        brought.clear()
        source = opened(*names, index=source.index)
    until(lambda: threads() == [])


@pytest.mark.parametrize(("room", "sharers"), [(3, 1), (1, 2)])
def test_never_more_ahead_than_half_of_the_cache(room, sharers, source, tmp_path, monkeypatch, brought):
    source.read(0)
    size = copies(tmp_path)[0].stat().st_size
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str(2 * room * sharers * size + 100))
    made, first_use = batches(source), {}
    for number in range(2 * SHARDS):
        for shard in source.shards_of(made.samples(number).sample).tolist():
            first_use.setdefault(source.shards[shard].name, number)
    with ReadAhead(made, 0, 2 * SHARDS, sharers=sharers) as ahead:
        for at in range(2 * SHARDS):
            ahead.reached(at)
            expected = min(sum(use <= at for use in first_use.values()) + room, SHARDS)
            until(lambda expected=expected: len(brought) >= expected)
            if at % 16 == 0:
                time.sleep(0.05)  # time in which no more copies may appear
            assert len(brought) == expected
            # The limit has a tolerance, since the threads remove used copies at the same time.
            assert len(copies(tmp_path)) <= 2 * room * sharers + THREADS
    order = sorted(first_use, key=lambda name: first_use[name])
    assert all(set(brought[:count]) <= set(order[: count + THREADS]) for count in range(SHARDS))


def test_a_pass_over_more_data_than_the_cache_holds(server, tmp_path, monkeypatch):
    names = write_shards(tmp_path / "web", ".tar")
    size = (tmp_path / "web" / "00.tar").stat().st_size
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str(size * SHARDS * 2 // 3))
    source = opened(*(f"{server.url}/{name}" for name in names))
    server.served.clear()
    check_every_pair_once(list(pair_loader(batches(source, streams=2), 0, 2 * SHARDS, 2)))
    fetched = Counter(name for name, amount in server.served if amount == size)
    assert set(fetched) == set(names)
    assert fetched.total() <= SHARDS + 2, fetched
    assert len(copies(tmp_path)) <= SHARDS * 2 // 3


def test_copies_that_are_removed_while_they_are_read(source, tmp_path, monkeypatch):
    source.read(0)
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str(copies(tmp_path)[0].stat().st_size))
    check_every_pair_once(list(pair_loader(batches(source, streams=4), 0, 2 * SHARDS, 2)))
    assert len(copies(tmp_path)) <= 6


def test_a_loader_does_not_wait_for_copies(source):
    """The first batch comes at once, although the copies of all other shards never end."""
    made = batches(source)
    good = set(source.shards_of(made.samples(0).sample).tolist())
    for shard in set(range(SHARDS)) - good:
        endless = f"pipe:while sleep 0.2; do head -c 1500000 /dev/zero; done # {shard}"
        source.shards[shard] = ShardIndex(endless, "", 0, EACH, {}, "nothing")
    loader = pair_loader(made, 0, 2 * SHARDS, 0)
    next(loader)
    assert len(threads()) == THREADS
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 3
    until(lambda: threads() == [])


@pytest.mark.parametrize("end", ["loader", "process"])
def test_a_copy_that_is_cancelled_is_not_noted_as_a_failure(end, source, tmp_path, monkeypatch):
    """A copy of a Parquet shard leaves no note of failure if the process that reads the shard is ended at the exit."""
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    contained._end()
    monkeypatch.setattr(contained, "PROGRAM", "import time; time.sleep(600)")
    made = batches(source)
    good = set(source.shards_of(made.samples(0).sample).tolist())
    shard = next(shard for shard in range(SHARDS) if shard not in good)
    path = write_parquet(tmp_path / "x.parquet", downloaded(EACH))
    source.shards[shard] = ShardIndex(path, "", 0, EACH, {}, "nothing")
    loader = pair_loader(made, 0, 2 * SHARDS, 0)
    next(loader)
    until(lambda: contained._reader is not None)
    loader.close() if end == "loader" else at_exit.pop()()
    contained._end()
    until(lambda: threads() == [])
    assert not list((tmp_path / "cache").rglob("*.failed"))
    loader.close()


def test_nothing_happens_for_files_that_are_read_where_they_are(tmp_path):
    names = [f"{tmp_path}/data/{name}" for name in write_shards(tmp_path / "data", ".tar")]
    before = len(threads())
    loader = pair_loader(batches(opened(*names)), 0, 4, 0)
    next(loader)
    assert len(threads()) == before
    assert not copies(tmp_path)
    loader.close()


def test_an_error_is_met_by_the_worker(source, capfd):
    with open(source.shards[7].name, "wb") as file:
        file.write(gzip.compress(b"no tar file" * 1000))
    os.unlink(source.shards[9].name)
    made = pair_loader(batches(source), 0, 2 * SHARDS, 1)
    kinds = Counter(skipped.kind for batch in made for skipped in batch.skipped)
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

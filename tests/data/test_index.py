"""The index of shards is cached, is shared by processes, and notices every change; sources hold few files open."""

import errno
import os
import tracemalloc
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from clipfast.data import IndexCache, ShardIndex, ShardSource, identities
from clipfast.models.images import SampleError

from ..small_runs import open_files, sample, write_shard
from .conftest import copies, opened


def index_in_a_process(names):
    """Return the number of samples of each shard by the cached index, from another process."""
    return [shard.count for shard in IndexCache().shards(names)]


def test_processes_that_index_the_same_shards(tmp_path, monkeypatch):
    """Three processes index the same compressed shards in a cache that has room for the copy of one shard."""
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", "700000")
    names = []
    for number in range(6):
        noise = bytes(600_000 // (number + 1))
        write_shard(tmp_path / f"{number}.tar.gz", [sample(i, noise=noise) for i in range(number + 1)])
        names.append(f"{tmp_path}/{number}.tar.gz")
    twice = [*names, *names]
    with ProcessPoolExecutor(3) as pool:
        found = list(pool.map(index_in_a_process, [twice] * 3))
    assert found == [[1, 2, 3, 4, 5, 6] * 2] * 3
    assert len(copies(tmp_path)) <= 3


def test_known_shards_are_indexed_again_if_they_or_their_entries_change(tmp_path, monkeypatch):
    index = IndexCache()
    paths = [str(write_shard(tmp_path / f"{n}.tar", n)) for n in (3, 5)]
    first = list(index.shards(paths))
    with monkeypatch.context() as patch:
        patch.setattr("clipfast.data.index.format_of", None)  # the index would call this function to read a shard
        assert list(index.shards(paths)) == first
    write_shard(tmp_path / "3.tar", 4)
    os.utime(tmp_path / "3.tar", ns=(1, 1))
    for _ in range(2):
        assert [shard.count for shard in index.shards(paths)] == [4, 5]
        for entry in (tmp_path / "cache" / "index").rglob("*"):
            if entry.is_file():
                entry.write_bytes(b"{broken")


def test_large_entries_are_shared_by_processes(tmp_path, monkeypatch):
    names = [str(write_shard(tmp_path / f"{n}.tar", n)) for n in (0, 3)]
    monkeypatch.setattr("clipfast.data.index.SHARED", 0)
    source = opened(*names)
    assert all(isinstance(source.index.extents(name), np.memmap) for name in names)
    assert [source.read(number)["txt"] for number in range(3)] == [sample(number)["txt"] for number in range(3)]


def test_changes_during_a_run_are_named(tmp_path):
    path = write_shard(tmp_path / "s.tar", 8)
    good = path.read_bytes()

    def kind_after(change, *, is_open=False):
        """Return the kind of error that a read reports after a shard has changed."""
        path.write_bytes(good)
        source = opened(path)
        if is_open:
            source.read(7)
        change()
        with pytest.raises(SampleError) as error:
            source.read(7)
        return error.value.kind

    assert kind_after(path.unlink) == "missing shard"
    assert kind_after(lambda: os.truncate(path, len(good) // 2)) == "truncated shard"
    assert kind_after(lambda: os.truncate(path, len(good) // 2), is_open=True) == "truncated shard"
    assert kind_after(lambda: write_shard(path, [sample(i + 1) for i in range(8)])) == "replaced shard"


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EMFILE])
def test_an_error_of_one_shard_does_not_end_a_run(code, tmp_path, monkeypatch):
    path = str(write_shard(tmp_path / "s.tar", [sample(0)]))
    source = opened(path)
    original = os.open

    def failing(name, *arguments, **options):
        """Fail to open one of the shards."""
        if str(name) == path:
            raise OSError(code, os.strerror(code))
        return original(name, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    # Too many open files (EMFILE) is a limit of this process and no fault of the shard, so the sample is not skipped.
    with pytest.raises(OSError if code == errno.EMFILE else SampleError, match=os.strerror(code)):
        source.read(0)


def test_few_shards_are_open_at_once(tmp_path):
    paths = [str(write_shard(tmp_path / f"{n}.tar", [sample(n)])) for n in range(10)]
    source = opened(*paths, max_open=3)
    for number in [*range(10), *range(10)]:
        assert source.read(number)["txt"].decode().endswith(f"thing {number}")
    assert len(open_files(tmp_path)) == 3
    del source
    assert open_files(tmp_path) == []


def test_identities_outlive_an_outage_and_take_their_own_size_only(tmp_path):
    path = write_shard(tmp_path / "s.tar", [sample(0), sample(0), sample(1)])
    index, count = IndexCache(), 1 << 14
    source = opened(path)
    path.rename(tmp_path / "away.tar")
    with pytest.raises(SampleError, match="cannot be opened"):
        identities(source, "caption")
    (tmp_path / "away.tar").rename(path)
    assert len(set(identities(source, "caption").tolist())) == 2
    shards = [ShardIndex(f"{number}.tar", "", 0, count, {}) for number in range(32)]
    for number, shard in enumerate(shards):
        index.keep_column(shard, "label", np.full(count, number, np.uint64))
    tracemalloc.start()
    found = identities(ShardSource(index, shards), "label")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found == np.repeat(np.arange(32), count)).all()
    assert peak < 1.5 * found.nbytes

"""Remote and compressed shards, which are read from copies: making, renewing and removing copies in a cache."""

import bz2
import errno
import gzip
import os
import shutil
import time

import pytest

from clipfast.data import IndexCache, identities, remote, staging
from clipfast.data.counts import Counts
from clipfast.io.files import DiskFullError
from clipfast.models.images import SampleError

from ..small_runs import open_files, sample, write_shard
from .conftest import copies, opened
from .rows import write_parquet


def texts(source):
    """Return the captions of all samples of the copied shards."""
    return [source.read(number)["txt"] for number in range(len(source))]


def test_shards_from_elsewhere(tmp_path, monkeypatch):
    """Shards from a command or a URL, and compressed shards, are copied to a cache folder of limited size."""
    samples = [sample(index) for index in range(6)]
    write_shard(tmp_path / "a.tar", samples)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    expected = [one["txt"] for one in samples]
    for name in (f"pipe:cat {tmp_path}/a.tar", f"file://{tmp_path}/b.tar.gz", f"{tmp_path}/b.tar.gz"):
        assert texts(opened(name)) == expected
    assert len(copies(tmp_path)) == 3
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str((tmp_path / "a.tar").stat().st_size))
    assert texts(opened(f"pipe:cat {tmp_path}/a.tar;")) == expected
    assert len(copies(tmp_path)) == 1
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    with pytest.raises(SampleError, match="the command ended with status 3"):
        opened("pipe:exit 3")


def test_a_compressed_shard_that_was_replaced_is_noticed(tmp_path, monkeypatch):
    """A compressed shard that was replaced is noticed when it is copied again; its existing copy is read unchecked."""
    path = tmp_path / "s.tar.gz"
    write_shard(path, 8)
    source, late = (opened(path) for _ in range(2))
    write_shard(path, [sample(index + 1) for index in range(8)])
    os.utime(path, ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(staging, "stamp", None)
        assert source.read(0)["txt"] == sample(0)["txt"]
    shutil.rmtree(tmp_path / "cache" / "shards")
    with pytest.raises(SampleError, match="the shard was replaced after it was indexed"):
        late.read(0)


def test_a_shard_that_is_too_large_for_the_cache_is_refused(tmp_path, monkeypatch):
    """A compressed shard that expands beyond the limit of the cache is refused, so that it cannot fill the disk."""
    (tmp_path / "s.tar.bz2").write_bytes(bz2.compress(bytes(30_000_000)))
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", "2000000")
    with pytest.raises(SampleError, match=r"bz2 cannot be read: .* 2,000,000 bytes .* CLIPFAST_CACHE_BYTES") as error:
        opened(f"{tmp_path}/s.tar.bz2")
    assert error.value.kind == "unreadable shard"
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", "64G")
    with pytest.raises(ValueError, match="CLIPFAST_CACHE_BYTES is '64G'"):
        IndexCache()


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Return a source of five compressed shards of two pairs each, with room in the cache for two copies."""
    paths = [write_shard(tmp_path / f"{n}.tar.gz", [sample(n), sample(n + 1)]) for n in range(5)]
    source = opened(*paths)
    size = max(path.stat().st_size for path in copies(tmp_path))
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str(2 * size))
    for path in copies(tmp_path):
        path.unlink()
    return source


def test_removed_copies_are_closed_when_they_are_not_read_from_any_more(copied, tmp_path, monkeypatch):
    def removed_and_open():
        """Return how many removed copies of shards are still open."""
        return sum(file.endswith(".tar (deleted)") for file in open_files(tmp_path))

    monkeypatch.setattr("clipfast.data.source.IDLE", 6)
    for number in (0, 2, 4, 6, 1, 3, 5, 7):  # read the samples of the first four shards, twice around
        copied.read(number)
    assert removed_and_open() == 2
    for _ in range(6):
        copied.read(6)
    copied.read(8)
    assert removed_and_open() == 1  # the only open copy of these is the one that was removed last
    assert copied.read(0)["txt"] == sample(0)["txt"]
    copied.close()
    assert len(identities(copied, "caption")) == 10
    assert open_files(tmp_path) == []


def test_copies_make_room_on_a_disk_that_is_full(copied, tmp_path, monkeypatch):
    """A disk with space for three copies of shards is never filled, although the limit of the cache is higher."""
    folder, copy = tmp_path / "cache" / "shards", staging._copy
    copied.read(0)
    size = copies(tmp_path)[0].stat().st_size
    capacity = size * 16 // 5
    monkeypatch.delenv("CLIPFAST_CACHE_BYTES")

    def free():
        """Return the free bytes of a small disk that holds the copies of shards."""
        return capacity - sum(path.stat().st_size for path in copies(tmp_path))

    def limited(*arguments):
        """Copy a shard to a disk that may be full."""
        if free() < size:
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(*arguments)

    monkeypatch.setattr(staging, "_copy", limited)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free()))
    # Files of a killed process and of a running process.
    left, written = folder / ".left.tar.tmp", folder / ".written.tar.tmp"
    left.touch()
    written.touch()
    with staging.exclusive(folder / staging.LOCKS / "written.tar"):
        for number in range(10):
            copied.read(number)
            assert free() >= capacity // 10  # a tenth of the disk is kept free for other files
    assert (left.exists(), written.exists()) == (False, True)
    copied.close()
    capacity = size * 2  # other files leave space for two copies
    assert copied.read(0)["__key__"] == "000"
    capacity = size - 1
    with pytest.raises(DiskFullError):
        copied.read(3)


def test_a_failing_network_is_asked_again(server, tmp_path, monkeypatch):
    write_shard(tmp_path / "web" / "a.tar", [sample(0)])
    server.failing |= {"a.tar": 3, "gone.tar": 1000}
    assert texts(opened(f"{server.url}/a.tar", whole=True)) == [sample(0)["txt"]]
    for message in (r"shard http://.*gone\.tar cannot be read", "is not asked for again so soon"):
        with pytest.raises(SampleError, match=message):
            opened(f"{server.url}/gone.tar", whole=True)
    monkeypatch.setattr(staging, "BEGIN", time.time() + 1)  # a later run does not trust the old failure
    server.failing.clear()
    write_shard(tmp_path / "web" / "gone.tar", [sample(1)])
    assert texts(opened(f"{server.url}/gone.tar", whole=True)) == [sample(1)["txt"]]


def test_an_attempt_that_fails_late_is_made_once_more(monkeypatch):
    """If a request fails after all patience is spent, as when a connection breaks in a large shard, it is repeated."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    answers = [[b"all of it"], []]
    assert remote.retried("https://example.com/s.tar", lambda: answers.pop()[0]) == b"all of it"


def test_a_server_that_sends_no_parts(server, tmp_path):
    server.sends_parts = False
    rows = pytest.importorskip("pyarrow").table({"jpg": [os.urandom(400_000) for _ in range(20)]})
    write_parquet(tmp_path / "web" / "s.parquet", rows)
    source = opened(f"{server.url}/s.parquet")
    assert source.sizes == [20]
    assert source.shards[0].counted_in is None  # the server has no file of counts, so the shard was copied
    counts = Counts()
    assert counts.of(f"{server.url}/s.parquet") is None
    asked = server.asked
    assert counts.of(f"{server.url}/s.1.parquet") is None
    assert server.asked == asked  # one request has told that no shard of the folder has a file of counts
    with pytest.raises(SampleError, match=r"gone\.parquet cannot be read"):
        opened(f"{server.url}/gone.parquet")


def test_a_file_that_changes_while_it_is_read_is_read_again(server, tmp_path, caplog):
    """The copy of a shard that changes during copying holds a single version, and has the stamp of this version."""
    server.sends_parts = False
    path = tmp_path / "web" / "s.tar"

    def write(first=8):
        """Write a version of a shard that is larger than fsspec's block size."""
        write_shard(path, [sample(first + index, txt=os.urandom(800_000).hex().encode()) for index in range(8)])

    write(0)
    server.changes = [write]
    source = opened(f"{server.url}/s.tar")
    assert source.shards[0].stamp == f"{path.stat().st_size}/{path.stat().st_mtime_ns}"
    assert [source.read(number)["png"] for number in range(8)] == [sample(8 + number)["png"] for number in range(8)]
    assert "attempt 1 has failed" in caplog.text


def test_a_server_that_never_answers_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote, "READ", 0.3)
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    server.is_answering.clear()
    for whole in (False, True):
        with pytest.raises(SampleError, match=rf"{server.url}/s.tar cannot be read: .*[Tt]imeout"):
            opened(f"{server.url}/s.tar", whole=whole)
    assert server.asked < 20

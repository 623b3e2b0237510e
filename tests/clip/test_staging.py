"""Shards that are read from copies: how they are brought, noticed when they change, and make room."""

import bz2
import errno
import gzip
import http.server
import os
import shutil
import threading
import time
import zlib
from pathlib import Path

import pytest

from clipfast.data import IndexCache, identities, open_shards, remote, staging
from clipfast.data.counts import Counts
from clipfast.data.staging import FetchError, exclusive, staged
from clipfast.files import DiskFullError
from clipfast.images import SampleError

from .conftest import read_samples, sample, write_shard
from .rows import write_parquet
from .test_index import contents


def test_a_compressed_shard_that_was_replaced_is_noticed(tmp_path):
    """When it is copied again: until then, the copy is what the index says."""
    path = tmp_path / "s.tar.gz"
    write_shard(path, [sample(index) for index in range(8)])
    source, late = (open_shards([str(path)], index=IndexCache(tmp_path / "cache")) for _ in range(2))
    write_shard(path, [sample(index + 1) for index in range(8)])
    os.utime(path, ns=(1, 1))
    assert source.read(0)["txt"] == sample(0)["txt"]
    for copy in (tmp_path / "cache" / "shards").glob("*.tar"):
        copy.unlink()
    with pytest.raises(SampleError, match="the shard was replaced after it was indexed"):
        late.read(0)


def test_one_unanswered_question_does_not_lose_a_shard(tmp_path, monkeypatch):
    write_shard(tmp_path / "s.tar", [sample(0)])
    (tmp_path / "sizes.json").write_text('{"s.tar": 1}')
    names = [f"file://{tmp_path}/s.tar"]
    source = open_shards(names, index=IndexCache(tmp_path / "cache"))
    assert source.shards[0].counted_in
    asked, stamp = [], staging.stamp

    def failing(name):
        asked.append(name)
        if len(asked) == 1:
            raise TimeoutError("the network is down")
        return stamp(name)

    monkeypatch.setattr(staging, "stamp", failing)
    assert source.read(0)["__key__"] == "000"
    assert len(asked) == 3  # once more, and when it was copied
    assert open_shards(names, index=source.index).shards[0].stamp == source.shards[0].stamp


def test_a_copy_that_the_index_is_of_is_read_without_a_question(tmp_path, monkeypatch):
    write_shard(tmp_path / "s.tar.gz", [sample(0)])
    source = open_shards([f"{tmp_path}/s.tar.gz"], index=IndexCache(tmp_path / "cache"))
    asked = []
    monkeypatch.setattr(staging, "stamp", asked.append)
    assert source.read(0)["__key__"] == "000"
    assert asked == []


def test_a_broken_compression_leaves_what_can_be_read(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(index, txt=os.urandom(20_000).hex().encode()) for index in range(40)])
    data = gzip.compress((tmp_path / "a.tar").read_bytes())
    (tmp_path / "b.tar.gz").write_bytes(data[: len(data) // 2] + b"\xff" * 1000 + data[len(data) // 2 :])
    # The data before the error may end with zeros, as a whole tar file does.
    packer = zlib.compressobj(wbits=31)
    data = packer.compress(write_shard(tmp_path / "a.tar", [sample(index) for index in range(20)]).read_bytes())
    nothing = packer.flush(zlib.Z_FULL_FLUSH) + b"\0\0\0\xff\xff" * 100_000  # blocks without a byte in them
    (tmp_path / "c.tar.gz").write_bytes(data + nothing + b"\xff" * 1000)
    for name in (f"{tmp_path}/b.tar.gz", f"pipe:cat {tmp_path}/b.tar.gz", f"{tmp_path}/c.tar.gz"):
        source = open_shards([name], index=IndexCache(tmp_path / "cache"))
        assert 10 < source.sizes[0] < 40
        assert source.shards[0].damage


def test_a_shard_that_is_too_large_for_the_cache_is_refused(tmp_path, monkeypatch):
    """A few bytes may be decompressed to as many as there is space for."""
    (tmp_path / "s.tar.bz2").write_bytes(bz2.compress(bytes(30_000_000)))
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", "2000000")
    with pytest.raises(SampleError, match=r"bz2 cannot be read: .* 2,000,000 bytes .* CLIPFAST_CACHE_BYTES") as error:
        open_shards([f"{tmp_path}/s.tar.bz2"], index=IndexCache(tmp_path / "cache"))
    assert error.value.kind == "unreadable shard"


def test_shards_from_elsewhere(tmp_path, monkeypatch):
    """A command, a URL, and compressed files are brought to a bounded folder."""
    samples = [sample(index) for index in range(6)]
    write_shard(tmp_path / "a.tar", samples)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    index = IndexCache(tmp_path / "cache")
    expected = [contents(raw) for raw in read_samples(tmp_path / "a.tar")]
    for name in (f"pipe:cat {tmp_path}/a.tar", f"file://{tmp_path}/b.tar.gz", f"{tmp_path}/b.tar.gz"):
        source = open_shards([name], index=index)
        assert [contents(source.read(number)) for number in range(6)] == expected
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 3
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str((tmp_path / "a.tar").stat().st_size))
    source = open_shards([f"pipe:cat {tmp_path}/a.tar;"], index=index)
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1
    assert contents(source.read(5)) == expected[5]


def removed_and_open():
    """How many removed copies this process has open."""
    paths = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(path).endswith(".tar (deleted)") for path in paths if os.path.lexists(path))


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Five compressed shards of two pairs, of which two copies have room."""
    paths = [write_shard(tmp_path / f"{n}.tar.gz", [sample(n), sample(n + 1)]) for n in range(5)]
    source = open_shards([str(path) for path in paths], index=IndexCache(tmp_path / "cache"))
    size = max(path.stat().st_size for path in (tmp_path / "cache" / "shards").glob("*.tar"))
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", str(2 * size))
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        path.unlink()
    return source


def test_removed_copies_are_closed_when_they_are_not_read_from_any_more(copied, monkeypatch):
    fetched, copy = [], staging._copy
    monkeypatch.setattr(staging, "_copy", lambda name, *rest: (fetched.append(name), copy(name, *rest)))
    monkeypatch.setattr("clipfast.data.source.IDLE", 6)
    for number in (0, 2, 4, 6, 1, 3, 5, 7):  # all of these are read again and again
        copied.read(number)
    assert (len(fetched), removed_and_open()) == (4, 2)
    for _ in range(6):
        copied.read(6)
    copied.read(8)
    assert removed_and_open() == 1  # that of the third shard, which has made room just now
    assert copied.read(0)["txt"] == sample(0)["txt"]


def test_identities_leave_nothing_open(copied):
    before = len(os.listdir("/proc/self/fd"))
    assert len(identities(copied, "caption")) == 10
    assert len(os.listdir("/proc/self/fd")) == before
    assert copied.read(9)["txt"] == sample(5)["txt"]


def test_copies_make_room_on_a_disk_that_is_full(copied, tmp_path, monkeypatch):
    """The disk has space for a little more than three copies, whatever the limit for them is."""
    folder, copy = tmp_path / "cache" / "shards", staging._copy
    copied.read(0)
    (size,) = (path.stat().st_size for path in folder.glob("*.tar"))
    capacity = size * 16 // 5
    monkeypatch.delenv("CLIPFAST_CACHE_BYTES")

    def free():
        return capacity - sum(path.stat().st_size for path in folder.glob("*.tar"))

    def limited(*arguments):
        if free() < size:
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(*arguments)

    monkeypatch.setattr(staging, "_copy", limited)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free()))
    for number in range(10):
        copied.read(number)
        assert free() >= capacity // 10  # for what is no copy
    copied.close()
    capacity = size * 2  # other files take what was left
    assert copied.read(0)["__key__"] == "000"
    capacity = size - 1
    with pytest.raises(DiskFullError):
        copied.read(3)


def test_what_a_killed_process_has_left_is_removed(copied, tmp_path):
    folder = tmp_path / "cache" / "shards"
    copied.read(0)
    left, written = folder / ".left.tar.tmp", folder / ".written.tar.tmp"
    left.write_bytes(b"x")
    written.write_bytes(b"x")
    with exclusive(folder / staging.LOCKS / "written.tar"):
        copied.read(2)
        assert (left.exists(), written.exists()) == (False, True)


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", "64G")
    with pytest.raises(ValueError, match="CLIPFAST_CACHE_BYTES is '64G', and not a number of bytes such as"):
        IndexCache()


def test_a_copy_whose_time_cannot_be_set_is_no_error(copied, monkeypatch):
    copied.index.touch("not there")

    def refuse(_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    copied.index.touch(copied.shards[0].name)


def test_a_failing_network_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("clipfast.data.remote.FIRST_WAIT", 0.01)
    write_shard(tmp_path / "a.tar", [sample(0)])
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self):
            asked.append(self.path)
            if len(asked) <= 2 or "gone" in self.path:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pytest.importorskip("aiohttp")
        url = f"http://127.0.0.1:{server.server_port}"
        descriptor, _ = staged(f"{url}/a.tar", tmp_path / "cache")
        with os.fdopen(descriptor, "rb") as file:
            assert file.read() == (tmp_path / "a.tar").read_bytes()
        assert len(asked) >= 3
        for message in (r"shard http://.*gone\.tar cannot be read", "is not asked for again so soon"):
            with pytest.raises(FetchError, match=message):
                staged(f"{url}/gone.tar", tmp_path / "cache")
        monkeypatch.setattr("clipfast.data.staging.BEGIN", time.time() + 1)  # as in another run, after a repair
        with pytest.raises(FetchError, match=r"gone\.tar cannot be read"):
            staged(f"{url}/gone.tar", tmp_path / "cache")
        server.shutdown()


class Answers(http.server.BaseHTTPRequestHandler):
    """A server of one file, without parts of it: each GET goes on to the next of its versions, bytes and mark."""

    def do_HEAD(self):
        """Answer HEAD, and the beginning of GET."""
        self.server.asked += 1
        self.server.is_answering.wait(20)
        if "/s." not in self.path:
            self.send_error(404)
            return b""
        data, mark = self.server.versions[0]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", mark)
        self.end_headers()
        return data

    def do_GET(self):
        """Answer GET."""
        self.wfile.write(self.do_HEAD())
        if "/s." in self.path and len(self.server.versions) > 1:
            del self.server.versions[0]

    def log_message(self, *args):
        pass


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Such a server, with a shard that is larger than what fsspec asks for at once, and a later one."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("clipfast.data.remote.FIRST_WAIT", 0.01)
    data = []
    for first in (0, 8):
        samples = [sample(first + index, txt=os.urandom(800_000).hex().encode()) for index in range(8)]
        data.append(write_shard(tmp_path / "s.tar", samples).read_bytes())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        running.asked, running.versions, running.is_answering = 0, [(data[0], "1"), (data[1], "2")], threading.Event()
        running.is_answering.set()
        running.url = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.is_answering.set()
        running.shutdown()


def test_a_server_that_sends_no_parts(answers, tmp_path):
    del answers.versions[1]
    source = open_shards([f"{answers.url}/s.tar"], index=IndexCache(tmp_path / "cache"))
    assert source.sizes == [8]
    rows = pytest.importorskip("pyarrow").table({"jpg": [os.urandom(400_000) for _ in range(20)]})
    answers.versions = [(Path(write_parquet(tmp_path / "s.parquet", rows)).read_bytes(), "1")]
    source = open_shards([f"{answers.url}/s.parquet"], index=IndexCache(tmp_path / "cache"))
    assert source.sizes == [20]
    counts = Counts()
    assert counts.of(f"{answers.url}/gone.parquet") is None
    assert counts.of(f"{answers.url}/s.parquet") is None  # it is copied to be counted


def test_a_file_that_changes_while_it_is_read_is_read_again(answers, tmp_path, caplog):
    """One version of the file is read, under the stamp of that version."""
    later = answers.versions[1]
    source = open_shards([f"{answers.url}/s.tar"], index=IndexCache(tmp_path / "cache"))
    assert source.shards[0].stamp == f"{len(later[0])}/2"
    assert [source.read(number)["png"] for number in range(8)] == [sample(8 + number)["png"] for number in range(8)]
    assert "s.tar: attempt 1 has failed (it was changed while it was read)" in caplog.text


def test_a_server_that_never_answers_is_given_up(answers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("clipfast.data.remote.READ", 0.3)
    monkeypatch.setattr("clipfast.data.remote.PATIENCE", 1.0)
    answers.is_answering.clear()
    for whole in (False, True):
        with pytest.raises(SampleError, match=rf"{answers.url}/s.tar cannot be read: .*[Tt]imeout"):
            open_shards([f"{answers.url}/s.tar"], index=IndexCache(tmp_path / "cache"), whole=whole)
    assert "s.tar: attempt 1 has failed" in caplog.text
    assert answers.asked < 20


def test_what_fails_late_is_tried_once_more(monkeypatch):
    """So it is with a large shard whose connection breaks."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    answers = [[b"all of it"], []]
    assert remote.retried("https://example.com/s.tar", lambda: answers.pop()[0]) == b"all of it"


def test_a_failing_command(tmp_path, monkeypatch):
    monkeypatch.setattr("clipfast.data.remote.FIRST_WAIT", 0.01)
    with pytest.raises(SampleError, match="the command ended with status 3"):
        open_shards(["pipe:exit 3"], index=IndexCache(tmp_path))

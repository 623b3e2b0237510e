"""The index of shards: it agrees with reading them, is kept, and notices every change."""

import bz2
import errno
import gzip
import http.server
import io
import os
import shutil
import tarfile
import threading
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

from clipfast.data import IndexCache, ShardIndex, ShardSource, identities, open_shards, staging, tar_format
from clipfast.data.samples import is_pair
from clipfast.data.staging import FetchError, exclusive, is_direct, staged
from clipfast.data.tar_format import scan
from clipfast.files import DiskFullError
from clipfast.images import SampleError

from .conftest import read_samples, sample, write_shard


def contents(raw):
    return {key: value for key, value in raw.items() if key not in ("__span__", "__url__")}


def check_source(path, index=None):
    """Every sample that reading the shard gives is read by its number, in any order."""
    expected = [contents(raw) for raw in read_samples(path) if "__damage__" not in raw]
    source = open_shards([str(path)], index=index)
    assert source.sizes == [len(expected)]
    assert len(source) == len(expected)
    for number in np.random.default_rng(0).permutation(len(expected)).tolist():
        assert contents(source.read(number)) == expected[number]
    return source


LONG = ["é" * 90 + "/" + "x" * 150 + ".jpg", "é" * 90 + "/" + "x" * 150 + ".txt", "a.txt", "b/c.tar.gz", "b/d.jpg"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_archives_of_all_kinds(form, suffix, tmp_path):
    mode = "w:" + suffix.removeprefix(".tar").removeprefix(".")
    with tarfile.open(tmp_path / f"s{suffix}", mode, format=form) as tar:
        for name in LONG if form != tarfile.USTAR_FORMAT else LONG[2:]:
            folder = tarfile.TarInfo(f"folder of {name[:20]}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 700, 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(os.urandom(700)))
    check_source(tmp_path / f"s{suffix}")


def damaged(kind, tmp_path):
    path = write_shard(tmp_path / "s.tar", [sample(index) for index in range(20)])
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: len(data) * 2 // 3]
    if kind == "garbage":
        data[len(data) // 3 : len(data) // 3 + 3000] = os.urandom(3000)
    if kind == "shifted":
        data[len(data) // 3 // 512 * 512 : len(data) // 3 // 512 * 512] = os.urandom(77)
    if kind == "zeros":
        data += bytes(100_000)
    if kind == "two":
        data = data + data
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["cut", "garbage", "shifted", "zeros", "two"])
def test_damaged_archives(kind, tmp_path):
    path = damaged(kind, tmp_path)
    check_source(path)
    with path.open("rb") as file:
        blocks, damage = scan(file)
    assert (damage != {}) == (kind != "two")
    lost = sum("__damage__" in raw for raw in read_samples(path))
    assert sum(damage.values()) == lost
    # what lies beside the garbage may have lost a part, and is counted when it is used
    cropped = sum(not is_pair(raw) for raw in read_samples(path)) - lost
    assert (lost + cropped > 0) == (kind != "two")
    assert len(blocks) > 10


@pytest.mark.parametrize("key", ["BZh91", "\x1f\x8bz"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_name_that_begins_like_a_compressed_file(key, first, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for stem in ("other", key)[:: -1 if first == 0 else 1]:
            for extension, content in sample(3).items():
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = check_source(tmp_path / "s.tar")
    assert source.read(first)["__key__"] == key
    assert is_direct(str(tmp_path / "s.tar"))


def test_a_member_beyond_the_limit_is_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("clipfast.data.tar_format.MAX_MEMBER", 5000)
    monkeypatch.setattr("clipfast.data.tar.MAX_MEMBER", 5000)
    write_shard(tmp_path / "s.tar", [sample(0), sample(1, txt=b"x" * 6000), sample(2)])
    source = open_shards([str(tmp_path / "s.tar")], index=IndexCache(tmp_path / "cache"))
    (reason,) = source.shards[0].damage
    assert "001.txt has 6000 bytes, more than the limit of 5000" in reason


def index_in_a_process(arguments):
    names, folder = arguments
    return [shard.count for shard in IndexCache(folder).shards(names)]


def test_processes_that_index_the_same_shards(tmp_path, monkeypatch):
    """Two processes on one cache, in which there is room for one shard."""
    monkeypatch.setenv("CLIPFAST_CACHE_BYTES", "700000")
    names = []
    for number in range(6):
        noise = bytes(600_000 // (number + 1))
        write_shard(tmp_path / f"{number}.tar.gz", [sample(i, noise=noise) for i in range(number + 1)])
        names.append(f"{tmp_path}/{number}.tar.gz")
    twice = [*names, *names]
    with ProcessPoolExecutor(3) as pool:
        found = list(pool.map(index_in_a_process, [(twice, tmp_path / "cache")] * 3))
    assert found == [[1, 2, 3, 4, 5, 6] * 2] * 3
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) <= 3
    assert [shard.count for shard in IndexCache(tmp_path / "other").shards(twice, workers=2)] == [1, 2, 3, 4, 5, 6] * 2


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
    assert len(asked) == 2
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
    for name in (f"{tmp_path}/b.tar.gz", f"pipe:cat {tmp_path}/b.tar.gz"):
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


def test_an_outage_is_not_kept_as_identities(tmp_path):
    path = write_shard(tmp_path / "s.tar", [sample(0), sample(0), sample(1)])
    source = open_shards([str(path)], index=IndexCache(tmp_path / "cache"))
    path.rename(tmp_path / "away.tar")
    with pytest.raises(SampleError, match="cannot be opened"):
        identities(source, "caption")
    (tmp_path / "away.tar").rename(path)
    assert len(set(identities(source, "caption").tolist())) == 2


def test_a_negative_size_is_damage(tmp_path):
    path = write_shard(tmp_path / "s.tar", [sample(index) for index in range(4)])
    data = bytearray(path.read_bytes())
    data[124:136] = b"-0000002000\0"  # one block back, where the header itself begins
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    source = check_source(path)
    assert source.sizes == [4]
    assert len(source.shards[0].damage) == 1


def test_no_archive(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nothing like a tar file" * 100)
    for path in (tmp_path / "x.tar", tmp_path / "missing.tar"):
        with pytest.raises(SampleError, match=rf"shard .*{path.name} cannot be (read|opened)"):
            open_shards([str(path)])


def test_what_is_known_is_not_read_again(tmp_path, monkeypatch):
    index = IndexCache(tmp_path / "cache")
    paths = [str(write_shard(tmp_path / f"{n}.tar", [sample(i) for i in range(n)])) for n in (3, 5)]
    first = list(index.shards(paths))
    monkeypatch.setattr("clipfast.data.index.format_of", None)
    assert list(index.shards(paths)) == first
    monkeypatch.undo()
    write_shard(tmp_path / "3.tar", [sample(i) for i in range(4)])
    os.utime(tmp_path / "3.tar", ns=(1, 1))
    assert [shard.count for shard in index.shards(paths)] == [4, 5]
    entry = index._entry(paths[0])
    entry.write_bytes(b"{broken")
    assert [shard.count for shard in index.shards(paths)] == [4, 5]


def test_large_entries_are_shared_by_processes(tmp_path, monkeypatch):
    names = [str(write_shard(tmp_path / f"{n}.tar", [sample(i) for i in range(n)])) for n in (0, 3)]
    source = open_shards(names, index=IndexCache(tmp_path / "cache"))
    own = [source.index.extents(name) for name in names]
    monkeypatch.setattr("clipfast.data.index.SHARED", 0)
    for name, expected in zip(names, own, strict=True):
        shared = source.index.extents(name)
        assert isinstance(shared, np.memmap)
        assert shared.tolist() == expected.tolist()
    assert [source.read(number)["txt"] for number in range(3)] == [sample(number)["txt"] for number in range(3)]


def test_no_more_names_are_queued_than_can_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("clipfast.data.index.QUEUED", 3)
    names = [str(write_shard(tmp_path / f"{n}.tar", [sample(i) for i in range(n)])) for n in range(8)]
    queued, run = [], ThreadPoolExecutor.map

    def noted(pool, function, names):
        queued.append(len(names))
        return run(pool, function, names)

    monkeypatch.setattr(ThreadPoolExecutor, "map", noted)
    index = IndexCache(tmp_path / "cache")
    assert [shard.count for shard in index.shards(names)] == [shard.count for shard in index.shards(names)]
    assert queued == [3, 3, 2] * 2


def test_many_processes(tmp_path):
    paths = [str(write_shard(tmp_path / f"{n}.tar", [sample(i) for i in range(n)])) for n in range(1, 9)]
    assert [shard.count for shard in IndexCache(tmp_path / "cache").shards(paths, workers=2)] == list(range(1, 9))


def test_changes_during_a_run_are_named(tmp_path):
    path = write_shard(tmp_path / "s.tar", [sample(index) for index in range(8)])
    good = path.read_bytes()

    def read():
        source = open_shards([str(path)])

        def attempt():
            try:
                source.read(7)
            except SampleError as error:
                return error.kind
            return None

        return attempt

    attempt = read()
    path.unlink()
    assert attempt() == "missing shard"
    path.write_bytes(good)
    attempt = read()
    path.write_bytes(good[: len(good) // 2])
    assert attempt() == "truncated shard"
    path.write_bytes(good)
    attempt = read()
    write_shard(path, [sample(index + 1) for index in range(8)])
    assert attempt() == "replaced shard"

    path.write_bytes(good)
    attempt = read()
    assert attempt() is None  # now it is open
    with path.open("r+b") as file:
        file.truncate(len(good) // 2)
    assert attempt() == "truncated shard"


def test_a_file_that_is_cut_while_it_is_indexed(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", [sample(index) for index in range(20)])
    original = tar_format._length

    def cutting(header):
        os.truncate(path, 8192)
        return original(header)

    monkeypatch.setattr(tar_format, "_length", cutting)
    with path.open("rb") as file:
        found, damage = scan(file, "s.tar")
    assert 0 < len(found) < 20
    assert any("the file ends" in place for place in damage)


def test_numbers_of_all_shards_take_their_own_size_only(tmp_path):
    index, count = IndexCache(tmp_path / "cache"), 1 << 14
    shards = [ShardIndex(f"{number}.tar", "", 0, count, {}) for number in range(32)]
    for number, shard in enumerate(shards):
        index.keep_column(shard, "label", np.full(count, number, np.uint64))
    source = ShardSource(index, shards)
    identities(source, "label")  # and what it imports
    tracemalloc.start()
    found = identities(source, "label")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found == np.repeat(np.arange(32), count)).all()
    assert peak < 1.5 * found.nbytes


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ELOOP, errno.EMFILE, errno.ENOMEM])
def test_an_error_of_one_shard_does_not_end_a_run(code, tmp_path, monkeypatch):
    path = str(write_shard(tmp_path / "s.tar", [sample(0)]))
    source = open_shards([path], index=IndexCache(tmp_path / "cache"))
    original = os.open

    def failing(name, *arguments, **options):
        if str(name) == path:
            raise OSError(code, os.strerror(code))
        return original(name, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    # what this process lacks is no fault of the shard
    with pytest.raises(OSError if code in (errno.EMFILE, errno.ENOMEM) else SampleError, match=os.strerror(code)):
        source.read(0)


def test_many_open_shards(tmp_path):
    paths = [str(write_shard(tmp_path / f"{n}.tar", [sample(n)])) for n in range(10)]
    source = open_shards(paths, max_open=3)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(10), *range(10)]:
        assert source.read(number)["txt"].decode().endswith(f"thing {number}")
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    del source
    assert len(os.listdir("/proc/self/fd")) == before


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
    monkeypatch.setattr("clipfast.data.staging.FIRST_WAIT", 0.01)
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


def test_a_failing_command(tmp_path, monkeypatch):
    monkeypatch.setattr("clipfast.data.staging.FIRST_WAIT", 0.01)
    with pytest.raises(SampleError, match="the command ended with status 3"):
        open_shards(["pipe:exit 3"], index=IndexCache(tmp_path))

"""The index of shards: it agrees with reading them, is kept, and notices every change."""

import errno
import io
import os
import tarfile
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest

from clipfast.data import IndexCache, ShardIndex, ShardSource, identities, open_shards, tar_format
from clipfast.data.samples import is_pair
from clipfast.data.staging import is_direct
from clipfast.data.tar_format import scan
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


def add(tar, name, content=b"", **fields):
    """Add a member to an archive."""
    info = tarfile.TarInfo(name)
    for field, value in {"size": len(content), **fields}.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


LONG = ["é" * 90 + "/" + "x" * 150 + ".jpg", "é" * 90 + "/" + "x" * 150 + ".txt", "a.txt", "b/c.tar.gz", "b/d.jpg"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_archives_of_all_kinds(form, suffix, tmp_path):
    mode = "w:" + suffix.removeprefix(".tar").removeprefix(".")
    with tarfile.open(tmp_path / f"s{suffix}", mode, format=form) as tar:
        for name in LONG if form != tarfile.USTAR_FORMAT else LONG[2:]:
            add(tar, f"folder of {name[:20]}", type=tarfile.DIRTYPE)
            add(tar, name, os.urandom(700), mtime=1.5 if form == tarfile.PAX_FORMAT else 1)
    check_source(tmp_path / f"s{suffix}")


DAMAGE = {
    "cut": lambda data, middle: data[: 2 * middle],
    "garbage": lambda data, middle: data[:middle] + os.urandom(3000) + data[middle + 3000 :],
    "shifted": lambda data, middle: data[: middle // 512 * 512] + os.urandom(77) + data[middle // 512 * 512 :],
    "zeros": lambda data, middle: data + bytes(100_000),
    "two": lambda data, middle: data + data,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_archives(kind, tmp_path):
    path = write_shard(tmp_path / "s.tar", [sample(index) for index in range(20)])
    data = path.read_bytes()
    path.write_bytes(DAMAGE[kind](data, len(data) // 3))
    check_source(path)
    with path.open("rb") as file:
        blocks, damage = scan(file)
    assert (damage != {}) == (kind != "two")
    raws = list(read_samples(path))
    lost = sum("__damage__" in raw for raw in raws)
    assert sum(damage.values()) == lost
    # what lies beside the garbage may have lost a part, and is counted when it is used
    assert any(not is_pair(raw) for raw in raws) == (kind != "two")
    assert len(blocks) > 10


@pytest.mark.parametrize("key", ["BZh91", "\x1f\x8bz"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_name_that_begins_like_a_compressed_file(key, first, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for stem in ("other", key)[:: -1 if first == 0 else 1]:
            for extension, content in sample(3).items():
                add(tar, f"{stem}.{extension}", content)
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
    assert (source.sizes, len(source.shards[0].damage)) == ([4], 1)


def test_no_archive(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nothing like a tar file" * 100)
    for name in ("x.tar", "missing.tar"):
        with pytest.raises(SampleError, match=rf"shard .*{name} cannot be (read|opened)"):
            open_shards([f"{tmp_path}/{name}"])


def test_what_is_known_is_not_read_again(tmp_path, monkeypatch):
    index = IndexCache(tmp_path / "cache")
    paths = [str(write_shard(tmp_path / f"{n}.tar", [sample(i) for i in range(n)])) for n in (3, 5)]
    first = list(index.shards(paths))
    with monkeypatch.context() as patch:
        patch.setattr("clipfast.data.index.format_of", None)
        assert list(index.shards(paths)) == first
    write_shard(tmp_path / "3.tar", [sample(i) for i in range(4)])
    os.utime(tmp_path / "3.tar", ns=(1, 1))
    for _ in range(2):
        assert [shard.count for shard in index.shards(paths)] == [4, 5]
        index._entry(paths[0]).write_bytes(b"{broken")


def test_large_entries_are_shared_by_processes(tmp_path, monkeypatch):
    names = [str(write_shard(tmp_path / f"{n}.tar", [sample(i) for i in range(n)])) for n in (0, 3)]
    source = open_shards(names, index=IndexCache(tmp_path / "cache"))
    own = [source.index.extents(name).tolist() for name in names]
    monkeypatch.setattr("clipfast.data.index.SHARED", 0)
    shared = [source.index.extents(name) for name in names]
    assert all(isinstance(one, np.memmap) for one in shared)
    assert [one.tolist() for one in shared] == own
    assert [source.read(number)["txt"] for number in range(3)] == [sample(number)["txt"] for number in range(3)]


def test_no_more_names_are_queued_than_can_wait(tmp_path):
    """A pool's own ``map`` queues all names at once."""
    names = [str(write_shard(tmp_path / f"{n}.tar", [sample(i) for i in range(n)])) for n in range(8)]
    watched = mock.patch.object(ThreadPoolExecutor, "map", autospec=True, side_effect=ThreadPoolExecutor.map)
    with mock.patch("clipfast.data.index.QUEUED", 3), watched as run:
        assert [shard.count for shard in IndexCache(tmp_path / "cache").shards(names)] == list(range(8))
    assert max(len(call.args[2]) for call in run.call_args_list) == 3


def test_changes_during_a_run_are_named(tmp_path):
    path = write_shard(tmp_path / "s.tar", [sample(index) for index in range(8)])
    good = path.read_bytes()

    changes = [
        (path.unlink, "missing shard"),
        (lambda: path.write_bytes(good[: len(good) // 2]), "truncated shard"),
        (lambda: write_shard(path, [sample(index + 1) for index in range(8)]), "replaced shard"),
    ]
    for change, kind in changes:
        path.write_bytes(good)
        source = open_shards([str(path)])
        change()
        with pytest.raises(SampleError) as error:
            source.read(7)
        assert error.value.kind == kind

    path.write_bytes(good)
    source = open_shards([str(path)])
    source.read(7)  # now it is open
    os.truncate(path, len(good) // 2)
    with pytest.raises(SampleError) as error:
        source.read(7)
    assert error.value.kind == "truncated shard"


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


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("folder", ["a", "a" * 120])
def test_links_stand_for_the_members_that_they_name(folder, suffix, form, tmp_path):
    """``cp -al`` makes the ones, and ``ln -s`` the others."""
    root = tmp_path / "root"
    for inside in (folder, "b", "c"):
        (root / inside).mkdir(parents=True)
    for number in range(6):
        for extension, data in sample(number).items():
            name = f"{number}.{extension}"
            (root / folder / name).write_bytes(data)
            os.link(root / folder / name, root / "b" / name)
            (root / "c" / name).symlink_to(f"../{'b' if number else folder}/{name}")
    (root / "c" / "6.png").symlink_to("../../secret.png")
    (root / "c" / "7.png").symlink_to("7.png")
    with tarfile.open(tmp_path / f"x.{suffix}", "w:gz" if suffix == "tar.gz" else "w", format=form) as tar:
        tar.add(root, "./")
    source = open_shards([f"{tmp_path}/x.{suffix}"], index=IndexCache(tmp_path / "cache"))
    assert (source.sizes, source.shards[0].damage) == ([20], {})
    for number in range(18):
        raw = source.read(number)
        assert {key: raw[key] for key in sample(0)} == sample(number % 6)
    # Data workers that were forked share the descriptors.
    assert [os.lseek(opened.descriptor, 0, os.SEEK_CUR) for opened in source._open.values()] == [0]
    with pytest.raises(SampleError, match=r"c/6\.png is a link to \.\./secret\.png, which is not in the shard"):
        source.read(18)
    with pytest.raises(SampleError, match=r"c/7\.png is a link to c/7\.png, and that to another, too many times"):
        source.read(19)


def test_a_link_to_what_was_cut_off_is_a_broken_shard(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "0.txt", b"abc")
        for name in ("0.png", "1.png"):
            add(tar, name, type=tarfile.LNKTYPE, linkname="9.png")
        add(tar, "9.png", b"abc")
    source = open_shards([str(path)], index=IndexCache(tmp_path / "cache"))
    assert source.read(0)["png"] == b"abc"
    os.truncate(path, 5 * 512 + 1)
    with pytest.raises(SampleError, match="not where it was"):
        source.read(0)

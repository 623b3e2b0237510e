"""Tar shards: pairs are read as by Python's tarfile, in any order, and damage of any kind is counted."""

import bz2
import gzip
import io
import itertools
import lzma
import os
import random
import tarfile
import zlib
from collections import Counter

import pytest

from clipfast.data.samples import is_pair
from clipfast.data.tar import pax_records
from clipfast.models.images import SampleError

from ..small_runs import sample, write_shard
from .conftest import opened

PAIRS = 40
COMPRESSED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def archive(names, form=tarfile.PAX_FORMAT, seed=0, **fields):
    """Return a tar file with members of random bytes under these names; ``fields`` are set in each member's TarInfo."""
    rng, stream = random.Random(seed), io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name in names:
            data = f"a caption of {name}".encode() if name.endswith(".txt") else rng.randbytes(rng.randrange(1, 3000))
            info = tarfile.TarInfo(name)
            for key, value in {"size": len(data), **fields}.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def pairs(count=PAIRS, **options):
    """Return a tar shard of numbered pairs."""
    return archive([f"d/{index:04}.{kind}" for index in range(count) for kind in ("jpg", "txt")], **options)


def contents(data):
    """Return the files of a tar shard by name, as Python's tarfile reads them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar if info.isreg()}


numbers = itertools.count()


@pytest.fixture
def read(tmp_path):
    """Return a function that writes a tar shard with given bytes, opens it, and reads all its samples."""

    def open_and_read(data, suffix=""):
        """Write a tar shard, open it, and read all its samples."""
        path = tmp_path / f"{next(numbers)}.tar{suffix}"
        path.write_bytes(data)
        source = opened(path)
        return source, [source.read(number) for number in range(len(source))]

    return open_and_read


LONG = ["é" * 90 + "/" + "x" * 150 + ".jpg", "é" * 90 + "/" + "x" * 150 + ".txt", "a.txt", "b/c.tar.gz", "b/d.jpg"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("suffix", COMPRESSED)
def test_whole_archives_are_read_as_tarfile_reads_them(form, suffix, read):
    names = LONG[2:] if form == tarfile.USTAR_FORMAT else LONG
    parts = [
        archive(names, form, mtime=1.5 if form == tarfile.PAX_FORMAT else 1),
        archive(["folder", "x.txt"], type=tarfile.DIRTYPE, size=0) + archive(["a.__url__", "behind the end mark.txt"]),
    ]
    source, found = read(COMPRESSED[suffix](b"".join(parts)), suffix)
    expected = contents(parts[0]) | contents(archive(["b", "behind the end mark.txt"]))
    named = {f"{raw['__key__']}.{key}": raw[key] for raw in found for key in raw if not key.startswith("__")}
    assert named == {name: expected[name] for name in [*names, "behind the end mark.txt"]}
    assert source.shards[0].damage == {}


@pytest.mark.parametrize("key", ["BZh91", "\x1f\x8bz"])
def test_a_name_that_begins_like_a_compressed_file(key, read):
    source, (first,) = read(archive([f"{key}.jpg", f"{key}.txt"]))
    assert first["__key__"] == key
    assert not source.shards[0].is_copied


def header(data, name):
    """Return the position at which the header of a member of a tar shard begins."""
    return data.index(name.encode().ljust(100, b"\0"))


def flip_headers(data, rng):
    """Return a tar shard with flipped bits in some headers."""
    broken = bytearray(data)
    for index in rng.sample(range(PAIRS), rng.randrange(1, 4)):
        broken[header(data, f"d/{index:04}.{rng.choice(['jpg', 'txt'])}") + rng.randrange(500)] ^= 1 << rng.randrange(7)
    return bytes(broken)


def flip_bits(data, rng):
    """Return a tar shard with some flipped bits."""
    broken = bytearray(data)
    for _ in range(rng.randrange(1, 30)):
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(broken)


def overwrite(data, rng):
    """Return a tar shard in which random bytes overwrite a random range."""
    start, garbage = rng.randrange(len(data)), rng.randbytes(rng.randrange(1, 20000))
    return (data[:start] + garbage + data[start + len(garbage) :])[: len(data)]


def insert(data, rng):
    """Return a tar shard with random bytes inserted at a random place."""
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.randrange(1, 20000)) + data[start:]


def repeat(data, rng):
    """Return a tar shard in which a random range of bytes occurs twice."""
    start = rng.randrange(len(data))
    return data[: start + rng.randrange(1, 20000)] + data[start:]


def counted(found):
    """Return the keys of the readable pairs, and the number of lost or incomplete samples."""
    source, raws = found
    whole = Counter(raw["__key__"] for raw in raws if is_pair(raw))
    return whole, source.shards[0].lost + len(raws) - whole.total()


@pytest.mark.parametrize("corrupt", [flip_headers, flip_bits, overwrite, insert, repeat], ids=lambda f: f.__name__)
def test_every_pair_is_read_or_counted_as_lost(corrupt, read):
    rng = random.Random(corrupt.__name__)
    for seed in range(30):
        whole, lost = counted(read(corrupt(pairs(seed=seed), rng)))
        assert len(whole) + lost >= PAIRS, f"seed {seed}"
        assert len(whole) >= PAIRS - 30  # all pairs outside of the damage are read


def test_damage_costs_no_more_than_it_must(read):
    data = pairs()
    smallest = min(
        (name for name in contents(data) if name.endswith("jpg")), key=lambda name: len(contents(data)[name])
    )
    broken = bytearray(data)
    broken[header(data, smallest) + 3] ^= 1
    whole, lost = counted(read(bytes(broken)))
    assert (len(whole), lost) == (PAIRS - 1, 1)
    broken = bytearray(data)
    broken[124:136] = b"-0000002000\0"  # a size of minus one block, which leads back to the header itself
    broken[148:156] = b"%06o\0 " % (sum(broken[:148]) + 8 * 32 + sum(broken[156:512]))
    assert len(counted(read(bytes(broken)))[0]) == PAIRS - 1
    # A cut-off counts as one loss, since the number of pairs that followed is not known.
    for cut in range(600, len(data) - 11000, 9999):
        assert counted(read(data[:cut]))[1] == 1
    for bad in (data + bytes(50000), archive(["a.txt"], pax_headers={"GNU.sparse.major": "1"})):
        assert list(read(bad)[0].shards[0].damage.values()) == [1]
    huge = archive(["a.txt"], pax_headers={"size": "9" * 5000})  # an int of so many digits is an error in Python
    assert len(counted(read(huge + data))[0]) == PAIRS


def test_a_member_beyond_the_limit_is_damage(read, monkeypatch):
    monkeypatch.setattr("clipfast.data.tar.MAX_MEMBER", 2000)
    source, raws = read(pairs())
    large = [name for name, data in contents(pairs()).items() if len(data) > 2000]
    assert list(source.shards[0].damage) == [
        reason for reason in source.shards[0].damage if "more than the limit of 2000" in reason
    ]
    assert len(source.shards[0].damage) == sum(not is_pair(raw) for raw in raws) == len(large) > 5


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_broken_compression_leaves_what_can_be_read(suffix, read):
    data = COMPRESSED[suffix](pairs(1500))
    flipped = bytearray(data)
    flipped[len(data) * 3 // 4] ^= 1
    for broken in (data[: len(data) // 2], bytes(flipped)):
        source, _ = read(broken, suffix)
        assert 100 < len(source) <= 1500
        assert source.shards[0].damage


def test_zeros_before_broken_compression_are_no_end(read, tmp_path):
    packer = zlib.compressobj(wbits=31)
    data = packer.compress(pairs()) + packer.flush(zlib.Z_FULL_FLUSH)
    data += b"\0\0\0\xff\xff" * 100_000 + b"\xff" * 1000  # empty compressed blocks, and then invalid ones
    assert read(data, ".gz")[0].shards[0].damage
    (tmp_path / "x.tar.gz").write_bytes(data)
    piped = opened(f"pipe:cat {tmp_path}/x.tar.gz")
    assert piped.shards[0].damage


@pytest.mark.parametrize("record", [b"4 a\n", b"12 path=a/b\n"])
def test_a_header_of_many_records_takes_no_more_than_its_length(record):
    class Counted(bytes):
        """A bytes class that counts how many bytes are copied."""

        copied = 0

        def __getitem__(self, which):
            part = Counted(super().__getitem__(which))
            Counted.copied += len(part)
            return part

    data = Counted(record * 3000)
    assert len(pax_records(data)) == 1
    assert Counted.copied < 10 * len(data)


def test_records_end_where_they_are_malformed():
    for data in (b"9" * 5000, b"9" * 5000 + b" a=b\n", b"0 a=b\n", b"6 a=b", b" ", b"x a=b\n"):
        assert pax_records(b"12 path=a/b\n" + data) == {"path": "a/b"}


@pytest.mark.parametrize("data", [b"", b"nothing like a tar file" * 100, gzip.compress(b"text", mtime=0)])
def test_nothing_like_a_tar_file(data, read):
    with pytest.raises(SampleError, match=r"shard .*\.tar cannot be read: not a tar file"):
        read(data)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(("suffix", "folder"), [("", "a" * 120), (".gz", "a")])
def test_links_stand_for_the_members_that_they_name(folder, suffix, form, tmp_path):
    """A tar shard may have links in place of members: hard links by ``cp -al``, symbolic links by ``ln -s``."""
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
    with tarfile.open(tmp_path / f"x.tar{suffix}", "w:gz" if suffix else "w", format=form) as tar:
        tar.add(root, "./")
    source = opened(f"{tmp_path}/x.tar{suffix}")
    assert (source.sizes, source.shards[0].damage) == ([20], {})
    for number in range(18):
        raw = source.read(number)
        assert {key: raw[key] for key in sample(0)} == sample(number % 6)
    # Reads leave the file offset at 0, since forked data workers share it.
    assert [os.lseek(opened.descriptor, 0, os.SEEK_CUR) for opened in source._open.values()] == [0]
    for number in (18, 19):  # a link out of the shard, and a link to itself
        with pytest.raises(SampleError, match=r"c/\d\.png is a link to") as error:
            source.read(number)
        assert error.value.kind == "broken link"


def test_a_link_to_what_was_cut_off_is_a_broken_shard(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, fields in {
            "0.txt": {"size": 3}, "0.png": {"type": tarfile.LNKTYPE, "linkname": "9.png"},
            "1.png": {"type": tarfile.LNKTYPE, "linkname": "9.png"}, "9.png": {"size": 3},
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"abc"))
    source = opened(path)
    assert source.read(0)["png"] == b"abc"
    os.truncate(path, 5 * 512 + 1)
    with pytest.raises(SampleError, match="not where it was"):
        source.read(0)


def test_a_file_that_is_cut_while_it_is_indexed(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", 20)
    original = tarfile.BLOCKSIZE
    from clipfast.data import tar

    read_header = tar.read_header

    def cutting(block):
        """Truncate the tar shard while it is indexed, then read the header."""
        os.truncate(path, 16 * original)
        return read_header(block)

    monkeypatch.setattr(tar, "read_header", cutting)
    with path.open("rb") as file:
        found, damage = tar.scan(file, "s.tar")
    assert 0 < len(found) < 20
    assert damage

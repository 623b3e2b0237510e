"""Reading of shards: like tarfile where they are whole, and past what is damaged where they are not."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
from collections import Counter

import pytest

from clipfast.data.samples import is_pair
from clipfast.data.tar import Damage, Member, pax_records, read_tar

from .conftest import read_samples

PAIRS = 40


def archive(names, form=tarfile.PAX_FORMAT, seed=0, **fields):
    """A tar file of random bytes under these names."""
    rng = random.Random(seed)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name in names:
            data = (
                rng.randbytes(rng.randrange(1, 3000)) if not name.endswith(".txt") else f"a caption of {name}".encode()
            )
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def pairs(count=PAIRS, **options):
    return archive([f"d/{index:04}.{kind}" for index in range(count) for kind in ("jpg", "txt")], **options)


def contents(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]


LONG = ["é" * 90 + "/" + "x" * 150 + ".jpg", "a.txt", "b/c.tar.gz"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_whole_archives_are_read_as_tarfile_reads_them(form, compress):
    data = archive(LONG, form, mtime=1.5) + archive(["after the end mark.txt"])
    found = list(read_tar(io.BytesIO(compress(data))))
    assert [(member.name, member.data) for member in found] == contents(archive(LONG, form, mtime=1.5)) + contents(
        archive(["after the end mark.txt"])
    )


def test_what_is_no_file_has_no_content():
    """Links are named, and stand for other members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"x{kind.decode()}.txt")
            info.type, info.linkname = kind, "y"
            tar.addfile(info)
        info = tarfile.TarInfo("last.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert list(read_tar(io.BytesIO(stream.getvalue()))) == [
        Member("x2.txt", b"", 512, 512, "y"),
        Member("x1.txt", b"", 1024, 512, "y"),
        Member("last.txt", b"abc", 2048, 1024),
    ]


def test_members_larger_than_the_limit_are_passed_over(monkeypatch):
    monkeypatch.setattr("clipfast.data.tar.MAX_MEMBER", 2000)
    found = list(read_tar(io.BytesIO(pairs())))
    large = [part for part in found if isinstance(part, Damage)]
    assert large
    assert all("more than the limit of 2000" in part.reason for part in large)
    assert len(found) == 2 * PAIRS


def header(data, name):
    """Return the position at which the header of a member begins."""
    return data.index(name.encode().ljust(100, b"\0"))


def flip_headers(data, rng):
    broken = bytearray(data)
    for index in rng.sample(range(PAIRS), rng.randrange(1, 4)):
        broken[header(data, f"d/{index:04}.{rng.choice(['jpg', 'txt'])}") + rng.randrange(500)] ^= 1 << rng.randrange(7)
    return bytes(broken)


def flip_bits(data, rng):
    broken = bytearray(data)
    for _ in range(rng.randrange(1, 30)):
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(broken)


def overwrite(data, rng):
    start = rng.randrange(len(data))
    garbage = rng.randbytes(rng.randrange(1, 20000))
    return (data[:start] + garbage + data[start + len(garbage) :])[: len(data)]


def insert(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.randrange(1, 20000)) + data[start:]


def repeat(data, rng):
    start = rng.randrange(len(data))
    return data[: start + rng.randrange(1, 20000)] + data[start:]


def cut(data, rng):
    return data[: rng.randrange(1, len(data) - 11000)]


def counted(data, tmp_path):
    """The keys of the pairs that are read, and how many samples are lost or incomplete."""
    (tmp_path / "x.tar").write_bytes(data)
    read, lost = Counter(), 0
    for sample in read_samples(tmp_path / "x.tar"):
        if is_pair(sample):
            read[sample["__key__"]] += 1
        else:
            lost += 1
            assert "__damage__" not in sample or sample["__key__"].startswith("byte ")
    return read, lost


@pytest.mark.parametrize("corrupt", [flip_headers, flip_bits, overwrite, insert, repeat], ids=lambda f: f.__name__)
def test_every_pair_is_read_or_counted_as_lost(corrupt, tmp_path):
    rng = random.Random(corrupt.__name__)
    shortest = PAIRS
    for seed in range(40):
        read, lost = counted(corrupt(pairs(seed=seed), rng), tmp_path)
        assert len(read) + lost >= PAIRS, f"seed {seed}"
        shortest = min(shortest, len(read))
    # Beside the damage, everything is read.
    assert shortest >= PAIRS - 30


def test_one_flipped_header_costs_one_pair(tmp_path):
    data = pairs()
    sizes = {name: len(content) for name, content in contents(data) if name.endswith("jpg")}
    broken = bytearray(data)
    broken[header(data, min(sizes, key=sizes.get)) + 3] ^= 1
    read, lost = counted(bytes(broken), tmp_path)
    assert (len(read), lost) == (PAIRS - 1, 1)


def test_a_cut_is_said(tmp_path):
    rng = random.Random(0)
    for seed in range(40):
        data = pairs(seed=seed)
        read, lost = counted(cut(data, rng), tmp_path)
        # How many pairs stood behind the cut is not in the file.
        assert lost == 1
        assert set(read) <= {f"d/{index:04}" for index in range(PAIRS)}


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_flipped_bit_in_compressed_data_is_said(compress):
    data = bytearray(compress(pairs(2000)))
    data[len(data) * 3 // 4] ^= 1
    assert isinstance(list(read_tar(io.BytesIO(data)))[-1], Damage)


def test_sparse_files_and_reserved_names_are_no_members(tmp_path):
    stream = io.BytesIO(archive(["a.__url__", "a.txt"]))
    (tmp_path / "x.tar").write_bytes(stream.getvalue())
    (only,) = read_samples(tmp_path / "x.tar")
    assert only["__url__"] == f"{tmp_path}/x.tar"
    data = archive(["a.txt"], pax_headers={"GNU.sparse.major": "1"})
    (part,) = read_tar(io.BytesIO(data))
    assert "a.txt is a sparse file" in part.reason


class Counted(bytes):
    """Bytes that count how many of them are copied."""

    copied = 0

    def __getitem__(self, which):
        part = Counted(super().__getitem__(which))
        Counted.copied += len(part)
        return part


@pytest.mark.parametrize("record", [b"4 a\n", b"12 path=a/b\n"])
def test_a_header_of_many_records_takes_no_more_than_its_length(record):
    data, Counted.copied = Counted(record * 3000), 0
    assert len(pax_records(data)) == 1
    assert Counted.copied < 10 * len(data)


@pytest.mark.parametrize("data", [b"9" * 5000, b"9" * 5000 + b" a=b\n", b"0 a=b\n", b"6 a=b", b" ", b"x a=b\n"])
def test_records_end_where_they_are_malformed(data):
    assert pax_records(b"12 path=a/b\n" + data) == {"path": "a/b"}


def test_zeros_at_the_end_are_one_damage():
    data = pairs()
    (last,) = [part for part in read_tar(io.BytesIO(data + bytes(50000))) if isinstance(part, Damage)]
    assert last.size is None


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_broken_compression_ends_the_shard_and_is_said(compress):
    data = compress(pairs(2000))
    *members, last = read_tar(io.BytesIO(data[: len(data) // 2]))
    assert isinstance(last, Damage)
    assert "compression is broken" in last.reason
    assert members


def test_nothing_like_a_tar_file():
    for data in (b"", b"nothing like a tar file" * 100, gzip.compress(b"text")):
        with pytest.raises(ValueError, match="not a tar file: no valid header of a member in its"):
            list(read_tar(io.BytesIO(data)))

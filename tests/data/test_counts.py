"""Sample counts of remote shards: they need few bytes of a shard, and wrong or missing counts are handled."""

import gzip
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from clipfast.data import IndexCache, ShardIndex, ShardSource, remote, staging
from clipfast.models.images import SampleError

from ..small_runs import sample, write_shard
from .conftest import copies, opened
from .rows import cut, downloaded, fields, write_parquet

pa = pytest.importorskip("pyarrow")
STATS = "_stats.json"


def served(server):
    """Return how many bytes the server of remote shards has sent."""
    return sum(amount for _, amount in server.served)


def test_counting_a_remote_parquet_file_reads_its_footer(server, tmp_path):
    images = pa.table({"jpg": [os.urandom(40_000) for _ in range(250)], "n": list(range(250))})
    size = os.path.getsize(write_parquet(tmp_path / "web" / "0.parquet", images))
    source = opened(f"{server.url}/0.parquet?download=true")
    assert source.sizes == [250]
    assert 0 < served(server) < 200_000 < size / 20
    assert not copies(tmp_path)
    server.served.clear()
    assert [fields(source.read(number))["n"] for number in (249, 0)] == [249, 0]
    assert served(server) == size


def test_remote_files_that_cannot_be_used_are_brought_once(server, tmp_path):
    path = Path(write_parquet(tmp_path / "web" / "0.parquet", downloaded(200)))
    data = bytearray(path.read_bytes())
    data[100:3000] = b"\xff" * 2900
    path.write_bytes(data)
    page = b"<html>" * 1000
    (tmp_path / "web" / "0.tar").write_bytes(page)
    (tmp_path / "web" / "sizes.json").write_text('{"0.tar": 8}')
    for name, content in (("0.parquet", data), ("0.tar", page)):
        source = opened(f"{server.url}/{name}")
        server.served.clear()
        for number in (0, 1):
            with pytest.raises(SampleError, match=rf"{name} cannot be read: ") as error:
                source.read(number)
            assert error.value.kind == "unreadable shard"
        assert served(server) == len(content)


@pytest.mark.parametrize("kind", ["sizes", "stats"])
def test_counts_beside_remote_tar_files(kind, server, tmp_path):
    names = [f"{number:05d}.tar" for number in range(4)]
    for number, name in enumerate(names):
        write_shard(tmp_path / "web" / name, number + 2)
        if kind == "stats":
            stats = {"count": 10, "successes": number + 2}
            (tmp_path / "web" / f"{number:05d}{STATS}").write_text(json.dumps(stats))
    if kind == "sizes":
        sizes = {"00000.tar": 2, "00001.tar": "3", "00002.tar": 4, "other.tar": 9, "00003.tar": -5}
        (tmp_path / "web" / "sizes.json").write_text(json.dumps(sizes))
    urls = [f"{server.url}/{name}" for name in names]
    source = opened(*urls)
    assert source.sizes == [2, 3, 4, 5]
    known = names if kind == "stats" else names[:3]  # a shard without a count is copied
    assert not [name for name, _ in server.served if name in known]
    assert sum(name == "sizes.json" for name, _ in server.served) == (kind == "sizes")
    assert source.read(13)["txt"].decode().endswith("thing 4")
    assert opened(*urls, whole=True).sizes == [2, 3, 4, 5]


@pytest.mark.parametrize("file", ["sizes.json", "0_stats.json", "0.parquet"])
def test_an_outage_does_not_make_the_start_copy_what_can_be_counted(file, server, tmp_path):
    name = f"{server.url}/0.{'parquet' if file == '0.parquet' else 'tar'}"
    if file == "0.parquet":
        write_parquet(tmp_path / "web" / file, downloaded(5))
    else:
        write_shard(tmp_path / "web" / "0.tar", 5)
        (tmp_path / "web" / file).write_text('{"0.tar": 5, "successes": 5}')
    server.failing[file] = 4
    assert opened(name).sizes == [5]
    assert server.failing[file] == 0
    server.failing[file] = 1000
    with pytest.raises(SampleError, match=rf"{file} cannot be read: 503"):
        opened(name)
    assert not copies(tmp_path)


def test_a_wrong_count(server, tmp_path):
    write_shard(tmp_path / "web" / "0.tar", 8)
    cut(tmp_path / "web" / "0.tar", 0.6)
    write_shard(tmp_path / "web" / "1.tar", 3)
    (tmp_path / "web" / "sizes.json").write_text('{"0.tar": 8, "1.tar": 3, "2.tar": 8}')
    names = [f"{server.url}/0.tar", f"{server.url}/1.tar"]
    source = opened(*names)
    for number in (0, 7):
        with pytest.raises(SampleError, match=r"0\.tar has 6 samples, but 8 by http.*/sizes\.json") as error:
            source.read(number)
        assert error.value.kind == "miscounted shard"
    assert source.read(8)["__key__"] == "000"
    # the next start keeps the wrong counts, and so the order, until a full index is requested
    assert source.sizes == opened(*names).sizes == [8, 3]
    assert opened(*names, whole=True).sizes == [6, 3]
    # The shard has a count, but its file is missing.
    with pytest.raises(SampleError, match=r"shard http://.*/2\.tar cannot be read"):
        opened(f"{server.url}/2.tar")


def test_a_counted_shard_that_comes_back(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    write_parquet(path, downloaded(20))
    source = opened(path)
    path.rename(tmp_path / "away")
    with pytest.raises(SampleError, match=r"cannot be read: .*No such file") as error:
        source.read(3)
    assert error.value.kind == "missing shard"
    (tmp_path / "away").rename(path)
    monkeypatch.setattr(staging, "FORGET", 0.0)
    assert fields(source.read(3))["key"] == "000000003"


def test_broken_notes_are_left_out_of_account(tmp_path, caplog):
    write_shard(tmp_path / "0.tar.gz", [sample(0)])
    (tmp_path / "sizes.json").write_text("{broken")
    (tmp_path / f"0{STATS}").write_text("[]")
    assert opened(f"{tmp_path}/0.tar.gz").sizes == [1]
    assert "sizes.json is left out of account" in caplog.text
    # sizes.json states a wrong count for this local shard, which is indexed and not looked up.
    write_shard(tmp_path / "1.tar", [sample(0)])
    (tmp_path / "sizes.json").write_text('{"1.tar": 7}')
    assert opened(f"{tmp_path}/1.tar").sizes == [1]


def fail_in_a_process(source):
    """Return the error of a sample whose shard had a wrong count, from another process."""
    with pytest.raises(SampleError) as error:
        source.read(0)
    return str(error.value), error.value.kind


@pytest.mark.parametrize("kind", ["missing shard", "unreadable shard"])
def test_processes_do_not_ask_for_a_failing_shard_one_after_the_other(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    asked = tmp_path / "asked"
    name = f"pipe:echo >> {asked}; " + ("exit 3" if kind == "missing shard" else f"cat {tmp_path}/0.jsonl.gz #.jsonl")
    (tmp_path / "0.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}')[:-6])
    source = ShardSource(IndexCache(), [ShardIndex(name, "", 0, 5, {}, "nothing")])
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(fail_in_a_process, [source] * 3))
    assert [kind for _, kind in found] == [kind] * 3
    assert sorted("is not asked for again so soon" in message for message, _ in found) == [False, True, True]
    assert asked.read_text() == "\n" * (5 if kind == "missing shard" else 1)

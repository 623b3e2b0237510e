"""Counts of shards that are elsewhere: they cost next to nothing, and one that is wrong or missing is met."""

import gzip
import json
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from clipfast.data import IndexCache, ShardIndex, ShardSource, open_shards
from clipfast.images import SampleError

from .conftest import sample, write_shard
from .rows import cut, downloaded, fields, write_parquet

pa = pytest.importorskip("pyarrow")
STATS = "_stats.json"


def test_counting_a_remote_parquet_file_reads_its_footer(server, tmp_path):
    images = pa.table({"jpg": [os.urandom(40_000) for _ in range(250)], "n": list(range(250))})
    write_parquet(tmp_path / "web" / "0.parquet", images)
    size = (tmp_path / "web" / "0.parquet").stat().st_size
    source = open_shards([f"{server.url}/0.parquet?download=true"], index=IndexCache(tmp_path / "cache"))
    assert source.sizes == [250]
    assert 0 < sum(amount for _, amount in server.served) < 200_000 < size / 20
    assert not (tmp_path / "cache" / "shards").exists()
    server.served.clear()
    assert [fields(source.read(number))["n"] for number in (249, 0)] == [249, 0]
    assert sum(amount for _, amount in server.served) == size


def test_a_remote_file_that_cannot_be_used_is_brought_once(server, tmp_path):
    path = write_parquet(tmp_path / "web" / "0.parquet", downloaded(200))
    data = bytearray(Path(path).read_bytes())
    data[100:3000] = b"\xff" * 2900
    Path(path).write_bytes(data)
    source = open_shards([f"{server.url}/0.parquet"], index=IndexCache(tmp_path / "cache"))
    server.served.clear()
    with pytest.raises(SampleError, match=r"0\.parquet cannot be read: it is damaged, or not a Parquet file"):
        source.read(0)
    assert sum(amount for _, amount in server.served) == len(data)


@pytest.mark.parametrize("kind", ["sizes", "stats"])
def test_counts_beside_remote_tar_files(kind, server, tmp_path):
    names = []
    for number in range(4):
        write_shard(tmp_path / "web" / f"{number:05d}.tar", [sample(n) for n in range(number + 2)])
        names.append(f"{number:05d}.tar")
        if kind == "stats":
            stats = {"count": 10, "successes": number + 2}
            (tmp_path / "web" / f"{number:05d}{STATS}").write_text(json.dumps(stats))
    if kind == "sizes":
        sizes = {"00000.tar": 2, "00001.tar": "3", "00002.tar": 4, "other.tar": 9, "00003.tar": -5}
        (tmp_path / "web" / "sizes.json").write_text(json.dumps(sizes))
    urls = [f"{server.url}/{name}" for name in names]
    index = IndexCache(tmp_path / "cache")
    source = open_shards(urls, index=index)
    assert source.sizes == [2, 3, 4, 5]
    # the last one's number is not one, and it was brought here to be counted
    known = names if kind == "stats" else names[:3]
    assert not [name for name, _ in server.served if name in known]
    assert [shard.counted_in is not None for shard in source.shards] == [name in known for name in names]
    assert sum(name == "sizes.json" for name, _ in server.served) == (kind == "sizes")
    assert source.read(13)["txt"].decode().endswith("thing 4")
    assert source.shards[3].counted_in is None  # the index takes the place of the count, and both are not kept
    assert open_shards(urls, index=index, whole=True).sizes == [2, 3, 4, 5]


@pytest.mark.parametrize("file", ["sizes.json", "0_stats.json", "0.parquet"])
def test_an_outage_does_not_make_the_start_copy_what_can_be_counted(file, server, tmp_path):
    name = f"{server.url}/0.{'parquet' if file == '0.parquet' else 'tar'}"
    if file == "0.parquet":
        write_parquet(tmp_path / "web" / file, downloaded(5))
    else:
        write_shard(tmp_path / "web" / "0.tar", [sample(n) for n in range(5)])
        (tmp_path / "web" / file).write_text('{"0.tar": 5, "successes": 5}')
    index = IndexCache(tmp_path / "cache")
    for failures in (3, 4):
        server.failing[file] = failures
        assert open_shards([name], index=index).sizes == [5]
        assert server.failing[file] == 0
        assert not (tmp_path / "cache" / "shards").exists()
    server.failing[file] = 1000
    hint = "; try again, or let clipfast index count" if file != "0.parquet" else ""
    with pytest.raises(SampleError, match=rf"{file} cannot be read: 503.*{hint}"):
        open_shards([name], index=index)
    assert not list((tmp_path / "cache").glob("shards/*.tar"))


def test_a_counted_shard_that_is_missing(server, tmp_path):
    (tmp_path / "web" / "sizes.json").write_text('{"0.tar": 8}')
    with pytest.raises(SampleError, match=r"shard http://.*/0\.tar cannot be read"):
        open_shards([f"{server.url}/0.tar"], index=IndexCache(tmp_path / "cache"))


def test_a_wrong_count(server, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "clipfast")
    write_shard(tmp_path / "web" / "0.tar", [sample(n) for n in range(8)])
    cut(tmp_path / "web" / "0.tar", 0.6)
    write_shard(tmp_path / "web" / "1.tar", [sample(n) for n in range(3)])
    (tmp_path / "web" / "sizes.json").write_text('{"0.tar": 8, "1.tar": 3}')
    index = IndexCache(tmp_path / "cache")
    source = open_shards([f"{server.url}/0.tar", f"{server.url}/1.tar"], index=index)
    assert source.sizes == [8, 3]
    for number in (0, 7):
        with pytest.raises(SampleError, match=r"0\.tar has 6 samples, but 8 by http.*/sizes\.json: correct") as error:
            source.read(number)
        assert error.value.kind == "miscounted shard"
    assert source.read(8)["__key__"] == "000"
    assert len([record for record in caplog.records if "0.tar are lost" in record.getMessage()]) == 1
    # the order of the next start is the same, until someone asks for what there is
    again = [f"{server.url}/0.tar", f"{server.url}/1.tar"]
    assert open_shards(again, index=index).sizes == [8, 3]
    assert open_shards(again, index=index, whole=True).sizes == [6, 3]


def test_a_counted_shard_that_comes_back(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    write_parquet(path, downloaded(20))
    source = open_shards([str(path)], index=IndexCache(tmp_path / "cache"))
    path.rename(tmp_path / "away")
    for message in (
        "cannot be read: .*No such file",
        "cannot be read: .*No such file.* is not asked for again so soon",
    ):
        with pytest.raises(SampleError, match=message) as error:
            source.read(3)
        assert error.value.kind == "missing shard"
    (tmp_path / "away").rename(path)
    monkeypatch.setattr("clipfast.data.staging.FORGET", 0.0)
    assert fields(source.read(3))["key"] == "000000003"


def test_broken_notes_are_left_out_of_account(tmp_path, caplog):
    write_shard(tmp_path / "0.tar.gz", [sample(0)])
    (tmp_path / "sizes.json").write_text("{broken")
    (tmp_path / f"0{STATS}").write_text("[]")
    assert open_shards([f"{tmp_path}/0.tar.gz"], index=IndexCache(tmp_path / "cache")).sizes == [1]
    assert "sizes.json is left out of account, as it is not JSON" in caplog.text
    # a plain file is always looked at itself
    write_shard(tmp_path / "1.tar", [sample(0)])
    (tmp_path / "sizes.json").write_text('{"1.tar": 7}')
    assert open_shards([f"{tmp_path}/1.tar"], index=IndexCache(tmp_path / "cache")).sizes == [1]


def read_in_a_process(arguments):
    source, numbers = arguments
    return [fields(source.read(number))["key"] for number in numbers]


def fail_in_a_process(source):
    with pytest.raises(SampleError) as error:
        source.read(0)
    return str(error.value), error.value.kind


@pytest.mark.parametrize("kind", ["missing shard", "unreadable shard"])
def test_processes_do_not_ask_for_a_failing_shard_one_after_the_other(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("clipfast.data.remote.FIRST_WAIT", 0.01)
    asked = tmp_path / "asked"
    if kind == "missing shard":
        name = f"pipe:echo >> {asked}; exit 3"
    else:
        name = f"pipe:echo >> {asked}; cat {tmp_path}/0.jsonl.gz #.jsonl"
        (tmp_path / "0.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}')[:-6])
    shards = [ShardIndex(name, "", 0, 5, {}, "nothing")]
    source = ShardSource(IndexCache(tmp_path / "cache"), shards)
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(fail_in_a_process, [source] * 3))
    assert [kind for _, kind in found] == [kind] * 3
    assert sorted("is not asked for again so soon" in message for message, _ in found) == [False, True, True]
    assert asked.read_text() == "\n" * (5 if kind == "missing shard" else 1)


def test_processes_that_open_the_same_counted_shards(server, tmp_path):
    for number in range(3):
        write_parquet(tmp_path / "web" / f"{number}.parquet", downloaded(30, first=30 * number))
    urls = [f"{server.url}/{number}.parquet" for number in range(3)]
    source = open_shards(urls, index=IndexCache(tmp_path / "cache"))
    sizes = {f"{number}.parquet": (tmp_path / "web" / f"{number}.parquet").stat().st_size for number in range(3)}
    server.served.clear()
    with ProcessPoolExecutor(3) as pool:
        found = list(pool.map(read_in_a_process, [(source, range(90))] * 3))
    assert found == [[f"{n:09d}" for n in range(90)]] * 3
    fetched = {name: sum(amount for other, amount in server.served if other == name) for name in sizes}
    assert fetched == sizes  # each was brought once

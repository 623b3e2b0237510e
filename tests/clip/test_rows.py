"""Parquet and Arrow shards: row i is sample i, whatever is in it, and counting them reads next to nothing."""

import datetime
import decimal
import io
import json
import multiprocessing
import os
import re
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from clipfast.data import IndexCache, contained, expand_shards, identities, open_shards
from clipfast.data.contained import count_rows
from clipfast.data.rows import members
from clipfast.data.staging import is_direct
from clipfast.images import SampleError

from .conftest import picture, run_command, sample
from .rows import IMAGE, cut, downloaded, fields, save_to_disk, write_parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def test_rows_of_img2dataset(tmp_path):
    path = write_parquet(tmp_path / "00000.parquet", downloaded(250))
    source = open_shards([path], index=IndexCache(tmp_path / "cache"))
    assert source.sizes == [250]
    assert not list((tmp_path / "cache").glob("shards/*"))  # the footer says how many there are
    for number in np.random.default_rng(0).permutation(250).tolist():
        raw = source.read(number)
        found = fields(raw)
        assert found["url"].endswith(f"/{number}")
        assert (found["key"], found["width"], found["error_message"]) == (f"{number:09d}", 24, None)
        assert found["similarity"] == (None if number % 2 else 0.25)
        assert found["caption"] == (None if number % 10 == 3 else f"a caption {number}, été 猫")
        assert raw.get("jpg") == (None if number % 10 in (3, 5) else b"image %d" % number)


def test_no_rows(tmp_path):
    path = write_parquet(tmp_path / "0.parquet", downloaded(0))
    for whole in (False, True):
        assert open_shards([path], index=IndexCache(tmp_path / "cache"), whole=whole).sizes == [0]


def test_values_that_are_not_json(tmp_path):
    moment = datetime.datetime(2024, 2, 29, 12, 30)
    table = pa.table({
        "png": [b"x"],
        "when": [moment],
        "late": pa.array([2**60], pa.timestamp("ms")),  # a year that Python does not have
        "price": pa.array([decimal.Decimal("1.50")]),
        "nested": [{"inner": [b"bytes", b""], "infinite": float("inf"), "text": "é"}],
        "pairs": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "kind": pa.array(["red"]).dictionary_encode(),
        "text": invalid_text(),
        "json": ['{"label": "thing", "price": "0"}'],
        "Wörter/Bilder": [b"y"],
    })  # fmt: skip
    raw = open_shards([write_parquet(tmp_path / "t.parquet", table)], index=IndexCache(tmp_path / "cache")).read(0)
    assert fields(raw) == {
        "when": str(moment), "late": None, "price": "1.50", "pairs": [["a", 1]], "kind": "red", "text": None,
        "nested": {"inner": [None, None], "infinite": None, "text": "é"}, "label": "thing",
    }  # fmt: skip
    assert (raw["png"], raw["wörter_bilder"]) == (b"x", b"y")
    source = open_shards([f"{tmp_path}/t.parquet"], index=IndexCache(tmp_path / "cache"))
    assert {**source.read(0), "__span__": 0, "__url__": 0} == {**raw, "__span__": 0, "__url__": 0}


def invalid_text():
    """A column of text whose bytes are not UTF-8, which Parquet does not check."""
    offsets = pa.py_buffer(np.array([0, 4], np.int32).tobytes())
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"caf\xe9")])


def test_images_by_path(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"image 0")
    os.mkfifo(tmp_path / "pipe")
    paths = ["images/0.png", "missing.png", f"{tmp_path}/images/0.png", "pipe", "images", "nul\0", None]
    images = pa.array([{"bytes": None, "path": path} for path in paths], IMAGE)
    path = write_parquet(tmp_path / "p.parquet", pa.table({"image": images, "text": paths}))
    expected = [b"image 0", None, b"image 0", None, None, None, None]
    source = open_shards([path, f"file://{path}"], index=IndexCache(tmp_path / "cache"))
    assert [source.read(number).get("image") for number in range(7)] == expected
    # what comes from elsewhere names no files of this machine
    assert [source.read(number).get("image") for number in range(7, 14)] == [None] * 7


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files(form, tmp_path):
    table = downloaded(50)
    make = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with make(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    source = open_shards([f"{tmp_path}/x.arrow"], index=IndexCache(tmp_path / "cache"))
    assert source.sizes == [50]
    assert not list((tmp_path / "cache").glob("shards/*"))
    assert [fields(source.read(number))["key"] for number in range(50)] == [f"{n:09d}" for n in range(50)]


def test_a_folder_that_datasets_saved(tmp_path):
    names = save_to_disk(tmp_path / "saved" / "train", [9, 4, 7])
    save_to_disk(tmp_path / "saved" / "test", [1])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    folder = tmp_path / "saved" / "train"
    (folder / "cache-1.arrow").write_bytes(b"left by another program")
    shards = expand_shards(str(folder))
    assert shards == [str(folder / name) for name in reversed(names)]
    source = open_shards(shards, index=IndexCache(tmp_path / "cache"))
    assert source.sizes == [7, 4, 9]
    order = [*range(13, 20), *range(9, 13), *range(9)]
    for number, row in enumerate(order):
        raw = source.read(number)
        assert fields(raw) == {"captions": [f"a {row}", f"b {row}"]}
        assert raw.get("image") == (b"image %d" % row if row % 5 else None)
    with pytest.raises(ValueError, match=r"saved holds the splits test, train: name one of them, as .*saved/test"):
        expand_shards(f"{tmp_path}/saved")
    (folder / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(ValueError, match=r"state\.json does not list the files of a dataset"):
        expand_shards(str(folder))


def test_folders_of_shards(tmp_path):
    for name in ("1.parquet", "0.parquet", "note.txt"):
        (tmp_path / name).write_bytes(b"")
    assert expand_shards(str(tmp_path)) == [f"{tmp_path}/0.parquet", f"{tmp_path}/1.parquet"]
    for name in ("1.tar", "0.tar"):  # beside tar files, img2dataset's Parquet files have no images
        (tmp_path / name).write_bytes(b"")
    assert expand_shards(str(tmp_path)) == [f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut.parquet", "it is damaged, or not a Parquet file: .*; copy or write it again"),
        ("cut.arrow", "it is damaged, or not an Arrow file: .*; copy or write it again"),
        ("end.arrow", "its .* bytes do not end as an Arrow stream does; copy or write it again"),
        ("none.arrow", "it is damaged, or not an Arrow file: "),
        ("text.parquet", "it is damaged, or not a Parquet file: "),
        ("images.parquet", "it has no column of image bytes, only url, caption: name files with the images in them"),
        ("twice.parquet", "two of its columns have the same name in lower case: jpg, JPG; rename one"),
    ],
)
def test_files_that_cannot_be_used(kind, message, whole, tmp_path):
    path = str(tmp_path / kind)
    stem = kind.partition(".")[0]
    table = downloaded(200)
    if stem == "images":
        table = table.select(["url", "caption"])
    if stem == "twice":
        table = pa.table({"jpg": [b"x"], "JPG": [b"y"]})
    if kind.endswith(".parquet"):
        write_parquet(path, table)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    if stem == "cut":
        cut(path, 0.6)
    if stem == "end":
        Path(path).write_bytes(Path(path).read_bytes()[:-8])
    if stem in ("none", "text"):
        Path(path).write_bytes(b"" if stem == "none" else b"key,caption\n" * 100)
    with pytest.raises(SampleError, match=f"shard {re.escape(path)} cannot be read: .*{message}"):
        open_shards([path], index=IndexCache(tmp_path / "cache"), whole=whole)


def test_damage_inside_a_parquet_file_is_met_when_it_is_opened(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", downloaded(200))
    data = bytearray(Path(path).read_bytes())
    data[100:3000] = b"\xff" * 2900
    Path(path).write_bytes(data)
    source = open_shards([path], index=IndexCache(tmp_path / "cache"))
    assert source.sizes == [200]
    for number in (0, 1):
        with pytest.raises(SampleError, match=r"x\.parquet cannot be read: it is damaged") as error:
            source.read(number)
        assert error.value.kind == "unreadable shard"


def test_an_outage_is_not_taken_for_damage():
    class Failing(io.BytesIO):
        def read(self, *_):
            raise TimeoutError("the network is down")

    with pytest.raises(TimeoutError, match="the network is down"):
        count_rows(Failing(bytes(1000)), "https://example.com/x.parquet")


def test_what_is_no_shard_is_looked_at_once(server, tmp_path, monkeypatch):
    (tmp_path / "web" / "0.tar").write_bytes(b"<html>" * 1000)
    (tmp_path / "web" / "sizes.json").write_text('{"0.tar": 8}')
    source = open_shards([f"{server.url}/0.tar"], index=IndexCache(tmp_path / "cache"))
    for number in range(8):
        with pytest.raises(SampleError, match=r"0\.tar cannot be read: not a tar file") as error:
            source.read(number)
        assert error.value.kind == "unreadable shard"
        monkeypatch.setattr(source.index, "complete", None)


def test_few_rows_are_in_memory_at_once(tmp_path):
    images = [os.urandom(50_000) for _ in range(1000)]
    table, path = pa.table({"jpg": images, "n": list(range(1000))}), f"{tmp_path}/x.parquet"
    # a row group that is the whole file, of pages that are not
    pq.write_table(table, path, row_group_size=1000, use_dictionary=False, write_batch_size=16)
    del table
    before = pa.total_allocated_bytes()
    del images
    most = 0
    tracemalloc.start()
    with Path(path).open("rb") as file:
        for _ in members(file, path):
            most = max(most, pa.total_allocated_bytes() - before)
    _, python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most + python < 15e6  # of 50 MB


def test_a_file_that_was_replaced(tmp_path):
    index, path = IndexCache(tmp_path / "cache"), tmp_path / "x.parquet"
    write_parquet(path, downloaded(20))
    counted, opened = open_shards([str(path)], index=index), open_shards([str(path)], index=index)
    assert fields(opened.read(3))["key"] == "000000003"
    write_parquet(path, downloaded(20, first=100))
    os.utime(path, ns=(1, 1))
    assert fields(opened.read(4))["key"] == "000000004"  # it was opened before
    with pytest.raises(SampleError, match="the shard was replaced after its samples were counted"):
        counted.read(3)
    again = open_shards([str(path)], index=index)
    assert fields(again.read(3))["key"] == "000000103"
    assert again.shards[0].counted_in is None  # the index is in the cache by now
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1


def test_identities_of_rows(tmp_path):
    images = pa.array([b"x"] * 6)
    path = write_parquet(tmp_path / "x.parquet", pa.table({"jpg": images, "label": ["a", "b", "a", "c", "c", "c"]}))
    index = IndexCache(tmp_path / "cache")
    first = identities(open_shards([path], index=index), "label")
    assert len(set(first.tolist())) == 3
    (tmp_path / "cache" / "shards").rename(tmp_path / "away")
    assert identities(open_shards([path], index=index), "label").tolist() == first.tolist()
    assert not (tmp_path / "cache" / "shards").exists()  # the numbers were kept


def test_index_command(tmp_path, capsys):
    path = write_parquet(tmp_path / "x.parquet", downloaded(30))
    code, _, _ = run_command(capsys, "index", path, "--json", tmp_path / "found.json")
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["samples"], found["lost"]) == (30, 0)
    assert found["bytes"] > 30 * 1024  # the index was made, and did not only count
    assert not is_direct(path)


@pytest.mark.long
def test_training_on_parquet(tmp_path):
    pytest.importorskip("webdataset")
    from clipfast.training import TrainConfig
    from clipfast.training.loop import train

    from .conftest import TINY

    for number in range(2):
        rows = [sample(n) for n in range(20)]
        columns = {key: [row[key] for row in rows] for key in ("png", "txt")}
        if number:
            columns["png"][3] = None
        write_parquet(tmp_path / f"{number}.parquet", pa.table(columns | {"label": [str(n) for n in range(20)]}))
    config = TrainConfig(
        train_data=str(tmp_path), model=TINY, batch_size=8, epochs=1, workers=1, logs=str(tmp_path), name="run",
        device="cpu", warmup=1, max_bad_fraction=0.2,
    )  # fmt: skip
    folder, signum = train(config)
    assert signum is None
    results = json.loads((folder.path / "results.json").read_text())
    assert results["steps"] == 5
    assert results["skipped_kinds"] == {"no image": 1}
    assert picture(0)


def offsets_to_nowhere(data, _):
    at = data.index(np.cumsum([0, *(len(b"image %d" % n) for n in range(8))]).astype("<i4").tobytes())
    return data[: at + 12] + b"\xff\xff\xff\x7f" + data[at + 16 :]


def zeros_for_a_batch(data, _):
    at = [match.start() for match in re.finditer(b"\xff\xff\xff\xff..\0\0", data, re.DOTALL)][2]
    return data[:at] + bytes(8) + data[at + 8 :]


def a_footer_that_forgets(data, batches):
    first = [match.start() for match in re.finditer(b"\xff\xff\xff\xff..\0\0", data, re.DOTALL)][1]
    at = data.index(batches.to_bytes(4, "little") + first.to_bytes(8, "little"))  # the list of them
    return data[:at] + (batches - 1).to_bytes(4, "little") + data[at + 4 :]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("form", "damage", "message"),
    [
        ("stream", offsets_to_nowhere, "it is damaged"),  # pyarrow reads other memory there, or ends the process
        ("file", offsets_to_nowhere, "it is damaged"),
        ("stream", zeros_for_a_batch, r"its end mark stands at byte \d+ of \d+: what follows cannot be read"),
        ("file", a_footer_that_forgets, "it has 5 batches of rows, but its footer lists 4"),
    ],
)
def test_damage_in_an_arrow_file_is_named(form, damage, message, whole, tmp_path):
    table = pa.table({"jpg": [b"image %d" % n for n in range(40)], "text": [f"words {n}" for n in range(40)]})
    path = tmp_path / "x.arrow"
    with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=8)
    path.write_bytes(damage(path.read_bytes(), 5))
    with pytest.raises(SampleError, match=rf"x\.arrow cannot be read: .*{message}"):
        # what is wrong in the values is met when the shard is copied
        open_shards([str(path)], index=IndexCache(tmp_path / "cache"), whole=whole).read(0)


DYING = "import os, socket, sys; socket.socket(fileno=int(sys.argv[1])).recv(1); os.kill(os.getpid(), {})"


@pytest.mark.parametrize(("number", "said"), [(11, "damaged: .* ended with SIGSEGV"), (9, "was killed, as .* memory")])
def test_a_reader_that_ends_names_the_file_and_is_replaced(number, said, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", downloaded(20))
    index = IndexCache(tmp_path / "cache")
    assert open_shards([path], index=index).sizes == [20]
    contained._reader._process.kill()
    contained._reader._process.wait()
    assert open_shards([path], index=index).sizes == [20]  # it had not ended by this file
    contained._end()
    with monkeypatch.context() as patch:
        patch.setattr(contained, "PROGRAM", DYING.format(number))
        with pytest.raises(SampleError, match=rf"x\.parquet cannot be read: .*{said}"):
            open_shards([path], index=index)
    assert open_shards([path], index=index).sizes == [20]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_while_a_reader_is_waited_for_holds_nothing_up(tmp_path, monkeypatch):
    """The process lives on, as a data worker does."""
    path = write_parquet(tmp_path / "x.parquet", downloaded(20))
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600], daemon=True)

    class Lock:
        def __enter__(self):
            child.start()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(contained, "_lock", Lock())
    options = {"index": IndexCache(tmp_path / "cache"), "whole": True}
    copying = threading.Thread(target=open_shards, args=[[path]], kwargs=options, daemon=True)
    copying.start()
    copying.join(30)
    child.kill()
    child.join()
    assert not copying.is_alive()
    assert open_shards([path], index=options["index"]).shards[0].size

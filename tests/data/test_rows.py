"""Parquet and Arrow shards: row i is sample i, whatever it contains, and a damaged shard does not affect others."""

import datetime
import decimal
import io
import multiprocessing
import os
import re
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from clipfast.data import contained, expand_shards, identities
from clipfast.data.contained import count_rows
from clipfast.data.rows import members
from clipfast.models.images import SampleError

from .conftest import copies, opened
from .rows import IMAGE, downloaded, fields, save_to_disk, write_arrow, write_parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_every_row_is_the_sample_of_its_number(form, tmp_path):
    table = downloaded(120)
    path = write_parquet(tmp_path / "x.parquet", table) if form == "parquet" else tmp_path / "x.arrow"
    if form != "parquet":
        write_arrow(path, table, form)
    source = opened(path)
    assert source.sizes == [120]
    assert not copies(tmp_path)  # rows are counted in the footer, without a copy
    for number in np.random.default_rng(0).permutation(120).tolist():
        raw = source.read(number)
        found = fields(raw)
        assert (found["key"], found["width"], found["error_message"]) == (f"{number:09d}", 24, None)
        assert found["similarity"] == (None if number % 2 else 0.25)
        assert found["caption"] == (None if number % 10 == 3 else f"a caption {number}, été 猫")
        assert raw.get("jpg") == (None if number % 10 in (3, 5) else b"image %d" % number)


def test_no_rows(tmp_path):
    path = write_parquet(tmp_path / "0.parquet", downloaded(0))
    for whole in (False, True):
        assert opened(path, whole=whole).sizes == [0]


def test_values_that_are_not_json(tmp_path):
    moment = datetime.datetime(2024, 2, 29, 12, 30)
    offsets = pa.py_buffer(np.array([0, 4], np.int32).tobytes())
    table = pa.table({
        "png": [b"x"],
        "when": [moment],
        "late": pa.array([2**60], pa.timestamp("ms")),  # this time is a year beyond Python's range
        "price": pa.array([decimal.Decimal("1.50")]),
        "nested": [{"inner": [b"bytes", b""], "infinite": float("inf"), "text": "é"}],
        "pairs": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "kind": pa.array(["red"]).dictionary_encode(),
        # text that is not UTF-8: Parquet does not check it
        "text": pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"caf\xe9")]),
        "json": ['{"label": "thing", "price": "0"}'],
        "Wörter/Bilder": [b"y"],
    })  # fmt: skip
    raw = opened(write_parquet(tmp_path / "t.parquet", table)).read(0)
    assert fields(raw) == {
        "when": str(moment), "late": None, "price": "1.50", "pairs": [["a", 1]], "kind": "red", "text": None,
        "nested": {"inner": [None, None], "infinite": None, "text": "é"}, "label": "thing",
    }  # fmt: skip
    assert (raw["png"], raw["wörter_bilder"]) == (b"x", b"y")


def test_images_by_path(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"image 0")
    os.mkfifo(tmp_path / "pipe")
    paths = ["images/0.png", "missing.png", f"{tmp_path}/images/0.png", "pipe", "images", "nul\0", None]
    images = pa.array([{"bytes": None, "path": path} for path in paths], IMAGE)
    path = write_parquet(tmp_path / "p.parquet", pa.table({"image": images, "text": paths}))
    expected = [b"image 0", None, b"image 0", None, None, None, None]
    source = opened(path, f"file://{path}")
    # The same file opened as a remote shard gives no images, since its paths must not name local files.
    assert [source.read(number).get("image") for number in range(14)] == [*expected, *[None] * 7]


def test_folders_of_shards(tmp_path):
    names = save_to_disk(tmp_path / "saved" / "train", [9, 4, 7])
    save_to_disk(tmp_path / "saved" / "test", [1])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    folder = tmp_path / "saved" / "train"
    (folder / "cache-1.arrow").write_bytes(b"left by another program")
    shards = expand_shards(str(folder))
    assert shards == [str(folder / name) for name in reversed(names)]
    source = opened(*shards)
    assert source.sizes == [7, 4, 9]
    for number, row in enumerate([*range(13, 20), *range(9, 13), *range(9)]):
        raw = source.read(number)
        assert fields(raw) == {"captions": [f"a {row}", f"b {row}"]}
        assert raw.get("image") == (b"image %d" % row if row % 5 else None)
    with pytest.raises(ValueError, match=r"saved holds the splits test, train: name one of them, as .*saved/test"):
        expand_shards(f"{tmp_path}/saved")
    (folder / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(ValueError, match=r"state\.json does not list the files of a dataset"):
        expand_shards(str(folder))
    for suffix in (".parquet", ".tar"):  # beside tar files, Parquet files are img2dataset's metadata
        for name in ("1", "0", "note.txt"):
            (tmp_path / (name + suffix)).touch()
        (tmp_path / f"note.txt{suffix}").rename(tmp_path / "note.txt")
        assert expand_shards(str(tmp_path)) == [f"{tmp_path}/0{suffix}", f"{tmp_path}/1{suffix}"]


BATCH = re.compile(b"\xff\xff\xff\xff..\0\0", re.DOTALL)  # the beginning of a batch of rows in an Arrow file


def wild_offsets(data):
    """Return an Arrow shard with an offset that points outside of its buffers."""
    at = data.index(np.cumsum([0, *(len(b"image %d" % n) for n in range(8))]).astype("<i4").tobytes())
    return data[: at + 12] + b"\xff\xff\xff\x7f" + data[at + 16 :]


def zeroed_batch(data):
    """Return an Arrow shard whose third record batch lacks its length."""
    at = [match.start() for match in BATCH.finditer(data)][2]
    return data[:at] + bytes(8) + data[at + 8 :]


def short_footer(data):
    """Return an Arrow shard whose footer lists one record batch too few."""
    first = [match.start() for match in BATCH.finditer(data)][1]
    at = data.index((5).to_bytes(4, "little") + first.to_bytes(8, "little"))
    return data[:at] + (4).to_bytes(4, "little") + data[at + 4 :]


NO_PARQUET, NO_ARROW = "it is damaged, or not a Parquet file", "it is damaged, or not an Arrow file"
DAMAGE = {
    "cut": ("parquet", lambda data: data[: len(data) * 6 // 10], NO_PARQUET),
    "text": ("parquet", lambda data: b"key,caption\n" * 100, NO_PARQUET),
    "cut stream": ("stream", lambda data: data[: len(data) * 6 // 10], NO_ARROW),
    "no bytes": ("stream", lambda data: b"", NO_ARROW),
    "no end": ("stream", lambda data: data[:-8], "do not end as an Arrow stream does"),
    "zeros": ("stream", zeroed_batch, r"its end mark stands at byte \d+ of \d+"),
    "offsets": ("stream", wild_offsets, "it is damaged"),  # pyarrow by itself would read foreign memory, or crash
    "offsets in a file": ("file", wild_offsets, "it is damaged"),
    "footer": ("file", short_footer, "it has 5 batches of rows, but its footer lists 4"),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case, whole, tmp_path):
    form, damage, message = DAMAGE[case]
    table = pa.table({"jpg": [b"image %d" % n for n in range(40)], "text": [f"words {n}" for n in range(40)]})
    path = tmp_path / ("x.parquet" if form == "parquet" else "x.arrow")
    write_parquet(path, table) if form == "parquet" else write_arrow(path, table, form, rows=8)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SampleError, match=rf"x\.(arrow|parquet) cannot be read: .*{message}"):
        # a damaged value is found when the shard is copied
        opened(path, whole=whole).read(0)
    assert form == "parquet" or contained._reader is None  # a process that has met a damaged file is ended


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"url": ["x"], "caption": ["y"]}, "it has no column of image bytes, only url, caption"),
        ({"jpg": [b"x"], "JPG": [b"y"]}, "two of its columns have the same name in lower case: jpg, JPG"),
    ],
)
def test_columns_that_cannot_be_used(table, message, tmp_path):
    with pytest.raises(SampleError, match=message):
        opened(write_parquet(tmp_path / "x.parquet", pa.table(table)))


def test_an_outage_is_not_taken_for_damage():
    class Failing(io.BytesIO):
        def read(self, *_):
            """Raise TimeoutError, as a read from a server of shards that does not answer."""
            raise TimeoutError("the network is down")

    with pytest.raises(TimeoutError, match="the network is down"):
        count_rows(Failing(bytes(1000)), "https://example.com/x.parquet")


def test_few_rows_are_in_memory_at_once(tmp_path):
    images = [os.urandom(50_000) for _ in range(1000)]
    table, path = pa.table({"jpg": images, "n": list(range(1000))}), f"{tmp_path}/x.parquet"
    # The file has a single row group, so memory stays small only if rows are read by pages.
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
    assert most + python < 15e6  # rows take less than 15 MB of memory, and the file has 50 MB


def test_a_file_that_was_replaced(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, downloaded(20))
    counted, used = opened(path), opened(path)
    assert fields(used.read(3))["key"] == "000000003"
    write_parquet(path, downloaded(20, first=100))
    os.utime(path, ns=(1, 1))
    assert fields(used.read(4))["key"] == "000000004"  # the row comes from the copy of the old file
    with pytest.raises(SampleError, match="the shard was replaced after its samples were counted"):
        counted.read(3)
    again = opened(path)
    assert fields(again.read(3))["key"] == "000000103"
    assert len(copies(tmp_path)) == 1


def test_identities_of_rows_are_kept(tmp_path):
    images = pa.array([b"x"] * 6)
    path = write_parquet(tmp_path / "x.parquet", pa.table({"jpg": images, "label": ["a", "b", "a", "c", "c", "c"]}))
    first = identities(opened(path), "label")
    assert len(set(first.tolist())) == 3
    (tmp_path / "cache" / "shards").rename(tmp_path / "away")
    assert identities(opened(path), "label").tolist() == first.tolist()
    assert not copies(tmp_path)


@pytest.mark.parametrize(("number", "said"), [(11, "damaged: .* ended with SIGSEGV"), (9, "was killed, as .* memory")])
def test_a_reader_that_ends_names_the_file_and_is_replaced(number, said, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", downloaded(20))
    assert opened(path).sizes == [20]
    contained._reader.kill()
    contained._reader.wait()
    assert opened(path).sizes == [20]  # a new process is started to read Parquet
    contained._end()
    with monkeypatch.context() as patch:
        patch.setattr(contained, "PROGRAM", f"import os; input(); os.kill(os.getpid(), {number})")
        with pytest.raises(SampleError, match=rf"x\.parquet cannot be read: .*{said}"):
            opened(path)
    assert opened(path).sizes == [20]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_while_a_reader_is_waited_for_holds_nothing_up(tmp_path, monkeypatch):
    """A process forked during the wait for a Parquet reader lives on, as a data worker does, and does not block."""
    path = write_parquet(tmp_path / "x.parquet", downloaded(20))
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600], daemon=True)
    waiting, forked = threading.Event(), threading.Event()

    class Lock:
        def __enter__(self):
            waiting.set()
            assert forked.wait(30)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(contained, "_lock", Lock())
    copying = threading.Thread(target=opened, args=[path], kwargs={"whole": True}, daemon=True)
    copying.start()
    assert waiting.wait(30)
    child.start()  # the main thread forks the child, as it forks data workers
    forked.set()
    copying.join(30)
    lives = child.is_alive()
    child.kill()
    child.join()
    assert lives
    assert not copying.is_alive()
    assert opened(path).shards[0].size

"""Tables of images (CSV, JSON Lines): every pair is read back by its number, and all kinds of sources are equal."""

import csv
import gzip
import io
import json
import os
import random
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch

from clipfast.data import IndexCache, caption, identities, metadata, pair_loader
from clipfast.data.formats import unpacked
from clipfast.data.samples import image_bytes
from clipfast.data.staging import format_of
from clipfast.evaluate.labelled import LabelledSet
from clipfast.models.images import SampleError

from ..small_runs import picture, write_shard
from .conftest import opened
from .tables import (
    EXPECTED,
    NO_IMAGE,
    PAIRS,
    TEXTS,
    batches,
    pairs_of,
    texts_of,
    write_csv,
    write_images,
    write_jsonl,
    write_side_cars,
)  # fmt: skip

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t.csv", {}),
        ("t.tsv", {"separator": "\t"}),
        ("t.csv", {"separator": "\t"}),
        ("t.csv", {"separator": ";", "end": "\r\n"}),
        ("t.csv", {"separator": "|", "end": "\r", "start": "\ufeff"}),
        ("T.CSV", {"header": ("file_name", "caption"), "start": "\r\n\n"}),
    ],
)
def test_csv_files_of_all_kinds(tmp_path, name, options):
    """CSV files of all dialects are read; a given separator that the header lacks is meant for another table."""
    path = write_csv(write_images(tmp_path) / name, **options)
    path.write_bytes(path.read_bytes()[: -len(options.get("end", "\n"))])  # the last line lacks its line break
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for shard, given in ((path, None), (path, "|"), (packed, None)):
        assert pairs_of(opened(shard, index=IndexCache(separator=given))) == EXPECTED


def test_json_lines(tmp_path):
    for image, text, many in (("image", "text", False), ("filepath", "caption", True), ("file_name", "title", False)):
        path = write_jsonl(write_images(tmp_path) / "t.jsonl", image, text, many)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))
        assert pairs_of(opened(path)) == EXPECTED
        os.utime(path, ns=(1, 1))


def test_images_are_looked_for_beside_the_table_and_then_here(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "data")
    (tmp_path / "here" / "more").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Path("more/x.png").write_bytes(b"here")
    Path("000.png").write_bytes(b"not this one")
    rows = [("000.png", "a"), ("more/x.png", "b"), (str(folder / "001.png"), "c"), (" ../data/002.png ", "d")]
    write_csv(folder / "t.csv", rows=rows)
    for name in ("../data/t.csv", str(folder / "t.csv")):
        assert pairs_of(opened(name)) == [
            (PAIRS[0][1], "a"), (b"here", "b"), (PAIRS[1][1], "c"), (PAIRS[2][1], "d"),
        ]  # fmt: skip
    # A remote table has no local folder, so its paths are relative to the working folder.
    assert image_bytes(opened(f"file://{folder}/t.csv").read(0)) == b"not this one"
    assert image_bytes(opened(f"pipe:cat {folder}/t.csv").read(2)) == PAIRS[1][1]
    Path("more/x.png").unlink()
    with pytest.raises(SampleError, match=r"no file 'more/x\.png'"):
        opened(f"file://{folder}/t.csv").read(1)


@hypothesis.given(st.text(st.sampled_from('ab",;\t\r\n é\u2028\x85'), max_size=40), st.sampled_from(",\t;a"))
@hypothesis.settings(max_examples=300, deadline=None)
def test_extents_are_the_rows_of_pythons_csv(body, separator):
    data = f"x{separator}y\n{body}".encode()
    rows = csv.reader([*io.StringIO(data.decode(), newline=""), "\n"], delimiter=separator, skipinitialspace=True)
    expected = list(rows)
    is_open = expected[-1] != []  # an open quote takes in the added line
    expected = [row for row in expected[: -1 if is_open else None] if row][1:]
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        form = format_of("t.csv", separator)
        if not expected and not is_open:
            with pytest.raises(ValueError, match="it is empty"):
                form.scan(file, "t.csv")
            return
        found, damage = form.scan(file, "t.csv")
        parse = form.parser("t.csv", file.fileno())
    assert len(damage) == is_open
    for extent, row in zip(found, expected, strict=True):
        begin, length = unpacked(extent)
        if len(row) <= 2:
            assert list(metadata(parse(data[begin : begin + length])).values()) == row
            continue
        with pytest.raises(SampleError, match=f"the row has {len(row)} fields for 2 columns"):
            parse(data[begin : begin + length])


def numbered(path, count, changes):
    """Write a CSV shard of numbered rows, some replaced by ``changes``; return the source and a reader of captions."""
    rows = [changes.get(number, f"{number}.png,caption {number}") for number in range(count)]
    path.write_text("\n".join(["filepath,title", *rows]))
    source = opened(path)
    return source, lambda number: metadata(source.read(number, NO_IMAGE))["title"]


def test_a_quote_that_nothing_closes_loses_what_it_swallows(tmp_path):
    source, title = numbered(tmp_path / "long.csv", 20_000, {100: '100.png,"caption 100'})
    ((place, lost),) = source.shards[0].damage.items()
    assert place == "line 102: field larger than field limit (131072)"
    assert 5000 < lost < 8000
    assert source.sizes == [20_000 - lost]
    texts = [title(number) for number in (99, 100, 20_000 - lost - 1)]
    assert texts == ["caption 99", f"caption {100 + lost}", "caption 19999"]
    source, title = numbered(tmp_path / "short.csv", 100, {60: '60.png,"caption 60'})
    ((place, lost),) = source.shards[0].damage.items()
    assert place.startswith("line 62: nothing closes a quote")
    assert (lost, source.sizes, title(59)) == (40, [60], "caption 59")


@pytest.mark.parametrize(
    ("name", "header", "texts"),
    [
        ("t.tsv", ("filepath", "title"), ('"Mind the gap', 'the end"')),
        # The second row's quote ends the stray quote.
        ("t.csv", ("filepath", "title"), ('"Mind the gap', '"a cat, asleep"')),
        ("t.csv", ("n", "title", "filepath"), ('"Mind the gap', '"the end"')),
    ],
)
def test_rows_that_a_stray_quote_swallows_are_lost_by_name(tmp_path, name, header, texts):
    separator = "\t" if name == "t.tsv" else ","
    rows = [("1", f"caption {number}", f"{number}.jpg") for number in range(40)]
    rows[5] = ("1", '"two lines,\nof which none, is a row: 7.jpg"', "5.jpg")
    rows[10], rows[20] = ("1", texts[0], "10.jpg"), ("1", texts[1], "20.jpg")
    rows = [row if len(header) == 3 else (row[2], row[1]) for row in rows]
    (tmp_path / name).write_text("\n".join(map(separator.join, [header, *rows])) + "\n")
    source = opened(tmp_path / name)
    ((place, lost),) = source.shards[0].damage.items()
    assert place.startswith("line 13: a quote")  # line 13 has the stray quote of rows[10]
    assert (lost, source.sizes) == (11, [29])
    assert caption(source.read(5, NO_IMAGE)).startswith("two lines,")


def test_quotes_spaces_and_columns_of_one_name(tmp_path):
    text = 'filepath, title,title,,\n000.png, "a cat, asleep",b,,\n001.png,"two\nlines"\n'
    (write_images(tmp_path) / "t.csv").write_text(text)
    assert pairs_of(opened(f"{tmp_path}/t.csv")) == [(PAIRS[0][1], "a cat, asleep"), (PAIRS[1][1], "two\nlines")]
    (tmp_path / "t.csv").write_text('filepath title\n001.png "a cat"\n')
    assert pairs_of(opened(f"{tmp_path}/t.csv", index=IndexCache(separator=" "))) == [(PAIRS[1][1], "a cat")]
    # The separator determines which quotes begin a field, and so where rows end: each separator has its own index.
    (tmp_path / "t.csv").write_text('a;b,c\nx;"1\ny;2"\n')
    for separator, sizes in ((";", [1]), (",", [2]), (None, [2]), (";", [1])):
        assert opened(f"{tmp_path}/t.csv", index=IndexCache(separator=separator)).sizes == sizes


def test_a_record_that_is_too_long_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("clipfast.data.tables.MAX_LENGTH", 1000)
    write_csv(tmp_path / "t.csv", rows=[("a.png", "a"), ("b.png", "\n".join(["x" * 900] * 3)), ("c.png", "c")])
    lines = [json.dumps({"caption": text}) for text in ("a", "x" * 3000, "c")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    for name in ("t.csv", "t.jsonl"):
        source = opened(f"{tmp_path}/{name}")
        assert [count for place, count in source.shards[0].damage.items() if "1000 bytes or more" in place]
        assert caption(source.read(0, NO_IMAGE)) == "a"
        assert caption(source.read(source.sizes[0] - 1, NO_IMAGE)) == "c"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "it is empty"),
        ("t.csv", b"1.jpg,a cat\n2.jpg,a dog\n", "it has no header, but an image in its first line, '1.jpg'"),
        ("t.tsv", "filepath\ttitle\n".encode("utf-16"), "it is in UTF-16"),
        ("t.csv", b"sep=;\nfilepath;title\n1.jpg;a\n", "its first line is a note for Excel"),
        ("t.csv", b"  , \n1.jpg,a\n", "it names no columns"),
        ("t.csv", b'"filepath,title\n1,a\n', "its header cannot be read: nothing closes a quote"),
        ("t.csv", b'"' + b"x" * 200_000, "its header cannot be read: field larger than field limit"),
        ("t.jsonl", b'[\n{"image": "1.jpg"}]', r"not JSON Lines, .*jq -c '\.\[\]'"),
        ("t.tsv", b"filepath\ttit", "it is empty: no row"),
        ("t.jsonl", b"<html>", "not JSON Lines.*: json cannot be read"),
        # A truncated compressed table is refused, since its first rows alone would look like a complete table.
        (
            "t.csv.gz",
            gzip.compress(b"filepath,title\n" + random.Random(0).randbytes(999), mtime=0)[:-99],
            "compression is broken",
        ),
        ("t.jsonl.gz", gzip.compress(b'{"image": "1.jpg"}\n' * 99, mtime=0)[:-9], "compression is broken"),
    ],
)
def test_what_is_no_table(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=rf"shard .*{name} cannot be read: .*{message}") as error:
        opened(tmp_path / name)
    assert error.value.kind == "unreadable shard"


def test_broken_rows_are_named(tmp_path):
    rows = [("a.png", "a"), ("b.png", "b", "c", "d"), ("c.png",), ("", "no name"), ("e.png", "e"), ("f.png", "f")]
    write_csv(write_images(tmp_path) / "t.csv", rows=rows)
    data = (tmp_path / "t.csv").read_bytes().replace(b"e.png,e", b"e.png,\xff").replace(b",f", b",f\0\0")
    (tmp_path / "t.csv").write_bytes(data)
    (tmp_path / "t.jsonl").write_bytes(
        b'{"image": "000.png", "caption": "x"}\n{"image"\n[]\n{"image": 7, "a": 1}\n'
        b'{"image": {"path": "000.png"}, "path": " "}\n{"image": ["x"], "path": "000.png"}\n'
    )
    expected = {
        "t.csv": ["missing image", "broken row", "missing image", "no image", "broken row", "broken row"],
        "t.jsonl": [None, "broken json", "broken json", "no image", "no image", None],
    }
    for name, kinds in expected.items():
        source = opened(f"{tmp_path}/{name}")
        found = []
        for number in range(len(source)):
            try:
                found.append(None if image_bytes(source.read(number)) == PAIRS[0][1] else "another image")
            except SampleError as error:
                found.append(error.kind)
        assert found == kinds
    assert len(set(identities(opened(f"{tmp_path}/t.csv"), "caption").tolist())) == 6


def test_only_images_come_out_of_a_table(tmp_path):
    """A table can name only regular image files of limited size; each other file is an error of its sample."""
    folder = write_images(tmp_path / "data")
    (tmp_path / "secret.txt").write_text("a secret")
    os.mkfifo(folder / "pipe.png")
    (folder / "aaa").mkdir()
    (folder / "large.png").touch()
    os.truncate(folder / "large.png", (1 << 28) + 1)
    (folder / "broken.png").write_bytes(picture(0)[:100])
    named = {
        "../secret.txt": "not an image", str(tmp_path / "secret.txt"): "not an image", "/etc/passwd": "not an image",
        "/dev/zero": "missing image", "pipe.png": "missing image", "aaa": "missing image", "large.png": "huge image",
        "x" * 5000: "missing image", "nul\0.png": "missing image", "000.png/x": "missing image",
        "broken.png": "broken image", "https://example.com/x.png": "missing image",
    }  # fmt: skip
    (folder / "t.jsonl").write_text("".join(json.dumps({"image": name, "text": "x"}) + "\n" for name in named))
    images = LabelledSet(f"{folder}/t.jsonl")
    with pytest.raises(ValueError, match=r"not one of the images of .*; first: t\.jsonl/\.\./secret\.txt"):
        list(images)
    assert [skipped.kind for skipped in images.skipped] == list(named.values())
    assert "a secret" not in str(images.skipped)


def test_large_tables_are_indexed_in_little_memory(tmp_path):
    """The index of a CSV table holds a few bytes for each row, not Python objects."""
    count = 50_000
    with (tmp_path / "t.csv").open("w", newline="") as file:
        file.write("filepath,title\r\n")
        file.writelines(f'{number:08}.jpg,"a caption, of ""number"" {number}\nof two"\r\n' for number in range(count))
    tracemalloc.start()
    source = opened(tmp_path / "t.csv")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.sizes == [count]
    assert peak < 100 * count
    for number in (0, 7_777, count - 1):
        assert metadata(source.read(number, NO_IMAGE))["title"] == f'a caption, of "number" {number}\nof two'


def test_captions_are_compared_without_reading_images(tmp_path):
    images = sum(len(data) for _, data, _ in PAIRS)
    made = batches(write_csv(write_images(tmp_path) / "t.csv"), len(TEXTS), unique_by="caption")
    assert made.sources[0].bytes_read < images
    for number in range(8):
        assert len(set(texts_of(made[number]))) == len(TEXTS)


@pytest.fixture
def sources(tmp_path):
    """Write the same pairs as shards in every format, and return the shards."""
    folder = write_side_cars(write_images(tmp_path / "photos"))
    samples = [{"png": data, "txt": text.encode()} for _, data, text in PAIRS]
    rows = {"png": [data for _, data, _ in PAIRS], "caption": [text for _, _, text in PAIRS]}
    parquet = tmp_path / "s.parquet"
    pq.write_table(pa.table(rows), parquet)
    return [
        write_shard(tmp_path / "s.tar", samples), write_csv(folder / "t.csv"), write_jsonl(folder / "t.jsonl"), folder,
        parquet,
    ]  # fmt: skip


def test_batches_are_the_same_from_every_source(sources):
    made = [pair_loader(batches(shard), 0, 4, shard.suffix == ".parquet") for shard in sources]
    for first, *others in zip(*made, strict=True):
        assert first.skipped == []
        # Pixels in float32 would take four times the bytes on the way to a GPU.
        assert first.images.dtype == torch.uint8
        for other in others:
            assert torch.equal(first.images, other.images)
            assert torch.equal(first.texts, other.texts)


def test_evaluation_reads_every_source(tmp_path, sources):
    found = []
    for shard in sources:
        images = LabelledSet(str(shard))
        found.append([(image.image.tobytes(), image.label, image.caption) for image in images])
        assert images.skipped == []
    assert len(found[0]) == len(PAIRS)
    assert found == [found[0]] * len(sources)
    write_csv(tmp_path / "photos" / "t.csv", ("filepath", "title", "class", "kind"), rows=[("001.png", "a", "b", "c")])
    (image,) = LabelledSet(f"{tmp_path}/photos/t.csv", group_by="kind", label_by="class")
    assert (image.label, image.caption, image.group) == ("b", "a", "c")


def test_an_evaluation_names_what_is_lost(tmp_path, sources):
    """An evaluation reports each pair lost in a damaged shard by name: the place of the damage, and a number."""
    path, data = sources[0], bytearray(sources[0].read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes([7]) * 20_000
    path.write_bytes(data)
    images = LabelledSet(f"{path}::{path}")
    read = len(list(images))
    names = [skipped.name for skipped in images.skipped if skipped.kind == "damaged shard"]
    ((place, lost),) = opened(path).shards[0].damage.items()
    assert names == [f"s.tar/{place.split(': ')[0]}, pair {pair + 1}" for pair in range(lost)] * 2
    assert read + len(images.skipped) >= 2 * len(PAIRS)

"""Tables of images: every pair is read back exactly, by its number, and what is wrong is named."""

import csv
import gzip
import io
import json
import os
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest

from clipfast.data import (
    IndexCache,
    caption,
    metadata,
    open_shards,
)
from clipfast.data.formats import unpacked
from clipfast.data.kinds import format_of
from clipfast.data.samples import image_bytes
from clipfast.evaluation.labelled import LabelledSet
from clipfast.images import SampleError

from .conftest import picture
from .tables import EXPECTED, NO_IMAGE, PAIRS, pairs_of, write_csv, write_images, write_jsonl

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t.csv", {}),
        ("t.tsv", {"separator": "\t"}),
        ("t.csv", {"separator": "\t"}),
        ("t.csv", {"separator": ";", "end": "\r\n"}),
        ("t.csv", {"separator": "|", "end": "\r", "start": "\ufeff"}),
        ("t.csv", {"header": ("image", "text"), "start": "\r\n\n"}),
        ("T.CSV", {"header": ("file_name", "caption")}),
    ],
)
@pytest.mark.parametrize("given", [None, "|"])
def test_csv_files_of_all_kinds(tmp_path, name, options, given):
    """A separator that was given for another table of the run, and that this one's header does not have, is not its."""
    path = write_csv(write_images(tmp_path) / name, **options)
    path.write_bytes(path.read_bytes()[: -len(options.get("end", "\n"))])  # without the end of the last line
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for shard in (path, packed):
        assert pairs_of(open_shards([str(shard)], index=IndexCache(separator=given))) == EXPECTED


def test_json_lines(tmp_path):
    for image, text, many in (("image", "text", False), ("filepath", "caption", True), ("file_name", "title", False)):
        path = write_jsonl(write_images(tmp_path) / "t.jsonl", image, text, many)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))
        assert pairs_of(open_shards([str(path)])) == EXPECTED
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
        assert pairs_of(open_shards([name])) == [
            (PAIRS[0][1], "a"), (b"here", "b"), (PAIRS[1][1], "c"), (PAIRS[2][1], "d"),
        ]  # fmt: skip
    # a table from elsewhere has no folder
    assert image_bytes(open_shards([f"file://{folder}/t.csv"]).read(0)) == b"not this one"
    assert image_bytes(open_shards([f"pipe:cat {folder}/t.csv"]).read(2)) == PAIRS[1][1]
    Path("more/x.png").unlink()
    for start in ("file://", "pipe:cat "):
        with pytest.raises(SampleError, match=r"no file 'more/x\.png'.*; single images are not read from the network"):
            open_shards([f"{start}{folder}/t.csv"]).read(1)


@hypothesis.given(st.text(st.sampled_from('ab",;\t\r\n é\u2028\x85'), max_size=40), st.sampled_from(",\t;a"))
@hypothesis.settings(max_examples=500, deadline=None)
def test_extents_are_the_rows_of_pythons_csv(body, separator):
    data = f"x{separator}y\n{body}".encode()
    rows = csv.reader([*io.StringIO(data.decode(), newline=""), "\n"], delimiter=separator, skipinitialspace=True)
    expected = list(rows)
    is_open = expected[-1] != []  # the line that was added is in a quote
    expected = [row for row in expected[: -1 if is_open else None] if row][1:]
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        form = format_of("t.csv", separator)
        if not expected and not is_open:
            with pytest.raises(ValueError, match="it is empty: no row stands below its header"):
                form.scan(file, "t.csv")
            return
        found, damage = form.scan(file, "t.csv")
        parse = form.parser("t.csv", file.fileno())
    assert [place.partition(": ")[2].partition(" of")[0] for place in damage] == ["nothing closes a quote"] * is_open
    for extent, row in zip(found, expected, strict=True):
        begin, length = unpacked(extent)
        if len(row) <= 2:
            assert list(metadata(parse(data[begin : begin + length])).values()) == row
            continue
        with pytest.raises(SampleError, match=f"the row has {len(row)} fields for 2 columns"):
            parse(data[begin : begin + length])


def test_a_quote_that_nothing_closes_loses_what_it_swallows(tmp_path):
    rows = [(f"{index}.png", f"caption {index}") for index in range(20_000)]
    path = write_csv(tmp_path / "t.csv", rows=rows)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[101] = b'100.png,"caption 100\n'
    path.write_bytes(b"".join(lines))
    source = open_shards([str(path)])
    ((place, lost),) = source.shards[0].damage.items()
    assert place == "line 102: field larger than field limit (131072)"
    assert 5000 < lost < 8000
    assert source.sizes == [20_000 - lost]
    texts = [metadata(source.read(number, NO_IMAGE))["title"] for number in (99, 100, 20_000 - lost - 1)]
    assert texts == ["caption 99", f"caption {100 + lost}", "caption 19999"]


@pytest.mark.parametrize(
    ("name", "header", "texts"),
    [
        ("t.tsv", ("filepath", "title"), ('"Mind the gap', 'the end"')),
        ("t.csv", ("filepath", "title"), ('"Mind the gap', 'the end"')),
        ("t.csv", ("filepath", "title"), ('"Mind the gap', '"a cat, asleep"')),  # whose first quote ends the other
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
    source = open_shards([str(tmp_path / name)])
    assert list(source.shards[0].damage.values()) == [11]
    assert next(iter(source.shards[0].damage)).startswith("line 13: a quote")  # behind a header and a row of two lines
    assert source.sizes == [29]
    assert caption(source.read(5, NO_IMAGE)).startswith("two lines,")


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_quote_that_is_open_at_the_end_loses_what_it_swallows(tmp_path, end):
    """However little that is."""
    path = write_csv(tmp_path / "t.csv", rows=[(f"{index}.png", f"caption {index}") for index in range(100)])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[61] = b'60.png,"caption 60\n'
    path.write_bytes(b"".join(lines).rstrip(b"\n") + end.encode())
    source = open_shards([str(path)])
    ((place, lost),) = source.shards[0].damage.items()
    assert place.startswith("line 62: nothing closes a quote")
    assert lost == 40
    assert [metadata(source.read(number, NO_IMAGE))["title"] for number in (0, 59)] == ["caption 0", "caption 59"]
    assert source.sizes == [60]


def test_a_quote_behind_a_space_and_columns_of_one_name(tmp_path):
    text = 'filepath, title,title,,\n000.png, "a cat, asleep",b,,\n001.png,"two\nlines"\n'
    (write_images(tmp_path) / "t.csv").write_text(text)
    assert pairs_of(open_shards([f"{tmp_path}/t.csv"])) == [(PAIRS[0][1], "a cat, asleep"), (PAIRS[1][1], "two\nlines")]
    (tmp_path / "t.csv").write_text('filepath title\n001.png "a cat"\n')
    assert pairs_of(open_shards([f"{tmp_path}/t.csv"], index=IndexCache(separator=" "))) == [(PAIRS[1][1], "a cat")]


def test_a_record_that_is_too_long_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("clipfast.data.tables.MAX_LENGTH", 1000)
    long = "x" * 3000
    for path in (
        write_csv(tmp_path / "t.csv", rows=[("a.png", "a"), ("b.png", "\n".join(["x" * 900] * 3)), ("c.png", "c")]),
        tmp_path / "t.jsonl",
    ):
        if path.suffix == ".jsonl":
            path.write_text("\n".join(json.dumps({"caption": text}) for text in ("a", long, "c")))
        source = open_shards([str(path)])
        assert [count for place, count in source.shards[0].damage.items() if "1000 bytes or more" in place]
        assert caption(source.read(0, NO_IMAGE)) == "a"
        assert caption(source.read(source.sizes[0] - 1, NO_IMAGE)) == "c"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "it is empty: the first line must name the columns, as in 'filepath,title'"),
        ("t.csv", b"\xef\xbb\xbf\n", "it is empty"),
        ("t.csv", b"1.jpg,a cat\n2.jpg,a dog\n", "it has no header, but an image in its first line, '1.jpg'"),
        ("t.tsv", "filepath\ttitle\n".encode("utf-16"), "it is in UTF-16: save it as UTF-8"),
        ("t.csv", "filepath,title\n".encode("utf-16-be"), "it is in UTF-16: save it as UTF-8"),
        ("t.csv", b"sep=;\nfilepath;title\n1.jpg;a\n", "its first line is a note for Excel, 'sep=': remove it"),
        ("t.csv", b"  , \n1.jpg,a\n", "it names no columns: the first line must name the columns"),
        ("t.csv", b'"filepath,title\n1,a\n', "its header cannot be read: nothing closes a quote"),
        ("t.csv", b'"' + b"x" * 200_000, "its header cannot be read: field larger than field limit"),
        ("t.jsonl", b'[\n{"image": "1.jpg"}]', r"not JSON Lines, .*jq -c '\.\[\]' makes such a file of an array"),
        ("t.tsv", b"filepath\ttit", "it is empty: no row stands below its header"),
        ("t.jsonl", b"", "it is empty: no line has an object"),
        ("t.jsonl", b"<html>", "not JSON Lines, which have an object in each line: json cannot be read"),
        ("t.jsonl", b"7", "not JSON Lines, which have an object in each line: json is not an object but a int"),
    ],
)
def test_what_is_no_table(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=rf"shard .*{name} cannot be read: {message}"):
        open_shards([str(tmp_path / name)])


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.gz"])
def test_a_compressed_table_that_is_cut_is_refused(tmp_path, suffix):
    """Half of its rows would look like a whole table."""
    write = write_csv if suffix == ".csv.gz" else write_jsonl
    data = gzip.compress(write(tmp_path / "whole").read_bytes())
    (tmp_path / f"t{suffix}").write_bytes(data[: len(data) * 3 // 4])
    for name in (f"{tmp_path}/t{suffix}", f"file://{tmp_path}/t{suffix}"):
        with pytest.raises(
            SampleError, match=r"cannot be read: its compression is broken: .*copy or write it"
        ) as error:
            open_shards([name], index=IndexCache(tmp_path / "cache"))
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
        "t.csv": [
            ("missing image", "there is no file 'a.png', neither in "),
            ("broken row", "the row has 4 fields for 2 columns: a field with ',' in it needs quotes around it"),
            ("missing image", "there is no file 'c.png'"),
            ("no image", "only json with filepath, title; --image-key names others"),
            ("broken row", "the row is not UTF-8"),
            ("broken row", "the row has zero bytes in it"),
        ],
        "t.jsonl": [
            None,
            ("broken json", "json cannot be read"),
            ("broken json", "json is not an object but a list"),
            ("no image", "image is no file name: 7; --image-key names others"),
            ("no image", "image is no file name: {'path': '000.png'}; --image-key names others"),
            None,
        ],
    }
    for name, errors in expected.items():
        source = open_shards([f"{tmp_path}/{name}"])
        assert len(errors) == source.sizes[0]
        for number, error in enumerate(errors):
            if error is None:
                assert image_bytes(source.read(number)) == PAIRS[0][1]
            else:
                with pytest.raises(SampleError) as caught:
                    image_bytes(source.read(number))
                assert (caught.value.kind, error[1] in str(caught.value)) == (error[0], True), str(caught.value)


def test_only_images_come_out_of_a_table(tmp_path):
    """Whatever a table names: it is a regular file, not too large, and an image; or one clear error."""
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
    with pytest.raises(
        ValueError, match=r"not one of the images of .*; first: t\.jsonl/\.\./secret\.txt: not an image"
    ):
        list(images)
    assert [skipped.kind for skipped in images.skipped] == list(named.values())
    assert "a secret" not in str(images.skipped)
    assert "single images are not read from the network" in images.skipped[-1].reason


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_large_tables_are_indexed_in_little_memory(tmp_path, form):
    """The figures are printed; what is asserted is that a row takes bytes, not objects."""
    count = 200_000
    with (tmp_path / f"t.{form}").open("w", newline="") as file:
        if form == "csv":
            file.write("filepath,title\r\n")
        for number in range(count):
            text = f'a caption, of ""number"" {number}\nin two lines'
            row = f'images/{number:08}.jpg,"{text}"\r\n'
            file.write(row if form == "csv" else json.dumps({"image": f"{number}.jpg", "text": text}) + "\n")
    tracemalloc.start()
    started = time.process_time()
    source = open_shards([str(tmp_path / f"t.{form}")], index=IndexCache(tmp_path / "cache"))
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{form}: {count} rows, {seconds:.2f} s with tracing, {peak / 1e6:.1f} MB")
    assert source.sizes == [count]
    assert peak < 100 * count
    for number in (0, 77_777, count - 1):
        assert f" {number}\nin two lines" in metadata(source.read(number, NO_IMAGE)).popitem()[1].replace('"" ', '"" ')


def test_another_separator_is_another_index(tmp_path):
    """Which quotes begin a field, and so where rows end, depends on the separator."""
    (tmp_path / "t.csv").write_text('a;b,c\nx;"1\ny;2"\n')
    for separator, sizes in ((";", [1]), (",", [2]), (None, [2]), (";", [1])):
        assert open_shards([f"{tmp_path}/t.csv"], index=IndexCache(tmp_path / "cache", separator)).sizes == sizes

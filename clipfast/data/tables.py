"""Tables whose records name an image file and hold its caption: CSV, TSV and JSON Lines.

The record becomes the ``json`` of the sample. The image becomes a member under the name of the column that names its
file.
"""

import array
import codecs
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from ..models.images import SampleError
from .formats import MAX_LENGTH, Extents, Format, extents
from .keys import IMAGE_EXTENSIONS
from .names import is_folder
from .samples import LINKS, Links, RawSample, metadata

SEPARATORS = ",\t;|"
IMAGE_NAME = re.compile(rf"\.({'|'.join(IMAGE_EXTENSIONS)})\b", re.IGNORECASE)
HEADER_BYTES = 1 << 20  # the header must end within this many bytes
BOM = codecs.BOM_UTF8.decode("latin-1")
UTF16 = tuple(mark.decode("latin-1") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
OPEN_QUOTE = "nothing closes a quote of this row, which takes in all lines below"
SWALLOWED = "a quote of this row is not closed in it, and takes in the rows below"
EXAMPLE = "the first line must name the columns, as in 'filepath,title'"


def csv_format(own: str, separator: str | None) -> Format:
    """Return the shard format of CSV and TSV files.

    Args:
        own: the separator that the file extension implies. If the header does not contain it, the separator is the
            character among ``,``, tab, ``;`` and ``|`` that is most frequent in the header.
        separator: a separator that is preferred to these if the header contains it.
    """
    choose = functools.partial(_separator, own, separator)
    return Format(1, functools.partial(_scan_csv, choose), functools.partial(_csv_parser, choose))


def _separator(own: str, given: str | None, header: str) -> str:
    """Choose the field separator of a CSV shard by its header: ``given``, ``own``, or the most frequent candidate."""
    # With a separator that the header lacks, there would be one column, and pairs need two: the separator was given for
    # another table of the run.
    named = next((one for one in (given, own) if one and one in header), None)
    return named or max(own + SEPARATORS, key=header.count)


class _Lines(Iterator[str]):
    """The lines of a table, with one character for every byte, and without a byte order mark.

    An empty line is added at the end: the CSV reader finds no row in it, unless a quote is still open.

    Attributes:
        offset: offset of the next line in bytes.
        count: number of lines so far.
        ended: whether the end of the file was reached.
    """

    def __init__(self, file: BinaryIO) -> None:
        # Latin-1 decodes every byte to one character, and no byte of a multi-byte UTF-8 character is a separator or a
        # quote.
        self._text = io.TextIOWrapper(file, "latin-1", newline="")
        self.offset = self.count = 0
        self.ended = False

    def __next__(self) -> str:
        line = self._text.readline(MAX_LENGTH)
        if not line:
            if self.ended:
                raise StopIteration
            self.ended = True
            return "\n"
        self.offset += len(line)
        self.count += 1
        return line if self.count > 1 else line.removeprefix(BOM)

    def detach(self) -> None:
        """Stop reading the lines of a CSV shard, and leave its file open for others."""
        self._text.detach()


class _Records:
    """Collects the extents of the records in a table, and the lines that belong to no record."""

    def __init__(self) -> None:
        self.begins, self.lengths = array.array("Q"), array.array("Q")
        self.damage: dict[str, int] = {}

    def add(self, begin: int, end: int, line: int) -> None:
        """Add the record of a CSV or JSON Lines shard that lies in these bytes and begins in the given line."""
        if end - begin >= MAX_LENGTH:
            self.damage[f"line {line}: a record has {MAX_LENGTH} bytes or more, which is too long"] = 1
            return
        self.begins.append(begin)
        self.lengths.append(end - begin)

    def found(self, empty: str = "") -> tuple[Extents, dict[str, int]]:
        """Return the result for ``Format.scan``; refuse a CSV or JSON Lines shard without any record."""
        if empty and not (self.begins or self.damage):
            raise ValueError(f"it is empty: {empty}")
        return extents(self.begins, self.lengths), self.damage


def _csv_rows(lines: Iterator[str], choose: Callable[[str], str]) -> tuple[Iterator[list[str]], str]:
    """Return a CSV reader, whose first row is the header, and the separator of the fields."""
    first = next((line for line in lines if line.strip("\r\n")), "")
    separator = choose(first)
    return _reader(itertools.chain([first], lines), separator), separator


def _reader(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    """Return a reader of the rows of a CSV shard."""
    # A quote may begin a field after a space too, as in 'a.jpg, "a cat, asleep"'.
    return csv.reader(lines, delimiter=separator, skipinitialspace=separator != " ")


def _scan_csv(choose: Callable[[str], str], file: BinaryIO, _: str = "") -> tuple[Extents, dict[str, int]]:
    """Return begin and length of each row of a CSV file after the header, and the lines that belong to no row.

    Raises:
        ValueError: there is no header, or no row below it.
    """
    lines, records, held = _Lines(file), _Records(), list[str]()
    try:
        rows, separator = _csv_rows(_kept(lines, held), choose)
        header = next(rows, [])
        _check_header(header, is_open=lines.ended)
        while True:
            begin, count = lines.offset, lines.count
            held.clear()
            try:
                row = next(rows, None)
            except csv.Error as error:  # for example, a quote of the row is not closed
                records.damage[f"line {count + 1}: {error}"] = lines.count - count
                continue
            if row is None:
                return records.found("no row stands below its header")
            if row and (lines.ended or _swallows(row, held[1:], len(header), separator)):
                why = OPEN_QUOTE if lines.ended else SWALLOWED
                records.damage[f"line {count + 1}: {why}"] = lines.count - count
            elif row:
                records.add(begin, lines.offset, count + 1)
    except csv.Error as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    finally:
        lines.detach()


def _kept(lines: Iterable[str], held: list[str]) -> Iterator[str]:
    """Yield the lines of a CSV file, and collect them in ``held``."""
    for line in lines:
        held.append(line)
        yield line


def _swallows(row: list[str], more: list[str], columns: int, separator: str) -> bool:
    """Return True if a CSV row with an open quote spans a line that looks like the row of another image."""
    for line in filter(IMAGE_NAME.search, more):
        names = {place: value for place, value in enumerate(row) if _extension(value) in IMAGE_EXTENSIONS}
        with contextlib.suppress(csv.Error, StopIteration):
            fields = next(_reader([line], separator))
            others = [name for place, name in enumerate(fields) if not names or names.get(place, name) != name]
            if len(fields) == columns and any(_extension(name) in IMAGE_EXTENSIONS for name in others):
                return True
    return False


def _check_header(header: list[str], *, is_open: bool) -> None:
    """Refuse the header of a CSV shard that names no columns, or shows another encoding."""
    if not any(name.strip() for name in header):
        raise ValueError(f"{'it names no columns' if header else 'it is empty'}: {EXAMPLE}")
    if header[0].startswith(UTF16) or any("\0" in name for name in header):
        raise ValueError("it is in UTF-16: save it as UTF-8")
    if is_open:
        raise ValueError(f"its header cannot be read: {OPEN_QUOTE}")
    if header[0].lower().startswith("sep="):
        raise ValueError(f"its first line is a note for Excel, {header[0]!r}: remove it; {EXAMPLE}")
    for name in header:
        if _extension(name) in IMAGE_EXTENSIONS:
            raise ValueError(f"it has no header, but an image in its first line, {name!r:.80}: {EXAMPLE}")


def _extension(name: str) -> str:
    """Return the file extension in a file name of a CSV shard."""
    return os.path.splitext(name.strip())[1].lower().removeprefix(".")


def _csv_parser(choose: Callable[[str], str], name: str, descriptor: int) -> Callable[[bytes], RawSample]:
    """Return a function that makes a sample of the bytes of a CSV row."""
    start = os.pread(descriptor, HEADER_BYTES, 0).decode("utf-8-sig", "replace")
    rows, separator = _csv_rows(io.StringIO(start, newline=""), choose)
    columns = next(rows, [])

    def parse(data: bytes) -> RawSample:
        """Return the sample in the bytes of a CSV row."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError(f"the row is not UTF-8: {error}", "broken row") from error
        if "\0" in text:
            raise SampleError("the row has zero bytes in it, which may stand for others", "broken row")
        try:
            row = next(_reader(io.StringIO(text, newline=""), separator))
        except (csv.Error, StopIteration) as error:
            raise ValueError("there is no row") from error
        if len(row) > len(columns):
            raise SampleError(
                f"the row has {len(row)} fields for {len(columns)} columns: a field with {separator!r} in it needs "
                "quotes around it",
                "broken row",
            )
        record: dict[str, str] = {}
        for column, value in zip(columns, row, strict=False):
            record.setdefault(column, value)  # the first of several columns with one name counts, as in pandas
        return _sample(name, json.dumps(record).encode(), record)

    return parse


def _sample(name: str, data: bytes, record: dict[str, Any]) -> RawSample:
    """Return a sample whose files a row of a table names."""
    return {"__url__": name, "json": data, LINKS: Links(os.path.dirname(name), record)}


def _scan_jsonl(file: BinaryIO, name: str = "") -> tuple[Extents, dict[str, int]]:
    """Return begin and length of each sample of a JSON Lines file: of its lines that are not empty.

    Raises:
        ValueError: the first line is no JSON object, or a table has no line (:mod:`.folders` refuses empty folders).
    """
    lines, records = _Lines(file), _Records()
    begin = 0
    try:
        for line in lines:
            if not line.isspace():
                if not records.begins:
                    _check_object(line)
                records.add(begin, lines.offset, lines.count)
            begin = lines.offset
        return records.found("" if is_folder(name) else "no line has an object")
    finally:
        lines.detach()


def _check_object(line: str) -> None:
    """Refuse a JSON Lines shard whose first line is no object."""
    try:
        metadata({"json": line.encode("latin-1")})
    except SampleError as error:
        hint = "; jq -c '.[]' makes such a file of an array" if line.startswith("[") else ""
        raise ValueError(f"not JSON Lines, which have an object in each line: {error}{hint}") from error


def _jsonl_parser(name: str, _: int) -> Callable[[bytes], RawSample]:
    """Return a function that makes a sample of the bytes of a line of JSON."""
    return lambda data: _sample(name, data, metadata({"json": data}))


JSONL = Format(1, _scan_jsonl, _jsonl_parser)

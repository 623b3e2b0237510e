"""Parquet and Arrow shards: each row is converted to a sample of a tar file.

Row number i is sample number i. Its members are ``NNNNNNNNN.<column>`` for each column of bytes, and
``NNNNNNNNN.json``, an object of all other columns. A column of bytes is binary, as in the files that img2dataset
writes, or an image of Hugging Face's datasets: a struct with the bytes of a file or its path.

This module runs in the process that :mod:`clipfast.data.contained` starts.
"""

import contextlib
import json
import resource
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..io.files import MAX_MEMBER, open_regular, read_regular
from .names import has_footer

ARROW_FILE = b"ARROW1"  # magic of Arrow's file format; the stream format, which datasets writes, has none
ROWS = 32  # number of rows that are in memory at once
BUFFER = 1 << 20  # bytes of a Parquet column that are read at once
MAX_MEMORY = 8 << 30  # bytes of memory that the reader process may take


class ContentError(ValueError):
    """A shard that is damaged, not of the format that its name says, or too large, so another attempt is useless."""


def count(file: IO[bytes], name: str) -> int:
    """Count the rows of a shard; only the footer of a Parquet file is read, and only the metadata of an Arrow file.

    Raises:
        ContentError: it cannot be read, or has no column of bytes.
    """
    with _reading(name):
        if has_footer(name):
            from pyarrow import ArrowInvalid
            from pyarrow.parquet import ParquetFile

            parquet = ParquetFile(file)
            _bytes_columns(parquet.schema_arrow)
            about = parquet.metadata
            groups = sum(about.row_group(number).num_rows for number in range(about.num_row_groups))
            if groups != about.num_rows:
                raise ArrowInvalid(f"it says that it has {about.num_rows} rows, and {groups} in its groups")
            return int(groups)
        rows = 0
        for batch in _arrow_batches(file):
            _bytes_columns(batch.schema)
            batch.validate()
            rows += batch.num_rows
        return rows


def members(file: IO[bytes], name: str, folder: Path | None = None) -> Iterator[tuple[str, bytes]]:
    """Convert the rows of a shard to members of a tar file, a few at a time; yield their names and bytes.

    Args:
        file: a local file.
        name: name of the shard.
        folder: folder from which paths of images in the file start; with None, such images are missing.

    Raises:
        ContentError: it cannot be read, or has no column of bytes.
    """
    with _reading(name):
        row = 0
        for batch in _parquet_batches(file) if has_footer(name) else _arrow_batches(file):
            in_bytes = _bytes_columns(batch.schema)
            _validate(batch)
            columns = list(zip(batch.schema.names, batch.columns, strict=True))
            for place in range(batch.num_rows):
                values = [(column, _value(values[place])) for column, values in columns]
                for number, extension in in_bytes.items():
                    data = _bytes(values[number][1], folder)
                    if data is not None:
                        yield f"{row:09d}.{extension}", data
                yield f"{row:09d}.json", _json([pair for number, pair in enumerate(values) if number not in in_bytes])
                row += 1


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn pyarrow's errors about a damaged shard into a ContentError that says what to do."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # the system reports that the disk or the network failed
        kind = "a Parquet" if has_footer(name) else "an Arrow"
        raise ContentError(f"it is damaged, or not {kind} file: {error}; copy or write it again") from error


def _parquet_batches(file: IO[bytes]) -> Iterator[Any]:
    """Yield the record batches of a Parquet shard."""
    from pyarrow.parquet import ParquetFile

    # Each column is read a buffer at a time, because a column of a row group may be as large as the file.
    yield from ParquetFile(file, buffer_size=BUFFER, pre_buffer=False).iter_batches(ROWS, use_threads=False)


def _arrow_batches(file: IO[bytes]) -> Iterator[Any]:
    """Yield the record batches of an Arrow shard, and refuse a file with batches that pyarrow does not read.

    The file is memory-mapped, so only the pages that are used are read.
    """
    import pyarrow
    from pyarrow import ArrowInvalid, ipc

    source = pyarrow.memory_map(f"/dev/fd/{file.fileno()}")
    size = source.size()
    if source.read(len(ARROW_FILE)) == ARROW_FILE:
        reader = ipc.open_file(source)
        found = _messages(source, size)
        if found != reader.num_record_batches:
            raise ArrowInvalid(f"it has {found} batches of rows, but its footer lists {reader.num_record_batches}")
        yield from (reader.get_batch(number) for number in range(found))
        return
    source.seek(0)
    yield from ipc.open_stream(source)
    # pyarrow reads a stream without an error if it is cut between two batches, or has zeros where a batch should begin.
    source.seek(source.tell() - 4)
    if source.read(4) != bytes(4):
        raise ArrowInvalid(f"its {size} bytes do not end as an Arrow stream does")
    if source.tell() != size:
        raise ArrowInvalid(f"its end mark stands at byte {source.tell()} of {size}: what follows cannot be read")


def _messages(source: Any, size: int) -> int:
    """Count the record batches in an Arrow file up to its footer, without relying on the footer."""
    from pyarrow import ipc

    source.seek(size - len(ARROW_FILE) - 4)
    footer = size - len(ARROW_FILE) - 4 - int.from_bytes(source.read(4), "little")
    source.seek(8)  # this skips the file's magic and its padding
    found = 0
    while source.tell() + 8 < footer:  # the end mark, if there is one, has 8 bytes
        found += ipc.read_message(source).type == "record batch"
    return found


def _validate(batch: Any) -> None:
    """Refuse Arrow data whose offsets are outside of its buffers; text that is not UTF-8 is left to :func:`_value`."""
    from pyarrow import ArrowInvalid

    for column in batch.columns:
        try:
            column.validate(full=True)
        except ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise


def _bytes_columns(schema: Any) -> dict[int, str]:
    """Return the indices of a Parquet or Arrow shard's columns that hold bytes, and their members' file extensions.

    Raises:
        ContentError: there is no such column, or two would have the same extension.
    """
    found = {
        number: field.name.lower().replace("/", "_")
        for number, field in enumerate(schema)
        if field.name.lower() != "json" and _holds_bytes(field.type)
    }
    columns = ", ".join(schema.names)
    if not found:
        raise ContentError(
            f"it has no column of image bytes, only {columns}: name files with the images in them, which img2dataset "
            "writes with --output_format parquet (beside its tar files it writes Parquet files without images)"
        )
    if len(set(found.values())) < len(found):
        raise ContentError(f"two of its columns have the same name in lower case: {columns}; rename one")
    return found


def _holds_bytes(kind: Any) -> bool:
    """Return True if a column of this Arrow type may hold image files or their paths."""
    from pyarrow import types

    if types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        return "bytes" in names or names == ["path"]
    is_binary = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in is_binary)


def _value(scalar: Any) -> Any:
    """Convert an Arrow value to Python; None if that is not possible, as for text that is not UTF-8."""
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return None


def _bytes(value: Any, folder: Path | None) -> bytes | None:
    """Return the bytes in a cell of a Parquet or Arrow column, or those of the image file that it names, or None."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        value = _file(folder / path) if data is None and path and folder is not None else data
    return value if isinstance(value, bytes) else None


def _file(path: Path) -> bytes | None:
    """Read the image file that a cell of a Parquet or Arrow shard names; only a regular file counts."""
    try:
        return read_regular(path, MAX_MEMBER)
    except (OSError, ValueError):
        return None


def _json(values: list[tuple[str, Any]]) -> bytes:
    """Return the other columns of a row as a JSON object; the fields of a column "json" are merged into it."""
    fields: dict[str, Any] = {}
    for name, value in values:
        found = _plain(value)
        if name.lower() == "json" and isinstance(value, str | bytes):
            with contextlib.suppress(ValueError, RecursionError):
                found = _plain(json.loads(value))
        fields = found | fields if name.lower() == "json" and isinstance(found, dict) else fields | {name: found}
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    """Convert a row's value to JSON: bytes and numbers that are not finite become null, other objects text."""
    text = json.dumps(value, default=lambda other: None if isinstance(other, bytes) else str(other))
    return json.loads(text, parse_constant=lambda _: None)


def serve() -> None:
    """Run the reader process: answer requests, lines of JSON on the standard input, until it is closed.

    A request names a file, and asks for its rows or only for their number. The answer is the tar file of the rows in
    pieces, each after a line with its length, and then a line with the result.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # the memory limit may be lower already, or unsupported
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    for line in sys.stdin.buffer:
        answer = _answer(json.loads(line))
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(request: dict[str, Any]) -> list[Any]:
    """Carry out a request to read a Parquet or Arrow shard; return the kind of the answer and its content."""
    try:
        with open_regular(request["path"]) as file:
            if not request["rows"]:
                return ["found", count(file, request["name"])]
            folder = request["folder"] and Path(request["folder"])
            for name, data in members(file, request["name"], folder):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                _write(header.tobuf() + data + bytes(-len(data) % tarfile.BLOCKSIZE))
            _write(bytes(2 * tarfile.BLOCKSIZE))
            return ["found", None]
    except ContentError as error:
        return ["content", str(error)]
    except ImportError as error:
        return ["import", str(error), error.name]
    except OSError as error:
        return ["system", error.errno, error.strerror, error.filename]
    except MemoryError:
        return ["content", f"reading it takes more than {MAX_MEMORY >> 30} GiB of memory: write smaller batches"]
    except Exception as error:  # a damaged file may cause any error in pyarrow
        return ["content", f"it is damaged: {error!r:.200}; copy or write it again"]


def _write(data: bytes) -> None:
    """Send bytes of converted rows to the process that asked for them."""
    sys.stdout.buffer.write(b"%d\n%b" % (len(data), data))

"""Parquet and Arrow files are read in a separate process: pyarrow checks little, and a damaged file may crash it.

Each process that needs such files starts one reader process at the first file, and keeps it.
"""

import atexit
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any, Protocol

from .names import has_footer
from .rows import ContentError

MAX_FOOTER = 1 << 28  # limit in bytes of the footer of a Parquet file
FOOTER_GUESS = 1 << 16  # this many bytes at the end of a Parquet file are read first, since most footers are shorter
MAGIC = b"PAR1"
# The reader imports clipfast.data.rows without clipfast/data/__init__.py, which imports PyTorch and so takes seconds.
PROGRAM = """
import sys, types
for name, folder in zip(("clipfast", "clipfast.data"), sys.argv[1:]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from clipfast.data.rows import serve
serve()
"""
_lock = threading.Lock()
_reader: subprocess.Popen[bytes] | None = None


class Writable(Protocol):
    """An object with a ``write`` method that takes bytes, such as a file."""

    def write(self, data: bytes, /) -> object:
        """Write bytes of a shard that is copied or converted."""


def count_rows(file: IO[bytes], name: str) -> int:
    """Return the number of rows of a Parquet or Arrow shard. Only the footer of a Parquet file is read, even remotely.

    Raises:
        ContentError: the file cannot be read, or has no column of bytes.
        io.UnsupportedOperation: a Parquet file cannot be read from the middle.
        OSError: the disk failed.
        ImportError: there is no pyarrow.
    """
    with tempfile.TemporaryFile() as footer:
        if has_footer(name):
            _copy_footer(file, footer)
            file = footer
        return int(_ask(file, {"name": name, "rows": False}))


def copy_rows(file: IO[bytes], name: str, target: Writable, folder: Path | None = None) -> None:
    """Write the rows of a local Parquet or Arrow shard as a tar file.

    Args:
        file: a local file.
        name: name of the shard.
        target: the tar file to write.
        folder: folder from which paths of images in the file start; with None, such images are missing.

    Raises:
        ContentError, OSError, ImportError: see :func:`count_rows`.
    """
    _ask(file, {"name": name, "rows": True, "folder": folder and str(folder)}, target)


def _copy_footer(file: IO[bytes], target: IO[bytes]) -> None:
    """Write a Parquet file that has the footer of another one and no rows."""
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - FOOTER_GUESS, 0))
        tail = file.read()
    except ValueError as error:  # fsspec's error for a server that sends nothing but whole files
        raise io.UnsupportedOperation(f"it cannot be read from the middle: {error}") from error
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != MAGIC or length + 12 > size:
        raise ContentError("it is damaged, or not a Parquet file: it has no footer at its end; copy or write it again")
    if length > MAX_FOOTER:
        raise ContentError(f"its footer has {length:,} bytes, more than the limit of {MAX_FOOTER:,}")
    if length + 8 > len(tail):
        file.seek(size - length - 8)
        tail = file.read()
    target.write(MAGIC + tail[-length - 8 :])
    target.flush()


def _ask(file: IO[bytes], request: dict[str, Any], target: Writable | None = None) -> Any:
    """Send a request to the process that reads Parquet and Arrow files, and return its answer."""
    global _reader
    with _lock:
        # something other than a damaged file ended the reader process
        if _reader is not None and _reader.poll() is not None:
            _end()
        reader = _reader = _reader or _start()
        try:
            kind, *found = _answer(reader, request | {"path": f"/proc/{os.getpid()}/fd/{file.fileno()}"}, target)
            match kind:
                case "found":
                    return found[0]
                case "content":
                    raise ContentError(found[0])
                case "import":
                    raise ImportError(found[0], name=found[1])
            raise OSError(*found)
        except BaseException:
            _end()
            raise


def _start() -> subprocess.Popen[bytes]:
    """Start the process that reads Parquet and Arrow files."""
    folder = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, str(folder.parent), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        bufsize=0,  # no buffer, because a buffer's lock could be held when the process forks
        start_new_session=True,  # a Ctrl-C must reach only the process that asks
    )  # fmt: skip


def _answer(reader: subprocess.Popen[bytes], request: dict[str, Any], target: Writable | None) -> list[Any]:
    """Ask the process that reads Parquet and Arrow files; copy the bytes that it sends, and return its answer."""
    assert reader.stdin is not None
    assert reader.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # the reader has ended; reading its answer will show that
        reader.stdin.write(json.dumps(request).encode() + b"\n")
    with open(reader.stdout.fileno(), "rb", closefd=False) as answer:
        while (line := answer.readline()).endswith(b"\n"):
            found = json.loads(line)
            if target is None or isinstance(found, list):
                return list(found)
            target.write(answer.read(found))
    code = reader.wait()
    if code == -signal.SIGKILL:
        raise ContentError("the process that read it was killed, as happens where memory runs out")
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    raise ContentError(f"it is damaged: the process that read it ended with {how}; copy or write it again")


def _end() -> None:
    """Kill the process that reads Parquet and Arrow files."""
    global _reader
    if _reader is not None:
        _reader.kill()
        _reader.wait()
        _forget()


def _forget() -> None:
    """Close this process's pipes to the reader of Parquet and Arrow files, which ends when its last pipe is closed.

    A forked process takes no lock here: a thread that exists only in the parent might hold it.
    """
    global _reader
    if _reader is not None:
        for pipe in filter(None, (_reader.stdin, _reader.stdout)):
            pipe.close()
    _reader = None


def _after_fork() -> None:
    """Forget the reader of Parquet and Arrow files in a forked process, and make a new lock there."""
    global _lock
    _forget()
    _lock = threading.Lock()


atexit.register(_end)
os.register_at_fork(after_in_child=_after_fork)

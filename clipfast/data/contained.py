"""Parquet and Arrow files are read in a separate process: pyarrow checks little, and a damaged file may end it.

Each process that needs such files starts one reader at the first of them, and keeps it. A request hands the open file
to the reader, and says what to do with it. The rows come back through a pipe, as the tar file that
:mod:`clipfast.data.rows` makes of them, and at the end the reader says what it found.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .rows import ContentError, Writable, count, has_footer, members, write_tar
from .tar import CHUNK

MAX_MEMORY = 8 << 30  # bytes that the reader may take
MAX_FOOTER = 1 << 28  # bytes of the footer of a Parquet file
FOOTER_GUESS = 1 << 16  # bytes of the end of a Parquet file that are read first: most footers are in them
MAGIC = b"PAR1"
# The package's own modules import PyTorch, which takes seconds, and which the reader does not need.
PROGRAM = """
import sys, types
for name, folder in zip(("clipfast", "clipfast.data"), sys.argv[2:]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from clipfast.data.contained import serve
serve(int(sys.argv[1]))
"""


class _Reader:
    """A process that reads rows."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        folder = Path(__file__).parent
        with theirs:
            arguments = [str(theirs.fileno()), str(folder.parent), str(folder)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, *arguments], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the process that asks
            )  # fmt: skip

    def ask(self, request: dict[str, Any], descriptors: list[int]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended, as its answer will show
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], descriptors)

    def answer(self) -> Any:
        """Return what was asked for.

        Raises:
            ContentError: the file cannot be read, or has ended the process.
            OSError: the disk failed.
            ImportError: there is no pyarrow.
        """
        line = b""
        with contextlib.suppress(ConnectionResetError):
            while not line.endswith(b"\n") and (more := self._socket.recv(CHUNK)):
                line += more
        if not line.endswith(b"\n"):
            code = self._process.wait()
            if code == -signal.SIGKILL:
                raise ContentError("the process that read it was killed, as happens where memory runs out")
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            raise ContentError(f"it is damaged: the process that read it ended with {how}; copy or write it again")
        kind, *found = json.loads(line)
        if kind == "import":
            raise ImportError(found[0], name=found[1])
        if kind != "found":
            raise ContentError(found[0]) if kind == "content" else OSError(*found)
        return found[0]

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def forget(self) -> None:
        """Close what a forked process has of it; when the last has done so, the reader ends.

        No lock is taken: a thread that the forked process does not have might hold it.
        """
        self._socket.close()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.forget()


_lock = threading.Lock()
_reader: _Reader | None = None


@contextlib.contextmanager
def _reading() -> Iterator[_Reader]:
    """Let one thread at a time ask the reader; after an error, the next one gets another reader."""
    global _reader
    with _lock:
        if _reader is not None and _reader.has_ended:  # by whoever ends processes: no file is to blame
            _end()
        reader = _reader = _reader or _Reader()
        try:
            yield reader
        except BaseException:
            _end()
            raise


def _end() -> None:
    global _reader
    if _reader is not None:
        _reader.end()
        _reader = None


def _after_fork() -> None:
    global _lock, _reader
    if _reader is not None:
        _reader.forget()
    _lock, _reader = threading.Lock(), None


atexit.register(_end)
os.register_at_fork(after_in_child=_after_fork)


def count_rows(file: IO[bytes], name: str) -> int:
    """Return the number of rows. Of a Parquet file, which may be elsewhere, only the footer is read.

    Raises:
        ContentError: it cannot be read, or has no column of bytes.
    """
    with tempfile.TemporaryFile() as footer:
        if has_footer(name):
            _copy_footer(file, footer)
            file = footer
        with _reading() as reader:
            reader.ask({"name": name}, [file.fileno()])
            return int(reader.answer())


def _copy_footer(file: IO[bytes], target: IO[bytes]) -> None:
    """Write a Parquet file that has the footer of another one and no rows."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - FOOTER_GUESS, 0))
    tail = file.read()
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


def copy_rows(file: IO[bytes], name: str, target: Writable, folder: Path | None = None) -> None:
    """Write the rows of a file of this machine as a tar file; arguments and errors are those of ``rows.members``."""
    with _reading() as reader:
        ours, theirs = os.pipe()  # not before: a process that is forked while this one waits would keep the pipe open
        with open(ours, "rb", 0) as rows:
            try:
                request = {"name": name, "folder": None if folder is None else str(folder)}
                reader.ask(request, [file.fileno(), theirs])
            finally:
                os.close(theirs)
            while data := rows.read(CHUNK):
                target.write(data)
            reader.answer()


def serve(number: int) -> None:
    """Answer the requests that come through a socket, until it is closed."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # the limit is lower already, or the system has none
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    with socket.socket(fileno=number) as channel:
        while True:
            data, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 2)
            if not data:
                return
            answer = _answer(json.loads(data), [os.fdopen(descriptors[0], "rb"), *descriptors[1:]])
            channel.sendall(json.dumps(answer).encode() + b"\n")


def _answer(request: dict[str, Any], files: list[Any]) -> list[Any]:
    """Return the kind of an answer and what belongs to it."""
    with files[0] as file:
        try:
            if len(files) == 1:
                return ["found", count(file, request["name"])]
            folder = request["folder"] and Path(request["folder"])
            with open(files[1], "wb", CHUNK) as target:
                write_tar(members(file, request["name"], folder), target)
            return ["found", None]
        except ImportError as error:
            return ["import", str(error), error.name]
        except OSError as error:
            return ["system", error.errno, error.strerror]
        except MemoryError:
            return ["content", f"reading it takes more than {MAX_MEMORY >> 30} GiB of memory: write smaller batches"]
        except Exception as error:  # whatever a damaged file leads to
            is_own = isinstance(error, ContentError)
            return ["content", str(error) if is_own else f"it is damaged: {error!r:.200}; copy or write it again"]

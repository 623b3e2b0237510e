"""Atomic writes of files: no reader ever sees half of a file, even after the writing process was killed.

Files from untrusted sources are opened here too, without waiting at a named pipe for a writer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOCAL_DIR_PREFIX = "local-dir:"  # OpenCLIP's prefix for the paths of folders
MAX_SETTINGS = 1 << 26  # limit in bytes of a JSON file of settings, such as the index of sharded weights (the largest)
MAX_MEMBER = 1 << 28  # limit in bytes of a file of an image-text pair, such as the image; it is read into memory
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# For each path that ``together`` puts in place at the end, this has its temporary file or folder, or None until that is
# written.
_held: dict[Path, Path | None] = {}


def local_path(name: str | Path) -> Path:
    """Return the path that a user's argument names, without OpenCLIP's prefix ``local-dir:``."""
    return Path(str(name).removeprefix(LOCAL_DIR_PREFIX))


class DiskFullError(OSError):
    """A file could not be written for lack of disk space; the file that it should replace is unchanged."""


def replace_file(path: Path, write: Callable[[Path], object], size: int = 0) -> None:
    """Write a file by ``write`` to a temporary path beside ``path``, then move it into place and flush it to the disk.

    Args:
        path: the file to replace; its folder must exist.
        write: writes the whole content to the path that it gets. If it raises, ``path`` is unchanged, and the temporary
            file is removed. The temporary file of a killed process is overwritten by the next write.
        size: the approximate number of bytes that ``write`` writes. With it, a full disk is recognised even if the
            error has another text, and the new error says how much space was needed.

    Raises:
        DiskFullError: there is no space, or a quota or a limit on the size of files is reached.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors has replaced the temporary file by one that only its owner may read
        sync(temporary)
        _place(temporary, path)
    except Exception as error:
        if not path.parent.is_dir():
            raise
        written, free = (temporary.stat().st_size if temporary.exists() else 0), shutil.disk_usage(path.parent).free
        reason = _lack_of_space(error)
        if reason is None and (isinstance(error, OSError) or size == 0 or free >= max(0, size - written)):
            raise
        wanted = f"{size / 1e6:,.1f} MB are wanted and " if size else ""
        reason = reason or "the disk is full"
        raise DiskFullError(f"{path} cannot be written: {reason}; {wanted}{free / 1e6:,.1f} MB are free") from error
    finally:
        if _held.get(path.absolute()) != temporary:
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Fill a temporary folder beside ``path`` by ``write``, then move it into place and flush it to the disk.

    Args:
        path: the folder to make; it must not exist, and its parent must.
        write: writes the whole content into the folder that it gets. If it raises, the folder is removed, and there is
            nothing at ``path``. The temporary folder of a killed process is removed by the next write.

    Raises:
        FileExistsError: ``path`` exists.
        DiskFullError: ``write`` found no space.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        sync(temporary)
        if path.exists() or path.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        _place(temporary, path)
    finally:
        if _held.get(path.absolute()) != temporary:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def together(paths: Iterable[Path]) -> Iterator[None]:
    """Let ``replace_file`` and ``write_folder`` put ``paths`` in place together at the end, or none on an error."""
    _held.update(dict.fromkeys(path.absolute() for path in paths))
    try:
        yield
        for path, temporary in list(_held.items()):
            if temporary is not None:
                del _held[path]
                _place(temporary, path)
    finally:
        for left in filter(None, _held.values()):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        _held.clear()


def _place(temporary: Path, path: Path) -> None:
    """Move a temporary file or folder to ``path`` and sync it; only note it if ``together`` is to do that later."""
    if path.absolute() in _held:
        _held[path.absolute()] = temporary
        return
    temporary.replace(path)
    sync(path.parent)


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure of matplotlib to a file, in the format of its extension."""
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format=path.suffix[1:].lower()))


def check_target(path: Path) -> None:
    """Refuse an output file that cannot be written, before the work on its content begins.

    Raises:
        ValueError: the folder of the file does not exist, or the file is a folder.
    """
    if not path.absolute().parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write {path.name} in")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file to write")


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to the file ``path`` atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), len(text))


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading. Anything else is refused: a named pipe could block, and a device has no end.

    Raises:
        OSError: there is no such file, it cannot be opened, or it is not a regular file.
    """
    file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def read_regular(path: str | Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: see :func:`open_regular`; or the file has more than ``limit`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {limit:,} are read", str(path))
        return file.read(size)


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file of settings, such as a model configuration.

    Raises:
        OSError: see :func:`read_regular`.
        ValueError: the file is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(read_regular(path, MAX_SETTINGS))
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error


def _lack_of_space(error: Exception) -> str | None:
    """Return the system's message if an error means a lack of disk space: an OSError, or one of a Rust library."""
    codes = [
        code for code in OUT_OF_SPACE if getattr(error, "errno", None) == code or f"(os error {code})" in str(error)
    ]
    return os.strerror(codes[0]) if codes else None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, so a power failure does not lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL comes from file systems that do not sync folders
            raise
    finally:
        os.close(descriptor)

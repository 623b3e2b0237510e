"""Files that are replaced as a whole: a reader, or a kill at any moment, never meets half of one."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then move the result into place and onto the disk.

    Args:
        path: the file to replace; its folder must exist.
        write: writes the whole content to the path that it is given. If it raises, ``path`` stays as it was and the
            temporary file is removed. What a killed process leaves is overwritten by the next write.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace ``path`` by a file that holds ``text``."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, so that a power failure does not lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

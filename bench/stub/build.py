"""Building the stub driver with gcc, once for each version of its source and of the compiler's headers."""

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

HERE = Path(__file__).resolve().parent
DRIVER = ("gpu.c", "cubin.c", "driver.c")


def missing_tool() -> str | None:
    """Return what this machine lacks to build the stub driver and Triton's launcher, or None if it has everything."""
    if shutil.which("gcc") is None:
        return "gcc is not installed: it builds the stub driver and Triton's launcher"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h is not installed (python3-dev): Triton's launcher needs it"
    return None


def build(sources: Sequence[str] = DRIVER, include: Path | None = None) -> Path:
    """Return a folder with ``libcuda.so.1`` made of ``sources``, which is built unless the cache has it.

    Args:
        sources: names of files in this folder.
        include: the folder of CUDA's headers; by default that of Triton, which has ``cuda.h``.

    Raises:
        RuntimeError: gcc or Python.h is missing, or gcc fails.
    """
    missing = missing_tool()
    if missing:
        raise RuntimeError(missing)
    include = include or Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    text = b"".join(path.read_bytes() for path in sorted(HERE.glob("*.[ch]")) if path.name in (*sources, "gpu.h"))
    name = hashlib.sha256(text + str(include).encode()).hexdigest()[:16]
    folder = _cache() / name
    if not (folder / "libcuda.so.1").exists():
        _compile([str(HERE / source) for source in sources], include, folder)
    return folder


def _cache() -> Path:
    """Return the folder of all builds: beside Triton's cache, or in the temporary folder where that is read-only."""
    home = os.environ.get("TRITON_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    for folder in (Path(home, "clipfast-stub"), Path(tempfile.gettempdir(), f"clipfast-stub-{os.getuid()}")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise RuntimeError("no folder can be written for the stub driver: set XDG_CACHE_HOME")


def _compile(sources: list[str], include: Path, folder: Path) -> None:
    """Build into a new folder and rename it: another process may do the same at the same time."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
        command = ["gcc", *flags, "-o", str(made / "libcuda.so.1"), *sources, "-lpthread"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"gcc cannot build the stub driver: {run.stderr.strip()[-1500:]}")
        (made / "libcuda.so").symlink_to("libcuda.so.1")
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "libcuda.so.1").exists():
                raise

"""Build the stub driver with gcc, once for each version of its source and each choice of folders with headers."""

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import triton

HERE = Path(__file__).resolve().parent
# The sources of each library of the stub. PyTorch looks for libraries of these names, and takes one that is loaded.
DRIVER = {"libcuda.so.1": ("gpu.c", "cubin.c", "driver.c")}
GPU = {
    "libcuda.so.1": (*DRIVER["libcuda.so.1"], "runtime.c", "kernels.c"),
    "libnvrtc.so.13": ("nvrtc.c",),
    "libnvidia-ml.so.1": ("telemetry.c",),
}


def missing_tool() -> str | None:
    """Return what this machine lacks to build the stub driver and Triton's launcher, or None if it has everything."""
    if shutil.which("gcc") is None:
        return "gcc is not installed: it builds the stub driver and Triton's launcher"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h is not installed (python3-dev): Triton's launcher needs it"
    return None


def build(libraries: Mapping[str, Sequence[str]] = DRIVER, includes: Sequence[Path] = ()) -> Path:
    """Return a folder with the stub's ``libraries``, which are built unless the cache has them.

    Args:
        libraries: the sources of each library, files in this folder.
        includes: folders of CUDA's headers, which are searched before Triton's folder with ``cuda.h``.

    Raises:
        RuntimeError: gcc or Python.h is missing, or gcc fails.
    """
    missing = missing_tool()
    if missing:
        raise RuntimeError(missing)
    folders = [*map(str, includes), str(Path(triton.__file__).parent / "backends" / "nvidia" / "include")]
    text = "".join(path.read_text() for path in sorted(HERE.glob("*.[ch]"))) + " ".join((*libraries, *folders))
    folder = _cache() / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not folder.exists():
        _compile(libraries, folders, folder)
    return folder


def _cache() -> Path:
    """Return the folder of all builds of the stub: next to Triton's cache, or a temporary folder if that is
    read-only.
    """
    home = os.environ.get("TRITON_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    for folder in (Path(home, "clipfast-stub"), Path(tempfile.gettempdir(), f"clipfast-stub-{os.getuid()}")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise RuntimeError("no folder can be written for the stub driver: set XDG_CACHE_HOME")


def _compile(libraries: Mapping[str, Sequence[str]], includes: Sequence[str], folder: Path) -> None:
    """Build the stub in a new folder and rename the folder, since another process may build it at the same time."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        for name, sources in libraries.items():
            flags = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", *(f"-I{path}" for path in includes)]
            command = ["gcc", *flags, "-o", str(made / name), *(str(HERE / source) for source in sources)]
            run = subprocess.run([*command, "-lpthread", "-ldl"], capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"gcc cannot build the stub driver: {run.stderr.strip()[-1500:]}")
        (made / "libcuda.so").symlink_to("libcuda.so.1")
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise

"""Make the package layout of an installation from links to a checkout.

This is for machines where nothing can be installed, and for comparing two commits. The module imports only the standard
library.
"""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_packages(site: Path, root: Path = ROOT, bench: Path | None = None) -> Path:
    """Make ``site`` a folder for PYTHONPATH from which benchmarks run, with kernels/ and bench/ inside clipfast/.

    ``bench`` is the folder bench/ of another checkout, in place of that of ``root``. Earlier links are replaced.

    Raises:
        FileExistsError: ``site`` has a folder ``clipfast`` of something else, such as a checkout.
    """
    package = site / "clipfast"
    package.mkdir(parents=True, exist_ok=True)
    old = [entry for entry in package.iterdir() if entry.name != "__pycache__"]
    if others := [entry for entry in old if not entry.is_symlink()]:
        raise FileExistsError(f"{others[0]} is not a link that an earlier call has made; give another folder")
    for entry in old:
        entry.unlink()
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    for entry in (root / "clipfast").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(root / "kernels")
    (package / "bench").symlink_to(bench or root / "bench")
    return site


def environment_with(site: Path) -> dict[str, str]:
    """Return this process's environment, changed so that benchmarks import packages from ``site`` first."""
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

"""The package as it is installed, from a checkout that is not: for machines where nothing can be installed, and for
two commits side by side. Imports nothing but the standard library.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_packages(site: Path, root: Path = ROOT, bench: Path | None = None) -> Path:
    """Make ``site`` a folder for PYTHONPATH, with kernels/ and bench/ inside clipfast/.

    Args:
        site: is made; what it links from an earlier time is replaced.
        root: the checkout.
        bench: benchmarks of another checkout, in place of its own.
    """
    package = site / "clipfast"
    package.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():
        link.unlink()
    for entry in (root / "clipfast").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(root / "kernels")
    (package / "bench").symlink_to(bench or root / "bench")
    return site

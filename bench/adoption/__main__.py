"""``python -m clipfast.bench.adoption``: write the table of the ops that models of other libraries run on."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from clipfast.adopt import places

from . import table


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sections of the requested libraries in the table of adopted models, and return 0."""
    libraries = {library.module: library for library in table.LIBRARIES}
    parser = argparse.ArgumentParser(prog="python -m clipfast.bench.adoption", description=table.__doc__)
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"among {', '.join(libraries)} (default: all)")
    parser.add_argument("--file", type=Path, default=Path("docs/tables/adopt.md"), help="default: %(default)s")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.libraries) - set(libraries))
    if unknown:
        parser.error(f"no library {', '.join(unknown)}: choose from {', '.join(libraries)}")
    warnings.simplefilter("ignore")  # hides warnings that the libraries raise themselves
    places.CPU_DTYPES = (*places.CPU_DTYPES, torch.float32)  # a CPU then runs our ops, whose errors are measured
    torch.set_num_threads(1)  # threads that wait for each other cost more than they gain in small models
    for library in [libraries[name] for name in args.libraries or libraries]:
        rows = {}
        for name in library.names():
            rows[name] = table.measure(library, name)
            print(f"{library.heading()}: {name}", file=sys.stderr, flush=True)
        document = args.file.read_text() if args.file.exists() else table.HEAD
        args.file.write_text(table.fill(document, table.section(library, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

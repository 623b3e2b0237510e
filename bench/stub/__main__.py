"""``python -m bench.stub``: launch every op on a stub of the CUDA driver, and report refused calls."""

import argparse
import json
import sys

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES

from . import walk
from .build import missing_tool

CASES = ("shipped", "odd", "quick", "captured")


def main() -> int:
    """Run the stub driver's command line; return 1 if the driver would refuse a call, and 2 if gcc is missing."""
    parser = argparse.ArgumentParser("python -m bench.stub", description=__doc__)
    add = parser.add_argument
    add("--arch", type=int, default=90, choices=tuple(ARCHITECTURES), help="compute capability (default: 90)")
    cases = "calls at shipped shapes, all with odd layouts or those of a quick run, or small ones in a captured stream"
    add("--cases", nargs="+", default=CASES[:2] + CASES[3:], choices=CASES, help=cases)
    add("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES), help="of shipped and odd cases (all)")
    add("--json", action="store_true", help="print one line of JSON for each kind of cases")
    args = parser.parse_args()
    missing = missing_tool()
    if missing:
        print(f"bench.stub: {missing}", file=sys.stderr)
        return 2
    faults = 0
    for kind in args.cases:
        walked = _walk(kind, args)
        faults += len(walked.faults)
        if args.json:
            print(json.dumps({"cases": kind, **walked.to_dict()}), flush=True)
        else:
            print("\n".join([f"{kind}: {walk.describe(walked)}", *walked.faults]), flush=True)
    return 1 if faults else 0


def _walk(kind: str, args: argparse.Namespace) -> walk.Walked:
    """Launch calls on the stub driver, as the command line says: shipped, with odd layouts, or captured as a graph."""
    if kind == "shipped":
        return walk.shipped(args.arch, tuple(args.dtype))
    if kind == "captured":
        return walk.captured(args.arch)
    return walk.odd(args.arch, tuple(args.dtype), only_quick=kind == "quick")


if __name__ == "__main__":
    sys.exit(main())

"""Compare the model of a GPU with published measurements.

    python -m clipfast.bench.inspection.validation --fetch                        say how to get the kernels
    python -m clipfast.bench.inspection.validation --sources FOLDER               all figures
    python -m clipfast.bench.inspection.validation --sources FOLDER --only norm   those whose name or kind matches
    python -m clipfast.bench.inspection.validation --sources FOLDER --peers       ours beside other people's kernels

The results are kept beside those of other figures and of other Tritons, so run it under each Triton. ``--document
docs/gpu-model.md`` writes the tables of that document again.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from . import FOLDER, peers, tables
from .figures import Answer, Figure, NoModel, answer, figures
from .sources import Missing, how_to_fetch

RESULTS = FOLDER / "results.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=Path("sources"), help="folder of kernels (default: ./sources)")
    parser.add_argument("--fetch", action="store_true", help="print the commands that fill the folder, and end")
    parser.add_argument("--peers", action="store_true", help="predict other people's kernels beside ours, and end")
    parser.add_argument("--only", default="", help="a regular expression for kind and name of figures")
    parser.add_argument("--document", type=Path, help="a document whose tables are written again")
    options = parser.parse_args(arguments)
    if options.fetch:
        print("\n".join(how_to_fetch(options.sources)))
        return 0
    if options.peers:
        for row in peers.compare(options.sources, lambda case: re.search(options.only, case)):
            print(peers.line(*row), flush=True)
        return 0
    version = ".".join(triton.__version__.split(".")[:2])
    for figure in figures():
        wanted = figure.only_triton in ("", version) and re.search(options.only, f"{figure.kind}: {figure.name}")
        if not wanted:
            continue
        found = _asked(figure, options.sources)
        print(_line(figure, found), flush=True)
        _keep(figure, found, version)
    results = _results()
    (FOLDER / "errors.json").write_text(json.dumps(tables.errors_of(results), indent=1) + "\n")
    print(tables.summaries(results))
    if options.document:
        tables.write(options.document, results)
    return 0


def _asked(figure: Figure, folder: Path) -> Answer | str:
    """Return the answer, or why there is none."""
    try:
        return answer(figure, folder)
    except (Missing, NoModel) as error:
        return str(error)
    except Exception as error:  # upstream code that fails must not end the others
        return f"{type(error).__name__}: {error}"


def _line(figure: Figure, found: Answer | str) -> str:
    if isinstance(found, str):
        return f"{figure.kind}: {figure.name}: {found}"
    ratio = found.predicted / found.published
    times = f"{found.published:.3f} ms, predicted {found.predicted:.3f}, {ratio:.2f}"
    return f"{figure.kind}: {figure.name}: {times}, {found.limit}"


def _keep(figure: Figure, found: Answer | str, version: str) -> None:
    """Put an answer into the results; after each figure, so that an interrupted run is not lost."""
    results = _results()
    result = next(one for one in results if one["name"] == figure.name)
    if isinstance(found, Answer):
        result["published_ms"] = round(found.published, 6)
        result["predicted_ms"][version], result["limit"][version] = round(found.predicted, 6), found.limit
    else:
        result["limit"][version] = found
        result["predicted_ms"].pop(version, None)
    written = RESULTS.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(results, indent=1) + "\n")
    written.replace(RESULTS)  # at once, for runs that go on beside this one


def _results() -> list[dict[str, Any]]:
    """Return the results that there are, in the order of the figures."""
    kept = {one["name"]: one for one in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    results = []
    for figure in figures():
        old = kept.get(figure.name, {})
        results.append({
            "name": figure.name, "kind": figure.kind, "source": figure.source, "machine": figure.machine,
            "in_view": figure.in_view,
            "published": f"{figure.value} {figure.unit}", "published_ms": old.get("published_ms"),
            "predicted_ms": dict(old.get("predicted_ms", {})), "limit": dict(old.get("limit", {})),
        })  # fmt: skip
    return results


if __name__ == "__main__":
    sys.exit(main())

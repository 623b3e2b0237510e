"""Compare the model of a GPU with published measurements.

    python -m clipfast.bench.inspection.validation --fetch                        say how to get the kernels
    python -m clipfast.bench.inspection.validation --sources FOLDER               all figures
    python -m clipfast.bench.inspection.validation --sources FOLDER --only norm   those whose name or kind matches

The results are kept beside those of other figures and of other Tritons, so run it under each Triton. ``--document
docs/gpu-model.md`` writes the tables of that document again.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from clipfast.cli.arguments import Parser
from clipfast.io.files import replace_text

from ..model import NoModel
from . import FOLDER, tables
from .figures import answer, figures
from .sources import Missing, how_to_fetch

RESULTS = FOLDER / "results.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the validation of predicted times that the command line selects."""
    parser = Parser(description=__doc__)
    parser.add_argument("--sources", type=Path, default=Path("sources"), help="folder of kernels (default: ./sources)")
    parser.add_argument("--fetch", action="store_true", help="print the commands that fill the folder, and end")
    parser.add_argument("--only", default="", help="a regular expression for kind and name of figures")
    parser.add_argument("--document", type=Path, help="a document whose tables are written again")
    options = parser.parse_args(arguments)
    if options.fetch:
        print("\n".join(how_to_fetch(options.sources)))
        return 0
    version = ".".join(triton.__version__.split(".")[:2])
    results = read_results()
    for figure, result in zip(figures(), results, strict=True):
        label = f"{figure.kind}: {figure.name}"
        if figure.only_triton not in ("", version) or not re.search(options.only, label):
            continue
        try:
            found = answer(figure, options.sources)
            result["published_ms"] = round(found.published, 6)
            result["predicted_ms"][version], result["limit"][version] = round(found.predicted, 6), found.limit
            times = f"{found.published:.3f} ms, predicted {found.predicted:.3f}"
            print(f"{label}: {times}, {found.predicted / found.published:.2f}, {found.limit}", flush=True)
        except Exception as error:  # an error of upstream code must not end the loop over the other figures
            reason = str(error) if isinstance(error, Missing | NoModel) else f"{type(error).__name__}: {error}"
            result["limit"][version] = reason
            result["predicted_ms"].pop(version, None)
            print(f"{label}: {reason}", flush=True)
        replace_text(RESULTS, json.dumps(results, indent=1) + "\n")  # an interrupted run keeps its results
    replace_text(FOLDER / "errors.json", json.dumps(tables.errors_of(results), indent=1) + "\n")
    print(tables.summaries(results))
    if options.document:
        tables.write(options.document, results)
    return 0


def read_results() -> list[dict[str, Any]]:
    """Return the committed results of the validation, in the order of the figures; new figures have empty ones."""
    kept = {one["name"]: one for one in json.loads(RESULTS.read_text())}
    results = []
    for figure in figures():
        answers: dict[str, Any] = {"published_ms": None, "predicted_ms": {}, "limit": {}}
        answers |= {key: value for key, value in kept.get(figure.name, {}).items() if key in answers}
        results.append({
            "name": figure.name, "kind": figure.kind, "source": figure.source, "machine": figure.machine,
            "in_view": figure.in_view, "published": f"{figure.value} {figure.unit}", **answers,
        })  # fmt: skip
    return results


if __name__ == "__main__":
    sys.exit(main())

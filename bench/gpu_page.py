"""The last step of ``bench.gpu``: one page of all claims, ``python -m clipfast.bench.gpu_page FOLDER``.

Each row is a claim: a time that the model of the GPU predicts, the time that was measured, and their ratio; or an
implementation of others, its time, and how many times faster ours was.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

from clipfast.io.page import section, write_page
from clipfast.io.page import table as page_table
from clipfast.io.text import align
from clipfast.io.units import SECONDS, scaled

from .case import OURS
from .gpu_kernels import KERNELS
from .inspection.eager import STEP
from .inspection.forecast import label
from .suites.step import GRAPHED, PADDED

HEADS = ("claim", "predicted", "measured", "ratio")
PREDICTED = "predicted.json"
# Spaces before a claim show that it belongs to the case above it. So white space is kept, and headings sort no rows.
STYLE = "td { white-space: pre } th button { pointer-events: none } body { max-width: 76rem }\n"
WORDS = (
    "In a row with a prediction, the ratio is the predicted time over the measured one: above 1, the kernel was faster "
    "than predicted. In a row of another implementation, it is its time over ours: above 1, ours was faster."
)


def claims(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield claim, prediction, measurement and ratio from the results in the folder of a GPU run."""
    predictions: dict[tuple[str, str], float] = {}  # predicted seconds by case and candidate
    parts: dict[str, dict[str, float]] = {}
    for one in _read(folder / PREDICTED).get("forecasts", ()):
        name = label(one["name"], one["shape"], one["dtype"])
        predictions[name, GRAPHED if one["name"] == STEP else OURS] = one["corrected"]["seconds"]
        if one["name"] == STEP:
            predictions[name, PADDED] = one["eager_seconds"]
        for part in one["parts"]:
            seconds = part["launches"] * part["prediction"]["seconds"] if part["prediction"] else 0.0
            of_kernel = parts.setdefault(name, {})
            of_kernel[part["kernel"]] = of_kernel.get(part["kernel"], 0.0) + seconds
    kernels = _read(folder / KERNELS)
    for path in sorted(folder.glob("bench-*.json")):
        for case in _read(path).get("cases", ()):
            name = label(case["op"].removesuffix(".fwd_bwd"), case["shape"], case["dtype"])
            yield from _of_case(name, case, predictions)
            for kernel, seconds in kernels.get(name, {}).items():
                predicted = parts.get(name, {}).get(kernel)
                yield f"  kernel {kernel}", _time(predicted), _time(seconds), _ratio(predicted, seconds)


def _of_case(
    name: str, case: dict[str, Any], predictions: dict[tuple[str, str], float]
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the claims about one benchmark case: our times, and the ratios of other implementations' times to ours."""
    ours = next((one.get("median_s") for one in case["candidates"] if one["name"] == OURS), None)
    throttled = ", throttled" if case["telemetry"].get("throttled") else ""
    for one in case["candidates"]:
        seconds, predicted = one.get("median_s"), predictions.get((name, one["name"]))
        refused = (one["refused"] or "").removeprefix("missing: ")
        measured = f"{_time(seconds)}{throttled}" if seconds else shorten(f"not timed: {refused}", 48)
        if one["name"] == OURS:
            yield name, _time(predicted), measured, _ratio(predicted, ours)
        elif predicted:
            yield f"  {one['name']}", _time(predicted), measured, _ratio(predicted, seconds)
        else:
            yield f"  beside {one['name']}", "", measured, _ratio(seconds, ours)


def _ratio(seconds: float | None, ours: float | None) -> str:
    """Return the ratio of a benchmark's time to ours as text; empty if one of them is missing."""
    return f"{seconds / ours:.2f}" if ours and seconds else ""


def _time(seconds: float | None) -> str:
    """Return a time of the GPU page with its unit; an empty text if there is none."""
    return scaled(seconds, SECONDS) if seconds else ""


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON of a step of the GPU run, which is empty if the step wrote none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def main() -> int:
    """Write the page of a GPU run's claims, and print its table; return 0."""
    parser = argparse.ArgumentParser("python -m clipfast.bench.gpu_page", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of results of bench.gpu")
    parser.add_argument("--note", default="", help="a sentence at the top of the page")
    args = parser.parse_args()
    rows = list(claims(args.folder))
    title = "clipfast on a GPU: predicted and measured"
    words = f"{args.note} {WORDS}".strip()
    body = section(title, words, level=1) + page_table(rows, HEADS)
    write_page(args.folder / "page.html", title, body, style=STYLE)
    print(align([HEADS, *rows], right=range(1, 4)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

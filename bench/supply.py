"""The summary of a data pipeline: the number of cores that each stage takes at a given rate, and the slowest stage."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from clipfast.host import cores as usable_cores
from clipfast.io.text import align

from .case import OURS

# The stages in a data worker. The pipeline with one worker runs all of them, and also sends the batches to the process
# that trains.
WORK = ("read", "decode", "resize", "collate", "tokenize")


def supply(cases: Sequence[dict[str, Any]], pairs_per_second: float, cores: int | None = None) -> Iterator[str]:
    """Yield the summary of the measured stages, for each size of images.

    Args:
        cases: the cases of a result, as :func:`clipfast.bench.results.case_result` makes them.
        pairs_per_second: the rate of a training run.
        cores: the number of cores of this machine; default: the number that this process may use.
    """
    cores = cores or usable_cores()
    by_size = itertools.groupby(sorted((case for case in cases if case["suite"] == "data"), key=_size), _size)
    for (width, height, size), alike in by_size:
        found = {case["shape"]["stage"]: _seconds_per_pair(case) for case in alike}
        work = {stage: found[stage][OURS] for stage in WORK if OURS in found.get(stage, {})}
        if work:
            title = f"data workers at {pairs_per_second:,.0f} pairs/s, photographs {width}x{height} for {size}x{size}:"
            yield "\n".join([title, *_summary(found, work, pairs_per_second, cores)])


def _size(case: dict[str, Any]) -> tuple[int, int, int]:
    """Return width, height and cropped size of the images in a data benchmark."""
    return case["shape"]["width"], case["shape"]["height"], case["shape"]["size"]


def _seconds_per_pair(case: dict[str, Any]) -> dict[str, float]:
    """Return the seconds per pair of each candidate in a data benchmark."""
    return {c["name"]: c["median_s"] / case["items"]["count"] for c in case["candidates"] if c["samples_s"]}


def _summary(
    found: dict[str, dict[str, float]], work: dict[str, float], pairs_per_second: float, cores: int
) -> Iterator[str]:
    """Yield the lines that summarise the benchmark of a data pipeline for one size of images."""
    pipelines = found.get("pipeline", {})
    total = pipelines.get(f"{OURS}, 1 worker", sum(work.values()))
    work = work | {"the rest": max(total - sum(work.values()), 0.0)}
    rows = [["", "us per pair", "share", "cores"]]
    for name, seconds in [*work.items(), ("together", total)]:
        cells = [f"{1e6 * seconds:,.0f}", f"{100 * seconds / total:.0f}%", f"{pairs_per_second * seconds:.1f}"]
        rows.append([name, *cells])
    yield align(rows, right=range(1, len(rows[0])), indent="  ")
    limit = max(work, key=lambda stage: work[stage])
    yield f"  {limit} limits; {math.ceil(pairs_per_second * total)} data workers are needed, a core for each"
    yield f"  {cores} core(s), as many as this machine has, supply {cores / total:,.0f} pairs/s"
    if theirs := pipelines.get("OpenCLIP, 1 worker"):
        yield f"  OpenCLIP's pipeline takes {pairs_per_second * theirs:.1f} cores, {theirs / total:.2f} times as many"
    if copy := found.get("transfer", {}).get(OURS):
        yield f"  the copy to the GPU takes {100 * pairs_per_second * copy:.1f}% of the time, beside the step"

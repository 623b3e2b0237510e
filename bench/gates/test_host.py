"""The time of the host for each op on CPU tensors, as a ratio to that of PyTorch's own op, which runs in turns with it.

    pytest bench/gates/test_host.py
    python -m bench host --overwrite --json bench/gates/host.json        on a quiet machine: the ratios to compare with

A gate fails if a ratio is surely, by its 95% interval, more than 1.5 times the one in ``host.json``. The inputs are so
small that nothing but the Python and C++ code that leads to the kernels takes time.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from clipfast.bench import host
from clipfast.bench.case import OURS
from clipfast.bench.harness import ratio_interval

FACTOR, ROUNDS = 1.5, 15
ROWS = json.loads(Path(__file__).with_name("host.json").read_text())["rows"]
KNOWN = {(row["name"], str(row["shape"])): row for row in ROWS}
CASES = [
    pytest.param(row, kind, id=f"{row.title} {kind}")
    for row in host.rows(None, [], "fp32", torch.device("cpu"))
    for kind in host.PASSES
    if getattr(row, kind)
]


@pytest.mark.parametrize(("row", "kind"), CASES)
def test_the_way_to_the_kernels(row: host.Row, kind: str) -> None:
    """Measure the host's time for a pass of an op, and compare its ratio with the known one in ``host.json``."""
    known = KNOWN[row.name, str(dict(row.shape))]
    names = OURS, known["against"]
    case = host.prepared(getattr(row, kind))
    case = dataclasses.replace(case, candidates=tuple(one for one in case.candidates if one.name in names))
    with host.undisturbed():
        samples = {timing.candidate.name: timing.samples for timing in host.timings(case, ROUNDS)}
    ours, theirs = (known["found"][name][kind][0] for name in names)
    ratio, low, _ = ratio_interval(samples[known["against"]], samples[OURS])
    message = f"{row.title}, {kind}: {ratio:.2f} times the time of {known['against']}, {ours / theirs:.2f} is known"
    assert low <= FACTOR * ours / theirs, message

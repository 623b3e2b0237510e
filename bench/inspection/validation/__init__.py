"""Validation of the model of a GPU against published measurements of other people's kernels.

A figure is a published time or rate of one call at one size. ``figures.json`` holds the figures with their sources,
``results.json`` the model's prediction of each one for each version of Triton, and ``errors.json`` the error for each
kind of kernel, which ``clipfast inspect`` quotes.
``python -m clipfast.bench.inspection.validation`` writes the last two files, and the table in docs/gpu-model.md. The
kernels are not part of this repository: ``sources`` lists their origin, ``kernels`` and ``passes`` call them, and
``recording`` records their launches. docs/gpu-model.md says which constants of the model were chosen with knowledge of
some figures.
"""

import dataclasses
import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Band:
    """The errors of predictions for one kind of kernel, as natural logarithms of predicted over published time.

    Attributes:
        points: number of published figures.
        bias: the mean; negative if the predicted times are too short.
        middle: the median.
        low, high: the range of four in five figures: the lowest and the highest tenth are left out.
        median: the median of the absolute values.
        p90: the 90th percentile of the absolute values.
        worst: the largest absolute value.
    """

    points: int
    bias: float
    middle: float
    low: float
    high: float
    median: float
    p90: float
    worst: float


@functools.cache
def errors() -> dict[str, Band]:
    """Return the error band of each kind of kernel from the last validation."""
    return {kind: Band(**values) for kind, values in json.loads((FOLDER / "errors.json").read_text()).items()}

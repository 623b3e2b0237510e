"""Validation of the model of a GPU against published measurements of other people's kernels.

``figures.json`` holds the published figures with their sources, ``results.json`` the model's prediction of each figure
for each version of Triton, and ``errors.json`` the error for each kind of kernel, which ``clipfast inspect`` quotes.
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
        points: number of figures.
        bias: the mean; negative if the predicted times are too short.
        middle: the median.
        low, high: the range of four in five, that is without the tenth of the figures at either end.
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

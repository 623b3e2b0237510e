"""The model of a GPU against published measurements of other people's kernels.

``figures.json`` holds what was published, with the source of each figure; ``results.json`` what the model says to it,
for each Triton; ``errors.json`` the error of each kind, which ``clipfast inspect`` quotes. ``python -m
clipfast.bench.inspection.validation`` makes the last two, and the table in docs/gpu-model.md. The kernels themselves
are not part of this repository: ``sources`` says where they are from, ``kernels`` and ``passes`` call them, and
``recording`` keeps what they launch. docs/gpu-model.md says what was chosen with figures in view.
"""

import dataclasses
import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Band:
    """How far predictions of one kind of kernel are from published figures, as natural logarithms of their ratio.

    Attributes:
        points: number of figures.
        bias: mean; negative where the model is too fast.
        median: of the absolute values.
        p90: nine in ten absolute values are no larger.
        worst: the largest absolute value.
    """

    points: int
    bias: float
    median: float
    p90: float
    worst: float


@functools.cache
def errors() -> dict[str, Band]:
    """Return the error of each kind of kernel, as of the last validation."""
    return {kind: Band(**values) for kind, values in json.loads((FOLDER / "errors.json").read_text()).items()}

"""The published figures, the model's predictions of them, and the errors of each kind of kernel."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clipfast.kernels.hardware import COPIED

from ..model import H100, H200, Machine, NoModel, load, predict
from ..model.predict import Effort
from . import FOLDER, Band, kernels, passes
from .kernels import Work

# The 96 GB of a GH200 have 4 TB/s by its data sheet; copies are assumed to reach the same fraction as on an H100.
GH200 = dataclasses.replace(H100, name="GH200", hbm_rate=COPIED * 4.0e12)
# With these limits, a prediction takes half as long as with ``model.FULL``. If all programs are alike, it is the same.
# If their paths have many lengths, as in a causal backward pass, the two differ by up to a tenth.
EFFORT = Effort(steps=150_000, turns=6, programs=16, kinds=4)
# An H800 SXM computes as fast as an H100; its links to other GPUs are slower.
MACHINES = {"H100": H100, "H800": H100, "H200": H200, "GH200": GH200}


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published figure: the kernel and its sizes, and the measured value with its unit."""

    kernel: str
    kind: str
    source: str
    machine: str
    case: dict[str, Any]
    value: float
    unit: str
    only_triton: str = ""  # the version of Triton that compiles the kernel, if not all do
    in_view: bool = False  # whether its value was known when the last constants of the model were chosen

    @property
    def name(self) -> str:
        """Return the name of the published time in results and tables."""
        case = " ".join(f"{key} {value}" if value is not True else key for key, value in self.case.items() if value)
        return f"{self.kernel.replace('_', ' ')}, {case.replace('_', ' ')}"

    def seconds(self, work: Work) -> float:
        """Return the published time of the figure in seconds."""
        return self.value / 1e3 if self.unit == "ms" else work.flops / (self.value * 1e12)


class Answer(NamedTuple):
    """The published and the predicted time of a figure, in milliseconds."""

    published: float
    predicted: float
    limit: str


def figures() -> Iterator[Figure]:
    """Yield the published figures in ``figures.json``, with which the validation compares predictions."""
    for group in json.loads((FOLDER / "figures.json").read_text())["figures"]:
        for place, row in enumerate(group["rows"]):
            yield Figure(
                group["kernel"], group["kind"], group["source"], group["machine"],
                dict(zip(group["columns"], row, strict=False)), row[-1], group["unit"], group.get("triton", ""),
                place in group.get("in_view", ()),
            )  # fmt: skip


def sources() -> dict[str, dict[str, str]]:
    """Return the sources in ``figures.json`` by the key that figures name."""
    found: dict[str, dict[str, str]] = json.loads((FOLDER / "figures.json").read_text())["sources"]
    return found


def answer(figure: Figure, folder: Path) -> Answer:
    """Compile the kernels of a figure and predict their time.

    Raises:
        Missing: a source file is missing.
        NoModel: the model does not cover a kernel.
    """
    call = getattr(kernels, figure.kernel, None) or getattr(passes, figure.kernel)
    answers: list[Answer] = []
    works = call(folder, *figure.case.values())
    for work in works:
        try:
            seconds, limit = time_of(work, MACHINES[figure.machine])
        except NoModel:
            if not answers and work is works[-1]:
                raise
            continue  # for example, the tile of this configuration does not fit, and an autotuner skips it too
        limits = f"{work.variant}, {limit}" if work.variant else limit
        answers.append(Answer(figure.seconds(work) * 1e3, seconds * 1e3, limits))
    return min(answers, key=lambda one: one.predicted)


def time_of(work: Work, machine: Machine) -> tuple[float, str]:
    """Return the predicted time of all kernels of a figure together, and the limiting unit of the longest launch."""
    found: dict[int, tuple[float, str]] = {}  # a launch that is repeated is predicted once
    for launched, moved in work.launches:
        if id(launched) not in found:
            kernel = load(launched.compiled)
            prediction = predict(kernel, launched.grid, launched.arguments, machine, hbm_bytes=moved, effort=EFFORT)
            found[id(launched)] = prediction.seconds, prediction.limit
    total = sum(found[id(launched)][0] for launched, _ in work.launches)
    total += sum(machine.op_seconds(other.flops, other.moved) for other in work.others)
    return total, max(found.values(), default=(0.0, "published rate"))[1]


def bands(answers: Iterable[tuple[str, float]]) -> dict[str, Band]:
    """Return the error band of each kind from pairs of kind and error; "all" is the band of all figures."""
    by_kind: dict[str, list[float]] = {}
    for kind, error in answers:
        by_kind.setdefault(kind, []).append(error)
        by_kind.setdefault("all", []).append(error)
    return {kind: _band(found) for kind, found in sorted(by_kind.items())}


def _band(found: list[float]) -> Band:
    """Return the error band of the model of kernels for a list of errors."""
    sizes, found = sorted(map(abs, found)), sorted(found)
    nine_in_ten, left_out = sizes[math.ceil(0.9 * len(sizes)) - 1], len(found) // 10
    middle = statistics.fmean(found), statistics.median(found), found[left_out], found[-1 - left_out]
    numbers = (*middle, statistics.median(sizes), nine_in_ten, sizes[-1])
    return Band(len(found), *(round(number, 3) for number in numbers))

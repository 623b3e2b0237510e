"""Effective robustness: how far a model's accuracy under a distribution shift exceeds the expected one.

Over many models, the log-odds of accuracy on a base set (such as ImageNet) and on a shifted set (such as ImageNet-R)
lie near a straight line. A line that is fitted to baseline models predicts a model's accuracy under the shift from its
accuracy on the base. The measured accuracy minus the predicted one is the effective robustness (Taori et al. 2020).
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .class_subsets import read_json
from .intervals import RESAMPLES

AVERAGE, SYNTHETIC = "average", "synthetic"  # names of the means over all natural and over all synthetic shifts
COLUMNS = ("model", "base", "shift")
Interval = tuple[float, float]


class Point(NamedTuple):
    """The accuracies of a model on the base set and on a shifted set, from 0 to 1."""

    model: str
    base: float
    shift: float


@dataclasses.dataclass(frozen=True)
class Line:
    """The line of baseline models: log-odds(accuracy under shift) = intercept + slope * log-odds(accuracy on the base).

    Attributes:
        slope, intercept: the parameters of the line.
        points: the points to which the line was fitted.
    """

    slope: float
    intercept: float
    points: tuple[Point, ...]

    def __call__(self, base: float) -> float:
        """Return the accuracy under the shift that the line predicts from the accuracy ``base`` on the base."""
        if base in (0.0, 1.0):  # the log-odds are infinite; a rising line maps 0 to 0 and 1 to 1
            return base if self.slope > 0 else 1 - base
        return 1 / (1 + math.exp(-(self.intercept + self.slope * math.log(base / (1 - base)))))

    def band(self, bases: Sequence[float]) -> list[Interval]:
        """Return the 95% interval of the line's prediction for each accuracy on the base, by resampling the points.

        Resamples in which all points have the same accuracy on the base determine no line, and are left out.
        """
        generator = torch.Generator().manual_seed(0)
        x, y = _logits(self.points)
        rows = torch.randint(len(x), (RESAMPLES, len(x)), generator=generator)
        x, y = x[rows], y[rows]
        centred = x - x.mean(1, keepdim=True)
        spread = centred.square().sum(1)
        slopes = (centred * y).sum(1)[spread > 1e-12] / spread[spread > 1e-12]
        intercepts = y.mean(1)[spread > 1e-12] - slopes * x.mean(1)[spread > 1e-12]
        at = torch.logit(torch.tensor(bases, dtype=torch.float64))
        predicted = (intercepts[:, None] + slopes[:, None] * at).sigmoid()
        low, high = predicted.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).tolist()
        return list(zip(low, high, strict=True))


def is_usable(point: Point) -> bool:
    """Return whether both of a model's accuracies have finite log-odds, as the robustness fit needs."""
    return 0 < point.base < 1 and 0 < point.shift < 1


def fit(points: Iterable[Point], name: str) -> Line:
    """Fit the baseline's line of accuracy under a shift by least squares on the scale of log-odds.

    Args:
        points: the baseline models; accuracies of 0 and 1 have no finite log-odds, and are left out.
        name: the name of the shift, for error messages.

    Raises:
        ValueError: no two points have different accuracies on the base.
    """
    usable = tuple(filter(is_usable, points))
    if len({point.base for point in usable}) < 2:
        raise ValueError(
            f"the baseline of {name} has {len(usable)} models with accuracies between 0 and 1: a line needs at least "
            "two, of different accuracies on the base"
        )
    x, y = _logits(usable)
    centred = x - x.mean()
    slope = ((centred * y).sum() / centred.square().sum()).item()
    return Line(slope, (y.mean() - slope * x.mean()).item(), usable)


def _logits(points: Sequence[Point]) -> tuple[Tensor, Tensor]:
    """Return the log-odds of the models' accuracies on the base, [N], and under the shift, [N]."""
    both = torch.tensor([(point.base, point.shift) for point in points], dtype=torch.float64).logit()
    return both[:, 0], both[:, 1]


def figures(base: float, shift: float, line: Line | None) -> dict[str, float | None]:
    """Return the robustness of a model under one shift.

    Args:
        base, shift: the model's accuracies on the base and under the shift.
        line: the line of the baseline models, or None without a baseline.

    Returns:
        ``drop``; ``relative_drop``, as a share of the accuracy on the base; ``expected``, the accuracy that the line
        predicts; and ``effective``, the accuracy under the shift minus ``expected``.
    """
    expected = None if line is None else line(base)
    return {
        "drop": base - shift,
        "relative_drop": (base - shift) / base if base else None,
        "expected": expected,
        "effective": None if expected is None else shift - expected,
    }


def mean_interval(shares: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Return the interval of the mean of several accuracies that were measured on separate images.

    The distances from each accuracy to the ends of its interval are squared and added (Zou and Donner 2008).
    """
    count, mean = len(shares), sum(shares) / len(shares)
    low = math.sqrt(sum((share - ends[0]) ** 2 for share, ends in zip(shares, intervals, strict=True))) / count
    high = math.sqrt(sum((ends[1] - share) ** 2 for share, ends in zip(shares, intervals, strict=True))) / count
    return max(0.0, mean - low), min(1.0, mean + high)


def read_points(path: Path, shifts: Sequence[str], unnamed: str) -> dict[str, list[Point]]:
    """Read the accuracies of baseline models under each shift from a file.

    Args:
        path: CSV with the columns model, base, shift, and set, which names the shift; or a JSON list of objects with
            these keys; or the results of ``clipfast eval robustness``.
        shifts: the names of the shifts that are wanted; points of other shifts are left out.
        unnamed: the shift to which points without ``set`` belong.

    Raises:
        ValueError: the file cannot be read, lacks a column, or holds a value that is no accuracy.
    """
    found: dict[str, list[Point]] = {}
    for number, row in enumerate(_rows(path), 1):
        lacking = next((column for column in COLUMNS if row.get(column) in (None, "")), None)
        if lacking is not None:
            raise ValueError(f"{path}, row {number} has no {lacking!r}: a baseline needs {', '.join(COLUMNS)}")
        values = [_share(path, number, column, row[column]) for column in COLUMNS[1:]]
        name = row.get("set") or unnamed
        if name in shifts:
            found.setdefault(str(name), []).append(Point(str(row["model"]), *values))
    if not found:
        raise ValueError(f"{path} has no points of {', '.join(shifts)}")
    return found


def _rows(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a file of baseline models (``--baseline``): CSV, a JSON list, or a file of results."""
    if path.suffix.lower() == ".csv":
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("points"), list):
        content = content["points"]  # the file holds the results of ``clipfast eval robustness``
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path} must hold a list of objects with {', '.join(COLUMNS)}, or results of this task")
    return content


def _share(path: Path, number: int, column: str, value: object) -> float:
    """Return an accuracy in a file of baseline models; raise ValueError if it is no number from 0 to 1."""
    try:
        share = float(str(value))
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(f"{path}, row {number}: {column} must be an accuracy from 0 to 1, got {value!r}")
    return share

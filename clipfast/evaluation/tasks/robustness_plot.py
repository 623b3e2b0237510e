"""Pictures of ``clipfast eval robustness``: in kind figure 13 of Radford et al. 2021, and what synthetic shifts do."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ...files import save_figure
from ..effective_robustness import AVERAGE, Line, Point, is_usable
from ..labelled import LabelledSet
from ..pictures import draw_chance, shorten
from ..shifts import SHIFTS, STRENGTHS, Shift
from .robustness_results import SYNTHETIC
from .robustness_table import name_of

COLUMNS = 3
LEAST = 1e-3  # the smallest accuracy, and error, that has a place on a scale of log-odds
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 35, 50, 65, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)
MARKERS = "osD^vP*X"


def robustness_plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy under each shift over that on the base, with the baseline's line, and accuracy over strength.

    Args:
        results: as the task writes them.
        path: the file to write.
    """
    sets = _compared(results)
    kinds = list(dict.fromkeys(row["shift"] for row in results["synthetic"]))
    columns = min(COLUMNS, len(sets) + len(kinds))
    rows = math.ceil((len(sets) + len(kinds)) / columns)
    height = 3.9 * rows + 0.3 * len(results["models"]) / min(2, columns) + 0.8
    figure = Figure(figsize=(max(4.6 * columns, 5.5), height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for name, axis in zip(sets, axes, strict=False):
        _scatter(axis, results, name)
    for kind, axis in zip(kinds, axes[len(sets) :], strict=False):
        _strengths(axis, results, kind)
    for axis in axes[len(sets) + len(kinds) :]:
        axis.axis("off")
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(2, columns), fontsize=9)
    figure.suptitle(
        f"base: {shorten(results['dataset'], 50, keep_end=True)}, {results['classes']:,} classes; chance: "
        f"{1 / results['classes']:.2%}",
        fontsize=11,
    )
    save_figure(figure, path, dpi=110)


def _compared(results: Mapping[str, Any]) -> list[str]:
    """Return the shifts, and means of shifts, to compare by: the mean first, synthetic ones if there is a line."""
    natural = list(dict.fromkeys(row["shift"] for row in results["sets"]))
    means = [AVERAGE] if len(natural) > 1 else []
    return [*means, *natural, *([SYNTHETIC] if SYNTHETIC in results["baseline"] else [])]


def _scatter(axis: Axes, results: Mapping[str, Any], name: str) -> None:
    """Draw models by their accuracies on the base and under one shift, both on the scale of log-odds."""
    points = [row for row in results["points"] if row["set"] == name]
    found = [row["robustness"][name] for row in results["models"]]
    bases = [row["base"] for row in points]
    ends = [*bases, *(row["shift"] for row in points), *(end for row in found for end in row["shift_interval"])]
    (left, right), (bottom, top) = _padded(bases), _padded(ends)
    steps = [_expit(_logit(left) + (_logit(right) - _logit(left)) * step / 60) for step in range(61)]
    axis.plot(steps, steps, "--", color="black", linewidth=1, label="ideal robust model: no drop")
    if name in results["baseline"]:
        theirs = [Point(row["model"], row["base"], row["shift"]) for row in points if row["role"] == "baseline"]
        _baseline(axis, results["baseline"][name], theirs, steps)
    for number, (row, model) in enumerate(zip(found, results["models"], strict=True)):
        _point(axis, row, _style(number, name_of(model), "none"))
    count = len({row["shift"] for row in results["sets"]})
    means = {AVERAGE: f"average of {count} shifts", SYNTHETIC: "mean of the synthetic shifts"}
    axis.set_title(means.get(name, name), fontsize=10)
    axis.set(xscale="logit", yscale="logit", xlim=(left, right), ylim=(bottom, top))
    axis.set(xlabel="top-1 on the base, same classes, %", ylabel="top-1 on the shifted set, %")
    for scale, limits in ((axis.xaxis, (left, right)), (axis.yaxis, (bottom, top))):
        scale.set_major_locator(FixedLocator(_ticks(*limits)))
        scale.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
        scale.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def _baseline(axis: Axes, about: Mapping[str, Any], points: Sequence[Point], steps: Sequence[float]) -> None:
    """Draw the baseline's models, the line through them, and its interval at some accuracies on the base."""
    line = Line(about["slope"], about["intercept"], tuple(filter(is_usable, points)))
    color = "tab:blue"
    x, y = zip(*((_inside(point.base), _inside(point.shift)) for point in points), strict=True)
    axis.plot(x, y, "o", markersize=4, color=color, label="baseline", zorder=3)
    axis.plot(steps, [line(step) for step in steps], color=color, linewidth=1, label="line through the baseline")
    low, high = zip(*line.band(steps), strict=True)
    axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0, label="95% interval of the line")


def _point(axis: Axes, row: Mapping[str, Any], style: dict[str, Any]) -> None:
    """Draw a model with its intervals, and how far it is above the line."""
    place = (_inside(row["base"]), _inside(row["shift"]))
    errors = [
        [[abs(_inside(row[f"{key}_interval"][end]) - value)] for end in (0, 1)]
        for key, value in zip(("base", "shift"), place, strict=True)
    ]
    axis.errorbar(*place, xerr=errors[0], yerr=errors[1], capsize=2, zorder=4, **style)
    if row["effective"] is not None:
        text = f"{100 * row['effective']:+.1f}"
        away = (-7, 6) if row["effective"] >= 0 else (7, -12)  # from the line
        side = "right" if row["effective"] >= 0 else "left"
        axis.annotate(text, place, textcoords="offset points", xytext=away, fontsize=8, ha=side, color=style["color"])


def _strengths(axis: Axes, results: Mapping[str, Any], kind: str) -> None:
    """Draw the accuracy of each model over the strength of one synthetic shift, from none on."""
    for number, model in enumerate(results["models"]):
        rows = [row for row in results["synthetic"] if (row["shift"], name_of(row)) == (kind, name_of(model))]
        start = model["robustness"][kind]
        values = [start["base"], *(row["metrics"]["acc1"] for row in rows)]
        ends = [start["base_interval"], *(row["intervals"]["acc1"] for row in rows)]
        low, high = zip(*ends, strict=True)
        style = _style(number, name_of(model), "-")
        axis.plot(range(len(values)), _percent(values), **style)
        axis.fill_between(
            range(len(values)), _percent(low), _percent(high), color=style["color"], alpha=0.2, linewidth=0
        )
    axis.set_title(kind, fontsize=10)
    draw_chance(axis, results["classes"])
    axis.set(xlabel="strength (0: as it is)", ylabel="top-1, %")
    top = max(row["robustness"][kind]["base_interval"][1] for row in results["models"])
    axis.set_ylim(0, min(104, 110 * top))
    axis.grid(alpha=0.3)


def _style(number: int, model: str, line: str) -> dict[str, Any]:
    return {
        "marker": MARKERS[number % len(MARKERS)], "color": f"C{number + 1}", "linestyle": line, "markersize": 6,
        "label": shorten(model, 45, keep_end=True),
    }  # fmt: skip


def examples_sheet(base: LabelledSet, results: Mapping[str, Any], path: Path) -> None:
    """Draw an image of the base for each synthetic shift, as it is and with the five strengths.

    Args:
        base: the set.
        results: as the task writes them; the accuracies of the first model stand over the images.
        path: the file to write.
    """
    first = name_of(results["models"][0])
    rows = [row for row in results["synthetic"] if name_of(row) == first]
    kinds = [kind for kind in SHIFTS if any(row["shift"] == kind for row in rows)]
    places = len(base.places())
    chosen = [round((number + 0.5) * places / len(kinds)) for number in range(len(kinds))]
    images = [found.image for start in chosen if (found := _first_from(base, start, places)) is not None]
    figure = Figure(figsize=(1.75 * (len(STRENGTHS) + 1), 1.95 * len(kinds) + 0.6), layout="constrained")
    model, data = (shorten(name, 40, keep_end=True) for name in (first, results["dataset"]))
    figure.suptitle(f"synthetic shifts, and the top-1 accuracy of {model} on {data}", fontsize=10)
    axes = figure.subplots(len(kinds), len(STRENGTHS) + 1, squeeze=False)
    for kind, image, line in zip(kinds, itertools.cycle(images), axes, strict=False):
        of_kind = {row["strength"]: row for row in rows if row["shift"] == kind}
        shown = [(image, f"as it is: {100 * results['metrics']['acc1']:.1f}%")]
        for strength, row in of_kind.items():
            shown.append(
                (Shift(kind, strength, row["seed"])(image), f"{kind} {strength}: {100 * row['metrics']['acc1']:.1f}%")
            )
        for axis, (picture, title) in zip(line, shown, strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    save_figure(figure, path, dpi=100)


def _first_from(base: LabelledSet, start: int, places: int) -> Any:
    """Return the first usable image at a place or after it; None if there is none."""
    return next(iter(base.only(range(start, places))), None)


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _inside(share: float) -> float:
    return min(1 - LEAST, max(LEAST, share))


def _logit(share: float) -> float:
    inside = _inside(share)
    return math.log(inside / (1 - inside))


def _expit(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def _padded(shares: Sequence[float]) -> tuple[float, float]:
    """Return limits around shares, with a margin on the scale of log-odds."""
    low, high = _logit(min(shares)), _logit(max(shares))
    margin = max(0.25, 0.08 * (high - low))
    return _expit(low - margin), _expit(high + margin)


def _ticks(low: float, high: float) -> list[float]:
    """Return shares to name on a scale from ``low`` to ``high``: some of the usual ones, or else what fits in there."""
    usual = [tick / 100 for tick in TICKS if low <= tick / 100 <= high]
    if len(usual) > 1:
        return usual
    return [tick / 100 for tick in MaxNLocator(5).tick_values(100 * low, 100 * high) if 100 * low <= tick <= 100 * high]

"""The plots of ``clipfast eval robustness``: accuracy under a shift over accuracy on the base, and shifted images."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..io.files import save_figure
from .effective_robustness import AVERAGE, SYNTHETIC, Line, Point, is_usable
from .labelled import LabelledSet
from .pictures import draw_chance, new_figure, shorten
from .shifts import SHIFTS, STRENGTHS, Shift
from .suite import name_of

COLUMNS = 3  # the number of plots beside each other
LEAST = 1e-3  # on the scale of log-odds, accuracies are clipped to the range from LEAST to 1 - LEAST
MARKERS = "osD^vP*X"


def robustness_plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy under each shift over accuracy on the base with the baseline's line, and accuracy over strength."""
    natural = list(dict.fromkeys(row["shift"] for row in results["sets"]))
    synthetic = [SYNTHETIC] if SYNTHETIC in results["baseline"] else []
    sets = [*([AVERAGE] if len(natural) > 1 else []), *natural, *synthetic]
    kinds = list(dict.fromkeys(row["shift"] for row in results["synthetic"]))
    columns = min(COLUMNS, len(sets) + len(kinds))
    rows = math.ceil((len(sets) + len(kinds)) / columns)
    data = shorten(results["dataset"], 50, keep_end=True)
    title = f"base: {data}, {results['classes']:,} classes; chance: {1 / results['classes']:.2%}"
    height = 3.9 * rows + 0.3 * len(results["models"]) + 0.8
    figure = new_figure(max(4.6 * columns, 5.5), height, title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(sets) + len(kinds) :]:
        axis.axis("off")
    for name, axis in zip(sets, axes, strict=False):
        _scatter(axis, results, name)
    for kind, axis in zip(kinds, axes[len(sets) :], strict=False):
        _strengths(axis, results, kind)
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(2, columns), fontsize=9)
    save_figure(figure, path, dpi=110)


def _scatter(axis: Axes, results: Mapping[str, Any], name: str) -> None:
    """Draw a scatter plot of models: accuracy on the base and under one shift, both on the scale of log-odds."""
    points = [Point(row["model"], row["base"], row["shift"]) for row in results["points"] if row["set"] == name]
    found = [model["robustness"][name] for model in results["models"]]
    bases = [math.log(_inside(point.base) / (1 - _inside(point.base))) for point in points]
    low, high = min(bases) - 0.25, max(bases) + 0.25
    steps = [1 / (1 + math.exp(-low - (high - low) * step / 60)) for step in range(61)]
    axis.plot(steps, steps, "--", color="black", linewidth=1, label="ideal robust model: no drop")
    if name in results["baseline"]:
        roles = [row["role"] for row in results["points"] if row["set"] == name]
        theirs = [point for point, role in zip(points, roles, strict=True) if role == "baseline"]
        _baseline(axis, results["baseline"][name], theirs, steps)
    for number, (row, model) in enumerate(zip(found, results["models"], strict=True)):
        _point(axis, row, _style(number, name_of(model), "none"))
    means = {AVERAGE: "average of the shifts", SYNTHETIC: "mean of the synthetic shifts"}
    axis.set_title(means.get(name, name), fontsize=10)
    axis.set(xlabel="top-1 on the base, same classes", ylabel="top-1 on the shifted set")
    axis.set(xscale="logit", yscale="logit")
    axis.grid(alpha=0.3)


def _baseline(axis: Axes, about: Mapping[str, Any], points: Sequence[Point], steps: Sequence[float]) -> None:
    """Draw the baseline models of robustness, the line that was fitted to them, and its interval."""
    line = Line(about["slope"], about["intercept"], tuple(filter(is_usable, points)))
    places = [_inside(point.base) for point in points], [_inside(point.shift) for point in points]
    axis.plot(*places, "o", markersize=4, color="tab:blue", label="baseline", zorder=3)
    axis.plot(steps, [line(step) for step in steps], color="tab:blue", linewidth=1, label="line through the baseline")
    low, high = zip(*line.band(steps), strict=True)
    axis.fill_between(steps, low, high, color="tab:blue", alpha=0.15, linewidth=0, label="95% interval of the line")


def _point(axis: Axes, row: Mapping[str, Any], style: dict[str, Any]) -> None:
    """Draw a model's robustness: its accuracies with intervals, and its distance from the baseline's line."""
    place = _inside(row["base"]), _inside(row["shift"])
    errors = [
        [[abs(_inside(end) - value)] for end in row[f"{key}_interval"]]
        for key, value in zip(("base", "shift"), place, strict=True)
    ]
    axis.errorbar(*place, xerr=errors[0], yerr=errors[1], capsize=2, zorder=4, **style)
    if row["effective"] is not None:
        text = f"{100 * row['effective']:+.1f}"
        axis.annotate(text, place, textcoords="offset points", xytext=(7, 6), fontsize=8, color=style["color"])


def _strengths(axis: Axes, results: Mapping[str, Any], kind: str) -> None:
    """Draw the accuracy of each model over the strength of one synthetic shift, starting with no shift."""
    for number, model in enumerate(results["models"]):
        rows = [row for row in results["synthetic"] if (row["shift"], name_of(row)) == (kind, name_of(model))]
        start = model["robustness"][kind]
        shares = [start["base"], *(row["metrics"]["acc1"] for row in rows)]
        intervals = [start["base_interval"], *(row["intervals"]["acc1"] for row in rows)]
        style = _style(number, name_of(model), "-")
        axis.plot(range(len(shares)), [100 * share for share in shares], **style)
        low, high = ([100 * interval[end] for interval in intervals] for end in (0, 1))
        axis.fill_between(range(len(shares)), low, high, color=style["color"], alpha=0.2, linewidth=0)
    draw_chance(axis, results["classes"])
    axis.set(title=kind, xlabel="strength (0: as it is)", ylabel="top-1, %")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _style(number: int, model: str, line: str) -> dict[str, Any]:
    """Return matplotlib's colour, marker, line style and label of a model in the robustness plots."""
    label, marker = shorten(model, 45, keep_end=True), MARKERS[number % len(MARKERS)]
    return {"marker": marker, "color": f"C{number + 1}", "linestyle": line, "markersize": 6, "label": label}


def examples_sheet(base: LabelledSet, results: Mapping[str, Any], path: Path) -> None:
    """Draw an image of the base for each synthetic shift, first unchanged and then with the five strengths.

    The accuracy of the first model is written above each image.
    """
    first = name_of(results["models"][0])
    accuracies = {
        (row["shift"], row["strength"]): (row["seed"], row["metrics"]["acc1"])
        for row in results["synthetic"]
        if name_of(row) == first
    }
    kinds = [kind for kind in SHIFTS if (kind, 1) in accuracies]
    places = len(base.places())
    starts = [round((number + 0.5) * places / len(kinds)) for number in range(len(kinds))]
    usable = [image.image for start in starts for image in itertools.islice(base.only(range(start, places)), 1)]
    model, data = (shorten(name, 40, keep_end=True) for name in (first, results["dataset"]))
    title = f"synthetic shifts, and the top-1 accuracy of {model} on {data}"
    figure = new_figure(1.75 * (len(STRENGTHS) + 1), 1.95 * len(kinds) + 0.6, title)
    axes = figure.subplots(len(kinds), len(STRENGTHS) + 1, squeeze=False)
    for kind, image, line in zip(kinds, itertools.cycle(usable), axes, strict=False):
        shown = [(image, f"as it is: {results['metrics']['acc1']:.1%}")]
        for strength in STRENGTHS:
            seed, accuracy = accuracies[kind, strength]
            shown.append((Shift(kind, strength, seed)(image), f"{kind} {strength}: {accuracy:.1%}"))
        for axis, (picture, name) in zip(line, shown, strict=True):
            axis.imshow(picture)
            axis.set_title(name, fontsize=9)
            axis.axis("off")
    save_figure(figure, path, dpi=100)


def _inside(share: float) -> float:
    """Clip an accuracy to the range that the scale of log-odds in the robustness plots shows."""
    return min(1 - LEAST, max(LEAST, share))

"""Plots of evaluations and runs: their common style, training runs, contact sheets, and metrics over steps."""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..io.files import save_figure
from ..runs.status import History
from .evaluate import Evaluation
from .labelled import LabelledImage

RIGHT, WRONG, CHANCE = "#1a7f37", "#57606a", "tab:red"
MOST_CURVES = 12  # the legend names single curves only if there are at most this many; otherwise only means
# Each panel in the plot of runs: its title, the key of its metric in ``metrics.jsonl``, and a factor on the metric.
PANELS = (
    ("training loss", "loss", 1.0), ("learning rate", "lr", 1.0), ("logit scale", "logit_scale", 1.0),
    ("pairs per second", "pairs_per_second", 1.0), ("waiting for data, %", "data_wait", 100.0),
)  # fmt: skip
METRICS = (
    ("top-1", "zeroshot-val-top1", "-"), ("ImageNet top-1", "imagenet-zeroshot-val-top1", "--"),
    ("text to image R@1", "text_to_image_R@1", ":"),
)  # fmt: skip
Interval = tuple[float, float]


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Return a matplotlib figure for an evaluation's results, with a title over all its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def title_of(results: Mapping[str, Any]) -> str:
    """Return the title of a plot of an evaluation: the model and the data of its results."""
    return f"{shorten(results['model'], 60)} on {shorten(results['dataset'], 60)}"


def shorten(text: str, length: int, *, keep_end: bool = False) -> str:
    """Shorten a text in a plot of an evaluation to at most ``length`` characters, at its end or its beginning."""
    if len(text) <= length:
        return text
    return "…" + text[1 - length :] if keep_end else text[: length - 1] + "…"


def draw_chance(axis: Axes, classes: int) -> None:
    """Draw the chance accuracy of ``classes`` classes as a line."""
    axis.axhline(100 / classes, linestyle=":", color=CHANCE, label=f"chance: {100 / classes:.2g}%")


def error_bars(shares: Sequence[float], intervals: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """Return the lengths of error bars around accuracies, in percent, as matplotlib takes them."""
    # A bootstrap interval may not contain the measured value, and matplotlib takes no error bars of negative length.
    below = [100 * max(0.0, share - low) for share, (low, _) in zip(shares, intervals, strict=True)]
    above = [100 * max(0.0, high - share) for share, (_, high) in zip(shares, intervals, strict=True)]
    return below, above


def bars(
    axis: Axes, names: Sequence[str], series: Mapping[str, Sequence[tuple[float, Interval]]],
    chances: Mapping[str, Sequence[float]] | None = None,
) -> None:  # fmt: skip
    """Draw accuracies or recalls of an evaluation as grouped bars with their intervals.

    Args:
        axis: the axes to draw on.
        names: the names of the groups.
        series: for each kind of bar, a share and its interval for each group.
        chances: for each kind of bar, the share by chance for each group.
    """
    width = 0.8 / len(series)
    for number, (label, found) in enumerate(series.items()):
        places = [place + width * (number + 0.5) - 0.4 for place in range(len(names))]
        shares, intervals = zip(*found, strict=True)
        heights = [100 * share for share in shares]
        drawn = axis.bar(places, heights, 0.95 * width, label=label)
        behind = {"color": "white", "alpha": 0.8, "pad": 1}
        axis.bar_label(drawn, fmt="%.1f", label_type="center", fontsize=8, bbox=behind, zorder=5)
        axis.errorbar(places, heights, error_bars(shares, intervals), fmt="none", color="black", capsize=3)
        if chances:
            levels = [100 * share for share in chances[label]]
            ends = [place - width / 2 for place in places], [place + width / 2 for place in places]
            axis.hlines(levels, *ends, CHANCE, ":", label="" if number else "chance")
    rotation = 30 if max(map(len, names)) > 10 else 0
    axis.set_xticks(range(len(names)), names, rotation=rotation, ha="right" if rotation else "center", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, loc="upper right")


def steps_plot(points: Sequence[tuple[int, Mapping[str, float]]], title: str, path: Path) -> None:
    """Plot the metrics of a run's checkpoints (``clipfast eval ... --watch``) over the steps of training.

    Args:
        points: pairs of a step and the metrics after that step by name, from 0 to 1; in any order.
        title: the title of the picture.
        path: the file to write.
    """
    figure = new_figure(8, 5, shorten(title, 90))
    axis = figure.subplots()
    names = list(dict.fromkeys(name for _, found in points for name in found))
    for name in names:
        steps, values = zip(*sorted((step, 100 * found[name]) for step, found in points if name in found), strict=True)
        is_mean = name.startswith("mean")
        label = f"{shorten(name, 50)}: {values[-1]:.1f}%" if is_mean or len(names) <= MOST_CURVES else None
        axis.plot(steps, values, "o-", linewidth=2.5 if is_mean else 1, markersize=4, label=label)
    axis.set(xlabel="step", ylabel="%")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path)


def plot_runs(histories: Sequence[History], path: Path) -> None:
    """Plot loss, learning rate, logit scale, speed, data waits and evaluations of training runs over the steps."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (title, key, factor) in zip(axes, PANELS, strict=False):
        for number, history in enumerate(histories):
            _curve(
                axis, [(line["step"], factor * line[key]) for line in history.lines if key in line], f"C{number % 10}"
            )
        axis.set_title(title, fontsize=11)
        if key not in ("loss", "logit_scale"):
            axis.set_ylim(bottom=0)
    _evaluations(axes[len(PANELS)], histories)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.margins(x=0.02)
    names = [history.folder.path.name for history in histories]
    if len(names) == 1:
        figure.suptitle(names[0], parse_math=False)  # a name may have dollar signs
    else:
        lines = [axes[0].plot([], [], color=f"C{number % 10}")[0] for number in range(len(names))]
        legend = figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    save_figure(figure, path)


def _curve(axis: Axes, points: Sequence[tuple[int, float]], colour: str, **style: Any) -> None:
    """Draw a curve in the plot of training runs; a single point, invisible as a line, gets a marker."""
    if points:
        marker = {"marker": "o"} if len(points) == 1 else {}
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, **marker | style)


def _evaluations(axis: Axes, histories: Sequence[History]) -> None:
    """Draw accuracies and recall of the runs' evaluations in the plot of training runs."""
    for number, history in enumerate(histories):
        for place, (name, key, style) in enumerate(METRICS):
            found = [
                (line["step"], 100 * line["metrics"][key]) for line in history.evaluations if key in line["metrics"]
            ]
            is_alone = len(histories) == 1
            label = f"{name}: {found[-1][1]:.1f}%" if is_alone and found else name if number == 0 else None
            colour = f"C{place if is_alone else number % 10}"
            _curve(axis, found, colour, linestyle=style, marker="o", markersize=4, label=label)
    axis.set_title("evaluations, %", fontsize=11)
    axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, frameon=False)


def contact_sheet(images: Iterable[LabelledImage], evaluation: Evaluation, path: Path) -> None:
    """Draw some labelled images, each with the five captions that the model ranks highest; right ones are marked."""
    rows, columns, total = 6, 4, len(evaluation.predictions)
    chosen = set(random.Random(0).sample(range(total), min(rows * columns, total)))
    shown = [(index, item) for index, item in enumerate(images) if index in chosen]
    results = evaluation.results
    title = (
        f"{len(shown)} of {total} validation images with their five best captions of {results['classes']}; "
        f"right ones in bold green\noverall top-1 {results['zero_shot']['top1']:.1%}, "
        f"top-5 {results['zero_shot']['top5']:.1%}"
    )
    figure = new_figure(4.1 * columns, 1.55 * rows + 0.7, title)
    axes = figure.subplots(rows, 2 * columns, width_ratios=(1, 2.1) * columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, (index, item) in enumerate(shown):
        picture, text = axes.flat[2 * place], axes.flat[2 * place + 1]
        picture.imshow(item.image)
        picture.set_title(shorten(item.label, 18), fontsize=8)
        for k, (caption, right) in enumerate(zip(evaluation.predictions[index], evaluation.right[index], strict=True)):
            label = f"{'✓' if right else k + 1} {shorten(caption, 30)}"
            color, weight = (RIGHT, "bold") if right else (WRONG, "normal")
            text.text(0, 0.92 - 0.2 * k, label, fontsize=8.5, va="top", color=color, weight=weight)
    save_figure(figure, path, dpi=110)


def interpolation_plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot zero-shot accuracy of interpolated models over alpha, and over accuracy on the first of several sets.

    Args:
        rows: as :func:`~clipfast.evaluate.interpolation.evaluate_path` yields them.
        title: the title of the picture.
        path: the file to write.
    """
    alphas, sets = [row["alpha"] for row in rows], rows[0]["results"]
    top1 = {name: [100 * row["results"][name]["zero_shot"]["top1"] for row in rows] for name in sets}
    (first, x), *others = top1.items()
    figure = new_figure(11 if others else 6, 4.5, title)
    axes = figure.subplots(1, 2 if others else 1, squeeze=False)[0]
    for name, y in top1.items():
        axes[0].plot(alphas, y, marker="o", label=shorten(name, 40))
    for classes in sorted({found["classes"] for found in sets.values()}):
        draw_chance(axes[0], classes)
    axes[0].set(xlabel="alpha", ylabel="zero-shot top-1, %")
    for number, (name, y) in enumerate(others, 1):
        axes[1].plot(x, y, marker="o", color=f"C{number}", label=shorten(name, 40))
        axes[1].set(xlabel=f"top-1 on {shorten(first, 40)}, %", ylabel="top-1 on the others, %")
    for alpha, *place in zip(alphas, x, others[0][1], strict=True) if others else ():
        axes[1].annotate(f"{alpha:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=8)
    for axis in axes:
        axis.legend()
    save_figure(figure, path)

"""The curves of one or several runs over their steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import save_figure
from .history import History

# Title of a panel, the figure of a line that it shows, and a factor on it.
PANELS = (
    ("training loss", "loss", 1.0), ("learning rate", "lr", 1.0), ("logit scale", "logit_scale", 1.0),
    ("pairs per second", "pairs_per_second", 1.0), ("waiting for data, %", "data_wait", 100.0),
)  # fmt: skip
METRICS = (
    ("top-1", "zeroshot-val-top1", "-"), ("ImageNet top-1", "imagenet-zeroshot-val-top1", "--"),
    ("text to image R@1", "text_to_image_R@1", ":"),
)  # fmt: skip


def plot_runs(histories: Sequence[History], path: Path) -> None:
    """Draw loss, learning rate, logit scale, speed, waiting and evaluations of runs over each other.

    Args:
        histories: of the runs.
        path: the file to write, whose suffix says in which format.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (title, key, factor) in zip(axes, PANELS, strict=False):
        _curves(axis, histories, key, factor)
        axis.set_title(title, fontsize=11)
        if key not in ("loss", "logit_scale"):
            axis.set_ylim(bottom=0)
    _evaluations(axes[len(PANELS)], histories)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.margins(x=0.02)
        axis.spines[["top", "right"]].set_visible(False)
    names = [history.folder.path.name for history in histories]
    if len(histories) == 1:
        figure.suptitle(names[0])
    else:
        lines = [axes[0].plot([], [], color=_colour(number))[0] for number in range(len(names))]
        figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
    save_figure(figure, path)


def _curves(axis: Axes, histories: Sequence[History], key: str, factor: float) -> None:
    for number, history in enumerate(histories):
        found = [(line["step"], factor * line[key]) for line in history.lines if key in line]
        # A single point would be an invisible line.
        style: dict[str, Any] = {"marker": "o"} if len(found) == 1 else {}
        if found:
            axis.plot(*zip(*found, strict=True), color=_colour(number), linewidth=1.4, **style)


def _evaluations(axis: Axes, histories: Sequence[History]) -> None:
    for number, history in enumerate(histories):
        for place, (name, key, style) in enumerate(METRICS):
            found = [
                (line["step"], 100 * line["metrics"][key]) for line in history.evaluations if key in line["metrics"]
            ]
            if found:
                label = f"{name}: {found[-1][1]:.1f}%" if len(histories) == 1 else name if number == 0 else None
                axis.plot(
                    *zip(*found, strict=True),
                    style,
                    marker="o",
                    markersize=4,
                    color=_colour(number if len(histories) > 1 else place),
                    label=label,
                )
    axis.set_title("evaluations, %", fontsize=11)
    axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, frameon=False)


def _colour(number: int) -> str:
    return f"C{number % 10}"

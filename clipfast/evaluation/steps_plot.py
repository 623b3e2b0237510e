"""The picture of a watched run: its figures over the steps of training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import save_figure
from .pictures import shorten

MOST = 12  # figures that are named
BOLD = "mean"  # how the names of figures begin that stand for several


def steps_plot(points: Sequence[tuple[int, Mapping[str, float]]], title: str, path: Path) -> None:
    """Draw shares over steps; of a file that somebody looks at, no half is ever there.

    Args:
        points: steps, in any order, and the shares after each, by name.
        title: of the picture.
        path: the file to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(name for _, found in points for name in found))
    for name in names:
        drawn = sorted((step, 100 * found[name]) for step, found in points if name in found)
        width, is_named = (2.5 if name.startswith(BOLD) else 1, len(names) <= MOST or name.startswith(BOLD))
        label = f"{shorten(name, 50)}: {drawn[-1][1]:.1f}%" if is_named else None
        axis.plot(*zip(*drawn, strict=True), "o-", linewidth=width, markersize=2 + width, label=label)
    axis.set(xlabel="step", ylabel="%")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(shorten(title, 90), fontsize=10)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path)

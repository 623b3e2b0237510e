"""The picture of how shares differ between groups."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def bias_plot(results: dict[str, Any], path: Path) -> None:
    """Plot accuracy, and below it the share of each category of added labels, by group; one column for each key.

    Args:
        results: as ``clipfast eval bias`` writes them.
        path: the file to write.
    """
    keys = results["by_key"]
    rows = 2 if results["added_labels"] else 1
    width = max(4.0, 0.5 * max(len(figures["images"]) for figures in keys.values()) + 2)
    figure = Figure(figsize=(min(40.0, width * len(keys)), 3.6 * rows + 0.6), layout="constrained")
    title = f"{results['model']} on {results['data']}"
    figure.suptitle(title if len(title) <= 80 else title[:79] + "…", fontsize=9)
    axes = figure.subplots(rows, len(keys), squeeze=False)
    for column, (key, figures) in enumerate(keys.items()):
        names = [_label(name, figures) for name in figures["images"]]
        _bars(axes[0, column], {"acc1": figures["acc1"]}, names)
        axes[0, column].set(title=f"by {key}", ylabel="accuracy, %, with 95% intervals")
        if rows == 2:
            _bars(axes[1, column], figures["categories"], names)
            axes[1, column].set(ylabel="images with a label of the category, %")
            axes[1, column].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _label(name: str, figures: dict[str, Any]) -> str:
    small = " *" if name in figures["not_compared"] else ""
    return f"{name if len(name) <= 24 else name[:23] + '…'} ({figures['images'][name]:,}){small}"


def _bars(axis: Any, series: dict[str, Any], names: list[str]) -> None:
    for number, (label, found) in enumerate(series.items()):
        rows = found["groups"].values()
        shares = [100 * row["share"] for row in rows]
        ends = [
            [max(0.0, share - 100 * row["interval"][0]), max(0.0, 100 * row["interval"][1] - share)]
            for share, row in zip(shares, rows, strict=True)
        ]
        places = [place + 0.8 * (number + 0.5) / len(series) - 0.4 for place in range(len(names))]
        axis.bar(places, shares, 0.75 / len(series), label=label)
        axis.errorbar(places, shares, list(zip(*ends, strict=True)), fmt="none", color="black", capsize=2)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axis.set_ylim(bottom=0)

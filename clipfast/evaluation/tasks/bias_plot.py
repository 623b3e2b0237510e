"""The picture of how shares and search results differ between groups."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...files import save_figure
from ..pictures import draw_chance, error_bars, shorten

LONGEST = 28  # characters of a name at an axis


def bias_plot(results: dict[str, Any], path: Path) -> None:
    """Plot for each key accuracy by group, the share of each category of added labels, and the skew of queries.

    Args:
        results: as ``clipfast eval bias`` writes them.
        path: the file to write.
    """
    keys = results["by_key"]
    has_queries = any("retrieval" in figures for figures in keys.values())
    columns = 1 + bool(results["added_labels"]) + has_queries
    figure = Figure(figsize=(5.2 * columns, 4.2 * len(keys) + 0.4), layout="constrained")
    figure.suptitle(shorten(f"{results['model']} on {results['data']}", 80), fontsize=9)
    for row, (key, figures) in zip(figure.subplots(len(keys), columns, squeeze=False), keys.items(), strict=True):
        names = [_label(name, figures) for name in figures["images"]]
        _bars(row[0], {"acc1": figures["acc1"]}, names)
        draw_chance(row[0], results["classes"])
        row[0].legend(fontsize=8)
        row[0].set(title=f"by {key}", ylabel="accuracy, %, with 95% intervals")
        if results["added_labels"]:
            _bars(row[1], figures["categories"], names)
            row[1].set(ylabel="images with a label of the category, %")
            row[1].legend(fontsize=8)
        if has_queries:
            _skews(row[-1], figures["retrieval"][-1])
    save_figure(figure, path)


def _label(name: str, figures: dict[str, Any]) -> str:
    small = ", not compared" if name in figures["not_compared"] else ""
    return f"{shorten(name, LONGEST)} ({figures['images'][name]:,}{small})"


def _bars(axis: Any, series: dict[str, Any], names: list[str]) -> None:
    for number, (label, found) in enumerate(series.items()):
        rows = found["groups"].values()
        shares = [100 * row["share"] for row in rows]
        ends = error_bars([row["share"] for row in rows], [row["interval"] for row in rows])
        places = [place + 0.8 * (number + 0.5) / len(series) - 0.4 for place in range(len(names))]
        axis.bar(places, shares, 0.75 / len(series), label=label)
        axis.errorbar(places, shares, ends, fmt="none", color="black", capsize=2)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_ylim(bottom=0)


def _skews(axis: Any, found: dict[str, Any], most: int = 20) -> None:
    rows = sorted(found["queries"], key=lambda row: row["max_skew"])[-most:]
    names = [f"{shorten(row['query'], LONGEST)}: {shorten(row['max_skew_group'], 16)}" for row in rows]
    axis.barh(range(len(rows)), [row["max_skew"] for row in rows], color="tab:purple")
    axis.axvline(found["max_skew_by_chance"], linestyle="--", color="black", label="mean by chance")
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_xlabel(f"MaxSkew@{found['k']}, and whose it is")
    axis.legend(fontsize=8, loc="lower right")

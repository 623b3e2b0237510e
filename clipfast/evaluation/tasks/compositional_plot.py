"""The picture of ``clipfast eval compositional``: a bar for each group, beside chance."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...files import save_figure
from ..pictures import error_bars, shorten
from .compositional_scores import MEAN

MOST = 30  # bars of a division; of more, those of the largest groups are drawn


def groups_plot(results: dict[str, Any], path: Path) -> None:
    """Plot the accuracy of each group with its interval, and the accuracy by chance as a line.

    Args:
        results: as ``clipfast eval compositional`` writes them.
        path: the file to write.
    """
    divisions = {name: _largest(groups) for name, groups in results["groups"].items()} or {"": {"all cases": results}}
    counts = [len(groups) for groups in divisions.values()]
    figure = Figure(figsize=(max(6.0, 2 + 0.95 * sum(counts)), 4.6), layout="constrained")
    title = f"{shorten(results['model'], 60)} on {shorten(results['data'], 60)}: {results['cases']:,} cases"
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, len(divisions), width_ratios=counts, squeeze=False, sharey=True)[0]
    names = [name for name in results["metrics"] if name != MEAN]
    for axis, (division, groups) in zip(axes, divisions.items(), strict=True):
        for number, name in enumerate(names):
            width = 0.8 / len(names)
            places = [place + width * (number + 0.5) - 0.4 for place in range(len(groups))]
            shares, intervals = ([found[kind][name] for found in groups.values()] for kind in ("metrics", "intervals"))
            values, ends = [100 * share for share in shares], error_bars(shares, intervals)
            axis.bar(places, values, 0.95 * width, color=f"C{number}", label=name)
            axis.errorbar(places, values, ends, fmt="none", color="black", capsize=3)
            for place, value in zip(places, values, strict=True):
                axis.text(place, 2, f"{value:.1f}", ha="center", color="white" if value > 8 else "black", fontsize=9)
            chances = [100 * found["chance"][name] for found in groups.values()]
            label = "chance" if number == 0 else None
            axis.hlines(
                chances, [x - width / 2 for x in places], [x + width / 2 for x in places], "tab:red", "--", label=label
            )
        axis.set_xticks(
            range(len(groups)), [shorten(name, 30) for name in groups], rotation=30 if max(map(len, groups)) > 8 else 0
        )
        axis.set_xlabel(division)
    axes[0].set(ylabel="right, %, with 95% intervals", ylim=(0, 104))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names) + 1)
    save_figure(figure, path)


def _largest(groups: dict[str, Any]) -> dict[str, Any]:
    names = sorted(groups, key=lambda name: groups[name]["cases"], reverse=True)[:MOST]
    return {name: groups[name] for name in groups if name in names}

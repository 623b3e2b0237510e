"""The picture of few-shot curves, in kind figure 6 of Radford et al. 2021."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...files import save_figure
from ..pictures import draw_chance


def few_shot_plot(results: dict[str, Any], path: Path) -> None:
    """Plot accuracy over the number of training images per class, with zero-shot as a line.

    Args:
        results: as ``clipfast eval probe --shots`` writes them.
        path: the file to write.
    """
    curve = results["few_shot"]
    places = range(1, len(curve) + 1)
    means = [100 * found["acc1"]["mean"] for found in curve]
    spreads = [100 * (found["acc1"]["std"] or 0) for found in curve]
    zero_shot, full = 100 * results["zero_shot"]["metrics"]["acc1"], 100 * results["metrics"]["lp_acc1"]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(zero_shot, linestyle="--", color="tab:red", linewidth=1)
    axis.plot(0, zero_shot, "*", markersize=14, color="tab:red", label=f"zero-shot: {zero_shot:.1f}%")
    seeds = len(curve[0]["draws"])
    label = f"linear probe, mean and standard deviation of {seeds} draws" if seeds > 1 else "linear probe, one draw"
    axis.errorbar(places, means, yerr=spreads, marker="o", capsize=3, color="tab:blue", label=label)
    for place, found in zip(places, curve, strict=True):
        values = [100 * draw["acc1"] for draw in found["draws"]]
        axis.plot([place] * len(values), values, ".", color="tab:blue", alpha=0.4)
    axis.plot(len(curve) + 1, full, "s", color="tab:green", label=f"linear probe, all images: {full:.1f}%")
    axis.set_xticks(range(len(curve) + 2), ["0", *(str(found["fewshot_k"]) for found in curve), "all"])
    axis.set(xlabel="labelled training images per class", ylabel="test accuracy, %")
    axis.set_ylim(bottom=0)
    draw_chance(axis, results["classes"])
    axis.set_title(f"{results['model']}: {results['classes']} classes, test on {results['dataset']}", fontsize=9)
    figure.legend(loc="outside lower center")
    save_figure(figure, path)

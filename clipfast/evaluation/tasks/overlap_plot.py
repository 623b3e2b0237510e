"""The picture of what test and training data share, in kind figure 17 of Radford et al. 2021."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...files import save_figure
from ..pictures import draw_chance, error_bars, shorten
from .overlap_pairs import LEVEL, Pairs

BINS = 60
COLOURS = {"acc1": "tab:blue", "acc1_overlap": "tab:red", "acc1_clean": "tab:green"}


def overlap_plot(results: dict[str, Any], pairs: Pairs, path: Path) -> None:
    """Plot how similar test images are to training images, and the accuracy on near duplicates and others.

    Args:
        results: as ``clipfast eval overlap`` writes them.
        pairs: the similarities.
        path: the file to write.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    title = f"{results['model']}: {results['data']} against {results['train_data']}"
    figure.suptitle(shorten(title, 130), fontsize=9)
    similarities, accuracy = figure.subplots(1, 2, width_ratios=(3, 2))
    similarities.hist(pairs.similarity.tolist(), bins=BINS, color="tab:blue", log=True)
    threshold, share = results["threshold"], results["metrics"]["overlap"]
    similarities.axvline(threshold, linestyle="--", color="tab:red")
    similarities.set_title(f"{share:.1%} of test images at the threshold of {threshold:g} or above", fontsize=9)
    by = {"model": "features", "pixels": "pixels"}[results["by"]]
    similarities.set(xlabel=f"similarity to the nearest training image, by {by}", ylabel="test images")
    names = [name for name in COLOURS if results["metrics"][name] is not None]
    for place, name in enumerate(names):
        value = 100 * results["metrics"][name]
        ends = error_bars([results["metrics"][name]], [results["intervals"][name]])
        accuracy.errorbar(place, value, ends, fmt="o", capsize=4, color=COLOURS[name])
        accuracy.annotate(f"{value:.1f}", (place, value), textcoords="offset points", xytext=(8, -3), fontsize=9)
    counts = {"acc1": "all", "acc1_overlap": "overlap", "acc1_clean": "clean"}
    labels = [f"{counts[name]}\n{results['images'][counts[name]]:,} images" for name in names]
    accuracy.set_xticks(range(len(names)), labels)
    accuracy.set(ylabel=f"zero-shot accuracy, %\nintervals of 95%, overlap {LEVEL:.1%}", xlim=(-0.5, len(names) - 0.3))
    accuracy.set_ylim(bottom=0)
    draw_chance(accuracy, results["classes"])
    accuracy.legend(fontsize=9)
    save_figure(figure, path)

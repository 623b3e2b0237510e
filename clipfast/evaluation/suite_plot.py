"""The picture of a suite: the chief figures of each set by each model, with their intervals."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import save_figure
from .pictures import error_bars, shorten
from .suite import label


def suite_figure(results: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """Return the picture.

    Args:
        results: of ``clipfast eval suite``.
        rows: of its table.
    """
    models = [label(model["model"], model["pretrained"]) for model in results["models"]]
    count = max(1, len(rows))
    figure = Figure(figsize=(8.5, 1.6 + 0.22 * count * (1 + 0.4 * len(models))), layout="constrained")
    axis = figure.subplots()
    for number, model in enumerate(models):
        shift = 0.7 * ((number + 0.5) / len(models) - 0.5)
        drawn = [(place + shift, *row["values"][number]) for place, row in enumerate(rows) if row["values"][number]]
        ends = error_bars([value for _, value, _ in drawn], [interval for *_, interval in drawn])
        axis.errorbar(
            [100 * value for _, value, _ in drawn], [place for place, _, _ in drawn],
            xerr=ends, fmt="o", markersize=5, capsize=2, linewidth=1, label=shorten(model, 60),
        )  # fmt: skip
    names = [f"{shorten(row['set'], 40)}: {row['metric'].replace('_', ' ')}" for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set(xlabel="%, with 95% intervals", xlim=(0, 100), ylim=(count - 0.5, -0.5))
    axis.grid(axis="x", alpha=0.3)
    for place in range(1, len(rows)):
        axis.axhline(place - 0.5, color="black", alpha=0.1, linewidth=0.6)
    figure.legend(loc="outside lower center")
    return figure


def suite_plot(results: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the picture to a file; arguments as for :func:`suite_figure`."""
    save_figure(suite_figure(results, rows), path)

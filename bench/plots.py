"""The bar chart of predicted training steps: the time of each step by category."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import categories

# Matrix products are green; work that a better implementation could avoid is grey.
COLOURS = {
    categories.GEMM: "#0b6e4f", categories.CONVOLUTION: "#5aa17f", categories.ATTENTION: "#2c7fb8",
    categories.NORM: "#7fcdbb", categories.INPUT: "#c7a252", categories.LOSS: "#d95f0e",
    categories.OPTIMIZER: "#8856a7", categories.COPIES: "#fdbe85", categories.OTHER: "#e7298a",
    categories.DATA: "#969696", categories.HOST: "#d9d9d9",
}  # fmt: skip


def draw_steps(record: dict[str, Any], path: Path) -> None:
    """Draw the time of predicted training steps by category into a file.

    ``record`` is the JSON of ``clipfast inspect --predict``. Each step is a horizontal bar of its categories, followed
    by its rate. Categories that no step has are left out of the legend.
    """
    steps = [one for one in record["forecasts"] if one["name"] == "step"]
    used = [name for name in COLOURS if any(one["shares"].get(name) for one in steps)]
    height = 1.4 + 0.45 * len(steps)
    figure = Figure(figsize=(9, height))
    axes = figure.subplots()
    left = [0.0] * len(steps)
    for name in used:
        widths = [100 * one["shares"].get(name, 0.0) / one["seconds"] for one in steps]
        axes.barh(range(len(steps)), widths, left=left, color=COLOURS[name], label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (end, one) in enumerate(zip(left, steps, strict=True)):
        axes.text(end, row, f" {one['items_per_s']:,.0f} pairs/s", va="center", fontsize=8)
    names = [f"{one['shape']['model']}, {one['shape']['batch']} pairs" for one in steps]
    axes.set_yticks(range(len(steps)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 118)
    axes.set_xlabel("% of the GPU's time of a training step, predicted; pairs/s count the host too")
    axes.legend(
        fontsize=8, frameon=False, ncols=min(len(used), 6), loc="upper center", bbox_to_anchor=(0.5, -0.6 / height)
    )
    axes.set_title(f"{record['card']}, Triton {record['triton']}", fontsize=10)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})

"""Print the table of docs/plan.md: ``python -m clipfast.plan.page``."""

from collections.abc import Sequence
from typing import Any

from ..kernels.hardware import CARDS, Cluster
from .fit import MODELS, Assumptions, combinations, fit
from .setup import Setup
from .training_command import fit_cells

HEADS = ["model", "parallel", "checkpointing", "pairs a GPU", "global batch", "memory", "step", "pairs/s", "MFU"]


def table_rows(models: Sequence[str]) -> list[str]:
    """Return the rows of ``models``, as lines of Markdown."""
    cluster = Cluster(CARDS["h100"])
    return [line(row) for row in fit(combinations(Setup("", 8), list(models), None, None), cluster, Assumptions())]


def line(row: dict[str, Any]) -> str:
    """Return a row of what fits as a line of Markdown."""
    name, *cells = fit_cells(row)
    return "| " + " | ".join([name + " *" * row["is_best"], *cells]) + " |"


if __name__ == "__main__":
    print("\n".join(["| " + " | ".join(HEADS) + " |", "| " + " | ".join(["---"] * len(HEADS)) + " |"]))
    print("\n".join(table_rows(MODELS)))

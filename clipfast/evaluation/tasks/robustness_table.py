"""The results of ``clipfast eval robustness`` as a table."""

from collections.abc import Mapping
from typing import Any

from ...columns import align
from ..intervals import percent
from ..suite import label

HEAD = ("shift", "classes", "base", "shifted", "relative drop", "expected", "effective robustness")


def table(results: Mapping[str, Any]) -> str:
    """Return the results for people: a table of shifts for each model, and one of the strengths of synthetic ones.

    Args:
        results: as the task writes them.
    """
    parts = [f"{results['images']:,} images of the base, {results['classes']:,} classes; 95% intervals in brackets"]
    classes = {(name_of(row), row["shift"]): f"{row['classes']:,}" for row in results["sets"]}
    for model in results["models"]:
        name = name_of(model)
        rows: list[list[str]] = [list(HEAD)]
        for shift, found in model["robustness"].items():
            base, shifted = (percent(found[key], found[f"{key}_interval"]) for key in ("base", "shift"))
            expected = "-" if found["expected"] is None else f"{found['expected']:.1%}"
            row = [shift, classes.get((name, shift), ""), base, shifted, _signed(found["relative_drop"], "{:.1%}")]
            rows.append([*row, expected, _signed(found["effective"], "{:+.1%}")])
        parts.append(f"{name}\n{align(rows, right=(1, 4, 5, 6))}")
        parts += _strengths(results, name)
    return "\n\n".join(parts)


def name_of(row: Mapping[str, Any]) -> str:
    """Return what the model of a row is called in tables and pictures."""
    return label(row["model"], row["pretrained"])


def _signed(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _strengths(results: Mapping[str, Any], model: str) -> list[str]:
    """Return the accuracy of a model by strength; nothing without synthetic shifts."""
    found: dict[str, list[str]] = {}
    for row in results["synthetic"]:
        if name_of(row) == model:
            found.setdefault(row["shift"], []).append(f"{row['metrics']['acc1']:.1%}")
    if not found:
        return []
    rows = [["strength", *map(str, range(1, 6))], *([name, *shares] for name, shares in found.items())]
    return [align(rows, right=range(1, 6))]

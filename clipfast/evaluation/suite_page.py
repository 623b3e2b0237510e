"""The page of a suite: every figure of every set by every model, in a table that can be sorted."""

import base64
import html
import io
from typing import Any

from ..page import Cell, table
from .intervals import percent
from .suite import label

# Sorts a table by the column whose head is pressed, numbers by value; pressed again, the other way round.
SORT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const key = row => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
  const compare = (x, y) => isNaN(x - y) ? x.localeCompare(y) : x - y;
  const up = head.ariaSort === "descending" || head.ariaSort === null ? 1 : -1;
  head.ariaSort = up === 1 ? "ascending" : "descending";
  body.append(...[...body.rows].sort((a, b) => up * compare(key(a), key(b))));
};
"""


def suite_page(results: dict[str, Any], chief: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Return the body of the page.

    Args:
        results: of ``clipfast eval suite``.
        chief: the rows of its table, which are drawn.
        rows: those of all figures.
    """
    names = [label(model["model"], model["pretrained"]) for model in results["models"]]
    parts = [f"<h1>{html.escape(', '.join(names))} on {html.escape(results['root'])}</h1>"]
    parts.append(f"<p>Split {html.escape(results['split'])}. 95% intervals in brackets. A head sorts its column.</p>")
    for problem in results["problems"]:
        parts.append(f"<p>Left out {html.escape(problem['name'])}: {html.escape(problem['reason'])}</p>")
    means = [
        ["", mean["task"], f"mean of {mean['sets']}", mean["metric"], *(f"{value:.1%}" for value in mean["values"])]
        for mean in results["means"]
    ]
    heads = ["set", "task", "images", "metric", *names]
    parts.append(table(map(_cells, rows), heads, means))
    if chief:
        parts.append(_picture(results, chief))
    if results["missing"]:
        missing = html.escape(", ".join(results["missing"]))
        parts.append(f"<h2>{len(results['missing'])} sets are not there</h2>\n<p>{missing}</p>")
    return "\n".join(parts)


def _cells(row: dict[str, Any]) -> list[Cell]:
    values: list[Cell] = [
        ("-", -1.0) if value is None or value[0] is None else (percent(*value), value[0]) for value in row["values"]
    ]
    return [row["set"], row["task"], (f"{row['images']:,}", row["images"]), row["metric"], *values]


def _picture(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    from .suite_plot import suite_figure

    stream = io.BytesIO()
    suite_figure(results, rows).savefig(stream, format="svg")
    address = f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f'<img class="picture" src="{address}" alt="the chief figures of each set with their intervals">'

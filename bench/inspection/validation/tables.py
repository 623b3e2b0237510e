"""Tables of the validation: on the terminal, and between two marks in a document."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import bands, sources

BEGIN, END = "<!-- validation: begin, written by the command -->", "<!-- validation: end -->"


def errors_of(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the errors by kind of kernel; if several versions of Triton compile a kernel, the newest one counts."""
    pairs = []
    for one in results:
        if predicted := one["predicted_ms"]:
            pairs.append((one["kind"], math.log(predicted[max(predicted, key=_number)] / one["published_ms"])))
    return {kind: dataclasses.asdict(band) for kind, band in bands(pairs).items()}


def summary(errors: Mapping[str, Mapping[str, float]]) -> str:
    """Return the validation's errors by kind of kernel as a table."""
    head = ["kind", "figures", "predicted / published, mean", "median", "four in five", "median error"]
    head += ["nine in ten within", "worst"]
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for kind, band in sorted(errors.items(), key=lambda item: (item[0] == "all", item[0])):
        off = [f"{math.exp(band[name]) - 1:.0%}" for name in ("median", "p90", "worst")]
        mean, median, low, high = (f"{math.exp(band[name]):.2f}" for name in ("bias", "middle", "low", "high"))
        found = [kind, str(band["points"]), mean, median, f"{low} to {high}", *off]
        lines.append(f"| {' | '.join(found)} |")
    return "\n".join(lines)


def summaries(results: Sequence[Mapping[str, Any]]) -> str:
    """Return two tables of errors: of all figures, and of those that were not known when constants were chosen."""
    others = [one for one in results if not one["in_view"]]
    title = f"Without the {len(results) - len(others)} figures that were in view (marked * below):"
    return "\n\n".join([summary(errors_of(results)), title, summary(errors_of(others))])


def write(document: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the tables of the validation between the two marks of a document.

    Raises:
        ValueError: the document has no marks.
    """
    text = document.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{document} has no place for the table: it needs the lines {BEGIN!r} and {END!r}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    known, order = sources(), list(dict.fromkeys(one["source"] for one in results))
    notes = [
        f"{number}. [{known[key]['title']}]({known[key]['url']}). Card: {known[key]['card']}. "
        f"Versions: {known[key]['versions']}. Timed: {known[key]['timed']}."
        for number, key in enumerate(order, 1)
    ]
    parts = [summaries(results), _figures(results, order), "\n".join(notes)]
    document.write_text("\n\n".join([before + BEGIN, *parts, END]) + after)


def _figures(results: Sequence[Mapping[str, Any]], order: Sequence[str]) -> str:
    """Return the validation's table of all figures as Markdown."""
    versions = sorted({version for one in results for version in one["predicted_ms"]}, key=_number, reverse=True)
    ratios = " | ".join(f"ratio, Triton {version}" for version in versions)
    lines = [f"| kind | kernel and case | source | published, ms | {ratios} | limit |"]
    lines.append("| --- " * (5 + len(versions)) + "|")
    for one in results:
        if one["published_ms"] is None:
            continue
        found = [one["predicted_ms"].get(version) for version in versions]
        cells = [f"{predicted / one['published_ms']:.2f}" if predicted else "" for predicted in found]
        limit = next((one["limit"][version] for version in versions if version in one["predicted_ms"]), "")
        name = one["name"] if one["machine"] == "H100" else f"{one['name']} ({one['machine']})"
        name += " *" if one["in_view"] else ""
        published, source = f"{one['published_ms']:.4g}", f"[{order.index(one['source']) + 1}]"
        lines.append(f"| {' | '.join([one['kind'], name, source, published, *cells, limit])} |")
    return "\n".join(lines)


def _number(version: str) -> tuple[int, ...]:
    """Return a version of Triton as numbers, for which 3.10 comes after 3.9."""
    return tuple(map(int, version.split(".")))

"""The page of ``clipfast eval zeroshot``: the figures, and images of the worst classes."""

import html
from collections.abc import Iterable
from typing import Any

from ..page import figure, table, thumbnail
from .classification import Classified
from .features import LabelledFeatures
from .intervals import percent
from .labelled import LabelledSet

EXAMPLES = 6  # images that are shown of a class


def worst_page(results: dict[str, Any], images: LabelledSet, found: LabelledFeatures, classified: Classified) -> str:
    """Return the body of a page with the figures, and images of the worst classes.

    Args:
        results: of ``clipfast eval zeroshot``.
        images: the set, from which the images to show are read again.
        found: what is known of its images.
        classified: their classes.
    """
    title = f"Zero-shot classification: {results['model']} on {results['data']}"
    about = f"{results['images']:,} images, {results['classes']:,} classes. 95% intervals in brackets."
    parts = [f"<h1>{html.escape(title)}</h1>\n<p>{about}</p>\n{table(rows_of(results))}"]
    members = {name: [place for place, label in enumerate(found.labels) if label == name] for name in _shown(results)}
    # The images that a class is known by least come first.
    chosen = {
        row["class"]: sorted(members[row["class"]], key=classified.ahead.__getitem__, reverse=True)[:EXAMPLES]
        for row in results["worst_classes"]
    }
    others = {name: members[name][0] for row in results["worst_classes"] for name in row["taken_for"] if members[name]}
    pictures = thumbnails(images, found, [*others.values(), *(place for some in chosen.values() for place in some)])
    for row in results["worst_classes"]:
        figures_of_class = []
        for place in chosen[row["class"]]:
            taken = classified.classnames[int(classified.best[place, 0])]
            right = taken == row["class"]
            caption = "right" if right else f"taken for {taken}"
            figures_of_class.append(figure(pictures[place], caption, "right" if right else "wrong"))
        figures_of_class += [
            figure(pictures[others[name]], f"an image of {name}", "other")
            for name in row["taken_for"]
            if name in others
        ]
        words = f"Images: {row['images']:,}; right: {row['recall']:.1%}; mean place: {row['mean_place']:.1f}."
        parts.append(
            f'<h2>{html.escape(row["class"])}</h2>\n<p>{words}</p>\n<div class="row">{"".join(figures_of_class)}</div>'
        )
    return "\n".join(parts)


def rows_of(results: dict[str, Any]) -> list[list[str]]:
    """Return a table of the figures of each set of templates; the first row is its head."""
    names = list(results["metrics"])
    rows = [["templates", *names]]
    for key, found in results.get("by_templates", {results["templates"]: results}).items():
        rows.append([key, *(percent(found["metrics"][name], found["intervals"][name]) for name in names)])
    return rows


def _shown(results: dict[str, Any]) -> set[str]:
    """Return the classes of which there are images on the page."""
    return {name for row in results["worst_classes"] for name in (row["class"], *row["taken_for"])}


def thumbnails(images: LabelledSet, found: LabelledFeatures, places: Iterable[int]) -> dict[int, str]:
    """Return small images by their places among the features."""
    by_number = {found.numbers[place]: place for place in places}
    return {by_number[item.number]: thumbnail(item.image) for item in images.only(sorted(by_number))}

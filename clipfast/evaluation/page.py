"""A page of pictures in one file, which shows everything without a network."""

import base64
import hashlib
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import replace_text
from .classification import Classified
from .features import LabelledFeatures
from .intervals import percent
from .labelled import LabelledSet

SIDE = 96  # of a thumbnail, in pixels
EXAMPLES = 6  # images that are shown of a class
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1f2328;
       background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .2rem } p { margin: .2rem 0 .5rem; color: #57606a }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { text-align: left; padding: .2rem 1rem .2rem 0 }
.pair { display: flex; margin-right: 1rem }
.row { display: flex; flex-wrap: wrap; gap: .6rem } figure { margin: 0; width: 6.4rem; overflow-wrap: anywhere }
img { width: 6rem; height: 6rem; object-fit: contain; background: #f6f8fa; border: 2px solid #cf222e }
img.picture { width: 100%; height: auto; border: 0; background: none }
th button { font: inherit; font-weight: 600; padding: 0; border: 0; background: none; cursor: pointer }
td[data-value] { white-space: nowrap } tfoot td { border-top: 1px solid #d0d7de; font-weight: 600 }
.right img { border-color: #1a7f37 } .other img { border: 2px dashed #8c959f } figcaption { font-size: .8rem }
"""


def thumbnail(image: Image.Image) -> str:
    """Return a small JPEG of an image as an address that holds it."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def write_page(path: Path, body: str, script: str = "") -> None:
    """Write a page whose policy forbids to load anything, and to run anything but one script.

    Args:
        path: the file.
        body: its content.
        script: what it runs.

    Raises:
        DiskFullError: there is no space.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, body = f"{policy}; script-src 'sha256-{digest}'", f"{body}\n<script>{script}</script>"
    replace_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>clipfast eval</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n",
    )


def worst_page(results: dict[str, Any], images: LabelledSet, found: LabelledFeatures, classified: Classified) -> str:
    """Return the body of a page with the figures, and images of the worst classes.

    Args:
        results: of ``clipfast eval zeroshot``.
        images: the set, from which the images to show are read again.
        found: what is known of its images.
        classified: their classes.
    """
    title = f"Zero-shot classification: {results['model']} on {results['data']}"
    names = list(results["metrics"])
    rows = [["templates", *names]]
    for key, figures in results.get("by_templates", {results["templates"]: results}).items():
        rows.append([key, *(percent(figures["metrics"][name], figures["intervals"][name]) for name in names)])
    cells = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    about = f"{results['images']:,} images, {results['classes']:,} classes. 95% intervals in brackets."
    parts = [f"<h1>{html.escape(title)}</h1>\n<p>{about}</p>\n<table>\n{cells}\n</table>"]
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


def _shown(results: dict[str, Any]) -> set[str]:
    """Return the classes of which there are images on the page."""
    return {name for row in results["worst_classes"] for name in (row["class"], *row["taken_for"])}


def thumbnails(images: LabelledSet, found: LabelledFeatures, places: Iterable[int]) -> dict[int, str]:
    """Return small images by their places among the features."""
    by_number = {found.numbers[place]: place for place in places}
    return {by_number[item.number]: thumbnail(item.image) for item in images.only(sorted(by_number))}


def figure(address: str, caption: str, kind: str) -> str:
    """Return a picture with its caption, with a border by its kind: right, wrong or other."""
    return (
        f'<figure class="{kind}"><img src="{address}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
    )

"""The HTML page of found pictures (``--html``): sortable thumbnails with scores, captions and metadata, in one file."""

from __future__ import annotations

import html
import os
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.page import thumbnail, write_page
from ..models.images import ImageError, open_image

if TYPE_CHECKING:
    from PIL import Image

SIDE = 256  # the longer side of a thumbnail in pixels


@dataclass(frozen=True)
class Item:
    """A picture to be shown in a gallery, with its texts.

    Attributes:
        image: the picture, or its path or bytes; the page has a message in place of a picture that is missing or
            broken.
        caption: the text below the picture.
        score: the score, where higher is better; the page can sort and filter by it.
        path: the path or URL of the picture. The page links to it if it is a file.
        group: the name of a group; pictures of a group are shown together below its name.
        metadata: the values by column; values that are ``None`` are left out.
        mark: a highlighted word, such as "kept".
    """

    image: Image.Image | Path | bytes | None
    caption: str = ""
    score: float | None = None
    path: str = ""
    group: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    mark: str = ""


def gallery(path: str | Path, title: str, items: Iterable[Item], *, about: str = "", side: int = SIDE) -> int:
    """Write a self-contained HTML page of pictures. All text is escaped, and shown as it is.

    Args:
        path: the file to write.
        title: the title of the page.
        items: the pictures to show, in this order. They are taken one at a time, and only thumbnails are kept.
        about: a sentence or two below the title, such as the query, the folder and the model.
        side: the side of the thumbnails in pixels. With more than the default, they are also shown larger.

    Returns:
        The size of the file in bytes.

    Raises:
        DiskFullError: there is no space.
    """
    path = Path(path)
    groups: dict[str, list[str]] = {}
    columns: dict[str, None] = {}
    for item in items:
        groups.setdefault(item.group, []).append(_card(item, path.absolute().parent, side))
        columns |= dict.fromkeys(_columns(item))
    count = sum(map(len, groups.values()))
    body = [f"<h1>{html.escape(title)}</h1>"]
    if about:
        body.append(f"<p>{html.escape(about)}</p>")
    told = f"{count:,} {'picture' if count == 1 else 'pictures'}." if count else "No pictures."
    body.append(f"<p>{told}</p>")
    body.append(_controls(list(columns)))
    large = " large" if side > SIDE else ""
    for name, cards in groups.items():
        head = f'<h2><span class="name">{html.escape(name)}</span> <span class="n">{len(cards):,} shown</span></h2>\n'
        body.append(f'<section>\n{head if name else ""}<ul class="cards{large}">\n{"".join(cards)}</ul>\n</section>')
    body.append(
        '<dialog id="larger" aria-label="picture"><nav><button class="plain" id="back" aria-label="previous">←</button>'
        '<button class="plain" id="next" aria-label="next">→</button><button class="plain" id="close">Close</button>'
        '</nav><div id="content"></div></dialog>'
    )
    assets = files("clipfast").joinpath("assets")
    script, style = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("gallery.js", "gallery.css"))
    return write_page(path, title, "\n".join(body), script=script, style=style)


def _columns(item: Item) -> list[str]:
    """Return the names of the item's values that are not None, by which the gallery can sort."""
    own = {"score": item.score, "caption": item.caption or None, "path": item.path or None}
    return [name for name, value in {**own, **item.metadata}.items() if value is not None]


def _controls(columns: list[str]) -> str:
    """Return the HTML of the gallery's controls for sorting and filtering; they are hidden unless scripts run."""
    options = "".join(f'<option value="{html.escape(name)}">{html.escape(name)}</option>' for name in columns)
    bounds = (
        '<span class="bounds"><label>score from <input type="number" step="any" id="least"></label>'
        '<label>to <input type="number" step="any" id="most"></label></span>'
    )
    return (
        '<div class="controls" id="controls" role="search" hidden>'
        '<input type="search" id="words" placeholder="words to find" aria-label="words to find">'
        f"{bounds if 'score' in columns else ''}"
        f'<label>sort by <select id="column"><option value="">order given</option>{options}</select></label>'
        '<select id="way" aria-label="direction" disabled><option value="up">ascending</option>'
        '<option value="down">descending</option></select><output id="count"></output></div>'
        '<p id="none" hidden>No picture fits: take words or bounds of the score away.</p>'
    )


def _card(item: Item, folder: Path, side: int) -> str:
    """Return the HTML of a picture with its texts as an element of the gallery's list."""
    parts = []
    if item.score is not None:
        parts.append(f'<b class="score" data-value="{float(item.score)!r}">{float(item.score):.4f}</b>')
    if item.mark:
        parts.append(f'<span class="mark">{html.escape(item.mark)}</span>')
    if item.caption:
        parts.append(f'<span class="caption">{html.escape(item.caption)}</span>')
    line = f'<p class="line">{" ".join(parts)}</p>' if parts else ""
    if item.path and Path(item.path).name != item.caption:
        line += f'<p class="line name">{html.escape(Path(item.path).name)}</p>'
    fields = [("path", _path(item.path, folder))] if item.path else []
    fields += [(name, _value(value)) for name, value in item.metadata.items() if value is not None]
    cells = "".join(f"<dt>{html.escape(name)}</dt>{cell}" for name, cell in fields)
    return f'<li class="card"><button class="open">{_picture(item, side)}</button>{line}<dl hidden>{cells}</dl></li>\n'


def _picture(item: Item, side: int) -> str:
    """Return the gallery's HTML of a picture's thumbnail, or of a message in its place."""
    if item.image is None:
        return "no picture"
    try:
        image = open_image(item.image) if isinstance(item.image, bytes | Path) else item.image
    except ImageError as error:
        return html.escape(str(error))
    label = html.escape(item.caption or item.path or "picture")
    return f'<img src="{thumbnail(image, side)}" alt="{label}" loading="lazy" decoding="async">'


def _path(path: str, folder: Path) -> str:
    """Return the HTML of a picture's path for the gallery, as a link relative to ``folder`` if the file exists."""
    if not os.path.isfile(path):
        return f"<dd>{html.escape(path)}</dd>"
    address = urllib.parse.quote(os.fsencode(os.path.relpath(path, folder)))
    return f'<dd><a href="{address}" target="_blank" rel="noopener">{html.escape(path)}</a></dd>'


def _value(value: Any) -> str:
    """Return the HTML of a metadata value for the gallery; a float shows few digits, but is sorted by all of them."""
    if isinstance(value, float):
        return f'<dd data-value="{value!r}">{value:.6g}</dd>'
    return f"<dd>{html.escape(str(value))}</dd>"
